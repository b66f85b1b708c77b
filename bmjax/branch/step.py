"""One training step: microbatches summed, divided once by the count of target tokens, clipped, applied.

The training loop runs the compiled step; `bmjax plan` compiles it for chips that are not there. Nothing here reads
data or files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax.branch import optimizer
from bmjax.model import qwen2, spec
from bmjax.model.attention.options import AttentionOptions, Remat
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import sharding

GIB = 2**30
State = dict[str, Any]  # params, frozen, moments, and start where the move is tracked


@dataclass(frozen=True)
class StepPlan:
    """Everything that a compiled step depends on, mostly keys of the settings; equal plans share one compilation."""

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
        """The rows (trained, frozen) of the parameter table."""
        return optimizer.split_frozen(spec.table(self.config), list(self.freeze))

    @property
    def adamw(self) -> Any:
        """The optax transformation of the trained parameters, see `optimizer.adamw`."""
        return optimizer.adamw(
            self.rows[0], self.beta1, self.beta2, self.eps, self.weight_decay, self.clip, self.moments_dtype
        )


def init_state(
    plan: StepPlan, params: qwen2.Params, run: Callable[[Any, Any], Any] = lambda program, tree: program(tree)
) -> State:
    """Build the training state from float32 parameters. run: applies a jitted program to them."""
    trained, frozen = plan.rows
    params_trained = spec.pick(params, trained)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params_trained)
    # Moments lie as their parameters do; counters are everywhere.
    by_path = {jax.tree_util.keystr(path): layout for path, layout in jax.tree_util.tree_leaves_with_path(shardings)}
    replicated = NamedSharding(plan.mesh, PartitionSpec())

    def layout(path: Any, leaf: Any) -> Any:
        keys = tuple(key for key in path if isinstance(key, jax.tree_util.DictKey))
        return by_path.get(jax.tree_util.keystr(keys), replicated) if leaf.ndim else replicated

    shapes = jax.eval_shape(plan.adamw.init, params_trained)
    moment_shardings = jax.tree_util.tree_map_with_path(layout, shapes)
    moments = run(jax.jit(plan.adamw.init, out_shardings=moment_shardings), params_trained)
    state = {"params": params_trained, "frozen": spec.pick(params, frozen), "moments": moments}
    if plan.track_move:
        # The step donates the parameters; the start needs buffers of its own.
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        state["start"] = run(copy, params_trained)
    return state


def abstract_state(plan: StepPlan) -> State:
    """Return shapes, dtypes and shardings (jax.ShapeDtypeStruct) of the training state, without any memory."""
    params = spec.unflatten([
        (row.path, jax.ShapeDtypeStruct(row.shape, jnp.float32, sharding=sharding(plan.mesh, row.axes, row.shape)))
        for row in spec.table(plan.config)
    ])  # fmt: skip
    return init_state(plan, params, run=lambda program, tree: program.eval_shape(tree))


def abstract_arguments(plan: StepPlan, rows: int, length: int) -> tuple[State, Any, Any]:
    """Return shapes, dtypes and shardings of the step's arguments (state, batch, rate) for batches [rows, length]."""
    layout = sharding(plan.mesh, ("batch", "length"), (rows, length))
    dtypes = (jnp.int32, jnp.int32, jnp.uint8)
    batch: Any = Batch(*(jax.ShapeDtypeStruct((rows, length), dtype, sharding=layout) for dtype in dtypes))
    return abstract_state(plan), batch, jax.ShapeDtypeStruct((), jnp.float32)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Count the training FLOPs a token: 6 per matrix parameter used, and causal attention over rows of `length` tokens.

    Attention costs 12 N H T per layer over the square, half of it under the causal mask (PaLM, appendix B).
    """
    matrices = spec.count(config) - config.vocab_size * config.hidden_size * (0 if config.tied else 1)
    return 6.0 * matrices + 6.0 * config.num_layers * config.num_heads * config.head_dim * length


@lru_cache(maxsize=16)
def make_step(plan: StepPlan) -> Any:
    """Return the jitted function `step(state, batch, rate) -> (state, metrics)`.

    batch: of all rows [B, T]. rate: the learning rate, float32. The state is donated and keeps its layout. metrics are
    scalars: loss (nats a target token), targets, grad_norm (before clipping) and move (|delta| / |start|).
    """
    dtype = jnp.dtype(plan.compute_dtype)

    def nats(trained: Any, frozen: Any, batch: Batch[jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Cast before the layers use them: what is gathered over fsdp is then of the compute dtype.
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), spec.join(trained, frozen))
        model = qwen2.Qwen2(plan.config, dtype, plan.remat, plan.unroll, plan.attention_options)
        return qwen2.loss_sum(model, params, batch)

    gradient = jax.value_and_grad(nats, has_aux=True)

    def accumulated(trained: Any, frozen: Any, batch: Batch[jax.Array]) -> tuple[jax.Array, jax.Array, Any]:
        """Return (nats, targets, gradients), each summed over the microbatches."""
        if plan.accumulate == 1:
            (total, count), grads = gradient(trained, frozen, batch)
            return total, count, grads

        def add(sums: Any, microbatch: Batch[jax.Array]) -> tuple[Any, None]:
            (total, count), grads = gradient(trained, frozen, microbatch)
            return jax.tree.map(jnp.add, sums, (total, count, grads)), None

        # Row b goes to microbatch b mod A, so every microbatch takes a share of each device's rows.
        microbatches = jax.tree.map(
            lambda array: array.reshape(-1, plan.accumulate, array.shape[1]).swapaxes(0, 1), batch
        )
        zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        return jax.lax.scan(add, zeros, microbatches)[0]

    def step(state: State, batch: Batch[jax.Array], rate: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        params = state["params"]
        total, count, grads = accumulated(params, state["frozen"], batch)
        denominator = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / denominator, grads)
        updates, moments = plan.adamw.update(grads, state["moments"], params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        metrics = {"loss": total / denominator, "targets": count, "grad_norm": optax.tree.norm(grads)}
        if plan.track_move:
            delta = jax.tree.map(jnp.subtract, params, state["start"])
            whole = spec.join(state["start"], state["frozen"])
            metrics["move"] = optax.tree.norm(delta) / optax.tree.norm(whole)
        return state | {"params": params, "moments": moments}, metrics

    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(plan))
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, NamedSharding(plan.mesh, PartitionSpec())))


@lru_cache(maxsize=16)
def compile_step(plan: StepPlan, rows: int, length: int) -> Any:
    """Compile the step for batches [rows, length]; the program's `memory_analysis()` says what it takes."""
    with jax.set_mesh(plan.mesh):
        return make_step(plan).lower(*abstract_arguments(plan, rows, length)).compile()


def state_bytes(state: State) -> dict[str, float]:
    """Count the bytes of a training state on one chip by kind, and of the float32 gradients that a step makes of it."""

    def size(tree: Any) -> float:
        leaves = jax.tree.leaves(tree)
        return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))

    parameters = size(state["params"])
    return {
        "parameters": parameters + size(state["frozen"]) + size(state.get("start", {})),
        "optimizer": size(state["moments"]),
        "gradients": parameters,
    }


def program_bytes(compiled: Any) -> float:
    """Count the bytes that a compiled program takes on a device: arguments, outputs, temporaries, code."""
    memory = compiled.memory_analysis()
    return float(
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )  # fmt: skip


def size_text(size: float) -> str:
    """Return a size in bytes as GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.2f} MiB"


def memory_line(compiled: Any, state: State, device: jax.Device) -> str:
    """Describe in one line what a compiled step takes of a device's memory."""
    kinds, total = state_bytes(state), program_bytes(compiled)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return (
        f"a step takes {size_text(total)} a device{f' of {size_text(limit)}' if limit else ''}: parameters "
        f"{size_text(kinds['parameters'])}, optimizer {size_text(kinds['optimizer'])}, gradients and temporaries "
        f"{size_text(max(0.0, total - kinds['parameters'] - kinds['optimizer']))}"
    )
