"""A merge by a calibration set, from directories to a directory."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate import data
from bmjax.calibrate.contributions import Tree, contributions
from bmjax.calibrate.learn import coefficients, held_out_losses, learn, merged, polish
from bmjax.calibrate.recipe import CalibratedRecipe
from bmjax.config import UserError
from bmjax.io import hub
from bmjax.merge.engine.files import REPORT
from bmjax.merge.plan.output import check_target
from bmjax.merge.report.statistics import layer_of
from bmjax.model import spec
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.model.spec import get
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf

Log = Callable[[str], None]


def merge(
    recipe: CalibratedRecipe | str | Path | Mapping[str, Any], output: str | Path, overwrite: bool = False, *,
    overrides: Sequence[str] = (), shard_bytes: float = 5e9, log: Log = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Merges the models into the Hugging Face directory `output`; returns what its merge_report.json holds.

    The models and their contributions are in memory, float32, sharded over the mesh. What is learned is kept only if it
    lowers the mean over domains of the held-out loss, and so are the polishing steps; the report has every loss and the
    tokens that each purpose took. Raises UserError, one line; `output` is then as it was.
    """
    if not isinstance(recipe, CalibratedRecipe):
        recipe = CalibratedRecipe.read(recipe, overrides)
    base_directory, directories = check(recipe, output, overwrite)
    p = recipe.parameters
    config = ModelConfig.from_dir(base_directory)
    tokenizer = hf.load_tokenizer(base_directory)
    if tokenizer is None:
        raise UserError(f"{base_directory}: no tokenizer files (tokenizer.json or vocab.json); the data needs them")
    mesh = make_mesh(p.mesh)
    with jax.set_mesh(mesh):
        calibration = data.read(recipe, tokenizer, config.vocab_size, base_directory, mesh)
        base = hf.load_params(base_directory, config, mesh, dtype=np.float32)
        branches = [hf.load_params(directory, config, mesh, dtype=np.float32) for directory in directories]
        for name, tree in zip(recipe.inputs, [base, *branches], strict=True):
            _check_finite(name, tree, config)
        parts = contributions(config, base, branches, calibration, p)
        del branches
        factors = [coefficients(config, p.start, p.per) for _ in parts]
        params, kept = merged(base, parts, factors), "start"
        losses = {stage: held_out_losses(config, tree, calibration, p.compute_dtype)
                  for stage, tree in (("base", base), (kept, params))}  # fmt: skip

        def better(stage: str, candidate: Tree) -> bool:
            losses[stage] = held_out_losses(config, candidate, calibration, p.compute_dtype)
            one, other = np.mean(losses[stage]), np.mean(losses[kept])
            if one < other:
                return True
            log(f"{stage}: held-out loss {one:.4f} is not below {other:.4f} ({kept}); not kept")  # NaN is not, either
            return False

        if p.steps:
            found = learn(config, base, parts, calibration, p)
            candidate = merged(base, parts, found)
            if better("learned", candidate):
                params, factors, kept = candidate, found, "learned"
        if p.polish:
            candidate = polish(config, params, parts, calibration, p)
            if better("polished", candidate):
                params, kept = candidate, "polished"
        report = {
            "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
            "seed": recipe.seed,
            "sources": {name: {"directory": recipe.sources.get(name, name)} for name in recipe.inputs},
            "held_out_loss": {stage: dict(zip(recipe.names, own, strict=True)) for stage, own in losses.items()},
            "kept": kept,
            "tokens": calibration.tokens,
            "versions": {package: version(package) for package in ("jax", "numpy")},
            **_summaries(recipe, config, base, params, parts, factors),
        }  # fmt: skip
        hf.save_hf(
            output, params, read_hf_config(base_directory), side_files=base_directory,
            dtype=np.dtype(jnp.dtype(recipe.dtype)) if recipe.dtype else hf.stored_dtype(base_directory),
            shard_bytes=shard_bytes, texts={REPORT: json.dumps(report, indent=1) + "\n"},
        )  # fmt: skip
    return report


def check(recipe: CalibratedRecipe, output: str | Path, overwrite: bool) -> tuple[Path, list[Path]]:
    """The base's and the branches' directories, once what their configs say fits together; else UserError."""
    base, *directories = [hub.model_directory(recipe.sources.get(n, n)) for n in recipe.inputs]
    check_target(Path(output), [base, *directories], overwrite)
    expected = ModelConfig.from_dir(base)
    if recipe.parameters.seq_len > expected.max_length:
        raise UserError(
            f"parameters.seq_len: {recipe.parameters.seq_len} is more than the base's context of "
            f"{expected.max_length} tokens; lower it"
        )
    for name, directory in zip(recipe.names, directories, strict=True):
        found = ModelConfig.from_dir(directory)
        shapes = [{row.name: row.shape for row in spec.table(config)} for config in (expected, found)]
        for parameter in dict.fromkeys([*shapes[0], *shapes[1]]):
            one, other = (own.get(parameter, "nothing") for own in shapes)
            if one != other:
                raise UserError(
                    f"model '{name}': {parameter} has shape {other}, {one} in '{recipe.base_model}'; "
                    "all must come from one base"
                )
    return base, directories


def _check_finite(name: str, tree: Tree, config: ModelConfig) -> None:
    for row in spec.table(config):
        if not bool(jnp.isfinite(get(tree, row.path)).all()):
            raise UserError(f"model '{name}': {row.name} holds NaN or infinity; the training run is broken")


def _summaries(
    recipe: CalibratedRecipe, config: ModelConfig, base: Tree, params: Tree, parts: Sequence[Tree],
    factors: Sequence[Tree],
) -> dict[str, Any]:  # fmt: skip
    """`layers` and `total`, each {"merged": {reference_norm, moved_norm, models: {name: {kept, delta_norm,
    coefficient}}}}: kept is the share of entries the model has a part in, delta_norm its contribution's norm,
    coefficient their mean over the entries."""
    sums: dict[str, dict[str, Any]] = {}
    for row in spec.table(config):
        own = [np.asarray(get(tree, row.path), np.float64) for tree in (base, params)]
        given = [np.asarray(get(tree, row.path), np.float64) for tree in parts]
        scale = [np.broadcast_to(np.asarray(get(tree, row.path), np.float64), row.shape) for tree in factors]
        for number, key in enumerate(row.hf_keys()):
            at = (number,) if row.stacked else ()
            for group in (layer_of(key), ""):
                entry = sums.setdefault(group, {"size": 0, "base": 0.0, "moved": 0.0, "models": {}})
                entry["size"] += own[0][at].size
                entry["base"] += float(np.sum(own[0][at] ** 2))
                entry["moved"] += float(np.sum((own[1][at] - own[0][at]) ** 2))
                for name, part, factor in zip(recipe.names, given, scale, strict=True):
                    model = entry["models"].setdefault(name, np.zeros(3))
                    scaled = factor[at] * part[at]
                    model += [np.count_nonzero(scaled), np.sum(scaled**2), np.sum(factor[at])]
    found = {
        group: {
            "size": entry["size"],
            "merged": {
                "reference_norm": entry["base"] ** 0.5,
                "moved_norm": entry["moved"] ** 0.5,
                "models": {
                    name: {"kept": m[0] / entry["size"], "delta_norm": m[1] ** 0.5, "coefficient": m[2] / entry["size"]}
                    for name, m in entry["models"].items()
                },
            },
        }
        for group, entry in sums.items()
    }
    return {"total": found.pop(""), "layers": found}


def check_lines(recipe: CalibratedRecipe, output: str | Path, overwrite: bool) -> Iterator[str]:
    """Yield what `merge` with the same arguments would read and write, line by line. Raises UserError as it would."""
    base, directories = check(recipe, output, overwrite)
    for directory in (base, *directories):
        yield f"reads {directory}"
    for entry in recipe.models:
        yield f"reads {entry.data} for '{entry.model}'"
    yield f"writes {output}; all models are in memory at once, and are run on the data"


def summary_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a merge came to for the person who ran it. report: what merge_report.json holds."""
    for stage, losses in report["held_out_loss"].items():
        by_domain = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        yield f"held-out loss, {stage}{' (kept)' if stage == report['kept'] else ''}: {by_domain}"
    for name, model in report["total"]["merged"]["models"].items():
        yield f"mean coefficient of {name}: {model['coefficient']:.2f}"
    yield "tokens: " + ", ".join(f"{purpose} {count:,}" for purpose, count in report["tokens"].items())
