"""The branch-merge run: rows, teacher, backbone, branches, mixture, merges, scores, report.

DIR/data/DOMAIN/      rows (rows.py)              DIR/branch/DOMAIN/  checkpoints, hf, metrics.jsonl
DIR/teach/DOMAIN/     the traces (traces.py)      DIR/mixture/        the same for the data mixture
DIR/backbone/         a new common start          DIR/merges/NAME/hf  every merge
DIR/scores/SPLIT/...  every sample                DIR/merged/hf       the chosen one

The stages are a list that is built once and run from top to bottom. Only this package knows the order of the phases.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bmjax.branch.settings import SAME_RESULT, Training, TrainSettings
from bmjax.branch.train import train
from bmjax.calibrate import dispatch
from bmjax.config import UserError, nearest
from bmjax.evaluate.run import evaluate
from bmjax.evaluate.settings import EvalSettings, TaskSettings
from bmjax.io.atomic import held, replacing, write_atomic
from bmjax.io.rows import read_rows
from bmjax.log import Log, write_line
from bmjax.merge.recipe.recipe import Recipe, read_recipe
from bmjax.pipeline import student, traces
from bmjax.pipeline.results import Model, build_report, choose
from bmjax.pipeline.rows import DomainRows, measures
from bmjax.pipeline.settings import RunSettings, as_list
from bmjax.pipeline.stages import Stage, Stages, file_states
from bmjax.report.columns import summary_table
from bmjax.report.page import write_report

UNFINISHED = 75  # the exit code after SIGTERM: a training was saved, and stages are left to do


def run(
    settings: RunSettings,
    output: str | Path | None = None,
    log: Log = write_line,
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run, or continue, an experiment.

    Arguments:
        settings: the keys of `bmjax run`.
        output: the run's directory; default: the settings'.
        log: gets a line for every stage and remark.
        prepare: writes files that the settings name, once no other run can write in the directory.

    Returns:
        The content of report.json.

    Raises:
        UserError: for what its user can mend; as much as can be known is told before the first stage.
    """
    chosen = output or settings.output
    if chosen is None:
        raise UserError("output: no directory given; pass --output DIR or set output in the config")
    directory = Path(chosen)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file, expected a directory for the run")
    with held(directory / ".lock", "another run is writing here"):
        if prepare is not None:
            prepare()
        stages = Stages(directory, log)
        experiment = Experiment(settings, directory, log)
        for stage in experiment.stages():
            stages.run(stage)
        report = build_report(experiment.models, settings, directory, experiment.winner(), stages.measured)
        write_report(directory, report)
        write_atomic(directory / "report.json", json.dumps(report, indent=1))
    log(summary_table(report))
    log(f"report: {directory / 'report.html'}   merged model: {directory / 'merged' / 'hf'}")
    return report


class Experiment:
    """The models of a run and the stages that make and score them."""

    def __init__(self, settings: RunSettings, directory: Path, log: Log) -> None:
        self.settings, self.directory, self.log = settings, directory, log
        self.rows = {name: DomainRows(name, settings, directory / "data" / name, log) for name in settings.domains}
        self.backbone = self._trained("backbone")
        if settings.student is not None:
            self.backbone = Model("backbone", settings.student, None, None)
        self.branches = {domain: self._trained(f"branch/{domain}") for domain in settings.domains}
        self.mixture = self._trained("mixture")
        self.merges = {
            name: Model(f"merge/{name}", str(directory / "merges" / name / "hf"), f"merge/{name}", None)
            for name in settings.merges
        }
        self.candidates = [self.backbone, *self.merges.values()]
        self.models = [self.backbone, *self.branches.values(), *self.merges.values(), self.mixture]
        student.check_trainings(settings)
        self.recipes = {name: self._recipe(name) for name in settings.merges}

    def _trained(self, name: str) -> Model:
        return Model(name, str(self.directory / name / "hf"), name, f"{name}/metrics.jsonl")

    def _recipe(self, name: str) -> Recipe:
        """Return a merge's recipe with its sources and, where it looks at data, with rows, seed and template."""
        settings, keys = self.settings, self.settings.merges[name]
        sources = {"backbone": self.backbone.hf} | {domain: model.hf for domain, model in self.branches.items()}
        if "sources" in keys:
            raise UserError(f"merges.{name}: sources are given by the run (backbone and the domains); remove the key")
        try:
            data = {domain: str(rows.file("train")) for domain, rows in self.rows.items()}
            recipe = read_recipe(keys | {"sources": sources}, data=data)
        except UserError as error:
            raise UserError(f"merges.{name}: {str(error).removeprefix('recipe: ')}") from None
        for model in recipe.inputs:
            if model not in sources:
                raise UserError(f"merges.{name}: no model is named '{model}'{nearest(model, list(sources))}")
        if not recipe.is_calibrated:
            return recipe
        steps = list(recipe.steps)
        for i, step in enumerate(steps):
            if step.calibration is not None and "template" not in step.calibration.model_fields_set:
                calibration = step.calibration.model_copy(update={"template": settings.template})
                steps[i] = replace(step, calibration=calibration)
        return replace(recipe, steps=tuple(steps), seed=recipe.seed + settings.seed)

    def stages(self) -> list[Stage]:
        """Return all stages in the order in which they are run."""
        settings, domains = self.settings, self.settings.domains
        return [
            *(self._data(rows) for rows in self.rows.values()),
            *(self._teach(rows) for rows in self.rows.values() if rows.domain.train is None),
            *(self._new_backbone(training) for training in [settings.backbone] if training is not None),
            *(self._train(self.branches[name], [name], partial(settings.branch_training, name)) for name in domains),
            self._train(self.mixture, domains, self._mixture_training),
            *(self._merge(name) for name in self.merges),
            *(self._score(model, "validation") for model in self.candidates),
            self._merged(),
            *(self._score(model, "test") for model in self.models),
        ]

    # Rows

    def _data(self, rows: DomainRows) -> Stage:
        domain, name = rows.domain, f"data/{rows.name}"
        sources = (domain.problems, domain.train, domain.test, domain.validation, domain.backbone)

        def inputs() -> list[Any]:
            keys = domain.model_dump(exclude={"branch", "judge", "traces"})
            return [keys, *(file_states(as_list(source.data)) for source in sources if source is not None)]

        return Stage(name, inputs, (), rows.outputs(name), rows.write_sources)

    def _teach(self, rows: DomainRows) -> Stage:
        settings, domain, name = self.settings, rows.domain, f"teach/{rows.name}"

        def inputs() -> list[Any]:
            asked = [] if domain.problems is None else [traces.asking(settings.teacher), settings.teacher.samples]
            files = file_states(as_list(domain.traces or []))
            return [asked, domain.judge, settings.select.model_dump(), settings.run_programs, files]

        outputs = [f"{name}/{file}" for file in ("asked.jsonl", "held_out.jsonl", "selected", "counts.json")]
        work = partial(traces.teach, rows, self.directory / name)
        return Stage(name, inputs, (f"data/{rows.name}",), (*outputs, *rows.outputs(name)), work)

    # Trainings

    def _train(self, model: Model, domains: Iterable[str], training: Callable[[], Training]) -> Stage:
        """Return the stage of a training from the backbone; `training` is called when its turn comes."""
        parts, name = [self.rows[domain] for domain in domains], model.name
        files = [rows.file("train") for rows in parts]

        def settings() -> TrainSettings:
            return self._train_settings(training(), self.backbone.hf, files, name)

        after = (*self.backbone.made_by, *(rows.stage("train") for rows in parts))
        return Stage(
            name, lambda: [_deciding(settings()), *self._external()], after, (name,),
            lambda: train(settings(), self.log),
        )  # fmt: skip

    def _mixture_training(self) -> Training:
        return self.settings.mixture_training(sum(model.result()["steps"] for model in self.branches.values()))

    def _new_backbone(self, keys: Training) -> Stage:
        settings, start = self.settings, self.directory / "init" / "hf"
        parts = self.rows.values()
        training = self._train_settings(keys, str(start), [rows.file("backbone") for rows in parts], "backbone")
        assert settings.model is not None  # the settings hold a model where they hold a backbone
        shape = settings.model

        def work() -> None:
            if not (start / "config.json").exists():
                student.create(shape, start, settings.seed, settings.template)
            train(training, self.log)

        inputs = [shape.model_dump(), *self._external(), settings.seed, _deciding(training)]
        after = tuple(rows.stage("backbone") for rows in parts)
        return Stage("backbone", lambda: inputs, after, ("init", "backbone"), work)

    def _train_settings(self, training: Training, start: str, files: list[Path], name: str) -> TrainSettings:
        changes = {
            "student": start, "data": [str(file) for file in files], "output": str(self.directory / name),
            "num_processes": 1, "stop_code": UNFINISHED, "seed": training.seed + self.settings.seed,
            "template": training.template or self.settings.template,
        }  # fmt: skip
        return TrainSettings.model_validate(training.model_dump() | changes)

    def _external(self) -> list[Any]:
        """What the models depend on from outside: names and states of student, tokenizer and template."""
        settings = self.settings
        names = (settings.student, settings.model.tokenizer if settings.model else None, settings.template)
        return file_states(name for name in names if name is not None)

    # Merges and scores

    def _merge(self, name: str) -> Stage:
        recipe, output = self.recipes[name], Path(self.merges[name].hf)
        log = self.log if recipe.is_calibrated else None
        after = (*(model.name for model in self.branches.values()), *self.backbone.made_by)
        inputs = [self.settings.merges[name], *self._external()]
        work = partial(dispatch.merge, recipe, output, overwrite=True, log=log)
        return Stage(f"merge/{name}", lambda: inputs, after, (f"merges/{name}",), work)

    def _score(self, model: Model, split: str) -> Stage:
        settings = self.settings

        def work() -> None:
            tasks = {}
            for domain, rows in self.rows.items():
                file = rows.file(split)
                location, first = next(read_rows(file))
                questions, texts = (str(file) if measured else None for measured in measures(first, location))
                tasks[domain] = TaskSettings(questions=questions, traces=texts, judge=rows.domain.judge)
            evaluation = EvalSettings(
                model=model.hf, tasks=tasks, output=str(self.directory / model.scores(split)), seed=settings.seed,
                template=settings.template, run_programs=settings.run_programs, **settings.evaluate.model_dump(),
            )  # fmt: skip
            evaluate(evaluation, self.log)

        judging = [settings.run_programs, [domain.judge for domain in settings.domains.values()]]
        inputs = [settings.evaluate.model_dump(exclude={"mesh", "batch"}), *self._external(), settings.seed, judging]
        after = (*model.made_by, *(rows.stage(split) for rows in self.rows.values()))
        return Stage(f"evaluate/{split}/{model.name}", lambda: inputs, after, (model.scores(split),), work)

    def winner(self) -> Model:
        """Return the merge that the validation rows choose; their scores must be there."""
        scores = {model.name: model.read_scores(self.directory, "validation") for model in self.candidates}
        return self.merges[choose(scores, self.settings.choose.by).removeprefix("merge/")]

    def _merged(self) -> Stage:
        def work() -> None:
            with replacing(self.directory / "merged" / "hf") as temporary:
                for file in Path(self.winner().hf).iterdir():
                    try:
                        os.link(file, temporary / file.name)  # the same bytes under two names
                    except OSError:
                        shutil.copyfile(file, temporary / file.name)

        after = tuple(f"evaluate/validation/{model.name}" for model in self.candidates)
        return Stage("merged", lambda: self.settings.choose.model_dump(), after, ("merged",), work)


def _deciding(training: TrainSettings) -> dict[str, Any]:
    """What a training's result depends on, its inputs left out."""
    return training.model_dump(include=training.keys_without(SAME_RESULT))
