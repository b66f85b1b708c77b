"""The result's tokenizer, and the rows in which every model keeps its tokens.

`tokenizer_source: base` or a model: its tokenizer, every model's rows in its order. `union`: the base's tokenizer and
whatever tokens others have beside. (Without a word the donor's tokenizer is copied, and rows keep their numbers.) The
result has at least as many rows as the tokenizer's model, so that padding stays (Qwen2: 152,064 rows, 151,665 tokens).
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bmjax.config import UserError
from bmjax.merge.recipe.tokenizer import TokenizerPlan, read_object

MAX_ROWS = 2**24  # of tokens; an array as long is made for every model
MAX_TOKENIZER_BYTES = 2**28  # the largest have 40 million


@dataclass(frozen=True)
class Vocabulary:
    """size: rows of the result. ids: of every model its tokens, None for those of the tokenizer itself. tokens: of the
    result. rules: rows that the recipe speaks of: (model, row) or None for zeros, and whether in all models."""

    size: int
    tokens: Mapping[str, int]
    ids: Mapping[str, Mapping[str, int]]
    source: Path
    rules: Mapping[int, tuple[tuple[str, int] | None, bool]] = field(default_factory=dict)
    added: Sequence[Any] = ()
    notes: tuple[str, ...] = ()

    def rows(self, model: str, has: int) -> np.ndarray:
        """For every row of the result the row of a model of `has` rows, -1 where it has none: int64 [size]."""
        ids = self.ids[model]
        rows = np.full(self.size, -1, np.int64)
        if ids == self.tokens:
            rows[:has] = np.arange(min(has, self.size))
        else:
            free = np.ones(max(self.size, has), np.bool_)
            free[[i for i in (*self.tokens.values(), *ids.values()) if i < len(free)]] = False
            padding = np.flatnonzero(free[: min(self.size, has)])
            rows[padding] = padding
            pairs = [(i, ids[token]) for token, i in self.tokens.items() if ids.get(token, has) < has]
            if pairs:
                result, own = np.array(pairs, np.int64).T
                rows[result] = own
        rows[[row for row, (_, everywhere) in self.rules.items() if everywhere]] = -1
        return rows

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files in place of those in `folder`."""
        from bmjax.weights.hf import TOKENIZER_FILES  # loads jax, which a check does not need

        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)
        if not self.added:
            return
        backend = _load(self.source)
        backend.add_tokens(list(self.added))
        backend.save(str(folder / "tokenizer.json"))
        new = {token.content: backend.token_to_id(token.content) for token in self.added}
        _update(folder / "added_tokens.json", new)
        config = folder / "tokenizer_config.json"
        if config.is_file() and isinstance(old := read_object(config).get("added_tokens_decoder"), dict):
            entries = {str(new[token.content]): _entry(token) for token in self.added}
            _update(config, {"added_tokens_decoder": old | entries})


def _entry(token: Any) -> dict[str, Any]:
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {key: getattr(token, key) for key in keys}


def _update(path: Path, values: Mapping[str, Any]) -> None:
    if path.is_file():
        path.write_text(
            json.dumps({**read_object(path), **values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _load(directory: Path) -> Any:
    """The backend tokenizer of a directory."""
    path = directory / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise UserError(f"{path}: more than {MAX_TOKENIZER_BYTES} bytes; refused, is it the right file?")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path}: the tokenizer cannot be loaded: {str(error)[:200]}") from None
    from bmjax.weights.hf import load_tokenizer

    found = load_tokenizer(directory)
    if found is None:
        raise UserError(f"{directory}: has no tokenizer; expected tokenizer.json")
    return found.backend_tokenizer


def _has_tokenizer(directory: Path) -> bool:
    return any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    )


def vocabulary(plan: TokenizerPlan, donor: str, directories: Mapping[str, Path], rows: Mapping[str, int]) -> Vocabulary:
    """The tokens of a merge. directories: of every input, and of `plan.source` if it is another model. rows: of every
    input's embedding. A model without a tokenizer counts as having the donor's. Raises UserError, one line."""
    source = donor if plan.source in ("base", "union") else plan.source
    has = {model: _has_tokenizer(directories[model]) for model in dict.fromkeys([*rows, source])}
    default = donor if has[donor] else source
    backends = {model: _load(directories[model]) for model in has if has[model] or model == source}
    vocabularies = {model: backend.get_vocab(with_added_tokens=True) for model, backend in backends.items()}
    ids = {model: vocabularies.get(model, vocabularies[default]) for model in rows}
    notes = [f"model '{m}' has no tokenizer; its tokens count as those of '{default}'" for m in rows if not has[m]]
    added = list(_new_tokens(plan, vocabularies[source], {m: (backends[m], rows[m]) for m in rows if m in backends}))
    tokens = vocabularies[source]
    if added:
        backends[source].add_tokens(added)
        tokens = backends[source].get_vocab(with_added_tokens=True)
        notes.append(f"the tokenizer of '{source}' gets {len(added)} tokens more")
    size = max(rows.get(source, 0), 1 + max(tokens.values(), default=0))
    multiple = plan.pad_to_multiple_of or 1
    size = -(-size // multiple) * multiple
    if size > MAX_ROWS:
        what = "the ids of its tokens" if multiple == 1 else f"pad_to_multiple_of {multiple}"
        raise UserError(f"{directories[source]}: the tokenizer: {what}: the result would have {size} rows of tokens")
    rules = dict(_rules(plan, tokens, ids, rows))
    nowhere = sum(
        1 for token, i in tokens.items()
        if i not in rules and not any(ids[m].get(token, n) < n for m, n in rows.items())
    )  # fmt: skip
    if nowhere:
        notes.append(f"{nowhere} tokens have a row in no model; theirs are zeros")
    return Vocabulary(size, tokens, ids, directories[source], rules, added, tuple(notes))


def _new_tokens(plan: TokenizerPlan, known: Mapping[str, int], models: Mapping[str, tuple[Any, int]]) -> Iterator[Any]:
    """What the tokenizer lacks: other models' tokens that have a row, plain ones first, and those of the recipe."""
    from tokenizers import AddedToken

    seen = set(known)
    if plan.source == "union":
        marked: dict[str, Any] = {}
        for backend, has in models.values():
            own = {token.content: token for token in backend.get_added_tokens_decoder().values()}
            for text, i in sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
                if i >= has or text in seen:
                    continue
                if text in own:
                    marked.setdefault(text, own[text])
                else:
                    seen.add(text)
                    yield AddedToken(text, normalized=False)
        for text, token in marked.items():
            if text not in seen:
                seen.add(text)
                yield token
    for text in plan.tokens:
        if text not in seen:
            seen.add(text)
            yield AddedToken(text, normalized=False)


def _rules(
    plan: TokenizerPlan, tokens: Mapping[str, int], ids: Mapping[str, Mapping[str, int]], rows: Mapping[str, int]
) -> Iterator[tuple[int, tuple[tuple[str, int] | None, bool]]]:
    for text, rule in plan.tokens.items():
        if rule.zero:
            yield tokens[text], (None, rule.force)
        elif rule.model is not None:
            wanted = rule.token or text
            row = rule.token_id if rule.token_id is not None else ids[rule.model].get(wanted)
            if row is None or row >= rows[rule.model]:
                what = f"token '{wanted}'" if rule.token_id is None else f"token id {rule.token_id}"
                raise UserError(
                    f"tokenizer.tokens.{text}: model '{rule.model}' has no {what} among its {rows[rule.model]} rows"
                )
            yield tokens[text], ((rule.model, row), rule.force)
