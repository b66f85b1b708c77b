"""The loss mask is 1 on what the assistant wrote and its end token, for every template and every form of row."""

import re
from dataclasses import replace

import numpy as np
import pytest

from bmjax.branch import cache
from bmjax.branch.examples import Dataset, Encoding, build_dataset, tokenize
from bmjax.chat.template import chat_template, render_prompt
from bmjax.config import UserError
from bmjax.io.rows import read_rows
from bmjax.log import silent
from tests.conftest import sums, write_rows

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
    return build_dataset(numbered, Encoding(tokenizer, text, seq_len, overlong))


def segments(tokenizer, example) -> list[tuple[str, int]]:
    """The document as runs of equal mask: [(text, mask), ...]."""
    changes = np.flatnonzero(np.diff(example.loss_mask)) + 1
    runs = np.split(np.arange(len(example.tokens)), changes)
    return [(tokenizer.decode(example.tokens[run].tolist()), int(example.loss_mask[run[0]])) for run in runs]


def test_chatml_masks_answers_and_their_end_tokens(tokenizer):
    (example,) = build(tokenizer, {"messages": TALK}).examples
    assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == np.uint8
    assert segments(tokenizer, example) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("<think>\nTwo of them.\n</think>\nIt is 2.<|im_end|>", 1),
        ("\n<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("It is 4.<|im_end|>", 1),
    ]


def test_deepseek_r1_masks_answers_and_their_end_tokens(deepseek_tokenizer):
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
        text = render_prompt(tokenizer, TALK[:turn], template, "talk")
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
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


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "only a question"}]},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}], "note": "no answer text"},
    {"conversations": [{"from": "gpt", "value": "an answer to nothing"}]},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]},
])  # fmt: skip
def test_a_row_without_a_target_is_left_out_and_counted(tokenizer, row):
    keeps_no_end = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    dataset = build(tokenizer, {"prompt": "Q", "response": "A"}, row, template=keeps_no_end)
    assert len(dataset.examples) == 1
    assert any(re.match(r"1 rows: no answer to learn .*left out \(first: rows, row 2\)", r) for r in dataset.remarks)
    with pytest.raises(UserError, match=r"^rows, row 1: no target token"):
        build(tokenizer, row, template=keeps_no_end)


def test_without_any_assistant_turn_the_first_row_is_named(tokenizer):
    with pytest.raises(UserError, match=r"^rows, row 1: no target token: the assistant's turn is missing"):
        build(tokenizer, {"messages": [{"role": "user", "content": "Q"}]})


def test_a_template_that_strips_the_reasoning_is_refused(deepseek_tokenizer):
    row = {"prompt": "Q", "reasoning": "because", "response": "A"}
    with pytest.raises(UserError, match=r"^rows, row 1: the chat template drops or rewrites.*chatml or deepseek-r1"):
        build(deepseek_tokenizer, row, template=DEEPSEEK)
    assert len(build(deepseek_tokenizer, {"prompt": "Q", "response": "A"}, template=DEEPSEEK).examples) == 1


def test_text_stripped_from_the_answer_only_is_noticed(deepseek_tokenizer):
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


def plain_tokenizer():
    """Bytes and three special tokens, nothing learned: its ids are the same with every library version."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.mark.parametrize("batch_characters", [1, 1000, 2**20])
@pytest.mark.parametrize("seq_len, overlong, digest, cut, left_out", [
    (4096, "error", "69ddfab636fcb6b18737dfe583ef3b6832bc52e1e4ace11fbef73fe782f8f259", 0, 0),
    (150, "truncate", "c44f9d8f09c348f40294f7bb8db792e6ef7363fbc5e3d8e720ceeb07d7a4fc05", 2, 0),
    (150, "drop", "998af3290e4c220248dbc2eb19d5e5c131a63e43e46ab7de283f3212c996bd43", 0, 2),
])  # fmt: skip
def test_digests_of_existing_checkpoints_hold(monkeypatch, batch_characters, seq_len, overlong, digest, cut, left_out):
    monkeypatch.setattr("bmjax.branch.examples._BATCH_CHARACTERS", batch_characters)
    dataset = build(plain_tokenizer(), *sums(30, 7), seq_len=seq_len, overlong=overlong)
    assert (dataset.digest, dataset.truncated, dataset.dropped) == (digest, cut, left_out)


def test_rows_are_read_a_batch_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr("bmjax.branch.examples._BATCH_CHARACTERS", 2000)
    alive = [0, 0]

    class Row(dict):
        def __init__(self, values):
            super().__init__(values)
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self):
            alive[0] -= 1

    rows = ((f"rows, row {n}", Row(row)) for n, row in enumerate(sums(300), 1))
    dataset = build_dataset(rows, Encoding(tokenizer, chat_template(tokenizer, None), 256, "error"))
    assert len(dataset.examples) == 300 and alive[1] < 30
    with pytest.raises(UserError, match="no rows to tokenize"):
        build_dataset([], Encoding(tokenizer, chat_template(tokenizer, None), 256, "error"))


def test_the_digest_changes_with_the_rows(tokenizer):
    first = build(tokenizer, {"prompt": "Q", "response": "A"})
    assert first.digest == build(tokenizer, {"prompt": "Q", "response": "A"}).digest
    assert first.digest != build(tokenizer, {"prompt": "Q", "response": "B"}).digest
    assert first.tokens == len(first.examples[0].tokens)


@pytest.mark.parametrize("text, problem", [
    ("", "no rows; expected at least one"),
    ("\n \n", "no rows; expected at least one"),
    ('{"prompt": "Q", "response": "A"}\n{"prompt": \n', r"rows.jsonl, line 2: not valid JSON"),
    ("[" * 100_000, r"rows.jsonl, row 1: not valid JSON"),
    ('["Q", "A"]\n', r"rows.jsonl, row 1: expected a JSON object, found str"),
    ('{"question": "Q", "answer": "A"}\n', r"row 1: expected messages.*found answer, question"),
    ('{"prompt": "Q", "response": null}\n', r"row 1: expected messages, .*found prompt, response"),
    ('{"messages": "hello"}\n', r"row 1: 'messages' must be a list of turns"),
    ('{"messages": ["hello"]}\n', r"row 1: 'messages' must be a list of turns"),
    ('{"conversations": null}\n', r"row 1: expected messages, .*found conversations"),
    ('{"messages": [{"role": ["user"], "content": "Q"}]}\n', r"row 1: messages, turn 1: the role is \['user'\]"),
    ('{"messages": [{"role": "tool", "content": "Q"}]}\n', r"row 1: no target token"),
])  # fmt: skip
def test_bad_files_are_one_line_that_names_the_row(tmp_path, tokenizer, text, problem):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        build_dataset(read_rows(str(file)), Encoding(tokenizer, chat_template(tokenizer, None), 64, "error"))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_the_templates_end_token_is_a_target(tokenizer):
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    (example,) = build(other, {"messages": TALK[:3]}).examples
    assert segments(other, example)[-1] == ("<think>\nTwo of them.\n</think>\nIt is 2.<|im_end|>", 1)


def test_tokenize_shows_what_training_sees(student, tokenizer, train_file, tmp_path):
    rows = sums(20)
    expected = build(tokenizer, *rows, template=None).examples
    for data in (rows, str(train_file), [train_file]):
        examples = tokenize(str(student), data)
        for example, other in zip(examples, expected, strict=True):
            np.testing.assert_array_equal(example.tokens, other.tokens)
            np.testing.assert_array_equal(example.loss_mask, other.loss_mask)
    assert [len(example.tokens) for example in tokenize(student, rows[1:2], seq_len=42)] == [42]
    assert tokenize(student, rows[:1], template="deepseek-r1")[0].tokens.size != expected[0].tokens.size
    for bad, problem in (
        (["a", {}], "row 1: expected a dict"),
        ([], "rows: an empty list"),
        ([{}], "rows, row 1: exp"),
    ):
        with pytest.raises(UserError, match=problem):
            tokenize(student, bad)


def test_qwen_learns_calls_of_tools_and_their_ends(tokenizer):
    call = {"function": {"name": "add", "arguments": {"a": None}}}
    row = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}],
    }  # fmt: skip
    (example,) = build(tokenizer, row, template="qwen").examples
    texts = segments(tokenizer, example)
    assert [target for _, target in texts] == [0, 1, 0, 1]
    assert texts[1][0] == '<tool_call>\n{"name": "add", "arguments": {"a": null}}\n</tool_call><|im_end|>'
    assert texts[2][0].endswith("<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    for template in ("chatml", "deepseek-r1", "llama3"):
        with pytest.raises(UserError, match="does not show 'tools' to the model"):
            build(tokenizer, row, template=template)


def test_columns_that_a_mapping_would_lose_are_refused(tmp_path, tokenizer):
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Q", "a": "A", "f": [{"name": "add"}], "images": ["x"]}])
    columns = {"tools": "{f}", "prompt": "{q}", "response": "{a}"}
    encoding = Encoding(tokenizer, chat_template(tokenizer, "qwen"), 4096)
    with pytest.raises(UserError, match="row 1: 'images' would be lost"):
        cache.load(str(file), columns, encoding, silent)
    (example,) = cache.load(str(file), columns, replace(encoding, ignore=["images"]), silent).examples
    assert '<tools>\n{"name": "add"}\n</tools>' in tokenizer.decode(example.tokens)
    with pytest.raises(UserError, match="writes today's date"):
        cache.load(str(file), columns, replace(encoding, template="{{ strftime_now('%d') }}"), silent)
