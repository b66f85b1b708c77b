"""A new backbone's starting point: a small Qwen2 with random weights and a tokenizer, as a Hugging Face directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.branch.examples import TEMPLATES, messages_of, read_rows
from bmjax.model import qwen2
from bmjax.model.spec import Qwen2Config
from bmjax.pipeline.settings import ModelSettings
from bmjax.weights import hf

END, START = "<|im_end|>", "<|im_start|>"
SPECIAL = ["<|endoftext|>", START, END, "<think>", "</think>"]


def train_tokenizer(files: Sequence[Path], vocab_size: int) -> Any:
    """A byte-level BPE (any text can be written) over the files' conversations; every digit is its own token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rows = read_rows([str(file) for file in files])
    tokenizer.train_from_iterator((m["content"] for where, row in rows for m in messages_of(row, where)), trainer)
    # The think tags mark text that evaluation has to see, so unlike the others they are no special tokens to skip.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<|endoftext|>", additional_special_tokens=[START]
    )
    fast.chat_template = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8").rstrip("\n")
    return fast


def create(settings: ModelSettings, files: Sequence[Path], directory: Path, seed: int, template: str | None) -> None:
    """Write the random model and its tokenizer to `directory`, weights in float32."""
    if settings.tokenizer is None:
        tokenizer = train_tokenizer(files, settings.vocab_size)
    else:
        source = hf.resolve_model(settings.tokenizer)
        tokenizer = hf.load_tokenizer(source)
        if tokenizer is None:
            from bmjax.config import UserError

            raise UserError(f"model.tokenizer: {source}: no tokenizer files (tokenizer.json or vocab.json)")
    if template is not None:
        from bmjax.branch.examples import chat_template

        tokenizer.chat_template = chat_template(tokenizer, template)
    hf_config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": max(len(tokenizer), tokenizer.vocab_size),
        "hidden_size": settings.hidden_size, "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers, "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads, "max_position_embeddings": settings.max_length,
        "rope_theta": settings.rope_theta, "tie_word_embeddings": settings.tied, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "initializer_range": 0.02, "use_sliding_window": False,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    params = qwen2.init(Qwen2Config.from_hf(hf_config), seed)
    hf.save_hf(directory, params, hf_config, tokenizer=tokenizer)
