"""Rows of data sets with answers, in their real shapes and our own words, are read as if they had been collected."""

import json

import pytest

from bmjax.config import UserError
from bmjax.teach.record import Record
from bmjax.teach.select import select
from bmjax.teach.settings import SelectSettings
from bmjax.teach.traces import R1, read_traces
from tests.conftest import write_rows

QUESTION = "What is 2 + 3?"
OPENR1 = {
    "problem": QUESTION, "solution": "It is $\\boxed{5}$.", "answer": "5", "problem_type": "Algebra",
    "question_type": "math-word-problem", "source": "olympiads", "uuid": "u1",
    "is_reasoning_complete": [True, True, True, False], "finish_reasons": None, "correctness_count": 2,
    "generations": ["<think>\ntwo and three\n</think>\n\nIt is \\boxed{5}.", "<think>\nhm\n</think>\nIt is 5",
                    "<think>\nwrong\n</think>\n\\boxed{6}", "<think>\nand on"],
    "correctness_math_verify": [True, False, False, False], "correctness_llama": [None, True, False, False],
    "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "<think>x</think>5"}],
}  # fmt: skip
MARKED = (
    "<|begin_of_thought|>\n\ntwo and three\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n5\n\n<|end_of_solution|>"
)


def read(tmp_path, rows, domain="sums", **options):
    """(records, lines of the log) of rows in a file."""
    lines = []
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return list(read_traces([str(file)], domain=domain, log=lines.append, **options)), lines


def chat(answer, *before):
    turns = [*before, {"from": "user", "value": QUESTION}, {"from": "assistant", "value": answer}]
    return {"conversations": turns}


def test_every_generation_of_openr1_is_a_trace_with_its_verdict(tmp_path):
    records, lines = read(tmp_path, [OPENR1], None)
    assert [(r.reasoning, r.response, r.finish_reason) for r in records] == [
        ("two and three", "It is \\boxed{5}.", "stop"), ("hm", "It is 5", "stop"), ("wrong", "\\boxed{6}", "stop"),
        ("and on", "", "length"),
    ]  # fmt: skip
    assert [(r.verdict, r.verdict_by) for r in records] == [
        ("right", "correctness_math_verify"), ("right", "correctness_llama"), ("wrong", "correctness_llama"),
        ("wrong", "correctness_llama"),
    ]  # fmt: skip
    for record in records:
        assert (record.domain, record.prompt, record.reference, record.source) == ("math", QUESTION, "5", "olympiads")
        assert record.teacher == {"model": R1}
    assert len({r.id for r in records}) == 4 and lines == [
        f"{tmp_path}/rows.jsonl, row 1: traces of the form openr1_math"
    ]


def test_openr1_with_stated_finish_reasons_and_without_verdicts(tmp_path):
    row = OPENR1 | {"finish_reasons": ["stop", "stop", "length", "length"], "correctness_llama": None}
    row |= {"correctness_math_verify": None, "answer": "proof"}
    records, _ = read(tmp_path, [row], None)
    assert [r.finish_reason for r in records] == ["stop", "stop", "length", "length"]
    assert {(r.verdict, r.verdict_by, r.reference) for r in records} == {("unjudged", "none", None)}


def test_openthoughts_in_marks_and_in_columns(tmp_path):
    system = "Your role is to think long."
    records, lines = read(tmp_path, [{"system": system, **chat(MARKED)}])
    assert [(r.reasoning, r.response, r.domain) for r in records] == [("two and three", "5", "sums")]
    assert records[0].teacher == {"system": system} and records[0].prompt == QUESTION
    assert lines[-1] == "traces: 1 traces had a system turn, kept in `teacher` and not in the prompt"

    columns = {
        "problem": QUESTION, "deepseek_reasoning": "two and three", "deepseek_solution": "5", "domain": "math",
        "ground_truth_solution": "Adding gives \\boxed{5}.", "source": "amc_aime", "test_cases": None,
        "starter_code": None,
    }  # fmt: skip
    tests = json.dumps({"inputs": ["2 3\n"], "outputs": ["5\n"]})
    code = columns | {"domain": "code", "test_cases": tests, "ground_truth_solution": None, "source": "apps"}
    story = columns | {"domain": "physics", "ground_truth_solution": "A long story.\nIt ends in five."}
    records, _ = read(tmp_path, [columns, code, story])
    pairs = {"tests": [{"input": "2 3\n", "output": "5\n"}]}
    assert [(r.domain, r.reference) for r in records] == [("math", "5"), ("code", pairs), ("physics", None)]
    assert all((r.reasoning, r.response, r.teacher) == ("two and three", "5", {"model": R1}) for r in records)


def test_openthoughts_math_keeps_its_verdict_and_tokens(tmp_path):
    row = {"source": "math", "problem": QUESTION, "solution": "So $\\boxed{5}$.", "messages": [], "system": "s",
           "generated_token_count": 812, "correct": False, **chat("<think>t</think>6")}  # fmt: skip
    (record,), _ = read(tmp_path, [row], None)
    assert (record.reference, record.verdict, record.verdict_by) == ("5", "wrong", "correct")
    assert record.usage == {"completion_tokens": 812} and record.domain == "math"


def test_s1k_has_two_teachers(tmp_path):
    row = {"question": QUESTION, "solution": "5", "cot_type": "science", "source_type": "aime", "metadata": "{}"}
    newer = row | {"deepseek_thinking_trajectory": "d", "deepseek_attempt": "5", "deepseek_grade": "Yes",
                   "gemini_thinking_trajectory": "g", "gemini_attempt": "6", "gemini_grade": "No"}  # fmt: skip
    older = row | {"cot": None, "thinking_trajectories": ["t"], "attempt": "5"}
    records, _ = read(tmp_path, [newer, older], None)
    assert [(r.teacher["model"], r.reasoning, r.response, r.verdict) for r in records] == [
        (R1, "d", "5", "right"), ("gemini-2.0-flash-thinking-exp", "g", "6", "wrong"),
        ("gemini-2.0-flash-thinking-exp", "t", "5", "unjudged"),
    ]  # fmt: skip
    assert {(r.domain, r.reference, r.source) for r in records} == {("science", "5", "aime")}


AM = {
    "messages": [
        {"role": "user", "content": QUESTION, "info": {"source": "web", "reference_answer": "5", "test_case": None}},
        {"role": "assistant", "content": "<think>two and three</think>\n<answer>5</answer>",
         "info": {"think_content": "two and three", "answer_content": "5"}},
    ]
}  # fmt: skip
DOLPHIN = {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": QUESTION}],
    "reasoning": "two and three", "answer": "5", "model": "deepseek-reasoner",
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (AM, {"reference": "5", "source": "web"}),
        (DOLPHIN, {"teacher": {"model": "deepseek-reasoner", "system": "s"}, "reference": None}),
        (chat("<think>two and three</think>5") | {"domain": "code", "source": "x"}, {"domain": "code", "source": "x"}),
        ({"messages": [{"role": "user", "content": QUESTION},
                       {"role": "assistant", "content": "5", "reasoning_content": "two and three"}]}, {}),
        (chat("<thinking>two and three</thinking>5") | {"answer": "5"}, {"reference": "5"}),
        (chat("<reasoning>\ntwo and three\n</reasoning>\n<answer>\n5\n</answer>") | {"ground_truth": 5},
         {"reference": 5}),
        (chat("<thought>two and three</thought>5"), {}),
        (chat("◁think▷two and three◁/think▷5"), {}),
        (chat("two and three</think>5"), {}),
        ({"prompt": QUESTION, "response": "5", "reasoning": "two and three", "reference": "5"}, {"reference": "5"}),
        ({"prompt": QUESTION, "completion": "<think>two and three</think>5", "finish_reason": "stop"}, {}),
        ({"instruction": "What is", "input": "2 + 3?", "output": "<think>two and three</think>5"},
         {"prompt": "What is\n2 + 3?"}),
        ({"instruction": QUESTION, "generations": ["<think>two and three</think>5"], "model_name": "q"},
         {"teacher": {"model": "q"}}),
        ({"prompt": QUESTION, "response": "5", "thinking": "two and three", "verdict": "wrong", "verdict_by": "me"},
         {"verdict": "wrong", "verdict_by": "me"}),
        ({"problem": QUESTION, "generations": [None, "<think>two and three</think>5"], "correct": True,
          "finish_reasons": [None, "stop"]}, {"verdict": "right", "verdict_by": "correct"}),
        ({"input": QUESTION, "reasoning_content": "two and three", "content": "5", "repo_name": "r", "score": 9}, {}),
        ({"prompt": [{"role": "user", "content": QUESTION}], "response": "<think>two and three</think>5"}, {}),
    ],
)  # fmt: skip
def test_chats_and_columns(tmp_path, row, expected):
    (record,), _ = read(tmp_path, [row])
    assert (record.reasoning, record.response, record.finish_reason) == ("two and three", "5", "stop")
    assert {"prompt": QUESTION, "domain": "sums"} | expected == {
        name: getattr(record, name) for name in {"prompt": 0, "domain": 0} | expected
    }


@pytest.mark.parametrize(
    ("answer", "finish_reason"),
    [("<think>and on", "length"), ("<|begin_of_thought|>and on", "length"),
     ("<|begin_of_thought|>t<|end_of_thought|><|begin_of_solution|>half", "length"),
     ("<think>t</think>5", "stop"), ("5", "stop")],
)  # fmt: skip
def test_a_thought_or_solution_that_never_ends_is_cut(tmp_path, answer, finish_reason):
    (record,), _ = read(tmp_path, [chat(answer)])
    assert record.finish_reason == finish_reason
    assert "begin_of" not in record.reasoning + record.response


def test_two_thoughts_stay_malformed(tmp_path):
    twice = "<thinking>a</thinking>5<thinking>b</thinking>6"
    (record,), _ = read(tmp_path, [chat(twice)])
    assert record.reasoning == "" and record.response.count("<think>") == 2


def test_what_makes_no_trace_is_counted(tmp_path):
    user, assistant = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
    tools = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
             "tools": [{"type": "function", "function": {"name": "f"}}]}  # fmt: skip
    rows = [chat("5"), chat("5", user, assistant), {"conversations": [user]}, tools, {"conversations": []},
            OPENR1 | {"generations": []}, OPENR1 | {"problem": ""}]  # fmt: skip
    records, lines = read(tmp_path, rows)
    assert len(records) == 1
    assert lines[-1] == "traces: 6 rows make no trace: no answer 2, no question 2, several turns 1, tools 1"


def test_rows_of_no_form_without_domain_and_bad_chats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"row 1: no form of traces has columns a, q; expected .*openr1_math: problem"):
        read(tmp_path, [{"q": QUESTION, "a": "5"}])
    with pytest.raises(UserError, match="row 1: the row names no domain; give key 'domain'"):
        read(tmp_path, [chat("5")], None)
    with pytest.raises(UserError, match="row 1: conversations, turn 1: the role is 'robot'"):
        read(tmp_path, [{"conversations": [{"from": "robot", "value": "Hi"}]}])
    with pytest.raises(UserError, match="row 1: not a trace of the form openr1_math: 'int' object is not iterable"):
        read(tmp_path, [OPENR1 | {"generations": 3}])
    with pytest.raises(UserError, match="row 1: not a record: field 'response': expected str, found int"):
        read(tmp_path, [{"id": "1", "domain": "d", "prompt": "p", "response": 5}])


def test_collected_records_come_back_as_they_are_and_a_torn_end_is_skipped(tmp_path):
    record = Record("1", "sums", QUESTION, "5", "r", "5", verdict="right", verdict_by="number")
    file = write_rows(tmp_path / "rows.jsonl", [vars(record)])
    with file.open("a") as end:
        end.write('{"id": "2", "do')
    lines = []
    assert list(read_traces([str(file)], log=lines.append)) == [record] and not lines


def test_copies_have_one_id_and_other_answers_others(tmp_path):
    records, _ = read(tmp_path, [chat("<think>a</think>5"), chat("<think>a</think>5"), chat("<think>b</think>5")])
    first, second, third = (record.id for record in records)
    assert first == second != third


def test_the_teacher_of_a_hub_data_set_is_known(tmp_path, monkeypatch):
    from bmjax.teach import traces

    monkeypatch.setattr(traces, "read_source", lambda *arguments, **options: iter([("row 1", chat("5"))]))
    (record,) = traces.read_traces(["open-thoughts/OpenThoughts-114k:default:train"], domain="d", log=lambda line: None)
    assert record.teacher == {"model": R1}


def test_select_takes_traces_of_a_data_set(tmp_path):
    rows = [OPENR1, OPENR1 | {"source": "cn_k12", "problem": "Another?"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"traces": str(file), "output": str(tmp_path / "out"), "only": {"source": "olympiads"}, "per_prompt": 1}
    table = select(SelectSettings.read(keys))
    assert {reason: n for reason, n in table["math"].items() if n} == {
        "kept": 1,
        "wrong": 1,
        "truncated": 1,
        "enough": 1,
    }
    (row,) = map(json.loads, (tmp_path / "out" / "math.jsonl").read_text().splitlines())
    assert (row["prompt"], row["reference"]) == (QUESTION, "5") and row["reasoning"] in ("two and three", "hm")
