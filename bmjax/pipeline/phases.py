"""The branch-merge run: rows, teacher, backbone, branches, mixture, merges, scores, report.

DIR/data/DOMAIN/      rows (rows.py)              DIR/branch/DOMAIN/  checkpoints, hf, metrics.jsonl
DIR/teach/DOMAIN/     the traces (traces.py)      DIR/mixture/        the same for the data mixture
DIR/backbone/         a new common start          DIR/merges/NAME/hf  every merge
DIR/scores/SPLIT/...  every sample                DIR/merged/hf       the chosen one
DIR/rounds/NUMBER/    the branches of a round before the last, and their merge (rounds.py)
DIR/sizes.json        seq_len and batch of all branches, where the config leaves them out

The stages are a list that is built once and run from top to bottom. Only this package knows the order of the phases.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bmjax.branch.settings import SAME_RESULT, Training, TrainSettings
from bmjax.branch.train import train
from bmjax.calibrate import dispatch
from bmjax.config import UserError
from bmjax.evaluate.run import evaluate
from bmjax.evaluate.settings import EvalSettings, TaskSettings
from bmjax.io import hub
from bmjax.io.atomic import held, replacing, write_atomic
from bmjax.io.rows import read_rows
from bmjax.io.states import file_states
from bmjax.log import Log, write_line
from bmjax.merge.engine.files import REPORT
from bmjax.merge.recipe.recipe import Recipe
from bmjax.pipeline import recipes, rounds, sizes, student, traces
from bmjax.pipeline.cards import write_results
from bmjax.pipeline.results import Model, Round, build_report, choose
from bmjax.pipeline.rows import DomainRows, measures
from bmjax.pipeline.settings import RunSettings, as_list
from bmjax.pipeline.stages import Stage, Stages, run_directory
from bmjax.report.columns import summary_table
from bmjax.report.page import write_report
from bmjax.weights.hf import stored_dtype

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
    directory = run_directory(output or settings.output)
    is_new = not directory.exists()
    with held(directory / ".lock", "another run is writing here"):
        try:
            if prepare is not None:
                prepare()
            stages = Stages(directory, log)
            experiment = Experiment(settings, directory, log)
            for rows in experiment.rows.values():
                rows.check_sources()
            for stage in experiment.stages():
                stages.run(stage)
        except UserError:
            if is_new and not any((directory / "stages").glob("*.json")):
                _clear(directory)  # nothing is done that another call could go on from
            raise
        report = build_report(
            experiment.models, experiment.rounds, settings, directory, experiment.winner(), stages.measured
        )
        write_results(experiment.models, experiment.winner(), settings, directory)
        write_report(directory, report)
        write_atomic(directory / "report.json", json.dumps(report, indent=1))
    log(summary_table(report))
    log(f"report: {directory / 'report.html'}   merged model: {directory / 'merged' / 'hf'}")
    return report


def _clear(directory: Path) -> None:
    """Empty a run's directory but for its lock, whose holder removes both."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


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
        # Where every round starts, and the branches that it trains; the last round's are the run's branches.
        self.rounds: list[Round] = []
        start = self.backbone
        for number in range(1, settings.rounds):
            name = f"rounds/{number}"
            self.rounds.append(Round(start, {domain: self._trained(f"{name}/{domain}") for domain in settings.domains}))
            start = Model(name, rounds.next_start(settings, number, directory), name, None)
        self.rounds.append(Round(start, self.branches))
        self.candidates = [self.backbone, *self.merges.values()]
        self.models = [self.backbone, *self.branches.values(), *self.merges.values(), self.mixture]
        student.check_trainings(settings)
        self.recipes = {name: self._recipe(name, self.rounds[-1]) for name in settings.merges}

    def _trained(self, name: str) -> Model:
        return Model(name, str(self.directory / name / "hf"), name, f"{name}/metrics.jsonl")

    def _recipe(self, name: str, part: Round, dtype: str | None = None) -> Recipe:
        return recipes.recipe_of(self.settings, name, part, self.rows, dtype)

    def stages(self) -> list[Stage]:
        """Return all stages in the order in which they are run."""
        settings, domains = self.settings, self.settings.domains
        return [
            *(self._data(rows) for rows in self.rows.values()),
            *(self._teach(rows) for rows in self.rows.values() if rows.domain.train is None),
            *(self._new_backbone(training) for training in [settings.backbone] if training is not None),
            *([self._sizes()] if sizes.are_missing(settings) else []),
            *([self._merge_rows()] if any(recipe.is_calibrated for recipe in self.recipes.values()) else []),
            *(stage for number in range(1, settings.rounds) for stage in self._round(number)),
            *(self._branch(name, settings.rounds) for name in domains),
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
            files, programs = (
                file_states(as_list(domain.traces or [])),
                [settings.run_programs, settings.program_seconds],
            )
            return [asked, domain.judge, settings.select.model_dump(), *programs, files]

        outputs = [f"{name}/{file}" for file in ("asked.jsonl", "held_out.jsonl", "selected", "counts.json")]
        outputs += rows.outputs(name)
        folder = self.directory / name
        work, plan = partial(traces.teach, rows, folder), partial(traces.describe, rows, folder)
        return Stage(name, inputs, (f"data/{rows.name}",), tuple(outputs), work, plan)

    def _merge_rows(self) -> Stage:
        """Return the stage that reads what merges will look at: what they refuse is told before a branch is trained."""
        looking = {name: recipe for name, recipe in self.recipes.items() if recipe.is_calibrated}
        start, log = self.backbone.hf, self.log

        def check() -> list[str]:
            return recipes.check_rows({name: self._recipe(name, self.rounds[0]) for name in looking}, start)

        def plan() -> list[str]:
            if not all(path.exists() for path in needed):
                return ["its rows are checked when they and the backbone are there"]
            return [f"note: {line}" for line in check()]

        files = [rows.file(split) for rows in self.rows.values() for split in recipes.SPLITS]
        needed = [*files, *([Path(start) / "config.json"] if self.backbone.made_by else [])]
        inputs = [[self.settings.merges[name] for name in looking], *self._external(), self.settings.seed]
        after = (*self.backbone.made_by, *recipes.row_stages(self.rows))
        return Stage("merge_rows", lambda: inputs, after, (), lambda: [log(line) for line in check()], plan)

    # Trainings

    def _train(
        self, model: Model, domains: Iterable[str], training: Callable[[], Training], start: Model | None = None,
        earlier: Model | None = None, **part: Any,
    ) -> Stage:  # fmt: skip
        """Return the stage of a training.

        Arguments:
            training: is called when the stage's turn comes.
            start: the model that it starts from, by default the backbone.
            earlier: the model whose training it goes on from.
            part: keys of `bmjax train` that say which part of the steps it takes.
        """
        parts, name, start = [self.rows[domain] for domain in domains], model.name, start or self.backbone
        files = [rows.file("train") for rows in parts]
        if earlier is not None:
            part["continue_from"] = str(self.directory / earlier.name)

        def settings() -> TrainSettings:
            keys = sizes.filled(training(), self.directory / sizes.FILE)
            return self._train_settings(keys, start.hf, files, name, **part)

        def inputs() -> list[Any]:
            which = [part["until"]] if "until" in part else []
            return [_deciding(settings()), *self._external(), *which]

        made_by = [maker for source in (start, earlier) if source is not None for maker in source.made_by]
        after = (*made_by, *(rows.stage("train") for rows in parts))

        # What it will take can be told where its student and its rows are there.
        needed = [*files, *([Path(start.hf) / "config.json"] if start.made_by else [])]
        plan = partial(student.plan, training, settings, needed)
        return Stage(name, inputs, after, (name,), lambda: train(settings(), self.log), plan)

    def _sizes(self) -> Stage:
        """Return the stage that chooses the sizes which branches leave out: once, of all domains' rows."""

        def branches() -> list[TrainSettings]:
            trained = ((rows, self.settings.branch_training(name)) for name, rows in self.rows.items())
            start = self.backbone.hf
            return [self._train_settings(keys, start, [rows.file("train")], rows.name) for rows, keys in trained]

        def inputs() -> list[Any]:
            return [[_deciding(training) for training in branches()], *self._external()]

        after = (*self.backbone.made_by, *(rows.stage("train") for rows in self.rows.values()))
        file = self.directory / sizes.FILE
        return Stage("sizes", inputs, after, (sizes.FILE,), lambda: sizes.write(file, branches(), self.log))

    def _branch(self, domain: str, number: int) -> Stage:
        """Return the stage that trains a branch in a round, counted from 1, for its share of the steps."""
        settings, part = self.settings, self.rounds[number - 1]
        keys: dict[str, Any] = {}
        if number < settings.rounds:
            keys["until"] = number / settings.rounds
        if settings.rounds > 1 and settings.branch_training(domain).export_dtype is None:
            keys["export_dtype"] = "float32"  # a round's change is too small to be rounded
        earlier = self.rounds[number - 2].branches[domain] if number > 1 else None
        training = partial(settings.branch_training, domain)
        return self._train(part.branches[domain], [domain], training, part.start, earlier, **keys)

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

    def _train_settings(
        self, training: Training, start: str, files: list[Path], name: str, **part: Any
    ) -> TrainSettings:
        changes = {
            "student": start, "data": [str(file) for file in files], "output": str(self.directory / name),
            "num_processes": 1, "stop_code": UNFINISHED, "seed": training.seed + self.settings.seed,
            "template": training.template or self.settings.template, **part,
        }  # fmt: skip
        return TrainSettings.model_validate(training.model_dump() | changes)

    def _external(self) -> list[Any]:
        """What the models depend on from outside: names and states of student, tokenizer and template."""
        settings = self.settings
        names = (settings.student, settings.model.tokenizer if settings.model else None, settings.template)
        return file_states(name for name in names if name is not None)

    # Merges and scores

    def _round(self, number: int) -> list[Stage]:
        """Return the stages of a round before the last: the branches, and the merge that the next one starts from."""
        settings, part, name = self.settings, self.rounds[number - 1], f"rounds/{number}"
        merge = settings.round_merge or next(iter(settings.merges))

        def work() -> None:
            recipe, merged = self._recipe(merge, part, "float32"), self.directory / name / "merged" / "hf"
            if not (merged / REPORT).exists():
                dispatch.merge(recipe, merged, overwrite=True, log=self.log)
            earlier_start = self.rounds[number - 2].start.hf if number > 1 else None
            rounds.outer_step(settings, number, self.directory, part.start.hf, earlier_start)

        after = (*(model.name for model in part.branches.values()), *part.start.made_by)
        if self.recipes[merge].is_calibrated:
            after += recipes.row_stages(self.rows)
        inputs = [settings.merges[merge], settings.outer_rate, settings.outer_momentum, *self._external()]
        outputs = tuple(f"{name}/{folder}" for folder in rounds.folders(settings, number))
        return [
            *(self._branch(domain, number) for domain in settings.domains),
            Stage(name, lambda: inputs, after, outputs, work, lambda: recipes.notes(self.recipes[merge])),
            self._score(self.rounds[number].start, "validation", loss_only=True),
        ]

    def _merge(self, name: str) -> Stage:
        recipe, output, part = self.recipes[name], Path(self.merges[name].hf), self.rounds[-1]

        def work() -> None:
            # Models between rounds are float32; the result is stored as the backbone is.
            dtype = None if self.settings.rounds == 1 else stored_dtype(hub.model_directory(self.backbone.hf)).name
            dispatch.merge(self._recipe(name, part, dtype), output, overwrite=True, log=self.log)

        after = (*(model.name for model in part.branches.values()), *part.start.made_by)
        if recipe.is_calibrated:
            after += recipes.row_stages(self.rows)
        inputs = [self.settings.merges[name], *self._external()]
        return Stage(f"merge/{name}", lambda: inputs, after, (f"merges/{name}",), work, lambda: recipes.notes(recipe))

    def _score(self, model: Model, split: str, loss_only: bool = False) -> Stage:
        settings = self.settings

        def work() -> None:
            tasks = {}
            for domain, rows in self.rows.items():
                file = rows.file(split)
                location, first = next(read_rows(file))
                questions, texts = (str(file) if measured else None for measured in measures(first, location))
                questions = questions if settings.evaluate.accuracy and not loss_only else None
                if questions or texts:
                    tasks[domain] = TaskSettings(
                        questions=questions, traces=texts, judge=rows.domain.judge, adapter="bmjax"
                    )
                elif not loss_only:
                    problem = f"the {split} rows of {domain} have no texts to score"
                    raise UserError(f"evaluate.accuracy: false, but {problem}")
            if not tasks:
                self.log(f"{model.name}: the {split} rows have no texts, so its loss is not measured")
                write_atomic(self.directory / model.scores(split) / "scores.json", "{}")
                return
            evaluation = EvalSettings(
                model=model.hf, tasks=tasks, output=str(self.directory / model.scores(split)), seed=settings.seed,
                template=settings.template, run_programs=settings.run_programs,
                program_seconds=settings.program_seconds,
                **settings.evaluate.model_dump(exclude={"accuracy"}),
            )  # fmt: skip
            evaluate(evaluation, self.log)

        judges = [domain.judge for domain in settings.domains.values()]
        judging = [settings.run_programs, settings.program_seconds, judges]
        scoring = settings.evaluate.model_dump(exclude={"mesh", "batch", "accuracy"})
        if not scoring["quantized_cache"]:
            del scoring["quantized_cache"]  # runs before this key existed go on
        measured = [] if settings.evaluate.accuracy else ["loss"]
        inputs = [scoring, *self._external(), settings.seed, judging, *measured]
        after = (*model.made_by, *(rows.stage(split) for rows in self.rows.values()))
        return Stage(f"evaluate/{split}/{model.name}", lambda: inputs, after, (model.scores(split),), work)

    def winner(self) -> Model:
        """Return the merge that the validation rows choose; their scores must be there."""
        scores = {model.name: model.read_scores(self.directory, "validation") for model in self.candidates}
        return self.merges[choose(scores, self.settings.choose.by).removeprefix("merge/")]

    def _merged(self) -> Stage:
        def work() -> None:
            with replacing(self.directory / "merged" / "hf") as temporary:
                winner = self.winner()
                for file in (path for path in Path(winner.hf).rglob("*") if path.is_file()):
                    target = temporary / file.relative_to(winner.hf)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        os.link(file, target)  # the same bytes under two names
                    except OSError:
                        shutil.copyfile(file, target)

        after = tuple(f"evaluate/validation/{model.name}" for model in self.candidates)
        return Stage("merged", lambda: self.settings.choose.model_dump(), after, ("merged",), work)


def _deciding(training: TrainSettings) -> dict[str, Any]:
    """What a training's result depends on, its inputs left out."""
    return training.model_dump(include=training.keys_without(SAME_RESULT))
