import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard

from bmjax.config import UserError
from bmjax.demo.problems import make_problems, solve
from bmjax.demo.teacher import MODEL, DemoTeacher
from bmjax.teach.collect import collect
from bmjax.teach.record import is_whole
from bmjax.teach.select import REASONS, render_table, select
from bmjax.teach.selection.language import scripts
from bmjax.teach.selection.questions import near_duplicates, question_digest
from bmjax.teach.selection.repetition import repetition
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


WORDS = ["we", "find", "the", "sum", "of", "all", "terms", "and", "then", "check", "that", "it", "is", "equal"]


def prose(seed: int, words: int = 600) -> str:
    chance = random.Random(seed)
    return " ".join(f"{chance.choice(WORDS)} {chance.randint(0, 999)}" for _ in range(words))


@pytest.mark.parametrize("reason", ["stop", "eos", "end_turn", "stop_sequence", "STOP", None])
def test_answers_that_ended_by_themselves_are_whole(tmp_path: Path, reason: str | None) -> None:
    assert is_whole(reason)
    assert run(tmp_path, [row(1, finish_reason=reason)])[0] == {"kept": 1}


CUT = {
    "truncated": ["length", "max_tokens", "MAX_TOKENS", "model_length", "tool_calls", "abort", "error",
                  "insufficient_system_resource", "function_call", "unknown"],
    "refused": ["content_filter", "SAFETY", "refusal", "RECITATION", "content-filter"],
}  # fmt: skip


def test_cut_and_refused_answers_are_dropped_and_counted_by_name(tmp_path: Path) -> None:
    reasons = [reason for group in CUT.values() for reason in group]
    rows = [row(n, finish_reason=reason) for n, reason in enumerate(reasons)] + [row(90)]
    counts, kept = run(tmp_path, rows, keep=["right", "unjudged"])
    assert counts == {"kept": 1, "truncated": len(CUT["truncated"]), "refused": len(CUT["refused"])} and kept == [
        "0090"
    ]
    examples = json.loads((tmp_path / "out" / "examples.json").read_text())["math"]
    for name, group in CUT.items():
        assert examples[name]["causes"] == dict.fromkeys(group, 1)


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<THINK>", "< think >", "<thinking>", "<|begin_of_thought|>"])
@pytest.mark.parametrize("field", ["reasoning", "response"])
def test_a_tag_that_is_left_over_is_malformed(tmp_path: Path, tag: str, field: str) -> None:
    assert run(tmp_path, [row(1, **{field: f"so {tag} it is 2"}), row(2)])[0] == {"kept": 1, "malformed": 1}
    assert run(tmp_path, [row(1, **{field: "so 1 < thinking"}), row(2)])[0] == {"kept": 2}


def test_a_window_of_tokens_by_the_teachers_count_else_by_a_tokenizer(tmp_path: Path, student: Path) -> None:
    lines: list[str] = []
    rows = [row(n, usage={"completion_tokens": n}) for n in (3, 10, 11, 40)] + [row(50, usage={}, reasoning="x" * 400)]
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"traces": str(traces), "output": str(tmp_path / "out"), "min_tokens": 10, "max_tokens": 20}
    table = select(SelectSettings.read(settings), lines.append)["math"]
    assert (table["kept"], table["too short"], table["too long"]) == (3, 1, 1)
    assert any("1 traces have no count of tokens" in line for line in lines)
    table = select(SelectSettings.read(settings | {"tokenizer": str(student)}), lines.append)["math"]
    assert (table["kept"], table["too short"], table["too long"]) == (2, 1, 2)
    assert any(f"by the teacher in 4 traces, 1 by {student}" in line for line in lines)


LOOPS = {
    "a sentence": "Wait, let me check the sum again, it should be 204 in the end. " * 60,
    "a letter": "ha" * 2000,
    "a digit": "0." + "3" * 3000,
    "lines of Chinese": "让我再检查一遍这个答案是否正确。\n" * 80,
    "the second half": prose(1, 300) + " and so on we go around " * 200,
    "blanks": "\n" * 4000,
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_loops_are_dropped(tmp_path: Path, text: str) -> None:
    assert repetition(text) > 0.5
    counts, _ = run(tmp_path, [row(1, reasoning=f"a {text} b"), row(2, reasoning=prose(2))], max_repetition=0.5)
    assert counts == {"kept": 1, "repetition": 1}


@pytest.mark.parametrize("words", [10, 100, 1000, 10000])
def test_prose_is_no_loop_and_a_copy_is_half_one(words: int) -> None:
    text = prose(words, words)
    assert repetition(text) < 0.05
    if words >= 100:
        exact = len({text[i : i + 64] for i in range(len(text) - 63)})
        doubled = text + text
        expected = 1 - (exact + 63) / (len(doubled) - 63)
        assert repetition(doubled) == pytest.approx(expected, abs=0.05)


def test_another_script_than_the_languages_is_dropped(tmp_path: Path) -> None:
    rows = [
        row(1, reasoning="We add: α + β ≤ π, so |ℝ| > 3 → fine, naïve. 😀"),
        row(2, reasoning="We add 首先 and get it."),
        row(3, reasoning="首先，我们计算这个和。"),
        row(4, reasoning="Сначала сложим."),
        row(5, prompt="What does 你好 mean, and how often is it said?", reasoning="你好 means hello."),
    ]
    assert run(tmp_path, rows, languages=["en"])[1] == ["0001", "0005"]
    assert run(tmp_path, rows, languages=["en", "zh"])[1] == ["0001", "0002", "0003", "0005"]
    assert run(tmp_path, rows, languages=["en"], max_foreign=0.2)[1] == ["0001", "0002", "0005"]
    chinese = [
        row(1, prompt="求 1 + 1。", reasoning="首先 $\\frac{1}{2} + x$，所以 def f(x) 正确。", response="答案 2"),
        row(2, prompt="求 2 + 1。", reasoning="First we add the two numbers and look at them.", response="答案 3"),
    ]
    assert run(tmp_path, chinese, languages=["zh"])[1] == ["0001"]
    causes = json.loads((tmp_path / "out" / "examples.json").read_text())["math"]["language"]["causes"]
    assert causes == {"Latin": 1}
    assert scripts("aé я 中か한") == {"Latin": 2, "Cyrillic": 1, "Han": 1, "Kana": 1, "Hangul": 1}
    with pytest.raises(UserError, match="languages: 'xx' is not one of ar, "):
        run(tmp_path, rows, languages=["xx"])


def test_pass_rate_over_the_samples_of_a_prompt(tmp_path: Path) -> None:
    rows = []
    for number, right in enumerate((0, 1, 2, 3, 4)):
        rows += [
            row(
                number,
                id=f"{number}{sample}",
                reasoning=f"way {sample}",
                verdict="right" if sample < right else "wrong",
            )
            for sample in range(4)
        ]
    # Cut off is not solved; what nobody could judge and a refusal say nothing.
    rows += [row(7, id="70", reasoning="a"), row(7, id="71", finish_reason="length", verdict="unjudged")]
    rows += [row(8, id="80", reasoning="a"), row(8, id="81", reasoning="b", verdict="unjudged")]
    counts, kept = run(tmp_path, rows, pass_rate=[0.25, 0.75])
    assert kept == ["10", "20", "21", "30", "31", "32", "70"]
    assert counts == {"kept": 7, "pass rate": 5, "wrong": 10, "truncated": 1, "unjudged": 1}
    assert run(tmp_path, rows, pass_rate=[1, 1])[1] == ["40", "41", "42", "43", "80"]


def test_the_same_question_in_another_writing_is_kept_once(tmp_path: Path) -> None:
    same = ["What is the sum of 3 and 5?", "what is the  sum of 3 and 5", "WHAT IS THE SUM OF ３ AND 5 ?!"]
    other = ["What is the sum of 3 and 7?", "What is the sum of 3, -5?"]
    rows = [row(n, prompt=prompt) for n, prompt in enumerate(same + other)] + [row(9, prompt=same[0], response="8.")]
    counts, kept = run(tmp_path, rows)
    assert counts["near duplicate"] in (2, 3) and counts["kept"] + counts["near duplicate"] == 6
    assert {"0003", "0004"} < {*kept}
    assert len({question_digest(prompt) for prompt in same}) == 1
    assert len({question_digest(prompt) for prompt in [*same, *other]}) == 3
    assert run(tmp_path, rows, near_duplicates=None)[0] == {"kept": 6}


def test_near_duplicates_are_those_whose_runs_of_words_are_shared(tmp_path: Path) -> None:
    base = prose(5, 40)
    words = base.split()
    prompts = {
        "base": base,
        "one word": " ".join([*words[:40], "other", *words[41:]]),
        "half": " ".join(words[:40]) + prose(6, 20),
        "new": prose(7, 40),
    }

    def jaccard(a: str, b: str) -> float:
        left, right = ({tuple(text.split()[i : i + 3]) for i in range(len(text.split()) - 2)} for text in (a, b))
        return len(left & right) / len(left | right)

    assert jaccard(base, prompts["one word"]) > 0.9 and jaccard(base, prompts["half"]) < 0.5
    keyed = [(name.rjust(16).encode(), text) for name, text in prompts.items()]
    dropped = dict(near_duplicates(keyed, 0.8))
    assert dropped == {b"one word".rjust(16): b"base".rjust(16)}
    rows = [row(n, prompt=prompt) for n, prompt in enumerate(prompts.values())]
    assert run(tmp_path, rows, near_duplicates=0.8)[0] == {"kept": 3, "near duplicate": 1}


@pytest.mark.parametrize(
    ("prefer", "best"), [("first", ["a", "b"]), ("shortest", ["e", "d"]), ("most_agreed", ["c", "b"])]
)
def test_the_best_of_a_prompt(tmp_path: Path, prefer: str, best: list[str]) -> None:
    answers = {
        "a": ("\\boxed{7}", 50), "b": ("So: \\boxed{2}", 40), "c": ("\\boxed{ 2 }.", 30), "d": ("\\boxed{1}", 20),
        "e": ("\\boxed{0}", 10),
    }  # fmt: skip
    rows = [
        row(1, id=name, response=response, reasoning=f"way {name}", usage={"completion_tokens": tokens})
        for name, (response, tokens) in answers.items()
    ]
    rows.append(row(1, id="f", response="\\boxed{2}", reasoning="wrong way", verdict="unjudged"))
    counts, kept = run(tmp_path, rows, prefer=prefer, per_prompt=2)
    assert kept == sorted(best) and counts == {"kept": 2, "enough": 3, "unjudged": 1}


def test_quotas_of_sources(tmp_path: Path) -> None:
    rows = [row(n, source=f"set{n % 2}.jsonl, row {n}") for n in range(20)]
    assert run(tmp_path, rows, per_source=3)[0] == {"kept": 6, "quota": 14}
    assert run(tmp_path, rows, per_source={"set0.jsonl": 1})[0] == {"kept": 11, "quota": 9}


EVERYTHING = {
    "languages": ["en"], "max_repetition": 0.5, "pass_rate": [0.35, 1], "near_duplicates": 0.7, "per_prompt": 1,
    "prefer": "most_agreed", "per_source": 9, "min_tokens": 2, "max_tokens": 5000,
}  # fmt: skip


def many_traces() -> list[dict[str, Any]]:
    chance, rows = random.Random(3), []
    for number in range(240):
        question = chance.randint(0, 40)
        rows.append(
            row(
                question,
                id=f"{chance.randint(0, 900):04}",
                prompt=f"{prose(question, 20)}{' please' * (number % 9 == 0)}{'?' * (number % 4 == 0)}",
                reasoning=f"way {chance.randint(0, 3)} {'首' * (number % 11 == 0)}",
                response=f"\\boxed{{{chance.randint(0, 2)}}}",
                verdict=chance.choice(["right", "right", "right", "wrong", "unjudged"]),
                finish_reason=chance.choice(["stop", "stop", "stop", "length"]),
                source=f"set{question % 3}",
                usage={"completion_tokens": chance.randint(1, 20)},
            )
        )
    return rows


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_with_every_rule_the_order_of_the_traces_does_not_matter(tmp_path: Path) -> None:
    rows = many_traces()
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": rows[5]["prompt"]}) + "\n")
    options = EVERYTHING | {"held_out": str(held)}
    counts, _ = run(tmp_path, rows, **options)
    assert {"duplicate", "language", "pass rate", "near duplicate", "held out", "enough", "quota"} < {*counts}
    first = outputs(tmp_path / "out")
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        run(tmp_path, rows, **options)
        assert outputs(tmp_path / "out") == first


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_a_job_array_give_the_same_as_one_piece(tmp_path: Path, parts: int) -> None:
    rows = many_traces()
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": rows[5]["prompt"]}) + "\n")
    options = EVERYTHING | {"decontaminate": [str(held)]}
    run(tmp_path, rows, **options)
    first = outputs(tmp_path / "out")
    settings = {"traces": str(tmp_path / "traces.jsonl"), "output": str(tmp_path / "joined"), **options}
    read = 0
    for part in reversed(range(parts)):
        with pytest.raises(UserError, match="part"):
            select(SelectSettings.read(settings | {"join": True}))
        read += sum(select(SelectSettings.read(settings | {"shard": [part, parts]}))["math"].values())
    assert read == len(rows)
    with pytest.raises(UserError, match="made with other settings"):
        select(SelectSettings.read(settings | {"join": True, "per_prompt": 5}))
    select(SelectSettings.read(settings | {"join": True}))
    assert outputs(tmp_path / "joined") == first
    with pytest.raises(UserError, match=r"shard: found \[3, 3\], expected \[i, n\] with i from 0 to n - 1"):
        SelectSettings.read(settings | {"shard": [3, 3]})


def test_examples_of_every_rule_and_a_data_card(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = [*many_traces(), row(400, reasoning="\x1b[31m | <b>", response="9", teacher={"model": "deepseek-r1"})]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"traces": str(tmp_path / "traces.jsonl"), "output": str(tmp_path / "out"), "show": 2, **EVERYTHING}
    table = select(SelectSettings.read(settings), lines.append)["math"]
    shown = "\n".join(lines)
    examples = json.loads((tmp_path / "out" / "examples.json").read_text())["math"]
    for reason, count in table.items():
        if count:
            assert f"== math: {reason}, {count}" in shown and examples[reason]["count"] == count
            assert examples[reason]["examples"][0]["prompt"]
    assert "\x1b" not in shown
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"] == [{"config_name": "math", "data_files": "math.jsonl"}]
    assert DatasetCard(card).data.configs == front["configs"] and str(tmp_path) not in card
    assert "deepseek-r1 (1)" in card and "max_repetition: 0.5" in card and f"| wrong | {table['wrong']} |" in card
    assert all(reason in REASONS for reason in table if reason != "kept")
