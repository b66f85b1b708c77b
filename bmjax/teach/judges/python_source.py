"""Parses Python text for all threads: every judge and adapter that reads source comes through here.

CPython up to 3.12 counts the depth of a tree that it builds in a variable of the whole process. Two threads that
build trees at once can disturb the count, and `ast.parse` then raises `SystemError: AST constructor recursion depth
mismatch` for a good program. Judges run in threads, so one lock keeps them apart.
"""

import ast
import re
import threading
import warnings
from typing import Any

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what hostile text makes `parse` raise
_FILE = "<answer>"
_lock = threading.Lock()

# Parsing says what it thinks of invalid escapes. The answers are not ours to mend.
warnings.filterwarnings("ignore", module=re.escape(_FILE))


def parse(text: str) -> ast.Module:
    """Return the syntax tree of a program; raises one of `UNREADABLE` where the text is no Python."""
    with _lock:
        return ast.parse(text, _FILE)


def try_parse(text: str) -> ast.Module | None:
    """Return the syntax tree of a program, None where the text is no Python."""
    try:
        return parse(text)
    except UNREADABLE:
        return None


def literal(text: str) -> Any:
    """Return the value of a Python literal; raises one of `UNREADABLE` where the text is none."""
    with _lock:
        return ast.literal_eval(text.strip())
