"""The settings of `bmjax collect` and `bmjax select`."""

import re
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from bmjax.config import Settings

# What a request holds by keys of its own; `extra` may not change them.
REQUEST_KEYS = ("model", "messages", "temperature", "top_p", "max_tokens", "seed", "n", "stream")

# The scripts that languages are written in. Languages of one script are not told apart.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "en": ("Latin",), "de": ("Latin",), "fr": ("Latin",), "es": ("Latin",), "it": ("Latin",), "pt": ("Latin",),
    "nl": ("Latin",), "pl": ("Latin",), "sv": ("Latin",), "tr": ("Latin",), "vi": ("Latin",), "id": ("Latin",),
    "ru": ("Cyrillic",), "uk": ("Cyrillic",), "ar": ("Arabic",), "fa": ("Arabic",), "zh": ("Han",),
    "ja": ("Han", "Kana"), "ko": ("Hangul", "Han"), "el": ("Greek",), "he": ("Hebrew",), "hi": ("Devanagari",),
    "th": ("Thai",),
}  # fmt: skip

# The names of judges and adapters. Their tables import what judging needs, which is most of the time of a --help.
JudgeName = Literal["math", "choice", "text", "exact", "tests"]
AdapterName = Literal[
    "auto", "bmjax", "openthoughts", "openr1_math", "gpqa", "agieval", "arc", "mmlu_pro", "mmlu", "humaneval", "mbpp",
    "livecodebench", "taco", "apps", "code_contests", "codeforces", "verl", "s1k", "limo", "gsm8k", "numina_math",
    "aime", "math",
]  # fmt: skip


# What `collect` and `select` write themselves, which no data set of a domain may replace.
_FILES = ("traces", "failures", "contamination")


def domain_problem(domain: str) -> str | None:
    """Return why a domain cannot name its data set, the file DOMAIN.jsonl; None where it can."""
    if not re.fullmatch(r"\w[\w .+-]*", domain):
        return f"domain '{domain}': cannot name a file; use letters, digits, - and _"
    if domain.lower() in _FILES:
        return f"domain '{domain}': {domain}.jsonl is the name of another file; choose another name"
    return None


def _check_shard(shard: tuple[int, int] | None) -> None:
    """Raise ValueError for a share of the work that is not one of n."""
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: found {[*shard]}, expected [i, n] with i from 0 to n - 1")


def _text_of_dates(value: Any) -> Any:
    """Return a range with the dates that YAML makes of 2024-08-01 as text again."""
    return [str(end) if isinstance(end, date) else end for end in value] if isinstance(value, (list, tuple)) else value


# [from, to], both included: of numbers, or of texts such as dates.
Range = Annotated[tuple[float, float] | tuple[str, str], BeforeValidator(_text_of_dates)]


class Price(Settings):
    """What tokens cost, in any currency."""

    input: float = Field(0.0, ge=0, description="of a million tokens of prompts")
    output: float = Field(0.0, ge=0, description="of a million tokens of answers, reasoning included")


class ConnectionSettings(Settings):
    """A model behind an OpenAI-compatible endpoint, and what the endpoint allows."""

    base_url: str | None = Field(None, description="endpoint up to /v1, e.g. https://api.deepseek.com/v1")
    model: str | None = Field(None, description="the model's name at the endpoint")
    api_key_env: str | None = Field(None, description="environment variable holding the API key, never the key")
    extra: dict[str, Any] = Field(
        {}, description="further fields of every request, part of what identifies an answer, e.g. "
        "{reasoning_effort: high}",
    )  # fmt: skip
    stream: bool = Field(False, description="ask for a stream, which gateways do not cut off at their time limits")
    concurrency: int = Field(32, ge=1, description="requests in flight")
    requests_per_second: float | None = Field(None, ge=1, description="most requests in any second")
    requests_per_minute: float | None = Field(None, ge=1, description="most requests in any minute")
    tokens_per_minute: float | None = Field(
        None, ge=1, description="most tokens in any minute; a request counts as its prompt and longest answer until "
        "its answer tells the true number",
    )  # fmt: skip
    retries: int = Field(8, ge=0, description="further attempts after a 429, a 5xx or a lost connection")
    timeout: float = Field(1800.0, gt=0, description="seconds one attempt may take, to the last byte of its answer")
    patience: float = Field(30.0, gt=0, description="seconds of lost connections alone after which a run ends")

    @model_validator(mode="after")
    def _extra_adds(self) -> Self:
        for key in REQUEST_KEYS:
            if key in self.extra:
                raise ValueError(f"extra: '{key}' is a field that bmjax sets; remove it here")
        return self


class EndpointSettings(ConnectionSettings):
    """A model behind an endpoint, and how it is sampled."""

    system: str | None = Field(None, description="a system turn before every prompt, part of what identifies an answer")
    temperature: float | None = Field(0.6, ge=0, description="sampling temperature; null leaves it out of requests")
    top_p: float | None = Field(0.95, gt=0, le=1, description="nucleus sampling; null leaves it out")
    max_tokens: int | None = Field(
        16384, ge=1, description="longest answer, reasoning included; null leaves it out, for endpoints that want "
        "extra: {max_completion_tokens: 16384}",
    )  # fmt: skip
    price: Price | None = Field(None, description="of tokens; progress then tells the cost so far and to go")

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if self.tokens_per_minute is not None:
            longest = self.extra.get("max_completion_tokens") or self.max_tokens
            if not isinstance(longest, int) or longest >= self.tokens_per_minute:
                raise ValueError(
                    f"tokens_per_minute: found {self.tokens_per_minute:g}, expected more than max_tokens, which is "
                    f"{longest or 'not set'}: one answer may take as many"
                )
        return self


class TeacherSettings(EndpointSettings):
    """The model that answers, behind an OpenAI-compatible endpoint, and how it is sampled."""

    samples: int = Field(1, ge=1, description="answers per problem, each a record of its own")
    seed: int | None = Field(0, description="seed of sample 0, +1 per sample; null when the endpoint knows no seed")
    logprobs: int | None = Field(
        None, ge=0, le=100, description="keep each token's log-probability and those of so many alternatives"
    )

    @model_validator(mode="after")
    def _set_once(self) -> Self:
        if self.system is not None and "system" in self.extra:
            raise ValueError("extra: 'system' is set by the key system; remove it here")
        if self.logprobs is not None and {"logprobs", "top_logprobs"} & self.extra.keys():
            raise ValueError("extra: 'logprobs' is set by the key logprobs; remove it here")
        return self


class GraderSettings(EndpointSettings):
    """The model that judges what no other judge can."""

    temperature: float | None = Field(0.0, ge=0, description="sampling temperature; null leaves it out of requests")
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus sampling; null leaves it out")
    max_tokens: int | None = Field(4096, ge=1, description="longest judgement, reasoning included; null leaves it out")


class ProgramSettings(Settings):
    """How answers that are programs are judged."""

    run_programs: bool = Field(
        False, description="run answers that are programs against their tests, in a sandbox where the system allows one"
    )
    program_seconds: float = Field(
        6.0, gt=0, description="CPU seconds a test may take, where its reference gives none (seconds: 2)"
    )


class RowSettings(Settings):
    """How rows of data sets become problems: by the name of a data set's form, in place of templates."""

    adapter: AdapterName | None = Field(
        None, description="form of the rows, which gives prompt, reference and judge; auto: by the columns. Templates "
        "that are given win",
    )  # fmt: skip
    instruction: str | None = Field(
        None, description="what follows an adapter's prompt, in place of its own instruction; '' for nothing"
    )
    only: dict[str, Any] = Field(
        {}, description="keep rows whose field is one of these values, e.g. {source: [olympiads, amc_aime]}"
    )

    @model_validator(mode="after")
    def _instruction_has_its_place(self) -> Self:
        if self.instruction is not None and (self.adapter is None or self.template("prompt") is not None):
            raise ValueError("instruction: it follows the prompt of an adapter; write it into the template 'prompt'")
        return self

    def template(self, name: str) -> str | None:
        """Return the template that the user gave, which wins over an adapter; None where none was given."""
        value: str | None = getattr(self, name)
        return value if name in self.model_fields_set else None


class ProblemSettings(RowSettings):
    """How rows become problems."""

    between: dict[str, Range] = Field(
        {}, description="keep rows whose field lies in [from, to], e.g. {contest_date: [2024-08-01, 2025-02-01]}"
    )

    prompt: str = Field(
        "{prompt}", description="the prompt; {name} or {name.inner} stands for a field of the row, {{ for a brace"
    )
    reference: str = Field(
        "{reference}", description="the reference; a lone {name} keeps {tests: [...]} as it is; no field of the prompt"
    )
    judge: JudgeName | None = Field(
        None,
        validation_alias=AliasChoices("judge", "verify", "kind"),
        description="how answers are judged; by default the reference decides",
    )
    limit: int | None = Field(None, ge=1, description="take the first so many rows only")


class CollectSettings(ProblemSettings, ProgramSettings):
    """Problems in, a teacher's traces out."""

    problems: str | list[str] = Field(
        description="JSON Lines, JSON or Parquet file(s), or a hub dataset (org/name:subset:split)"
    )
    output: str = Field(
        min_length=1, description="directory for traces.jsonl and failures.jsonl; an interrupted run continues there"
    )
    domain: str = Field(description="name of the domain, which every trace carries")
    prompt: str = Field(
        "{question}", description="the prompt; {name} or {name.inner} stands for a field of the row, {{ for a brace"
    )
    reference: str = Field(
        "{answer}",
        description="the reference answer; a lone {name} keeps {tests: [...]} as it is; no field of the prompt",
    )
    shard: tuple[int, int] | None = Field(
        None, description="[i, n], i from 0 to n - 1: ask only this job's share of the problems, in OUTPUT/shard-i-of-n"
    )
    teacher: TeacherSettings = Field(TeacherSettings(), description="who answers")
    judge_model: GraderSettings | None = Field(
        None, description="a model that judges answers with a reference that no judge can tell right from wrong"
    )

    @model_validator(mode="after")
    def _domain_names_a_file(self) -> Self:
        if problem := domain_problem(self.domain):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _shard_is_one_of_n(self) -> Self:
        _check_shard(self.shard)
        return self


class JudgeSettings(ProblemSettings, ProgramSettings):
    """Traces in, the same traces with new verdicts out; nothing is asked."""

    traces: str | list[str] = Field(
        description="directories of collect, file(s) or hub data sets: records, chats, OpenR1-Math, OpenThoughts, s1K"
    )
    problems: str | list[str] | None = Field(
        None, description="references anew from these problems, by the prompt; read with the keys that collect had"
    )
    prompt: str = Field("{question}", description="the prompt, {name} stands for a field of the row, {{ for a brace")
    reference: str = Field("{answer}", description="the reference answer; a lone {name} keeps {tests: [...]} as it is")
    only: dict[str, Any] = Field(
        {}, description="keep traces whose row's field is one of these values, e.g. {question_type: MCQ}; needs output"
    )
    output: str | None = Field(
        None, description="FILE.jsonl, or directory for traces.jsonl; without it the traces file is replaced, once "
        "everything is judged",
    )  # fmt: skip
    domain: str | None = Field(None, description="domain of traces that name none, as those of chats")
    shard: tuple[int, int] | None = Field(
        None, description="[i, n], i from 0 to n - 1: judge only this job's share of the traces, by their ids"
    )

    @model_validator(mode="after")
    def _shard_is_one_of_n(self) -> Self:
        _check_shard(self.shard)
        return self


class BenchmarkSettings(Settings):
    """Rows whose questions must not be trained on."""

    data: str = Field(description="a benchmark's name, a file or a hub data set")
    prompt: str | None = Field(None, description="the question in a row, {name} stands for a field; null: guessed")


class Selection(Settings):
    """Which traces are worth training on."""

    keep: list[Literal["right", "unjudged", "wrong"]] = Field(["right"], description="verdicts worth training on")
    require_reasoning: bool = Field(True, description="drop answers without exactly one <think>...</think>")
    min_tokens: int | None = Field(None, ge=1, description="drop traces of fewer tokens")
    max_tokens: int | None = Field(
        None, ge=1, description="drop traces of more tokens, as the teacher counted them, else as `tokenizer` does"
    )
    tokenizer: str | None = Field(None, description="model whose tokenizer counts where the teacher did not")
    max_characters: int | None = Field(None, ge=1, description="drop traces with longer prompt + reasoning + response")
    max_repetition: float | None = Field(
        None, ge=0, le=1, description="drop loops: the share of the reasoning's stretches of 64 characters that stood "
        "in it before; 0.5 is a loop",
    )  # fmt: skip
    languages: list[str] = Field(
        [], description="drop traces in other scripts than those of these languages, e.g. [en]; [] = any"
    )
    max_foreign: float = Field(0.0, ge=0, le=1, description="share of letters that may be of another script")
    pass_rate: tuple[float, float] | None = Field(
        None, description="drop prompts whose share of right samples is not within [low, high]"
    )
    near_duplicates: float | None = Field(
        1.0, gt=0, le=1, description="of prompts that share so much of their words in threes keep one; 1 = those that "
        "differ in case, spaces, punctuation alone; null = off",
    )  # fmt: skip
    per_prompt: int | None = Field(None, ge=1, description="keep at most so many traces of one prompt")
    prefer: Literal["first", "shortest", "most_agreed"] = Field(
        "first", description="which of a prompt's traces per_prompt keeps: by id, the shortest, the commonest answer"
    )
    per_source: int | dict[str, int] | None = Field(
        None, description="keep at most so many traces of a source; a number, or a number for each name"
    )
    ngram: int = Field(0, ge=0, description="also drop prompts sharing this many words in a row; 0 = off")
    decontaminate: list[str | BenchmarkSettings] = Field(
        [], description="benchmarks not to train on: aime24, math500, gpqa_diamond, livecodebench, ..., file(s), hub "
        "data sets, or {data, prompt}; prompts and traces are searched",
    )  # fmt: skip
    coverage: float = Field(0.8, gt=0, le=1, description="share of a benchmark's question that makes a prompt a copy")
    embedding: str | None = Field(
        None, description="model of sentence-transformers that finds a benchmark's questions in other words; null = off"
    )
    similarity: float = Field(0.9, gt=0, le=1, description="cosine by `embedding` from which on two questions are one")

    @model_validator(mode="after")
    def _selection_is_possible(self) -> Self:
        if self.embedding is not None and not self.decontaminate:
            raise ValueError("embedding: it compares prompts with the benchmarks of `decontaminate`, which names none")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: {self.min_tokens} is more than max_tokens, {self.max_tokens}")
        if self.pass_rate is not None and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"pass_rate: expected [low, high] within 0..1, found {list(self.pass_rate)}")
        for language in self.languages:
            if language not in SCRIPTS:
                raise ValueError(f"languages: '{language}' is not one of {', '.join(sorted(SCRIPTS))}")
        return self


class SelectSettings(Selection):
    """Traces in, one training set per domain out, and a table of what was dropped and why."""

    traces: str | list[str] = Field(
        description="directories of collect, file(s) or hub data sets: records, chats, OpenR1-Math, OpenThoughts, s1K"
    )
    domain: str | None = Field(None, description="domain of traces that name none, as those of chats")
    only: dict[str, Any] = Field(
        {}, description="keep traces whose row's field is one of these values, e.g. {source: [olympiads, amc_aime]}"
    )
    output: str = Field(description="directory for DOMAIN.jsonl and selection.json")
    held_out: str | list[str] = Field(
        [], description="file(s) or hub data sets like `data` of training, whose prompts must not be trained on"
    )
    held_out_prompt: str = Field("{prompt}", description="the prompt of a held-out row, {name} stands for a field")
    shard: tuple[int, int] | None = Field(
        None, description="[i, n]: read only part i of n, i from 0; `join` puts the n parts together"
    )
    join: bool = Field(False, description="make the data sets of the parts that `shard` left in OUTPUT/parts")
    show: int = Field(0, ge=0, description="print so many examples kept, and dropped by each rule")

    @model_validator(mode="after")
    def _shard_is_possible(self) -> Self:
        _check_shard(self.shard)
        if self.shard is not None and self.join:
            raise ValueError("join: leave out shard where the parts are joined")
        return self
