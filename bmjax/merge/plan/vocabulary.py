"""The result's tokenizer, and the rows in which every model keeps its tokens.

`tokenizer_source: base` or a model: its tokenizer, every model's rows in its order. `union`: the base's tokenizer and
the tokens that only others have. Without these keys the donor's tokenizer is copied, and rows keep their numbers. The
result has at least as many rows as the tokenizer's model, so that padding stays (Qwen2: 152,064 rows, 151,665 tokens).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bmjax.config import UserError, first_line
from bmjax.merge.plan.config_token_ids import follow_tokens, stated_ids
from bmjax.merge.plan.damaged_files import damage, refuse_damaged_tokenizer
from bmjax.merge.plan.heads import TIED_FAMILIES, UNTIED_FAMILIES, config_blocks
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.side_files import copy_file, tokenizer_files
from bmjax.merge.recipe.tokenizer import WORDS, TokenizerSettings
from bmjax.model.config import read_hf_config
from bmjax.safe_yaml import read_object
from bmjax.weights.tokenizer import load_tokenizer, read_json, write_json

MAX_ROWS = 2**24  # of tokens; an array as long is made for every model
MAX_TOKENIZER_BYTES = 2**28  # the largest have 40 million
GENERATION = "generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class RowRule(NamedTuple):
    """Where the recipe takes a row from."""

    source: tuple[str, int] | None  # (model, its row), None for zeros
    force: bool  # in models that have it, too


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a merge's result."""

    size: int  # rows of the result's head, and of its embedding but for those behind
    tokens: Mapping[str, int]  # the result's row of each token
    ids: Mapping[str, Mapping[str, int]]  # of every model, its row of each token
    source: Path  # directory of the tokenizer
    rules: Mapping[int, RowRule]  # of rows that the recipe speaks of
    added: Sequence[Any]  # tokens that the tokenizer gets, as `tokenizers.AddedToken`
    notes: Sequence[str]
    stated: Mapping[str, Any] = field(default_factory=dict)  # ids of special tokens in the config of another source
    generation: Mapping[str, Any] | None = None  # the donor's generation config under these ids; None: the source's
    behind: Mapping[str, int] = field(default_factory=dict)  # of every model, see `rows_behind`
    result_behind: int = 0  # rows behind `size` in the result's embedding

    def rows(self, model: str, count: int, is_embedding: bool = False) -> np.ndarray:
        """Return for every row of the result the row of a model of `count` rows, -1 for none: int64 [rows]."""
        ids = self.ids[model]
        behind, result_behind = (self.behind.get(model, 0), self.result_behind) if is_embedding else (0, 0)
        ordinary, size = count - behind, self.size + result_behind
        rows = np.full(size, -1, np.int64)
        # What lies behind all tokens stays there.
        kept = min(behind, result_behind)
        rows[self.size : self.size + kept] = np.arange(ordinary, ordinary + kept)
        if ids == self.tokens:
            shared = min(ordinary, self.size)
            rows[:shared] = np.arange(shared)
        else:
            # Padding, rows of no token in either, keeps its number.
            free = np.ones(max(size, count), np.bool_)
            free[[i for i in (*self.tokens.values(), *ids.values()) if i < len(free)]] = False
            padding = np.flatnonzero(free[: min(self.size, ordinary)])
            rows[padding] = padding
        if ids != self.tokens or ordinary != self.size:
            pairs = [(i, ids[token]) for token, i in self.tokens.items() if i < size and ids.get(token, count) < count]
            if pairs:
                result_rows, model_rows = np.array(pairs, np.int64).T
                rows[result_rows] = model_rows
        rows[[row for row, rule in self.rules.items() if rule.force and row < size]] = -1
        return rows

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files in place of those in `folder`."""
        for path in tokenizer_files(folder):
            path.unlink()
        for path in [*tokenizer_files(self.source), self.source / GENERATION]:
            if path.is_file():
                copy_file(path, folder / path.relative_to(self.source))
        if self.generation is not None and self.generation != read_json(folder / GENERATION):
            write_json(folder / GENERATION, self.generation)
        if not self.added:
            return
        backend = _load(self.source)
        backend.add_tokens(list(self.added))
        backend.save(str(folder / "tokenizer.json"))
        ids = {token.content: backend.token_to_id(token.content) for token in self.added}
        _update(folder / "added_tokens.json", ids)
        config = folder / "tokenizer_config.json"
        if config.is_file() and isinstance(old := read_object(config).get("added_tokens_decoder"), dict):
            keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            new = {str(ids[token.content]): {key: getattr(token, key) for key in keys} for token in self.added}
            _update(config, {"added_tokens_decoder": old | new})


def _update(path: Path, values: Mapping[str, Any]) -> None:
    if path.is_file():
        text = json.dumps({**read_object(path), **values}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _load(directory: Path) -> Any:
    """Return the backend tokenizer of a directory."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        tokenizer = load_tokenizer(directory)
        if tokenizer is None:
            raise UserError(f"{directory}: has no tokenizer; expected tokenizer.json")
        return tokenizer.backend_tokenizer
    from tokenizers import Tokenizer

    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise UserError(f"{path}: more than {MAX_TOKENIZER_BYTES} bytes; refused, is it the right file?")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        problem = damage(path) or f"the tokenizer cannot be loaded: {first_line(error)}"
        raise UserError(f"{path}: {problem}") from None


def vocabulary(settings: TokenizerSettings, layout: Layout) -> Vocabulary:
    """Plan the tokens of a merge. A model without a tokenizer counts as having the donor's.

    Raises UserError for a tokenizer that cannot be read, a token that a rule expects and a model lacks, and a result of
    more than MAX_ROWS rows.
    """
    recipe, donor = layout.recipe, layout.recipe.donor
    source = donor if settings.source in WORDS else recipe.same_input(settings.source)
    directories = {name: model.directory for name, model in layout.models.items()}
    if source not in directories:
        directories[source] = recipe.directory(source, weights=False, key="tokenizer")
    if source != donor:  # whose files were all checked
        refuse_damaged_tokenizer(source, directories[source])
    rows: dict[str, int] = {}  # of every input's embedding
    for model in recipe.inputs:
        count = layout.row_count(model, layout.embedding(model) or "")
        if count is None:
            raise UserError(
                f"model '{model}': no tensor is known as its tokens' embedding; remove the tokenizer's keys"
            )
        rows[model] = count
    has = {m: any((directories[m] / file).is_file() for file in _TOKENIZERS) for m in dict.fromkeys([*rows, source])}
    default = donor if has[donor] else source
    backends = {model: _load(directories[model]) for model in has if has[model] or model == source}
    vocabularies = {model: backend.get_vocab(with_added_tokens=True) for model, backend in backends.items()}
    ids = {model: vocabularies.get(model, vocabularies[default]) for model in rows}
    notes = [f"model '{m}' has no tokenizer; its tokens count as those of '{default}'" for m in rows if not has[m]]
    # The tokens, and how many rows they make.
    tokens = vocabularies[source]
    models = {model: (backends[model], rows[model]) for model in rows if model in backends}
    added = _new_tokens(settings, tokens, models)
    if added:
        backends[source].add_tokens(added)
        tokens = backends[source].get_vocab(with_added_tokens=True)
        notes.append(f"the tokenizer of '{source}' gets {len(added)} tokens more")
    behind = {model: rows_behind(layout, model) for model in rows}
    result_behind = behind.get(source, behind[donor])
    needed = 1 + max(tokens.values(), default=0)
    # A token of a row behind, as that of an image, is only read, so the head needs no row for it.
    size = rows.get(source, 0) - behind.get(source, 0)
    size = size if not added and needed <= rows.get(source, 0) else max(size, needed)
    multiple = settings.pad_to_multiple_of or 1
    size = -(-size // multiple) * multiple
    if size > MAX_ROWS:
        cause = "the ids of its tokens" if multiple == 1 else f"pad_to_multiple_of {multiple}"
        raise UserError(f"{directories[source]}: the tokenizer: {cause}: the result would have {size} rows of tokens")
    # Where the rows come from that the recipe speaks of, and which come from nowhere.
    rules: dict[int, RowRule] = {}
    for text, rule in settings.rules.items():
        if rule.is_zero:
            rules[tokens[text]] = RowRule(None, rule.force)
        elif rule.model is not None:
            token, model = rule.token_of(text), recipe.same_input(rule.model)
            row = token if isinstance(token, int) else ids[model].get(token)
            if row is None or row >= rows[model]:
                missing = f"token id {token}" if isinstance(token, int) else f"token '{token}'"
                raise UserError(
                    f"tokenizer.tokens.{text}: model '{rule.model}' has no {missing} among its {rows[model]} rows"
                )
            rules[tokens[text]] = RowRule((model, row), rule.force)
    zeros = [
        token
        for token, i in tokens.items()
        if i not in rules and not any(ids[model].get(token, count) < count for model, count in rows.items())
    ]
    if zeros:
        notes.append(f"{len(zeros)} tokens have a row in no model; theirs are zeros")
    # What the donor's generation config says by id, unless the tokenizer's model has one.
    folder, stated, generation = directories[source], dict[str, Any](), None
    if folder != directories[donor] and (folder / "config.json").exists():
        stated = stated_ids(read_hf_config(folder))
    path = directories[donor] / GENERATION
    if path.is_file() and (folder == path.parent or not (folder / GENERATION).is_file()):
        generation, lines = follow_tokens(read_json(path), ids[donor], tokens, path.name, stated)
        notes += lines
    lost = [model for model in rows if behind[model] > result_behind]
    notes += [
        f"model '{model}' has {behind[model]} rows of no token behind its vocab_size, the result {result_behind}: the "
        "others are left out" for model in lost
    ]  # fmt: skip
    return Vocabulary(
        size, tokens, ids, folder, rules, added, notes, stated, generation, behind=behind, result_behind=result_behind
    )


def rows_behind(layout: Layout, model: str) -> int:
    """Return how many rows an input's embedding has behind its `vocab_size`, which its head lacks.

    Such a row is of no token that the model writes: of an image (Mllama), or of what precedes a text (Moshi).
    """
    config = layout.config(model) or {}
    embedding = layout.row_count(model, layout.embedding(model) or "") or 0
    heads = [name for name in layout.names[model] if layout.is_head_weight(name)]
    said = {block.get("vocab_size") for block in config_blocks(config)}
    if len(heads) != 1 or config.get("model_type") in UNTIED_FAMILIES | TIED_FAMILIES:
        return 0
    head = layout.row_count(model, heads[0]) or 0
    return embedding - head if head in said and 0 < head < embedding else 0


def _new_tokens(
    settings: TokenizerSettings, known: Mapping[str, int], models: Mapping[str, tuple[Any, int]]
) -> list[Any]:
    """Return what the tokenizer lacks: other models' tokens that have a row, plain ones first, and the recipe's."""
    from tokenizers import AddedToken

    plain: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for backend, count in models.values() if settings.source == "union" else ():
        marked = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        for text, i in sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
            if i >= count or text in known:
                continue
            if text in marked:
                others.setdefault(text, marked[text])
            else:
                plain.setdefault(text, AddedToken(text, normalized=False))
    for text in settings.rules:
        others.setdefault(text, AddedToken(text, normalized=False))
    return [*plain.values(), *(token for text, token in others.items() if text not in known and text not in plain)]
