"""The mesh, and the rules by which logical axis names become mesh axes. Nothing else names a mesh's layout."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from bmjax.config import UserError
from bmjax.parallel.start import keep_compiled_programs, pass_over_absent_tpu

AXES = ("data", "fsdp", "context", "tensor")

# One line per logical axis, and why it is laid out so.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of a step: both axes hold different rows
    "length": "context",  # tokens of a row
    # D of every matrix: gathered layer by layer, as ZeRO-3 does; context, too, for its devices need all of it alike.
    "embed": ("fsdp", "context"),
    "heads": "tensor",  # query heads: attention of a head needs no other head
    "kv_heads": "tensor",  # with their query heads
    "mlp": "tensor",  # F: gate and up split by columns, down by rows
    "vocab": "tensor",  # rows of the embedding, columns of the head
    "layers": None,  # scanned over, never split
    "norm": None,  # scales of D elements: too small to be worth a gather
}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of these devices (None: all); UserError for an unknown axis or sizes that do not fit the devices.

    sizes: of the axes. Absent axes are 1; at most one may be -1, the devices left over. Without a -1 the product may be
    smaller than the number of devices: the first ones are used.
    """
    if devices is None:  # whoever computes comes by here before anything is compiled
        pass_over_absent_tpu()
        keep_compiled_programs()
        devices = jax.devices()
    devices = list(devices)
    sizes = dict(sizes or {})
    for axis, size in sizes.items():
        if axis not in AXES:
            raise UserError(f"mesh: unknown axis '{axis}'; the axes are {', '.join(AXES)}")
        if not isinstance(size, int):
            raise UserError(f"mesh: {axis} is {size!r}, expected a whole number")
    shape, count = [sizes.get(axis, 1) for axis in AXES], len(devices)
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh: sizes {sizes}: each must be at least 1, and at most one may be -1 (the rest)")
    if -1 in shape:
        fixed = -math.prod(shape)
        if count % fixed:
            product = f"{fixed} (the product of the sizes given)"
            raise UserError(f"mesh: {count} devices cannot be divided by {product}; change one of the sizes")
        shape[shape.index(-1)] = count // fixed
    used = math.prod(shape)
    if used > count:
        raise UserError(f"mesh: sizes {sizes} need {used} devices, there are {count}; make a size smaller")
    try:
        return Mesh(arrange(shape, devices[:used]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    except (AssertionError, NotImplementedError, ValueError):
        problem = f"cannot be laid out on these {count} devices; use all of them, one size -1"
        raise UserError(f"mesh: sizes {sizes} {problem}") from None


def slow_groups(devices: Sequence[Any]) -> list[int]:
    """Return the number of every device's group, within which links are fast: a TPU's slice, a GPU's host, else 0."""
    kinds = {"tpu": "slice_index", "gpu": "process_index"}
    return [getattr(device, kinds.get(device.platform, ""), 0) for device in devices]


def arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange the devices in an array of this shape (data, fsdp, context, tensor), near ones along the inner axes.

    Groups with slow links between them lie along the outermost axes that their number divides, so that little has to
    pass between them: data before fsdp before context before tensor.
    """
    groups = slow_groups(devices)
    count = len(set(groups))
    if count == 1 or len(devices) % count or any(groups.count(group) * count != len(devices) for group in groups):
        # A TPU slice's links may serve two axes: the shape of the mesh need not be that of the slice.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer, undivided = [], count
    for size in shape:
        outer.append(math.gcd(size, undivided))
        undivided //= outer[-1]
    inner = [size // groups_along for size, groups_along in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=devices[0].platform == "gpu", allow_split_physical_axes=True
    )


def fitting_spec(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Return the mesh axes of these logical axes (None: whole). A dimension that they do not divide stays whole."""
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        part = None if axis is None else RULES[axis]
        parts.append(None if size % math.prod(mesh.shape[name] for name in split_axes((part,))) else part)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Return the sharding on `mesh` of an array of this shape with these logical axes, see `fitting_spec`."""
    return NamedSharding(mesh, fitting_spec(mesh, axes, shape))


def split_axes(spec: Iterable[Any]) -> tuple[str, ...]:
    """Return all mesh axes that split an array of this layout, a PartitionSpec or a part of one."""
    return tuple(axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part))


def mesh_in_scope() -> AbstractMesh | None:
    """Return the mesh of `jax.set_mesh`; None where there is none, or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def on_each_device(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return `local` as a function of whole arrays: on the mesh in scope each device calls it with its own parts."""
    if mesh_in_scope() is None:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell the compiler the layout of `x` by logical names; without a mesh in scope it does nothing."""
    mesh = mesh_in_scope()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fitting_spec(mesh, axes, x.shape))
