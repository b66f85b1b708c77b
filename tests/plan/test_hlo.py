"""What is read from a compiled program's text equals what the program was written to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from bmjax.parallel.mesh import make_mesh
from bmjax.plan import hlo
from bmjax.plan.hlo import Program, totals


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
    collectives = {collective.kind: collective for collective in program.collectives(mesh)}
    assert set(collectives) >= {"all-gather", "all-reduce", "collective-permute"}
    assert {collective.axes for collective in collectives.values()} == {(axis,)}
    assert collectives["all-gather"].ways == collectives["all-reduce"].ways == ways
    whole, part = 8 * 128 * 4, 8 * 128 * 4 // ways
    assert collectives["all-gather"].nbytes == whole and collectives["all-gather"].sent == whole * (ways - 1) / ways
    assert collectives["collective-permute"].sent == part
    assert totals(program.collectives(mesh)).keys() == {axis}


@pytest.mark.parametrize(("text", "groups"), [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
])  # fmt: skip
def test_groups_of_chips_in_every_spelling(text, groups):
    np.testing.assert_array_equal(hlo._groups(text, 4), groups)


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

    (collective,) = compiled(each, x).collectives(mesh)
    assert collective.kind == "collective-permute" and collective.times == 7 and collective.sent == 7 * 64 * 4


TPU = """\
HloModule jit_step

%all-reduce-scatter.5 (input.15: f32[32,128]) -> f32[8,128] {
  %input.15 = f32[32,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.108 = f32[32,128]{1,0:T(8,128)} all-reduce(%input.15), replica_groups=[2,4]<=[4,2]T(1,0)
  %constant.1 = u32[] constant(0)
  ROOT %dynamic-slice.2 = f32[8,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.108, %constant.1, %constant.1)
}

%body (p.1: (u32[], f32[32,128])) -> (u32[], f32[32,128]) {
  %p.1 = (u32[]{:T(128)}, f32[32,128]{1,0:T(8,128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[32,128]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%counter, %two)
  %kernel = f32[32,128]{1,0:T(8,128)} custom-call(%x), backend_config={"metadata":"{
"sizes": 1
}}
  %parts = f32[8,128]{1,0:T(8,128)} fusion(%kernel), kind=kCustom, calls=%all-reduce-scatter.5
  %product = f32[32,128]{1,0:T(8,128)} convolution(%kernel, %square), dim_labels=bf_io->bf
  ROOT %out = (u32[]{:T(128)}, f32[32,128]{1,0:T(8,128)}) tuple(%next, %product)
}

%condition (p.2: (u32[], f32[32,128])) -> pred[] {
  %p.2 = (u32[]{:T(128)}, f32[32,128]{1,0:T(8,128)}) parameter(0)
  %here = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  %limit = u32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%here, %limit), direction=LT
}

ENTRY %main (a: f32[32,128], square: f32[128,128]) -> f32[32,128] {
  %a = f32[32,128]{1,0:T(8,128)} parameter(0)
  %square = f32[128,128]{1,0:T(8,128)} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %both = (u32[]{:T(128)}, f32[32,128]{1,0:T(8,128)}) tuple(%zero, %a)
  %loop = (u32[]{:T(128)}, /*index=1*/f32[32,128]{1,0:T(8,128)}) while(%both), condition=%condition, body=%body
  ROOT %result = f32[32,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_the_way_tpus_write_it():
    """Loops without a known count, by twos; a product as a convolution; a scattered sum; a kernel of several lines."""
    program = Program(TPU)
    assert program.flops() == 4 * 2 * 32 * 128 * 128
    (collective,) = program.collectives(make_mesh({"fsdp": 4, "tensor": 2}))
    assert (collective.kind, collective.axes, collective.ways, collective.times) == ("reduce-scatter", ("fsdp",), 4, 4)
    assert collective.sent == 4 * 32 * 128 * 4 * 3 / 4


def test_combined_collectives_count_all_their_parts():
    text = TPU.replace(
        "ROOT %result",
        "%pair = (f32[64,128]{1,0}, f32[256,128]{1,0}) all-gather(%a, %square), replica_groups=[4,2]<=[8]\n"
        "  %go = (f32[32,128]{1,0}, f32[64,128]{1,0}, u32[]{:S(2)}) all-gather-start(%a), replica_groups=[4,2]<=[8]\n"
        "  ROOT %result",
    )
    nbytes = {
        collective.name: collective.nbytes
        for collective in Program(text).collectives(make_mesh({"fsdp": 4, "tensor": 2}))
    }
    assert nbytes["pair"] == (64 + 256) * 128 * 4 and nbytes["go"] == 64 * 128 * 4
