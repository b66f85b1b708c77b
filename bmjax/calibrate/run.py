"""One step that looks at data, from model directories to a model directory. Called by dispatch.py alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate import data
from bmjax.calibrate.contributions import Tree, contributions
from bmjax.calibrate.learn import coefficients, held_out_losses, learn, merged, polish
from bmjax.config import UserError
from bmjax.io.rows import read_rows
from bmjax.log import Log
from bmjax.merge.engine import passes
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.merge.recipe.recipe import Step
from bmjax.merge.report.statistics import Stats
from bmjax.model import spec
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.model.spec import get
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf


def merge_step(
    step: Step,
    directories: Mapping[str, Path],
    output: Path,
    *,
    dtype: str,
    seed: int,
    shard_bytes: float,
    log: Log,
) -> tuple[dict[str, Stats], dict[str, Any]]:
    """Carry out a step and write its result as a Hugging Face directory.

    The models and their contributions are in memory, float32, sharded over the mesh. What is learned is kept only if it
    lowers the mean over domains of the held-out loss, and so are the polishing steps.

    Arguments:
        directories: of every model that the step reads.
        output: the directory to write.
        dtype: what is written.
        seed: which documents are drawn and held out, and their order.
        log: gets a line for what was learned and not kept.

    Returns:
        (statistics of every tensor, the further keys of merge_report.json: held_out_loss, kept, tokens)

    Raises:
        UserError: for rows that cannot be read, too few of them, NaN or infinity in a model.
    """
    p, base_directory = _settings(step), directories[str(step.base)]
    config = ModelConfig.from_dir(base_directory)
    tokenizer = hf.load_tokenizer(base_directory)
    if tokenizer is None:
        raise UserError(f"{base_directory}: no tokenizer files (tokenizer.json or vocab.json); the data needs them")
    mesh = make_mesh(p.mesh)
    with jax.set_mesh(mesh):
        # The rows, the models, and each model's part in the mean of the changes.
        calibration = data.read(step, p, seed, tokenizer, config.vocab_size, base_directory, mesh)
        base, *branches = (hf.load_params(directories[n], config, mesh, dtype=np.float32) for n in step.reads)
        for name, tree in zip(step.reads, [base, *branches], strict=True):
            _check_finite(name, tree, config)
        stats = _statistics_of_changes(step.branches, config, base, branches)
        parts = contributions(config, base, branches, calibration, p)
        del branches
        # What is made of them: the start, learned coefficients, polished weights.
        factors = [coefficients(config, p.start, p.per) for _ in parts]
        params, kept = merged(base, parts, factors), "start"
        losses = {stage: held_out_losses(config, tree, calibration, p.compute_dtype)
                  for stage, tree in (("base", base), (kept, params))}  # fmt: skip

        def is_better(stage: str, candidate: Tree) -> bool:
            losses[stage] = held_out_losses(config, candidate, calibration, p.compute_dtype)
            loss, best = np.mean(losses[stage]), np.mean(losses[kept])
            if loss < best:
                return True
            log(f"{stage}: held-out loss {loss:.4f} is not below {best:.4f} ({kept}); not kept")  # NaN is not, either
            return False

        if p.steps:
            learned = learn(config, base, parts, calibration, p)
            candidate = merged(base, parts, learned)
            if is_better("learned", candidate):
                params, factors, kept = candidate, learned, "learned"
        if p.polish:
            candidate = polish(config, params, parts, calibration, p)
            if is_better("polished", candidate):
                params, kept = candidate, "polished"
        stats = _with_result(stats, config, base, params, parts, factors)
        hf.save_hf(
            output, params, read_hf_config(base_directory), side_files=base_directory, dtype=np.dtype(jnp.dtype(dtype)),
            shard_bytes=shard_bytes,
        )  # fmt: skip
    by_stage = {stage: dict(zip(step.branches, values, strict=True)) for stage, values in losses.items()}
    return stats, {"held_out_loss": by_stage, "kept": kept, "tokens": calibration.tokens}


def check_step(step: Step, base_directory: Path) -> None:
    """Raise a UserError for what `merge_step` would refuse, known without reading a tensor.

    base_directory: of the base, or of the model that its config comes from.
    """
    p, config = _settings(step), ModelConfig.from_dir(base_directory)
    if p.seq_len > config.max_length:
        raise UserError(
            f"step '{step.name}': seq_len: {p.seq_len} is more than the base's context of {config.max_length} tokens; "
            "lower it"
        )
    for name, rows in zip(step.branches, step.data, strict=True):
        next(read_rows(rows, f"models.{name}.data"))


def _settings(step: Step) -> CalibrationSettings:
    assert step.calibration is not None
    return step.calibration


def _check_finite(name: str, tree: Tree, config: ModelConfig) -> None:
    for row in spec.table(config):
        if not bool(jnp.isfinite(leaf := get(tree, row.path)).all()):
            layers = jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim))) if row.stacked else jnp.zeros(1, bool)
            key = row.hf_keys()[int(jnp.argmin(layers))]
            raise UserError(f"model '{name}': tensor '{key}' holds NaN or infinity; the training run is broken")


def _statistics_of_changes(
    names: Sequence[str], config: ModelConfig, base: Tree, branches: Sequence[Tree]
) -> dict[str, Stats]:
    """Return by tensor the norms, products and conflicts of the models' changes, as the file engine measures them."""
    stats: dict[str, Stats] = {}
    for row in spec.table(config):
        count = len(row.hf_keys())
        base_rows, *branch_rows = (_rows(get(tree, row.path)) for tree in (base, *branches))
        sums = passes.statistics()(passes.block(base_rows, branch_rows, {}), base_rows, [])
        # [K, layers]: row sums in float32, their sum in float64.
        totals = np.concatenate([np.asarray(s, np.float64).reshape(len(s), count, -1).sum(-1) for s in sums])
        size = base_rows.size // count
        stats |= {key: Stats.of(size, names, totals[:, i]) for i, key in enumerate(row.hf_keys())}
    return stats


def _rows(leaf: jax.Array) -> jax.Array:
    """Return a leaf [..., n] as rows [rows, n]; rows of one layer stay together."""
    return leaf.reshape(-1, leaf.shape[-1])


def _with_result(
    stats: Mapping[str, Stats],
    config: ModelConfig,
    base: Tree,
    params: Tree,
    parts: Sequence[Tree],
    factors: Sequence[Tree],
) -> dict[str, Stats]:
    """Return the statistics with how far the result moved, and with what each model gave to it."""
    complete: dict[str, Stats] = {}
    for row in spec.table(config):
        start, result = (np.asarray(get(tree, row.path), np.float64) for tree in (base, params))
        scales = [np.broadcast_to(np.asarray(get(tree, row.path), np.float64), row.shape) for tree in factors]
        contributed = [scale * np.asarray(get(tree, row.path)) for tree, scale in zip(parts, scales, strict=True)]
        for i, key in enumerate(row.hf_keys()):
            at = (i,) if row.stacked else ()
            complete[key] = replace(
                stats[key],
                moved=float(np.sum((result[at] - start[at]) ** 2)),
                kept=np.array([np.count_nonzero(part[at]) for part in contributed], np.float64),
                weighted=(
                    np.array([np.sum(part[at] ** 2) for part in contributed]),
                    np.array([np.sum(scale[at]) for scale in scales]),
                ),
            )
    return complete
