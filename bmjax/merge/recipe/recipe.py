"""Merge recipes: mergekit-style YAML, or named `steps:` of such blocks, read into checked, frozen steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bmjax.config import UserError, nearest
from bmjax.io.hub import split_revision
from bmjax.merge.recipe.step import Slice, Step, build
from bmjax.merge.recipe.tokenizer import TokenizerPlan, chat_template, tokenizer_plan
from bmjax.merge.recipe.yaml_blocks import StepBlock, TopBlock, read_blocks

__all__ = ["Recipe", "Slice", "Step", "read_recipe"]


@dataclass(frozen=True)
class Recipe:
    """Merges in order; the last one's result is written. `text` is what was asked for, as plain values.

    dtype: what the result is rounded to. seed: of random masks. compat: 'mergekit' where its arithmetic is asked for.
    tokenizer None: the donor's files are copied. chat_template: jinja, None for the donor's.
    """

    steps: tuple[Step, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    notes: tuple[str, ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    compat: str | None = None
    tokenizer: TokenizerPlan | None = None
    chat_template: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the models that are read, not made, in order of first use."""
        made = {step.name for step in self.steps}
        return tuple(dict.fromkeys(name for step in self.steps for name in step.models if name not in made))

    @property
    def donor(self) -> str:
        """The input whose config, tokenizer and storage types the result takes: the last step's base, traced back."""
        steps = {step.name: step for step in self.steps}
        name = self.steps[-1].donor
        while name in steps:
            name = steps[name].donor
        return name

    def revision(self, name: str) -> str | None:
        """The hub revision asked for: what follows @ in `org/name@revision`."""
        return split_revision(self.sources.get(name, name))[1]


def read_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or a mapping, then `key.sub=value` overrides (`steps.NAME.key=value` for a step).

    Several YAML documents are steps, the one without a name (or the last) being the result. Raises UserError, one
    line, for a missing file, bad YAML, an unknown key, method, parameter or model name, a missing base_model or a
    wrong number of models.
    """
    where, top, blocks = read_blocks(source, overrides)
    blocks = [
        (at, block if block.name else block.model_copy(update={"name": _free_name(block)})) for at, block in blocks
    ]
    names = [str(block.name) for _, block in blocks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two steps are named '{name}'; every step needs its own name")
        if name in top.sources:
            raise UserError(f"{where}: '{name}' is a step and an alias of sources; rename one of them")
    notes: list[str] = []
    steps = tuple(build(block, at, notes) for at, block in blocks)
    _check_order(steps, where)
    last = blocks[-1][1]
    for at, block in blocks[:-1]:
        if (block.dtype or block.out_dtype) and top.compat is None:
            notes.append(f"{at}: dtype has no effect: steps stay float32 in memory, only the last one is rounded")
    dtype = last.out_dtype or last.dtype or top.out_dtype or top.dtype
    recipe = Recipe(steps, top.sources, dtype, tuple(notes), _text(top, blocks, dtype), top.seed, top.compat)
    return _with_tokens(recipe, top, where)


def _with_tokens(recipe: Recipe, top: TopBlock, where: str) -> Recipe:
    try:
        plan, template = tokenizer_plan(top.tokenizer_source, top.tokenizer), chat_template(top.chat_template)
        for name in plan.models if plan else ():
            if name not in recipe.inputs:
                raise UserError(f"tokenizer.tokens: '{name}' is not a model here{nearest(name, recipe.inputs)}")
        if plan and plan.source in {step.name for step in recipe.steps}:
            raise UserError(f"tokenizer: '{plan.source}' is a step; name the model whose tokenizer it has")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe if plan is None and template is None else replace(recipe, tokenizer=plan, chat_template=template)


def _text(top: TopBlock, blocks: Sequence[tuple[str, StepBlock]], dtype: str | None) -> dict[str, Any]:
    steps = [{k: v for k, v in block.model_dump(mode="json").items() if v not in (None, {})} for _, block in blocks]
    rest = {k: v for k, v in top.model_dump(mode="json", exclude_defaults=True).items() if "dtype" not in k}
    return {"sources": top.sources, "steps": steps, "dtype": dtype, **rest}


def _free_name(block: StepBlock) -> str:
    """A name for the only step that none of its models has."""
    models = [entry.get("model") if isinstance(entry, Mapping) else entry for entry in block.models or ()]
    models += [source.model for part in block.slices or () for source in part.sources]
    taken = [block.base_model, block.parameters.get("rebase"), *models]
    return next(name for name in ("merged", "merge", "result", "student") if name not in taken)


def _check_order(steps: Sequence[Step], where: str) -> None:
    names, used = [step.name for step in steps], set()
    for i, step in enumerate(steps):
        for model in step.models:
            if model in names[i:]:
                when = "itself" if model == step.name else f"step '{model}', which is made after it"
                raise UserError(f"{where}: step '{step.name}' reads {when}; a step may read earlier ones only")
            used.add(model)
    for name in names[:-1]:
        if name not in used:
            raise UserError(f"{where}: no later step reads step '{name}'; remove it, or name it where it is meant")
