"""Writes the model card of a merge: README.md, for people and for the hub. Its text is card.md.jinja."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bmjax.io.hub import split_revision
from bmjax.merge.report.statistics import methods_by_step

NAME = "README.md"


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the model card from `report`, the content of merge_report.json.

    Its head is as the hub reads it. Names of models are shown and not obeyed.
    """
    # Ids of hub models, unless directories here have such names.
    names = [split_revision(source["directory"])[0] for source in report["sources"].values()]
    hub_ids = [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "bmjax"]}
    if hub_ids and not any(Path(name).exists() for name in hub_ids):
        head["base_model"] = hub_ids
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"code": _code, "fenced": _fenced, "spec": format, "yaml": _yaml}
    card = environment.get_template("card.md.jinja").render(head=head, report=report, steps=methods_by_step(report))
    (folder / NAME).write_text(card, encoding="utf-8")


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).strip()


def _code(value: Any) -> str:
    """Return a text or number as code that Markdown does not look into, also in a table."""
    plain = " ".join(str(value).split()).replace("|", "\\|")
    fence, space = "`" * (_longest_run(plain) + 1), " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}yaml\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
