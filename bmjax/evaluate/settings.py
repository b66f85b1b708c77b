"""The settings of `bmjax eval`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from bmjax.config import UserError, nearest
from bmjax.evaluate.livecodebench_release import files_of
from bmjax.evaluate.tasks import TASKS, Task
from bmjax.evaluate.tasks.task import METRIC
from bmjax.teach.benchmarks import benchmark_name
from bmjax.teach.settings import ConnectionSettings, ProblemSettings, ProgramSettings

# Keys that a task may have beside the whole evaluation. The task's win.
_OF_BOTH = ("system", "samples", "temperature", "top_p", "max_new_tokens", "seed")


class TaskSettings(ProblemSettings):
    """One task: questions with references, and, for the held-out loss, whole traces of the same kind."""

    task: str | None = Field(None, description="the benchmark whose values it takes; by default the one of its name")
    questions: str | list[str] | None = Field(
        None,
        validation_alias=AliasChoices("questions", "data"),
        description="accuracy: file(s) or hub data set(s), by the names that `data` of training takes",
    )
    release: str | None = Field(
        None,
        description="of LiveCodeBench, whose files are in the folder `questions`: release_v5; v6 for what that one "
        "added; v5_v6. null: all rows of `questions`",
    )
    traces: str | list[str] | None = Field(None, description="held-out loss: the same, with whole answers")
    response: str = Field("{response}", description="the answer in a row of traces")
    system: str | None = Field(None, description="as above, for this task")
    samples: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("samples", "k"), description="as above, for this task"
    )
    temperature: float | None = Field(None, ge=0, description="as above, for this task")
    top_p: float | None = Field(None, gt=0, le=1, description="as above, for this task")
    max_new_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_new_tokens", "max_tokens"), description="as above"
    )
    seed: int | None = Field(None, description="as above, for this task")
    metrics: list[str] = Field([], description="also measure these: pass@K, maj@K, avg@K, of K or more samples")
    shuffle_options: bool = Field(
        False, description="ask every sample of a choice with its options in an order of its own, which is stored"
    )
    lcb_compat: bool = Field(False, description="also judge programs as LiveCodeBench's own code does, faults included")

    @field_validator("release")
    @classmethod
    def _release_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            files_of(value)
        return value

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Self:
        for name in self.metrics:
            if METRIC.fullmatch(name) is None:
                raise ValueError(f"metrics: found '{name}', expected pass@K, maj@K or avg@K")
        return self


class EvalSettings(ConnectionSettings, ProgramSettings):
    """`bmjax eval CONFIG`: score a model on tasks."""

    model: str = Field(description="Hugging Face directory or hub id; with base_url the model's name at the endpoint")
    tasks: dict[str, TaskSettings] = Field(
        description=f"names in a list, or NAME: keys. Known: {', '.join(TASKS)}; any other: its questions or traces"
    )
    output: str = Field(
        min_length=1, description="directory for scores.json and samples/TASK.jsonl; a stopped run continues there"
    )
    template: str | None = Field(
        None, description="chat template: null for the model's own, a name that bmjax train lists, or FILE.jinja"
    )
    system: str | None = Field(None, description="a system turn before every question")
    seq_len: int = Field(4096, ge=2, description="tokens a row when measuring the loss")
    max_new_tokens: int = Field(
        2048,
        ge=1,
        validation_alias=AliasChoices("max_new_tokens", "max_tokens"),
        description="longest answer, reasoning included; a known task has its own",
    )
    temperature: float | None = Field(
        0.0, ge=0, description="0 is greedy; null leaves it out of requests; a known task has its own"
    )
    top_p: float | None = Field(
        1.0, gt=0, le=1, description="nucleus sampling; null leaves it out of requests; a known task has its own"
    )
    samples: int = Field(1, ge=1, description="answers a question; accuracy is their mean; a known task has its own")
    seed: int | None = Field(
        0, description="of sample 0, +1 per sample, of the options' orders and the bootstrap; null: none in requests"
    )
    batch: int = Field(64, ge=1, description="rows generated or scored at once")
    compute_dtype: Literal["bfloat16", "float32"] = Field("float32", description="of weights and activations")
    quantized_cache: bool = Field(False, description="generate with keys and values kept as int8")
    mesh: dict[str, int] = Field({"data": -1}, description="devices along data, fsdp, context, tensor; -1: the rest")
    table: Literal["paper"] | None = Field(
        None, description="paper: also write table.md and table.json, the paper's table beside what was measured"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_tasks(cls, values: Any) -> Any:
        """Give tasks of known names the values of their benchmark where the user gave none."""
        if not isinstance(values, Mapping) or "tasks" not in values:
            return values
        tasks = values["tasks"]
        if isinstance(tasks, str) or (isinstance(tasks, Sequence) and all(isinstance(name, str) for name in tasks)):
            tasks = {name: {} for name in ([tasks] if isinstance(tasks, str) else tasks)}
        if not isinstance(tasks, Mapping):
            return values
        return {**values, "tasks": {name: _filled_in(name, task, values) for name, task in tasks.items()}}

    @model_validator(mode="after")
    def _tasks_can_be_scored(self) -> Self:
        if self.base_url is not None and self.template is not None:
            raise ValueError("template: the server behind base_url has its own; remove the key")
        if self.base_url is None and self.extra:
            raise ValueError("extra: these are fields of requests, and there is no endpoint; set base_url")
        if not self.tasks:
            raise ValueError("tasks: empty; expected at least one, a name or name: {questions, traces}")
        for name, task in self.tasks.items():
            if name != Path(name).name or name.endswith(".former"):
                raise ValueError(
                    f"tasks: '{name}' is used as a file name; it must not hold '/', end in .former or be empty"
                )
            _check_source(name, task)
            known = benchmark_of(name, task)
            if task.release is not None and (known is None or known.name != "livecodebench"):
                raise ValueError(f"tasks.{name}.release: only livecodebench has releases; remove the key")
            if self.base_url is not None and task.traces is not None:
                raise ValueError(
                    f"tasks.{name}.traces: an endpoint gives no held-out loss; score the model's directory: remove "
                    "base_url and set model"
                )
            k = self.of_task(name, "samples")
            for metric in task.metrics:
                if int(metric.partition("@")[2]) > k:
                    raise ValueError(
                        f"tasks.{name}.metrics: {metric} needs more samples than {k}; set samples or metrics"
                    )
        return self

    def of_task(self, name: str, key: str) -> Any:
        """Return the value of a key for a task: the task's own, else that of the whole evaluation."""
        value = getattr(self.tasks[name], key)
        return getattr(self, key) if value is None else value


def benchmark_of(name: str, task: TaskSettings) -> Task | None:
    """Return the known benchmark that a task of the config is."""
    return TASKS.get(benchmark_name(task.task or name))


def _filled_in(name: Any, task: Any, evaluation: Mapping[str, Any]) -> Any:
    """Return a task's keys with its benchmark's values for those that neither it nor the whole evaluation has."""
    if task is None:
        task = {}
    if not isinstance(task, Mapping) or not isinstance(name, str):
        return task
    base = task.get("task") or name
    known = TASKS.get(benchmark_name(base)) if isinstance(base, str) else None
    if known is None:
        if task.get("task") is not None:
            raise ValueError(f"tasks.{name}.task: no such benchmark '{base}'{nearest(str(base), list(TASKS))}")
        return task
    values = known.row_values()
    if any(key in task for key in ("prompt", "reference")) and "adapter" not in task:
        values.pop("adapter", None)  # the user's own templates
    of_evaluation = {key for key in _OF_BOTH if key in evaluation}
    of_evaluation |= {"max_new_tokens"} if "max_tokens" in evaluation else set()
    values |= {key: value for key, value in known.sampling_values().items() if key not in of_evaluation}
    aliases = {"data": "questions", "k": "samples", "max_tokens": "max_new_tokens", "verify": "judge", "kind": "judge"}
    given = {aliases.get(key, key) for key in task}
    # A number of samples of the user's own makes the benchmark's metrics of more samples meaningless.
    if {"samples"} & (given | of_evaluation) and "metrics" not in given:
        values["metrics"] = []
    return {**{key: value for key, value in values.items() if key not in given}, **task}


def _check_source(name: str, task: TaskSettings) -> None:
    """Raise ValueError for a task without questions and traces, in words for what kind of task it is."""
    if task.questions is not None or task.traces is not None:
        return
    known = benchmark_of(name, task)
    if known is None:
        hint = nearest(name, list(TASKS))
        raise ValueError(
            f"tasks.{name}: give questions (for accuracy), traces (for the held-out loss) or both; of the known "
            f"benchmarks it is none{hint}"
        )
    if known.needs_traces:
        raise ValueError(f"tasks.{name}: give traces: FILE, rows with whole answers")
    raise ValueError(f"tasks.{name}: {known.copy}: tasks.{name}.questions=FILE")


def questions_of(name: str, copy: Any = None) -> dict[str, Any]:
    """Return the keys of a benchmark's rows, for a domain of `bmjax run` that tests by name.

    Arguments:
        name: of the benchmark.
        copy: the user's own copy of its questions, which wins over those that are fetched.

    Raises:
        UserError: for an unknown benchmark, and for one whose questions the user has to give.
    """
    known = TASKS.get(benchmark_name(name))
    if known is None:
        raise UserError(f"'{name}' is no benchmark{nearest(name, list(TASKS))}; or give a block: {{data, prompt}}")
    values = known.row_values() | ({} if copy is None else {"questions": copy})
    if "questions" not in values:
        reason = known.copy or "it has no questions"
        raise UserError(f"{known.name}: {reason}; as a block: {{benchmark: {known.name}, data: FILE}}")
    return values
