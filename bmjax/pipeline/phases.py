"""The branch-merge run: backbone, teacher, selection, branches, merges, mixture, scores, report.

DIR/data/DOMAIN/      rows (data.py)              DIR/branch/DOMAIN/  checkpoints, hf, metrics.jsonl
DIR/teach/DOMAIN/     the teacher's traces        DIR/mixture/        the same for the data mixture
DIR/backbone/         the common start            DIR/merges/NAME/hf  every merge
DIR/scores/SPLIT/...  every sample                DIR/merged/hf       the chosen one
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bmjax.branch import fingerprint as identity
from bmjax.branch.settings import Training, TrainSettings
from bmjax.branch.train import check, train
from bmjax.calibrate import dispatch
from bmjax.config import UserError, nearest
from bmjax.evaluate.run import evaluate
from bmjax.evaluate.settings import EvalSettings, TaskSettings
from bmjax.io import hub
from bmjax.io.atomic import held, replacing, write_atomic
from bmjax.io.jsonl import write_jsonl
from bmjax.io.rows import read_rows
from bmjax.log import Log, write_line
from bmjax.merge.engine import files as engine
from bmjax.merge.recipe.recipe import Recipe, read_recipe
from bmjax.model.config import ModelConfig
from bmjax.pipeline import data, student
from bmjax.pipeline.choose import RULE, choose
from bmjax.pipeline.settings import RunSettings
from bmjax.pipeline.stages import Stages
from bmjax.report import summary_table, write_report
from bmjax.teach.collect import collect, wanted_ids
from bmjax.teach.select import select
from bmjax.teach.settings import CollectSettings, SelectSettings
from bmjax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
UNFINISHED = 75  # the exit code after SIGTERM: a training was saved, and stages are left to do


def run(settings: RunSettings, output: str | Path | None = None, log: Log = write_line) -> dict[str, Any]:
    """Run, or continue, the experiment in `output` (default: the config's); returns report.json's content."""
    chosen = output or settings.output
    if chosen is None:
        raise UserError("output: no directory given; pass --output DIR or set output in the config")
    directory = Path(chosen)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file, expected a directory for the run")
    with held(directory / ".lock", "another run is writing here"):
        return _Run(settings, directory, log).everything()


class _Run:
    """One run: its settings, its directory, its stages."""

    def __init__(self, settings: RunSettings, directory: Path, log: Log) -> None:
        self.settings, self.directory, self.log = settings, directory, log
        self.domains = list(settings.domains)
        self.stages = Stages(directory, log)
        self._check_trainings()
        for name in settings.merges:
            self._check_recipe(name)  # a bad recipe is told now, not after the training

    def everything(self) -> dict[str, Any]:
        for domain in self.domains:
            self._data(domain)
        self._backbone()
        for domain in self.domains:
            self._teach(domain)
        for domain in self.domains:
            self._branch(domain)
        self._mixture()
        for name in self.settings.merges:
            self._merge(name)
        validation = {name: self._scores(name, "validation") for name in ["backbone", *self._merge_names()]}
        winner = choose(validation, self.settings.choose.by)
        self._merged(winner)
        models = ["backbone", *(f"branch/{d}" for d in self.domains), *self._merge_names(), "mixture"]
        scores = {name: self._scores(name, "test") for name in models}
        report = self._report(scores, winner, validation)
        write_report(self.directory, report)
        write_atomic(self.directory / "report.json", json.dumps(report, indent=1))
        self.log(summary_table(report))
        self.log(f"report: {self.directory / 'report.html'}   merged model: {self.directory / 'merged' / 'hf'}")
        return report

    # Where things are

    def _merge_names(self) -> list[str]:
        return [f"merge/{name}" for name in self.settings.merges]

    def _relative(self, model: str) -> str:
        """A model's directory under the run's: what report.json calls it is where it lies."""
        if model == "backbone" and self.settings.student is not None:
            return "."
        return model.replace("merge/", "merges/")

    def _hf(self, model: str) -> str:
        if model == "backbone" and self.settings.student is not None:
            return self.settings.student
        return str(self.directory / self._relative(model) / "hf")

    def _rows(self, domain: str, name: str) -> Path:
        return self.directory / "data" / domain / f"{name}.jsonl"

    # The stages, in order

    def _data(self, domain: str) -> None:
        own = self.settings.domains[domain]
        folder = self.directory / "data" / domain
        kept = own.model_dump(exclude={"branch"})
        inputs = [kept, self.settings.seed, _file_states(own)]

        def work() -> None:
            if own.builtin is not None:
                data.write_builtin(own.builtin, folder, self.settings.seed)
            else:
                data.write_sources(own, domain, folder)

        names = ["backbone", "validation", "test", "problems" if own.builtin is not None else "train"]
        self.stages.run(f"data/{domain}", inputs, [], [f"data/{domain}/{name}.jsonl" for name in names], work)

    def _backbone(self) -> None:
        settings = self.settings
        after = [f"data/{domain}" for domain in self.domains]
        if settings.student is not None or settings.backbone is None:
            return
        files = [self._rows(domain, "backbone") for domain in self.domains]
        training = self._training(settings.backbone, "init/hf", files, "backbone")
        inputs = [settings.model.model_dump(), *self._given(), settings.seed, _important(training)]

        def work() -> None:
            start = self.directory / "init" / "hf"
            if not (start / "config.json").exists():
                student.create(settings.model, files, start, settings.seed, settings.template)
            train(training, self.log)

        self.stages.run("backbone", inputs, after, ["init", "backbone"], work)

    def _given(self) -> list[Any]:
        """What comes from outside: student, tokenizer and template, and the state of their files."""
        settings = self.settings
        names = [settings.student, settings.model.tokenizer, settings.template]
        return [[name, *_state(Path(name))] for name in names if name is not None]

    def _training(self, training: Training, start: str, files: list[Path], output: str) -> TrainSettings:
        base = (
            self.settings.student if start == "backbone/hf" and self.settings.student else str(self.directory / start)
        )
        own: dict[str, Any] = {
            "student": base,
            "data": [str(file) for file in files],
            "output": str(self.directory / output),
        }
        own |= {"num_processes": 1, "stop_code": UNFINISHED}
        values = training.model_dump() | own
        return TrainSettings.model_validate(
            values
            | {"seed": training.seed + self.settings.seed, "template": training.template or self.settings.template}
        )

    def _teach(self, domain: str) -> None:
        own = self.settings.domains[domain].builtin
        if own is None:
            return
        folder, train_rows = self.directory / "teach" / domain, self._rows(domain, "train")
        teacher = self.settings.teacher
        if teacher.base_url is None:
            teacher = teacher.model_copy(update={"builtin": True})
        # Answers may have cost money: they stay, whatever changes, beside those of another way of asking.
        asking = teacher.model_dump(exclude={"concurrency", "retries", "timeout", "api_key_env"})
        kind = {key: value for key, value in asking.items() if key != "samples"}  # more samples of it lie beside
        way = hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:8]
        answers = folder / f"answers-{way}"
        collecting = CollectSettings.model_validate(
            {"problems": str(self._rows(domain, "problems")), "output": str(answers), "domain": domain,
             "prompt": "{prompt}", "reference": "{reference}", "teacher": teacher.model_dump()}
        )  # fmt: skip
        held_out = [str(self._rows(domain, split)) for split in ("validation", "test")]
        asked = folder / "asked.jsonl"
        selecting = SelectSettings(traces=str(asked), output=str(folder / "selected"), held_out=held_out)

        def work() -> None:
            failed = collect(collecting, self.log)["failed"]
            if failed:
                raise UserError(
                    f"teach/{domain}: {failed} requests failed, see {answers / 'failures.jsonl'}; what was answered is "
                    "kept, the same command asks for the rest"
                )
            wanted = wanted_ids(collecting)
            write_jsonl(asked, (row for _, row in read_rows(answers / "traces.jsonl") if row["id"] in wanted))
            kept = select(selecting, self.log)[domain]
            write_atomic(train_rows, (folder / "selected" / f"{domain}.jsonl").read_bytes())
            dropped = {reason: n for reason, n in kept.items() if reason != "kept" and n}
            counts = {"collected": sum(kept.values()), "kept": kept["kept"], "dropped": dropped}
            write_atomic(folder / "counts.json", json.dumps(counts))

        inputs = [asking, domain]
        outputs = [f"teach/{domain}/{name}" for name in ("asked.jsonl", "selected", "counts.json")]
        outputs.append(f"data/{domain}/train.jsonl")
        self.stages.run(f"teach/{domain}", inputs, [f"data/{domain}"], outputs, work)

    def _after_rows(self) -> list[str]:
        names = [f"teach/{d}" if self.settings.domains[d].builtin is not None else f"data/{d}" for d in self.domains]
        return names if self.settings.student is not None else ["backbone", *names]

    def _branch(self, domain: str) -> None:
        files, output = [self._rows(domain, "train")], f"branch/{domain}"
        training = self._training(self.settings.branch_training(domain), "backbone/hf", files, output)
        rows = f"teach/{domain}" if self.settings.domains[domain].builtin is not None else f"data/{domain}"
        after = [rows] if self.settings.student is not None else ["backbone", rows]
        self.stages.run(
            output, [_important(training), *self._given()], after, [output], lambda: train(training, self.log)
        )

    def _mixture(self) -> None:
        steps = sum(self._summary(f"branch/{domain}")["steps"] for domain in self.domains)
        files = [self._rows(domain, "train") for domain in self.domains]
        training = self._training(self.settings.mixture_training(steps), "backbone/hf", files, "mixture")
        inputs = [_important(training), *self._given()]
        self.stages.run("mixture", inputs, self._after_rows(), ["mixture"], lambda: train(training, self.log))

    def _with_sources(self, recipe: dict[str, Any], name: str) -> dict[str, Any]:
        if "sources" in recipe:
            raise UserError(f"merges.{name}: sources are given by the run (backbone and the domains); remove the key")
        sources = {"backbone": self._hf("backbone")} | {d: self._hf(f"branch/{d}") for d in self.domains}
        return recipe | {"sources": sources}

    def _check_trainings(self) -> None:
        """Everything wrong with a training that can be known before the first one starts."""
        settings = self.settings
        if settings.student is not None:
            config = ModelConfig.from_dir(hub.model_directory(settings.student))
        else:
            config = ModelConfig.from_hf(student.shape_of(settings.model, settings.model.vocab_size), "model")
        trainings = {f"domains.{d}.branch" if settings.domains[d].branch else "branch": settings.branch_training(d)
                     for d in self.domains}  # fmt: skip
        if settings.backbone is not None:
            trainings["backbone"] = settings.backbone
        for key, training in (trainings | {"mixture": settings.mixture_training(1)}).items():
            try:
                check(training, config)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None

    def _check_recipe(self, name: str) -> None:
        known = ["backbone", *self.domains]
        try:
            inputs = self._recipe(name).inputs
        except UserError as error:
            message = str(error).removeprefix("recipe: ")
            raise UserError(message if message.startswith("merges.") else f"merges.{name}: {message}") from None
        for model in inputs:
            if model not in known:
                raise UserError(f"merges.{name}: no model is named '{model}'{nearest(model, known)}")

    def _recipe(self, name: str) -> Recipe:
        """Return a merge's recipe over the run's models. Steps that look at data have each domain's training rows where
        they name none, and the run's seed and template."""
        data = {domain: str(self._rows(domain, "train")) for domain in self.domains}
        recipe = read_recipe(self._with_sources(self.settings.merges[name], name), data=data)
        if not recipe.is_calibrated:
            return recipe
        template = {"template": self.settings.template}
        steps = tuple(
            dataclasses.replace(step, calibration=step.calibration.model_copy(update=template))
            if step.calibration is not None and "template" not in step.calibration.model_fields_set
            else step
            for step in recipe.steps
        )
        return dataclasses.replace(recipe, steps=steps, seed=recipe.seed + self.settings.seed)

    def _merge(self, name: str) -> None:
        recipe = self._recipe(name)
        after = [f"branch/{domain}" for domain in self.domains]
        if self.settings.student is None:
            after.append("backbone")

        def work() -> None:
            output = self.directory / "merges" / name / "hf"
            dispatch.merge(recipe, output, overwrite=True, log=self.log if recipe.is_calibrated else None)

        self.stages.run(f"merge/{name}", [self.settings.merges[name], *self._given()], after, [f"merges/{name}"], work)

    def _stage_of(self, model: str) -> list[str]:
        return [] if model == "backbone" and self.settings.student is not None else [model]

    def _scores(self, model: str, split: str) -> dict[str, Any]:
        settings = self.settings
        tasks = {}
        for domain in self.domains:
            file = str(self._rows(domain, split))
            own = settings.domains[domain].builtin
            tasks[domain] = TaskSettings(questions=file if own else None, traces=file, kind=own.domain if own else None)
        output = f"scores/{split}/{model.replace('/', '-')}"
        evaluation = EvalSettings(
            model=self._hf(model), tasks=tasks, output=str(self.directory / output), template=settings.template,
            seed=settings.seed, **settings.evaluate.model_dump(),
        )  # fmt: skip
        after = [*self._stage_of(model), *(f"data/{domain}" for domain in self.domains)]
        scoring = settings.evaluate.model_dump(exclude={"mesh", "batch"})
        inputs = [scoring, *self._given(), settings.seed]
        self.stages.run(f"evaluate/{split}/{model}", inputs, after, [output], lambda: evaluate(evaluation, self.log))
        return json.loads((self.directory / output / "scores.json").read_text())

    def _merged(self, winner: str) -> None:
        def work() -> None:
            with replacing(self.directory / "merged" / "hf") as temporary:
                for file in Path(self._hf(winner)).iterdir():
                    try:
                        os.link(file, temporary / file.name)  # the same bytes under two names
                    except OSError:
                        shutil.copyfile(file, temporary / file.name)

        self.stages.run("merged", winner, [winner], ["merged"], work)

    # The report

    def _summary(self, model: str) -> dict[str, Any]:
        return json.loads((self.directory / model / "result.json").read_text())

    def _report(self, scores: dict[str, Any], winner: str, validation: dict[str, Any]) -> dict[str, Any]:
        trained = [*(f"branch/{d}" for d in self.domains), "mixture"]
        tokens = {model: self._summary(model)["tokens"] for model in trained}
        together = sum(tokens[f"branch/{d}"] for d in self.domains)
        models: dict[str, Any] = {}
        for name, score in scores.items():
            if name == "mixture":
                models["merged"] = models[winner]
            is_merge = name.startswith("merge/")
            own = name in trained or (name == "backbone" and self.settings.student is None)
            models[name] = {
                "hf": os.path.relpath(hub.model_directory(self._hf(name)), self.directory),
                "metrics": f"{self._relative(name)}/metrics.jsonl" if own else None,
                "merge_report": f"{self._relative(name)}/hf/{engine.REPORT}" if is_merge else None,
                "tokens": tokens.get(name, together + self._calibration_tokens(name) if is_merge else 0),
                "move": self._summary(name)["move"] if name in trained else None,
                "scores": score,
            }
        models["merged"] = models[winner] | {"hf": "merged/hf", "merge_report": f"merged/hf/{engine.REPORT}"}
        selection = {d: self._selection(d) for d in self.domains if self.settings.domains[d].builtin is not None}
        return {
            "models": models,
            "chosen": {
                "merge": winner.removeprefix("merge/"),
                "rule": RULE.format(by=self.settings.choose.by),
                "validation": {name.removeprefix("merge/"): score for name, score in validation.items()},
            },
            "selection": selection,
            "stages": self.stages.measured,
            "versions": {"bmjax": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
            "config": self.settings.model_dump(mode="json"),
        }

    def _calibration_tokens(self, model: str) -> int:
        """The tokens that a merge read beside the branches' training."""
        report = json.loads((self.directory / self._relative(model) / "hf" / engine.REPORT).read_text())
        return sum(report.get("tokens", {}).values())

    def _selection(self, domain: str) -> dict[str, Any]:
        return json.loads((self.directory / "teach" / domain / "counts.json").read_text())


def _important(training: TrainSettings) -> dict[str, Any]:
    """What a training's result depends on, its inputs left out."""
    return training.model_dump(exclude=identity.NO_RESULT)


def _file_states(domain: Any) -> list[Any]:
    """Size and time of the files a domain reads: a changed file redoes what depends on it."""
    states: list[Any] = []
    for source in (domain.train, domain.test):
        for name in [] if source is None else [source.files] if isinstance(source.files, str) else source.files:
            states.append([name, *_state(Path(name))])
    return states


def _state(path: Path) -> list[Any]:
    """Size and time of a file, or of the files in a directory; nothing of a name that is neither (a hub id)."""
    if path.is_dir():
        return [[file.name, *_state(file)] for file in sorted(path.iterdir()) if file.is_file()]
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
