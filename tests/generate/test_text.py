"""An answer's text as its tokens come: whole characters, and nothing of a stop string or after it."""

import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.generate.text import TextStream, answer_text

FAMILY = "\u200d".join("👩👩👧👦")  # one picture of several characters
TEXTS = [
    "Compute 3 + 4.",
    "naïve café — «ça»",
    "日本語のテキスト",
    FAMILY + " 🇫🇷",
    "  two  spaces\n\n\ttab",
    "e\u0301 à",
]


def pieces(tokens, rng):
    """Tokens in runs of 1 to 5, as the engine tells them."""
    start = 0
    while start < len(tokens):
        stop = start + int(rng.integers(1, 6))
        yield tokens[start:stop]
        start = stop


@pytest.mark.parametrize("kind", ["tokenizer", "qwen2_tokenizer"])
def test_the_pieces_are_the_text(request, kind):
    tokenizer = request.getfixturevalue(kind)
    rng = np.random.default_rng(0)
    for text in TEXTS:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for _ in range(5):
            stream = TextStream(tokenizer)
            told = [stream.push(piece) for piece in pieces(tokens, rng)]
            assert not any("\N{REPLACEMENT CHARACTER}" in part for part in told)
            told.append(stream.finish())
            assert "".join(told) == stream.text == tokenizer.decode(tokens)


def test_characters_come_whole(tokenizer):
    stream = TextStream(tokenizer)
    tokens = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 2
    assert [stream.push(tokens[:1]), stream.push(tokens[1:])] == ["", "é"]


def test_an_answer_that_is_cut_within_a_character_says_so(tokenizer):
    tokens = tokenizer("ab日", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert stream.push(tokens[:-1]) == "ab"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}" and stream.text == tokenizer.decode(tokens[:-1])


def test_bytes_that_are_no_text_do_not_wait_for_ever(tokenizer):
    (byte,) = {tokenizer("日", add_special_tokens=False)["input_ids"][0]}
    stream = TextStream(tokenizer)
    told = [stream.push([byte]) for _ in range(40)]
    assert any(told) and "".join(told) + stream.finish() == tokenizer.decode([byte] * 40)


def test_special_tokens_have_no_text(tokenizer):
    stream = TextStream(tokenizer)
    tokens = tokenizer("a<|im_end|>b", add_special_tokens=False)["input_ids"]
    assert "".join(stream.push([token]) for token in tokens) == "ab"


def test_thinking_tags_that_are_special_tokens_stay_in_answers(tokenizer):
    text = "<|im_start|><think>two</think>4<|im_end|>"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert {"<think>", "</think>"} <= {*tokenizer.convert_ids_to_tokens(tokens)}
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "two4"
    assert answer_text(tokenizer, tokens) == "<think>two</think>4"


@pytest.mark.parametrize(("text", "stop", "want", "stopped"), [
    ("one two three", ["two"], "one ", "two"),
    ("one two three", ["nothing"], "one two three", None),
    ("one two three", ["three", "two t"], "one ", "two t"),
    ("aab", ["ab"], "a", "ab"),
    ("abcabd", ["abd"], "abc", "abd"),
    ("ends with hal", ["half"], "ends with hal", None),
    ("stop", ["stop"], "", "stop"),
    ("naïve café", ["fé"], "naïve ca", "fé"),
    ("x\n\ny", ["\n\n"], "x", "\n\n"),
    ("one two", "two", "one ", "two"),
])  # fmt: skip
def test_stop_strings_across_the_borders_of_tokens(tokenizer, text, stop, want, stopped):
    tokens = tokenizer(text + " and more" * (stopped is not None), add_special_tokens=False)["input_ids"]
    rng = np.random.default_rng(0)
    for _ in range(6):
        stream = TextStream(tokenizer, stop)
        told = []
        for piece in pieces(tokens, rng):
            told.append(stream.push(piece))
            assert want.startswith("".join(told)), "told something that the stop string takes back"
        told.append(stream.finish())
        assert "".join(told) == stream.text == want and stream.stopped == stopped


@pytest.mark.parametrize("stop", [[""], ["a", ""], [3]])
def test_stop_strings_must_hold_something(tokenizer, stop):
    with pytest.raises(UserError, match="stop: expected strings that are not empty"):
        TextStream(tokenizer, stop)
