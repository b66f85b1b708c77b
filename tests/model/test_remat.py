"""What is kept for the backward pass changes no number, only what is computed again and what is held."""

import re
from functools import lru_cache

import jax
import numpy as np
import pytest

from bmjax.model import qwen2
from bmjax.model.attention import rows
from bmjax.model.batch import Batch
from bmjax.plan.hlo import Program
from tests.model.reference import build

B, T = 2, 96
HOW = ("none", "minimal", "save_attention", "full", "offload")


def compiled(remat: str):
    """The gradient, compiled, and its parameters."""
    return _compiled(remat, rows.LONGEST)


@lru_cache
def _compiled(remat: str, longest_rows: int):
    del longest_rows  # read by the model
    _, config, params = build("gqa_untied")
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 97, (B, T)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    gradient = jax.value_and_grad(
        lambda p: qwen2.loss_sum(qwen2.Qwen2(config, remat=remat), p, Batch(tokens, segments, np.ones_like(tokens)))[0]
    )
    return gradient, jax.jit(gradient).lower(params).compile(), params


@pytest.mark.parametrize("attention", ["rows", pytest.param("tiles", marks=pytest.mark.slow)])
def test_every_policy_gives_the_same_loss_and_gradients(attention, monkeypatch):
    if attention == "tiles":
        monkeypatch.setattr(rows, "LONGEST", 32)
    results = {}
    for remat in HOW:
        _, program, params = compiled(remat)
        results[remat] = program(params)
    for remat in HOW[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), results[remat], results["none"]
        )


def test_policies_recompute_what_they_say():
    flops = {remat: Program(compiled(remat)[1].as_text()).flops() for remat in HOW}
    assert flops["none"] <= flops["minimal"] < flops["save_attention"] < flops["full"]
    assert flops["offload"] == flops["full"]


def test_saved_tiles_are_not_computed_again(monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 32)
    loops = {}
    for remat in ("full", "save_attention", "minimal"):
        gradient, _, params = compiled(remat)
        loops[remat] = str(jax.make_jaxpr(gradient)(params)).count("while[")
    assert loops["save_attention"] == loops["minimal"] == loops["full"] - 1


def test_offload_puts_layer_inputs_into_host_memory():
    """As the program is handed to the compiler; a CPU's has one memory and drops it."""
    gradient, _, params = compiled("offload")
    assert re.search(rf"\w+:f32<host>\[{B},{T},32\] = device_put", str(jax.make_jaxpr(gradient)(params)))
