"""A student opened by name, once: directory, config, tokenizer, chat template and end tokens. hf.py reads weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.chat.template import chat_template, end_of_turn
from bmjax.config import UserError
from bmjax.io import hub
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.weights import hf


@dataclass(frozen=True)
class Student:
    """A model on disk, ready to be loaded."""

    directory: Path  # its Hugging Face directory, fetched from the hub where it was named by an id
    hf_config: Mapping[str, Any]  # what config.json holds
    config: ModelConfig  # the same as sizes of the architecture
    tokenizer: Any  # transformers' fast tokenizer; None without tokenizer files
    template: str | None  # the Jinja text of the chat template asked for; None where no tokenizer was asked for
    stored_end_tokens: tuple[int, ...]  # the ids that its files end a generation with
    end_tokens: tuple[int, ...]  # those, and the one that the template writes after an assistant's turn


def open(name: str | Path, *, template: str | None = None, purpose: str | None = None) -> Student:
    """Open a model by its name; UserError when the model, its config, its tokenizer or the template cannot be had.

    name: a directory or a hub id, `id@revision` too. template: None is the tokenizer's own, else a name in
    bmjax/chat/templates or a FILE.jinja. purpose: what needs a tokenizer and a template, for the error when they are
    missing ("training"); None: both are optional, and the template is not read.
    """
    directory = hub.model_directory(name)
    hf_config = read_hf_config(directory)
    config = ModelConfig.from_hf(hf_config, str(directory / "config.json"))
    tokenizer = hf.load_tokenizer(directory)
    stored = hf.end_tokens(directory, config, tokenizer)
    if purpose is None:
        return Student(directory, hf_config, config, tokenizer, None, stored, stored)
    if tokenizer is None:
        raise UserError(f"{directory}: no tokenizer files (tokenizer.json or vocab.json); {purpose} needs a tokenizer")
    text = chat_template(tokenizer, template)
    end = end_of_turn(tokenizer, text)
    ends = stored if end is None or end in stored else (*stored, end)
    return Student(directory, hf_config, config, tokenizer, text, stored, ends)
