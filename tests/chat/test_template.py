"""Chat templates by name, and the token that ends a turn."""

import copy
import json
import re

import pytest
from transformers import AddedToken

from bmjax.branch.examples import Encoding, build_dataset
from bmjax.chat.marks import end_of_turn
from bmjax.chat.template import TEMPLATE_NAMES, chat_template, check_repeatable, named_template, render
from bmjax.config import UserError


def test_a_template_by_name_file_or_tokenizer(tokenizer, tmp_path):
    assert chat_template(tokenizer, None) == tokenizer.chat_template == chat_template(tokenizer, "chatml")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert chat_template(tokenizer, str(file)) == "{{ messages }}"
    with pytest.raises(UserError, match="template: 'chatmal' is not one of alpaca, chatml, deepseek-r1"):
        chat_template(tokenizer, "chatmal")
    with pytest.raises(UserError, match=r"other.jinja: no such file"):
        chat_template(tokenizer, str(tmp_path / "other.jinja"))

    class Bare:
        chat_template = None

    with pytest.raises(UserError, match="no chat template; set template"):
        chat_template(Bare(), None)
    Bare.chat_template = {"default": "D", "tool_use": "T"}
    assert chat_template(Bare(), None) == "D"


def test_a_turn_ends_with_the_templates_token(tokenizer):
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    chatml = chat_template(other, "chatml")
    assert end_of_turn(other, chatml) == other.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(other, "{% for m in messages %}{{ m['content'] }}{% endfor %}") is None
    assert end_of_turn(other, "{{ raise_exception('no') }}") is None


# What Qwen/Qwen2.5-7B-Instruct's template writes, as Qwen's documentation of function calling prints it.
QWEN_TOOLS = """<|im_start|>system
You are terse.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "get_current_temperature", "parameters": {"type": "object"}}}
{"type": "function", "function": {"name": "größe"}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
How warm is it?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "get_current_temperature", "arguments": {"location": "Zürich", "unit": null}}
</tool_call>
<tool_call>
{"name": "größe", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
26.1
</tool_response>
<tool_response>
3
</tool_response><|im_end|>
<|im_start|>assistant
Again.
<tool_call>
{"name": "größe", "arguments": {"n": [1, 2]}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
4
</tool_response><|im_end|>
<|im_start|>assistant
"""


def call(name: str, arguments: dict) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_qwen_shows_tools_calls_and_results_as_qwen25_does(tokenizer):
    functions = [{"name": "get_current_temperature", "parameters": {"type": "object"}}, {"name": "größe"}]
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": "", "tool_calls": [
            call("get_current_temperature", {"location": "Zürich", "unit": None}), call("größe", {})
        ]},
        {"role": "tool", "content": "26.1"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Again.", "tool_calls": [call("größe", {"n": [1, 2]})]},
        {"role": "tool", "content": "4"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": function} for function in functions]
    template = chat_template(tokenizer, "qwen")
    assert render(tokenizer, messages, template, "here", prompt=True, tools=tools) == QWEN_TOOLS
    without_system = render(tokenizer, messages[1:], template, "here", prompt=True, tools=tools)
    assert without_system == QWEN_TOOLS.replace("You are terse.", "You are a helpful assistant.")
    plain = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert render(tokenizer, plain, template, "here", prompt=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert json.loads(without_system.split("<tools>\n")[1].splitlines()[1])["function"]["name"] == "größe"


def test_a_template_that_writes_the_date_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"writes today's date \(strftime_now\).*FILE.jinja"):
        check_repeatable("{{ strftime_now('%d %b %Y') }}{{ messages }}")
    check_repeatable("{% if strftime_now is defined %}{% endif %}")


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_other_trainers_can_mask_by_our_generation_marks(tokenizer, name):
    turns = ["Add 3 and 4.", "It is 7.", "And 5?", "Then 12."]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, turns, strict=True)]
    template = named_template(name)
    tokenizer = copy.deepcopy(tokenizer)
    marks = re.findall(r"<[|｜][^|｜']+[|｜]>|\[\|[a-z]+\|\]", template)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    row = ("row 1", {"messages": messages})
    (ours,) = build_dataset([row], Encoding(tokenizer, template, 512)).examples

    def learned(tokens, mask):
        return tokenizer.decode([token for token, target in zip(tokens, mask, strict=True) if target])

    # What stands after the last end of a turn is no part of a document.
    assert tokenizer.decode(theirs["input_ids"]).rstrip("\n") == tokenizer.decode(ours.tokens).rstrip("\n")
    text = learned(theirs["input_ids"], theirs["assistant_masks"])
    assert text == learned(ours.tokens, ours.loss_mask) and "It is 7." in text and "Then 12." in text
    assert "Add" not in text and len(text) > len("It is 7.Then 12.")  # with the ends of both turns
