"""What the tokenizer files of a directory say, read as JSON alone: tokens, chat template, end tokens.

Nothing here fails for a broken file: what cannot be read is not known. Loading a tokenizer is vocabulary.py's.
"""

import filecmp
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bmjax.weights.tokenizer import MAX_CHARACTERS, read_json

EOS = "eos_token_id"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")


@functools.lru_cache(8)
def _ids(path: Path, _state: tuple[int, int]) -> dict[str, int] | None:
    content = read_json(path)
    model = content.get("model")
    stored = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(stored, dict):
        ids = {text: i for text, i in stored.items() if type(i) is int}
    elif isinstance(stored, list):  # of a unigram model: (token, score)
        ids = {str(pair[0]): i for i, pair in enumerate(stored) if isinstance(pair, list) and pair}
    else:
        return None
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int:
            ids[token["content"]] = token["id"]
    return ids


def token_ids(directory: Path) -> dict[str, int] | None:
    """Return the id of every token in a directory's tokenizer.json; None where it has none that can be read."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    stat = path.stat()
    return _ids(path, (stat.st_size, stat.st_mtime_ns))


def largest_id(directory: Path) -> int | None:
    """Return the largest id of any token in a directory's tokenizer files; None where none of them tells it."""
    tables = [read_json(directory / name) for name in ("vocab.json", "added_tokens.json")]
    tables.append(token_ids(directory) or {})
    return max((i for table in tables for i in table.values() if type(i) is int), default=None)


def end_text(directory: Path) -> str | None:
    """Return the end token that a directory's tokenizer_config.json names."""
    token = read_json(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def ids_in(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the end tokens of a config or generation config, which has one or a list."""
    value = config.get(EOS)
    yield from (i for i in (value if isinstance(value, list) else [value]) if type(i) is int)


def tokenizer_difference(first: Path, second: Path) -> str | None:
    """Return in words where two directories' tokenizers give other ids to tokens; None where they agree.

    Directories without a tokenizer agree with all. What only one tokenizer has counts as well.
    """
    name = next((n for n in _VOCABULARIES if (first / n).is_file() and (second / n).is_file()), None)
    if name is None or max((folder / name).stat().st_size for folder in (first, second)) > MAX_CHARACTERS:
        return None if name is None else f"{name} is too large to be compared"
    if filecmp.cmp(first / name, second / name, shallow=False):
        return None
    ids = [token_ids(folder) if name == "tokenizer.json" else None for folder in (first, second)]
    if ids[0] is None or ids[1] is None:
        return f"{name} differs"
    texts, others = ({i: text for text, i in known.items()} for known in ids if known is not None)
    differing = [i for i in sorted(texts.keys() | others.keys()) if texts.get(i) != others.get(i)]
    if not differing:
        return None
    shown = "; ".join(f"{i}: {_shown(others.get(i))} for {_shown(texts.get(i))}" for i in differing[:3])
    count = f"{len(differing)} ids differ" if len(differing) > 1 else "1 id differs"
    return f"{count} ({shown}{', ...' * (len(differing) > 3)})"


def _shown(text: str | None) -> str:
    return "no token" if text is None else f"'{text[:20]}'"
