"""The settings of `bmjax run`: domains, backbone, branches, merges, mixture, evaluation."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from bmjax.branch.settings import Training
from bmjax.config import Settings, first_problem
from bmjax.demo.settings import Mistakes
from bmjax.teach.settings import TeacherSettings


class SourceSettings(Settings):
    """Rows that exist already: files, and how to make a prompt and a response of one."""

    files: str | list[str] = Field(description="JSONL or Parquet file(s), or a hub dataset: org/name:subset:split")
    prompt: str = Field("{prompt}", description="the prompt; {name} stands for a field of the row, lists line by line")
    response: str = Field("{response}", description="what the student is to write")
    identity: str | None = Field(None, description="what tells rows apart when they are split; default: the prompt")
    between: dict[str, tuple[int, int]] = Field(
        {}, description="keep rows whose field lies in [from, to], e.g. {task_id: [11, 510]}"
    )


class BuiltinDomain(Settings):
    """Procedural problems of a built-in domain, answered by the teacher."""

    domain: Literal["math", "code", "science"] = Field(description="which")
    count: int = Field(3600, ge=1, description="problems the teacher answers for the branch")
    levels: list[int] = Field([1, 2, 3], description="difficulties of those and of the held-out problems")
    backbone_count: int = Field(1200, ge=1, description="solved problems of the backbone's training")
    backbone_levels: list[int] = Field([1, 2, 3], description="difficulties of those")
    validation: int = Field(300, ge=1, description="held-out problems that choose the merge")
    test: int = Field(600, ge=1, description="held-out problems of the report")


class DomainSettings(Settings):
    """One domain: built-in problems, or rows that exist. Each becomes one branch."""

    builtin: BuiltinDomain | None = Field(None, description="procedural problems; or give train")
    train: SourceSettings | None = Field(None, description="training rows; or give builtin")
    test: SourceSettings | None = Field(None, description="test rows; never trained on")
    test_share: float = Field(
        0.0, ge=0, lt=1, description="without test: share of the training rows held out for it, by hash of the prompt"
    )
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="share of the training rows that choose the merge, by hash of the prompt"
    )
    backbone_rows: int | None = Field(
        None, ge=1, description="with train: so many of the training rows, by hash of the prompt, train the backbone "
        "too; null: all. Domains of equal share make a backbone that no single one dominates"
    )  # fmt: skip
    branch: dict[str, Any] = Field({}, description="training keys that differ from the top's `branch`")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.builtin is None) == (self.train is None):
            raise ValueError("give exactly one of 'builtin' and 'train'")
        if self.builtin is not None and self.backbone_rows is not None:
            raise ValueError("backbone_rows goes with 'train'; with 'builtin' set builtin.backbone_count")
        if self.train is not None and (self.test is None) == (self.test_share == 0):
            raise ValueError("give exactly one of 'test' and 'test_share'")
        return self


class ModelSettings(Settings):
    """A new, small Qwen2 (an existing one is given by `student`)."""

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
    tokenizer: str | None = Field(
        None, description="directory or hub id; null: a byte-level BPE is trained on the backbone's rows"
    )
    vocab_size: int = Field(512, ge=270, description="of a tokenizer trained here")


class ChooseSettings(Settings):
    """Which merge becomes `merged`; decided on the validation rows alone."""

    by: Literal["accuracy", "loss"] = Field(
        "accuracy", description="what is compared; loss where there are no questions"
    )


class ScoreSettings(Settings):
    """How the models of a run are scored."""

    seq_len: int = Field(512, ge=2, description="tokens a row when measuring the loss")
    max_new_tokens: int = Field(96, ge=1, description="longest answer, reasoning included")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    samples: int = Field(1, ge=1, description="answers a question")
    batch: int = Field(256, ge=1, description="rows generated or scored at once")
    compute_dtype: Literal["bfloat16", "float32"] = Field("float32", description="of weights and activations")
    mesh: dict[str, int] = Field({"data": -1}, description="devices along data, fsdp, context, tensor; -1: the rest")


class RunSettings(Settings):
    """`bmjax run CONFIG`: the whole branch-merge experiment."""

    output: str | None = Field(None, description="directory of the run; --output wins over it")
    seed: int = Field(0, description="of problems, initialization, order of rows and sampling")
    domains: dict[str, DomainSettings] = Field(description="NAME: a domain; one branch each")
    student: str | None = Field(
        None, description="backbone that exists: directory or hub id; null: `model` is trained by `backbone`"
    )
    model: ModelSettings = Field(ModelSettings(), description="the new backbone's shape")
    template: str | None = Field(
        None, description="chat template: null for the student's own, chatml, deepseek-r1, or FILE.jinja"
    )
    backbone: Training | None = Field(
        None, description="how a new backbone is trained; on every domain's backbone rows"
    )
    teacher: TeacherSettings = Field(TeacherSettings(), description="who answers the built-in problems")
    mistakes: Mistakes = Field(Mistakes(), description="of the built-in teacher")
    branch: Training = Field(description="how every branch is trained")
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
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                raise ValueError(f"'{name}' is used as a directory name: letters, digits, '-', '_' and '.' only")
        if "backbone" in self.domains:
            raise ValueError("domains: 'backbone' is the name of the common start; name the domain otherwise")
        if not self.merges:
            raise ValueError("merges: at least one is needed")
        if (self.student is None) == (self.backbone is None):
            raise ValueError("give 'student' (a backbone that exists) or 'backbone' (how a new one is trained)")
        for name in self.domains:
            self.branch_training(name)
        self.mixture_training(1)
        return self

    def branch_training(self, domain: str) -> Training:
        """How the branch of `domain` is trained: the top's keys with the domain's own over them."""
        return _over(self.branch, self.domains[domain].branch, f"domains.{domain}.branch")

    def mixture_training(self, steps: int) -> Training:
        """How the mixture is trained: as a branch, for `steps` unless its own keys say otherwise."""
        changes = {"steps": steps, "epochs": None} | self.mixture
        return _over(self.branch, changes, "mixture")


def _over(base: Training, changes: dict[str, Any], where: str) -> Training:
    values = base.model_dump() | changes
    if "epochs" in changes and "steps" not in changes:
        values["steps"] = None
    if "steps" in changes and "epochs" not in changes:
        values["epochs"] = None
    try:
        return Training.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_problem(Training, error)}") from None
