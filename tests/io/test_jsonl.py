"""Append-only files of JSON lines: what a crash leaves, who may write, what is forced to the disk."""

import os
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.io.jsonl import JsonLines, read_lines, write_jsonl


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 300_000)
    with JsonLines(path) as store:
        store.append({"c": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'
    path.write_bytes(b"x" * 300_000)
    with JsonLines(path):
        pass
    assert path.read_bytes() == b""


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with JsonLines(path), pytest.raises(UserError, match="another process"), JsonLines(path):
        pass
    with JsonLines(path) as store:
        store.append({"a": 1})


def test_lines_are_written_at_once_and_synced_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd))
    with JsonLines(tmp_path / "t.jsonl", sync_every=10) as store:
        for n in range(25):
            store.append({"n": n})
        assert len(synced) == 2
        assert len((tmp_path / "t.jsonl").read_bytes().splitlines()) == 25
    assert len(synced) == 3


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out" / "data.jsonl"
    write_jsonl(path, [{"a": 1}, {"a": "\ud800"}])
    before = path.read_bytes()
    assert before == b'{"a": 1}\n{"a": "\\ud800"}\n'

    def rows():
        yield {"b": 1}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, rows())
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["data.jsonl"]


def test_lines_with_their_numbers_without_blank_and_torn_ones(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"b": 2}\n{"c":')
    assert list(read_lines(path)) == [(1, {"a": 1}), (3, {"b": 2})]
    path.write_bytes(b'{"a": 1}\n{"b"\n{"c": 3}\n')
    lines = read_lines(path)
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(UserError, match=r"t.jsonl, line 2: not valid JSON: .*; delete this line or mend it"):
        next(lines)
    with pytest.raises(UserError, match="no such file"):
        list(read_lines(tmp_path / "none.jsonl"))


def test_a_file_that_was_replaced_while_its_lock_was_waited_for_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text("")

    def replaced(*_):
        (tmp_path / "new").write_text('{"n": 0}\n')
        (tmp_path / "new").rename(path)

    monkeypatch.setattr("bmjax.io.jsonl.lock_file", replaced)
    with pytest.raises(UserError, match="another process has replaced it"):
        JsonLines(path)
