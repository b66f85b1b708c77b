"""A new backbone's starting point: a small Qwen2 with random weights and a tokenizer, as a Hugging Face directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.chat.reasoning import CLOSE, OPEN
from bmjax.chat.template import TEMPLATES, chat_template, messages_of
from bmjax.config import UserError
from bmjax.io import hub
from bmjax.io.rows import read_rows
from bmjax.model import qwen2
from bmjax.model.config import ModelConfig
from bmjax.pipeline.settings import ModelSettings
from bmjax.weights import hf

END, START = "<|im_end|>", "<|im_start|>"
SPECIAL = ["<|endoftext|>", START, END]
THINK = [OPEN, CLOSE]  # one token each, but text: what is special is left out when an answer is decoded


def train_tokenizer(files: Sequence[Path], vocab_size: int) -> Any:
    """A byte-level BPE (any text can be written) over the files' conversations; every digit is its own token.

    It splits text as Qwen2's own tokenizer does: transformers takes that for granted of a `qwen2` model.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK), special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rows = read_rows([str(file) for file in files])
    turns = (turn for where, row in rows for turn in messages_of(row, where))
    tokenizer.train_from_iterator((f"{turn['role']}\n{turn['content']}" for turn in turns), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK])
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
        source = hub.model_directory(settings.tokenizer)
        tokenizer = hf.load_tokenizer(source)
        if tokenizer is None:
            raise UserError(f"model.tokenizer: {source}: no tokenizer files (tokenizer.json or vocab.json)")
    if template is not None:
        tokenizer.chat_template = chat_template(tokenizer, template)
    hf_config = shape_of(settings, len(tokenizer)) | {
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    params = qwen2.init(ModelConfig.from_hf(hf_config), seed)
    hf.save_hf(directory, params, hf_config, tokenizer=tokenizer)


def shape_of(settings: ModelSettings, vocab_size: int) -> dict[str, Any]:
    """The new backbone's config.json, but for its special tokens."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab_size,
        "hidden_size": settings.hidden_size, "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers, "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads, "max_position_embeddings": settings.max_length,
        "rope_theta": settings.rope_theta, "tie_word_embeddings": settings.tied, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "initializer_range": settings.initializer_range, "use_sliding_window": False,
        "bos_token_id": None,
    }  # fmt: skip
