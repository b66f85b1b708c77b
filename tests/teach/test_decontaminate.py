import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.io import hub
from bmjax.teach.contamination.benchmarks import BENCHMARKS
from bmjax.teach.contamination.matcher import ALL, WORDS, Matcher
from bmjax.teach.contamination.words import Windows, tokenize
from bmjax.teach.decontaminate import HeldOut
from bmjax.teach.select import select
from bmjax.teach.settings import SelectSettings
from tests.conftest import write_rows

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
QUESTIONS = [
    "What is 7 times 8?",
    "Tom has 12 apples and gives 5 of them to Ann. How many apples are left?",
    "Compute $\\dfrac{1}{2} + \\dfrac{1}{3}$.",
]
CLEAN = ["What is 9 times 8?", "What is 7 times 8 plus 3?", "Compute $\\frac{1}{2} - \\frac{1}{3}$."]


def trace(number: int, prompt: str, **changes: Any) -> dict[str, Any]:
    base = {
        "id": f"{number:04}", "domain": "math", "prompt": prompt, "reasoning": f"way {number}", "response": str(number),
        "verdict": "right",
    }  # fmt: skip
    return base | changes


def kept(tmp_path: Path, traces: list[dict[str, Any]], log: Any = lambda line: None, **options: Any) -> set[str]:
    file = write_rows(tmp_path / "traces.jsonl", traces)
    select(SelectSettings.read({"traces": str(file), "output": str(tmp_path / "out"), **options}), log)
    return {json.loads(line)["prompt"] for line in (tmp_path / "out" / "math.jsonl").read_text().splitlines()}


def test_prompts_are_compared_by_words_and_signs(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "test.jsonl", [{"q": "Compute (7 + 5) * 3."}, {"q": "one two three four"}])
    whole = HeldOut([str(held)], "{q}", ngram=0)
    assert whole.overlaps(" compute  (7 + 5) * 3 ")
    assert not whole.overlaps("Compute (7 - 5) * 3.")
    assert not whole.overlaps("zero one two three four")
    runs = HeldOut(str(held), "{q}", ngram=3)
    assert runs.overlaps("zero TWO, three; four!")
    assert not runs.overlaps("one two four three")


def test_nothing_is_held_out_without_data() -> None:
    assert not HeldOut([], "{prompt}", ngram=1).overlaps("anything")


@pytest.mark.parametrize(
    "prompt",
    [
        f"What is 7 times 8? {INSTRUCTION}",
        f"{INSTRUCTION}\n\nWhat is 7 times 8?",
        f"What is ７ times ８?\n{INSTRUCTION}",
        "WHAT IS 7 TIMES 8?",
        "Question: what is 7  times 8 ?\nAnswer:",
        'Solve the problem below.\n\n"What is 7 times 8?"',
        "What is 7 times 8 Please give a number.",
        "<question>What is 7 times 8</question>",
        "**What is 7 times 8**\n- give a number",
        "What is 7 times 8? And what is 3 + 3?",
    ],
)
def test_a_short_question_is_met_inside_a_prompt(tmp_path: Path, prompt: str) -> None:
    held = write_rows(tmp_path / "test.jsonl", [{"prompt": question} for question in QUESTIONS])
    assert HeldOut(str(held), "{prompt}", ngram=0).overlaps(prompt)


@pytest.mark.parametrize(
    "prompt", [*CLEAN, f"What is 7 times 8 plus 3? {INSTRUCTION}", "Tom has 12 apples and gives 6 of them to Ann."]
)
def test_another_question_is_not_taken_for_a_held_out_one(tmp_path: Path, prompt: str) -> None:
    held = write_rows(tmp_path / "test.jsonl", [{"prompt": question} for question in QUESTIONS])
    assert not HeldOut(str(held), "{prompt}", ngram=0).overlaps(prompt)


def test_chinese_questions_are_met_character_by_character(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "test.jsonl", [{"prompt": "质量为２kg的物体受到10N的力，求加速度。"}])
    whole = HeldOut(str(held), "{prompt}", ngram=0)
    assert whole.overlaps("请回答：质量为2kg的物体受到10N的力,求加速度。请一步一步思考。")
    assert not whole.overlaps("请回答：质量为3kg的物体受到10N的力,求加速度。")


def test_questions_of_one_pattern_are_told_apart(tmp_path: Path) -> None:
    rows = [{"prompt": f"Compute the product of {a} and {b}."} for a, b in ((3, 5), (2, 9), (7, 7), (4, 12))]
    whole = HeldOut(str(write_rows(tmp_path / "test.jsonl", rows)), "{prompt}", ngram=0)
    assert all(whole.overlaps(f"{row['prompt']} Think first.") for row in rows)
    assert not whole.overlaps("Compute the product of 3 and 9.")
    assert not whole.overlaps("Compute the sum of 3 and 5.")


@pytest.mark.parametrize("options", [{}, {"ngram": 5}, {"ngram": 8}])
@pytest.mark.parametrize("instructed", [False, True])
def test_our_own_instruction_neither_hides_a_question_nor_makes_one(
    tmp_path: Path, options: dict[str, int], instructed: bool
) -> None:
    held = write_rows(tmp_path / "test.jsonl", [{"q": question} for question in QUESTIONS])
    leaked = [f"{question.replace('12', '１２')} {INSTRUCTION}" for question in QUESTIONS]
    clean = [
        f"{question} {INSTRUCTION}" for question in ("How far is the moon from the earth?", "Which month is cold?")
    ]
    lines: list[str] = []
    prompt = f"{{q}} {INSTRUCTION.replace('{}', '{{}}')}" if instructed else "{q}"
    traces = [trace(number, text) for number, text in enumerate(leaked + clean)]
    assert kept(tmp_path, traces, lines.append, held_out=str(held), held_out_prompt=prompt, **options) == {*clean}
    warned = [line for line in lines if "an instruction that the held-out questions lack" in line]
    assert bool(warned) is not instructed
    report = [json.loads(line) for line in (tmp_path / "out" / "contamination.jsonl").read_text().splitlines()]
    assert {row["question"].split(INSTRUCTION)[0].strip() for row in report} == {*QUESTIONS}
    assert all(row["span"] and row["in"] == "prompt" and row["reason"] == "held out" for row in report)


BENCHMARK = [
    "Let $f(x) = 3x^2 - 12x + 7$ be defined for all real numbers. Find the smallest value of $f(x)$ on $[0, 5]$.",
    "A farmer has 48 meters of fence and builds a rectangular pen beside a long wall. What is the largest area in "
    "square meters that the pen can have?",
    "How many of the first 2024 positive integers are divisible by neither 3 nor 7 nor 11?",
]


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        (f"{BENCHMARK[1]} {INSTRUCTION}", "whole"),
        (BENCHMARK[0].replace("$f(x)", "\\( f(x)").replace("$[0, 5]$", "\\([0,5]\\)"), "whole"),
        ("A farmer has 48 meters of fence and builds a pen beside a long wall. What is the largest area in square "
         "meters that the pen can have?", "part"),
        ("A framer has 48 meters of fense and bilds a rectangular pen besides a long wal. Waht is the largest aera "
         "in square meters thet the pen can have?", "fuzzy"),
        ("Here is a story. A farmer has 48 meters of fence and builds a rectangular pen beside a long wall with a "
         "gate. He paints it. How long does he need?", "run"),
    ],
)  # fmt: skip
def test_a_benchmark_is_met_in_prompts(tmp_path: Path, prompt: str, rule: str) -> None:
    file = write_rows(tmp_path / "bench.jsonl", [{"problem": text} for text in BENCHMARK])
    clean = "A builder has 48 bricks. How many walls of 6 bricks does he build?"
    traces = [trace(1, prompt), trace(2, clean)]
    assert kept(tmp_path, traces, decontaminate=[str(file)]) == {clean}
    (row,) = map(json.loads, (tmp_path / "out" / "contamination.jsonl").read_text().splitlines())
    assert (row["rule"], row["in"], row["benchmark"]) == (rule, "prompt", str(file))
    assert row["question"] in BENCHMARK and row["span"][:3] in prompt


def test_a_benchmark_is_met_in_traces(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "bench.jsonl", [{"problem": text} for text in BENCHMARK])
    thought = "Let me recall a similar one. " + BENCHMARK[2] + " That had the answer 1046. "
    traces = [
        trace(1, "Count something.", reasoning=thought + "So we do the same here."),
        trace(2, "Count another thing.", response=BENCHMARK[1].upper()),
        trace(
            3, "Count a third thing.", reasoning="How many of the first 100 positive integers are divisible by 3? 33."
        ),
    ]
    assert kept(tmp_path, traces, decontaminate=[{"data": str(file), "prompt": "{problem}"}]) == {
        "Count a third thing."
    }
    table = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert table["math"]["contaminated"] == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "contamination.jsonl").read_text().splitlines()]
    assert {(row["key"], row["in"]) for row in rows} == {("0001", "trace"), ("0002", "trace")}


def test_a_phrase_of_many_prompts_is_no_evidence(tmp_path: Path) -> None:
    phrase = "Give your answer as a whole number between 0 and 999 inclusive and nothing else at all"
    file = write_rows(tmp_path / "bench.jsonl", [{"question": f"{text} {phrase}."} for text in BENCHMARK[:2]])
    clean = [f"Count the {name} in the garden. {phrase}." for name in ("bees", "birds", "trees", "stones", "roses")]
    traces = [trace(number, prompt) for number, prompt in enumerate(clean)]
    leaked = trace(9, f"{BENCHMARK[0]} {phrase}.")
    assert kept(tmp_path, [*traces, leaked], decontaminate=[str(file)]) == {*clean}


def test_benchmarks_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(repository: str, subset: str, split: str, revision: str) -> list[dict[str, str]]:
        asked.append((repository, subset, split))
        return [{"problem": BENCHMARK[0], "Question": BENCHMARK[1], "question_content": BENCHMARK[2]}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    traces = [trace(number, text) for number, text in enumerate([*BENCHMARK, "Name a colour."])]
    names = ["aime24", "gpqa_diamond", "math500", "LiveCodeBench"]
    assert kept(tmp_path, traces, decontaminate=names) == {"Name a colour."}
    assert ("Idavidrein/gpqa", "gpqa_diamond", "train") in asked and len(asked) == len(names)
    assert {"aime24", "aime25", "math500", "gpqa_diamond", "livecodebench", "gsm8k"} <= {*BENCHMARKS}


def test_a_benchmark_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    traces = [trace(1, "Name a colour.")]
    with pytest.raises(UserError, match=r"no benchmark 'math50'.*did you mean 'math500'"):
        kept(tmp_path, traces, decontaminate=["math50"])
    with pytest.raises(UserError, match=r"hub cannot be reached.*name a file"):
        kept(tmp_path, traces, decontaminate=["aime24"])
    file = write_rows(tmp_path / "bench.jsonl", [{"riddle": "What has keys?"}])
    with pytest.raises(UserError, match=r"row 1: decontaminate: which column.*riddle.*prompt:"):
        kept(tmp_path, traces, decontaminate=[str(file)])
    with pytest.raises(UserError, match="no such file"):
        kept(tmp_path, traces, decontaminate=["missing.jsonl"])


def test_an_embedding_model_finds_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "bench.jsonl", [{"problem": text} for text in BENCHMARK])
    traces = [trace(1, "Which pen by a wall has the most room inside?"), trace(2, "Name a colour.")]
    options = {"decontaminate": [str(file)], "embedding": "some/model"}
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install '.\[embedding\]'"):
        kept(tmp_path, traces, **options)

    class SentenceTransformer:
        """Embeds a text by whether it is about a pen, and by whether it is about a colour."""

        def __init__(self, name: str) -> None:
            assert name == "some/model"

        def encode(self, texts: list[str], normalize_embeddings: bool, show_progress_bar: bool) -> np.ndarray:
            vectors = np.array([[" pen " in text, "colour" in text, 0.1] for text in texts], float)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert kept(tmp_path, traces, **options) == {"Name a colour."}
    (row,) = map(json.loads, (tmp_path / "out" / "contamination.jsonl").read_text().splitlines())
    assert (row["rule"], row["question"], row["share"]) == ("embedding", BENCHMARK[1], 1.0)


def test_windows_hash_the_same_words_alike_wherever_they_stand() -> None:
    first, second = (tokenize([text]).only(*WORDS) for text in ("x y the quick brown fox", "the QUICK, brown fox z"))
    assert set(Windows(first.hashes).all(4).tolist()) & set(Windows(second.hashes).all(4).tolist())
    assert not set(Windows(first.hashes).all(5).tolist()) & set(Windows(second.hashes).all(5).tolist())
    texts = ["a b", "", "c d e", "ﬁne ½ 漢字"]
    tokens = tokenize(texts)
    words = [tokens.text[start:end] for start, end in zip(tokens.starts, tokens.ends, strict=True)]
    assert words == ["a", "b", "c", "d", "e", "fine", "1", "⁄", "2", "漢", "字"]
    assert tokens.documents.tolist() == [0, 0, 2, 2, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.skipif(not DATA.is_dir(), reason="the labelled leaks are not here")
def test_labelled_leaks_of_math500_are_met_with_no_more_flags_than_plain_ngrams() -> None:
    def column(path: str, name: str) -> list[str]:
        text = (DATA / path).read_text(encoding="utf-8")
        rows = json.loads(text) if path.endswith(".json") else map(json.loads, text.splitlines())
        return [row[name] for row in rows]

    questions = column("math500/test.jsonl", "problem")

    def flagged(prompts: list[str]) -> int:
        distinct, met = sorted(set(prompts)), set()
        batches = [distinct[start : start + 256] for start in range(0, len(distinct), 256)]
        for matcher in (
            Matcher(questions, part=3, share=0.8, fuzzy=True),
            Matcher(questions, run=13, run_kinds=ALL, latex=False, shortest=2**31),
        ):
            for batch in batches:
                matcher.count(tokenize(batch, matcher.latex))
            for batch in batches:
                met |= {batch[number] for number in matcher.hits(tokenize(batch, matcher.latex))}
        return sum(prompt in met for prompt in prompts)

    assert flagged(column("contamination/openthoughts_c_lex.jsonl", "train_problem")) >= 85
    assert flagged(column("contamination/s1_c_lex.jsonl", "train_problem")) >= 30
    assert flagged(column("math_train/rllm_data_train_math_math.json", "problem")) <= 619
