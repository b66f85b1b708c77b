"""configs/eval_paper.yaml against a scripted endpoint: the paper's table, and where each of its numbers is from."""

import csv
import json
import re
from pathlib import Path

import pytest

from bmjax.cli.main import main
from bmjax.config import UserError
from bmjax.evaluate import paper
from bmjax.evaluate.compare import compare
from bmjax.evaluate.run import evaluate
from bmjax.evaluate.score import bootstrap, wilson
from bmjax.evaluate.settings import EvalSettings
from tests.conftest import write_rows
from tests.evaluate.rows import DOUBLE, gpqa_row, lcb_row
from tests.pipeline.endpoint import Endpoint

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "eval_paper.yaml"


def write_data(folder: Path) -> list[str]:
    """Data of the three benchmarks' forms; returns the overrides that name them."""
    aime = [{"problem": f"AIME {n}", "answer": str(100 + n), "id": n} for n in range(3)]
    days = ["2024-07-31", "2024-08-01", "2024-12-24", "2025-02-01", "2025-02-02"]
    lcb = [lcb_row(n, day, calls=n == 2) for n, day in enumerate(days)]
    write_rows(folder / "aime.jsonl", aime)
    write_rows(folder / "lcb.jsonl", lcb)
    rows = [gpqa_row(n) for n in range(2, 6)]
    with (folder / "gpqa.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    files = {"aime24": "aime.jsonl", "livecodebench": "lcb.jsonl", "gpqa_diamond": "gpqa.csv"}
    return [f"tasks.{task}.questions={folder / file}" for task, file in files.items()]


def answer(prompt: str, seed: int):
    """AIME 0 right always, 1 in half of its samples, 2 never. Programs right, shown with an example in samples 0, 1."""
    if prompt.startswith("AIME"):
        number = int(prompt[5:])
        value = 100 + number + (number == 2 or (number == 1 and seed % 2))
        return f"<think>\nhm\n</think>\n\\boxed{{{value}}}", "length" if number == 2 else "stop"
    if prompt.startswith("Problem"):
        method = "class Solution:\n    def double(self, n):\n        return 2 * n"
        program = method if "class Solution" in prompt else DOUBLE
        text = f"<answer>\n```python\n{program}\n```\n</answer>"
        # LiveCodeBench reads the last block, which is no program here.
        return text + ("\nFor example:\n```\n8\n```" if seed < 2 else ""), "stop"
    number = int(prompt.split()[2])
    letter = re.search(rf"\(([A-D])\) {number * number} exactly", prompt)[1]
    return (f"Answer: {letter}" if number < 5 else f"Answer: {'BCDA'['ABCD'.index(letter)]}"), "stop"


def test_eval_paper_fills_the_papers_table(tmp_path, capsys):
    out = tmp_path / "out"
    with Endpoint(answer) as server:
        arguments = ["eval", str(CONFIG), f"base_url={server.base_url}", "model=mine", f"output={out}"]
        assert main([*arguments, *write_data(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert len(server.asked) == 3 * 16 + 3 * 4 + 4 * 4
    # The paper's prompts, samples and lengths.
    for prompt, body in zip([prompt for prompt, _ in server.asked], server.bodies, strict=True):
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 32768)
        system = body["messages"][0]["content"]
        start = {"A": "Please reason step by step, and put", "P": "A conversation between User and Assistant. The user"}
        assert system.startswith(start.get(prompt[0], "You are a helpful and harmless assistant. You should"))
        assert (prompt[0] == "A") == (prompt in ("AIME 0", "AIME 1", "AIME 2"))

    scores = json.loads((out / "scores.json").read_text())
    assert scores["aime24"]["accuracy"] == pytest.approx(0.5) and scores["aime24"]["truncated"] == pytest.approx(1 / 3)
    assert tuple(scores["aime24"]["ci95"]) == bootstrap([1, 0.5, 0])
    assert scores["aime24"]["metrics"]["maj@16"]["value"] == pytest.approx(0.5)  # a tie in the second problem
    # Three of five contests lie in the window; LiveCodeBench's own rules miss the programs that show an example.
    code = scores["livecodebench"]
    assert (code["accuracy"], code["n"], code["k"]) == (1.0, 3, 4) and code["ci95"] == list(wilson(1.0, 3))
    assert (code["lcb_compat"]["accuracy"], code["lcb_compat"]["n"]) == (0.5, 3)
    assert scores["gpqa_diamond"]["accuracy"] == pytest.approx(3 / 4)

    table = json.loads((out / "table.json").read_text())
    assert [row["model"] for row in table] == [*paper.ROWS, "mine"]
    mine = table[-1]["tasks"]
    assert set(mine) == {"aime24", "livecodebench", "gpqa_diamond"}
    for task, cell in mine.items():
        lines = (out / "samples" / f"{task}.jsonl").read_text().splitlines()
        assert cell["source"].startswith(f"samples/{task}.jsonl, {len(lines)} samples: {scores[task]['k']} of each")
        assert cell["accuracy"] == pytest.approx(100 * scores[task]["accuracy"])
    assert all(cell["source"] == "arXiv 2503.04872" for row in table[:-1] for cell in row["tasks"].values())
    text = (out / "table.md").read_text()
    assert printed.endswith(text)
    assert "| DeepSeek-R1 (teacher) | 79.8 (9.6k) | 65.9 (10.4k) | 71.5 (5.3k) |" in text
    assert "| math branch | 73.1 | - | - |" in text and "| **mine** (measured) | 50.0 [0.0, 100.0] (4) [1] |" in text
    assert "[1] AIME 2024: samples/aime24.jsonl, 48 samples: 16 of each problem, 3 problems judged; 33.3% trunc" in text
    assert mine["livecodebench"]["by_livecodebench"] == 50 and "0.0% truncated, 50.0 by LiveCodeBench's own" in text
    check_livecodebench_file(out / "lcb" / "livecodebench_eval_all.json")
    check_permutations(out)


def check_livecodebench_file(path: Path) -> None:
    """The file holds what lcb_runner.evaluation.compute_scores reads."""
    entries = json.loads(path.read_text())
    assert [entry["question_id"] for entry in entries] == ["q1", "q2", "q3"]
    for entry in entries:
        assert entry["graded_list"] == [False, False, True, True] and entry["pass@1"] == 0.5
        assert len(entry["output_list"]) == len(entry["code_list"]) == 4 and entry["code_list"][0] == "8"
        assert entry["contest_date"].endswith("T00:00:00") and entry["difficulty"] == "easy"


def check_permutations(out: Path) -> None:
    """Every sample saw the options in a stored order of its own, and no prompt was judged by another's letter."""
    samples = [json.loads(line) for line in (out / "samples" / "gpqa_diamond.jsonl").read_text().splitlines()]
    orders = {}
    for sample in samples:
        assert sorted(sample["options"]) == [0, 1, 2, 3]
        orders.setdefault(sample["problem"], []).append(tuple(sample["options"]))
        right = sample["reference"]["options"]["ABCD".index(sample["reference"]["answer"])]
        assert right == f"{int(sample['problem'][3:]) ** 2} exactly"
        assert all(
            f"({'ABCD'[at]}) {text}\n" in sample["prompt"] for at, text in enumerate(sample["reference"]["options"])
        )
    assert set(orders) == {"rec2", "rec3", "rec4", "rec5"}
    assert all(len(set(of_problem)) > 1 for of_problem in orders.values())


def test_the_same_seed_gives_the_same_orders_and_another_seed_others(tmp_path):
    overrides = write_data(tmp_path)
    prompts = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with Endpoint(answer) as server:
            out = tmp_path / name
            tasks = {"gpqa_diamond": {"questions": overrides[2].partition("=")[2]}}
            values = {"base_url": server.base_url, "model": "m", "output": str(out), "tasks": tasks, "seed": seed}
            evaluate(EvalSettings.read(values))
        prompts[name] = sorted(prompt for prompt, _ in server.asked)
    assert prompts["a"] == prompts["b"] != prompts["c"]
    with pytest.raises(UserError, match="gpqa_diamond: problem rec2, sample 0 was asked with another prompt"):
        compare(str(tmp_path / "a"), str(tmp_path / "c"))
    assert compare(str(tmp_path / "a"), str(tmp_path / "b"))["tasks"]["gpqa_diamond"]["difference"] == 0
