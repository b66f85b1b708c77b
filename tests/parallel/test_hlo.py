"""What is read from a compiled program's text equals what the program was written to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from bmjax.parallel.hlo import Program, totals
from bmjax.parallel.mesh import make_mesh


def compiled(function, *arguments):
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_products_are_counted_with_their_loops():
    w = jnp.ones((16, 16))

    def layers(x):
        def body(x, _):
            return lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=3)[0], None

        return lax.scan(body, x, None, length=5)[0]

    assert compiled(layers, jnp.ones((8, 16))).flops() == 5 * 3 * 2 * 8 * 16 * 16


def test_products_of_a_batch():
    a, b = jnp.ones((4, 8, 16)), jnp.ones((4, 16, 32))
    assert compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b).flops() == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize(("axis", "ways"), [("fsdp", 4), ("tensor", 2)])
def test_collectives_by_axis(axis, ways):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    x = jax.device_put(np.ones((8, 128), np.float32), NamedSharding(mesh, PartitionSpec(axis)))

    def work(x):
        whole = lax.all_gather(x, axis, axis=0, tiled=True)
        total = lax.psum(x, axis)
        parts = lax.psum_scatter(whole, axis, tiled=True)
        moved = lax.ppermute(x, axis, [(i, (i + 1) % ways) for i in range(ways)])
        return jnp.sum(whole), jnp.sum(total), jnp.sum(parts), jnp.sum(moved)

    def each(x):
        return jax.shard_map(work, mesh=mesh, in_specs=PartitionSpec(axis), out_specs=PartitionSpec(), check_vma=False)(
            x
        )

    program = compiled(each, x)
    found = {one.kind: one for one in program.collectives(mesh)}
    assert set(found) >= {"all-gather", "all-reduce", "collective-permute"}
    assert {one.axes for one in found.values()} == {(axis,)}
    assert found["all-gather"].ways == found["all-reduce"].ways == ways
    whole, part = 8 * 128 * 4, 8 * 128 * 4 // ways
    assert found["all-gather"].nbytes == whole and found["all-gather"].sent == whole * (ways - 1) / ways
    assert found["collective-permute"].sent == part
    assert totals(program.collectives(mesh)).keys() == {axis}


def test_collectives_in_a_loop_count_every_time():
    mesh = make_mesh({"fsdp": 8})
    x = jax.device_put(np.ones((8, 64), np.float32), NamedSharding(mesh, PartitionSpec("fsdp")))

    def work(x):
        return lax.scan(
            lambda x, _: (jnp.sin(lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])), None),
            x,
            None,
            length=7,
        )[0]

    def each(x):
        return jax.shard_map(work, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))(x)

    (one,) = compiled(each, x).collectives(mesh)
    assert one.kind == "collective-permute" and one.times == 7 and one.sent == 7 * 64 * 4
