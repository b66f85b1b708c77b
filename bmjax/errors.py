"""What a user's mistake looks like: the exception, disk errors, packages that are missing, the nearest known word.

Every module may import this one; it imports nothing heavy, so that a command can fail fast.
"""

import difflib
import errno
import re
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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def disk_problem(error: OSError) -> str:
    """Return what a disk refused, in the system's words, and what helps against it."""
    problem = error.strerror or first_line(error)
    if error.errno in _FULL:
        return f"{problem}; free some space, or write to another place"
    if error.errno in _FORBIDDEN:
        return f"{problem}; get the right to it, or choose another place"
    return problem


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to be quoted in ours; the error's type where it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def shortened(texts: Sequence[str], most: int) -> str:
    """Join the first `most` texts for a message, and say how many more there are."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint: `; did you mean 'x'?`, or the known words when none is near."""
    short = [name for name in known if len(name) <= MAX_WORD]
    near = difflib.get_close_matches(word, short, n=1, cutoff=0.6) if len(word) <= MAX_WORD else []
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


# Who makes what the configs, the README and the tutorial name.
_MAKERS = {
    "runs/demo": "./scripts/demo",
    "runs/steps/traces": "bmjax collect configs/collect.yaml",
    "runs/steps/rows": "bmjax select configs/select.yaml",
    "runs/steps/branch": "bmjax train configs/train.yaml",
    "runs/steps/scores": "bmjax eval configs/eval.yaml",
    "runs/mine": "bmjax run configs/own_problems.yaml --output runs/mine",
}


def maker_hint(path: object) -> str:
    """Return which command makes a file that examples name; nothing for other paths."""
    text = str(path).replace("\\", "/")
    makers = (maker for start, maker in _MAKERS.items() if re.search(rf"(?:^|/){start}(?:/|$)", text))
    return next((f"; {maker} makes it" for maker in makers), "")


# Where a module is not called as the package that brings it.
_PACKAGES = {"orbax": "orbax-checkpoint", "markdown-it": "markdown-it-py"}
_REQUIREMENT = re.compile(r"""([\w.-]+).*;.*\bextra == ["']([\w-]+)["']""")
_NESTED = re.compile(r"""bmjax\[([\w,-]+)\].*\bextra == ["']([\w-]+)["']""")


def install(*extras: str) -> str:
    """Return the command that installs an extra. bmjax is in no registry: the command is for a clone of it."""
    return f"run pip install '.[{','.join(extras)}]' in bmjax's clone"


def missing_package(error: ModuleNotFoundError, wanted: str | None = None) -> UserError | None:
    """Return the line for a package that is not installed and comes with an extra of bmjax; None for other modules.

    wanted: the extra that brings all that is needed, which is named where it brings the package.
    """
    import importlib.metadata  # takes 30 ms, which no start has to pay

    module = (error.name or "").partition(".")[0]
    package = module.replace("_", "-")
    package = _PACKAGES.get(package, package)
    try:
        requirements = importlib.metadata.requires("bmjax") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        requirements = []
    matches = [match for text in requirements if (match := _REQUIREMENT.match(text))]
    extras = {extra for name, extra in (match.groups() for match in matches) if name.replace("_", "-") == package}
    # An extra may bring others, as serve brings train: "bmjax[train]; extra == 'serve'".
    for text in requirements:
        if (nested := _NESTED.match(text)) and extras & {*nested[1].split(",")}:
            extras.add(nested[2])
    preferred = (wanted, "train", "teach", "report", "serve")
    extra = next((name for name in preferred if name in extras), None) or min(extras, default=None)
    if extra is None:
        return None
    otherwise = "" if extra == "all" else " (or '.[all]')"
    return UserError(f"this needs the package {package}, which is not installed; {install(extra)}{otherwise}")
