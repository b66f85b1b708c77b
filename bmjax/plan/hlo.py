"""What a compiled program does, read from its optimized HLO text: matrix products and collectives, loops counted.

XLA's own cost analysis counts the body of a loop once; here everything is multiplied by the known trip counts of the
loops around it.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jax.sharding import Mesh

from bmjax.parallel.mesh import slow_groups

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
# Of operations that call a computation once for every pair of numbers: nothing to count there.
_ELEMENTWISE = ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort", "reduce-window", "map")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
SLICES = "slices"
_SHAPE = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_OPCODE = re.compile(r"\s([a-z][a-z\-]*\d*)\(")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Shape:
    kind: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.kind)
        width = max(1, int(bits[0]) // 8) if bits else 1
        return width * math.prod(self.sizes)


@dataclass(frozen=True)
class Instruction:
    """A line of HLO. text: what follows the operation's name. within: the computation that it stands in."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    text: str
    times: int = field(default=1, compare=False)
    within: str = field(default="", compare=False)

    @property
    def operands(self) -> list[str]:
        depth, end = 1, 0
        for end, letter in enumerate(self.text):  # noqa: B007
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                break
        return re.findall(r"%([\w.\-]+)", self.text[:end])


@dataclass(frozen=True)
class Collective:
    """A collective that a chip takes part in `times` a step. nbytes: of its larger side, on one chip."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    ways: int
    nbytes: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends a step, by a ring's count."""
        share = (self.ways - 1) / self.ways
        return self.times * self.nbytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


class Program:
    """The instructions of an optimized HLO module with how often each runs."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[Instruction]] = {}
        entry, lines = "", None
        for line in text.splitlines():  # a kernel's settings may go on over several lines
            if (head := _COMPUTATION.match(line)) is not None:
                lines = self._computations.setdefault(head[1], [])
                entry = head[1] if line.startswith("ENTRY") else entry
            elif line == "}":
                lines = None
            elif lines is not None and (found := _parse(line)) is not None:
                lines.append(found)
        self._entry = entry
        self._shapes = {i.name: i.shapes for block in self._computations.values() for i in block}

    def each(self) -> Iterator[Instruction]:
        """Every instruction that runs, with `times`."""
        yield from self._walk(self._entry, 1)

    def _walk(self, computation: str, times: int) -> Iterator[Instruction]:
        for one in self._computations.get(computation, []):
            yield replace(one, times=times, within=computation)
            if one.opcode in _ELEMENTWISE:
                continue
            called = _CALLED.findall(one.text)
            if (branches := _BRANCHES.search(one.text)) is not None:
                called += re.findall(r"%?([\w.\-]+)", branches[1])
            inner = times * self._trips(one) if one.opcode == "while" else times
            for name in called:
                yield from self._walk(name, inner)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop's body runs: what XLA says, else by the limit that its counter, from 0 on, is compared with
        and by what the body adds to it; 1 where that is known at run time only."""
        if (known := _TRIPS.search(loop.text)) is not None:
            return int(known[1])
        condition, body = (self._block(loop, key) for key in ("condition", "body"))
        for test in condition.values():
            if test.opcode != "compare" or "direction=LT" not in test.text:
                continue
            counter, limit = (condition.get(name) for name in test.operands)
            place = counter and re.search(r"index=(\d+)", counter.text)
            if limit is None or limit.opcode != "constant" or not place:
                continue
            after = list(body.values())[-1].operands[int(place[1])]
            added = (
                [body[name] for name in body[after].operands] if after in body and body[after].opcode == "add" else []
            )
            step = next((_number(one) for one in added if one.opcode == "constant"), 1)
            return -(-_number(limit) // max(1, step))
        return 1

    def _block(self, loop: Instruction, key: str) -> dict[str, Instruction]:
        found = re.search(rf"{key}=%?([\w.\-]+)", loop.text)
        return {one.name: one for one in self._computations.get(found[1], [])} if found else {}

    def flops(self) -> float:
        """Of matrix products, on one chip; both branches of a conditional count, kernels of other libraries don't."""
        return float(sum(one.times * self._product(one) for one in self.each() if one.opcode in ("dot", "convolution")))

    def _product(self, one: Instruction) -> int:
        left, right = (self._shapes[name][0].sizes for name in one.operands[:2])
        out = math.prod(one.shapes[0].sizes)
        if one.opcode == "dot":
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)
            return 2 * out * math.prod(left[int(i)] for i in (summed[1].split(",") if summed and summed[1] else []))
        return _convolution(one, left, right)

    def collectives(self, mesh: Mesh) -> list[Collective]:
        """All of them, over which mesh axes each goes; those within a chip alone are left out.

        What goes between slices over the hosts' network, which TPUs write as a send to their runtime, is of the axis
        `slices`.
        """
        found = []
        for one in self.each():
            if (between := _MEGASCALE.search(one.text)) is not None and one.opcode == "send":
                found.append(self._between_slices(one, between[1].lower().replace("_", "-"), mesh))
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if one.within.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as TPUs write it: one operation, of which each chip keeps a slice
            axes, ways = _axes(one.text, mesh)
            if ways > 1:
                given = [shape for name in one.operands for shape in self._shapes.get(name, ())]
                made = list(one.shapes)
                largest = max([*given, *made], key=lambda s: s.nbytes)
                taken, out = (sum(shape.nbytes for shape in shapes) for shapes in (given, made))
                if one.opcode.endswith("-start") and kind != "all-reduce":
                    # Its result repeats the operands, and has scalars of its own.
                    out = sum(shape.nbytes for shape in made if shape.sizes) - taken
                whole = max(taken, out)
                found.append(Collective(kind, one.name, largest.kind, largest.sizes, axes, ways, whole, one.times))
        return found

    def _between_slices(self, send: Instruction, kind: str, mesh: Mesh) -> Collective:
        shape = self._shapes[send.operands[0]][0]
        slices = len(set(slow_groups(list(mesh.devices.flat))))
        whole = shape.nbytes * (slices if kind == "all-gather" else 1)
        return Collective(kind, send.name, shape.kind, shape.sizes, (SLICES,), slices, whole, send.times)


def _parse(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    name, rest = match.groups()
    opcode = _OPCODE.search(rest)
    if opcode is None:
        return None
    shapes = tuple(
        Shape(kind, tuple(map(int, filter(None, sizes.split(",")))))
        for kind, sizes in _SHAPE.findall(rest[: opcode.start()])
    )
    return Instruction(name, shapes, opcode[1], rest[opcode.end() :])


def _convolution(one: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """FLOPs of a convolution, which is how a TPU writes matrix products; only what falls within its input counts."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    assert labels is not None
    inputs, kernel, output = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (left, right, one.shapes[0].sizes), strict=True)
    )
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\d_x\-]+)", _braces(one.text, "window="))}
    groups = re.search(r"batch_group_count=(\d+)", one.text)
    total = 2 * kernel["i"] * output["f"] * inputs["b"] // (int(groups[1]) if groups else 1)
    for at in range(len(left) - 2):
        stride, spread, dilation = (
            int(window[k][at]) if k in window else 1 for k in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"][at].split("_")[0]) if "pad" in window else 0
        places = np.arange(output[str(at)])[:, None] * stride - low + np.arange(kernel[str(at)]) * dilation
        inside = (places >= 0) & (places <= (inputs[str(at)] - 1) * spread) & (places % spread == 0)
        total *= int(inside.sum())
    return total


def _braces(text: str, key: str) -> str:
    found = re.search(re.escape(key) + r"\{([^}]*)\}", text)
    return found[1] if found else ""


def _number(constant: Instruction) -> int:
    return int(re.match(r"-?\d+", constant.text)[0])  # type: ignore[index]


def _axes(text: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which a collective's group of chips lies, and how many chips it has."""
    sizes = tuple(mesh.shape.values())
    groups = _groups(text, math.prod(sizes))
    places = np.stack(np.unravel_index(groups, sizes), axis=-1)  # [groups, chips, axes]
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, varies in zip(mesh.axis_names, differ, strict=True) if varies), groups.shape[1]


def _groups(text: str, chips: int) -> np.ndarray:
    """Chips by group, int [groups, chips a group]."""
    if (pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text)) is not None:
        return np.array([list(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if (iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)) is not None:
        shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)  # type: ignore[arg-type]
        return (numbers if order is None else numbers.transpose(order)).reshape(shape)
    if (named := _NAMED.search(text)) is not None:
        return _named_groups(named[1], named[5], _order(named[2], named[3], named[4]))
    if "replica_groups=mesh" in text:
        raise ValueError(f"replica groups in a spelling that is not known here: {text[:300]}")
    if (listed := re.search(r"replica_groups=\{(\{.*?\})\}", text)) is not None:
        return np.array([list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(chips)[None]


_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}"
)


def _order(dims: str | None, turned: str | None, listed: str | None) -> np.ndarray | None:
    """A named mesh's chips in its order: of device_ids=([2,4]T(1,0)) or device_ids=(0,2,1,3), None where not given."""
    if listed:
        return np.array(_ints(listed))
    if not dims:
        return None
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (numbers.transpose(_ints(turned)) if turned else numbers).reshape(-1)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _named_groups(sizes: str, axes: str, order: np.ndarray | None) -> np.ndarray:
    """As `_groups`, of a mesh like 'data'=2,'fsdp'=4 and axes of it like 'fsdp'; or 'fsdp':(2)2 for a part of an axis,
    its two after a major two. order: of the chips in the mesh."""
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    split: list[int] = []  # sizes of all parts of axes
    along: list[int] = []  # places of those that the groups lie along
    chosen = {name: (int(major or 1), int(size or 0)) for name, major, size in
              re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}  # fmt: skip
    for name, size in shape.items():
        major, part = chosen.get(name, (1, 1))
        part = part or size
        if name in chosen:
            along.append(len(split) + 1)
        split += [major, part, size // (major * part)]
    chips = np.arange(math.prod(split)) if order is None else order
    numbers = np.moveaxis(chips.reshape(split), along, range(-len(along), 0))
    return numbers.reshape(-1, math.prod(split[i] for i in along))


def totals(collectives: Sequence[Collective]) -> Mapping[str, float]:
    """Bytes that a chip sends a step, by mesh axis (`fsdp`, or `fsdp+tensor` for both at once)."""
    sums: dict[str, float] = {}
    for one in collectives:
        key = "+".join(one.axes)
        sums[key] = sums.get(key, 0.0) + one.sent
    return sums
