"""Rows of a domain: splits never share a row, whatever their source."""

import json

import pytest

from bmjax.config import UserError
from bmjax.pipeline.rows import DomainRows
from bmjax.pipeline.settings import RunSettings


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_domain(domain, folder, lines=None, **keys):
    """Write the rows of a domain of a run with a new backbone."""
    keys = {"model": {"tokenizer": "none"}, "backbone": {}, "branch": {}, "merges": {"linear": {}}} | keys
    settings = RunSettings.read({"domains": {"d": domain, "other": domain}} | keys)
    DomainRows("d", settings, folder, (lines if lines is not None else []).append).write_sources()


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_own_test_rows_leave_the_training_rows(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"q": f"q{i}", "a": ["x", i]} for i in range(60)])
    test = write(tmp_path / "test.jsonl", [{"q": "q3", "a": "y"}, {"q": " q4 ", "a": "y"}, {"q": "new", "a": "y"}])
    source = {"prompt": "{q}", "response": "{a}"}
    settings = {"train": source | {"data": train}, "test": source | {"data": test}, "validation_share": 0.2}
    write_domain(settings, tmp_path / "out")
    parts = {
        name: {r["prompt"] for r in rows(tmp_path / "out" / f"{name}.jsonl")}
        for name in ("train", "validation", "test")
    }
    assert parts["train"] | parts["validation"] == {f"q{i}" for i in range(60)} - {"q3", "q4"}
    assert not parts["train"] & parts["validation"]
    assert rows(tmp_path / "out" / "train.jsonl")[0]["response"].startswith("x\n")


def test_a_share_is_held_out_by_identity_and_between_filters(tmp_path):
    file = write(tmp_path / "all.jsonl", [{"id": i, "q": f"q{i // 2}"} for i in range(200)])
    train = {"data": file, "prompt": "write", "response": "{q} {id}", "identity": "{q}", "between": {"id": [0, 149]}}
    settings = {"train": train, "test_share": 0.3}
    write_domain(settings, tmp_path / "out")
    parts = [
        {r["response"].split()[0] for r in rows(tmp_path / "out" / f"{n}.jsonl")}
        for n in ("train", "validation", "test")
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 75
    assert 10 <= len(parts[2]) <= 35


def test_backbone_rows_do_not_depend_on_the_order_of_rows(tmp_path):
    values = [{"q": f"q{i}", "a": "x"} for i in range(60)]
    seen = []
    for number, order in enumerate((values, values[::-1])):
        source = {"data": write(tmp_path / f"{number}.jsonl", order), "prompt": "{q}", "response": "{a}"}
        settings = {"train": source, "test_share": 0.2, "backbone_rows": 7}
        write_domain(settings, tmp_path / "out")
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
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_sources_are_one_line(tmp_path, change, told):
    file = write(tmp_path / "all.jsonl", [{"id": i, "q": f"q{i}"} for i in range(20)])
    source = {"data": file, "prompt": "{q}", "response": "{id}"} | change
    settings = {"train": source, "test_share": 0.3}
    with pytest.raises(UserError, match=told) as error:
        write_domain(settings, tmp_path / "out")
    assert "\n" not in str(error.value)
