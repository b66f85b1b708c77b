"""Reads the values that answers state: numbers with units, lists, tuples, intervals, equations, matrices, words.

`read` gives the readings of a text, `equal` compares two of them: True, False, or None where this module cannot tell
and math-verify must. It knows which orders count, that x > 3 is (3, ∞), and that 1 ± 2 are two numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from bmjax.teach.judges.ambiguous import other_texts
from bmjax.teach.judges.expressions import Tree, Unreadable, parse
from bmjax.teach.judges.notation import LONGEST, matching_bracket, normal_form, split_outside
from bmjax.teach.judges.units import Unit, read_unit

_MOST_ITEMS = 64


@dataclass(frozen=True)
class Quantity:
    """One expression. unit: None where none is written or it is unknown. sure: False for the `m` of `5m`."""

    tree: Tree
    unit: Unit | None = None


@dataclass(frozen=True)
class Sequenced:
    """Several values. brackets: "" for a plain list, "{}" for a set, else the two brackets of a tuple or interval."""

    items: tuple["Value", ...]
    brackets: str


@dataclass(frozen=True)
class Interval:
    """The numbers between two ends, of which None is infinity."""

    low: "Value | None"
    high: "Value | None"
    closed: tuple[bool, bool]
    name: str = ""


@dataclass(frozen=True)
class Union:
    """Several intervals."""

    parts: tuple[Interval, ...]


@dataclass(frozen=True)
class Equation:
    """Two sides. name: the variable or function that stands alone on the left, else empty."""

    left: "Value"
    right: "Value"
    name: str


@dataclass(frozen=True)
class Matrix:
    """Rows of values."""

    rows: tuple[tuple["Value", ...], ...]


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics, folded."""

    text: str


Value = Quantity | Sequenced | Interval | Union | Equation | Matrix | Words

_SEPARATOR = re.compile(r"\s*(?:,?\s*(?:«(?:and|or)»|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|和|或者?|与)|[,;])\s*")
_PAIRS = {"(": ")]", "[": ")]", "⦃": "⦄", "]": "[", "{": "}"}
_MATRIX = re.compile(r"^\\begin ?\{([pbvBV]?matrix|array)\}\s*(?:\{[lcr|]*\})?(.*)\\end ?\{\1\}$", re.DOTALL)
_CASES = re.compile(r"^(?:[a-zA-Z](?:\([a-z]\))?\s*=\s*)?\\begin ?\{cases\}(.*)\\end ?\{cases\}$", re.DOTALL)
_RELATION = re.compile(r"[=<>≤≥≠∈]")
_LONE_NAME = re.compile(
    r"(?:\|[a-zA-Z]\|"
    r"|\\?[a-zA-Zα-ωΑ-Ω](?:_(?:\{\w{1,4}\}|\w))?'?(?:\s*\([a-z](?:,\s*[a-z])*\))?|«[^»]{1,40}»|[A-Za-z ]{2,40})"
)
_BASE_WORDS = re.compile(
    r"^(\d[0-9A-F]*|[A-F]+\d[0-9A-F]*|[A-F]{2,})\s*\(?\s*(?:«?(?:in )?base[ -]?«?»?)\s*(\d+|two|eight)»?\)?$",
    re.IGNORECASE,
)
_UNIT_TAIL = re.compile(
    r"«[^»]*»|(?<![A-Za-z\\])[A-Za-z]{2,}|[$€£¥₹₩%°¢℃]|[\u4e00-\u9fff]+"
    r"|\d(?: ?)(?P<glued>[A-Za-zΩμ/]+(?:\^?\{?-?\d\}?)?(?:/[a-z]+(?:\^?\{?\d\}?)?)?)$"
)
_OR_ABOUT = re.compile(r"(?<=[\d})]),? (?:or|which is|i\.e\.)? ?(?:about|approximately|roughly) (?=[-\d$.])")
_ANGLE_INSIDE = re.compile(r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc)[^«%]*°")
_FUNCTION = re.compile(
    r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|pi|cis|infty|inf|binom|frac|begin|end"
    r"|matrix|pmatrix|bmatrix|vmatrix|or|and"
)
_REALS = re.compile(
    r"«?(?:(?:x|it) (?:is|can be) )?(?:the )?(?:set of )?(?:all |any )?real(?:s| numbers?)»?", re.IGNORECASE
)
_SET_BUILDER = re.compile(r"⦃\s*([a-zA-Z])\s*(?:∈\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?[|:]\s*(\S.*)⦄")
_EMPTY = re.compile(r"«?(?:the )?(?:empty|null) set»?", re.IGNORECASE)
_FILLER = re.compile(
    r"^(?:≈|~|«?(?:approximately|about|around|roughly|exactly|only|just|a total of|equal to|equals)»?)\s*",
    re.IGNORECASE,
)


_NUMBER_AND_UNIT = re.compile(
    r"(-?\s*[\d.]+(?:/\d+| ?\* ?10 ?\^ ?(?:\{ ?-? ?\d+ ?\}|-?\d+))?)( ?)"
    r"([A-Za-zΩμ](?:[A-Za-zΩμ/ *]|\^ ?\{? ?-?\d ?\}?)*)"
)


@lru_cache(maxsize=8192)
def read(text: str, glued: bool = False) -> tuple[Value, ...]:
    """Return the readings of a text, none where it is unreadable.

    `(1,234)` is one number or two, `5 m` a length or a product. glued: whether `5m` without a space is a length too,
    which it is in an answer to "how long", but not in a reference.
    """
    if len(text) > LONGEST:
        return ()
    readings: list[Value] = []
    form = _OR_ABOUT.sub("≈", normal_form(text))
    if (plain := _NUMBER_AND_UNIT.fullmatch(form)) and (plain[2] or glued) and (unit := read_unit(plain[3])):
        readings.append(Quantity(parse(plain[1]), unit))
    # 5 apples: a number of things
    if (
        (things := re.fullmatch(r"(-?\d+(?:\.\d+)?) ([A-Za-z]{3,})", form))
        and not readings
        and not _FUNCTION.fullmatch(things[2])
    ):
        return (Quantity(parse(things[1])),)
    # A ratio, unless it may be a time of day.
    ratio = re.fullmatch(r"(\d+) ?(?::| to ) ?(\d+)", form)
    if ratio and int(ratio[2]) and not (int(ratio[1]) < 24 and len(ratio[2]) == 2 and int(ratio[2]) < 60):
        readings.append(Quantity(parse(f"{ratio[1]}/{ratio[2]}")))
    # Of 7/3 ≈ 2.33 both sides are the answer.
    # 204 minutes = 3.4 hours likewise.
    twice = re.fullmatch(r"-?\d+(?:\.\d+)? ?([A-Za-z]+) ?= ?-?\d+(?:\.\d+)? ?([A-Za-z]+)", form)
    units = [read_unit(twice[1]), read_unit(twice[2])] if twice else [None, None]
    alike = units[0] is not None and units[1] is not None and units[0][0] == units[1][0]
    sides = re.split("[≈=]", form) if alike else form.split("≈")
    if len(sides) == 2 and sides[0].strip() and re.search(r"[\d√π]", sides[0]):
        return (*read(sides[0], glued), *read(sides[1], glued))
    # A reference of 5.9 million may count the millions.
    if (
        not glued
        and (counted := re.fullmatch(r"\((\d+(?:\.\d+)?)\*10\^\{\d+\}\)", form))
        and re.search(r"illion|thousand|hundred", text)
    ):
        readings.append(Quantity(parse(counted[1])))
    forms = [form, *other_texts(form)]
    if re.search(r"[(\[{].*\d,\d{3}(?!\d)", text):
        forms.append(normal_form(text, thousands=False))
    for other in forms:
        try:
            reading = _read(other, 0)
        except (Unreadable, RecursionError):
            continue
        if reading not in readings:
            readings.append(reading)
    return tuple(readings)


def _read(text: str, depth: int) -> Value:
    if depth > 8 or not text:
        raise Unreadable("nothing, or too deep")
    text = text.strip()
    while len(text) > 1 and text[0] == "{" and matching_bracket(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if matrix := _MATRIX.match(text):
        rows = [row for row in re.split(r"⏎(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        return Matrix(tuple(tuple(_read(cell, depth + 1) for cell in row.split("&")) for row in rows[:_MOST_ITEMS]))
    if cases := _CASES.match(text):
        lines = [line.strip().rstrip(",;.") for line in cases[1].split("⏎") if line.strip()]
        if not any("&" in line for line in lines):
            return _listed([_read(line, depth + 1) for line in lines], lines)
        branches = [
            re.split(r"\s*,?\s*&\s*(?:«?(?:if|for|when)»?(?![A-Za-z]))?\s*", line, maxsplit=1) for line in lines
        ]
        pairs = [tuple(_read(part, depth + 1) for part in branch) for branch in branches[:_MOST_ITEMS]]
        return Sequenced(tuple(Sequenced(pair, "()") for pair in pairs), "{}")
    if named := re.match(r"(?:\\?[a-zA-Zα-ω]|\([a-z](?:, ?[a-z])+\))\s*(?:∈|=(?=.*∪))\s*", text):
        text = text[named.end() :]
        if text[:1] == "{" and matching_bracket(text, 0) == len(text) - 1:
            text = f"⦃{text[1:-1]}⦄"
    if text in ("ℝ", "\\mathbb {R}", "\\mathbb{R}", "\\R"):
        return Interval(None, None, (False, False))
    if _REALS.fullmatch(text):
        return Interval(None, None, (False, False))
    if built := _SET_BUILDER.fullmatch(text):
        return _read(built[2], depth + 1)
    # [0, 1[ leaves out its end, as [0, 1) does.
    if (outward := re.fullmatch(r"([\[\]])([^\[\],;]+)[,;]([^\[\],;]+)([\[\]])", text)) and outward[1] + outward[
        4
    ] != "[]":
        low, high = (None if part.strip(" +-") == "∞" else _read(part, depth + 1) for part in (outward[2], outward[3]))
        return Interval(low, high, (outward[1] == "[", outward[4] == "]"))
    if text in ("∅", "⦃⦄", "⦃ ⦄") or _EMPTY.fullmatch(text):
        return Sequenced((), "{}")

    # Several values: joined sets, then a list of items, then what one pair of brackets holds.
    parts = split_outside(text, re.compile(r"\s*(?:∪|«(?:union|or)»|(?<![A-Za-z])or(?![A-Za-z]))\s*"))
    if len(parts) > 1:
        pieces = [_as_interval(_read(part, depth + 1)) for part in parts]
        intervals: list[Interval] = []
        for piece in pieces:
            intervals += piece.parts if isinstance(piece, Union) else [piece] if isinstance(piece, Interval) else []
        if all(isinstance(piece, Interval | Union) for piece in pieces):
            return Union(tuple(intervals))
        if "∪" in text:
            sets = [_read(part, depth + 1) for part in parts]
            return Sequenced(
                tuple(item for part in sets for item in (part.items if isinstance(part, Sequenced) else [part])), "{}"
            )
    parts = split_outside(text, _SEPARATOR)
    if len(parts) > 1:
        return _listed([_read(part, depth + 1) for part in parts if part], parts)
    if (
        text[0] in "([⦃]"
        and (text[0] == "]" or matching_bracket(text, 0) == len(text) - 1)
        and text[-1] in _PAIRS[text[0]]
    ):
        inner = split_outside(text[1:-1], re.compile(r"\s*[,;]\s*"))
        if len(inner) > 1 or text[0] == "⦃":
            items = _expanded([_end(part, depth) for part in inner])
            if text[0] == "⦃":
                return Sequenced(tuple(items), "{}")
            if len(inner) == 2 and ("∞" in text or text[0] + text[-1] not in ("()", "[]")):
                low, high = (
                    None if part.strip(" +-") == "∞" else item for part, item in zip(inner, items, strict=True)
                )
                return Interval(low, high, (text[0] == "[", text[-1] == "]"))
            return Sequenced(tuple(items), text[0] + text[-1])
    if _RELATION.search(text):
        return _related(text, depth)
    if "±" in text or "∓" in text:
        return _signs(text)
    return _quantity(text)


def _end(part: str, depth: int) -> Value:
    return Words("∞") if part.strip(" +") in ("∞", "-∞", "- ∞") else _read(part, depth + 1)


def _listed(items: list[Value], parts: Sequence[str]) -> Value:
    """Make a list, or of `x > 1 and x < 2` the numbers that are both; of 5 hours 30 minutes their sum is no list."""
    items = _expanded(items)
    if len(items) > _MOST_ITEMS:
        raise Unreadable("too many items")
    if len(items) == 2 and all(isinstance(item, Interval) and item.name for item in items):
        first, second = items
        assert isinstance(first, Interval) and isinstance(second, Interval)
        if first.name == second.name and (first.low is None) != (second.low is None):
            below, above = (first, second) if first.low is None else (second, first)
            return Interval(above.low, below.high, (above.closed[0], below.closed[1]), first.name)
    # 5 hours and 30 minutes
    units = [item.unit for item in items if isinstance(item, Quantity) and item.unit]
    if len(units) == len(items) == 2 and units[0][0] == units[1][0] and units[0][1] > units[1][1]:
        first, second = items
        assert isinstance(first, Quantity) and isinstance(second, Quantity)
        return Quantity(("+", first.tree, ("*", ("number", units[1][1] / units[0][1]), second.tree)), units[0])
    # x = 3 or 5, x = 3, 5
    if isinstance(items[0], Equation) and items[0].name and not any(isinstance(item, Equation) for item in items[1:]):
        items[0] = items[0].right
    return Sequenced(tuple(items), "")


def _expanded(items: list[Value]) -> list[Value]:
    """Put the values of `1 ± 2` among the others."""
    expanded: list[Value] = []
    for item in items:
        expanded += item.items if isinstance(item, Sequenced) and item.brackets == "±" else [item]
    return expanded


def _signs(text: str) -> Value:
    both = [text.replace("±", sign).replace("∓", other) for sign, other in (("+", "-"), ("-", "+"))]
    return Sequenced(tuple(_quantity(one) for one in both), "±")


def _related(text: str, depth: int) -> Value:
    """Read an equation, a chain of inequalities, or x ∈ a set."""
    if "∈" in text:
        name, _, rest = text.partition("∈")
        if not _LONE_NAME.fullmatch(name.strip()):
            raise Unreadable("∈")
        return _read(rest, depth + 1)
    signs = _RELATION.findall(text)
    sides = [side.strip() for side in _RELATION.split(text)]
    if set(signs) == {"="}:
        # Of a chain, x = 2 + 3 = 5, the first and the last side count.
        turned = len(sides) == 2 and _LONE_NAME.fullmatch(sides[1]) and "«" not in sides[1]
        if len(sides) > 2 or not sides[0] or (_is_arithmetic(sides[0]) and not turned):
            if not _LONE_NAME.fullmatch(sides[0]):
                return _read(text.rpartition("=")[2], depth + 1)
            return Equation(Words(_squeezed(sides[0])), _read(sides[-1], depth + 1), _squeezed(sides[0]))
        if _LONE_NAME.fullmatch(sides[0]):
            return Equation(Words(_squeezed(sides[0])), _read(sides[1], depth + 1), _squeezed(sides[0]))
        if _LONE_NAME.fullmatch(sides[1]) and not _is_arithmetic(sides[1]):
            return Equation(Words(_squeezed(sides[1])), _read(sides[0], depth + 1), _squeezed(sides[1]))
        return Equation(_read(sides[0], depth + 1), _read(sides[1], depth + 1), "")
    if len(signs) == 1:
        if _LONE_NAME.fullmatch(sides[1]) and signs[0] in "<>≤≥":
            sides, signs = sides[::-1], [{"<": ">", ">": "<", "≤": "≥", "≥": "≤"}[signs[0]]]
        if not _LONE_NAME.fullmatch(sides[0]) or _LONE_NAME.fullmatch(sides[1]):
            raise Unreadable("an inequality between expressions")
        name, bound = _squeezed(sides[0]), _read(sides[1], depth + 1)
        if signs[0] == "≠":
            return Union((Interval(None, bound, (False, False), name), Interval(bound, None, (False, False), name)))
        closed = signs[0] in "≤≥"
        size = re.fullmatch(r"\|([a-zA-Z])\|", name)
        if size and signs[0] in "<≤" and isinstance(bound, Quantity):
            return Interval(Quantity(("-", ("number", Fraction(0)), bound.tree)), bound, (closed, closed), size[1])
        if size and signs[0] in ">≥" and isinstance(bound, Quantity):
            negative = Quantity(("-", ("number", Fraction(0)), bound.tree))
            return Union((Interval(None, negative, (False, closed), size[1]),
                          Interval(bound, None, (closed, False), size[1])))  # fmt: skip
        if signs[0] in "<≤":
            return Interval(None, bound, (False, closed), name)
        return Interval(bound, None, (closed, False), name)
    if len(signs) == 2 and (set(signs) <= set("<≤") or set(signs) <= set(">≥")) and _LONE_NAME.fullmatch(sides[1]):
        ends = [None if side.strip(" +-") == "∞" else _read(side, depth + 1) for side in (sides[0], sides[2])]
        closed_ends = [sign in "≤≥" for sign in signs]
        if signs[0] in ">≥":
            ends, closed_ends = ends[::-1], closed_ends[::-1]
        return Interval(ends[0], ends[1], (closed_ends[0], closed_ends[1]), _squeezed(sides[1]))
    raise Unreadable("relations")


def _is_arithmetic(text: str) -> bool:
    return re.search(r"\d", text) is not None and re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", text) is None


def _squeezed(text: str) -> str:
    return re.sub(r"[\s{}«»]", "", text)


def _quantity(text: str) -> Value:
    """Read an expression with a unit after or before it, a sum such as 5 hours 30 minutes, or else words."""
    text = _FILLER.sub("", text)
    if based := _BASE_WORDS.match(text):
        text = f"{based[1]}_{{{ {'two': '2', 'eight': '8'}.get(based[2].lower(), based[2]) }}}"
    text = re.sub(r"_ ?(?:\{\s*)?«(\w+)»\s*\}?", r"_{\1}", text)
    text = re.sub(r"_ ?\{ ?two ?\}", "_{2}", text)
    sign, rest = re.match(r"(-?)\s*(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if rest[:1] in "$€£¥₹₩" and rest[1:2]:
        inner = _quantity(sign + rest[1:])
        return Quantity(inner.tree, read_unit(rest[0])) if isinstance(inner, Quantity) and inner.unit is None else inner
    try:
        if not re.search(r"[°%«]", text) or _ANGLE_INSIDE.search(text):
            return Quantity(parse(text))
    except Unreadable as error:
        problem = error
    else:
        problem = Unreadable(text)

    for tail in _UNIT_TAIL.finditer(text):
        if _FUNCTION.fullmatch(tail[0].strip("«»")) or (tail.start() and text[tail.start() - 1] == "\\"):
            continue
        start = tail.start("glued") if tail["glued"] else tail.start()
        core, unit_text = text[:start].strip().rstrip(" -*"), text[start:].strip()
        if not core:
            break
        try:
            tree = parse(core)
        except Unreadable:
            continue
        # What follows a number is its unit, unless more numbers follow: 5 hours 30 minutes is a sum.
        if more := re.search(r"(?<![\^{\d-])\d+(?:\.\d+)?\s*(?=[«A-Za-z])", unit_text):
            first, second = (
                read_unit(unit_text[: more.start()].replace("«and»", "")),
                _quantity(unit_text[more.start() :]),
            )
            if first and isinstance(second, Quantity) and second.unit and second.unit[0] == first[0]:
                ratio = ("number", second.unit[1] / first[1])
                return Quantity(("+", tree, ("*", ratio, second.tree)), first)
            raise Unreadable("several numbers")
        unit = read_unit(unit_text)
        if re.search(r"\d", re.sub(r"\^? ?\{? ?-?\d ?\}?", "", unit_text) if unit is None else "") or re.search(
            r"[+=(]", unit_text
        ):
            raise Unreadable("more than a unit")
        if tail["glued"] and unit is None:
            raise problem
        return Quantity(tree, unit)
    if not re.search(r"\d|\\|[=^_+*/∞π|⌊]", text) and len(text) <= 200:
        return Words(" ".join(re.sub(r"[«»()\[\]\"'`.,]", " ", text).casefold().split()))
    raise problem


def _as_interval(value: Value) -> Value:
    if isinstance(value, Sequenced) and value.brackets in ("()", "[]") and len(value.items) == 2:
        return Interval(value.items[0], value.items[1], (value.brackets == "[]", value.brackets == "[]"))
    return value
