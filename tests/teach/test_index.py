"""The index of ids beside a traces file: used where it is true, never where the file has changed."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.teach import index
from bmjax.teach.index import id_key, read_ids, update_index


def identity(number: int) -> str:
    return f"{number:064x}"


def line(number: int, text: str = "r") -> str:
    return json.dumps({"id": identity(number), "domain": "d", "prompt": f"p{number}", "response": text}) + "\n"


def write(path: Path, numbers: list[int]) -> None:
    path.write_text("".join(map(line, numbers)))


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(index, "_STRETCH", 500)
    path = tmp_path / "traces.jsonl"
    write(path, list(range(20)))
    update_index(path)
    return path


def numbers(path: Path) -> set[int]:
    return {int.from_bytes(key, "big") for key in read_ids(path, keep_index=True)}


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the traces were read")

    monkeypatch.setattr(index, "_id_of", refuse)
    monkeypatch.setattr(index, "_unchanged", refuse)


def test_an_unchanged_file_is_not_read_again(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((traces.parent / "traces.jsonl.index").read_text().splitlines()) > 3
    forbid_reading(monkeypatch)
    assert numbers(traces) == set(range(20))


def test_only_what_was_appended_is_read(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with traces.open("a") as file:
        file.write(line(20) + line(21)[:-9])
    read: list[bytes] = []
    id_of = index._id_of
    monkeypatch.setattr(index, "_id_of", lambda text, *rest: read.append(text) or id_of(text, *rest))
    assert numbers(traces) == set(range(21))
    assert len(read) == 1
    forbid_reading(monkeypatch)
    assert numbers(traces) == set(range(21))


@pytest.mark.parametrize(
    "change", ["deleted", "edited", "replaced", "emptied", "reordered", "truncated", "swapped ids"]
)
def test_an_index_of_what_the_file_was_is_not_trusted(traces: Path, change: str) -> None:
    lines = traces.read_text().splitlines(keepends=True)
    status = traces.stat()
    changed = {
        "deleted": lines[:3] + lines[4:] + [line(50), line(51)],
        "edited": [text.replace(identity(7), identity(99)) for text in lines],
        "replaced": [line(n) for n in range(30, 50)],
        "emptied": [],
        "reordered": lines[::-1],
        "truncated": lines[:5],
        "swapped ids": [*lines[:-1], line(77)],
    }[change]
    traces.write_text("".join(changed))
    os.utime(traces, ns=(status.st_atime_ns, status.st_mtime_ns))  # as copying tools do
    assert numbers(traces) == {int(json.loads(text)["id"], 16) for text in changed}
    assert numbers(traces) == {int(json.loads(text)["id"], 16) for text in changed}


@pytest.mark.parametrize(
    "damage", ["", "{", "[]\n", '{"end": 3}\n', '{"end": 1, "hash": "", "ids": "zz", "state": []}\n', "\0"]
)
def test_a_damaged_index_is_made_anew(traces: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = traces.with_name("traces.jsonl.index")
    whole = path.read_text()
    for text in (damage, whole + damage, whole[:-5] + damage):
        path.write_text(text)
        assert numbers(traces) == set(range(20))
    path.unlink()
    assert numbers(traces) == set(range(20))
    forbid_reading(monkeypatch)
    assert numbers(traces) == set(range(20))


def test_a_copy_of_both_files_needs_no_decoding(traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(tmp_path, copied)
    monkeypatch.setattr(index, "_id_of", None)
    assert numbers(copied / "traces.jsonl") == set(range(20))


def test_random_appends_and_edits_give_what_reading_gives(traces: Path) -> None:
    rng = random.Random(3)
    present = list(range(20))
    for _ in range(60):
        if rng.random() < 0.5:
            present += [rng.randrange(10**6) for _ in range(rng.randrange(4))]
            with traces.open("a") as file:
                file.writelines(map(line, present[-3:]))
        else:
            texts = traces.read_text().splitlines(keepends=True)
            del texts[rng.randrange(len(texts))]
            traces.write_text("".join(texts))
        expected = {int(json.loads(text)["id"], 16) for text in traces.read_text().splitlines()}
        assert numbers(traces) == expected


def test_ids_of_other_forms_and_lines_that_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text('{"domain": "d", "id": "a"}\n\n{"id": "b", "x": 1}\n{"id": "torn')
    assert read_ids(path) == {id_key("a"), id_key("b")}
    assert not path.with_name("traces.jsonl.index").exists()
    for bad in ("{oops}", '{"id": 3}', "[1]", '"x"'):
        path.write_text(f'{{"id": "a"}}\n\n{bad}\n{{"id": "b"}}\n')
        with pytest.raises(UserError, match=r"traces\.jsonl, line 3: not a record with an id"):
            read_ids(path)
