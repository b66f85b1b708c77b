"""How long to wait before the next attempt: backoff, and all the ways in which endpoints say when to come back."""

import email.utils
import random
import re
import time
from collections.abc import Mapping
from datetime import datetime

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_YEAR_2001 = 1e9  # a number beyond it is a time, not a duration


def backoff(attempt: int) -> float:
    """Return the seconds to wait after an attempt, numbered from 1: exponential, with jitter, at most a minute."""
    return random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))


def jittered(seconds: float, attempt: int) -> float:
    """Return a wait that an endpoint asked for, a little longer, so that not all who wait come back at once."""
    return seconds + random.uniform(0.0, 0.25) * (backoff(attempt) + min(seconds, 4.0))


def retry_after(headers: Mapping[str, str], status: int) -> float | None:
    """Return the seconds after which an endpoint wants to be asked again; None where it does not say.

    Arguments:
        headers: of the reply, looked up in any case. Read are, in this order, retry-after-ms, Retry-After (seconds, a
            duration or a date), and with status 429 x-ratelimit-reset and its like: of requests and of tokens the one
            that is used up, else the longest.
        status: the HTTP status.
    """
    if (milliseconds := _seconds(headers.get("retry-after-ms"))) is not None:
        return _bounded(milliseconds / 1000)
    if (seconds := _seconds(headers.get("retry-after"))) is not None:
        return _bounded(seconds)
    if status != 429:
        return None
    waits, used_up = [], []
    for name, value in headers.items():
        lower = name.lower()
        if "ratelimit" not in lower or "reset" not in lower or (seconds := _seconds(value)) is None:
            continue
        waits.append(seconds)
        if headers.get(lower.replace("reset", "remaining"), "").strip() in ("0", "0.0"):
            used_up.append(seconds)
    return _bounded(max(used_up or waits)) if waits else None


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _seconds(value: str | None) -> float | None:
    """Return the seconds that a header's value stands for: a number, `6m0s`, a Unix time or a date."""
    text = (value or "").strip()
    try:
        number = float(text)
    except ValueError:
        pass
    else:
        if number != number:
            return None
        if number > 1000 * _YEAR_2001:
            number /= 1000
        return number - time.time() if number > _YEAR_2001 else number
    parts = _DURATION.findall(text.lower())
    if parts and "".join(number + unit for number, unit in parts) == text.lower().replace(" ", ""):
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    for parse in (email.utils.parsedate_to_datetime, datetime.fromisoformat):
        try:
            return parse(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            continue
    return None
