"""The student that a run's trainings start from: whether they fit it, what they take, and a new one's weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bmjax.branch.prepare import check
from bmjax.branch.settings import Training, TrainSettings
from bmjax.branch.train import describe
from bmjax.chat.template import chat_template
from bmjax.config import UserError
from bmjax.io import hub
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.pipeline.settings import ModelSettings, RunSettings
from bmjax.weights import hf
from bmjax.weights import student as students
from bmjax.weights.tokenizer import load_tokenizer


def check_trainings(settings: RunSettings) -> None:
    """Raise UserError for a training that does not fit the student or the devices."""
    if settings.model is None:
        assert settings.student is not None  # the settings hold one of the two
        config = students.open(settings.student).config
    else:
        config = ModelConfig.from_hf(_hf_config(settings.model, _open_tokenizer(settings.model)), "model")
    trainings = {
        f"domains.{name}.branch" if domain.branch else "branch": settings.branch_training(name)
        for name, domain in settings.domains.items()
    } | {"backbone": settings.backbone, "mixture": settings.mixture_training(1)}
    for key, training in trainings.items():
        try:
            if training is not None:
                check(training, config)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def plan(keys: Callable[[], Training], settings: Callable[[], TrainSettings], needed: Sequence[Path]) -> list[str]:
    """Return what a training of a run will take, in lines.

    keys, settings: how it is trained, before and after the sizes are filled in. needed: files without which no more
    than its length is known.
    """
    length = keys()
    known = f"steps: {length.steps}" if length.steps else f"epochs: {length.epochs:g}"
    if not all(path.exists() for path in needed):
        return [f"{known}; more is known when its student and its rows are there"]
    return describe(settings())


def create(settings: ModelSettings, directory: Path, seed: int, template: str | None) -> None:
    """Write a random Qwen2 of these settings and its tokenizer to `directory`, weights in float32."""
    tokenizer = _open_tokenizer(settings)
    if template is not None:
        tokenizer.chat_template = chat_template(tokenizer, template)
    end_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    hf_config = _hf_config(settings, tokenizer) | end_tokens
    params = qwen2.init(ModelConfig.from_hf(hf_config), seed)
    hf.save_hf(directory, params, hf_config, tokenizer=tokenizer)


def _open_tokenizer(settings: ModelSettings) -> Any:
    directory = hub.model_directory(settings.tokenizer, label="model.tokenizer: ", weights=False)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"model.tokenizer: {directory}: no tokenizer files (tokenizer.json or vocab.json)")
    return tokenizer


def _hf_config(settings: ModelSettings, tokenizer: Any) -> dict[str, Any]:
    """Return the new backbone's config.json without its special tokens."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size, "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers, "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads, "max_position_embeddings": settings.max_length,
        "rope_theta": settings.rope_theta, "tie_word_embeddings": settings.tied, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "initializer_range": settings.initializer_range, "use_sliding_window": False,
        "bos_token_id": None,
    }  # fmt: skip
