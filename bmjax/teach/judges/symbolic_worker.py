"""The process that compares mathematics for symbolic.py. It is run as a script and imports nothing of bmjax."""

import json
import logging
import resource
import sys

WORKER_BYTES = 4 * 2**30


def compare(reference: str, answer: str) -> dict[str, object]:
    """Return {"equal": bool}, or {"error": text} for a reference that is no mathematics."""
    from math_verify import parse, verify

    gold = parse(f"${reference}$", parsing_timeout=None) or parse(reference, parsing_timeout=None)
    if not gold:
        return {"error": "the reference is not mathematics"}
    written = [answer]
    if len(answer) < 200 and "$" not in answer and "\\boxed" not in answer:
        written.append(f"${answer}$")
    parsed = [parse(text, parsing_timeout=None) for text in written]
    return {"equal": any(verify(gold, expression, timeout_seconds=None) for expression in parsed if expression)}


def serve() -> None:
    """Answer one JSON line for each JSON line of stdin."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.CRITICAL)
    try:
        import math_verify  # noqa: F401

        reply: dict[str, object] = {"ready": True}
    except ImportError as error:
        reply = {"error": f"math-verify cannot be imported: {error}"}
    print(json.dumps(reply), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = compare(**json.loads(line))
        except Exception as error:
            # Any failure inside sympy is the judge's, not the answer's.
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
