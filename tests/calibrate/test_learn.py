"""The gradient through the merge and the model, part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.calibrate import learn
from bmjax.calibrate.models import Models
from bmjax.calibrate.models import whole as loaded_whole
from bmjax.calibrate.programs import merge
from bmjax.calibrate.progress import Progress
from bmjax.calibrate.walk import Changes, Work
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.model import parts, qwen2, spec
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import make_mesh, sharding
from tests.calibrate.tiny_models import batches, read_from_files_in_blocks, recipe
from tests.conftest import write_student


def whole(config, trees):
    """The table's dictionary, of the parts' dictionaries."""
    leaves = []
    for row in spec.table(config):
        if row.stacked:
            leaves.append((row.path, jnp.stack([spec.get(trees[i + 1], row.path) for i in range(config.num_layers)])))
        else:
            leaves.append((row.path, spec.get(trees[0 if row.hf_key == spec.EMBEDDING else -1], row.path)))
    return spec.unflatten(leaves)


@pytest.mark.parametrize(
    ("per", "tied", "mesh", "in_blocks"),
    [
        ("row", False, {}, False),
        ("tensor", True, {}, True),
        ("row", False, {"fsdp": 2, "tensor": 2}, True),
        pytest.param("tensor", True, {}, False, marks=pytest.mark.slow),
        pytest.param("entry", False, {"fsdp": 2, "tensor": 2}, True, marks=pytest.mark.slow),
        pytest.param("entry", False, {"fsdp": 2, "tensor": 2}, False, marks=pytest.mark.slow),
    ],
)
def test_gradient_is_that_of_the_whole_model(models, tmp_path, monkeypatch, per, tied, mesh, in_blocks):
    if in_blocks:
        read_from_files_in_blocks(monkeypatch)
    directories = {name: models / name for name in ("base", "a", "b")}
    if tied:
        directories = {name: write_student(tmp_path / name, seed=seed, tie_word_embeddings=True)
                       for seed, name in enumerate(directories)}  # fmt: skip
    config = ModelConfig.from_dir(directories["base"])
    (step,) = read_recipe(recipe(models, per=per)).steps
    of_step = Models(directories, config, make_mesh(mesh))
    progress = Progress(tmp_path / "progress.jsonl")
    work = Work(step, step.calibration, of_step, Changes(), [], tmp_path / "states", progress)
    calibration, _ = batches(models, "a")
    batch = calibration.joint(0, "learning")
    batch = jax.device_put(batch, sharding(of_step.mesh, ("batch", "length"), batch.tokens.shape))
    rng = np.random.default_rng(0)
    factors = [
        [jax.tree.map(lambda leaf: jnp.asarray(rng.normal(1, 0.2, leaf.shape), jnp.float32),
                      learn.coefficients(parts.rows(config, part), 1.0, per)) for _ in range(2)]
        for part in range(parts.count(config))
    ]  # fmt: skip

    def nats(factors):
        trees = [merge(work.paths(part), [loaded_whole(tree) for tree in of_step.load(part)], {}, of_part)
                 for part, of_part in enumerate(factors)]  # fmt: skip
        params = whole(config, trees)
        total = jnp.float32(0)
        for rows in (slice(0, 2), slice(2, 4)):  # of each domain
            part = jax.tree.map(lambda array, rows=rows: array[rows], batch)
            loss, count = qwen2.loss_sum(qwen2.Qwen2(config), params, part)
            total += loss / count / 2
        return total

    with jax.set_mesh(of_step.mesh):
        expected, gradient = jax.jit(jax.grad(nats))(factors), learn.gradient(work, factors, batch)
    assert jax.tree.structure(expected) == jax.tree.structure(gradient)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-3, atol=2e-6)
    # A row is an output: the last axis of a kernel here, the first of a tensor in a file.
    kernel = factors[1][0]["layers"]["mlp"]["down"]["kernel"]
    assert kernel.shape == {"row": (1, 32), "tensor": (1, 1), "entry": (64, 32)}[per]


def test_moved_leaves_are_those_that_any_branch_changed():
    base = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2)), "c": jnp.zeros(())}
    moved = learn.moved_leaves(base, base | {"a": jnp.array([0.0, 0.0, 1e-30])}, None)
    moved = learn.moved_leaves(base, base | {"c": jnp.ones(())}, moved)
    assert jax.tree.map(bool, moved) == {"a": True, "b": False, "c": True}
