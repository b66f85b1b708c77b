"""The table of the TinyR1 paper (arXiv 2503.04872) beside what `bmjax eval` measured, and where each number is from."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from bmjax.io.atomic import write_atomic

TASKS = {"aime24": "AIME 2024", "livecodebench": "LiveCodeBench 24.08-25.02", "gpqa_diamond": "GPQA-Diamond"}

# Accuracy in %, and tokens of an answer where the paper tells them.
_Row = Mapping[str, tuple[float, int | None]]
ROWS: Mapping[str, _Row] = {
    "DeepSeek-R1-Distill-Qwen-32B (backbone)": {
        "aime24": (72.6, 9600), "livecodebench": (57.2, 10100), "gpqa_diamond": (62.1, 5300),
    },
    "DeepSeek-R1-Distill-Llama-70B": {
        "aime24": (70.0, None), "livecodebench": (57.5, None), "gpqa_diamond": (65.2, None),
    },
    "DeepSeek-R1 (teacher)": {
        "aime24": (79.8, 9600), "livecodebench": (65.9, 10400), "gpqa_diamond": (71.5, 5300),
    },
    "math branch": {"aime24": (73.1, None)},
    "code branch": {"livecodebench": (63.4, None)},
    "science branch": {"gpqa_diamond": (64.5, None)},
    "data mixture": {"aime24": (75.3, None), "livecodebench": (61.0, None), "gpqa_diamond": (65.7, None)},
    "merge (math + code) + science": {
        "aime24": (77.3, None), "livecodebench": (63.8, None), "gpqa_diamond": (64.0, None),
    },
    "merge (math + science) + code, TinyR1-32B-Preview": {
        "aime24": (78.1, 11800), "livecodebench": (61.6, 12400), "gpqa_diamond": (65.0, 8600),
    },
}  # fmt: skip
PAPER = "arXiv 2503.04872"


def paper_rows() -> list[dict[str, Any]]:
    """Return the paper's rows: model, source, and for each task accuracy in %, tokens and where it comes from."""
    rows: list[dict[str, Any]] = []
    for name, cells in ROWS.items():
        values = {
            task: {"accuracy": accuracy, "tokens": tokens, "source": PAPER}
            for task, (accuracy, tokens) in cells.items()
        }
        rows.append({"model": name, "source": PAPER, "tasks": values})
    return rows


def measured_row(model: str, scores: Mapping[str, Mapping[str, Any]], folder: str = "") -> dict[str, Any]:
    """Return a row like the paper's of what was measured.

    Arguments:
        model: the measured one.
        scores: by task, as `evaluate` returns them; tasks that the paper lacks are left out.
        folder: the evaluation's output as a reader of the table finds it; empty: the table lies in it.
    """
    measured = {task: _measured(scores[task], folder) for task in TASKS if "accuracy" in scores.get(task, {})}
    return {"model": model, "source": "measured", "tasks": measured}


def _measured(score: Mapping[str, Any], folder: str) -> dict[str, Any]:
    file, count = str(PurePosixPath(folder, score["samples"]["file"])), score["samples"]["count"]
    source = f"{file}, {count} samples: {score['k']} of each problem, {score['n']} problems judged"
    lcb = score.get("lcb_compat") or {}
    return {
        "accuracy": 100 * score["accuracy"], "ci95": [100 * end for end in score["ci95"]],
        "tokens": (score.get("tokens") or {}).get("mean"), "truncated": score["truncated"],
        "unjudged": score["unjudged"], "over_context": score["over_context"], "source": source,
        "file": file, "samples": count, "k": score["k"], "n": score["n"],
        "by_livecodebench": 100 * lcb["accuracy"] if lcb.get("n") else None,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown: accuracy in %, the tokens of an answer in brackets, and a note for each number."""
    notes: list[str] = []
    lines = [f"| model | {' | '.join(TASKS.values())} |", f"|---|{'---|' * len(TASKS)}"]
    for row in rows:
        cells = []
        for task in TASKS:
            cell = row["tasks"].get(task)
            if cell is None:
                cells.append("-")
                continue
            text = f"{cell['accuracy']:.1f}"
            if "ci95" in cell:
                text += f" [{cell['ci95'][0]:.1f}, {cell['ci95'][1]:.1f}]"
            if cell["tokens"] is not None:
                text += f" ({cell['tokens'] / 1000:.1f}k)" if cell["tokens"] >= 1000 else f" ({cell['tokens']:.0f})"
            if row["source"] == "measured":
                rest = [f"{cell['truncated']:.1%} truncated"]
                rest += [f"{cell[key]} {words}" for key, words in _COUNTED.items() if cell[key]]
                if cell["by_livecodebench"] is not None:
                    rest.append(f"{cell['by_livecodebench']:.1f} by LiveCodeBench's own rules")
                notes.append(f"[{len(notes) + 1}] {TASKS[task]}: {cell['source']}; {', '.join(rest)}")
                text += f" [{len(notes)}]"
            cells.append(text)
        name = f"**{row['model']}** (measured)" if row["source"] == "measured" else row["model"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    legend = (
        f"Accuracy in %, mean of all samples; in brackets the 95 % interval over problems, then the mean tokens of an "
        f"answer. All rows but the measured one: {PAPER}, which gives no intervals."
    )
    return "\n".join([*lines, "", legend, *(["", *notes] if notes else [])]) + "\n"


_COUNTED = {"unjudged": "samples could not be judged", "over_context": "samples over the context, counted as wrong"}


def write_table(output: Path, model: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Write OUTPUT/table.md and OUTPUT/table.json."""
    rows = [*paper_rows(), measured_row(model, scores)]
    write_atomic(output / "table.json", json.dumps(rows, indent=1))
    write_atomic(output / "table.md", markdown(rows))
