"""Rows of a domain: splits never share a row, whatever their source."""

import json

import pytest

from bmjax.config import UserError
from bmjax.pipeline.data import write_builtin, write_sources
from bmjax.pipeline.settings import BuiltinDomain, DomainSettings


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_builtin_splits_share_no_prompt_and_hold_the_numbers_asked_for(tmp_path):
    write_builtin(BuiltinDomain(domain="science", count=200, backbone_count=100, validation=40, test=60), tmp_path, 3)
    parts = {name: rows(tmp_path / f"{name}.jsonl") for name in ("backbone", "problems", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {
        "backbone": 100,
        "problems": 200,
        "validation": 40,
        "test": 60,
    }
    prompts = [row["prompt"] for part in parts.values() for row in part]
    assert len(set(prompts)) == len(prompts)
    assert all(row["response"] == row["reference"] and row["reasoning"] for row in parts["test"])


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_own_test_rows_leave_the_training_rows(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"q": f"q{i}", "a": ["x", i]} for i in range(60)])
    test = write(tmp_path / "test.jsonl", [{"q": "q3", "a": "y"}, {"q": " q4 ", "a": "y"}, {"q": "new", "a": "y"}])
    source = {"prompt": "{q}", "response": "{a}"}
    settings = DomainSettings.model_validate(
        {"train": source | {"files": train}, "test": source | {"files": test}, "validation_share": 0.2}
    )
    write_sources(settings, "d", tmp_path / "out")
    parts = {
        name: {r["prompt"] for r in rows(tmp_path / "out" / f"{name}.jsonl")}
        for name in ("train", "validation", "test")
    }
    assert parts["train"] | parts["validation"] == {f"q{i}" for i in range(60)} - {"q3", "q4"}
    assert not parts["train"] & parts["validation"]
    assert rows(tmp_path / "out" / "train.jsonl")[0]["response"].startswith("x\n")


def test_a_share_is_held_out_by_identity_and_between_filters(tmp_path):
    file = write(tmp_path / "all.jsonl", [{"id": i, "q": f"q{i // 2}"} for i in range(200)])
    train = {"files": file, "prompt": "write", "response": "{q} {id}", "identity": "{q}", "between": {"id": [0, 149]}}
    settings = DomainSettings.model_validate({"train": train, "test_share": 0.3})
    write_sources(settings, "d", tmp_path / "out")
    parts = [
        {r["response"].split()[0] for r in rows(tmp_path / "out" / f"{n}.jsonl")}
        for n in ("train", "validation", "test")
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 75
    assert 10 <= len(parts[2]) <= 35


def test_the_backbone_sees_so_many_training_rows_whatever_their_order(tmp_path):
    values = [{"q": f"q{i}", "a": "x"} for i in range(60)]
    seen = []
    for number, order in enumerate((values, values[::-1])):
        source = {"files": write(tmp_path / f"{number}.jsonl", order), "prompt": "{q}", "response": "{a}"}
        settings = DomainSettings.model_validate({"train": source, "test_share": 0.2, "backbone_rows": 7})
        write_sources(settings, "d", tmp_path / "out")
        parts = [{r["prompt"] for r in rows(tmp_path / "out" / f"{n}.jsonl")} for n in ("backbone", "train")]
        assert len(parts[0]) == 7 and parts[0] < parts[1]
        seen.append(parts[0])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "{question}"}, "question"),
        ({"between": {"id": [500, 600]}}, "between"),
        ({"between": {"nr": [0, 1]}}, "nr"),
        ({"files": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, change, told):
    file = write(tmp_path / "all.jsonl", [{"id": i, "q": f"q{i}"} for i in range(20)])
    source = {"files": file, "prompt": "{q}", "response": "{id}"} | change
    settings = DomainSettings.model_validate({"train": source, "test_share": 0.3})
    with pytest.raises(UserError, match=told) as error:
        write_sources(settings, "d", tmp_path / "out")
    assert "\n" not in str(error.value)
