"""A domain's rows as files: what the backbone reads, what the branch reads, validation and test.

DIR/data/DOMAIN/backbone.jsonl   prompt, reasoning, response      the backbone's rows
DIR/data/DOMAIN/problems.jsonl   prompt, reference                what the teacher is asked (built-in domains)
DIR/data/DOMAIN/train.jsonl      prompt, reasoning, response      the branch's rows
DIR/data/DOMAIN/{validation,test}.jsonl  prompt, reference, reasoning, response
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.demo.problems import Problem, make_problems, solve
from bmjax.io.jsonl import write_jsonl
from bmjax.io.rows import fill, read_rows
from bmjax.pipeline.settings import BuiltinDomain, DomainSettings, SourceSettings


def write_builtin(settings: BuiltinDomain, directory: Path, seed: int) -> None:
    """Problems of a built-in domain. The splits never share a prompt; the backbone's are not asked again."""
    domain = settings.domain
    backbone = make_problems(domain, settings.backbone_count, seed, settings.backbone_levels, split="train")
    known = {problem.prompt for problem in backbone}
    asked = make_problems(domain, settings.count, seed + 1, settings.levels, exclude=known, split="train")
    write_jsonl(directory / "backbone.jsonl", map(_solved, backbone))
    write_jsonl(directory / "problems.jsonl", map(asdict, asked))
    for split, count in (("validation", settings.validation), ("test", settings.test)):
        problems = make_problems(domain, count, seed, settings.levels, split="val" if split == "validation" else "test")
        write_jsonl(directory / f"{split}.jsonl", map(_solved, problems))


def _solved(problem: Problem) -> dict[str, Any]:
    solution = solve(problem.prompt)
    return {
        "prompt": problem.prompt, "reference": problem.reference,
        "reasoning": solution.reasoning, "response": solution.answer,
    }  # fmt: skip


def write_sources(settings: DomainSettings, name: str, directory: Path) -> None:
    """Rows that exist: split by their own files, or by hash of what tells them apart."""
    assert settings.train is not None  # the settings hold train where they hold no builtin
    rows = _rows(settings.train, f"domains.{name}.train")
    if settings.test is not None:
        test = _rows(settings.test, f"domains.{name}.test")
    else:
        test = [row for row in rows if _place(row[0], "test") < settings.test_share]
    held_out = {identity for identity, _ in test}
    rest = [row for row in rows if row[0] not in held_out]
    validation = [row for row in rest if _place(row[0], "validation") < settings.validation_share]
    train = [row for row in rest if _place(row[0], "validation") >= settings.validation_share]
    for split, part in (("train", train), ("validation", validation), ("test", test)):
        if not part:
            raise UserError(f"domains.{name}: no {split} rows are left; check files, between and the shares")
        write_jsonl(directory / f"{split}.jsonl", (row for _, row in part))
    places = sorted(_place(identity, "backbone") for identity, _ in train)
    last = places[min(settings.backbone_rows or len(train), len(train)) - 1]
    write_jsonl(directory / "backbone.jsonl", (row for identity, row in train if _place(identity, "backbone") <= last))


def _place(identity: str, purpose: str) -> float:
    """Where in [0, 1) a row falls: always the same, whatever the order or number of rows."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{identity}".encode()).digest()[:8], "big") / 2**64


def _rows(source: SourceSettings, key: str) -> list[tuple[str, dict[str, Any]]]:
    """(identity, row) of a source's rows: equal identities never fall into different splits."""
    rows = []
    for where, row in read_rows(source.files):
        if all(low <= _number(row, name, where) <= high for name, (low, high) in source.between.items()):
            flat = {name: "\n".join(map(str, v)) if isinstance(v, list) else v for name, v in row.items()}
            prompt = str(fill(source.prompt, flat, where, f"{key}.prompt"))
            response = str(fill(source.response, flat, where, f"{key}.response"))
            identity = prompt if source.identity is None else str(fill(source.identity, flat, where, f"{key}.identity"))
            rows.append((" ".join(identity.split()), {"prompt": prompt, "response": response}))
    if not rows:
        raise UserError(f"{key}: no row of {source.files} passes 'between' {source.between}")
    return rows


def _number(row: dict[str, Any], name: str, where: str) -> float:
    try:
        return float(row[name])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: between: field '{name}' is missing or no number") from None
