"""The Python interface: load, logits, loss, save, generate, merge, train, run."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bmjax.config import UserError, nearest
from bmjax.generate.text import generate
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.parallel.mesh import make_mesh, sharding
from bmjax.weights import hf
from bmjax.weights import student as students

__all__ = ["Model", "generate", "load", "merge", "run", "save", "train"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """A loaded model: its config, its parameters (nested dict of arrays), its tokenizer or None.

    Computation runs in `dtype`, on `mesh`; `directory` is where its files are.
    """

    config: ModelConfig
    params: qwen2.Params
    tokenizer: Any
    directory: Path
    mesh: Mesh
    dtype: str

    def logits(self, tokens_BT: Any, segment_ids: Any = None, positions: Any = None) -> jax.Array:
        """Logits, float32 [B, T, V], of tokens int32 [B, T].

        segment_ids: 1.. per document of a packed row, 0 = padding; default: one document a row.
        positions: default: counted from 0 in every document.
        """
        tokens, segments, places = self._arrays(tokens_BT, segment_ids, positions)
        with jax.set_mesh(self.mesh):
            return _logits(self.config, self.dtype)(self.params, tokens, segments, places)

    def loss(
        self, tokens_BT: Any, loss_mask_BT: Any, segment_ids: Any = None, positions: Any = None
    ) -> tuple[float, int]:
        """(nats, count): next-token loss summed over the targets with mask 1, and how many those are.

        mask[b, t] = 1 makes tokens[b, t] a target, predicted from the tokens before it; a document's first
        token has no prediction and is never counted.
        """
        tokens, segments, places = self._arrays(tokens_BT, segment_ids, positions)
        mask = self._place(loss_mask_BT, "loss_mask", tokens.shape)
        with jax.set_mesh(self.mesh):
            nats, count = _loss(self.config, self.dtype)(self.params, tokens, mask, segments, places)
        return float(nats), int(count)

    def _arrays(self, tokens: Any, segments: Any, positions: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens = self._place(tokens, "tokens")
        qwen2.check_length(self.config, tokens.shape[1], "tokens")
        low, high = (int(jnp.min(tokens)), int(jnp.max(tokens))) if tokens.size else (0, 0)
        if low < 0 or high >= self.config.vocab_size:
            found = low if low < 0 else high
            raise UserError(f"tokens: ids must lie in 0..{self.config.vocab_size - 1}, found {found}")
        segments = jnp.ones_like(tokens) if segments is None else self._place(segments, "segment_ids", tokens.shape)
        if positions is None:
            return tokens, segments, qwen2.default_positions(segments)
        positions = np.asarray(positions)
        if positions.ndim == 2 and positions.shape[0] == 1:  # the same for every row
            positions = np.broadcast_to(positions, (tokens.shape[0], positions.shape[1]))
        return tokens, segments, self._place(positions, "positions", tokens.shape)

    def _place(self, array: Any, name: str, shape: tuple[int, ...] | None = None) -> jax.Array:
        array = np.asarray(array)
        if array.ndim != 2:
            raise UserError(f"{name}: {array.ndim} dimensions, expected 2: [rows, tokens]")
        if array.dtype.kind not in "iub":
            raise UserError(f"{name}: expected whole numbers, found {array.dtype}")
        if shape is not None and array.shape != shape:
            raise UserError(f"{name}: shape {array.shape}, expected that of the tokens, {shape}")
        array = array.astype(np.int32)
        return jax.device_put(array, sharding(self.mesh, ("batch", "length"), array.shape))


@lru_cache(maxsize=16)
def _logits(config: ModelConfig, dtype: str) -> Any:
    return jax.jit(lambda params, t, s, p: qwen2.logits(config, _cast(params, dtype), t, s, p, dtype=jnp.dtype(dtype)))


@lru_cache(maxsize=16)
def _loss(config: ModelConfig, dtype: str) -> Any:
    return jax.jit(
        lambda params, t, m, s, p: qwen2.loss_sum(config, _cast(params, dtype), t, m, s, p, dtype=jnp.dtype(dtype))
    )


def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype), params)


def load(source: str | Path, dtype: str | None = "float32", mesh: Mapping[str, int] | Mesh | None = None) -> Model:
    """A Hugging Face Qwen2 model from a directory or a hub id.

    dtype: of the parameters and of computation ('float32', 'bfloat16', 'float16'); None keeps what is stored.
    mesh: axis sizes such as {"fsdp": 4, "tensor": 2}; None is one device.
    Raises UserError, one line, for anything wrong with the directory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: '{dtype}' is not one of {', '.join(DTYPES)}{nearest(str(dtype), DTYPES)}")
    student = students.open(source)
    directory, config = student.directory, student.config
    devices = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
    params = hf.load_params(directory, config, devices, dtype=None if dtype is None else np.dtype(jnp.dtype(dtype)))
    compute = dtype or str(params["embed"]["embedding"].dtype)
    return Model(config, params, student.tokenizer, directory, devices, compute)


def save(model: Model, output: str | Path) -> Path:
    """Write `model` as a Hugging Face directory, replacing `output` only once everything is written."""
    hf.save_hf(Path(output), model.params, read_hf_config(model.directory), side_files=model.directory)
    return Path(output)


def merge(
    recipe: str | Path | Mapping[str, Any], output: str | Path, overwrite: bool = False, **options: Any
) -> dict[str, Any]:
    """Merge Hugging Face directories as `recipe` (YAML path or dict) says; returns the report.

    options: further ones of `bmjax.calibrate.dispatch.merge`.
    """
    from bmjax.calibrate import dispatch

    return dispatch.merge(recipe, output, overwrite, **options)


def train(settings: str | Path | Mapping[str, Any], *overrides: str) -> dict[str, Any]:
    """Train one branch; the keys are those of `bmjax train`. Returns its summary (hf, steps, tokens, loss)."""
    from bmjax.branch.settings import TrainSettings
    from bmjax.branch.train import train as run_training

    return run_training(TrainSettings.read(settings, overrides))


def run(config: str | Path | Mapping[str, Any], output: str | Path | None = None, *overrides: str) -> dict[str, Any]:
    """The whole branch-merge run; the keys are those of `bmjax run`. Returns report.json as a dictionary."""
    from bmjax import pipeline

    return pipeline.run(pipeline.RunSettings.read(config, overrides), output)
