"""A recipe in which some step looks at data, carried out step by step. Called by dispatch.py alone.

A step that looks at data has its models as directories. Earlier steps that it reads, and its own result when a later
step reads it, are written in float32 inside the output's temporary directory. It vanishes after an error. After a kill
it stays, and the next run of the same recipe goes on with the finished steps and, in a step, with the finished layers.
"""

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.calibrate import data, judge
from bmjax.calibrate.distill import distill
from bmjax.calibrate.fisher import Fisher
from bmjax.calibrate.judge import Loss
from bmjax.calibrate.layerwise import Layerwise
from bmjax.calibrate.learn import coefficients, held_out_losses, learn, polish
from bmjax.calibrate.models import KEPT_BYTES, Models, Tree, checksums_of
from bmjax.calibrate.progress import Progress
from bmjax.calibrate.regmean import RegMean
from bmjax.calibrate.rows import Domain, notes_of_rows, read_domains
from bmjax.calibrate.walk import Changes, Chooser, Contributions, Fixed, Stored, Work, walk
from bmjax.io.atomic import replacing, write_atomic
from bmjax.io.safetensors import INDEX, Plan, SharedWriter, open_checkpoint
from bmjax.io.states import file_states
from bmjax.log import Log, stage
from bmjax.merge.engine import files
from bmjax.merge.engine.chunks import digest_of_tensors
from bmjax.merge.engine.journal import clear
from bmjax.merge.plan.nodes import MergePlan, prepare
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.merge.recipe.recipe import Recipe, Step, read_recipe
from bmjax.merge.report.statistics import TensorStats, merge_report, report, source_entry
from bmjax.model import parts, spec
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get
from bmjax.parallel.mesh import make_mesh
from bmjax.version import __version__
from bmjax.weights import hf, student

STEPS = ".steps"  # hidden, so that no folder of the donor's has this name


def merge_steps(
    plan: MergePlan, output: Path, shard_bytes: float, log: Log, domains: Mapping[str, Sequence[Domain]]
) -> dict[str, Any]:
    """Carry out the steps in order and write the last one's result to `output`; returns the report.

    domains: the rows of steps that look at data, by the steps' names; a step without them reads its own.
    """
    recipe, inputs = plan.recipe, {name: model.directory for name, model in plan.models.items()}
    last = recipe.steps[-1]
    dtype = recipe.dtype or hf.stored_dtype(inputs[recipe.donor]).name
    read_with_data = {name for step in recipe.steps if step.calibration is not None for name in step.models}
    temporary: dict[str, Path] = {}  # directories of steps, and of inputs with the result's tokenizer
    sources: dict[str, Any] = {}
    statistics: dict[str, Any] = {"tensors": {}, "layers": {}, "total": {}}
    details: dict[str, Any] = {}
    read: dict[str, dict[str, str]] = {}  # checksums of inputs' tensors that a step knows
    with replacing(output, resume=True) as folder:
        work = _begun(folder, plan, shard_bytes)

        def once(name: str, carry_out: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
            """Carry out what makes the directory `name`, or return what that gave before the merge was killed."""
            path = work / f"{name}.json"
            if not path.exists():
                write_atomic(path, json.dumps(carry_out(work / name)))
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return result

        def stream(streamed: Recipe, target: Path) -> dict[str, Any]:
            return files.merge(prepare(streamed, target, overwrite=True), target, shard_bytes=shard_bytes)

        def calibrate(step: Step, target: Path) -> dict[str, Any]:
            models = {name: {**inputs, **temporary}[name] for name in step.models}
            stats, results = merge_step(
                step, models, target, dtype=dtype if step is last else "float32", seed=recipe.seed,
                shard_bytes=shard_bytes, log=log, domains=domains.get(step.name),
            )  # fmt: skip
            return {"summary": report([step], stats), "results": results}

        # With a tokenizer of the result's own, every model's rows of tokens are put in its order first.
        if recipe.tokenizer is not None:
            for i, name in enumerate(inputs):
                temporary[name] = work / f"input-{i}"
                converted = once(f"input-{i}", partial(stream, _conversion(recipe, name)))
                sources[name] = converted["sources"][name]
        for i, step in enumerate(recipe.steps):
            if step.calibration is not None:
                calibrated = once(f"step-{i}", partial(calibrate, step))
                summary, results = calibrated["summary"], calibrated["results"]
                read |= {name: sums for name, sums in results.pop("checksums").items() if name not in temporary}
                counts = Counter(details.get("tokens", {})) + Counter(results["tokens"])
                details = {**details, **results, "tokens": dict(counts)}
            elif step is last or step.name in read_with_data:
                streamed = _until(recipe, step, temporary)
                if step is not last:
                    streamed = replace(streamed, dtype="float32")
                elif streamed.donor not in inputs:
                    streamed = replace(streamed, dtype=dtype)  # the donor is a step, stored in float32
                summary = once(f"step-{i}", partial(stream, streamed))
                sources |= {name: entry for name, entry in summary["sources"].items() if name not in temporary}
            else:
                continue  # a later step of the file engine reads it in memory
            temporary[step.name] = work / f"step-{i}"
            statistics["total"] |= summary["total"]
            for part in ("tensors", "layers"):
                for name, by_step in summary[part].items():
                    statistics[part].setdefault(name, {}).update(by_step)
        # Its weights, and what stands beside those of any merge.
        for path in [*temporary[last.name].glob("*.safetensors"), *temporary[last.name].glob(INDEX)]:
            path.rename(folder / path.name)
        written = open_checkpoint(folder)
        types = {info.numpy_dtype.name for info in written.tensors.values()}
        files.write_beside(folder, plan, {name for name in types if jnp.issubdtype(jnp.dtype(name), jnp.floating)})
        # The report of all steps, and the card.
        for name in recipe.inputs:
            if name not in sources:
                model = plan.models[name]
                digest_of_model = digest_of_tensors(checksums_of(model, read.get(name, {})))
                sources[name] = source_entry(recipe.pinned(name), model, digest_of_model)
        result = merge_report(recipe.text, recipe.seed, sources, checksums_of(written), sorted(types), statistics)
        result |= details
        files.finish(folder, plan, result)
        shutil.rmtree(work)
    return result


def _begun(folder: Path, plan: MergePlan, shard_bytes: float) -> Path:
    """Return the directory of steps, as a killed merge of the same kind left it, or empty."""
    work, fingerprint = folder / STEPS, _fingerprint(plan, shard_bytes)
    path = work / "merge.json"
    if not path.exists() or path.read_text(encoding="utf-8") != fingerprint:
        clear(folder)
        work.mkdir()
        write_atomic(path, fingerprint)
    return work


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


def _fingerprint(plan: MergePlan, shard_bytes: float) -> str:
    """Return a hash of what must be the same for an unfinished merge to go on."""
    recipe = plan.recipe
    data = [name for step in recipe.steps for name in step.files_of_rows]
    templates = [step.calibration.template for step in recipe.steps if step.calibration and step.calibration.template]
    names = [*(str(model.directory) for model in plan.models.values()), *data, *templates]
    devices = [jax.default_backend(), jax.device_count()]
    versions = [version("jax"), __version__]
    plain = [recipe.text, recipe.seed, file_states(names), shard_bytes, devices, versions]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def merge_step(
    step: Step, directories: Mapping[str, Path], output: Path, *, dtype: str, seed: int, shard_bytes: float, log: Log,
    domains: Sequence[Domain] | None = None,
) -> tuple[dict[str, TensorStats], dict[str, Any]]:  # fmt: skip
    """Carry out a step and write its result as a Hugging Face directory.

    The models are read part by part, see walk.py; polishing and distilling alone hold the result and its moments in
    memory. What is learned is kept only if it lowers the held-out loss by more than noise, see judge.py, and so are the
    polishing and the distilling steps. When it was killed it goes on after the last finished layer.

    domains: the step's rows, where they are read.

    Returns the statistics of every tensor, the further keys of merge_report.json (held_out_loss, kept, tokens,
    layer_distance), and the checksums of the models' tensors.
    """
    assert step.calibration is not None
    p = step.calibration
    opened = student.open(directories[str(step.base)], template=p.template, purpose="calibration")
    config, mesh, stored_as = opened.config, make_mesh(p.mesh), np.dtype(jnp.dtype(dtype))
    with replacing(output, resume=True) as folder, jax.set_mesh(mesh):
        scratch = folder / "scratch"
        progress = Progress(scratch / "progress.jsonl")
        # The rows, the models, and each model's part in the mean of the changes.
        if domains is None:
            domains = read_domains(step, seed, opened)
            for line in notes_of_rows(step, domains):
                log(line)
        calibration = data.read(step, p, seed, opened, mesh, domains)
        models = Models({name: directories[name] for name in step.reads}, config, mesh)
        contributions = _contributions(models, calibration, p, scratch, progress)
        held_out = calibration.judged_in_batches(p.batch)
        work = Work(step, p, models, contributions, held_out, scratch / "states", progress)
        # Polishing and distilling start from what is not rounded yet.
        finishes = p.polish or p.distill
        plan = hf.tensor_plan(config, np.float32 if finishes else stored_as)
        written = scratch / "unfinished" if finishes else folder
        written.mkdir(exist_ok=True)
        losses: dict[str, list[Loss]] = {}

        def walked(label: str, chooser: Chooser, write: bool, **judge: str) -> dict[str, TensorStats]:
            """Walk over the models with the coefficients of `chooser`; returns the statistics."""
            for _ in judge:
                for batch in calibration.held_out:
                    calibration.count("held_out", batch)
            with contextlib.ExitStack() as stack:
                stack.enter_context(stage(f"{step.name}: {label}, layer by layer", log, patience=2))
                writer = stack.enter_context(SharedWriter(written, plan, shard_bytes)) if write else None
                stats, of_walk = walk(work, label, chooser, writer, plan[0][1], judge)
            losses.update(of_walk)
            return stats

        def is_better(stage_name: str) -> bool:
            reason = judge.fault(step.branches, losses[kept], losses[stage_name])
            if reason is not None:
                log(f"{stage_name}: {reason}; not kept ({kept} is)")
            return reason is None

        # The start, and what is learned. The start is written only if nothing better follows.
        start = Fixed(lambda part: [coefficients(parts.rows(config, part), p.start, "tensor") for _ in step.branches])
        stats, kept, more = walked("start", start, not p.steps, base="base", merged="start"), "start", {}
        if p.steps:
            layerwise = Layerwise(work, calibration) if step.method.name == "layerwise" else None
            with stage(f"{step.name}: learning coefficients", log, patience=2):
                learned: Chooser = layerwise or Fixed(learn(work, calibration).__getitem__)
            candidate = walked("learned", learned, True, merged="learned")
            if layerwise is not None:
                more["layer_distance"] = layerwise.errors()
            if is_better("learned"):
                stats, kept = candidate, "learned"
            else:
                walked("start again", start, True)
        if finishes:
            base = hf.load_params(directories[str(step.base)], config, mesh, dtype=np.float32)
            params = hf.load_params(written, config, mesh, dtype=np.float32)
            for stage_name, finish in (("polished", polish), ("distilled", distill)):
                if not (p.polish if finish is polish else p.distill):
                    continue
                branches = (hf.load_params(directories[name], config, mesh, dtype=np.float32) for name in step.branches)
                with stage(f"{step.name}: {stage_name}", log, patience=2):
                    finished = finish(config, base, params, branches, calibration, p)
                losses[stage_name] = held_out_losses(config, finished, calibration, p.compute_dtype)
                if is_better(stage_name):
                    params, kept = finished, stage_name
            stats = _moved(step, config, stats, base, params)
            plan = hf.tensor_plan(config, stored_as)
            _write(folder, params, config, plan, shard_bytes)
        if worse := judge.worse_than_base(step.branches, losses["base"], losses[kept]):
            log(
                f"{kept}: held-out loss is above the base's ({worse}): in these domains the merge is worse than "
                f"'{step.base}', and is written all the same"
            )
        hf.finish_directory(folder, opened.hf_config, plan, opened.directory)
        progress.close()
        shutil.rmtree(scratch)
    by_stage = {
        name: {branch: loss.mean for branch, loss in zip(step.branches, of_stage, strict=True)}
        for name, of_stage in losses.items()
    }
    results = {"held_out_loss": by_stage, "kept": kept, "tokens": calibration.tokens, **more}
    return stats, results | {"checksums": models.checksums}


def _contributions(
    models: Models, calibration: data.Calibration, p: CalibrationSettings, folder: Path, progress: Progress
) -> Contributions:
    """Return what the coefficients multiply. What takes long to compute is kept where a second walk follows."""
    contributions: Contributions = Changes()
    if p.along == "regmean":
        contributions = RegMean(models, calibration, p, folder / "states")
    elif p.along == "fisher":
        (folder / "squares").mkdir(exist_ok=True)
        contributions = Fisher(models, calibration, p, folder / "squares", progress)
    if p.along == "regmean" and p.steps:
        return Stored(contributions, models.config, folder / "contributions", models.nbytes <= KEPT_BYTES)
    return contributions


def _moved(
    step: Step, config: ModelConfig, stats: Mapping[str, TensorStats], base: Tree, params: Tree
) -> dict[str, TensorStats]:
    """Return the statistics with how far the polished tensors are from the base."""
    moved = {}
    for row in spec.table(config):
        change = jnp.square(get(params, row.path) - get(base, row.path))
        sums = np.asarray(jnp.sum(change, axis=-1), np.float64).reshape(len(row.hf_keys()), -1).sum(-1)
        for key, total in zip(row.hf_keys(), sums, strict=True):
            moved[key] = {step.name: replace(stats[key][step.name], moved=float(total))}
    return {key: moved[key] for key in stats}


def _write(folder: Path, params: Tree, config: ModelConfig, plan: Plan, shard_bytes: float) -> None:
    """Write the tensors of a plan."""
    rows = {key: (row, i if row.stacked else None) for row in spec.table(config) for i, key in enumerate(row.hf_keys())}
    with SharedWriter(folder, plan, shard_bytes) as writer:
        for key, dtype, _ in plan:
            row, layer = rows[key]
            writer.write(key, 0, np.asarray(hf.hf_tensor(get(params, row.path), layer, dtype, row.transposed)))
