"""The recipes of a run's merges: their sources, rows, template and seed, and whether their rows will do.

Called by phases.py. The models need not be there; a merge opens them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bmjax.calibrate import check
from bmjax.chat.template import chat_template
from bmjax.config import UserError, nearest
from bmjax.io.rows import read_rows
from bmjax.merge.recipe.recipe import Recipe, read_recipe
from bmjax.pipeline.results import Round
from bmjax.pipeline.rows import DomainRows, measures
from bmjax.pipeline.settings import RunSettings

SPLITS = ("train", "validation")  # what merges look at: to learn from, and to be judged by
_IMPORTANCES = (
    "; set branch.importances: true, and `parameters: {importance: NAME_importances}` at every model, NAME its domain"
)


def recipe_of(
    settings: RunSettings, name: str, part: Round, rows: Mapping[str, DomainRows], dtype: str | None = None
) -> Recipe:
    """Return a merge's recipe with its sources and, where it looks at data, with rows, seed and template.

    The sources are backbone, the branches by their domains, and NAME_importances of branches that write them. The rows
    to judge by are those of the validation split, where it has texts.

    Arguments:
        part: the round whose branches are merged; its start is the recipe's `backbone`.
        rows: of every domain.
        dtype: of the result, unless the recipe says it.
    """
    keys = settings.merges[name]
    sources = {
        f"{domain}_importances": str(Path(model.hf).with_name("importances"))
        for domain, model in part.branches.items()
        if settings.branch_training(domain).importances
    }
    sources |= {"backbone": part.start.hf} | {domain: model.hf for domain, model in part.branches.items()}
    if dtype is not None and not keys.keys() & {"dtype", "out_dtype"}:
        keys = keys | {"dtype": dtype}
    # The result has the template that all branches were trained with.
    template = _branch_template(settings)
    if template is not None and "chat_template" not in keys:
        keys = keys | {"chat_template": chat_template(None, template)}
    if "sources" in keys:
        raise UserError(f"merges.{name}: sources are given by the run (backbone and the domains); remove the key")
    try:
        data = {domain: str(of_domain.file("train")) for domain, of_domain in rows.items()}
        recipe = read_recipe(keys | {"sources": sources}, data=data, held_out_data=_judging_rows(rows))
    except UserError as error:
        hint = _IMPORTANCES if "needs parameter 'importance'" in str(error) else ""
        raise UserError(f"merges.{name}: {str(error).removeprefix('recipe: ')}{hint}") from None
    for model in recipe.inputs:
        if model not in sources:
            of_a_branch = model.endswith("_importances") and model.removesuffix("_importances") in settings.domains
            hint = _IMPORTANCES if of_a_branch else nearest(model, list(sources))
            raise UserError(f"merges.{name}: no model is named '{model}'{hint}")
    if not recipe.is_calibrated:
        return recipe
    steps = list(recipe.steps)
    for i, step in enumerate(steps):
        if step.calibration is not None and "template" not in step.calibration.model_fields_set:
            calibration = step.calibration.model_copy(update={"template": template or settings.template})
            steps[i] = replace(step, calibration=calibration)
    return replace(recipe, steps=tuple(steps), seed=recipe.seed + settings.seed)


def _branch_template(settings: RunSettings) -> str | None:
    """Return the chat template that all branches are trained with; None for the backbone's own, or for several."""
    names = {settings.branch_training(domain).template or settings.template for domain in settings.domains}
    return names.pop() if len(names) == 1 else None


def _judging_rows(rows: Mapping[str, DomainRows]) -> dict[str, str]:
    """Return the validation rows of every domain that has texts there, or whose rows are still to be written."""
    files = {}
    for name, of_domain in rows.items():
        file = of_domain.file("validation")
        if file.exists():
            location, row = next(read_rows(file))
            if not measures(row, location)[1]:
                continue  # questions with references alone
        files[name] = str(file)
    return files


def row_stages(rows: Mapping[str, DomainRows]) -> tuple[str, ...]:
    """Return the stages that write the rows which merges look at."""
    return tuple(dict.fromkeys(of_domain.stage(split) for of_domain in rows.values() for split in SPLITS))


def check_rows(recipes: Mapping[str, Recipe], backbone: str) -> list[str]:
    """Return what merges will say of their rows, in lines; UserError for what one would refuse.

    recipes: by the merges' names. backbone: has the config and the tokenizer that all models will have.
    """
    lines = []
    for name, recipe in recipes.items():
        try:
            lines += [f"merge/{name}: {line}" for line in check.check_rows(recipe, backbone)]
        except UserError as error:
            raise UserError(f"merges.{name}: {error}") from None
    return lines


def notes(recipe: Recipe) -> list[str]:
    """Return what a recipe has to say before its models are there, for `--check`."""
    return [f"note: {line}" for line in recipe.notes]
