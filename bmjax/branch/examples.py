"""Dataset rows to tokens and a loss mask that is 1 on what the assistant wrote, nowhere else.

Training, evaluation and calibration tokenize here. The prompt and the completion are tokenized apart: so training sees
the prompt exactly as generation will, and a template that drops part of the answer (DeepSeek's drops the reasoning) is
refused instead of trained on.
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
    """One document: tokens int32 [T], and loss_mask uint8 [T], 1 where the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Tokenized documents.

    truncated, dropped: how many were cut or left out for their length. digest: a hash of rows and template.
    """

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    digest: str

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(len(example.tokens) for example in self.examples)


def build_dataset(
    rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Any, template: str, seq_len: int, overlong: str
) -> Dataset:
    """Tokenize rows of chat.

    Arguments:
        rows: (name for errors, row) of each.
        tokenizer, template: transformers' tokenizer, and the Jinja text of a chat template.
        seq_len: the most tokens of a document.
        overlong: what becomes of longer ones: 'truncate', 'drop', or 'error'.

    Raises:
        UserError: naming the row that has no target token, that is too long, or that the template does not keep whole.
    """
    # Render all rows, and tokenize the pieces of all conversations at once.
    end_texts = _end_texts(tokenizer, template)
    pieces = [
        (index, text, is_target)
        for index, (row_name, row) in enumerate(rows)
        for text, is_target in _pieces(tokenizer, messages_of(row, row_name), template, end_texts, row_name)
    ]
    if not pieces:
        raise UserError(f"{rows[0][0]}: no assistant turn, so no target token to learn from")
    encoded = tokenizer([text for _, text, _ in pieces], add_special_tokens=False)["input_ids"]

    # Join each row's pieces.
    tokens: list[list[int]] = [[] for _ in rows]
    masks: list[list[int]] = [[] for _ in rows]
    for (index, _, is_target), ids in zip(pieces, encoded, strict=True):
        tokens[index] += ids
        masks[index] += [int(is_target)] * len(ids)

    # Cut or leave out what is too long; refuse what nothing could be learned from.
    digest = hashlib.sha256(template.encode())
    examples, truncated, dropped = [], 0, 0
    for (row_name, _), ids, mask in zip(rows, tokens, masks, strict=True):
        if len(ids) > seq_len:
            if overlong == "error":
                raise UserError(
                    f"{row_name}: {len(ids)} tokens, seq_len is {seq_len}; "
                    "shorten the row, or set overlong: truncate or drop"
                )
            if overlong == "drop":
                dropped += 1
                continue
            truncated += 1
        if not any(mask[1:seq_len]):
            if 1 in mask[1:]:
                raise UserError(
                    f"{row_name}: the prompt alone has {mask.index(1)} tokens, seq_len is {seq_len}: "
                    "no target token is left; raise seq_len or set overlong: drop"
                )
            raise UserError(f"{row_name}: no target token: the assistant's turn is missing or empty")
        example = Example(np.array(ids[:seq_len], np.int32), np.array(mask[:seq_len], np.uint8))
        digest.update(example.tokens.tobytes() + example.loss_mask.tobytes())
        examples.append(example)
    if not examples:
        raise UserError(f"{rows[0][0]}: all {dropped} rows are over seq_len {seq_len} tokens; raise seq_len")
    return Dataset(tuple(examples), truncated, dropped, digest.hexdigest())


def check_vocabulary(dataset: Dataset, vocab_size: int, model: Path) -> None:
    """Raise UserError when a document holds a token that the model has no embedding of (it would compute NaN)."""
    largest = max(int(example.tokens.max()) for example in dataset.examples)
    if largest >= vocab_size:
        raise UserError(
            f"{model}: the tokenizer gives token id {largest}, the model's vocabulary has {vocab_size}; "
            "tokenizer and model do not belong together"
        )


def _end_texts(tokenizer: Any, template: str) -> tuple[str, ...]:
    """Return the texts of the tokens at which a generation stops."""
    end = end_of_turn(tokenizer, template)
    texts = (tokenizer.eos_token, None if end is None else tokenizer.convert_ids_to_tokens(end))
    return tuple(text for text in texts if text)


def _pieces(
    tokenizer: Any, messages: list[dict[str, str]], template: str, end_texts: tuple[str, ...], row_name: str
) -> list[tuple[str, bool]]:
    """Split a conversation into (text, whether it is a target) pieces, in order."""
    pieces: list[tuple[str, bool]] = []
    rendered = ""  # the conversation up to and with the last assistant's turn
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index], template, row_name)
        full = render(tokenizer, messages[: index + 1], template, row_name, prompt=False)
        kept = not content or full.count(content) > prompt.count(content)
        if not kept or not full.startswith(prompt) or not prompt.startswith(rendered):
            raise UserError(
                f"{row_name}: the chat template drops or rewrites part of the conversation, so it cannot be trained "
                "on; set template: chatml or deepseek-r1, or a FILE.jinja that keeps every turn"
            )
        target = full[len(prompt) :]
        if target.rstrip().endswith(end_texts):
            target = target.rstrip()  # generation stops at the end token; nothing after it is worth learning
        pieces += [(prompt[len(rendered) :], False), (target, bool(content))]
        rendered = prompt + target
    return pieces
