"""The settings of `bmjax collect` and `bmjax select`."""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from bmjax.config import Settings
from bmjax.teach.judges.judge import JUDGES

# What a request holds by keys of its own; `extra` may not change them.
REQUEST_KEYS = ("model", "messages", "temperature", "top_p", "max_tokens", "seed", "n", "stream")

# The name of a judge, for settings. A type checker cannot read the table.
if TYPE_CHECKING:
    JudgeName = str
else:
    JudgeName = Literal[tuple(JUDGES)]


class TeacherSettings(Settings):
    """The model that answers, behind an OpenAI-compatible endpoint, and how it is sampled."""

    base_url: str | None = Field(None, description="endpoint up to /v1, e.g. https://api.deepseek.com/v1")
    model: str | None = Field(None, description="the model's name at the endpoint")
    api_key_env: str | None = Field(None, description="environment variable holding the API key, never the key")
    temperature: float = Field(0.6, ge=0, description="sampling temperature")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling")
    max_tokens: int = Field(16384, ge=1, description="longest answer, reasoning included")
    samples: int = Field(1, ge=1, description="answers per problem, each a record of its own")
    seed: int | None = Field(0, description="seed of sample 0, +1 per sample; null when the endpoint knows no seed")
    concurrency: int = Field(32, ge=1, description="requests in flight")
    retries: int = Field(8, ge=0, description="further attempts after a 429, a 5xx or a lost connection")
    timeout: float = Field(1800.0, gt=0, description="seconds one attempt may take")
    extra: dict[str, Any] = Field(
        {}, description="further fields of every request, part of what identifies an answer, e.g. "
        "{reasoning_effort: high}",
    )  # fmt: skip

    @model_validator(mode="after")
    def _extra_adds(self) -> Self:
        for key in REQUEST_KEYS:
            if key in self.extra:
                raise ValueError(f"extra: '{key}' is a field that bmjax sets; remove it here")
        return self


class ProblemSettings(Settings):
    """How rows become problems."""

    prompt: str = Field("{prompt}", description="the prompt, {name} stands for a field of the row, {{ for a brace")
    reference: str = Field("{reference}", description="the reference; a lone {name} keeps {tests: [...]} as it is")
    judge: JudgeName | None = Field(
        None,
        validation_alias=AliasChoices("judge", "verify", "kind"),
        description="how answers are judged; by default the reference decides, and the names math and code",
    )
    limit: int | None = Field(None, ge=1, description="take the first so many rows only")


class CollectSettings(ProblemSettings):
    """Problems in, a teacher's traces out."""

    problems: str | list[str] = Field(
        description="JSON Lines, JSON or Parquet file(s), or a hub dataset (org/name:subset:split)"
    )
    output: str = Field(description="directory for traces.jsonl and failures.jsonl; an interrupted run continues there")
    domain: str = Field(description="name of the domain, which every trace carries")
    prompt: str = Field("{question}", description="the prompt, {name} stands for a field of the row, {{ for a brace")
    reference: str = Field("{answer}", description="the reference answer; a lone {name} keeps {tests: [...]} as it is")
    run_programs: bool = Field(False, description="run answers that are programs against their tests (not a sandbox)")
    teacher: TeacherSettings = Field(TeacherSettings(), description="who answers")


class Selection(Settings):
    """Which traces are worth training on."""

    keep: list[Literal["right", "unjudged", "wrong"]] = Field(["right"], description="verdicts worth training on")
    require_reasoning: bool = Field(True, description="drop answers without exactly one <think>...</think>")
    max_tokens: int | None = Field(None, ge=1, description="drop traces of more tokens, as the teacher counted them")
    max_characters: int | None = Field(None, ge=1, description="drop traces with longer prompt + reasoning + response")
    per_prompt: int | None = Field(None, ge=1, description="keep at most so many traces of one prompt")
    ngram: int = Field(0, ge=0, description="also drop prompts sharing this many words in a row; 0 = off")


class SelectSettings(Selection):
    """Traces in, one training set per domain out, and a table of what was dropped and why."""

    traces: str | list[str] = Field(
        description="traces: directories of collect, file(s) or hub data sets like `data` of training"
    )
    output: str = Field(description="directory for DOMAIN.jsonl and selection.json")
    held_out: str | list[str] = Field(
        [], description="file(s) or hub data sets like `data` of training, whose prompts must not be trained on"
    )
    held_out_prompt: str = Field("{prompt}", description="the prompt of a held-out row, {name} stands for a field")
