"""Dataset rows to tokens and a loss mask that is 1 on what the assistant wrote, nowhere else.

The prompt and the completion are tokenized apart, so training sees the prompt exactly as generation will, and
a template that drops part of the answer (DeepSeek's own removes the reasoning) is caught instead of trained on.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config import UserError, read_text

TEMPLATES = Path(__file__).parents[1] / "chat/templates"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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


def read_rows(data: str | Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of JSON Lines, JSON or Parquet files, or of a hub dataset.

    A hub dataset is `org/name`, `org/name:subset` or `org/name:subset:split`; without a split, `train`.
    """
    files = [data] if isinstance(data, str) else list(data)
    rows = [row for name in files for row in _read_file(name)]
    if not rows:
        raise UserError(f"{', '.join(files) or 'data'}: no rows; expected at least one with a prompt and a response")
    return rows


def _read_file(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(name)
    if path.suffix == ".parquet" or _is_hub_id(name, path):
        yield from _read_with_datasets(name, path)
        return
    text = read_text(path)
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            values: list[Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
        numbered: Iterator[tuple[int, Any]] = iter(enumerate(values, 1))
    else:
        numbered = _json_lines(path, text)
    for number, value in numbered:
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {number}: expected a JSON object, found {type(value).__name__}")
        yield f"{path}, row {number}", value


def _is_hub_id(name: str, path: Path) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+(:[\w.-]*){0,2}", name) is not None and not path.suffix and not path.exists()


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON: {error}") from None


def _read_with_datasets(name: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        if path.suffix == ".parquet":
            read_parquet = datasets.Dataset.from_parquet
            rows: Any = read_parquet(str(path)) if path.is_file() else None
            if rows is None:
                raise UserError(f"{path}: no such file")
        else:
            repository, _, rest = name.partition(":")
            subset, _, split = rest.partition(":")
            rows = datasets.load_dataset(repository, subset or None, split=split or "train")
    except UserError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data: {name}: neither a file here nor a dataset the hub gives: {first}") from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", dict(row)


def messages_of(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The row as chat messages. Known forms: `messages`, `conversations` (ShareGPT), `prompt` with `response`.

    A record's `reasoning` becomes <think>...</think> before the response, as the teacher wrote it.
    """
    if "messages" in row:
        turns = _turns(row, "messages", "role", "content", where)
    elif "conversations" in row:
        turns = _turns(row, "conversations", "from", "value", where)
    elif "prompt" in row and "response" in row:
        answer = row["response"]
        if row.get("reasoning"):
            answer = f"<think>\n{row['reasoning']}\n</think>\n{answer}"
        turns = [("system", row["system"])] if row.get("system") else []
        turns += [("user", row["prompt"]), ("assistant", answer)]
    else:
        found = ", ".join(sorted(row)[:8]) or "nothing"
        raise UserError(f"{where}: expected 'prompt' and 'response', 'messages' or 'conversations'; found {found}")
    messages = []
    for role, content in turns:
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise UserError(
                f"{where}: a turn has role {role!r} and {type(content).__name__} content; "
                f"expected text by one of {', '.join(ROLES)}"
            )
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _turns(row: Mapping[str, Any], key: str, role: str, content: str, where: str) -> list[tuple[Any, Any]]:
    turns = row[key]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: '{key}' must be a list of turns, each with '{role}' and '{content}'")
    return [(turn.get(role), turn.get(content)) for turn in turns]


def chat_template(tokenizer: Any, template: str | None) -> str:
    """The Jinja text of `template`: null is the tokenizer's own, a name is ours, else a file."""
    if template is None:
        own = getattr(tokenizer, "chat_template", None)
        if not own:
            raise UserError(
                "template: the student's tokenizer has no chat template; "
                "set template: chatml, deepseek-r1 or FILE.jinja"
            )
        return own if isinstance(own, str) else own.get("default") or next(iter(own.values()))
    named = TEMPLATES / f"{template}.jinja"
    if named.is_file():
        return named.read_text(encoding="utf-8").rstrip("\n")
    if not template.endswith(".jinja"):
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
        raise UserError(f"template: {template!r} is not one of {known}, nor a FILE.jinja")
    return read_text(template)


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str, where: str, prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=template
        )
    except Exception as error:  # a template is a program; whatever it raises is its author's mistake
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: the chat template cannot render this conversation: {first}") from None


def render_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str, where: str = "template") -> str:
    """The text that a model continues: all turns, then the opening of the assistant's. `where` is named in errors."""
    return _render(tokenizer, messages, template, where, prompt=True)


def end_of_turn(tokenizer: Any, template: str) -> int | None:
    """The special token that the template writes after an assistant's answer, where a generation ends; None: none."""
    turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
    try:
        full = _render(tokenizer, turns, template, "template", prompt=False)
    except UserError:  # a template for conversations of another form
        return None
    after = tokenizer(full[full.rfind("Answer") + len("Answer") :], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return next((token for token in after if token in special), None)


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
        full = _render(tokenizer, messages[: index + 1], template, where, prompt=False)
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
