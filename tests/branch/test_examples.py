"""The loss mask is 1 on what the assistant wrote and its end token, for every template and every form of row."""

import json

import numpy as np
import pytest

from bmjax.branch.examples import Dataset, build_dataset
from bmjax.chat.template import chat_template, end_of_turn, messages_of, render_prompt
from bmjax.config import UserError
from bmjax.io.rows import read_rows
from tests.conftest import write_rows

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + c + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\nTwo of them.\n</think>\nIt is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]


@pytest.fixture(scope="module")
def deepseek_tokenizer(tokenizer):
    """A tokenizer with DeepSeek's special tokens."""
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<｜end▁of▁sentence｜>",
        bos_token="<｜begin▁of▁sentence｜>",
    )
    other.add_special_tokens({"additional_special_tokens": ["<｜User｜>", "<｜Assistant｜>"]})
    return other


def build(tokenizer, *rows, template: str | None = "chatml", seq_len: int = 4096, overlong: str = "error") -> Dataset:
    numbered = [(f"rows, row {i}", row) for i, row in enumerate(rows, 1)]
    text = template if template and "{" in template else chat_template(tokenizer, template)
    return build_dataset(numbered, tokenizer, text, seq_len, overlong)


def segments(tokenizer, example) -> list[tuple[str, int]]:
    """The document as runs of equal mask: [(text, mask), ...]."""
    changes = np.flatnonzero(np.diff(example.loss_mask)) + 1
    runs = np.split(np.arange(len(example.tokens)), changes)
    return [(tokenizer.decode(example.tokens[run].tolist()), int(example.loss_mask[run[0]])) for run in runs]


def test_chatml_masks_every_answer_with_its_end_token(tokenizer):
    (example,) = build(tokenizer, {"messages": TALK}).examples
    assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == np.uint8
    assert segments(tokenizer, example) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("<think>\nTwo of them.\n</think>\nIt is 2.<|im_end|>", 1),
        ("\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("It is 4.<|im_end|>", 1),
    ]


def test_deepseek_r1_masks_every_answer_with_its_end_token(deepseek_tokenizer):
    (example,) = build(deepseek_tokenizer, {"messages": TALK}, template="deepseek-r1").examples
    assert segments(deepseek_tokenizer, example) == [
        ("<｜begin▁of▁sentence｜>Be brief.<｜User｜>1 + 1?<｜Assistant｜>", 0),
        ("<think>\nTwo of them.\n</think>\nIt is 2.<｜end▁of▁sentence｜>", 1),
        ("<｜User｜>And 2 + 2?<｜Assistant｜>", 0),
        ("It is 4.<｜end▁of▁sentence｜>", 1),
    ]


def test_the_real_qwen2_tokenizers_own_template(qwen2_tokenizer):
    (example,) = build(qwen2_tokenizer, {"messages": TALK[1:]}, template=None).examples
    assert segments(qwen2_tokenizer, example) == [
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n", 0,
        ),
        ("<think>\nTwo of them.\n</think>\nIt is 2.<|im_end|>", 1),
        ("\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("It is 4.<|im_end|>", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["tokenizer", "qwen2_tokenizer"])
def test_training_sees_the_tokens_that_generation_is_given(request, which):
    tokenizer = request.getfixturevalue(which)
    template = chat_template(tokenizer, None)
    (example,) = build(tokenizer, {"messages": TALK}, template=None).examples
    for turn in (2, 4):
        prompt = tokenizer(render_prompt(tokenizer, TALK[:turn], template), add_special_tokens=False)["input_ids"]
        assert example.tokens[: len(prompt)].tolist() == prompt
        assert example.loss_mask[len(prompt) - 1] == 0 and example.loss_mask[len(prompt)] == 1


def test_a_record_and_sharegpt_and_messages_say_the_same(tokenizer):
    record = {"prompt": "Q?", "reasoning": "Hm.", "response": "A.", "system": "S", "verdict": "right"}
    answer = "<think>\nHm.\n</think>\nA."
    turns = [("system", "S"), ("user", "Q?"), ("assistant", answer)]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
    built = build(tokenizer, record, messages, sharegpt)
    for example in built.examples:
        assert segments(tokenizer, example)[-1] == (answer + "<|im_end|>", 1)
        np.testing.assert_array_equal(example.tokens, built.examples[0].tokens)
    plain = messages_of({"prompt": "Q?", "response": "A.", "reasoning": ""}, "here")
    assert plain == [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "only a question"}]},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}], "note": "no answer text"},
])  # fmt: skip
def test_a_row_without_a_target_is_an_error_that_names_it(tokenizer, row):
    keeps_no_end = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UserError, match=r"^rows, row 2: no target token"):
        build(tokenizer, {"prompt": "Q", "response": "A"}, row, template=keeps_no_end)


def test_without_any_assistant_turn_the_first_row_is_named(tokenizer):
    with pytest.raises(UserError, match=r"^rows, row 1: no assistant turn"):
        build(tokenizer, {"messages": [{"role": "user", "content": "Q"}]})


def test_a_template_that_strips_the_reasoning_is_refused(deepseek_tokenizer):
    row = {"prompt": "Q", "reasoning": "because", "response": "A"}
    with pytest.raises(UserError, match=r"^rows, row 1: the chat template drops or rewrites.*chatml or deepseek-r1"):
        build(deepseek_tokenizer, row, template=DEEPSEEK)
    assert len(build(deepseek_tokenizer, {"prompt": "Q", "response": "A"}, template=DEEPSEEK).examples) == 1


def test_stripped_text_that_stands_in_the_question_is_noticed(deepseek_tokenizer):
    answer = "<think>because</think>A"
    row = {"messages": [{"role": "user", "content": f"Repeat: {answer}"}, {"role": "assistant", "content": answer}]}
    with pytest.raises(UserError, match="drops or rewrites"):
        build(deepseek_tokenizer, row, template=DEEPSEEK)


def test_a_template_that_strips_earlier_reasoning_is_refused(deepseek_tokenizer):
    last_only = DEEPSEEK.replace("if '</think>' in c", "if not loop.last and '</think>' in c")
    with pytest.raises(UserError, match="drops or rewrites"):
        build(deepseek_tokenizer, {"messages": TALK[1:]}, template=last_only)


@pytest.mark.parametrize("template, problem", [
    ("{% for m in messages %}", "template"),
    ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
    ("{{ messages[0]['content'] + nothing.at.all }}", "template"),
])  # fmt: skip
def test_a_broken_template_is_one_line(tokenizer, template, problem):
    with pytest.raises(UserError, match=problem) as error:
        build(tokenizer, {"prompt": "Q", "response": "A"}, template=template)
    assert "\n" not in str(error.value)


def test_overlong_rows_are_cut_left_out_or_refused(tokenizer):
    short, long = {"prompt": "Q", "response": "A"}, {"prompt": "Q", "response": "A b c " * 40}
    lengths = [len(e.tokens) for e in build(tokenizer, short, long).examples]
    limit = lengths[0] + 5
    cut = build(tokenizer, short, long, seq_len=limit, overlong="truncate")
    assert [len(e.tokens) for e in cut.examples] == [lengths[0], limit] and (cut.truncated, cut.dropped) == (1, 0)
    np.testing.assert_array_equal(cut.examples[1].tokens, build(tokenizer, long).examples[0].tokens[:limit])
    left = build(tokenizer, short, long, seq_len=limit, overlong="drop")
    assert len(left.examples) == 1 and (left.truncated, left.dropped) == (0, 1)
    with pytest.raises(UserError, match=rf"^rows, row 2: {lengths[1]} tokens, seq_len is {limit}"):
        build(tokenizer, short, long, seq_len=limit, overlong="error")
    with pytest.raises(UserError, match="all 1 rows are over seq_len"):
        build(tokenizer, long, seq_len=limit, overlong="drop")


def test_a_prompt_longer_than_seq_len_is_named(tokenizer):
    row = {"prompt": "many words " * 20, "response": "A"}
    with pytest.raises(UserError, match=r"^rows, row 1: the prompt alone has \d+ tokens, seq_len is 16.*raise seq_len"):
        build(tokenizer, row, seq_len=16, overlong="truncate")


def test_the_digest_changes_with_rows_and_template(tokenizer):
    first = build(tokenizer, {"prompt": "Q", "response": "A"})
    assert first.digest == build(tokenizer, {"prompt": "Q", "response": "A"}).digest
    assert first.digest != build(tokenizer, {"prompt": "Q", "response": "B"}).digest
    assert first.tokens == len(first.examples[0].tokens)


def test_reading_json_lines_json_and_parquet(tmp_path):
    import datasets

    rows = [{"prompt": "Q\u2028?", "response": "A"}, {"prompt": "R", "response": "B"}]
    lines = write_rows(tmp_path / "rows.jsonl", rows)
    lines.write_text(lines.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    parquet = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(parquet))
    for file in (lines, array, parquet):
        assert [row for _, row in read_rows(str(file))] == rows
    both = read_rows([str(lines), str(array)])
    assert [where for where, _ in both][1:3] == [f"{lines}, row 2", f"{array}, row 1"]


@pytest.mark.parametrize("text, problem", [
    ("", "no rows; expected at least one"),
    ("\n \n", "no rows; expected at least one"),
    ('{"prompt": "Q", "response": "A"}\n{"prompt": \n', r"rows.jsonl, line 2: not valid JSON"),
    ("[" * 100_000, r"rows.jsonl, line 1: not valid JSON"),
    ('["Q", "A"]\n', r"rows.jsonl, row 1: expected a JSON object, found list"),
    ('{"question": "Q", "answer": "A"}\n', r"row 1: expected 'prompt' and 'response'.*found answer, question"),
    ('{"prompt": "Q", "response": null}\n', r"row 1: a turn has role 'assistant' and NoneType content"),
    ('{"messages": "hello"}\n', r"row 1: 'messages' must be a list of turns"),
    ('{"messages": ["hello"]}\n', r"row 1: 'messages' must be a list of turns"),
    ('{"conversations": null}\n', r"row 1: 'conversations' must be a list of turns"),
    ('{"messages": [{"role": ["user"], "content": "Q"}]}\n', r"row 1: a turn has role \['user'\]"),
    ('{"messages": [{"role": "tool", "content": "Q"}]}\n', r"row 1: a turn has role 'tool'"),
])  # fmt: skip
def test_bad_files_are_one_line_that_names_the_row(tmp_path, tokenizer, text, problem):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        build_dataset(list(read_rows(str(file))), tokenizer, chat_template(tokenizer, None), 64, "error")
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{}])
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean .*train.jsonl"):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    with pytest.raises(UserError, match=r"trian.parquet: no such file"):
        list(read_rows(str(tmp_path / "trian.parquet")))
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"broken.parquet") as error:
        list(read_rows(str(tmp_path / "broken.parquet")))
    assert "\n" not in str(error.value)


def test_where_the_template_comes_from(tokenizer, tmp_path):
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


def test_the_token_that_ends_a_turn_is_the_templates(tokenizer):
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    chatml = chat_template(other, "chatml")
    assert end_of_turn(other, chatml) == other.convert_tokens_to_ids("<|im_end|>")
    (example,) = build(other, {"messages": TALK[:3]}).examples
    assert segments(other, example)[-1] == ("<think>\nTwo of them.\n</think>\nIt is 2.<|im_end|>", 1)
    assert end_of_turn(other, "{% for m in messages %}{{ m['content'] }}{% endfor %}") is None
    assert end_of_turn(other, "{{ raise_exception('no') }}") is None


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k::test", ("openai/gsm8k", None, "test")),
    ],
)
def test_a_hub_dataset_is_read_by_subset_and_split(monkeypatch, name, asked):
    import datasets

    def load_dataset(repository, subset, split):
        assert (repository, subset, split) == asked
        return [{"prompt": "a", "response": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows(name)) == [(f"{name}, row 1", {"prompt": "a", "response": "b"})]
