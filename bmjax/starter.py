"""Writes a first config for a command: the keys that must be given, and every other key as a comment with its default.

`bmjax init` calls it. The comments come from the settings themselves, so that they are true.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from bmjax.config import Settings, type_name


@dataclass(frozen=True)
class Question:
    """A value that a config cannot do without: its key, what is asked for, and an example that is the default."""

    key: str
    text: str
    default: str


@dataclass(frozen=True)
class Starter:
    """What a command's first config holds.

    Attributes:
        questions: what is asked at a terminal.
        values: further keys that are given, as a nested mapping; the answers are put into it.
        next: what to type then; FILE stands for the config.
    """

    questions: tuple[Question, ...]
    values: Mapping[str, Any]
    next: str


_STUDENT = Question("student", "the model to start from: a directory or a hub id", "Qwen/Qwen2.5-0.5B-Instruct")
_ENDPOINT = Question("teacher.base_url", "the teacher's endpoint, up to /v1", "http://localhost:8000/v1")
_TEACHER = Question("teacher.model", "the teacher's name there", "Qwen/Qwen3-8B")
_GSM8K = {"data": "openai/gsm8k:main:train", "prompt": "{question}", "reference": "{answer}"}
_MBPP = {"data": "google-research-datasets/mbpp:full:train", "adapter": "mbpp"}

STARTERS = {
    "train": Starter(
        (
            _STUDENT,
            Question("data", "the rows: a file, a folder, or a hub data set", "rows.jsonl"),
            Question("output", "the directory of the result", "runs/branch"),
        ),
        {"epochs": 3},
        "bmjax train FILE --check",
    ),
    "collect": Starter(
        (
            Question("problems", "the problems: a file, a folder, or a hub data set", "openai/gsm8k:main:train"),
            _ENDPOINT,
            _TEACHER,
        ),
        {"prompt": "{question}", "reference": "{answer}", "domain": "math", "output": "runs/traces", "limit": 100},
        "bmjax collect FILE --check",
    ),
    "select": Starter(
        (
            Question("traces", "the traces: a file or a folder", "runs/traces"),
            Question("output", "the directory of the result", "runs/rows"),
        ),
        {},
        "bmjax select FILE --show 3",
    ),
    "eval": Starter(
        (
            Question("model", "the model: a directory or a hub id", "Qwen/Qwen2.5-0.5B-Instruct"),
            Question("output", "the directory of the scores", "runs/scores"),
        ),
        {"tasks": {"gsm8k": {"limit": 100}}, "max_new_tokens": 512},
        "bmjax eval FILE --check",
    ),
    "run": Starter(
        (_STUDENT, _ENDPOINT, _TEACHER),
        {
            "output": "runs/mine",
            "teacher": {"max_tokens": 4096},
            "domains": {
                "math": {"problems": _GSM8K, "test_share": 0.1},
                "code": {"problems": _MBPP, "test_share": 0.1},
            },
            "run_programs": True,
            "branch": {"epochs": 3},
            "merges": {
                "linear": {"merge_method": "linear", "models": ["math", "code"]},
                "fusion": {"merge_method": "arcee_fusion", "base_model": "math", "models": ["code"]},
            },
        },
        "bmjax run FILE --check",
    ),
}  # fmt: skip


MERGE = Starter(
    (
        Question("models", "the fine-tuned models, with commas between them", "math_model, code_model"),
        Question("merge_method", "the method; `bmjax merge --help` describes all", "task_arithmetic"),
        Question("base_model", "the model that all were fine-tuned from", "Qwen/Qwen2.5-0.5B"),
    ),
    {},
    "bmjax merge FILE OUT --check",
)
_ABOUT_RECIPE = {
    "merge_method": "or another of `bmjax merge --help`, e.g. ties, arcee_fusion, linear",
    "base_model": "what the models were fine-tuned from: a directory or a hub id",
}
# Keys that stay comments until they are given: their lines.
_RECIPE_KEYS = {
    "dtype": "dtype: bfloat16  # of the result; by default that of the base",
    "chat_template": "chat_template: auto  # the one that most models have",
    "tokenizer": "tokenizer: {source: base}  # or union",
}


def recipe(values: Mapping[str, Any], has_weights: bool, needs_data: bool) -> str:
    """Return the text of a first recipe.

    Arguments:
        values: its keys, `models` a list.
        has_weights: whether the method weights its models; then each gets its share.
        needs_data: whether the method looks at rows of each model's domain.
    """
    lines = ["# How models become one: bmjax merge FILE OUT --check says what would be read, written and noted."]
    first = ("merge_method", "base_model", "models")
    for key in [*(key for key in first if key in values), *(key for key in values if key not in first)]:
        value = values[key]
        if key != "models":
            about = f"  # {_ABOUT_RECIPE[key]}" if key in _ABOUT_RECIPE else ""
            lines.append(f"{key}: {_flow(value)}{about}")
            continue
        lines.append("models:")
        for number, entry in enumerate(value, 1):
            if isinstance(entry, Mapping) or not (has_weights or needs_data):
                lines.append(f"  - {_flow(entry)}")
                continue
            lines.append(f"  - model: {_flow(entry)}")
            if has_weights:
                lines.append(f"    parameters: {{weight: {1 / len(value):.4g}}}")
            if needs_data:
                lines.append(f"    data: rows_{number}.jsonl  # rows of its domain, as `bmjax train` reads them")
    lines += [f"# {line}" for key, line in _RECIPE_KEYS.items() if key not in values]
    return "\n".join([*lines, ""])


def with_answers(starter: Starter, answers: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a starter with the answers, by their dotted keys, in front."""
    values: dict[str, Any] = {}
    for question in starter.questions:
        *blocks, last = question.key.split(".")
        block = values
        for name in blocks:
            block = block.setdefault(name, {})
        block[last] = answers.get(question.key) or question.default
    for key, value in starter.values.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return values


def commented(cls: type[Settings], values: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return the lines of a YAML config: `values`, and each other key of the settings as a comment with its default.

    Taking away the `# ` before a key gives a config that means the same, except for the keys of `eval` of which a known
    task has its own value, as their comments say.
    """
    given, others = [], []
    for name in [*values, *(key for key in cls.model_fields if key not in values)]:
        field = cls.model_fields[name]
        purpose = f"{type_name(field.annotation)}. {field.description or ''}".strip()
        if name not in values:
            if field.default is PydanticUndefined:
                continue  # one of several that may be given
            default = field.default.model_dump() if isinstance(field.default, Settings) else field.default
            others.append(f"{indent}# {name}: {_flow(default)}  # {purpose}")
            continue
        value = values[name]
        block = field.annotation
        if isinstance(value, Mapping) and isinstance(block, type) and issubclass(block, Settings):
            given += [f"{indent}{name}:  # {purpose}", *commented(block, value, indent + "  ")]
            continue
        lines = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=10**6).splitlines()
        if len(lines) == 1:
            given.append(f"{indent}{lines[0]}  # {purpose}")
        else:
            given += [f"{indent}{lines[0]}  # {purpose}", *(indent + line for line in lines[1:])]
    return [*given, *others]


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def schema(cls: type[Settings], command: str) -> str:
    """Return the JSON Schema of a command's config, by which editors complete and check it."""
    return json.dumps(cls.model_json_schema() | {"title": f"bmjax {command}"}, indent=1)
