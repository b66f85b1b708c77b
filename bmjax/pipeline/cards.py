"""What a run adds to the cards of its models once all are scored: scores, lineage, and how they were asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.io.card import NAME, code, dataset_ids, listed, public_name
from bmjax.pipeline.results import Model
from bmjax.pipeline.settings import RunSettings, SourceSettings, as_list
from bmjax.weights.card import add_results, store_sampling, write_copy_card


def write_results(models: Sequence[Model], winner: Model, settings: RunSettings, directory: Path) -> None:
    """Write scores, lineage and sampling into the directories of a run's models. Those that have them stay untouched.

    Arguments:
        models: backbone, branches, merges and mixture; a backbone that the run did not make is left alone.
        winner: the merge that was chosen; its copy is the merged model.
        directory: of the run.
    """
    folders = {model.hf: model for model in models if model.stage is not None}
    folders[str(directory / "merged" / "hf")] = winner
    for folder, model in folders.items():
        splits = ("validation", "test") if (directory / model.scores("validation")).is_dir() else ("test",)
        scores = {split: model.read_scores(directory, split) for split in splits}
        domain = model.name.removeprefix("branch/")
        domains = [domain] if domain in settings.domains and domain != model.name else list(settings.domains)
        datasets = dataset_ids(name for domain in domains for name in _data(settings, domain))
        kind = "merged" if folder != model.hf else model.name
        head = {"datasets": datasets} if datasets else {}
        if not (Path(folder) / NAME).is_file():  # an earlier version of bmjax made the model
            write_copy_card(Path(folder), folder, Path(folder), "A model of a branch-merge run.")
        add_results(Path(folder), kind.removeprefix("merge/"), scores, _lineage(kind, winner, settings), head)
        if settings.evaluate.accuracy:
            store_sampling(Path(folder), settings.evaluate.temperature, settings.evaluate.top_p)


def _data(settings: RunSettings, domain: str) -> list[str]:
    """Return the names of what a domain is trained on."""
    keys = settings.domains[domain]
    sources = [source for source in (keys.problems, keys.train) if isinstance(source, SourceSettings)]
    return [name for source in sources for name in as_list(source.data)] + as_list(keys.traces or [])


def _lineage(name: str, winner: Model, settings: RunSettings) -> str:
    """Return in a paragraph how a model came about."""
    student = "a backbone trained from scratch" if settings.student is None else code(public_name(settings.student))
    domains = listed([code(domain) for domain in settings.domains])
    teacher: Any = settings.teacher.model if any(d.problems for d in settings.domains.values()) else None
    asked = f", whose answers to the problems of each domain were judged and selected. Teacher: {code(teacher)}"
    branches = f"Branch-Merge distillation (arXiv 2503.04872): {student} was trained on {domains}, one branch each"
    kinds = {
        "backbone": f"The backbone of a branch-merge run: where the branches on {domains} start.",
        "mixture": f"The baseline of a branch-merge run: {student} trained on the data of {domains} together",
        "merged": f"{branches}, and the branches were merged. Of the run's merges "
        f"{code(winner.name.removeprefix('merge/'))}, this one, was chosen on the validation rows",
        "merge": f"{branches}, and this is one merge of the branches",
        "branch": f"{branches}; this is the branch of {code(name.removeprefix('branch/'))}",
    }  # fmt: skip
    text = kinds[name.split("/")[0]].rstrip(".")
    return f"{text}. The data came from a teacher{asked}." if teacher else f"{text}."
