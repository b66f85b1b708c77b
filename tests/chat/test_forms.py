"""Rows of every form that people have, as conversations; and what would be lost, refused by row and key."""

import json

import pytest

from bmjax.chat.forms import read_conversation
from bmjax.config import UserError

QA = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
SHAREGPT = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
THOUGHT = "<think>\nhm\n</think>\nA."
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(row, **options):
    """Return the (role, content) pairs and the contents that are learned."""
    conversation = read_conversation(row, "data.jsonl, row 1", **options)
    pairs = [(message["role"], message["content"]) for message in conversation.messages]
    return pairs, [text for (_, text), target in zip(pairs, conversation.targets, strict=True) if target]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QA},
        {"conversations": QA},
        {"conversation": QA},
        {"messages": SHAREGPT},
        {"conversations": SHAREGPT},
        {"conversation": [{"from": "Human", "value": "Q?"}, {"role": "assistant", "content": "A."}]},
        {"messages": json.dumps(QA)},
        {"prompt": "Q?", "response": "A."},
        {"prompt": "Q?", "completion": "A."},
        {"prompt": QA[:1], "completion": QA[1:]},
        {"prompt": QA[:1], "response": "A."},
        {"instruction": "Q?", "output": "A."},
        {"instruction": "Q?", "input": "", "output": "A.", "system": "", "history": []},
        {"messages": QA[:1], "response": "A."},
        {"messages": None, "prompt": "Q?", "response": "A."},
        {"messages": None, "conversations": SHAREGPT, "prompt": None},
        {"messages": QA, "conversations": None, "prompt": None, "tools": None, "system": None},
        {"messages": QA, "prompt": "Q?", "prompt_id": "x", "source": "web", "score": 0.5},
        {"messages": QA, "conversations": SHAREGPT},
        {"messages": [], "conversations": None, "prompt": "Q?", "response": "A."},
        {"instruction": "Q?", "input": float("nan"), "output": "A."},
        {"messages": QA, "reasoning": "off", "label": 0},
        {"messages": [{**QA[0], "toxic": False, "language": "English", "annotations": []}, {**QA[1], "refusal": ""}]},
        {"messages": [QA[0], {**QA[1], "weight": "1", "tool_calls": ""}]},
        {"conversations": [SHAREGPT[0], {"from": "bard", "value": "A."}]},
        {"messages": [{**turn, "weight": None, "name": None, "tool_calls": None, "id": 3} for turn in QA]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]},
                QA[1],
            ]
        },
    ],
)
def test_a_question_and_its_answer_in_every_form(row):
    assert chat(row) == ([("user", "Q?"), ("assistant", "A.")], ["A."])


@pytest.mark.parametrize(
    "row",
    [
        {"system": "S", "conversations": SHAREGPT},
        {"system_prompt": "S", "messages": QA},
        {"system": "S", "prompt": "Q?", "response": "A."},
        {"system": "S", "instruction": "Q?", "output": "A."},
        {"system": "S", "messages": [{"role": "system", "content": "S"}, *QA]},
        {"messages": [{"role": "developer", "content": "S"}, *QA]},
    ],
)
def test_the_system_prompt_goes_first_and_once(row):
    assert chat(row) == ([("system", "S"), ("user", "Q?"), ("assistant", "A.")], ["A."])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QA[0], {**QA[1], "reasoning_content": "hm"}]},
        {"messages": [QA[0], {**QA[1], "reasoning": "hm", "thinking": None}]},
        {"conversations": [SHAREGPT[0], {**SHAREGPT[1], "thinking": "hm"}]},
        {"messages": [QA[0], {**QA[1], "content": THOUGHT, "reasoning_content": "hm"}]},
        {"messages": [QA[0], {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"},
                                                              {"type": "text", "text": "A."}]}]},
        {"messages": QA, "reasoning": "hm"},
        {"prompt": "Q?", "response": "A.", "reasoning": "hm"},
        {"prompt": "Q?", "completion": "A.", "thinking": "hm"},
        {"instruction": "Q?", "output": "A.", "reasoning_content": "hm"},
        {"prompt": "Q?", "response": THOUGHT, "reasoning": " hm "},
    ],
)  # fmt: skip
def test_reasoning_becomes_a_think_block(row):
    assert chat(row) == ([("user", "Q?"), ("assistant", THOUGHT)], [THOUGHT])


def test_numbers_input_and_context_become_text():
    assert chat({"prompt": "1 + 3?", "response": 4})[1] == ["4"]
    for key in ("input", "context"):
        row = {"instruction": "Sum up.", key: "A long text.", "response" if key == "context" else "output": "A."}
        assert chat(row)[0][0] == ("user", "Sum up.\nA long text.")


def test_an_empty_system_turn_gives_way_to_the_column():
    row = {"system": "S", "messages": [{"role": "system", "content": " "}, *QA]}
    assert chat(row)[0] == [("system", "S"), ("user", "Q?"), ("assistant", "A.")]


def test_several_calls_in_any_spelling():
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "sub", "arguments": "{}"}]
    for turn in (
        {"from": "function_call", "value": json.dumps(calls)},
        {"role": "assistant", "tool_calls": [json.dumps(call) for call in calls]},
        {"role": "assistant", "tool_calls": json.dumps(calls)},
    ):
        message = read_conversation({"messages": [QA[0], turn, QA[1]]}, "here").messages[1]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["add", "sub"]
    data = {"role": "tool", "content": [{"a": 1}]}
    assert read_conversation({"messages": [*QA, data, QA[1]]}, "here").messages[2]["content"] == '[{"a": 1}]'


def test_context_turns_are_not_learned():
    again = [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "B."}]
    assert chat({"messages": QA + again})[1] == ["A.", "B."]
    assert chat({"messages": QA + again}, turns="last")[1] == ["B."]
    for flags in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}):
        assert chat({"messages": [QA[0], {**QA[1], **flags}, *again]})[1] == ["B."]
    assert chat({"messages": [QA[0], {**QA[1], "weight": 1, "train": True}]})[1] == ["A."]
    assert chat({"messages": [{**QA[0], "weight": 0}, QA[1]]})[1] == ["A."]
    # TRL learns the completion alone.
    assert chat({"prompt": QA + again[:1], "completion": again[1:]})[1] == ["B."]
    history = {"instruction": "Q2", "output": "B.", "history": [["Q?", "A."]]}
    assert chat(history)[1] == ["A.", "B."]


@pytest.mark.parametrize("start", [[], [{"from": "system", "value": "S"}]])
def test_an_opening_answer_is_context(start):
    row = {"conversations": [*start, {"from": "gpt", "value": "Hello!"}, *SHAREGPT]}
    assert chat(row)[1] == ["A."]
    [remark] = read_conversation(row, "here").remarks
    assert "begins with the assistant" in remark


def test_a_last_question_without_an_answer_is_said():
    conversation = read_conversation({"messages": [*QA, QA[0]]}, "here")
    assert conversation.targets == (False, True, False)
    assert "ends with a turn that the assistant does not answer" in conversation.remarks[0]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                                              "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": "",
         "tool_calls": [{"id": "1", "function": None, "name": "add", "arguments": {"a": 1}}]},
    ],
)  # fmt: skip
def test_tools_and_their_calls_are_carried(tools, call):
    result = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    conversation = read_conversation({"messages": [QA[0], call, result, QA[1]], "tools": tools}, "here")
    assert conversation.tools == [TOOL]
    assert conversation.messages[1]["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    ]
    assert conversation.messages[2] == result
    assert conversation.targets == (False, True, False, True)


def test_null_arguments_of_json_are_kept():
    call = {"id": None, "function": {"name": "add", "arguments": {"a": None, "b": [{"c": None}]}}}
    row = {"messages": [QA[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    (kept,) = read_conversation(row, "here").messages[1]["tool_calls"]
    assert kept == {"type": "function", "function": call["function"]}
    call["function"] = {"name": "add", "arguments": None}
    assert read_conversation(row, "here").messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_functions_of_sharegpt_become_tool_calls():
    turns = [SHAREGPT[0], {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
             {"from": "observation", "value": "2"}, SHAREGPT[1]]  # fmt: skip
    conversation = read_conversation({"conversations": turns, "tools": "[]"}, "here")
    assert conversation.tools is None
    assert conversation.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    legacy = [QA[0], {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": ""}}, QA[1]]
    assert read_conversation({"messages": legacy}, "here").messages[1]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "A."}, "expected messages, conversations .* found text; other columns need a mapping"),
        ({"question": "Q", "answer": "A"}, "found answer, question"),
        ({"prompt": None, "response": None}, "expected messages"),
        ({"messages": "hello"}, "'messages' must be a list of turns"),
        ({"messages": ["Q?", "A."]}, "'messages' must be a list of turns"),
        ({"messages": [{"role": "user", "content": None}]}, "messages, turn 1: no content"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "turn 1: the role is 'narrator', expected one of"),
        ({"messages": [{"content": "x"}]}, "messages, turn 1: the role is None"),
        ({"messages": [{"role": "user", "content": True}]}, "messages, turn 1: expected text, found bool"),
        ({"messages": [{"role": "user", "content": "x", "from": "gpt"}]}, "'role' and 'from' differ"),
        ({"messages": [{**QA[0], "wieght": 0}, QA[1]]}, "turn 1: 'wieght' is not known .*did you mean 'weight'"),
        ({"messages": [QA[0], {**QA[1], "masked": True}]}, "turn 2: 'masked' is not known and would be lost"),
        ({"messages": [QA[0], {**QA[1], "weight": 0.5}]}, "turn 2: weight: 0.5; expected 0 or 1"),
        ({"messages": [QA[0], {**QA[1], "weight": 1, "train": False}]}, "weight 1 and train False contradict"),
        ({"messages": [{**QA[0], "train": True}, QA[1]]}, "turn 1: train: True for a turn of role user"),
        ({"messages": [{**QA[0], "reasoning": "hm"}, QA[1]]}, "turn 1: only the assistant's turns can have reasoning"),
        ({"messages": [QA[0], {**QA[1], "reasoning": "hm", "thinking": "ho"}]}, "'reasoning' and 'thinking' differ"),
        ({"messages": [QA[0], {**QA[1], "content": "<think>ho</think>A.", "reasoning": "hm"}]}, "holds <think> itself"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, QA[1]]}, "'image_url'"),
        ({"messages": QA, "system": "S", "system_prompt": "T"}, "'system' and 'system_prompt' differ"),
        ({"messages": [{"role": "system", "content": "T"}, *QA], "system": "S"}, "'system' and the system turn .*"),
        ({"messages": QA, "prompt": "another"}, "'prompt' is not part of the conversation"),
        ({"messages": QA, "conversations": [*SHAREGPT, {"from": "gpt", "value": "B"}]}, "'conversations' is not part"),
        ({"messages": QA + QA, "reasoning": "hm"}, "'reasoning' is not part of the conversation"),
        ({"prompt": "Q?", "response": "A.", "output": "B."}, "'output' is not part of the conversation"),
        ({"prompt": "Q?", "response": "A.", "images": ["x.png"]}, "'images' would be lost; bmjax trains on text alone"),
        ({"prompt": "Q?", "response": "A.", "weight": 0.2}, "'weight' would be lost; rows cannot be weighted"),
        ({"prompt": "Q?", "response": False}, "response: expected text, found bool"),
        ({"prompt": "Q?", "completion": "A.", "label": False}, "'label' is false: a rejected answer"),
        ({"messages": QA, "context": "lost"}, "'context' is not part"),
        ({"messages": QA, "history": [["a", "b"]]}, "'history' would be lost"),
        ({"prompt": "Q?", "response": "A.", "documents": [{"text": "x"}]}, "'documents' would be lost"),
        ({"messages": QA[:1], "reasoning": "hm"}, "'reasoning' belongs to an answer, and the row has none"),
        ({"instruction": "Q", "output": "A", "history": 5}, "'history' must be a list of pairs"),
        ({"messages": [{**QA[0], "flag": 1, "other": 2}, QA[1]]}, r"'flag', 'other' are .*ignore: \[flag, other\]"),
        ({"messages": [QA[0], {"role": "assistant", "tool_calls": 5}]}, "a tool call needs a function"),
        ({"messages": [QA[0], {"role": "assistant", "tool_calls": [{"function": "f"}]}]}, "a tool call needs"),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}, QA[1]]}, "a part of the content is of type"),
        ({"messages": QA, "tools": "{"}, "tools: not valid JSON"),
        ({"messages": QA, "tools": {"a": 1}}, "'tools' must be a list"),
        ({"messages": [QA[0], {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "a tool call needs a function"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused_by_row_and_key(row, message):
    with pytest.raises(UserError, match=rf"^data.jsonl, row 1: .*{message}"):
        chat(row)


def test_ignored_keys_are_read_as_absent():
    row = {"messages": [{**QA[0], "toxic": False}, {**QA[1], "toxic": True}], "prompt": "another"}
    assert chat(row, ignore=["toxic", "prompt"])[1] == ["A."]
