"""Dataset rows to tokens and a loss mask that is 1 on what the assistant wrote, nowhere else.

Training, evaluation and calibration tokenize here, and `bmjax.tokenize` shows the result. The prompt and the completion
are tokenized apart, so training sees the prompt exactly as generation will. A template that drops part of the answer
(DeepSeek's own removes the reasoning) is refused instead of trained on.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.chat.template import end_of_turn, messages_of, render, render_prompt
from bmjax.config import UserError
from bmjax.io.rows import Row, read_rows
from bmjax.weights import student as students

_BATCH_CHARACTERS = 2**20  # text tokenized at a time; the tokenizer's own objects take about 100 bytes a token

Piece = tuple[str, bool]  # (text, whether it is a target)


@dataclass(frozen=True)
class Example:
    """A document: tokens int32 [T] and loss mask uint8 [T], 1 where the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Tokenized documents, how many rows were cut or left out for their length, and a digest of template and tokens."""

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    digest: str

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all documents."""
        return sum(len(example.tokens) for example in self.examples)


def build_dataset(rows: Iterable[Row], tokenizer: Any, template: str, seq_len: int, overlong: str) -> Dataset:
    """Tokenize rows in batches, so that only one batch of them is held at a time.

    template: the Jinja text of the chat template. overlong: rows of more than seq_len tokens are cut ('truncate'), left
    out ('drop') or refused ('error'). UserError for a row of unknown form, without a target token, or too long, and
    when no row is left.
    """
    digest = hashlib.sha256(template.encode())
    examples: list[Example] = []
    truncated = dropped = 0
    location = None
    for location, tokens, mask in _documents(rows, tokenizer, template):
        if len(tokens) > seq_len:
            if overlong == "error":
                raise UserError(
                    f"{location}: {len(tokens)} tokens, seq_len is {seq_len}; "
                    "shorten the row, or set overlong: truncate or drop"
                )
            if overlong == "drop":
                dropped += 1
                continue
            truncated += 1
        # The first token is never predicted, so a target must follow it.
        if not mask[1:seq_len].any():
            if mask[1:].any():
                raise UserError(
                    f"{location}: the prompt alone has {mask.argmax()} tokens, seq_len is {seq_len}: "
                    "no target token is left; raise seq_len or set overlong: drop"
                )
            raise UserError(f"{location}: no target token: the assistant's turn is missing or empty")
        example = Example(tokens[:seq_len].copy(), mask[:seq_len].copy())
        digest.update(example.tokens.tobytes() + example.loss_mask.tobytes())
        examples.append(example)
    if location is None:
        raise UserError("no rows to tokenize; expected at least one")
    if not examples:
        raise UserError(f"{location}: all {dropped} rows are over seq_len {seq_len} tokens; raise seq_len")
    return Dataset(tuple(examples), truncated, dropped, digest.hexdigest())


def tokenize(
    source: str | Path,
    rows: str | Path | Iterable[Mapping[str, Any] | str],
    template: str | None = None,
    seq_len: int = 4096,
) -> list[Example]:
    """Tokenize rows as a training of a student would see them.

    Arguments:
        source: the student, a directory or a hub id.
        rows: rows in a form that `data` of `bmjax train` takes; or the name, or names, of files or hub data sets.
        template: chat template: None for the student's own, chatml, deepseek-r1, or FILE.jinja.
        seq_len: the most tokens of a document; longer ones are cut, as by default in training.

    Returns:
        A document for each row: tokens int32 [T] and loss_mask uint8 [T], 1 on the tokens that are learned.

    Raises:
        UserError: for a student without a tokenizer, and for rows that cannot be trained on.
    """
    student = students.open(source, template=template, purpose="tokenizing")
    assert student.template is not None  # the student was opened for tokenizing
    values: list[Any] = [rows] if isinstance(rows, (str, Path)) else list(rows)
    located: Iterable[Row] = [(f"rows, row {number}", row) for number, row in enumerate(values, 1)]
    if all(isinstance(value, (str, Path)) for value in values):
        located = read_rows(values, "rows")
    else:
        for location, row in located:
            if not isinstance(row, Mapping):
                raise UserError(f"{location}: expected a dictionary, found {type(row).__name__}")
    return list(build_dataset(located, student.tokenizer, student.template, seq_len, "truncate").examples)


def check_vocabulary(dataset: Dataset, vocab_size: int, model: Path) -> None:
    """Raise UserError when a document holds a token that the model has no embedding of. It would compute NaN."""
    top = max(int(example.tokens.max()) for example in dataset.examples)
    if top >= vocab_size:
        raise UserError(
            f"{model}: the tokenizer gives token id {top}, the model's vocabulary has {vocab_size}; "
            "tokenizer and model do not belong together"
        )


def _documents(rows: Iterable[Row], tokenizer: Any, template: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (location, tokens int32 [T], loss mask uint8 [T]) of every row, whole."""
    end = end_of_turn(tokenizer, template)
    end_texts = (tokenizer.eos_token, None if end is None else tokenizer.convert_ids_to_tokens(end))
    ends = tuple(text for text in end_texts if text)
    batch: list[tuple[str, list[Piece]]] = []
    characters = 0
    for location, row in rows:
        batch.append((location, _pieces(tokenizer, messages_of(row, location), template, ends, location)))
        characters += sum(len(text) for text, _ in batch[-1][1])
        if characters >= _BATCH_CHARACTERS:
            yield from _tokenize(batch, tokenizer)
            batch, characters = [], 0
    yield from _tokenize(batch, tokenizer)


def _tokenize(batch: Sequence[tuple[str, list[Piece]]], tokenizer: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    texts = [text for _, pieces in batch for text, _ in pieces]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    for location, pieces in batch:
        ids = [next(encoded) for _ in pieces]
        lengths = [len(piece_ids) for piece_ids in ids]
        mask = np.repeat(np.array([target for _, target in pieces], np.uint8), np.array(lengths, int))
        yield location, np.array([token for piece_ids in ids for token in piece_ids], np.int32), mask


def _pieces(
    tokenizer: Any, messages: list[dict[str, str]], template: str, ends: tuple[str, ...], location: str
) -> list[Piece]:
    """Render a conversation as pieces in order. ends: the texts of the tokens at which a generation stops."""
    pieces: list[Piece] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message["content"].strip()
        prompt = render_prompt(tokenizer, messages[:index], template, location)
        full = render(tokenizer, messages[: index + 1], template, location, prompt=False)
        kept = not content or full.count(content) > prompt.count(content)
        if not kept or not full.startswith(prompt) or not prompt.startswith(done):
            raise UserError(
                f"{location}: the chat template drops or rewrites part of the conversation, so it cannot be trained "
                "on; set template: chatml or deepseek-r1, or a FILE.jinja that keeps every turn"
            )
        target = full[len(prompt) :]
        if target.rstrip().endswith(ends):
            target = target.rstrip()  # generation stops at the end token; nothing after it is worth learning
        pieces += [(prompt[len(done) :], False), (target, bool(content))]
        done = prompt + target
    return pieces
