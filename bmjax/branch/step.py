"""One training step: microbatches summed, divided once by the count of target tokens, clipped, applied."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax.branch import optimizer
from bmjax.branch.loader import Batch, Loader
from bmjax.model import qwen2, spec
from bmjax.model.attention.options import AttentionOptions, Remat
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import sharding

BATCH_DTYPES = (jnp.int32, jnp.int32, jnp.uint8)  # tokens, segment ids, loss mask


@dataclass(frozen=True)
class StepPlan:
    """Everything a compiled step depends on; equal plans share one compilation."""

    config: ModelConfig
    freeze: tuple[str, ...]
    accumulate: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    compute_dtype: str
    remat: Remat
    unroll: int
    attention_options: AttentionOptions
    track_move: bool
    mesh: Mesh
    moments_dtype: str = "float32"

    @property
    def rows(self) -> tuple[tuple[spec.Param, ...], tuple[spec.Param, ...]]:
        """(trained, frozen) rows of the table."""
        return optimizer.split_frozen(spec.table(self.config), list(self.freeze))

    @property
    def adamw(self) -> Any:
        return optimizer.adamw(
            self.rows[0], self.beta1, self.beta2, self.eps, self.weight_decay, self.clip, self.moments_dtype
        )


def init_state(plan: StepPlan, params: qwen2.Params) -> dict[str, Any]:
    """Training state from float32 parameters: trained, frozen, moments, and the start when the move is tracked."""
    return _state(plan, params, lambda program, tree: program(tree))


def abstract_state(plan: StepPlan) -> dict[str, Any]:
    """What `init_state` gives, of shapes with shardings (jax.ShapeDtypeStruct) instead of arrays: nothing is held."""
    params = spec.unflatten([
        (row.path, jax.ShapeDtypeStruct(row.shape, jnp.float32, sharding=sharding(plan.mesh, row.axes, row.shape)))
        for row in spec.table(plan.config)
    ])  # fmt: skip
    return _state(plan, params, lambda program, tree: program.eval_shape(tree))


def abstract_arguments(plan: StepPlan, rows: int, length: int) -> tuple[Any, ...]:
    """What the step takes for batches [rows, length], as shapes with shardings."""
    place = batch_sharding(plan.mesh, rows, length)
    batch = [jax.ShapeDtypeStruct((rows, length), kind, sharding=place) for kind in BATCH_DTYPES]
    return (abstract_state(plan), *batch, jax.ShapeDtypeStruct((), jnp.float32))


def _state(plan: StepPlan, params: qwen2.Params, run: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """The training state, of what `run` makes of a jitted program and parameters."""
    trained, frozen = plan.rows
    train = spec.pick(params, trained)
    shardings = jax.tree.map(lambda a: a.sharding, train)
    moments = run(jax.jit(plan.adamw.init, out_shardings=_moment_shardings(plan, shardings, train)), train)
    state = {"params": train, "frozen": spec.pick(params, frozen), "moments": moments}
    if plan.track_move:
        # The step donates the parameters; the start needs buffers of its own.
        state["start"] = run(jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings), train)
    return state


def _moment_shardings(plan: StepPlan, shardings: Any, train: Any) -> Any:
    """Moments lie where their parameters lie; counters are replicated."""
    by_path = {jax.tree_util.keystr(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    replicated = NamedSharding(plan.mesh, PartitionSpec())

    def place(path: Any, leaf: Any) -> Any:
        keys = [k for k in path if isinstance(k, jax.tree_util.DictKey)]
        return by_path.get(jax.tree_util.keystr(tuple(keys)), replicated) if leaf.ndim else replicated

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(plan.adamw.init, train))


def all_params(state: dict[str, Any]) -> qwen2.Params:
    """The model's parameters, trained and frozen together."""
    return spec.join(state["params"], state["frozen"])


@lru_cache(maxsize=16)
def make_step(plan: StepPlan) -> Any:
    """step(state, tokens, segment_ids, loss_mask, rate) -> (state, metrics); arrays [B, T], B = all rows.

    metrics: loss (nats a target token), targets, grad_norm (before clipping), move (|delta|/|start|), all scalars.
    The state is donated, and lies as it lay.
    """
    dtype = jnp.dtype(plan.compute_dtype)
    tx = plan.adamw

    def nats(train: Any, frozen: Any, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        # Cast before the layers use them: what is gathered over fsdp is then of the compute dtype.
        params = jax.tree.map(lambda a: a.astype(dtype), spec.join(train, frozen))
        tokens, segments, mask = batch
        return qwen2.loss_sum(
            plan.config, params, tokens, mask, segments, dtype=dtype, remat=plan.remat, unroll=plan.unroll,
            attention_options=plan.attention_options,
        )  # fmt: skip

    gradient = jax.value_and_grad(nats, has_aux=True)

    def summed(train: Any, frozen: Any, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, Any]:
        if plan.accumulate == 1:
            (total, count), grads = gradient(train, frozen, batch)
            return total, count, grads

        def body(carry: Any, micro: tuple[jax.Array, ...]) -> tuple[Any, None]:
            (total, count), grads = gradient(train, frozen, micro)
            return jax.tree.map(jnp.add, carry, (total, count, grads)), None

        # Row b goes to microbatch b mod A, so every microbatch takes a share of each device's rows.
        micros = tuple(a.reshape(-1, plan.accumulate, a.shape[1]).swapaxes(0, 1) for a in batch)
        start = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, train))
        return jax.lax.scan(body, start, micros)[0]

    def step(
        state: dict[str, Any], tokens: jax.Array, segments: jax.Array, mask: jax.Array, rate: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        train = state["params"]
        total, count, grads = summed(train, state["frozen"], (tokens, segments, mask))
        denominator = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / denominator, grads)
        updates, moments = tx.update(grads, state["moments"], train)
        train = jax.tree.map(lambda p, u: p - rate * u, train, updates)
        metrics = {"loss": total / denominator, "targets": count, "grad_norm": optimizer.global_norm(grads)}
        if plan.track_move:
            delta = jax.tree.map(jnp.subtract, train, state["start"])
            whole = spec.join(state["start"], state["frozen"])
            metrics["move"] = optimizer.global_norm(delta) / optimizer.global_norm(whole)
        return state | {"params": train, "moments": moments}, metrics

    places = jax.tree.map(lambda a: a.sharding, abstract_state(plan))
    return jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(plan.mesh, PartitionSpec())))


@lru_cache(maxsize=16)
def compile_step(plan: StepPlan, rows: int, length: int) -> Any:
    """`make_step(plan)`, compiled for batches [rows, length]; its `memory_analysis()` says what it takes."""
    with jax.set_mesh(plan.mesh):
        return make_step(plan).lower(*abstract_arguments(plan, rows, length)).compile()


def batch_sharding(mesh: Mesh, rows: int, length: int) -> NamedSharding:
    """Where a batch [rows, length] lies: rows over data and fsdp, tokens over context."""
    return sharding(mesh, ("batch", "length"), (rows, length))


def place_batch(mesh: Mesh, *arrays: Any) -> list[jax.Array]:
    """Host arrays [B, T], the same in all processes, onto the mesh."""
    return [jax.make_array_from_callback(a.shape, batch_sharding(mesh, *a.shape), a.__getitem__) for a in arrays]


def load_batch(mesh: Mesh, loader: Loader, step: int) -> list[jax.Array]:
    """The batch of optimizer step `step` on the mesh; a process lays out the rows of its own devices only."""
    place = batch_sharding(mesh, loader.batch, loader.length)
    laid: dict[tuple[int, int], Batch] = {}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(loader.batch)
        if (start, stop) not in laid:
            laid[start, stop] = loader.at(step, range(start, stop))
        return getattr(laid[start, stop], name)[:, index[1]]

    return [
        jax.make_array_from_callback((loader.batch, loader.length), place, partial(part, name))
        for name in ("tokens", "segment_ids", "loss_mask")
    ]
