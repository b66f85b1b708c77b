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
    keys = {
        "model": {"tokenizer": "none"},
        "backbone": {"learning_rate": 1},
        "branch": {},
        "merges": {"linear": {}},
    } | keys
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


GSM8K = [{"question": f"What is {n} + 1?", "answer": f"One more.\n#### {n + 1}"} for n in range(8)]


def test_problems_and_tests_by_an_adapter(tmp_path):
    bad = {"question": "What?", "answer": "no answer"}
    test = [{"problem": f"B or C, {n}?", "answer": "C", "source": "s", "solution": "", "question_type": "MCQ"}
            for n in range(2)]  # fmt: skip
    domain = {
        "problems": {"data": write(tmp_path / "p.jsonl", [*GSM8K, bad]), "adapter": "gsm8k", "instruction": ""},
        "test": {"data": write(tmp_path / "t.jsonl", test), "adapter": "auto"}, "validation_share": 0.3,
    }  # fmt: skip
    lines = []
    write_domain(domain, tmp_path / "out", lines, teacher={"base_url": "http://localhost:1/v1", "model": "m"})
    split = [row for name in ("problems", "validation") for row in rows(tmp_path / "out" / f"{name}.jsonl")]
    assert sorted(split, key=lambda row: row["prompt"]) == [
        {"prompt": f"What is {n} + 1?", "reference": str(n + 1), "judge": "math"} for n in range(8)
    ]
    assert [row["judge"] for row in rows(tmp_path / "out" / "test.jsonl")] == ["choice", "choice"]
    assert "domains.d.problems: 1 of 9 rows make no problem: no answer 1" in lines
    assert any("adapter: numina_math, recognised by its columns" in line for line in lines)


def test_templates_win_over_an_adapter_and_rows_are_kept_by_their_fields(tmp_path):
    values = [row | {"level": n % 2} for n, row in enumerate(GSM8K)]
    source = {"data": write(tmp_path / "p.jsonl", values), "adapter": "gsm8k", "only": {"level": 1}}
    problems = source | {"prompt": "Say: {question}", "reference": "{level}"}
    test = {"data": write(tmp_path / "t.jsonl", [{"prompt": "p", "reference": "1"}])}
    write_domain({"problems": problems, "test": test, "validation": test}, tmp_path / "out",
                 teacher={"base_url": "http://localhost:1/v1", "model": "m"})  # fmt: skip
    assert rows(tmp_path / "out" / "problems.jsonl") == [
        {"prompt": f"Say: What is {n} + 1?", "reference": 1} for n in (1, 3, 5, 7)
    ]


def test_an_adapter_gives_no_training_rows(tmp_path):
    train = {"data": write(tmp_path / "p.jsonl", GSM8K), "adapter": "gsm8k"}
    with pytest.raises(UserError, match="train: response is missing"):
        write_domain({"train": train, "test_share": 0.2}, tmp_path / "out")
