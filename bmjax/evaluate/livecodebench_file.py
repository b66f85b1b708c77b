"""Writes judged programs in LiveCodeBench's own layout, for its tools and for those that read its files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.evaluate.livecodebench_form import program_of
from bmjax.evaluate.questions import Asked
from bmjax.evaluate.score import accuracy
from bmjax.io.atomic import write_atomic

# The fields of a row that LiveCodeBench copies into its results.
_COLUMNS = (
    "question_title", "question_content", "platform", "question_id", "contest_id", "contest_date", "starter_code",
    "difficulty",
)  # fmt: skip


def write_file(
    output: str | Path,
    task: str,
    problems: Sequence[Sequence[Asked]],
    samples: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Write OUTPUT/lcb/TASK_eval_all.json, which `lcb_runner.evaluation.compute_scores --eval_all_file` reads.

    Arguments:
        problems: the samples of each problem.
        samples: by id, with `answer` and `lcb`.
        seed: of the bootstrap.

    Returns:
        accuracy, ci95, ci95_by, n, k and unjudged by these verdicts, and the file. In the file, which knows only right
        and wrong, a program that this machine could not judge is wrong.
    """
    entries, outcomes = [], []
    for group in problems:
        answers = [str(samples[asked.id]["answer"]) for asked in group]
        graded = [samples[asked.id].get("lcb") for asked in group]
        outcomes.append(graded)
        row = group[0].question.row
        entry = {column: row.get(column, "") for column in _COLUMNS}
        entry |= {"question_id": str(row.get("question_id") or group[0].question.problem)}
        entry |= {"output_list": answers, "code_list": [program_of(answer) for answer in answers]}
        entry |= {"graded_list": [bool(passed) for passed in graded]}
        entries.append(entry | {"pass@1": sum(map(bool, graded)) / len(graded), "metadata": ["{}"] * len(graded)})
    file = Path("lcb") / f"{task}_eval_all.json"
    write_atomic(Path(output) / file, json.dumps(entries, indent=1, default=str))
    if all(passed is None for graded in outcomes for passed in graded):
        return {"accuracy": None, "n": 0, "file": str(file)}
    return accuracy(outcomes, seed) | {"file": str(file)}
