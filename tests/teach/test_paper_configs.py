"""configs/teach_*.yaml do what they say on rows in the shape of the data sets that they name."""

import json
from pathlib import Path

import pytest

from bmjax.io import hub
from bmjax.teach.adapters.table import ADAPTERS
from bmjax.teach.collect import wanted_samples
from bmjax.teach.select import select
from bmjax.teach.settings import CollectSettings, SelectSettings
from bmjax.teach.traces import FORMS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OPENR1 = {
    "problem": "What is 2 + 3?", "answer": "5", "solution": "", "source": "olympiads", "finish_reasons": None,
    "question_type": "math-word-problem", "is_reasoning_complete": [True, True], "correctness_llama": None,
    "generations": ["<think>a</think>\\boxed{5}", "<think>b</think>\\boxed{5}"],
    "correctness_math_verify": [True, True],
}  # fmt: skip
OPENTHOUGHTS = {
    "problem": "Add two numbers.", "deepseek_reasoning": "Read, add, print.", "deepseek_solution": "```python\n```",
    "ground_truth_solution": None, "domain": "code", "source": "apps", "starter_code": "",
    "test_cases": json.dumps({"inputs": ["2 3\n"], "outputs": ["5\n"]}),
}  # fmt: skip
S1K = {"question": "Why is the sky blue?", "solution": "A long story. " * 20, "cot_type": "science", "source_type": "x"}
ROWS = {
    "open-r1/OpenR1-Math-220k:default:train": [
        OPENR1, OPENR1 | {"problem": "B?", "question_type": "MCQ"}, OPENR1 | {"problem": "3 + 3?", "answer": "6",
        "correctness_math_verify": [False, False]}, OPENR1 | {"problem": "4?", "generations": ["<think>x", "<think>y"]},
    ],
    "open-thoughts/OpenThoughts-114k:metadata:train": [
        OPENTHOUGHTS, OPENTHOUGHTS | {"problem": "2 + 3?", "domain": "math"},
        OPENTHOUGHTS | {"problem": "Long.", "deepseek_reasoning": "x" * 60_000},
    ],
    "simplescaling/s1K": [S1K, S1K | {"question": "Why is grass green?"}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def fake_hub(monkeypatch):
    monkeypatch.setattr(hub, "dataset_rows", lambda name, key: iter(ROWS[name]))


@pytest.mark.parametrize(
    ("name", "kept"),
    [("math", {"kept": 1, "wrong": 2, "enough": 1, "truncated": 2}), ("code", {"kept": 1, "too long": 1})],
)
def test_selecting_the_papers_traces(name, kept, tmp_path):
    settings = SelectSettings.read(CONFIGS / f"teach_{name}.yaml", [f"output={tmp_path}"])
    assert settings.traces.rpartition(":")[0].removesuffix(":default") in {hub_id for f in FORMS for hub_id in f.hub}
    table = select(settings)
    assert {reason: n for reason, n in table[name].items() if n} == kept
    (row,) = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
    assert row["prompt"] in (OPENR1["problem"], OPENTHOUGHTS["problem"]) and row["reference"] is not None


def test_asking_the_papers_science_questions():
    settings = CollectSettings.read(CONFIGS / "teach_science.yaml")
    assert settings.problems in ADAPTERS[settings.adapter].hub
    samples = [problem for problem, _ in wanted_samples(settings).values()]
    assert [(p.question, p.reference) for p in samples] == [
        (row["question"], None) for row in ROWS["simplescaling/s1K"]
    ]
    teacher = settings.teacher
    assert (teacher.temperature, teacher.top_p, teacher.max_tokens, teacher.samples) == (0.6, 0.95, 16384, 1)
