"""What is wrong with a run and can be told before its first stage: trainings that do not fit, bad recipes."""

from collections.abc import Mapping
from dataclasses import replace

from bmjax.branch.train import check
from bmjax.config import UserError, nearest
from bmjax.io import hub
from bmjax.merge.recipe.recipe import Recipe, read_recipe
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


def recipe_of(settings: RunSettings, name: str, sources: Mapping[str, str], data: Mapping[str, str]) -> Recipe:
    """Return a merge's recipe as it is run: with its sources and, where it looks at data, with rows, seed and template.

    Arguments:
        name: the merge.
        sources: directories of the backbone and the branches.
        data: each domain's training rows, for models of the recipe that name none.

    Raises:
        UserError: for a recipe that cannot be merged, or names a model that the run has not.
    """
    if "sources" in settings.merges[name]:
        raise UserError(f"merges.{name}: sources are given by the run (backbone and the domains); remove the key")
    try:
        recipe = read_recipe(settings.merges[name] | {"sources": dict(sources)}, data=data)
    except UserError as error:
        raise UserError(f"merges.{name}: {str(error).removeprefix('recipe: ')}") from None
    for model in recipe.inputs:
        if model not in sources:
            raise UserError(f"merges.{name}: no model is named '{model}'{nearest(model, list(sources))}")
    if not recipe.is_calibrated:
        return recipe
    template = {"template": settings.template}
    steps = tuple(
        replace(step, calibration=step.calibration.model_copy(update=template))
        if step.calibration is not None and "template" not in step.calibration.model_fields_set
        else step
        for step in recipe.steps
    )
    return replace(recipe, steps=steps, seed=recipe.seed + settings.seed)
