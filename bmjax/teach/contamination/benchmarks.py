"""Reads the questions of benchmarks, so that a training set can be checked against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.config import UserError, nearest
from bmjax.io.hub import is_data_file, is_dataset_id
from bmjax.io.rows import Row, fill, is_here, read_rows
from bmjax.teach.benchmarks import BENCHMARKS, benchmark_name
from bmjax.teach.settings import BenchmarkSettings

# Columns that hold the question of a benchmark that no template describes.
COLUMNS = (
    "question", "problem", "prompt", "Question", "Problem", "question_content", "question_text", "query", "instruction",
    "text", "input",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question that must not be trained on, and the benchmark that asks it."""

    benchmark: str
    text: str


def read_benchmarks(names: Sequence[str | BenchmarkSettings]) -> list[Question]:
    """Read the questions of benchmarks.

    Arguments:
        names: names of BENCHMARKS, files or hub data sets; a block names the template of the questions, too.

    Raises:
        UserError: for an unknown name, a benchmark that cannot be had, and rows without a known column.
    """
    questions = []
    for entry in names:
        name = entry if isinstance(entry, str) else entry.data
        template = None if isinstance(entry, str) else entry.prompt
        source = None if is_here(name) else BENCHMARKS.get(benchmark_name(name))
        if source is None and "/" not in name and not is_here(name) and not is_data_file(Path(name)):
            known = nearest(name, list(BENCHMARKS))
            raise UserError(f"decontaminate: no benchmark '{name}'{known}; a file or a hub data set org/name will do")
        data = source.data if source else name
        try:
            for location, row in read_rows(data, "decontaminate"):
                questions.append(
                    Question(name, _question(row, location, template or (source.prompt if source else "")))
                )
        except UserError as error:
            if source is None or not is_dataset_id(data):
                raise
            raise UserError(f"{error}; without the hub, name a file: decontaminate: [{name}.jsonl]") from None
    return questions


def _question(row: Mapping[str, Any], location: str, template: str) -> str:
    if template:
        return str(fill(template, row, location, "decontaminate.prompt"))
    column = next((column for column in COLUMNS if isinstance(row.get(column), str)), None)
    if column is None:
        names = ", ".join(sorted(map(str, row))[:8])
        raise UserError(
            f"{location}: decontaminate: which column holds the question? There are {names}; "
            'say {data: FILE, prompt: "{COLUMN}"}'
        )
    return str(row[column])


def held_out_questions(data: str | Sequence[str], prompt: str) -> list[Question]:
    """Read the prompts of held-out rows. prompt: the template of a row's prompt."""
    rows: Sequence[Row] | Any = read_rows(data, "held_out") if data else ()
    return [Question("held_out", str(fill(prompt, row, location, "held_out_prompt"))) for location, row in rows]
