"""The rows of a step that looks at data: of each domain the documents to learn from, and those to be judged by.

dispatch.py reads them before the first step, for `--check`, too. The pipeline reads them before it trains the branches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bmjax.branch.examples import Dataset, Encoding, Example, build_dataset, check_vocabulary
from bmjax.branch.loader import Loader
from bmjax.chat.forms import UNSUPPORTED
from bmjax.config import UserError
from bmjax.io.rows import Row, mapped, read_rows
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.merge.recipe.step import Step
from bmjax.weights.student import Student

MANY = 10  # times `held_out`: so many documents of `data` can spare those
FEW = 8  # held-out documents of a domain; fewer of them judge little


@dataclass(frozen=True)
class Domain:
    """The documents of one branch's domain."""

    learned: Loader  # `batch` packed rows at a time
    judged: Loader  # held-out documents, one packed row at a time, as they come
    notes: tuple[str, ...]  # what was cut, left out or is too little, a line each


def read_domains(step: Step, seed: int, student: Student) -> list[Domain]:
    """Read, draw and tokenize the rows of a step that looks at data, a domain for each branch.

    seed: which documents are drawn and held out, and their order. student: the base, opened with its template.

    Raises:
        UserError: for rows that cannot be read, and where too few are left to learn from, or none to judge by.
    """
    p = step.calibration
    assert p is not None and student.template is not None
    encoding = Encoding(student.tokenizer, student.template, p.seq_len, long_prompts="drop")
    domains = []
    for name, source, held_out_source, columns in zip(
        step.branches, step.data, step.held_out_data, step.columns, strict=True
    ):
        label = f"model '{name}'"
        rows = _rows(source, f"{label}: data", columns)
        least = 0 if held_out_source else p.held_out
        if p.documents <= least:
            raise UserError(
                f"documents: {p.documents}, {least} of them to be held out (held_out): none is left to learn from; "
                "raise documents, or lower held_out"
            )
        if len(rows) <= least:
            raise UserError(
                f"{label}: data: {len(rows)} rows, {least} of them to be held out (held_out); give more rows, lower "
                "it, or give held_out_data"
            )
        order = np.random.default_rng([seed, 2]).permutation(len(rows))[: p.documents]
        drawn = build_dataset([rows[i] for i in order], encoding)
        if len(drawn.examples) <= least:
            left_out = "; ".join(drawn.remarks) or "no row is left out"
            raise UserError(
                f"{label}: data: {len(drawn.examples)} of {len(order)} rows can be used, {least} of them to be held "
                f"out (held_out); give more rows, lower it, or give held_out_data ({left_out})"
            )
        notes = [f"{label}: data: {line}" for line in _remarks(drawn, p.seq_len)]
        # Rows of its own to judge by change the judge alone: the same documents are learned from, unless few would be.
        first = p.held_out if least or len(drawn.examples) >= MANY * p.held_out else 0
        learned, held_out, judging = replace(drawn, examples=drawn.examples[first:]), drawn, p.held_out
        if held_out_source:
            others = _rows(held_out_source, f"{label}: held_out_data", columns)
            order = np.random.default_rng([seed, 3]).permutation(len(others))
            held_out, judging = build_dataset([others[i] for i in order[: p.judged]], encoding), p.judged
            notes += [f"{label}: held_out_data: {line}" for line in _remarks(held_out, p.seq_len)]
        for dataset in (drawn, held_out):
            check_vocabulary(dataset, student.config.vocab_size, student.directory)
        of_the_judge = held_out.examples[:judging]
        judged = _unseen(of_the_judge, learned.examples)
        if len(judged) < len(of_the_judge):
            notes.append(
                f"{label}: {len(of_the_judge) - len(judged)} of {len(of_the_judge)} held-out documents occur among "
                "those that are learned from, or twice: left out"
            )
        if not judged:
            raise UserError(
                f"{label}: all held-out documents occur among those that are learned from; give held_out_data, rows "
                "that no model was trained on"
            )
        learned_rows = Loader(learned, p.seq_len, p.batch, True, True, seed)
        notes += _remarks_on_packed(label, step, p, learned_rows)
        held_out_rows = Loader(replace(held_out, examples=judged), p.seq_len, 1, True, False, seed)
        domains.append(Domain(learned_rows, held_out_rows, tuple(notes)))
    return domains


def notes_of_judge(step: Step) -> Iterator[str]:
    """Yield a line where a step is judged by rows that its models may have been trained on."""
    if names := [f"'{name}'" for name, rows in zip(step.branches, step.held_out_data, strict=True) if rows is None]:
        yield (
            f"step '{step.name}': the held-out rows of {', '.join(names)} come from their data: if a model was trained "
            "on them, held-out losses are too low and judge badly; give held_out_data, rows that no model was trained "
            "on"
        )


def notes_of_rows(step: Step, domains: Sequence[Domain]) -> Iterator[str]:
    """Yield what the rows of a step lack, a line each."""
    counts = {name: len(domain.judged.dataset.examples) for name, domain in zip(step.branches, domains, strict=True)}
    if few := [f"{count} of '{name}'" for name, count in counts.items() if count < FEW]:
        yield (
            f"step '{step.name}': few held-out documents judge little ({', '.join(few)}): what a stage gains has to be "
            "told from noise by them; give more (held_out, or judged of held_out_data)"
        )
    for domain in domains:
        yield from domain.notes


def _rows(source: str | list[str], label: str, columns: Mapping[str, str]) -> list[Row]:
    return list(mapped(read_rows(source, label), columns, UNSUPPORTED))


def _remarks(dataset: Dataset, seq_len: int) -> Iterator[str]:
    yield from dataset.remarks
    if dataset.truncated:
        yield (
            f"{dataset.truncated} of {len(dataset.examples)} documents are cut at seq_len {seq_len}: only their "
            "beginning counts"
        )


def _unseen(held_out: Sequence[Example], learned: Sequence[Example]) -> list[Example]:
    """Return the held-out documents that are not among the learned ones, each once."""
    seen, unseen = {example.tokens.tobytes() for example in learned}, []
    for example in held_out:
        if (text := example.tokens.tobytes()) not in seen:
            seen.add(text)
            unseen.append(example)
    return unseen


def _remarks_on_packed(label: str, step: Step, p: CalibrationSettings, learned: Loader) -> Iterator[str]:
    texts = [example.tokens.tobytes() for example in learned.dataset.examples]
    if copies := len(texts) - len(set(texts)):
        yield f"{label}: data: {copies} of {len(texts)} documents are copies of others"
    if (p.along != "changes" or step.method.name == "layerwise") and len(learned.rows) < p.rows:
        yield (
            f"{label}: data: {len(learned.rows)} packed rows of {p.seq_len} tokens, fewer than rows, {p.rows}: all are "
            "taken; give more rows or documents"
        )
