"""Dataset rows to tokens and a loss mask that is 1 on what the assistant wrote, nowhere else.

The prompt and the completion are tokenized apart, so training sees the prompt exactly as generation will, and
a template that drops part of the answer (DeepSeek's own removes the reasoning) is caught instead of trained on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.chat.template import end_of_turn, messages_of, render, render_prompt
from bmjax.config import UserError


@dataclass(frozen=True)
class Example:
    """One document: tokens int32 [T] and loss mask uint8 [T], 1 where the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Tokenized documents, the number cut or left out for their length, and a hash of rows and template."""

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    digest: str

    @property
    def tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)


def _ends(tokenizer: Any, template: str) -> tuple[str, ...]:
    """The texts of the tokens at which a generation stops."""
    end = end_of_turn(tokenizer, template)
    texts = (tokenizer.eos_token, None if end is None else tokenizer.convert_ids_to_tokens(end))
    return tuple(text for text in texts if text)


def _pieces(
    tokenizer: Any, messages: list[dict[str, str]], template: str, ends: tuple[str, ...], where: str
) -> list[tuple[str, bool]]:
    """The conversation as (text, is target) pieces in order."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index], template, where)
        full = render(tokenizer, messages[: index + 1], template, where, prompt=False)
        kept = not content or full.count(content) > prompt.count(content)
        if not kept or not full.startswith(prompt) or not prompt.startswith(done):
            raise UserError(
                f"{where}: the chat template drops or rewrites part of the conversation, so it cannot be trained on; "
                "set template: chatml or deepseek-r1, or a FILE.jinja that keeps every turn"
            )
        target = full[len(prompt) :]
        if target.rstrip().endswith(ends):
            target = target.rstrip()  # generation stops at the end token; nothing after it is worth learning
        pieces += [(prompt[len(done) :], False), (target, bool(content))]
        done = prompt + target
    return pieces


def check_vocabulary(dataset: Dataset, vocab_size: int, model: Path) -> None:
    """UserError when a document holds a token that the model has no embedding of (it would compute NaN)."""
    top = max(int(example.tokens.max()) for example in dataset.examples)
    if top >= vocab_size:
        raise UserError(
            f"{model}: the tokenizer gives token id {top}, the model's vocabulary has {vocab_size}; "
            "tokenizer and model do not belong together"
        )


def build_dataset(
    rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Any, template: str, seq_len: int, overlong: str
) -> Dataset:
    """Tokenize every row. A row without a target token is an error that names it.

    Rows over `seq_len` tokens are cut ('truncate'), left out ('drop') or refused ('error').
    """
    ends = _ends(tokenizer, template)
    pieces = [(index, *piece) for index, (where, row) in enumerate(rows)
              for piece in _pieces(tokenizer, messages_of(row, where), template, ends, where)]  # fmt: skip
    if not pieces:
        raise UserError(f"{rows[0][0]}: no assistant turn, so no target token to learn from")
    encoded = tokenizer([text for _, text, _ in pieces], add_special_tokens=False)["input_ids"]
    tokens: list[list[int]] = [[] for _ in rows]
    masks: list[list[int]] = [[] for _ in rows]
    for (index, _, target), ids in zip(pieces, encoded, strict=True):
        tokens[index] += ids
        masks[index] += [int(target)] * len(ids)

    digest = hashlib.sha256(template.encode())
    examples, truncated, dropped = [], 0, 0
    for (where, _), ids, mask in zip(rows, tokens, masks, strict=True):
        if len(ids) > seq_len:
            if overlong == "error":
                raise UserError(
                    f"{where}: {len(ids)} tokens, seq_len is {seq_len}; "
                    "shorten the row, or set overlong: truncate or drop"
                )
            if overlong == "drop":
                dropped += 1
                continue
            truncated += 1
        if not any(mask[1:seq_len]):
            if 1 in mask[1:]:
                raise UserError(
                    f"{where}: the prompt alone has {mask.index(1)} tokens, seq_len is {seq_len}: "
                    "no target token is left; raise seq_len or set overlong: drop"
                )
            raise UserError(f"{where}: no target token: the assistant's turn is missing or empty")
        example = Example(np.array(ids[:seq_len], np.int32), np.array(mask[:seq_len], np.uint8))
        digest.update(example.tokens.tobytes() + example.loss_mask.tobytes())
        examples.append(example)
    if not examples:
        raise UserError(f"{rows[0][0]}: all {dropped} rows are over seq_len {seq_len} tokens; raise seq_len")
    return Dataset(tuple(examples), truncated, dropped, digest.hexdigest())
