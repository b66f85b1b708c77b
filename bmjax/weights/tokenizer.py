"""Tokenizer files of a Hugging Face directory: read with transformers, written so that every server reads them.

transformers 4 and 5, vLLM, SGLang and llama.cpp's converter name the same things differently. A student's files are
copied as they stand; only what was changed, and what one of these readers cannot read, is written anew. No JAX is
imported here.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bmjax.config import UserError, first_line, read_text

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MAX_CHARACTERS = 2**27  # of a tokenizer's file


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none."""
    if path.is_file():
        with contextlib.suppress(UserError, ValueError, RecursionError):
            if isinstance(content := json.loads(read_text(path, MAX_CHARACTERS)), dict):
                return content
    return {}


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has the files that a tokenizer is loaded from."""
    files = {name for name in TOKENIZER_FILES if (directory / name).is_file()}
    return bool(files & {"tokenizer.json", "tokenizer.model", "vocab.txt"}) or {"vocab.json", "merges.txt"} <= files


def stored_template(directory: Path) -> str | None:
    """Return the chat template of a directory, as loaders choose it: a file of its own goes first."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        with contextlib.suppress(UserError):
            return read_text(jinja)
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_json(directory / name).get("chat_template")
        if isinstance(template, list):  # named ones
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default") or next(iter(named.values()), None)
        if isinstance(template, str) and template:
            return template
    return None


def load_tokenizer(directory: str | Path) -> Any:
    """Load the fast tokenizer of a directory; None when it has no tokenizer files. Never runs code from there.

    tokenizer.json is read as it is, but for the truncation and padding that it may have been saved with: bmjax encodes
    whole texts, also by the backend itself. transformers' AutoTokenizer is only for directories without it: for some
    architectures it replaces the splitting and normalizing that tokenizer.json says.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
    except Exception as error:
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {first_line(error)}") from None
    return tokenizer


def write_tokenizer(
    target: Path,
    source: Path | None,
    tokenizer: Any = None,
    template: str | None = None,
    added: Mapping[str, int] = MappingProxyType({}),
    end: str | None = None,
    context: int | None = None,
) -> None:
    """Write the tokenizer of a model into its directory.

    Arguments:
        target: the directory, which exists.
        source: the directory whose files are copied as they stand; None: `tokenizer` is saved.
        tokenizer: the transformers tokenizer; needed without `source`, and where tokens were added.
        template: Jinja text of the chat template, written in both forms that readers look for; None: the files' own.
        added: id of each special token that `source` lacks.
        end: the special token that ends a turn, where tokens were added; it becomes the tokenizer's end token.
        context: tokens that the model reads at most, which no tokenizer may promise more of; None: not known.
    """
    if source is None:
        tokenizer.save_pretrained(str(target))
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    config_file = target / "tokenizer_config.json"
    if not config_file.is_file():
        if template is None and not added:
            return
        write_json(config_file, {"tokenizer_class": "PreTrainedTokenizerFast"})
    config = json.loads(read_text(config_file))
    original = dict(config)
    if added:
        _add_tokens(target, config, tokenizer, added, end)

    set_longest(config, context)

    # transformers 5 names its general class TokenizersBackend and lists extra_special_tokens; 4 knows neither.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # 4's general class gives token_type_ids unless told otherwise, which a decoder refuses to generate from.
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(config.get("extra_special_tokens"), list):
        listed = config.get("additional_special_tokens") or []
        config["additional_special_tokens"] = list(dict.fromkeys([*listed, *config.pop("extra_special_tokens")]))

    # Servers look for the template in the config or in a file of its own.
    jinja = target / "chat_template.jinja"
    if template is None and jinja.is_file():
        template = read_text(jinja)
    elif template is None and isinstance(config.get("chat_template"), str):
        template = config["chat_template"]
    if template is not None:
        config["chat_template"] = template
        jinja.write_text(template, encoding="utf-8")
        (target / "chat_template.json").unlink(missing_ok=True)
    if config != original:
        write_json(config_file, config)


def set_longest(config: dict[str, Any], context: int | None) -> None:
    """Make a tokenizer config's model_max_length true: where it is missing or more than the context, the context.

    Tokenizers saved without one say 10^30, and transformers never warns of a text that is too long.
    """
    longest = config.get("model_max_length")
    is_known = isinstance(longest, (int, float)) and 0 < longest <= (context or 0)
    if context is not None and not is_known:
        config["model_max_length"] = context


def _add_tokens(
    target: Path, config: dict[str, Any], tokenizer: Any, added: Mapping[str, int], end: str | None
) -> None:
    """Write added special tokens into every file that lists tokens."""
    entries = {
        str(token): {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                     "special": True}
        for text, token in added.items()
    }  # fmt: skip
    tokenizer_file = target / "tokenizer.json"
    if tokenizer_file.is_file():
        values = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        values["added_tokens"] += [{"id": int(token), **entry} for token, entry in entries.items()]
        write_json(tokenizer_file, values)
    else:
        tokenizer.backend_tokenizer.save(str(tokenizer_file))
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = config["added_tokens_decoder"] | entries
    end_token = {} if end is None else {"eos_token": end}
    config |= {**end_token, "additional_special_tokens": _with(config, added)}
    for name in ("added_tokens.json", "special_tokens_map.json"):
        file = target / name
        if file.is_file():
            values = json.loads(read_text(file))
            changes = dict(added) if name == "added_tokens.json" else {
                **end_token, "additional_special_tokens": _with(values, added)
            }  # fmt: skip
            write_json(file, values | changes)


def _with(values: Mapping[str, Any], added: Mapping[str, int]) -> list[Any]:
    tokens = values.get("additional_special_tokens") or values.get("extra_special_tokens") or []
    return [*(tokens if isinstance(tokens, list) else tokens.values()), *added]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as Hugging Face does, in lines."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with what transformers 4 and 5 spell differently in both spellings.

    4 reads rope_theta and rope_scaling at the top, 5 reads rope_parameters. A reader that finds only the other spelling
    computes with its default theta, and says nothing. `dtype` and `torch_dtype` are written where the weights are.
    What is written is never quantized, whatever it was read from, and no transformers wrote it.
    """
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_version")}
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in parameters.values()):  # one setting a kind of layer: 5 alone has it
        return dict(config)
    rope = {**scaling, **parameters}
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    if theta is None and not rope:
        return dict(config)
    theta = 10_000.0 if theta is None else theta
    kind = rope.pop("rope_type", None) or scaling.get("type") or "default"
    rope.pop("type", None)
    both = {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": kind, **rope}}
    scaled = {"rope_scaling": None if kind == "default" else {"rope_type": kind, "type": kind, **rope}}
    return {**config, **both, **scaled}


def end_tokens(directory: str | Path, config_ids: tuple[int, ...], tokenizer: Any = None) -> tuple[int, ...]:
    """Return the token ids that end a generation: of generation_config.json, of the config, of the tokenizer."""
    path = Path(directory) / "generation_config.json"
    try:
        stored: Any = json.loads(read_text(path)).get("eos_token_id") if path.exists() else None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: expected a JSON object") from None
    ids = [] if stored is None else list(stored) if isinstance(stored, list) else [stored]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{path}: eos_token_id is {stored!r}, expected a token id or a list of them")
    ids += config_ids
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(ids))
