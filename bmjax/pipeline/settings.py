"""The settings of `bmjax run`: domains, teacher, backbone, branches, merges, mixture, evaluation."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from bmjax.branch.settings import Training
from bmjax.config import Settings, UserError, first_problem, nearest
from bmjax.evaluate.settings import questions_of
from bmjax.teach.settings import JudgeName, ProgramSettings, Range, RowSettings, Selection, TeacherSettings


def as_list(value: str | list[str]) -> list[str]:
    """Return the names of a key that takes one or several."""
    return [value] if isinstance(value, str) else value


class SourceSettings(RowSettings):
    """Rows of data, and how a prompt, a response and a reference are made of one.

    Without `prompt`, `response`, `reference` and `adapter` the rows are taken as they are.
    """

    data: str | list[str] = Field(
        description="JSON Lines, JSON or Parquet file(s), or a hub dataset (org/name:subset:split)"
    )
    prompt: str | None = Field(
        None, description="the prompt; {name} stands for a field of the row (a list: line by line), {{ for a brace"
    )
    response: str | None = Field(None, description="what the student is to write")
    reference: str | dict[str, str] | None = Field(
        None,
        description="the reference answer; a field that is a list holds a program's tests, as {tests: {name}} does",
    )
    identity: str | None = Field(None, description="what tells rows apart when they are split; default: the prompt")
    between: dict[str, Range] = Field(
        {}, description="keep rows whose field lies in [from, to], e.g. {task_id: [11, 510]}"
    )
    limit: int | None = Field(None, ge=1, description="take the first so many rows only")
    benchmark: str | None = Field(
        None, description="of `test`: the benchmark of `bmjax eval` that these rows are, a copy of your own"
    )

    @property
    def as_they_are(self) -> bool:
        """Whether the rows are taken without a template."""
        return self.adapter is None and self.prompt is None and self.response is None and self.reference is None


class DomainSettings(Settings):
    """One domain: problems for the teacher, traces, or training rows. Each becomes one branch."""

    problems: SourceSettings | None = Field(
        None, description="prompt and reference: asked of the teacher, judged, selected"
    )
    traces: str | list[str] | None = Field(
        None, description="traces that exist, as `bmjax select` reads them: judged, selected; nothing is asked"
    )
    only: dict[str, Any] = Field(
        {}, description="of `traces`: keep those whose row's field is one of these values, e.g. {source: [olympiads]}"
    )
    train: SourceSettings | None = Field(
        None, description="training rows: prompt and response, or all that `bmjax train` reads"
    )
    test: SourceSettings | None = Field(
        None, description="test rows, never trained on: prompt with reference (accuracy), response (loss) or both; or "
        "the name of a benchmark of `bmjax eval`, such as aime24",
    )  # fmt: skip
    test_share: float = Field(
        0.0, ge=0, lt=1, description="without test: share of the domain's rows held out for it, by hash of the prompt"
    )
    validation: SourceSettings | None = Field(None, description="rows that choose the merge, as test; never trained on")
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="without validation: share of the domain's rows held out, by hash of the prompt"
    )
    backbone: SourceSettings | None = Field(
        None, description="rows that a new backbone is trained on; default: the training rows"
    )
    backbone_rows: int | None = Field(
        None, ge=1, description="so many of the training rows, by hash of the prompt, train a new backbone; null: all. "
        "Domains of equal share make a backbone that no single one dominates",
    )  # fmt: skip
    judge: JudgeName | None = Field(None, description="how answers are judged; by default the reference decides")
    branch: dict[str, Any] = Field({}, description="training keys that differ from the top's `branch`")

    @field_validator("test", mode="before")
    @classmethod
    def _benchmark_by_name(cls, value: Any) -> Any:
        """Fill in the rows of a benchmark that is given by its name; samples and lengths are those of `evaluate`."""
        given = {"benchmark": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping) or not isinstance(given.get("benchmark"), str):
            return value
        try:
            keys = questions_of(given["benchmark"], given.get("data"))
        except UserError as error:
            raise ValueError(str(error)) from None
        return {"data": keys["questions"], **{key: keys[key] for key in ("adapter", "between") if key in keys}, **given}

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if sum(source is not None for source in (self.problems, self.traces, self.train)) != 1:
            raise ValueError("give exactly one of 'problems', 'traces' and 'train'")
        if self.only and self.traces is None:
            raise ValueError("only: it keeps traces; of other rows, give it beside their 'data'")
        if (self.test is None) == (self.test_share == 0):
            raise ValueError("give exactly one of 'test' and 'test_share'")
        if self.backbone is not None and self.backbone_rows is not None:
            raise ValueError("give 'backbone' or 'backbone_rows', not both")
        if self.problems is not None and self.problems.response is not None:
            raise ValueError("problems.response: the teacher gives the responses; rows that have theirs are 'train'")
        held_out = "reference", "response"
        needed = {"train": ("response",), "backbone": ("response",), "test": held_out, "validation": held_out}
        for key, templates in needed.items():
            source = getattr(self, key)
            has_reference = source and source.adapter is not None and "reference" in templates
            if (
                source
                and not (source.as_they_are or has_reference)
                and all(getattr(source, name) is None for name in templates)
            ):
                raise ValueError(f"{key}: {' or '.join(templates)} is missing beside the other templates")
        return self


class ModelSettings(Settings):
    """A new, small Qwen2 (an existing one is given by `student`)."""

    tokenizer: str = Field(description="directory or hub id of the tokenizer")
    hidden_size: int = Field(64, ge=8, description="D")
    intermediate_size: int = Field(192, ge=8, description="F")
    num_layers: int = Field(4, ge=1, description="L")
    num_heads: int = Field(4, ge=1, description="query heads")
    num_kv_heads: int = Field(2, ge=1, description="key/value heads")
    max_length: int = Field(512, ge=16, description="context, tokens")
    tied: bool = Field(True, description="the head is the embedding's transpose")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    initializer_range: float = Field(
        0.02, gt=0, description="standard deviation of the initial matrices; about 1/sqrt(D) suits a small D"
    )


class ChooseSettings(Settings):
    """Which merge becomes `merged`; decided on the validation rows alone."""

    by: Literal["accuracy", "loss"] = Field(
        "accuracy", description="what is compared; the other where a domain has only that"
    )


class ScoreSettings(Settings):
    """How the models of a run are scored."""

    accuracy: bool = Field(
        True, description="ask the questions; false: held-out loss alone, which needs no generation, so where every "
        "domain has texts",
    )  # fmt: skip
    seq_len: int = Field(512, ge=2, description="tokens a row when measuring the loss")
    max_new_tokens: int = Field(2048, ge=1, description="longest answer, reasoning included; what is cut off is wrong")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    samples: int = Field(1, ge=1, description="answers a question")
    batch: int = Field(256, ge=1, description="rows generated or scored at once")
    compute_dtype: Literal["bfloat16", "float32"] = Field("float32", description="of weights and activations")
    quantized_cache: bool = Field(False, description="generate with keys and values kept as int8")
    mesh: dict[str, int] = Field({"data": -1}, description="devices along data, fsdp, context, tensor; -1: the rest")


class RunSettings(ProgramSettings):
    """`bmjax run CONFIG`: the whole branch-merge experiment."""

    output: str | None = Field(None, description="directory of the run; --output wins over it")
    seed: int = Field(0, description="of initialization, order of rows and sampling")
    domains: dict[str, DomainSettings] = Field(description="NAME: a domain; one branch each")
    student: str | None = Field(
        None, description="backbone that exists: directory or hub id; null: `model` is trained by `backbone`"
    )
    model: ModelSettings | None = Field(None, description="the new backbone's shape")
    template: str | None = Field(
        None, description="chat template: null for the student's own, a name that bmjax train lists, or FILE.jinja"
    )
    backbone: Training | None = Field(
        None, description="how a new backbone is trained; on every domain's backbone rows"
    )
    teacher: TeacherSettings = Field(TeacherSettings(), description="who answers the problems")
    failed_share: float = Field(
        0.0, ge=0, lt=1, description="share of a domain's requests that may fail for good; more of them stop the run"
    )
    select: Selection = Field(Selection(), description="which traces are trained on")
    branch: Training = Field(description="how every branch is trained")
    rounds: int = Field(
        1, ge=1, description="how often the branches are trained, each time for the same share of their steps; after "
        "every round but the last they are merged and all go on from there, each with its own moments and rows",
    )  # fmt: skip
    round_merge: str | None = Field(
        None, description="with rounds: NAME of the merge between them; null: the only one, or else it must be named"
    )
    outer_rate: float = Field(
        1.0,
        gt=0,
        description="with rounds: the next one starts at so much of the way from the last start to the merge",
    )
    outer_momentum: float = Field(
        0.0, ge=0, lt=1, description="with rounds: Nesterov momentum of the starts, as DiLoCo's (arXiv 2311.08105)"
    )
    mixture: dict[str, Any] = Field(
        {},
        description="training keys of the mixture that differ from `branch`; steps: by default the branches' sum",
    )
    merges: dict[str, dict[str, Any]] = Field(description="NAME: a merge recipe over `backbone` and the domains' names")
    choose: ChooseSettings = Field(ChooseSettings(), description="which merge becomes `merged`")
    evaluate: ScoreSettings = Field(ScoreSettings(), description="generation and loss")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if len(self.domains) < 2:
            raise ValueError("domains: at least two are needed, else there is nothing to merge")
        for name in [*self.domains, *self.merges]:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"'{name}' is used as a directory name: letters, digits, '-', '_' and '.', and the first one a "
                    "letter or a digit"
                )
        if "backbone" in self.domains:
            raise ValueError("domains: 'backbone' is the name of the common start; name the domain otherwise")
        if not self.merges:
            raise ValueError("merges: at least one is needed")
        if (self.student is None) == (self.backbone is None):
            raise ValueError("give 'student' (a backbone that exists) or 'backbone' (how a new one is trained)")
        if (self.backbone is None) != (self.model is None):
            raise ValueError("'backbone' (how a new backbone is trained) and 'model' (its shape) go together")
        if self.backbone is not None and self.backbone.learning_rate is None:
            raise ValueError(
                "backbone.learning_rate: give it; what is chosen for a branch is too low for random weights (a small "
                "model takes about 3e-3)"
            )
        if self.rounds > 1:
            if self.round_merge is None and len(self.merges) > 1:
                raise ValueError(f"round_merge: which of {', '.join(self.merges)} merges the branches between rounds?")
            if self.round_merge is not None and self.round_merge not in self.merges:
                raise ValueError(
                    f"round_merge: no merge is named '{self.round_merge}'{nearest(self.round_merge, list(self.merges))}"
                )
        else:
            for key in ("round_merge", "outer_rate", "outer_momentum"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: it is for several rounds; give rounds, or remove the key")
        for name, domain in self.domains.items():
            if domain.problems is not None and not (self.teacher.base_url and self.teacher.model):
                raise ValueError(
                    f"domains.{name}.problems are asked of a teacher: set teacher.base_url (its endpoint, e.g. "
                    "http://localhost:8000/v1) and teacher.model"
                )
            if self.student is not None and (domain.backbone is not None or domain.backbone_rows is not None):
                raise ValueError(f"domains.{name}.backbone: 'student' is a trained backbone; remove the key")
            steps = self.branch_training(name).steps
            if steps is not None and steps < self.rounds:
                raise ValueError(f"rounds: {self.rounds}, but branch '{name}' has {steps} steps; a round needs one")
        self.mixture_training(1)
        return self

    def branch_training(self, domain: str) -> Training:
        """Return how the branch of `domain` is trained: `branch` with the domain's changes."""
        return _changed(self.branch, self.domains[domain].branch, f"domains.{domain}.branch")

    def mixture_training(self, steps: int) -> Training:
        """Return how the mixture is trained: as a branch, for `steps` unless `mixture` says otherwise."""
        length = {} if "epochs" in self.mixture else {"steps": steps, "epochs": None}
        return _changed(self.branch, length | self.mixture, "mixture")


def _changed(base: Training, changes: dict[str, Any], key: str) -> Training:
    values = base.model_dump() | changes
    if "epochs" in changes and "steps" not in changes:
        values["steps"] = None
    if "steps" in changes and "epochs" not in changes:
        values["epochs"] = None
    try:
        return Training.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{key}: {first_problem(values, error)}") from None
