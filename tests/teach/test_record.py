import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.io.jsonl import JsonLines
from bmjax.teach.index import id_key, read_ids
from bmjax.teach.record import (
    Record,
    normalise_prompt,
    read_records,
    record_id,
)


def record(number: int, text: str = "12") -> Record:
    return Record(id=f"id{number}", domain="math", prompt=f"Compute {number} + 1.", response=text, reference="12")


def test_the_id_is_the_sha256_of_what_was_asked() -> None:
    asked = '{"domain":"math","prompt":"1 + 1","sample":0,"sampling":{"temperature":0.6},"teacher":"r1"}'
    assert record_id("math", " 1 + 1 \r\n", "r1", {"temperature": 0.6}, 0) == hashlib.sha256(asked.encode()).hexdigest()


def test_the_id_changes_with_everything_that_decides_the_answer() -> None:
    base = ("math", "1 + 1", "r1", {"temperature": 0.6, "top_p": 1.0}, 0)
    variants = [
        ("code", *base[1:]),
        (base[0], "1 + 2", *base[2:]),
        (*base[:2], "r2", *base[3:]),
        (*base[:3], {"temperature": 0.7, "top_p": 1.0}, 0),
        (*base[:4], 1),
    ]
    assert len({record_id(*v) for v in [base, *variants]}) == 6
    assert record_id(*base) == record_id(*base[:3], {"top_p": 1.0, "temperature": 0.6}, 0)
    assert normalise_prompt("a  b \n  c\t\n") == "a  b\n  c"


def test_records_survive_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "traces.jsonl"
    written = [record(n, text) for n, text in enumerate(["12", "zwölf\u2028 \U0001f600", "line\nend", "lone \ud800"])]
    with JsonLines(path) as store:
        for trace in written:
            store.append(vars(trace))
    # Half of a surrogate pair is no text that a tokenizer knows; it is replaced on reading.
    written[3] = replace(written[3], response=written[3].response.replace("\ud800", "\ufffd"))
    assert list(read_records(path)) == written
    assert read_ids(path) == {id_key(f"id{n}") for n in range(4)}
    assert read_ids(tmp_path / "none.jsonl") == set()
    assert len(path.read_bytes().splitlines()) == 4


def test_a_torn_line_never_glues_two_records(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    lines = [json.dumps(dataclasses.asdict(record(n, "é" * 20))).encode() + b"\n" for n in range(3)]
    whole = b"".join(lines)
    start = len(lines[0]) + len(lines[1])
    for cut in range(start, len(whole) + 1):
        path.write_bytes(whole[:cut])
        readable = [r.id for r in read_records(path)]
        with JsonLines(path) as store:
            store.append(vars(record(9)))
        complete = ["id0", "id1"] + (["id2"] if cut >= len(whole) - 1 else [])
        assert [r.id for r in read_records(path)] == [*complete, "id9"], cut
        assert readable == complete


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops}", r"traces.jsonl, line 2: not valid JSON"),
        ("[1]", r"traces.jsonl, row 2: expected a JSON object, found list"),
        ('{"id": "a", "domain": "math", "prompt": "p"}', "'response' is missing"),
        ('{"id": 1, "domain": "math", "prompt": "p", "response": "r"}', "'id': expected str, found int"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "traces.jsonl"
    good = json.dumps(vars(record(0)))
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=message):
        list(read_records(path))
