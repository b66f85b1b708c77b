"""A recipe in which some step looks at data, carried out step by step. Called by dispatch.py alone.

A step that looks at data has its models as directories. Earlier steps that it reads, and its own result when a later
step reads it, are written in float32 inside the output's temporary directory, which vanishes whatever happens.
"""

import shutil
from collections import Counter
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
from bmjax.io.atomic import replacing
from bmjax.io.safetensors import Checkpoint, open_checkpoint
from bmjax.log import Log
from bmjax.merge.engine import files, passes
from bmjax.merge.engine.chunks import CHUNK, block_digest, digest, digest_of_tensors
from bmjax.merge.plan.nodes import MergePlan, prepare
from bmjax.merge.recipe.recipe import Recipe, Step, read_recipe
from bmjax.merge.report.statistics import Stats, TensorStats, merge_report, report, source_entry
from bmjax.model import spec
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf, student


def merge_steps(plan: MergePlan, output: Path, shard_bytes: float, log: Log) -> dict[str, Any]:
    """Carry out the steps in order and write the last one's result to `output`; returns the report."""
    recipe, inputs = plan.recipe, {name: model.directory for name, model in plan.models.items()}
    last = recipe.steps[-1]
    dtype = recipe.dtype or hf.stored_dtype(inputs[recipe.donor]).name
    read_with_data = {name for step in recipe.steps if step.calibration is not None for name in step.models}
    temporary: dict[str, Path] = {}  # directories of steps, and of inputs with the result's tokenizer
    sources: dict[str, Any] = {}
    statistics: dict[str, Any] = {"tensors": {}, "layers": {}, "total": {}}
    details: dict[str, Any] = {}
    with replacing(output) as folder:
        work = folder / "steps"
        # With a tokenizer of the result's own, every model's rows of tokens are put in its order first.
        if recipe.tokenizer is not None:
            for i, name in enumerate(inputs):
                temporary[name] = work / f"input-{i}"
                conversion = prepare(_conversion(recipe, name), temporary[name])
                converted = files.merge(conversion, temporary[name], shard_bytes=shard_bytes)
                sources[name] = converted["sources"][name]
        for i, step in enumerate(recipe.steps):
            target = work / f"step-{i}"
            if step.calibration is not None:
                models = {name: {**inputs, **temporary}[name] for name in step.models}
                stats, results = merge_step(
                    step, models, target, dtype=dtype if step is last else "float32", seed=recipe.seed,
                    shard_bytes=shard_bytes, log=log,
                )  # fmt: skip
                summary = report([step], stats)
                counts = Counter(details.get("tokens", {})) + Counter(results["tokens"])
                details = {**details, **results, "tokens": dict(counts)}
            elif step is last or step.name in read_with_data:
                streamed = _until(recipe, step, temporary)
                if step is not last:
                    streamed = replace(streamed, dtype="float32")
                elif streamed.donor not in inputs:
                    streamed = replace(streamed, dtype=dtype)  # the donor is a step, stored in float32
                summary = files.merge(prepare(streamed, target), target, shard_bytes=shard_bytes)
                sources |= {name: entry for name, entry in summary["sources"].items() if name not in temporary}
            else:
                continue  # a later step of the file engine reads it in memory
            temporary[step.name] = target
            statistics["total"] |= summary["total"]
            for part in ("tensors", "layers"):
                for name, by_step in summary[part].items():
                    statistics[part].setdefault(name, {}).update(by_step)
        for path in temporary[last.name].iterdir():
            path.rename(folder / path.name)
        shutil.rmtree(work)
        # The report of all steps, and the card.
        written = open_checkpoint(folder)
        for name in recipe.inputs:
            if name not in sources:
                model = plan.models[name]
                digest_of_model = digest_of_tensors(_checksums(model))
                sources[name] = source_entry(recipe.sources.get(name, name), model, digest_of_model)
        types = {info.numpy_dtype.name for info in written.tensors.values()}
        checksums = _checksums(written)
        result = merge_report(recipe.text, recipe.seed, sources, checksums, sorted(types), statistics) | details
        files.finish(folder, recipe.chat_template, result)
    return result


def _conversion(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe that puts an input's rows of tokens in the order of the result's tokenizer."""
    block = {
        "name": f"{name} with the tokenizer of the result",
        "merge_method": "passthrough",
        "base_model": recipe.donor,
        "models": [name],
        "sources": dict(recipe.sources),
        "dtype": None if name == recipe.donor else "float32",
    }
    return replace(read_recipe(block), tokenizer=recipe.tokenizer, vocabularies=recipe.inputs)


def _until(recipe: Recipe, step: Step, temporary: Mapping[str, Path]) -> Recipe:
    """Return the recipe of a step of the file engine: it, and the steps that it reads in memory."""
    needed = {step.name}
    for earlier in reversed(recipe.steps):
        if earlier.name in needed and earlier.name not in temporary:
            needed |= set(earlier.models)
    steps = tuple(s for s in recipe.steps if s.name in needed and s.name not in temporary)
    sources = {**recipe.sources, **{name: str(directory) for name, directory in temporary.items()}}
    return replace(recipe, steps=steps, sources=sources, tokenizer=None, chat_template=None)


def _checksums(model: Checkpoint) -> dict[str, str]:
    """Return the checksum of every tensor, by name, as the file engine computes it."""
    checksums = {}
    for name in sorted(model.tensors):
        flat = model.read(name).reshape(-1)
        checksums[name] = digest(block_digest(flat[i : i + CHUNK]) for i in range(0, max(1, len(flat)), CHUNK))
    return checksums


def merge_step(
    step: Step, directories: Mapping[str, Path], output: Path, *, dtype: str, seed: int, shard_bytes: float, log: Log
) -> tuple[dict[str, TensorStats], dict[str, Any]]:
    """Carry out a step and write its result as a Hugging Face directory.

    The models and their contributions are in memory, float32, sharded over the mesh. What is learned is kept only if it
    lowers the mean over domains of the held-out loss, and so are the polishing steps. Returns the statistics of every
    tensor, and the further keys of merge_report.json: held_out_loss, kept, tokens.
    """
    assert step.calibration is not None
    p = step.calibration
    opened = student.open(directories[str(step.base)], template=p.template, purpose="calibration")
    config = opened.config
    mesh = make_mesh(p.mesh)
    with jax.set_mesh(mesh):
        # The rows, the models, and each model's part in the mean of the changes.
        calibration = data.read(step, p, seed, opened, mesh)
        trees = {name: hf.load_params(directories[name], config, mesh, dtype=np.float32) for name in step.reads}
        sums = _sums_of_changes(config, trees)
        base, *branches = trees.values()
        parts = contributions(config, base, branches, calibration, p)
        del trees, branches
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
        stats = _statistics(step, config, sums, base, params, parts, factors)
        hf.save_hf(
            output, params, opened.hf_config, side_files=opened.directory, dtype=np.dtype(jnp.dtype(dtype)),
            shard_bytes=shard_bytes,
        )  # fmt: skip
    by_stage = {stage: dict(zip(step.branches, values, strict=True)) for stage, values in losses.items()}
    return stats, {"held_out_loss": by_stage, "kept": kept, "tokens": calibration.tokens}


def _sums_of_changes(config: ModelConfig, trees: Mapping[str, Tree]) -> dict[str, np.ndarray]:
    """Return by tensor the sums that `Stats.of` takes; UserError for NaN or infinity. trees: by model, base first."""
    sums_of_tensor: dict[str, np.ndarray] = {}
    for row in spec.table(config):
        keys, leaves = row.hf_keys(), {name: get(tree, row.path) for name, tree in trees.items()}
        for name, leaf in leaves.items():
            if not bool(jnp.isfinite(leaf).all()):
                layers = jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim))) if row.stacked else jnp.zeros(1, bool)
                key = keys[int(jnp.argmin(layers))]
                raise UserError(f"model '{name}': tensor '{key}' holds NaN or infinity; the training run is broken")
        # Rows of one layer stay together.
        base, *branches = (leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves.values())
        sums = passes.statistics()(passes.block(base, branches, {}), base, [])
        # [K, layers]: row sums in float32, their sum in float64.
        totals = np.concatenate([np.asarray(s, np.float64).reshape(len(s), len(keys), -1).sum(-1) for s in sums])
        sums_of_tensor |= zip(keys, totals.T, strict=True)
    return sums_of_tensor


def _statistics(
    step: Step,
    config: ModelConfig,
    sums: Mapping[str, np.ndarray],
    base: Tree,
    params: Tree,
    parts: Sequence[Tree],
    factors: Sequence[Tree],
) -> dict[str, TensorStats]:
    """Return by tensor the models' changes, how far the result moved, and what each model gave to it."""
    stats: dict[str, TensorStats] = {}
    for row in spec.table(config):
        start, result = (np.asarray(get(tree, row.path), np.float64) for tree in (base, params))
        scales = [np.broadcast_to(np.asarray(get(tree, row.path), np.float64), row.shape) for tree in factors]
        contributed = [scale * np.asarray(get(tree, row.path)) for tree, scale in zip(parts, scales, strict=True)]
        for i, key in enumerate(row.hf_keys()):
            at = (i,) if row.stacked else ()
            squares, shares = [np.sum(part[at] ** 2) for part in contributed], [np.sum(scale[at]) for scale in scales]
            changes = Stats.of(start[at].size, step.branches, sums[key])
            stats[key] = {
                step.name: replace(
                    changes,
                    moved=float(np.sum((result[at] - start[at]) ** 2)),
                    kept=np.array([np.count_nonzero(part[at]) for part in contributed], np.float64),
                    weighted=(np.array(squares), np.array(shares)),
                )
            }
    return stats
