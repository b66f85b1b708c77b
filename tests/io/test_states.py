"""States of files: kept by caches, selections and runs, which must know theirs again."""

import os

import pytest

from bmjax.io.states import data_states, file_states


@pytest.mark.parametrize("name", ["~/rows.jsonl", "~/folder"])
def test_a_changed_file_under_the_home_directory_is_seen(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ("rows.jsonl" if name.endswith("jsonl") else "folder/config.json")
    file.parent.mkdir(exist_ok=True)
    file.write_text("1")
    before = file_states([name, "org/name"])
    assert before == file_states([name, "org/name"]) and before[1] == ["org/name"]
    file.write_text("23")
    assert file_states([name, "org/name"]) != before


def test_states_have_the_form_in_which_they_are_stored(tmp_path):
    for name, text in (("a/rows.jsonl", "{}\n"), ("a/b/model.safetensors", "12"), ("c.jinja", "1")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, ns=(5, 7))
    folder, file, pattern = str(tmp_path / "a"), str(tmp_path / "c.jinja"), str(tmp_path / "*.jinja")
    assert file_states([folder, file, pattern]) == [
        [folder, ["b/model.safetensors", 2, 7], ["rows.jsonl", 3, 7]], [file, 1, 7], [pattern, [file, 1, 7]],
    ]  # fmt: skip
    assert data_states([folder]) == [[str((tmp_path / "a/rows.jsonl").resolve()), 3, 7]]
