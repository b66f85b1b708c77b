"""What a selection tells about itself: the table, examples of every rule, and a data card on the form of the hub."""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from bmjax.io.card import fenced, public_values, yaml_text
from bmjax.teach.selection.rules import REASONS
from bmjax.teach.settings import SelectSettings
from bmjax.version import __version__

Table = dict[str, dict[str, int]]
Examples = dict[str, dict[str, dict[str, Any]]]  # domain -> reason -> count, causes, examples

# Licences that publishers state, by a part of the name of a source or of a teacher, in small letters.
_LICENCES = {
    "gsm8k": "MIT", "math-500": "MIT", "numinamath": "Apache-2.0", "openr1-math": "Apache-2.0",
    "openthoughts": "Apache-2.0", "humaneval": "MIT", "mbpp": "CC-BY-4.0",
    "deepseek-r1": "MIT (outputs may be trained on)", "qwq": "Apache-2.0", "qwen3": "Apache-2.0",
}  # fmt: skip
_SETTINGS_LEFT_OUT = {"traces", "output", "shard", "join", "show"}


def render_table(table: Table) -> str:
    """Render the table as text: a row for each domain, a column for each reason that occurs."""
    reasons = [reason for reason in REASONS if any(row.get(reason) for row in table.values())]
    rows = [["domain", "traces", "kept", *reasons]]
    for domain, counts in table.items():
        total = sum(counts.values())
        kept = f"{counts['kept']} ({100 * counts['kept'] / total:.0f}%)" if total else "0"
        rows.append([domain, str(total), kept, *(str(counts.get(reason, 0)) for reason in reasons)])
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows)


def render_examples(examples: Examples, number: int) -> str:
    """Render examples as text: what was kept, and what each rule dropped and why."""
    lines = []
    for domain, reasons in examples.items():
        for reason, entry in reasons.items():
            causes = ", ".join(f"{cause} {count}" for cause, count in entry["causes"].items() if cause)
            lines.append(f"\n== {domain}: {reason}, {entry['count']}{f' ({causes})' if causes else ''}")
            for example in entry["examples"][:number]:
                detail = f"  [{example['detail']}]" if example.get("detail") else ""
                lines.append(f"-- {example['id'][:16]}{detail}")
                for name in ("prompt", "reasoning", "response"):
                    if example.get(name):
                        lines.append(f"   {name}: {_one_line(example[name])}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """Return a text on one line, without characters that could steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def excerpt(fields: Mapping[str, Any], detail: str = "") -> dict[str, str]:
    """Return the beginning of a prompt and the beginning and end of what was answered."""

    def short(text: str, size: int) -> str:
        return text if len(text) <= size else f"{text[: size // 2]} ... {text[-(size // 2) :]}"

    parts = {name: short(str(fields.get(name) or ""), 300) for name in ("prompt", "reasoning", "response")}
    return parts | ({"detail": detail} if detail else {})


def data_card(
    settings: SelectSettings,
    table: Table,
    examples: Examples,
    census: Counter[tuple[str, str, str]],
    sources: Mapping[str, Sequence[tuple[str, int]]],
) -> str:
    """Write the README.md of the data sets.

    Arguments:
        census: how many traces there were by (domain, "teacher" or "judge", name).
        sources: (name, kept traces) of every domain.
    """
    origins = {name for (_, kind, name) in census if kind == "teacher"} | {
        n for rows in sources.values() for n, _ in rows
    }
    stated = {name: text for name in origins for part, text in _LICENCES.items() if part in name.lower()}
    identifiers = {text.split()[0].lower() for text in stated.values()}
    front = {
        # One license is claimed where all sources and teachers are known to have it.
        **({"license": identifiers.pop()} if stated.keys() == origins and len(identifiers) == 1 else {}),
        "configs": [{"config_name": domain, "data_files": f"{domain}.jsonl"} for domain in table],
        "task_categories": ["text-generation"],
        "tags": ["reasoning", "distillation", "synthetic", "bmjax"],
    }
    lines = [
        "---", yaml_text(front), "---", "",
        "# Reasoning traces", "",
        "Traces of a teacher, selected by `bmjax select`. A row has `prompt`, `reasoning` (what the teacher thought), "
        "`response` (what it answered), `reference` (the answer that is known) and `id`.", "",
        "| domain | traces | kept |", "|---|---:|---:|",
        *(f"| {domain} | {sum(counts.values()):,} | {counts['kept']:,} |" for domain, counts in table.items()),
    ]  # fmt: skip
    for domain, counts in table.items():
        lines += ["", f"## {_cell(domain)}", "", "| dropped | traces | why |", "|---|---:|---|"]
        for reason, count in counts.items():
            if reason != "kept" and count:
                causes = examples[domain].get(reason, {}).get("causes", {})
                names = ", ".join(f"{_cell(cause)} {number:,}" for cause, number in causes.items() if cause)
                lines.append(f"| {reason} | {count:,} | {REASONS[reason]}{f': {names}' if names else ''} |")
        for kind, title in (("teacher", "Asked of"), ("judge", "Judged by")):
            of_kind = [(name, count) for (*key, name), count in census.most_common() if key == [domain, kind]]
            listed = ", ".join(f"{_cell(name)} ({count:,})" for name, count in of_kind[:10])
            lines += ["", f"{title}: {listed or 'not said'}"]
        lines += ["", "Kept by source: " + (", ".join(f"{_cell(n)} ({c:,})" for n, c in sources[domain]) or "none")]
    known = {f"{_cell(name)}: {text}" for name, text in stated.items()}
    asked = settings.model_dump(exclude_defaults=True, exclude=_SETTINGS_LEFT_OUT, mode="json")
    changed = "# settings beside defaults\n" + (yaml_text(public_values(asked)) if asked else "")
    first = next(iter(table))
    packages = {"bmjax": __version__, "python": platform.python_version(), "datasketch": version("datasketch")}
    lines += [
        "", "## Licences", "",
        *(sorted(f"- {line}" for line in known) or ["- not known: see the problems and the terms of the teacher"]),
        "", "## How it was made", "",
        f"Versions: {', '.join(f'{name} {number}' for name, number in packages.items())}.", "",
        fenced(changed.rstrip()), "",
        "## How to load it", "",
        "```python",
        "from datasets import load_dataset",
        f'rows = load_dataset("json", data_files="{first}.jsonl", split="train")',
        f'# from the hub: rows = load_dataset("ORG/NAME", "{first}", split="train")',
        "",
        "# TRL: a prompt and its completion, as conversations",
        'rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": [{',
        '    "role": "assistant", "content": f"<think>\\n{row[\'reasoning\']}\\n</think>\\n{row[\'response\']}"}]})',
        "```", "",
        f"bmjax reads it as it is: `bmjax train CONFIG data={first}.jsonl`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a name for a cell of a table in Markdown."""
    return _one_line(public_values(text)).replace("|", "\\|").replace("<", "&lt;")[:120]


def causes_of(counts: Sequence[tuple[str, str, str, int]]) -> Examples:
    """Return counts by domain, reason and cause, with no examples yet."""
    entries: Examples = {}
    for domain, reason, cause, number in counts:
        entry = entries.setdefault(domain, {}).setdefault(reason, {"count": 0, "causes": {}, "examples": []})
        entry["count"] += number
        entry["causes"][cause] = number
    order = ["kept", *REASONS]
    return {d: dict(sorted(reasons.items(), key=lambda item: order.index(item[0]))) for d, reasons in entries.items()}


def identity(settings: SelectSettings, states: Sequence[Any]) -> str:
    """Return what parts must have in common to be joined: the settings and the state of the files."""
    asked = settings.model_dump(exclude={"output", "shard", "join", "show"}, mode="json")
    return json.dumps([asked, states], sort_keys=True)
