"""Sizes become a mesh, logical names become its axes, and what doesn't divide stays whole."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bmjax.config import UserError
from bmjax.model import qwen2, spec
from bmjax.parallel.mesh import (
    AXES,
    RULES,
    arrange,
    constrain,
    fitting_spec,
    make_mesh,
    sharding,
    slow_groups,
    split_axes,
)
from tests.model.reference import build


@pytest.mark.parametrize("sizes, shape", [
    (None, (1, 1, 1, 1)),
    ({}, (1, 1, 1, 1)),
    ({"fsdp": -1}, (1, 8, 1, 1)),
    ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 2)),
    ({"data": 8, "fsdp": -1}, (8, 1, 1, 1)),
    ({"context": 2, "tensor": 2}, (1, 1, 2, 2)),
    ({"tensor": 3}, (1, 1, 1, 3)),
])  # fmt: skip
def test_sizes_become_a_mesh(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == AXES == ("data", "fsdp", "context", "tensor")
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.ravel()) <= set(jax.devices())


def test_devices_by_argument_are_used():
    devices = jax.devices()[3:5]
    assert set(make_mesh({"fsdp": -1}, devices).devices.ravel()) == set(devices)


@dataclass(frozen=True)
class Device:
    """What a device says of where it is: eight in a group."""

    id: int
    platform: str
    device_kind: str = "made up"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id // 4 % 2, self.id // 2 % 2, self.id % 2

    @property
    def slice_index(self) -> int:
        return self.id // 8 if self.platform == "tpu" else 0

    @property
    def process_index(self) -> int:
        return self.id // 8


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("shape, slow", [
    ((2, 8, 1, 2), ["data", "fsdp"]),
    ((4, 4, 1, 2), ["data"]),
    ((1, 32, 1, 1), ["fsdp"]),
    ((2, 2, 2, 4), ["data", "fsdp"]),
    ((1, 1, 1, 32), ["tensor"]),
])  # fmt: skip
def test_slices_and_hosts_lie_along_the_outermost_axes(platform, shape, slow):
    devices = [Device(i, platform) for i in range(32)]
    placed = arrange(shape, devices)
    assert sorted(d.id for d in placed.flat) == list(range(32))
    groups = np.vectorize(lambda d: d.process_index)(placed)
    for number, axis in enumerate(AXES):
        changes = np.diff(groups, axis=number)
        assert bool(changes.any()) == (axis in slow), axis


def test_devices_of_one_host_or_of_a_cpu_are_one_group():
    assert slow_groups([Device(i, "cpu") for i in range(16)]) == [0] * 16


@pytest.mark.parametrize("sizes, problem", [
    ({"tenser": 2}, "mesh: unknown axis 'tenser'; the axes are data, fsdp, context, tensor"),
    ({"data": 0}, "each must be at least 1, and at most one may be -1"),
    ({"data": -2}, "each must be at least 1"),
    ({"data": -1, "fsdp": -1}, "at most one may be -1"),
    ({"data": 3, "fsdp": -1}, "mesh: 8 devices cannot be divided by 3"),
    ({"data": 4, "fsdp": 4}, "need 16 devices, there are 8; make a size smaller"),
    ({"data": 16, "fsdp": -1}, "8 devices cannot be divided by 16"),
    ({"data": "two"}, "mesh: data is 'two', expected a whole number"),
    ({"data": 2.5}, "mesh: data is 2.5, expected a whole number"),
])  # fmt: skip
def test_wrong_sizes_are_one_line(sizes, problem):
    with pytest.raises(UserError, match=problem) as error:
        make_mesh(sizes)
    assert "\n" not in str(error.value)


def test_logical_names_become_mesh_axes():
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    assert fitting_spec(mesh, ("batch", "length", None), (4, 4, 3)) == PartitionSpec(("data", "fsdp"), "context", None)
    assert fitting_spec(mesh, ("layers", "embed", "mlp"), (3, 4, 4)) == PartitionSpec(
        None, ("fsdp", "context"), "tensor"
    )
    with pytest.raises(KeyError):
        fitting_spec(mesh, ("batches",), (4,))


@pytest.mark.parametrize("name", ["gqa_untied", "mha_tied"])
def test_rules_cover_the_parameter_table(name):
    for row in spec.table(build(name)[1]):
        assert set(row.axes) <= set(RULES), row.name
        used = split_axes(RULES[axis] for axis in row.axes)
        assert len(used) == len(set(used)), row.name


def test_indivisible_dimensions_stay_whole():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert sharding(mesh, ("embed", "mlp"), (8, 6)).spec == PartitionSpec(("fsdp", "context"), "tensor")
    assert sharding(mesh, ("embed", "mlp"), (6, 6)).spec == PartitionSpec(None, "tensor")
    assert sharding(mesh, ("embed", "mlp"), (8, 5)).spec == PartitionSpec(("fsdp", "context"), None)
    placed = jax.device_put(np.zeros((8, 6)), sharding(mesh, ("embed", "mlp"), (8, 6)))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def test_constrain_lays_out_and_changes_no_value():
    x = jnp.arange(32.0).reshape(8, 4)
    np.testing.assert_array_equal(jax.jit(lambda x: constrain(x, "batch", None))(x), x)
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2})):
        y = jax.jit(lambda x: constrain(x, "batch", "heads"))(x)
        odd = jax.jit(lambda x: constrain(x, "batch", "heads"))(x[:3, :3])
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(odd, x[:3, :3])
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 2)}


def test_a_model_smaller_than_the_mesh_runs():
    _, config, params = build("mqa")  # one key/value head on tensor = 2, one row on data = 4
    tokens = np.arange(2, 26, dtype=np.int32)[None]
    plain = qwen2.logits(qwen2.Qwen2(config), params, tokens)
    with jax.set_mesh(make_mesh({"data": 4, "tensor": 2})):
        meshed = jax.jit(lambda p, t: qwen2.logits(qwen2.Qwen2(config), p, t))(params, tokens)
    np.testing.assert_allclose(plain, meshed, atol=1e-5)
