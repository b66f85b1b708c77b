"""Whether the models of a step that looks at data are the base's architecture with other weights, known from headers.

Every model is run as the base's config.json says. One whose own config computes otherwise would be measured as what it
is not, so it is refused by name, key and values. Called by dispatch.py, for `--check`, too.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from bmjax.config import UserError
from bmjax.merge.plan.layout import read_config
from bmjax.merge.plan.nodes import MergePlan
from bmjax.merge.recipe.step import Step
from bmjax.model.config import ModelConfig
from bmjax.weights import hf
from bmjax.weights.tokenizer import stored_template

# Names of config.json; what is not here changes no number that a model computes.
_COMPUTED = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings", "windows": "sliding_window",
}  # fmt: skip
_ADVICE = {
    "vocab_size": "write tokenizer_source: base (or union) to give all the same tokens",
    "tied": "save one of them with the head as the other has it, and with the key",
}


def check_models(plan: MergePlan, step: Step, config: ModelConfig) -> None:
    """Raise UserError for a model of a step that cannot be run with the base's config, or lacks tensors of it.

    config: of the step's base.
    """
    base = plan.recipe.donor_of(step.donor)
    # With a tokenizer of the result's own, rows of tokens and heads become those of the donor first.
    passed_over = {"vocab_size", "tied"} if plan.recipe.tokenizer is not None else set()
    for name in step.reads:
        if name not in plan.models:
            continue  # an earlier step's result, which has the tensors of its base
        stored = read_config(plan.models[name])
        if name != base and stored:
            _check_config(name, ModelConfig.from_hf(stored, f"model '{name}': config.json"), base, config, passed_over)
        if plan.recipe.tokenizer is None:
            hf.check_params(plan.models[name], config, f"model '{name}'")


def _check_config(name: str, config: ModelConfig, base: str, of_base: ModelConfig, passed_over: set[str]) -> None:
    for field, key in _COMPUTED.items():
        if field not in passed_over:
            _check_key(name, key, getattr(config, field), base, getattr(of_base, field), _ADVICE.get(field))
    for field in (field.name for field in fields(config.rope)):
        key = "rope_theta" if field == "theta" else f"rope_scaling.{field}"
        _check_key(name, key, getattr(config.rope, field), base, getattr(of_base.rope, field), None)


def _check_key(name: str, key: str, value: Any, base: str, of_base: Any, advice: str | None) -> None:
    if value != of_base:
        shown = [str(x).lower() if isinstance(x, bool) else "none" if x in ((), None) else x for x in (value, of_base)]
        raise UserError(
            f"model '{name}': its config.json says {key} {shown[0]}, that of '{base}' {shown[1]}: a merge that looks "
            f"at data runs all models alike; {advice or 'merge models of one architecture'}"
        )


def notes_of_templates(plan: MergePlan, step: Step, template: str) -> Iterator[str]:
    """Yield a line where models have another chat template than the rows are written in, `template`."""
    stored = {name: stored_template(plan.models[name].directory) for name in step.branches if name in plan.models}
    if others := [f"'{name}'" for name, text in stored.items() if text and text.strip() != template.strip()]:
        yield (
            f"step '{step.name}': rows are written in another chat template than that of {', '.join(others)}, which "
            "may be the one that they were trained with; set parameters.template, and chat_template for the result"
        )
