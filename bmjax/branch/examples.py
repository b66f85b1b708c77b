"""Dataset rows to tokens and a loss mask that is 1 on what the assistant wrote, nowhere else.

Training, evaluation and calibration tokenize here, and `bmjax.tokenize` shows the result. The prompt and the completion
are tokenized apart, so training sees the prompt exactly as generation will. A template that drops part of the
conversation (DeepSeek's own removes the reasoning) is refused instead of trained on.
"""

import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bmjax.chat.forms import Conversation, Message, Turns, read_conversation
from bmjax.chat.marks import end_of_turn
from bmjax.chat.reasoning import answer_of, has_tags, split_think
from bmjax.chat.template import check_repeatable, render, render_prompt
from bmjax.config import UserError
from bmjax.io.rows import Row, read_rows
from bmjax.weights import student as students

_BATCH_CHARACTERS = 2**20  # text tokenized at a time; the tokenizer's own objects take about 100 bytes a token
_AHEAD = 2  # batches that are tokenized while the next rows are read and rendered

Piece = tuple[str, bool]  # (text, whether it is a target)


@dataclass(frozen=True)
class Example:
    """A document: tokens int32 [T] and loss mask uint8 [T], 1 where the token is a target."""

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Encoding:
    """How rows become documents.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        template: the Jinja text of the chat template.
        seq_len: the most tokens of a document.
        overlong: longer rows are cut ('truncate'), left out ('drop') or refused ('error').
        turns: learn all answers of a conversation, or the last one only.
        ignore: keys of rows and turns to read as if they were absent.
        end_tokens: ids of which every answer must end with one; empty: an answer may end with any.
        long_prompts: rows whose prompt alone fills seq_len are refused, or left out with a remark ('drop').
    """

    tokenizer: Any
    template: str
    seq_len: int
    overlong: str = "truncate"
    turns: Turns = "all"
    ignore: Collection[str] = ()
    end_tokens: Collection[int] = ()
    long_prompts: Literal["refuse", "drop"] = "refuse"


@dataclass
class Tally:
    """What happened to the rows of a dataset so far: counts, remarks with the rows they are about, a digest."""

    documents: int = 0
    tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    top_token: int = -1
    remarks: dict[str, tuple[int, str]] = field(default_factory=dict)  # text: (rows, location of the first)
    digest: Any = field(default_factory=hashlib.sha256)  # of template, tokens and masks

    def remark(self, text: str, location: str) -> None:
        """Count a remark about a row."""
        count, first = self.remarks.get(text, (0, location))
        self.remarks[text] = (count + 1, first)

    def lines(self) -> list[str]:
        """Return the remarks, a line each."""
        return [f"{count} rows: {text} (first: {first})" for text, (count, first) in self.remarks.items()]


@dataclass(frozen=True)
class Dataset:
    """Tokenized documents and what was said of their rows.

    truncated, dropped: rows that were cut or left out for their length. digest: of template, tokens and masks.
    remarks: lines for the log. top_token: the largest id.
    """

    examples: Sequence[Example]
    truncated: int
    dropped: int
    digest: str
    tokens: int
    top_token: int
    remarks: tuple[str, ...] = ()


def build_dataset(rows: Iterable[Row], encoding: Encoding) -> Dataset:
    """Tokenize rows into memory; errors are those of `documents`."""
    tally = Tally()
    return dataset_of(tuple(documents(rows, encoding, tally)), tally)


def dataset_of(examples: Sequence[Example], tally: Tally) -> Dataset:
    """Return the dataset of documents that `documents` gave and counted."""
    return Dataset(
        examples, tally.truncated, tally.dropped, tally.digest.hexdigest(), tally.tokens, tally.top_token,
        tuple(tally.lines()),
    )  # fmt: skip


def documents(rows: Iterable[Row], encoding: Encoding, tally: Tally) -> Iterator[Example]:
    """Yield the document of every row that is kept, in order, in bounded memory; `tally` counts what happens.

    Raises:
        UserError: for a row of unknown form, without a target token, or too long, when no row is left, and for a
            template that writes today's date.
    """
    check_repeatable(encoding.template)
    seq_len = encoding.seq_len
    tally.digest.update(encoding.template.encode())
    location = first_without = None
    for location, tokens, mask in _tokenized(rows, encoding, tally):
        is_long = len(tokens) > seq_len
        if is_long and encoding.long_prompts == "drop" and mask[1:].any() and not mask[1:seq_len].any():
            tally.remark(f"the prompt alone fills seq_len {seq_len}: left out", location)
            tally.dropped += 1
            continue
        if is_long:
            if encoding.overlong == "error":
                raise UserError(
                    f"{location}: {len(tokens)} tokens, seq_len is {seq_len}; "
                    "shorten the row, or set overlong: truncate or drop"
                )
            if encoding.overlong == "drop":
                tally.dropped += 1
                continue
            tally.truncated += 1
        # The first token is never predicted, so a target must follow it.
        if not mask[1:seq_len].any():
            if mask[1:].any():
                raise UserError(
                    f"{location}: the prompt alone has {mask.argmax()} tokens, seq_len is {seq_len}: "
                    "no target token is left; raise seq_len or set overlong: drop"
                )
            first_without = first_without or location
            tally.remark("no answer to learn (missing, empty, or context): left out", location)
            continue
        example = Example(tokens[:seq_len].copy(), mask[:seq_len].copy())
        tally.digest.update(example.tokens.tobytes() + example.loss_mask.tobytes())
        tally.documents += 1
        tally.tokens += len(example.tokens)
        tally.top_token = max(tally.top_token, int(example.tokens.max()))
        yield example
    if location is None:
        raise UserError("no rows to tokenize; expected at least one")
    if not tally.documents and first_without is not None:
        raise UserError(
            f"{first_without}: no target token: the assistant's turn is missing, empty or not to be learned"
        )
    if not tally.documents:
        raise UserError(f"{location}: all {tally.dropped} rows are over seq_len {seq_len} tokens; raise seq_len")


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
        template: chat template: None for the student's own, a name of bmjax/chat/templates, or FILE.jinja.
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
    return list(build_dataset(located, Encoding(student.tokenizer, student.template, seq_len)).examples)


def check_vocabulary(dataset: Dataset, vocab_size: int, model: Path) -> None:
    """Raise UserError when a document holds a token that the model has no embedding of. It would compute NaN."""
    if dataset.top_token >= vocab_size:
        raise UserError(
            f"{model}: the tokenizer gives token id {dataset.top_token}, the model's vocabulary has {vocab_size}; "
            "tokenizer and model do not belong together"
        )


def _tokenized(rows: Iterable[Row], encoding: Encoding, tally: Tally) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (location, tokens int32 [T], loss mask uint8 [T]) of every row, whole.

    The tokenizer works on threads of its own outside Python's lock, so the next rows are read and rendered meanwhile.
    """
    tokenizer = encoding.tokenizer
    end = end_of_turn(tokenizer, encoding.template)
    end_texts = (tokenizer.eos_token, None if end is None else tokenizer.convert_ids_to_tokens(end))
    ends = tuple(text for text in end_texts if text)
    waiting: deque[Future[list[tuple[str, np.ndarray, np.ndarray]]]] = deque()
    batch: list[tuple[str, list[Piece]]] = []
    characters = 0
    with ThreadPoolExecutor(_AHEAD, "tokenize") as pool:
        for location, row in rows:
            conversation = read_conversation(row, location, encoding.turns, encoding.ignore)
            for remark in conversation.remarks:
                tally.remark(remark, location)
            batch.append((location, _pieces(tokenizer, conversation, encoding.template, ends, location)))
            characters += sum(len(text) for text, _ in batch[-1][1])
            if characters >= _BATCH_CHARACTERS:
                waiting.append(pool.submit(_tokenize, batch, encoding))
                batch, characters = [], 0
                while len(waiting) > _AHEAD:
                    yield from waiting.popleft().result()
        waiting.append(pool.submit(_tokenize, batch, encoding))
        while waiting:
            yield from waiting.popleft().result()


def _tokenize(batch: Sequence[tuple[str, list[Piece]]], encoding: Encoding) -> list[tuple[str, np.ndarray, np.ndarray]]:
    texts = [text for _, pieces in batch for text, _ in pieces]
    tokenized = encoding.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    encoded = iter([np.array(piece.ids, np.int32) for piece in tokenized])
    rows = []
    for location, pieces in batch:
        ids = [next(encoded) for _ in pieces]
        for (_, target), piece_ids in zip(pieces, ids, strict=True):
            if target and encoding.end_tokens and int(piece_ids[-1]) not in encoding.end_tokens:
                raise UserError(
                    f"{location}: an answer does not end with an end token of the model, but with "
                    f"{encoding.tokenizer.convert_ids_to_tokens(int(piece_ids[-1]))!r}; a model that is trained on it "
                    "would not stop: set another template"
                )
        mask = np.repeat(np.array([target for _, target in pieces], np.uint8), [len(piece_ids) for piece_ids in ids])
        rows.append((location, np.concatenate([np.empty(0, np.int32), *ids]), mask))
    return rows


def _pieces(
    tokenizer: Any, conversation: Conversation, template: str, ends: tuple[str, ...], location: str
) -> list[Piece]:
    """Render a conversation as pieces in order. ends: the texts of the tokens at which a generation stops."""
    messages, tools = list(conversation.messages), conversation.tools
    pieces: list[Piece] = []
    done, context = "", 0
    for index, is_target in enumerate(conversation.targets):
        if not is_target:
            continue
        prompt = render_prompt(tokenizer, messages[:index], template, location, tools)
        full = render(tokenizer, messages[: index + 1], template, location, prompt=False, tools=tools)
        # Refuse a template that loses something: what the model is told, what it may call, or what it answers.
        for number, message in enumerate(messages[context:index], context + 1):
            if not _is_shown(message, prompt):
                raise UserError(
                    f"{location}: the chat template leaves out turn {number} (of role {message['role']}) or part of "
                    "it; set another template, or a FILE.jinja that keeps every turn"
                )
        for tool in tools or ():
            name = str(tool.get("function", tool).get("name", ""))
            if name not in prompt:
                raise UserError(
                    f"{location}: the chat template does not show 'tools' to the model (function {name!r}); set a "
                    "template that does, or name the key in 'ignore'"
                )
        # Templates put their own white space between the reasoning and the answer.
        content = messages[index]["content"].strip()
        parts = split_think(content) if has_tags(content) else ("", content)
        calls = [call["function"]["name"] for call in messages[index].get("tool_calls", ())]
        kept = all(full.count(text) > prompt.count(text) for text in (*parts, *calls) if text)
        if not kept or not full.startswith(prompt) or not prompt.startswith(done):
            raise UserError(
                f"{location}: the chat template drops or rewrites part of the conversation, so it cannot be trained "
                "on; set template: chatml or deepseek-r1, turns: last, or a FILE.jinja that keeps every turn"
            )
        target = full[len(prompt) :]
        if target.rstrip().endswith(ends):
            target = target.rstrip()  # generation stops at the end token; nothing after it is worth learning
        pieces += [(prompt[len(done) :], False), (target, bool(content or calls))]
        done, context = prompt + target, index + 1
    return pieces


def _is_shown(message: Message, prompt: str) -> bool:
    """Return whether a context turn stands in the prompt; of an earlier answer, its thoughts may be missing."""
    if message["role"] == "assistant":
        texts = [answer_of(message["content"]), *(call["function"]["name"] for call in message.get("tool_calls", ()))]
    else:
        texts = [message["content"].strip()]
    return all(text in prompt or json.dumps(text, ensure_ascii=False)[1:-1] in prompt for text in texts)
