"""Read from a compiled program's optimized HLO text what it computes and sends: matrix products and collectives.

XLA's own cost analysis counts the body of a loop once. Here everything is multiplied by the known trip counts of the
loops around it. `plan` reads whole steps with it; nothing here compiles.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from bmjax.parallel.mesh import slow_groups

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
SLICES = "slices"
# Operations that call a computation for every pair of numbers: nothing to count in it.
_ELEMENTWISE = ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort", "reduce-window", "map")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z\-]*\d*)\((.*)$")
_OPERANDS_END = re.compile(r"\)(?:, [\w\-]+=|$)")
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SHAPE = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}"
)


@dataclass(frozen=True)
class Shape:
    """An array type of HLO: its dtype, such as bf16, and its dimensions."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        width = max(1, int(bits[0]) // 8) if bits else 1
        return width * math.prod(self.sizes)


class Instruction(NamedTuple):
    """One instruction of HLO."""

    name: str
    shapes: tuple[Shape, ...]  # of its result, several for a tuple
    opcode: str
    operands: list[str]  # the names of the instructions that it reads
    text: str  # what follows the opcode's bracket


@dataclass(frozen=True)
class Collective:
    """A collective of a step.

    kind: its opcode. dtype, shape: of the largest array. axes: the mesh axes that it goes along. ways: chips of a
    group. nbytes: of the larger of its two sides, on one chip. times: how often it runs a step.
    """

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
        """Bytes that a chip sends a step, where the chips form a ring."""
        share = (self.ways - 1) / self.ways
        return self.times * self.nbytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


class Program:
    """An optimized HLO module, given as text."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        block = None
        for line in text.splitlines():  # a kernel's settings may go on over several lines
            if (head := _COMPUTATION.match(line)) is not None:
                block = self._computations.setdefault(head[2], {})
                self._entry = head[2] if head[1] else self._entry
            elif line == "}":
                block = None
            elif block is not None and (match := _INSTRUCTION.match(line)) is not None:
                name, types, opcode, rest = match.groups()
                shapes = tuple(Shape(kind, _ints(sizes)) for kind, sizes in _SHAPE.findall(types))
                operands = re.findall(r"%([\w.\-]+)", _OPERANDS_END.split(rest, maxsplit=1)[0])
                block[name] = Instruction(name, shapes, opcode, operands, rest)
        self._shapes = {name: line.shapes for block in self._computations.values() for name, line in block.items()}

    def _walk(self, computation: str, times: int = 1) -> Iterator[tuple[Instruction, int, str]]:
        """Yield every instruction that runs, how often it runs a step, and the computation that it stands in."""
        for line in self._computations.get(computation, {}).values():
            yield line, times, computation
            if line.opcode in _ELEMENTWISE:
                continue
            called = _CALLED.findall(line.text)
            if (branches := _BRANCHES.search(line.text)) is not None:
                called += re.findall(r"%?([\w.\-]+)", branches[1])
            inner = times * self._trips(line) if line.opcode == "while" else times
            for name in called:
                yield from self._walk(name, inner)

    def _trips(self, loop: Instruction) -> int:
        """Count how often a loop's body runs.

        XLA may say it. Else it is the limit that the counter, from 0 on, is compared with, over what the body adds to
        the counter; 1 where that is known at run time only.
        """
        if (known := _TRIPS.search(loop.text)) is not None:
            return int(known[1])
        called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.text))
        condition, body = (self._computations.get(called.get(key, ""), {}) for key in ("condition", "body"))
        for test in condition.values():
            if test.opcode != "compare" or "direction=LT" not in test.text:
                continue
            counter, limit = (condition.get(name) for name in test.operands)
            index = counter and re.search(r"index=(\d+)", counter.text)
            if limit is None or limit.opcode != "constant" or not index:
                continue
            # The body's last instruction is the tuple of its results, the counter's next value among them.
            update = body.get(list(body.values())[-1].operands[int(index[1])])
            summands = [body[name] for name in update.operands] if update and update.opcode == "add" else []
            step = next((_number(summand) for summand in summands if summand.opcode == "constant"), 1)
            return -(-_number(limit) // max(1, step))
        return 1

    def flops(self) -> float:
        """Count the FLOPs of matrix products on one chip.

        Both branches of a conditional count; kernels of other libraries don't.
        """
        total = 0
        for line, times, _ in self._walk(self._entry):
            if line.opcode in ("dot", "convolution"):
                left, right = (self._shapes[name][0].sizes for name in line.operands[:2])
                total += times * (_dot_flops if line.opcode == "dot" else _convolution_flops)(line, left, right)
        return float(total)

    def collectives(self, mesh: Mesh) -> list[Collective]:
        """Return all collectives and the mesh axes that they go along; those within a chip are left out.

        What goes between slices over the hosts' network, which TPUs write as a send to their runtime, is of the axis
        `slices`.
        """
        collectives = []
        for line, times, computation in self._walk(self._entry):
            if line.opcode == "send" and (between := _MEGASCALE.search(line.text)) is not None:
                kind, array = between[1].lower().replace("_", "-"), self._shapes[line.operands[0]][0]
                ways = len(set(slow_groups(list(mesh.devices.flat))))
                nbytes = array.nbytes * (ways if kind == "all-gather" else 1)
                collectives.append(
                    Collective(kind, line.name, array.dtype, array.sizes, (SLICES,), ways, nbytes, times)
                )
            kind = line.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as TPUs write it: one operation, of which each chip keeps a slice
            axes, ways = _axes(line.text, mesh)
            if ways == 1:
                continue
            inputs = [shape for name in line.operands for shape in self._shapes.get(name, ())]
            input_bytes, output_bytes = (sum(shape.nbytes for shape in shapes) for shapes in (inputs, line.shapes))
            if line.opcode.endswith("-start") and kind != "all-reduce":
                # Its result repeats the operands, and has scalars of its own.
                output_bytes = sum(shape.nbytes for shape in line.shapes if shape.sizes) - input_bytes
            largest = max([*inputs, *line.shapes], key=lambda shape: shape.nbytes)
            nbytes = max(input_bytes, output_bytes)
            collectives.append(Collective(kind, line.name, largest.dtype, largest.sizes, axes, ways, nbytes, times))
        return collectives


def _number(constant: Instruction) -> int:
    return int(constant.text.partition(")")[0])


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(","))))


def _dot_flops(product: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.text)
    return 2 * math.prod(product.shapes[0].sizes) * math.prod(left[axis] for axis in _ints(summed[1] if summed else ""))


def _convolution_flops(product: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Count the FLOPs of a convolution, as TPUs write matrix products; only taps within its input count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.text)
    assert labels is not None
    inputs, kernel, output = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (left, right, product.shapes[0].sizes), strict=True)
    )
    braces = re.search(r"window=\{([^}]*)\}", product.text)
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\d_x\-]+)", braces[1] if braces else "")}
    groups = re.search(r"batch_group_count=(\d+)", product.text)
    total = 2 * kernel["i"] * output["f"] * inputs["b"] // (int(groups[1]) if groups else 1)
    for axis in range(len(left) - 2):
        stride, spread, dilation = (
            int(window[key][axis]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
        # Positions in the input, spread by lhs_dilate, that each output entry's taps read.
        taps = np.arange(output[str(axis)])[:, None] * stride - low + np.arange(kernel[str(axis)]) * dilation
        inside = (taps >= 0) & (taps <= (inputs[str(axis)] - 1) * spread) & (taps % spread == 0)
        total *= int(inside.sum())
    return total


def _axes(text: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes along which a collective's groups of chips lie, and how many chips a group has."""
    sizes = tuple(mesh.shape.values())
    groups = _groups(text, math.prod(sizes))
    coordinates = np.stack(np.unravel_index(groups, sizes), axis=-1)  # [groups, chips, axes]
    differ = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    return tuple(name for name, varies in zip(mesh.axis_names, differ, strict=True) if varies), groups.shape[1]


def _groups(text: str, chips: int) -> np.ndarray:
    """Return the chips by group, int [groups, chips a group], from any spelling of replica groups."""
    if (listed := _LISTED.search(text)) is not None:
        return np.array([_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if (iota := _IOTA.search(text)) is not None:
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))
    if (named := _NAMED.search(text)) is not None:
        sizes, dims, turned, order, axes = named.groups()
        return _named_groups(sizes, axes, np.array(_ints(order)) if order else _iota(dims, turned) if dims else None)
    if "replica_groups=mesh" in text:
        raise ValueError(f"replica groups in a spelling that is not known here: {text[:300]}")
    return np.arange(chips)[None]


def _iota(dims: str, turned: str | None) -> np.ndarray:
    """Return the chips 0, 1, 2, ... in the order that [dims]T(turned) writes: laid out in `dims`, axes exchanged."""
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return (numbers.transpose(_ints(turned)) if turned else numbers).reshape(-1)


def _named_groups(mesh: str, axes: str, order: np.ndarray | None) -> np.ndarray:
    """Return the groups of a named mesh, int [groups, chips a group].

    mesh is like 'data'=2,'fsdp'=4. axes are those that the groups lie along, like 'fsdp'; 'fsdp':(2)2 is a part of an
    axis, its two after a major two. order: the chips in the mesh's order; None: 0, 1, 2, ...
    """
    chosen = {
        name: (int(major or 1), int(size or 0))
        for name, major, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    }
    part_sizes: list[int] = []  # every axis as three parts: major, chosen, minor
    group_parts: list[int] = []  # indices of the parts that the groups lie along
    for name, size in re.findall(r"'(\w+)'=(\d+)", mesh):
        major, part = chosen.get(name, (1, 1))
        part = part or int(size)
        if name in chosen:
            group_parts.append(len(part_sizes) + 1)
        part_sizes += [major, part, int(size) // (major * part)]
    chips = np.arange(math.prod(part_sizes)) if order is None else order
    numbers = np.moveaxis(chips.reshape(part_sizes), group_parts, range(-len(group_parts), 0))
    return numbers.reshape(-1, math.prod(part_sizes[i] for i in group_parts))


def totals(collectives: Sequence[Collective]) -> Mapping[str, float]:
    """Sum the bytes that a chip sends a step by mesh axis (`fsdp`, or `fsdp+tensor` for both at once)."""
    sums: dict[str, float] = {}
    for collective in collectives:
        key = "+".join(collective.axes)
        sums[key] = sums.get(key, 0.0) + collective.sent
    return sums
