"""Writes the model card of a merge: README.md, for people and for the hub. Its text is card.md.jinja."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmjax.io.card import bases, is_word, license_fields, listed, public_name, public_values, read_head
from bmjax.merge.report.statistics import methods_by_step, reference_of
from bmjax.weights import card


def write_card(folder: Path, report: Mapping[str, Any], directories: Mapping[str, Sequence[Path]]) -> None:
    """Write the model card of the result in `folder`.

    Its head is as the hub reads it. Names of models are shown and not obeyed; directories are called by their last
    part, for no reader has them.

    Arguments:
        report: the content of merge_report.json.
        directories: of each input its model's and its adapter's, whose own cards name their bases and licenses.
    """
    heads = {name: [read_head(path) for path in directories.get(name, ())] for name in report["sources"]}
    named = {name: [head["license"] for head in parts if is_word(head.get("license"))] for name, parts in heads.items()}
    steps = methods_by_step(report)
    taken = {model for step in steps for model in report["total"][step]["models"]}
    names = [public_name(name) for name in report["sources"] if name in taken] or ["models"]
    base_ids = [base for name, source in report["sources"].items() for base in bases(source["directory"], heads[name])]
    head: dict[str, Any] = {"tags": ["merge", "bmjax"]}
    if base_ids:
        head |= {"base_model": list(dict.fromkeys(base_ids)), "base_model_relation": "merge"}
    card.write_card(
        folder,
        title=f"A merge of {listed(names)}",
        head=head | license_fields(part for parts in heads.values() for part in parts),
        versions=report["versions"],
        template=Path(__file__).with_name("card.md.jinja"),
        report=report,
        judged_by=_judged_by(report["recipe"]),
        steps=steps,
        references={name: reference_of(report, name) for name in steps},
        licenses={name: ", ".join(dict.fromkeys(words)) for name, words in named.items() if words},
        recipe=public_values({key: value for key, value in report["recipe"].items() if value is not None}),
    )


def _judged_by(recipe: Mapping[str, Any]) -> str:
    """Return where the held-out rows of a merge that looks at data come from."""
    entries = [entry for step in recipe["steps"] for entry in step.get("models", ()) if isinstance(entry, Mapping)]
    if all("held_out_data" in entry for entry in entries if "data" in entry):
        return "rows of `held_out_data`, which no model was to be trained on"
    return "rows that were set aside of `data`: too low where a model was trained on them"
