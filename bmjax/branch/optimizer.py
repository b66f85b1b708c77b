"""AdamW and its schedules, with Hugging Face Trainer's definitions of warm-up and decay.

The step builds its optax transformation here; the loop asks for the learning rate.
"""

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bmjax.config import UserError
from bmjax.model import spec
from bmjax.model.spec import Param

MOMENTS = ("mu", "nu")  # of optax's Adam


def warmup_steps(steps: int, warmup: float) -> int:
    """Return the steps of the warm-up; warmup: below 1 a share of `steps`, rounded up; from 1 on a number of steps."""
    return math.ceil(steps * warmup) if warmup < 1 else round(warmup)


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Return the rate of step `step`, from 0: up linearly from 0 during the warm-up, then as `schedule` says."""
    warm_steps = warmup_steps(steps, warmup)
    if step < warm_steps:
        return peak * step / max(1, warm_steps)
    progress = (step - warm_steps) / max(1, steps - warm_steps)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return peak * max(0.0, 1.0 - progress) if schedule == "linear" else peak


def split_frozen(rows: tuple[Param, ...], freeze: list[str]) -> tuple[tuple[Param, ...], tuple[Param, ...]]:
    """Split the table's rows into (trained, frozen); UserError for a pattern that matches nothing."""
    for pattern in freeze:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            raise UserError(
                f"freeze: '{pattern}' matches no parameter; names are like {', '.join(r.name for r in rows[:4])}"
            )
    frozen = tuple(row for row in rows if any(fnmatch.fnmatchcase(row.name, p) for p in freeze))
    trained = tuple(row for row in rows if row not in frozen)
    if not trained:
        raise UserError("freeze: every parameter is frozen; nothing is left to train")
    return trained, frozen


def adamw(
    rows: tuple[Param, ...], beta1: float, beta2: float, eps: float, weight_decay: float, clip: float,
    moments_dtype: str = "float32",
) -> Any:  # fmt: skip
    """Return an optax transformation without its learning rate: clip, Adam, weight decay on matrices.

    The step multiplies by the rate, so that one compiled step serves every schedule. moments_dtype: of both moments
    between steps; they are computed in float32.
    """
    adam = _stored_in(jnp.dtype(moments_dtype), optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps))
    parts = [optax.clip_by_global_norm(clip), adam] if clip else [adam]
    if weight_decay:
        decayed = spec.unflatten([(row.path, row.is_matrix) for row in rows])
        parts.append(optax.add_decayed_weights(weight_decay, mask=decayed))
    return optax.chain(*parts)


def _stored_in(dtype: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    if dtype == jnp.float32:
        return adam

    def cast(state: Any, to: Any) -> Any:
        return state._replace(**{name: jax.tree.map(lambda a: a.astype(to), getattr(state, name)) for name in MOMENTS})

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), dtype), update)


def importances(moments: Any, frozen: Any, beta2: float) -> dict[str, Any]:
    """Return the running mean of every parameter's squared gradient, float32; 0 for frozen parameters.

    It is Adam's second moment without its bias towards 0: an estimate of the Fisher information's diagonal that
    training has at hand. moments: the state of `adamw`. frozen: the frozen parameters.
    """
    (adam,) = (part for part in moments if hasattr(part, "nu"))
    bias = 1.0 - beta2 ** max(1, int(adam.count))
    return spec.join(
        jax.tree.map(lambda nu: nu.astype(jnp.float32) / bias, adam.nu), jax.tree.map(jnp.zeros_like, frozen)
    )
