"""What is wrong with a run and can be told before its first stage: trainings that do not fit, bad recipes."""

from collections.abc import Mapping
from typing import Any

from bmjax.branch.train import check
from bmjax.calibrate.recipe import CalibratedRecipe, is_calibrated
from bmjax.config import UserError, nearest
from bmjax.io import hub
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.model.config import ModelConfig
from bmjax.pipeline import student
from bmjax.pipeline.settings import RunSettings


def check_trainings(settings: RunSettings) -> None:
    """Raise UserError for a training that does not fit the student or the devices."""
    if settings.model is None:
        assert settings.student is not None  # the settings hold one of the two
        config = ModelConfig.from_dir(hub.model_directory(settings.student))
    else:
        vocab_size = len(student.open_tokenizer(settings.model))
        config = ModelConfig.from_hf(student.hf_config_of(settings.model, vocab_size), "model")
    trainings = {
        f"domains.{name}.branch" if domain.branch else "branch": settings.branch_training(name)
        for name, domain in settings.domains.items()
    }
    if settings.backbone is not None:
        trainings["backbone"] = settings.backbone
    for key, training in (trainings | {"mixture": settings.mixture_training(1)}).items():
        try:
            check(training, config)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def recipe_of(settings: RunSettings, name: str, sources: Mapping[str, str], data: Mapping[str, str]) -> dict[str, Any]:
    """Return a merge's recipe as it is run: with its sources and, where it looks at data, with rows, seed and template.

    Arguments:
        name: the merge.
        sources: directories of the backbone and the branches.
        data: each domain's training rows, for models of the recipe that name none.

    Raises:
        UserError: for a recipe that cannot be merged, or names a model that the run has not.
    """
    recipe = settings.merges[name]
    if "sources" in recipe:
        raise UserError(f"merges.{name}: sources are given by the run (backbone and the domains); remove the key")
    complete = recipe | {"sources": dict(sources)}
    if is_calibrated(recipe):
        models, seed, parameters = recipe.get("models"), recipe.get("seed", 0), recipe.get("parameters") or {}
        if isinstance(models, list):
            entries = [{"model": entry} if isinstance(entry, str) else entry for entry in models]
            models = [
                {"data": data[entry["model"]], **entry}
                if isinstance(entry, dict) and entry.get("model") in settings.domains
                else entry
                for entry in entries
            ]
        if isinstance(seed, int):
            seed += settings.seed
        if isinstance(parameters, dict):
            parameters = {"template": settings.template, **parameters}
        complete |= {"models": models, "seed": seed, "parameters": parameters}
    try:
        inputs = CalibratedRecipe.read(complete).inputs if is_calibrated(recipe) else read_recipe(complete).inputs
    except UserError as error:
        raise UserError(f"merges.{name}: {str(error).removeprefix('recipe: ')}") from None
    for model in inputs:
        if model not in sources:
            raise UserError(f"merges.{name}: no model is named '{model}'{nearest(model, list(sources))}")
    return complete
