"""What the tokenizer files of a directory say, read as data alone: tokens, chat template, end tokens.

Nothing here fails for a broken file: what cannot be read is not known. Loading a tokenizer is vocabulary.py's.
"""

import contextlib
import filecmp
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bmjax.config import UserError, read_text
from bmjax.merge.plan.pieces import pieces
from bmjax.merge.recipe.tokenizer import FURTHER_TEMPLATES
from bmjax.weights.tokenizer import MAX_CHARACTERS, read_json

EOS = "eos_token_id"
# What tokenizers are loaded from, the fast one's first.
_VOCABULARIES = (
    "tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "spm.model", "tekken.json", "qwen.tiktoken",
)  # fmt: skip


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
    files = vocabulary_files(directory)
    texts = _texts(directory, files[0]) if files else _added(directory)
    return max(texts or (), default=None)


def end_text(directory: Path) -> str | None:
    """Return the end token that a directory's tokenizer_config.json names."""
    token = read_json(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def further_templates(directory: Path) -> list[str]:
    """Return the names of a directory's chat templates beside the default, `tool_use` for one."""
    names = {path.stem: None for path in sorted((directory / FURTHER_TEMPLATES).glob("*.jinja"))}
    for file in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        template = read_json(directory / file).get("chat_template")
        if isinstance(template, list):
            names |= {str(entry.get("name")): None for entry in template if isinstance(entry, dict)}
        elif isinstance(template, dict):
            names |= {str(name): None for name in template}
    return [name for name in names if name != "default"]


def ids_in(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the end tokens of a config or generation config, which has one or a list."""
    value = config.get(EOS)
    yield from (i for i in (value if isinstance(value, list) else [value]) if type(i) is int)


def tokenizer_difference(first: Path, second: Path) -> str | None:
    """Return in words where two directories' tokenizers give other ids to tokens; None where they agree.

    Directories without a tokenizer agree with all. What only one tokenizer has counts as well, added tokens too.
    """
    files = vocabulary_files(first), vocabulary_files(second)
    if not all(files):
        return None
    common = next((name for name in files[0] if name in files[1]), None)
    name, other = (common, common) if common else (files[0][0], files[1][0])
    paths = first / name, second / other
    if first.samefile(second):
        return None
    if max(path.stat().st_size for path in paths) > MAX_CHARACTERS:
        return f"{name} is too large to be compared"
    is_same_file = common is not None and filecmp.cmp(*paths, shallow=False)
    if is_same_file and _added(first) == _added(second):
        return None
    texts, others = _texts(first, name), _texts(second, other)
    if texts is None or others is None:
        differing = None
    else:
        differing = [i for i in sorted(texts.keys() | others.keys()) if texts.get(i) != others.get(i)]
    if differing == []:
        return None
    if common is None:  # ids may be counted otherwise in another kind of file
        return f"its tokens are in {other}, not in {name}, and the two cannot be compared"
    if texts is None or others is None or differing is None:
        return "its added tokens differ" if is_same_file else f"{common} differs"
    shown = "; ".join(f"{i}: {_shown(others.get(i))} for {_shown(texts.get(i))}" for i in differing[:3])
    count = f"{len(differing)} ids differ" if len(differing) > 1 else "1 id differs"
    return f"{count} ({shown}{', ...' * (len(differing) > 3)})"


def vocabulary_files(directory: Path) -> list[str]:
    """Return the names of the files that a directory's tokenizer can be loaded from, the fast one's first."""
    return [name for name in _VOCABULARIES if (directory / name).is_file()]


def _texts(directory: Path, name: str) -> dict[int, str] | None:
    """Return the token of every id by a vocabulary file and the files of added tokens; None where it cannot be read."""
    path, texts = directory / name, dict[int, str]()
    if name == "tokenizer.json":
        if (ids := token_ids(directory)) is None:
            return None
        texts = {i: text for text, i in ids.items()}
    elif name == "vocab.json":
        texts = {i: text for text, i in read_json(path).items() if type(i) is int}
    elif name == "vocab.txt":
        with contextlib.suppress(UserError):
            # Tokens may hold what splitlines takes for an end of a line, U+2028 for one.
            lines = read_text(path, MAX_CHARACTERS).replace("\r\n", "\n").removesuffix("\n")
            texts = dict(enumerate(lines.split("\n")))
    elif name.endswith(".model") and path.stat().st_size <= MAX_CHARACTERS:
        texts = dict(enumerate(pieces(path) or ()))
    if not texts:
        return None
    # The same token may be added once more under another id, which no loader then uses.
    known = set(texts.values())
    return {**{i: text for i, text in _added(directory).items() if text not in known}, **texts}


def _added(directory: Path) -> dict[int, str]:
    """Return the tokens of the files that list added ones, by id."""
    listed = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder")
    texts = {
        int(i): str(token["content"])
        for i, token in (listed.items() if isinstance(listed, dict) else ())
        if re.fullmatch(r"[0-9]{1,9}", i) and isinstance(token, dict) and "content" in token
    }
    added = read_json(directory / "added_tokens.json")
    return texts | {i: text for text, i in added.items() if type(i) is int}


def _shown(text: str | None) -> str:
    return "no token" if text is None else f"'{text[:20]}'"
