"""The demo's tokenizer, trained on its own rows. `bmjax run` takes a tokenizer that exists."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmjax.chat.forms import read_conversation
from bmjax.chat.reasoning import CLOSE, OPEN
from bmjax.chat.template import named_template
from bmjax.io.rows import read_rows

END, START = "<|im_end|>", "<|im_start|>"
SPECIAL = ["<|endoftext|>", START, END]
THINK = [OPEN, CLOSE]  # one token each, but text: what is special is left out when an answer is decoded


def train_tokenizer(files: Sequence[Path], vocab_size: int) -> Any:
    """Train a byte-level BPE (any text can be written) on the files' conversations; every digit is its own token.

    It splits text as Qwen2's own tokenizer does: transformers takes that for granted of a `qwen2` model.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK), special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rows = read_rows([str(file) for file in files])
    turns = (turn for location, row in rows for turn in read_conversation(row, location).messages)
    tokenizer.train_from_iterator((f"{turn['role']}\n{turn['content']}" for turn in turns), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<|endoftext|>", additional_special_tokens=[START]
    )
    fast.chat_template = named_template("chatml")
    return fast
