"""One step: accumulation and sharding change no number, bf16 stays near, frozen parameters stay."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from bmjax.branch.step import StepPlan, init_state, make_step
from bmjax.model import spec
from bmjax.model.attention.options import AttentionOptions
from bmjax.model.batch import Batch
from bmjax.parallel.mesh import AXES, make_mesh, sharding
from tests.model.reference import build

B, T, RATE = 8, 48, 1e-3


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 97, (B, T)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    segments[:, 40:] = 0
    # Rows with very different numbers of targets: dividing by microbatch would show.
    mask = (rng.random((B, T)) < np.linspace(0.05, 0.9, B)[:, None]).astype(np.uint8)
    return Batch(tokens, segments, mask)


def plan(config, **changes) -> StepPlan:
    # Adam with a tiny eps turns rounding of a gradient near 0 into a whole step; this eps shows real differences only.
    base = StepPlan(
        config=config, freeze=(), accumulate=1, beta1=0.9, beta2=0.95, eps=1e-4, weight_decay=0.1, clip=1.0,
        compute_dtype="float32", remat="none", unroll=1, attention_options=AttentionOptions(), track_move=True,
        mesh=make_mesh({}),
    )  # fmt: skip
    return replace(base, **changes)


def run(plan: StepPlan, params, batch, steps: int = 2):
    """(metrics of every step, parameters after them)."""
    with jax.set_mesh(plan.mesh):
        places = {row.path: sharding(plan.mesh, row.axes, row.shape) for row in spec.table(plan.config)}
        placed = spec.unflatten(
            [(path, jax.device_put(np.asarray(spec.get(params, path)), at)) for path, at in places.items()]
        )
        state = init_state(plan, placed)
        history = []
        for _ in range(steps):
            rows = jax.device_put(batch, sharding(plan.mesh, ("batch", "length"), batch.tokens.shape))
            state, metrics = make_step(plan)(state, rows, np.float32(RATE))
            history.append({key: float(value) for key, value in metrics.items()})
        return history, jax.tree.map(np.asarray, spec.join(state["params"], state["frozen"]))


@pytest.fixture(scope="module")
def once(batch):
    _, config, params = build("gqa_untied")
    return run(plan(config), params, batch)


def near(once, other, atol, rtol=0.0):
    for want, got in zip(once[0], other[0], strict=True):
        assert want.keys() == got.keys()
        for key in want:
            assert got[key] == pytest.approx(want[key], abs=atol, rel=max(rtol, 1e-5)), key
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=rtol), once[1], other[1])


def test_the_first_loss_and_gradient_norm_are_torchs(once, batch):
    hf, _, _ = build("gqa_untied")
    total, count = 0.0, 0
    for tokens, segments, mask in zip(*jax.tree.leaves(batch), strict=True):
        for segment in range(1, segments.max() + 1):
            document, targets = tokens[segments == segment], mask[segments == segment].astype(bool)
            if targets[1:].any():
                labels = torch.tensor(np.where(targets, document, -100), dtype=torch.long)[None]
                n = int(targets[1:].sum())
                total, count = (
                    total + hf(torch.tensor(document, dtype=torch.long)[None], labels=labels).loss * n,
                    count + n,
                )
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1e30)
    first = once[0][0]
    assert first["targets"] == count
    assert first["loss"] == pytest.approx(float(total.detach()) / count, abs=1e-5)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_accumulation_changes_nothing(once, batch):
    _, config, params = build("gqa_untied")
    near(once, run(plan(config, accumulate=4), params, batch), atol=1e-5)


@pytest.fixture(scope="module")
def tied(batch):
    _, config, params = build("mha_tied")
    return run(plan(config), params, batch)


# A mesh of all axes at once runs in every suite; those of fewer are slow tests.
OF_FEW_AXES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 4, 2)]
MESHES = [(1, 2, 2, 2), (2, 2, 1, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in OF_FEW_AXES)]


@pytest.mark.parametrize("model", ["gqa_untied", pytest.param("mha_tied", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_of_eight_changes_nothing(once, tied, batch, model, sizes):
    """(data, fsdp, context, tensor); where heads do not suffice for context, the ring is tested, too."""
    _, config, params = build(model)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    result = run(plan(config, mesh=mesh, remat="full"), params, batch)
    near(once if model == "gqa_untied" else tied, result, atol=1e-5)


def test_accumulation_on_a_mesh_changes_nothing(once, batch):
    _, config, params = build("gqa_untied")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    near(once, run(plan(config, mesh=mesh, accumulate=2, remat="full"), params, batch), atol=1e-5)


def test_bf16_compute_is_near_and_keeps_float32_weights(once, batch):
    _, config, params = build("gqa_untied")
    history, after = run(plan(config, compute_dtype="bfloat16"), params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype(np.float32)}
    for want, got in zip(once[0], history, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=0.01) and got["loss"] != want["loss"]
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.1)


def test_frozen_parameters_stay_and_the_rest_moves(once, batch):
    _, config, params = build("gqa_untied")
    freeze = ("embed/*", "*norm/scale")
    history, after = run(plan(config, freeze=freeze, clip=0.0), params, batch)
    for row in spec.table(config):
        same = np.array_equal(spec.get(after, row.path), spec.get(params, row.path))
        assert same == (row.path[0] == "embed" or row.path[-1] == "scale"), row.name
    assert history[0]["loss"] == pytest.approx(once[0][0]["loss"], abs=1e-6)
    assert history[0]["grad_norm"] < once[0][0]["grad_norm"]
    # The first Adam step moves each element by rate * (sign of its gradient, about) + decay on matrices.
    squares = lambda tree: sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(tree))  # noqa: E731
    move = np.sqrt(squares(jax.tree.map(np.subtract, after, jax.tree.map(np.asarray, params))) / squares(params))
    assert history[-1]["move"] == pytest.approx(move, rel=1e-4)


def test_a_batch_without_targets_changes_nothing_but_by_decay(batch):
    _, config, params = build("gqa_untied")
    unlearned = replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    history, after = run(plan(config), params, unlearned, steps=1)
    assert history[0]["loss"] == 0.0 and history[0]["targets"] == 0.0 and history[0]["grad_norm"] == 0.0
    for row in spec.table(config):
        kept = 1 - RATE * 0.1 if row.is_matrix else 1.0
        np.testing.assert_allclose(spec.get(after, row.path), np.asarray(spec.get(params, row.path)) * kept, atol=1e-7)
