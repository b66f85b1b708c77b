"""Schedules equal transformers', AdamW equals torch's, decay leaves biases and norms alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from transformers import optimization

from bmjax.branch import optimizer
from bmjax.config import UserError
from bmjax.model import spec
from tests.model.reference import build, from_state

SCHEDULES = {
    "cosine": optimization.get_cosine_schedule_with_warmup,
    "linear": optimization.get_linear_schedule_with_warmup,
    "constant": lambda opt, num_warmup_steps, num_training_steps: optimization.get_constant_schedule_with_warmup(
        opt, num_warmup_steps
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup, warm", [(0.1, 3), (7, 7), (0, 0), (0.0, 0), (1, 1), (5.0, 5)])
def test_schedules_are_those_of_transformers(name, warmup, warm):
    steps, peak = 23, 3e-4
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = SCHEDULES[name](theirs, num_warmup_steps=warm, num_training_steps=steps)
    for step in range(steps):
        ours = optimizer.learning_rate(step, steps, peak, name, warmup)
        assert ours == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-18)
        theirs.step()
        schedule.step()


@pytest.mark.parametrize("name", ["gqa_untied", "mha_tied"])
def test_decay_applies_to_what_transformers_decays(name):
    hf, config, _ = build(name)
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, hf))
    ours = {key for row in spec.table(config) if row.is_matrix for key in row.hf_keys()}
    assert ours == {key for key in theirs if not (config.tied and key == "lm_head.weight")}


@pytest.mark.parametrize("clip, decay", [(0.5, 0.1), (0.0, 0.0)])
def test_adamw_equals_torchs(clip, decay):
    hf, config, params = build("gqa_untied")
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, hf))
    named = dict(hf.named_parameters())
    groups = [
        {"params": [p for key, p in named.items() if key in decayed], "weight_decay": decay},
        {"params": [p for key, p in named.items() if key not in decayed], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.93), eps=1e-6)
    tx = optimizer.adamw(spec.table(config), 0.8, 0.93, 1e-6, decay, clip)
    moments = tx.init(params)

    @jax.jit
    def apply(grads, moments, params):
        updates, moments = tx.update(grads, moments, params)
        return jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates), moments

    rng = np.random.default_rng(0)
    for _ in range(3):
        grads = {key: rng.normal(size=p.shape).astype(np.float32) for key, p in named.items()}
        for key, p in named.items():
            p.grad = torch.tensor(grads[key])
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), clip or 1e30)
        theirs.step()
        ours = from_state(config, grads)
        assert float(optax.tree.norm(ours)) == pytest.approx(float(norm), rel=1e-5)
        params, moments = apply(ours, moments, params)
    wanted = from_state(config, {key: p.detach().numpy() for key, p in named.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, wanted)


def test_bfloat16_moments_are_rounded_after_every_step():
    """Against a float64 formula that rounds where the moments are stored."""
    config, params = build("gqa_untied")[1:]
    tx = optimizer.adamw(spec.table(config), 0.9, 0.95, 1e-8, 0.0, 0.0, "bfloat16")
    moments = tx.init(params)
    leaves = jax.tree.leaves((moments[0].mu, moments[0].nu))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    rng = np.random.default_rng(0)
    shape = params["final_norm"]["scale"].shape
    mu = nu = np.zeros(shape)
    for step in range(1, 5):
        g = rng.normal(size=shape).astype(np.float32)
        grads = jax.tree.map(jnp.zeros_like, params) | {"final_norm": {"scale": jnp.asarray(g)}}
        updates, moments = jax.jit(tx.update)(grads, moments, params)
        mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g.astype(np.float64) ** 2
        want = mu / (1 - 0.9**step) / (np.sqrt(nu / (1 - 0.95**step)) + 1e-8)
        np.testing.assert_allclose(updates["final_norm"]["scale"], want, rtol=1e-5, atol=1e-6)
        mu, nu = (x.astype(np.float32).astype(jnp.bfloat16).astype(np.float64) for x in (mu, nu))
        stored = np.asarray(moments[0].mu["final_norm"]["scale"], np.float64)
        np.testing.assert_allclose(stored, mu, rtol=2**-7, atol=1e-9)
        mu, nu = stored, np.asarray(moments[0].nu["final_norm"]["scale"], np.float64)


def test_freeze_patterns_split_the_table():
    config = build("gqa_untied")[1]
    rows = spec.table(config)
    trained, frozen = optimizer.split_frozen(rows, ["embed/*", "layers/*/bias"])
    assert {row.name for row in frozen} == {
        "embed/embedding", "layers/attention/q/bias", "layers/attention/k/bias", "layers/attention/v/bias",
    }  # fmt: skip
    assert len(trained) + len(frozen) == len(rows)
    assert optimizer.split_frozen(rows, []) == (rows, ())
    params = spec.unflatten([(row.path, jnp.float32(i)) for i, row in enumerate(rows)])
    whole = spec.join(spec.pick(params, trained), spec.pick(params, frozen))
    assert jax.tree.map(float, whole) == jax.tree.map(float, params)


@pytest.mark.parametrize("freeze, problem", [
    (["embd/*"], r"freeze: 'embd/\*' matches no parameter; names are like embed/embedding"),
    (["*"], "freeze: every parameter is frozen"),
])  # fmt: skip
def test_bad_freeze_patterns_are_one_line(freeze, problem):
    with pytest.raises(UserError, match=problem):
        optimizer.split_frozen(spec.table(build("gqa_untied")[1]), freeze)
