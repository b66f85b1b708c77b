"""A student opened by name, once: directory, config, tokenizer, chat template and end tokens. hf.py reads weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bmjax.chat.marks import Marks, add_marks, end_of_turn, fitting_templates, marks_of, missing
from bmjax.chat.template import chat_template, render
from bmjax.config import UserError
from bmjax.io import hub
from bmjax.io.model_files import quantization
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.weights.tokenizer import end_tokens, load_tokenizer


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
    marks: Marks | None = None  # what the template writes around turns
    added: Mapping[str, int] = field(default_factory=dict)  # ids of marks that became tokens in free rows


def open(
    name: str | Path,
    *,
    template: str | None = None,
    purpose: str | None = None,
    marks: Literal["add", "refuse"] | None = None,
) -> Student:
    """Open a model by its name; UserError when the model, its config, its tokenizer or the template cannot be had.

    Arguments:
        name: a directory or a hub id, `id@revision` too.
        template: None is the tokenizer's own, else a name in bmjax/chat/templates or a FILE.jinja.
        purpose: what needs a tokenizer and a template, for the error when they are missing ("training"); None: both
            are optional, and the template is not read.
        marks: of a student to be trained, what becomes of the template's marks that are no tokens: `add` them in free
            rows of the vocabulary, or `refuse` the template. None: they are read as pieces of text.
    """
    directory = hub.model_directory(name)
    hf_config = read_hf_config(directory)
    scheme = quantization(hf_config)
    if scheme not in (None, "fp8 blockwise"):
        raise UserError(
            f"{directory}: the weights are quantized ({scheme}), which cannot be trained; name the model that they "
            "were made from, or one dequantized to bfloat16"
        )
    config = ModelConfig.from_hf(hf_config, str(directory / "config.json"))
    tokenizer = load_tokenizer(directory)
    stored = end_tokens(directory, config.eos_token_ids, tokenizer)
    if purpose is None:
        return Student(directory, hf_config, config, tokenizer, None, stored, stored)
    if tokenizer is None:
        raise UserError(f"{directory}: no tokenizer files (tokenizer.json or vocab.json); {purpose} needs a tokenizer")
    text = chat_template(tokenizer, template)
    written = marks_of(tokenizer, text)
    added = {} if marks is None else _known_marks(tokenizer, written, template, text, marks, config.vocab_size)
    end = end_of_turn(tokenizer, text)
    ends = stored if end is None or end in stored else (*stored, end)
    return Student(directory, hf_config, config, tokenizer, text, stored, ends, written, added)


def _known_marks(
    tokenizer: Any, marks: Marks, template: str | None, text: str, rule: str, vocab_size: int
) -> dict[str, int]:
    """Make every mark one token, or refuse the template; returns the ids of the tokens that were added."""
    label = f"template: {template or 'of the student'}"
    unknown = missing(tokenizer, marks)
    if template is None:  # the student has learned its own template's other marks as it reads them
        unknown = [mark for mark in unknown if mark == marks.end]
    if marks.end is not None and not unknown:
        return {}
    fitting = fitting_templates(tokenizer)
    advice = f"set template: {' or '.join(fitting) or 'a FILE.jinja whose marks are tokens'}"
    if marks.end is None:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        render(tokenizer, turns, text, label, prompt=False)  # a template that cannot be rendered says so itself
        raise UserError(
            f"{label}: nothing that ends a turn follows an answer, so a model trained on it would never stop; {advice}"
        )
    if rule == "refuse":
        raise UserError(
            f"{label}: {', '.join(unknown)} are no tokens of the student; trained on as pieces of text, they would not "
            f"end a generation; {advice}, or marks: add"
        )
    try:
        return add_marks(tokenizer, unknown, vocab_size)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
