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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.branch.settings import SAME_RESULT, Training, TrainSettings
from bmjax.branch.train import train
from bmjax.calibrate import dispatch
from bmjax.config import UserError
from bmjax.evaluate.run import evaluate
from bmjax.evaluate.settings import EvalSettings, TaskSettings
from bmjax.io.atomic import held, replacing, write_atomic
from bmjax.io.rows import read_rows
from bmjax.log import Log, write_line
from bmjax.pipeline import checks, student, traces
from bmjax.pipeline.choose_merge import choose
from bmjax.pipeline.results import Model, build_report
from bmjax.pipeline.rows import HELD_OUT, DomainRows, measures
from bmjax.pipeline.settings import RunSettings, SourceSettings
from bmjax.pipeline.stages import Stage, Stages
from bmjax.report import summary_table, write_report

UNFINISHED = 75  # the exit code after SIGTERM: a training was saved, and stages are left to do


def run(settings: RunSettings, output: str | Path | None = None, log: Log = write_line) -> dict[str, Any]:
    """Run, or continue, an experiment.

    Arguments:
        settings: the keys of `bmjax run`.
        output: the run's directory; default: the settings'.
        log: gets a line for every stage and remark.

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


@dataclass(frozen=True)
class Rows:
    """A file of a domain's rows and the stage that writes it."""

    file: Path
    stage: str


class Experiment:
    """The models of a run and the stages that make and score them."""

    def __init__(self, settings: RunSettings, directory: Path, log: Log) -> None:
        self.settings, self.directory, self.log = settings, directory, log
        if settings.student is not None:
            self.backbone = Model("backbone", settings.student, None, None)
        else:
            self.backbone = Model("backbone", str(directory / "backbone/hf"), "backbone", "backbone/metrics.jsonl")
        self.branches = {domain: self._trained(f"branch/{domain}") for domain in settings.domains}
        self.mixture = self._trained("mixture")
        self.merges = {
            name: Model(f"merge/{name}", str(directory / "merges" / name / "hf"), f"merge/{name}", None)
            for name in settings.merges
        }
        self.models = [self.backbone, *self.branches.values(), *self.merges.values(), self.mixture]
        sources = {"backbone": self.backbone.hf} | {domain: model.hf for domain, model in self.branches.items()}
        data = {domain: str(self.rows(domain, "train").file) for domain in settings.domains}
        checks.check_trainings(settings)
        self.recipes = {name: checks.recipe_of(settings, name, sources, data) for name in settings.merges}

    def _trained(self, name: str) -> Model:
        return Model(name, str(self.directory / name / "hf"), name, f"{name}/metrics.jsonl")

    def stages(self) -> list[Stage]:
        """Return all stages in the order in which they are run."""
        domains = self.settings.domains
        candidates = [self.backbone, *self.merges.values()]
        return [
            *(self._data(domain) for domain in domains),
            *(self._teach(domain) for domain in domains if domains[domain].train is None),
            *(self._new_backbone(training) for training in [self.settings.backbone] if training is not None),
            *(self._branch(domain) for domain in domains),
            self._mixture(),
            *(self._merge(name) for name in self.merges),
            *(self._score(model, "validation") for model in candidates),
            self._merged(candidates),
            *(self._score(model, "test") for model in self.models),
        ]

    def rows(self, name: str, split: str) -> Rows:
        """Return a domain's file for train, backbone, validation or test."""
        domain = self.settings.domains[name]
        if split == "backbone" and domain.backbone is None and domain.backbone_rows is None:
            split = "train"
        from_source = getattr(domain, split, None) is not None or (split in HELD_OUT and domain.traces is None)
        from_source |= domain.train is not None
        file = self.directory / "data" / name / f"{split}.jsonl"
        return Rows(file, f"data/{name}" if from_source else f"teach/{name}")

    def _files_of(self, stage: str, name: str) -> tuple[str, ...]:
        """The row files that a stage writes, relative to the run's directory."""
        rows = [self.rows(name, split) for split in ("train", *HELD_OUT)]
        if self.backbone.stage is not None:
            rows.append(self.rows(name, "backbone"))
        files = {str(row.file.relative_to(self.directory)) for row in rows if row.stage == stage}
        if stage == f"data/{name}" and self.settings.domains[name].problems is not None:
            files.add(f"data/{name}/problems.jsonl")
        return tuple(sorted(files))

    def _domain_rows(self, name: str) -> DomainRows:
        return DomainRows(name, self.settings, self.directory / "data" / name, self.log)

    # Rows

    def _data(self, name: str) -> Stage:
        domain = self.settings.domains[name]

        def inputs() -> list[Any]:
            sources = (domain.problems, domain.train, domain.test, domain.validation, domain.backbone)
            return [
                domain.model_dump(exclude={"branch", "judge", "traces"}),
                *map(_source_state, filter(None, sources)),
            ]

        work = self._domain_rows(name).write_sources
        return Stage(f"data/{name}", inputs, (), self._files_of(f"data/{name}", name), work)

    def _teach(self, name: str) -> Stage:
        settings, domain = self.settings, self.settings.domains[name]
        folder = f"teach/{name}"

        def inputs() -> list[Any]:
            files = [] if domain.traces is None else _as_list(domain.traces)
            asked = [] if domain.problems is None else [traces.asking(settings.teacher), settings.teacher.samples]
            return [
                asked,
                domain.judge,
                settings.select.model_dump(),
                settings.run_programs,
                [[file, *_state(Path(file))] for file in files],
            ]

        outputs = [f"{folder}/{file}" for file in ("asked.jsonl", "held_out.jsonl", "selected", "counts.json")]
        return Stage(
            folder, inputs, (f"data/{name}",), (*outputs, *self._files_of(folder, name)),
            lambda: traces.teach(self._domain_rows(name), self.directory / folder),
        )  # fmt: skip

    # Trainings

    def _training(self, training: Training, start: str, rows: list[Rows], output: str) -> TrainSettings:
        changes = {
            "student": start, "data": [str(part.file) for part in rows], "output": str(self.directory / output),
            "num_processes": 1, "stop_code": UNFINISHED, "seed": training.seed + self.settings.seed,
            "template": training.template or self.settings.template,
        }  # fmt: skip
        return TrainSettings.model_validate(training.model_dump() | changes)

    def _external(self) -> list[Any]:
        """What the models depend on from outside: names and states of student, tokenizer and template."""
        settings = self.settings
        names = [settings.student, settings.model.tokenizer if settings.model else None, settings.template]
        return [[name, *_state(Path(name))] for name in names if name is not None]

    def _new_backbone(self, keys: Training) -> Stage:
        settings, start = self.settings, self.directory / "init" / "hf"
        rows = [self.rows(domain, "backbone") for domain in settings.domains]
        training = self._training(keys, str(start), rows, "backbone")
        assert settings.model is not None  # the settings hold a model where they hold a backbone
        shape = settings.model

        def work() -> None:
            if not (start / "config.json").exists():
                student.create(shape, start, settings.seed, settings.template)
            train(training, self.log)

        inputs = [shape.model_dump(), *self._external(), settings.seed, _deciding(training)]
        return Stage("backbone", lambda: inputs, tuple(part.stage for part in rows), ("init", "backbone"), work)

    def _branch(self, domain: str) -> Stage:
        name, rows = self.branches[domain].name, self.rows(domain, "train")
        training = self._training(self.settings.branch_training(domain), self.backbone.hf, [rows], name)
        return Stage(
            name, lambda: [_deciding(training), *self._external()], (*self.backbone.made_by, rows.stage), (name,),
            lambda: train(training, self.log),
        )  # fmt: skip

    def _mixture(self) -> Stage:
        name, rows = self.mixture.name, [self.rows(domain, "train") for domain in self.settings.domains]

        def training() -> TrainSettings:
            results = [
                json.loads((Path(model.hf).parent / "result.json").read_text()) for model in self.branches.values()
            ]
            keys = self.settings.mixture_training(sum(result["steps"] for result in results))
            return self._training(keys, self.backbone.hf, rows, name)

        return Stage(
            name, lambda: [_deciding(training()), *self._external()],
            (*self.backbone.made_by, *(part.stage for part in rows)), (name,), lambda: train(training(), self.log),
        )  # fmt: skip

    # Merges and scores

    def _merge(self, name: str) -> Stage:
        recipe, output = self.recipes[name], Path(self.merges[name].hf)

        def work() -> None:
            dispatch.merge(recipe, output, overwrite=True, log=self.log if recipe.is_calibrated else None)

        after = (*(model.name for model in self.branches.values()), *self.backbone.made_by)
        inputs = [self.settings.merges[name], *self._external()]
        return Stage(f"merge/{name}", lambda: inputs, after, (f"merges/{name}",), work)

    def _score(self, model: Model, split: str) -> Stage:
        settings = self.settings
        rows = {domain: self.rows(domain, split) for domain in settings.domains}

        def work() -> None:
            tasks = {}
            for domain, part in rows.items():
                location, first = next(read_rows(part.file))
                questions, texts = (str(part.file) if kind else None for kind in measures(first, location))
                tasks[domain] = TaskSettings(questions=questions, traces=texts, judge=settings.domains[domain].judge)
            evaluation = EvalSettings(
                model=model.hf, tasks=tasks, output=str(self.directory / model.scores(split)), seed=settings.seed,
                template=settings.template, run_programs=settings.run_programs, **settings.evaluate.model_dump(),
            )  # fmt: skip
            evaluate(evaluation, self.log)

        judging = [settings.run_programs, [domain.judge for domain in settings.domains.values()]]
        inputs = [settings.evaluate.model_dump(exclude={"mesh", "batch"}), *self._external(), settings.seed, judging]
        after = (*model.made_by, *(part.stage for part in rows.values()))
        return Stage(f"evaluate/{split}/{model.name}", lambda: inputs, after, (model.scores(split),), work)

    def winner(self) -> Model:
        """Return the merge that the validation rows choose; their scores must be there."""
        candidates = {model.name: model for model in (self.backbone, *self.merges.values())}
        scores = {name: model.read_scores(self.directory, "validation") for name, model in candidates.items()}
        return candidates[choose(scores, self.settings.choose.by)]

    def _merged(self, candidates: list[Model]) -> Stage:
        def work() -> None:
            with replacing(self.directory / "merged" / "hf") as temporary:
                for file in Path(self.winner().hf).iterdir():
                    try:
                        os.link(file, temporary / file.name)  # the same bytes under two names
                    except OSError:
                        shutil.copyfile(file, temporary / file.name)

        after = tuple(f"evaluate/validation/{model.name}" for model in candidates)
        return Stage("merged", lambda: self.settings.choose.model_dump(), after, ("merged",), work)


def _deciding(training: TrainSettings) -> dict[str, Any]:
    """What a training's result depends on, its inputs left out."""
    return training.model_dump(include=training.keys_without(SAME_RESULT))


def _source_state(source: SourceSettings) -> list[Any]:
    """Size and time of the files of a source: a changed file redoes what depends on it."""
    return [[name, *_state(Path(name))] for name in _as_list(source.data)]


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _state(path: Path) -> list[Any]:
    """Size and time of a file, or of the files in a directory; nothing of a name that is neither (a hub id)."""
    if path.is_dir():
        return [[file.name, *_state(file)] for file in sorted(path.iterdir()) if file.is_file()]
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
