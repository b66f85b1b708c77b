"""What a user's mistake looks like: the exception, the disk errors among them, and hints at the nearest known word.

Every module may import this one; it imports nothing heavy, so that a command can fail fast.
"""

import difflib
import errno
from collections.abc import Sequence

MAX_LINE = 1000  # characters of an error
MAX_WORD = 200  # characters of a word that is looked for among others: more take minutes


class UserError(Exception):
    """A mistake its user can mend. The message is one line; commands print it and exit with code 2.

    Line breaks and control characters, which names in files and configs may bring in, become spaces.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}...")


# Refusals of the machine that its user can mend: a full or failing disk, missing rights, a path too long or wrong.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.EMFILE,
)  # fmt: skip


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to be quoted in ours; the error's type where it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint: `; did you mean 'x'?`, or the known words when none is near."""
    short = [name for name in known if len(name) <= MAX_WORD]
    near = difflib.get_close_matches(word, short, n=1, cutoff=0.6) if len(word) <= MAX_WORD else []
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""
