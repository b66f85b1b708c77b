"""Compares two evaluations of the same tasks, problem by problem: paired differences, their intervals, and the flips.

Two models that answer the same problems differ by less chance than their two intervals say, for a hard problem is hard
for both. So the difference is taken within each problem, and the bootstrap draws problems.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.evaluate.samples import Sample, read_samples, samples_file
from bmjax.evaluate.score import interval
from bmjax.io import bucket

SHOWN, LONGEST_NAME = 10, 40  # flipped problems of a task in text, and letters of a problem's name

Shares = dict[str, tuple[float, int]]  # of each problem: the share of right samples, and how many were judged


def compare(first: str, second: str, seed: int = 0) -> dict[str, Any]:
    """Compare the second evaluation with the first on the problems that both have judged.

    Arguments:
        first, second: output directories of `bmjax eval`, their scores.json, or a file of samples each.
        seed: of the bootstrap.

    Returns:
        first and second, and tasks, by name: problems (shared), before and after (mean shares), difference, ci95 and
        ci95_by of it, better and worse (problems by the sign of their difference), right_to_wrong and wrong_to_right
        (problems whose majority of samples flipped), only_first and only_second (problems that the other lacks).

    Raises:
        UserError: for what is no evaluation, and for samples of different tasks or prompts.
    """
    left, right = _read(first), _read(second)
    shared = [name for name in left if name in right]
    if not shared:
        raise UserError(
            f"--compare: {first} has samples of {', '.join(left)}, {second} of {', '.join(right)}: no task is in both"
        )
    tasks = {name: _compare_task(name, left[name], right[name], seed) for name in shared}
    unshared = {"only_first": [n for n in left if n not in right], "only_second": [n for n in right if n not in left]}
    return {"first": first, "second": second, "tasks": tasks} | unshared


def _read(name: str) -> dict[str, list[Sample]]:
    """Return the samples of an evaluation by task."""
    path = bucket.local(name)
    folder = path.parent if path.name in ("scores.json", "samples") else path
    files = [path] if path.is_file() and path.name != "scores.json" else _sample_files(name, folder)
    tasks: dict[str, list[Sample]] = {}
    for file in files:
        for sample in read_samples(file).values():
            if not {"problem", "sample", "prompt", "task"} <= sample.keys():
                raise UserError(f"{file}: a line that is no sample of `bmjax eval`; evaluate again with this version")
            tasks.setdefault(str(sample["task"]), []).append(sample)
    if not tasks:
        raise UserError(f"--compare: {name}: no samples; expected a directory that `bmjax eval` wrote")
    return tasks


def _sample_files(name: str, folder: Path) -> list[Path]:
    """Return the files of an evaluation's samples: of the tasks that it scored, for those dropped since stay there."""
    if not (folder / "samples").is_dir():
        return []
    file = folder / "scores.json"
    if not file.is_file():
        raise UserError(f"--compare: {name}: no scores.json; the evaluation is not complete, run it to its end")
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
        tasks = [task for task, score in scores.items() if "accuracy" in score]
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"--compare: {file}: no scores of `bmjax eval`; the same evaluation writes it anew") from None
    files = [samples_file(folder, task) for task in tasks]
    for path in files:
        if not path.is_file():
            raise UserError(f"--compare: {path}: missing, though {file} has its score; evaluate again")
    return files


def _compare_task(name: str, left: list[Sample], right: list[Sample], seed: int) -> dict[str, Any]:
    prompts = {(sample["problem"], sample["sample"]): sample["prompt"] for sample in left}
    for sample in right:
        key = (sample["problem"], sample["sample"])
        if key in prompts and prompts[key] != sample["prompt"]:
            raise UserError(
                f"--compare: {name}: problem {key[0]}, sample {key[1]} was asked with another prompt in the other "
                "evaluation; compare evaluations of the same questions, instruction, and seed of the options' orders"
            )
    before, after = _shares(left), _shares(right)
    problems = [problem for problem in before if problem in after]
    if not problems:
        raise UserError(f"--compare: {name}: no problem was judged in both evaluations")
    differences = [after[problem][0] - before[problem][0] for problem in problems]
    ends, by = _difference_interval(differences, seed)

    # A problem flips where the majority of its samples does: from more than half right to less, or back.
    flips: dict[str, list[str]] = {"right_to_wrong": [], "wrong_to_right": []}
    for problem in problems:
        was, now = before[problem][0], after[problem][0]
        if was > 0.5 > now:
            flips["right_to_wrong"].append(problem)
        elif was < 0.5 < now:
            flips["wrong_to_right"].append(problem)
    return {
        "problems": len(problems),
        "before": sum(before[problem][0] for problem in problems) / len(problems),
        "after": sum(after[problem][0] for problem in problems) / len(problems),
        "difference": sum(differences) / len(differences), "ci95": ends, "ci95_by": by,
        "better": sum(difference > 0 for difference in differences),
        "worse": sum(difference < 0 for difference in differences), **flips,
        "only_first": sum(problem not in after for problem in before),
        "only_second": sum(problem not in before for problem in after),
        "samples": [sum(shares[problem][1] for problem in problems) for shares in (before, after)],
    }  # fmt: skip


def _shares(samples: list[Sample]) -> Shares:
    """Return the share of right answers among the judged samples of each problem that has any."""
    outcomes: dict[str, list[bool]] = {}
    for sample in samples:
        if sample.get("verdict") in ("right", "wrong"):
            outcomes.setdefault(str(sample["problem"]), []).append(sample["verdict"] == "right")
    return {problem: (sum(right) / len(right), len(right)) for problem, right in outcomes.items()}


def _difference_interval(differences: list[float], seed: int) -> tuple[list[float], str]:
    """Return the 95 % interval of the mean difference.

    Where all problems differ alike the bootstrap knows nothing of the others; then Wilson's interval of that share, as
    if it were one of problems that changed, bounds it on both sides.
    """
    if min(differences) < max(differences):
        return interval(differences, seed)
    size = abs(differences[0])
    (low, high), by = interval([size] * len(differences), seed)
    width = max(size - low, high - size)
    return [max(-1.0, differences[0] - width), min(1.0, differences[0] + width)], by


def _cut(problems: Sequence[str]) -> str:
    """Return a list of problems that fits a few lines of a terminal; --json has them all."""
    most = SHOWN if len(problems) > SHOWN + 1 else len(problems)  # "and 1 more" would be no shorter
    shown = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in problems[:most])
    return shown if most == len(problems) else f"{shown} and {len(problems) - most:,} more (--json lists all)"


def lines(comparison: Mapping[str, Any]) -> list[str]:
    """Return a comparison as lines of text, with the first of many flipped problems."""
    text = [f"{comparison['second']} against {comparison['first']}"]
    for name, task in comparison["tasks"].items():
        low, high = (f"{100 * end:+.1f}" for end in task["ci95"])
        sure = "" if task["ci95"][0] > 0 or task["ci95"][1] < 0 else ", not told from no difference"
        text.append(
            f"{name}: {100 * task['before']:.1f} % -> {100 * task['after']:.1f} %, difference "
            f"{100 * task['difference']:+.1f} points, 95 % interval [{low}, {high}] by {task['ci95_by']}{sure}; "
            f"{task['problems']} problems ({task['better']} better, {task['worse']} worse), "
            f"{task['samples'][0]} and {task['samples'][1]} samples"
        )
        for key, words in (("right_to_wrong", "right -> wrong"), ("wrong_to_right", "wrong -> right")):
            if task[key]:
                text.append(f"  {words} ({len(task[key])}): {_cut(task[key])}")
        if task["only_first"] or task["only_second"]:
            text.append(
                f"  left out: {task['only_first']} problems that only the first has judged, {task['only_second']} only "
                "the second"
            )
    for key, words in (("only_first", "the first"), ("only_second", "the second")):
        if comparison[key]:
            text.append(f"only in {words}: {', '.join(comparison[key])}")
    return text
