import json
from pathlib import Path
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.demo.problems import make_problems, solve
from bmjax.demo.teacher import MODEL, DemoTeacher
from bmjax.teach.collect import collect
from bmjax.teach.select import render_table, select
from bmjax.teach.settings import CollectSettings, SelectSettings


def row(number: int, **changes: Any) -> dict[str, Any]:
    base = {
        "id": f"{number:04}",
        "domain": "math",
        "prompt": f"Compute {number} + 1.",
        "reference": str(number + 1),
        "reasoning": f"{number} + 1 = {number + 1}",
        "response": str(number + 1),
        "finish_reason": "stop",
        "verdict": "right",
        "usage": {"completion_tokens": 12},
    }
    return base | changes


def run(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[dict[str, int], list[str]]:
    """(counts of the math domain without zeros, ids kept in order)."""
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = select(SelectSettings.read({"traces": str(traces), "output": str(tmp_path / "out"), **options}))
    kept = [json.loads(line)["id"] for line in (tmp_path / "out" / "math.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "out" / "selection.json").read_text()) == table
    assert sum(table["math"].values()) == len(rows)
    return {reason: n for reason, n in table["math"].items() if n}, kept


def test_each_reason_is_counted_once(tmp_path: Path) -> None:
    rows = [
        row(8),
        row(1),
        row(1),
        row(2, id="copy of 8", prompt=" Compute 8 + 1. \n", reasoning=row(8)["reasoning"], response="9"),
        row(3, finish_reason="length", response="", verdict="wrong"),
        row(4, response="<think>a</think><think>b</think>5", reasoning=""),
        row(5, response=" "),
        row(6, reasoning=""),
        row(7, reasoning="a </think> b"),
        row(9, verdict="wrong"),
        row(10, verdict="unjudged"),
    ]
    counts, kept = run(tmp_path, rows)
    assert counts == {"kept": 2, "duplicate": 2, "truncated": 1, "malformed": 4, "wrong": 1, "unjudged": 1}
    assert kept == ["0001", "0008"]


def test_a_dataset_row_has_what_training_needs(tmp_path: Path) -> None:
    run(tmp_path, [row(1, source="x", teacher={"model": "r1"})])
    assert json.loads((tmp_path / "out" / "math.jsonl").read_text()) == {
        "prompt": "Compute 1 + 1.",
        "reasoning": "1 + 1 = 2",
        "response": "2",
        "reference": "2",
        "id": "0001",
    }


def test_the_result_does_not_depend_on_the_order_of_the_traces(tmp_path: Path) -> None:
    rows = [row(n % 7, id=f"{n:04}") for n in range(30)] + [row(50 + n) for n in range(20)]
    first = run(tmp_path, rows)
    text = (tmp_path / "out" / "math.jsonl").read_bytes()
    assert run(tmp_path, rows[::-1]) == first
    assert (tmp_path / "out" / "math.jsonl").read_bytes() == text


def test_limits_and_verdicts_to_keep(tmp_path: Path) -> None:
    rows = [row(1), row(2, reasoning="x" * 500), row(3, usage={"completion_tokens": 900}), row(4, verdict="unjudged")]
    assert run(tmp_path, rows, max_characters=100)[0] == {"kept": 2, "too long": 1, "unjudged": 1}
    assert run(tmp_path, rows, max_tokens=100)[0] == {"kept": 2, "too long": 1, "unjudged": 1}
    assert run(tmp_path, rows, keep=["right", "unjudged"])[0] == {"kept": 4}
    samples = [row(1, id=f"{n:04}", reasoning=f"way {n}") for n in range(5)]
    assert run(tmp_path, samples, per_prompt=2)[0] == {"kept": 2, "enough": 3}
    assert run(tmp_path, [row(6, reasoning=""), row(7)], require_reasoning=False)[0] == {"kept": 2}


def test_held_out_prompts_are_left_out(tmp_path: Path) -> None:
    sentence = "a train leaves the old station at noon and goes west all day"
    rows = [
        row(1, prompt="Compute  (7 + 5) * 3!"),
        row(2, prompt="Compute (7 - 5) * 3."),
        row(3, prompt=f"Once more: {sentence.upper()}, how far?"),
        row(4),
    ]
    held = tmp_path / "test.jsonl"
    held.write_text(json.dumps({"q": "compute (7 + 5) * 3."}) + "\n" + json.dumps({"q": f"{sentence}?"}) + "\n")
    options = {"held_out": str(held), "held_out_prompt": "{q}"}
    assert run(tmp_path, rows, **options) == ({"kept": 3, "held out": 1}, ["0002", "0003", "0004"])
    assert run(tmp_path, rows, ngram=8, **options) == ({"kept": 2, "held out": 2}, ["0002", "0004"])
    with pytest.raises(UserError, match="held_out_prompt asks for field 'prompt'"):
        run(tmp_path, rows, held_out=str(held))


def test_from_the_demos_teacher_to_clean_datasets(tmp_path: Path) -> None:
    for domain in ("math", "science"):
        file = tmp_path / f"{domain}.jsonl"
        file.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in make_problems(domain, 400)))
        source = {"problems": str(file), "domain": domain, "prompt": "{prompt}", "reference": "{reference}"}
        with DemoTeacher() as teacher:
            endpoint = {"base_url": teacher.base_url, "model": MODEL}
            collect(CollectSettings.read({**source, "output": str(tmp_path / domain), "teacher": endpoint}))
    directories = [str(tmp_path / "math"), str(tmp_path / "science")]
    table = select(SelectSettings.read({"traces": directories, "output": str(tmp_path / "out")}))
    assert set(table) == {"math", "science"}
    for domain, counts in table.items():
        assert counts["truncated"] > 0 and counts["malformed"] > 0 and counts["wrong"] > 0
        assert 320 < counts["kept"] < 370
        prompts = {p.prompt for p in make_problems(domain, 400)}
        for line in (tmp_path / "out" / f"{domain}.jsonl").read_text().splitlines():
            kept = json.loads(line)
            solution = solve(kept["prompt"])
            assert kept["prompt"] in prompts
            assert (kept["reasoning"], kept["response"]) == (solution.reasoning, solution.answer)


def test_the_table_as_text() -> None:
    table = {"math": {"kept": 8, "wrong": 2, "duplicate": 0}, "science": {"kept": 90, "wrong": 0, "too long": 10}}
    assert render_table(table).splitlines() == [
        "domain   traces      kept  wrong  too long",
        "math         10   8 (80%)      2         0",
        "science     100  90 (90%)      0        10",
    ]


def test_a_line_that_a_killed_collector_tore_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_bytes(json.dumps(row(1)).encode() + b'\n{"id": "torn", "prompt": "\xc3')
    table = select(SelectSettings.read({"traces": str(tmp_path), "output": str(tmp_path / "out")}))
    assert table["math"]["kept"] == 1 and sum(table["math"].values()) == 1


def test_mistakes_are_one_line_and_leave_no_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of 2 traces is left .*wrong 2"):
        run(tmp_path, [row(1, verdict="wrong"), row(2, verdict="wrong")])
    with pytest.raises(UserError, match="domain 'code': none of 1"):
        run(tmp_path, [row(1, domain="math"), row(2, domain="code", response="")])
    with pytest.raises(UserError, match="cannot name a file"):
        run(tmp_path, [row(1, domain="../up")])
    with pytest.raises(UserError, match="holds no record"):
        run(tmp_path, [])
    with pytest.raises(UserError, match="no such file"):
        select(SelectSettings.read({"traces": str(tmp_path / "nowhere"), "output": str(tmp_path / "out")}))
    assert not (tmp_path / "out").exists()
