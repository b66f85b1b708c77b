"""Reads pickled text, numbers, lists and dictionaries, and nothing else, from data that nobody vouches for.

LiveCodeBench's private tests are pickled. Python's own reader imports and calls whatever a pickle names. This one
knows the opcodes that build plain values; at any other it stops, so that nothing is imported or called.
"""

import pickletools
from typing import Any

Plain = str | int | float | list[Any] | dict[Any, Any]

_MARK = object()
_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


class NotPlain(ValueError):
    """A pickle that is broken, or that holds more than text, numbers, lists and dictionaries."""


def read_plain_pickle(data: bytes) -> Plain:
    """Return the value in a pickle of any protocol.

    A list or dictionary may stand in one place only: one that is referred to again could be its own part, or stand for
    more than memory holds.

    Raises:
        NotPlain: for anything else.
    """
    try:
        return _interpret(data)
    except NotPlain:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        # What pickletools raises for a torn or malformed stream, and what a stack too short or a bad key leads to.
        raise NotPlain(f"a broken pickle: {error}") from None


def _interpret(data: bytes) -> Plain:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def above_mark() -> list[Any]:
        """Take everything above the last mark off the stack, and the mark."""
        position = next((at for at in range(len(stack) - 1, -1, -1) if stack[at] is _MARK), None)
        if position is None:
            raise NotPlain("a broken pickle: no mark")
        values = stack[position + 1 :]
        del stack[position:]
        return values

    def pairs(values: list[Any]) -> dict[Any, Any]:
        return dict(zip(values[::2], values[1::2], strict=True))

    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "LIST":
            stack.append(above_mark())
        elif name == "DICT":
            stack.append(pairs(above_mark()))
        elif name in ("APPEND", "APPENDS"):
            values = above_mark() if name == "APPENDS" else [stack.pop()]
            _container(stack, list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = above_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _container(stack, dict).update(pairs(values))
        elif name in _PUTS or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GETS:
            value = memo[argument]
            if not isinstance(value, (str, int, float)):
                raise NotPlain(f"a list or dictionary is referred to twice, at byte {position}")
            stack.append(value)
        elif name == "STOP":
            if len(stack) != 1 or stack[0] is _MARK:
                raise NotPlain("a broken pickle: more or less than one value at its end")
            return stack[0]
        elif name not in _IGNORED:
            raise NotPlain(f"opcode {name} at byte {position}; only text, numbers, lists and dictionaries are read")
    raise NotPlain("a broken pickle: no end")


def _container(stack: list[Any], kind: type) -> Any:
    """Return the list or dictionary on top of the stack."""
    top = stack[-1]
    if type(top) is not kind:
        raise NotPlain(f"a broken pickle: items for a {type(top).__name__}")
    return top
