"""Writes the cards of models: what one is, how it is loaded and asked, how it was made, how it scored.

Trainings, conversions and merges write a card into every directory that they export; a run adds scores and lineage. The
text is templates/*.md.jinja. No JAX is imported here, and no transformers.
"""

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bmjax.chat.template import TEMPLATE_NAMES, named_template
from bmjax.config import UserError
from bmjax.io.atomic import write_atomic
from bmjax.io.card import (
    NAME,
    bases,
    code,
    fenced,
    join_card,
    license_fields,
    public_name,
    read_head,
    split_card,
    yaml_text,
)
from bmjax.model.config import ModelConfig
from bmjax.version import __version__
from bmjax.weights.tokenizer import read_json, stored_template

TEMPLATES = Path(__file__).parent / "templates"
QUESTION = "What is 2 + 3?"
# How a model is loaded and what the hub calls its use, by the end of its class's name.
_LOADERS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "AutoTokenizer", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "AutoTokenizer", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "AutoTokenizer", "question-answering"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "AutoTokenizer", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "AutoTokenizer", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "AutoTokenizer", "text-generation"),
    "ForConditionalGeneration": ("AutoModelForImageTextToText", "AutoProcessor", "image-text-to-text"),
}
_SCORES, _LINEAGE, _LOADING = "## Scores\n", "## Lineage\n", "## How to load it\n"


def write_card(
    folder: Path,
    *,
    title: str,
    head: Mapping[str, Any],
    versions: Mapping[str, str],
    template: Path = TEMPLATES / "training_card.md.jinja",
    **context: Any,
) -> None:
    """Write the card of the model in `folder`, whose config and tokenizer lie there already.

    Arguments:
        head: fields of the card's head beside library_name and pipeline_tag; `tags` come before all others.
        versions: of the packages beside bmjax that made the model.
        template: fills in the blocks of model_card.md.jinja.
        context: what the template names.
    """
    loader = _loader(folder)
    fields: dict[str, Any] = {"library_name": loader["library"], "tags": head["tags"]}
    if loader["pipeline"]:
        fields["pipeline_tag"] = loader["pipeline"]
    environment = Environment(
        loader=FileSystemLoader([TEMPLATES, template.parent]), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "code": code, "fenced": fenced, "spec": format, "yaml": yaml_text, "public": public_name,
    }  # fmt: skip
    text = environment.get_template(template.name).render(
        head={**fields, **head}, title=title, loader=loader, prompt=_prompt(folder) if loader["chats"] else None,
        versions={"bmjax": __version__, **versions}, **context,
    )  # fmt: skip
    # One empty line between paragraphs; blocks of code stay as they are.
    parts = re.split(r"^((`{3,}).*?^\2)$", text, flags=re.MULTILINE | re.DOTALL)
    text = "".join(re.sub(r"\n{3,}", "\n\n", part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 < 2)
    (folder / NAME).write_text(text, encoding="utf-8")


def write_copy_card(folder: Path, source: str, directory: Path, about: str) -> None:
    """Write the card of a model whose config and tokenizer are another one's.

    Arguments:
        source: the name of that one, a directory or a hub id; its own card, in `directory`, names base and license.
        about: what the model is, in a sentence.
    """
    heads = [read_head(directory)]
    base_ids = bases(source, heads)
    head = {"tags": ["bmjax"], **({"base_model": base_ids} if base_ids else {}), **license_fields(heads)}
    versions = {"jax": version("jax")}
    write_card(folder, title=public_name(source), head=head, versions=versions, about=about, summary="", settings={})


def add_results(
    folder: Path,
    name: str,
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]],
    lineage: str = "",
    head: Mapping[str, Any] | None = None,
) -> None:
    """Write scores and lineage into a model's card, for people and in the form that the hub reads.

    A card that says so already stays untouched. The card's file is replaced, so that other links to it stay.

    Arguments:
        folder: of a model with a card.
        name: of the model.
        scores: by which rows were scored, such as `validation`, and by domain: `accuracy` (share of right answers),
            with `ci95` where its interval is known, or `loss` (nats a token), or both.
        lineage: a paragraph on what the model was made of.
        head: more fields of the card's head.
    """
    path = folder / NAME
    text = path.read_text(encoding="utf-8")
    fields, body = split_card(text)
    results, tables = [], []
    for split, by_domain in scores.items():
        rows = ["| domain | accuracy, % | 95% interval | loss, nats a token |", "|---|---:|---:|---:|"]
        for domain, score in by_domain.items():
            values = {key: float(score[key]) for key in ("accuracy", "loss") if key in score}
            metrics = [{"type": key, "value": round(value, 4)} for key, value in values.items()]
            dataset = {"name": f"{domain} ({split})", "type": domain}
            results.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics})
            cells = [
                f"{100 * values['accuracy']:.1f}" if "accuracy" in values else "",
                " to ".join(f"{100 * end:.1f}" for end in score.get("ci95") or ()) if "accuracy" in values else "",
                f"{values['loss']:.4f}" if "loss" in values else "",
            ]
            rows.append(f"| {code(domain)} | {' | '.join(cells)} |")
        tables.append(f"On {split} rows:\n\n" + "\n".join(rows) + "\n")
    fields |= {**(head or {}), "model-index": [{"name": name, "results": results}]}
    start, _, rest = body.partition(_LOADING)
    for section in (_LINEAGE, _SCORES):  # those of an earlier call
        start = start.partition(section)[0]
    sections = [start.rstrip() + "\n"]
    sections += [f"{_LINEAGE}\n{lineage}\n"] if lineage else []
    sections += ["\n".join([_SCORES, *tables])] if tables else []
    new = join_card(fields, "\n".join([*sections, _LOADING + rest]))
    if new != text:
        write_atomic(path, new)


def store_sampling(folder: Path, temperature: float, top_p: float = 1.0) -> None:
    """Make a model's generation config say how it was scored, so that whoever loads it gets the same answers.

    The file is replaced, so that other links to it stay; one that says so already stays untouched.
    """
    path = folder / "generation_config.json"
    stored = read_json(path)
    kept = {key: value for key, value in stored.items() if key not in _SAMPLING}
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    if (new := kept | sampling) != stored:
        new.pop("transformers_version", None)  # another program wrote this
        write_atomic(path, json.dumps(new, indent=2) + "\n")


_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "num_beams")


def _loader(folder: Path) -> dict[str, Any]:
    """Return how a result is loaded: the library, its classes, the hub's word for its use, and what else reads it."""
    config = read_json(folder / "config.json")
    loader: dict[str, Any] = {"code": "auto_map" in config, "served": False, "trainable": False, "chats": False}
    if (folder / "modules.json").is_file():
        return loader | {"library": "sentence-transformers", "pipeline": "sentence-similarity"}
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    classes = next((entry for end, entry in _LOADERS.items() if name.endswith(end)), None)
    if classes and classes[1] == "AutoProcessor" and "vision_config" not in config:
        classes = ("AutoModelForSeq2SeqLM", "AutoTokenizer", "text2text-generation")
    model, reader, pipeline = classes or ("AutoModel", "AutoTokenizer", None)
    is_decoder = pipeline == "text-generation"
    try:
        ModelConfig.from_hf(config, "config.json")
        trainable = is_decoder
    except UserError:
        trainable = False
    return loader | {
        "library": "transformers", "pipeline": pipeline, "model": model, "reader": reader, "trainable": trainable,
        "served": is_decoder and "auto_map" not in config, "dtype": config.get("dtype", config.get("torch_dtype")),
        "chats": is_decoder,
    }  # fmt: skip


def _prompt(folder: Path) -> dict[str, str] | None:
    """Return the name of a model's chat template and a question as it writes it; None where it has none that does."""
    template = stored_template(folder)
    if template is None:
        return None
    known = [name for name in TEMPLATE_NAMES if named_template(name).strip() == template.strip()]
    name = f"The chat template is {code(known[0])}." if known else "The chat template is the model's own."
    try:
        return {"name": name, "example": _render(template, folder)}
    except Exception:  # a template is a program; the card only lacks the example that it does not write
        return None


def _render(template: str, folder: Path) -> str:
    """Write QUESTION by a chat template, as transformers does, without transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    tokens = {}
    for key, token in read_json(folder / "tokenizer_config.json").items():
        if key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            tokens[key] = token.get("content") if isinstance(token, Mapping) else token
    # transformers marks the assistant's tokens by this tag, which writes nothing.
    plain = re.sub(r"(\{%-?\s*)generation\b", r"\1if true", template)
    plain = re.sub(r"(\{%-?\s*)endgeneration\b", r"\1endif", plain)
    turns = [{"role": "user", "content": QUESTION}]
    return environment.from_string(plain).render(
        messages=turns, add_generation_prompt=True, tools=None, documents=None, **{"bos_token": "", **tokens}
    )
