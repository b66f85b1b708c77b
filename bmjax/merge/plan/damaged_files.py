"""Side files of a model that are not what their names say: pointers of Git LFS, files cut off, files nobody may read.

Plans call it before they load a tokenizer. A result would get such a file as it is, and no loader would take it.
"""

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from bmjax.config import UserError, first_line, read_text
from bmjax.io.safetensors import LFS_POINTER
from bmjax.merge.plan.side_files import is_tokenizer_file, side_files, tokenizer_files
from bmjax.weights.tokenizer import MAX_CHARACTERS, read_json

# What loaders read beside the tokenizer's files; weights are those of a module of sentence-transformers.
_LOADED = ("*config.json", "modules.json", "*.py", "*.safetensors")
# Files that hold something in every tokenizer that has them.
_NEVER_EMPTY = ("*.model", "*.spm", "*.tiktoken", "vocab.txt")
_OBJECTS = ("*config.json", "tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_CLOSED = "cannot be read"  # begins the problem of a file that no merge can copy
# Those in which `auto_map` names classes.
_CONFIGS_OF_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def check_side_files(model: str, directory: Path) -> list[str]:
    """Return a line for each damaged file of a donor that no loader reads, and for code that is named and not there.

    Raises UserError, one line, for a damaged file that loaders read, and for any that cannot be read.
    """
    notes, listed = [], [(path, path.relative_to(directory)) for path in side_files(directory).paths]
    for path, name in listed:
        # What config.json says is checked by its reader.
        problem = (refusal if name == Path("config.json") else damage)(path)
        if problem is None:
            continue
        if _is_loaded(name) or problem.startswith(_CLOSED):
            raise UserError(f"model '{model}': {path}: {problem}")
        notes.append(f"model '{model}': {path}: {problem}; copied as it is")
    links = sorted(path for path in directory.iterdir() if path.is_symlink() and not path.exists())
    for path in links:
        if _is_loaded(Path(path.name)) and path.suffix != ".safetensors":  # of which open_checkpoint speaks
            raise UserError(f"model '{model}': {path}: no file, only a link that leads nowhere; fetch it again")
    return [*notes, *_missing_code(model, directory)]


def refuse_damaged_tokenizer(model: str, directory: Path) -> None:
    """Raise a UserError for a damaged file among those of a tokenizer that a result gets from another model."""
    for path in tokenizer_files(directory):
        if problem := damage(path):
            raise UserError(f"model '{model}': {path}: {problem}")


def damage(path: Path) -> str | None:
    """Return what is wrong with a file, and what to do about it; None where nothing is."""
    if problem := refusal(path):
        return problem
    if not path.stat().st_size and (path.suffix == ".json" or _is(path.name, _NEVER_EMPTY)):
        return "is empty; fetch it again"
    if path.suffix != ".json" or path.stat().st_size > MAX_CHARACTERS:
        return None
    try:
        content = json.loads(read_text(path))
    except UserError as error:
        return f"{str(error).removeprefix(f'{path}: ')}; fetch it again"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON, it was cut off or damaged: {first_line(error)}; fetch it again"
    if not isinstance(content, dict) and _is(path.name, _OBJECTS):
        return f"expected a JSON object, found {type(content).__name__}; fetch it again"
    return None


def refusal(path: Path) -> str | None:
    """Return why a file cannot be read at all, and what to do about it; None where it can."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        return f"{_CLOSED}: {error.strerror}; get the right to read it, or move it out of the directory"
    if start == LFS_POINTER:
        return "a pointer of Git LFS, not the file itself; run `git lfs pull` in its directory"
    return None


def _missing_code(model: str, directory: Path) -> Iterator[str]:
    """Yield a line for each file of code that a config's `auto_map` names and the directory lacks."""
    for config in _CONFIGS_OF_CODE:
        classes = read_json(directory / config).get("auto_map")
        named = classes.values() if isinstance(classes, dict) else [classes]
        names = [name for value in named for name in (value if isinstance(value, list) else [value])]
        # REPOSITORY--MODULE.CLASS is code that loaders fetch from the hub.
        modules = {name.rpartition(".")[0]: None for name in names if isinstance(name, str) and "--" not in name}
        files = [f"{module.replace('.', '/')}.py" for module in modules if module]
        if missing := [file for file in files if not (directory / file).is_file()]:
            yield (
                f"model '{model}': {config} names code in {', '.join(missing)} (auto_map), which its directory lacks: "
                "loaders will not find it for the result, either; add the file, or remove auto_map"
            )


def _is_loaded(name: Path) -> bool:
    """Return whether loaders read a file, by its path in a model's directory."""
    return is_tokenizer_file(name) or _is(name.name, _LOADED)


def _is(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
