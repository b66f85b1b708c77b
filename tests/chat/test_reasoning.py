"""Reasoning split from a reply, joined for training, skipped by judges."""

import pytest

from bmjax.chat.reasoning import (
    ThinkSplitter,
    answer_of,
    has_tags,
    join_think,
    split_answer,
    split_marked,
    split_think,
)


@pytest.mark.parametrize(
    ("content", "thought", "expected"),
    [
        ("<think>\na\n</think>\n\nb", None, ("a", "b")),
        ("a\n</think>\nb", None, ("a", "b")),
        ("b", "a\n", ("a", "b")),
        ("b", None, ("", "b")),
        ("<think>\ncut of", None, ("cut of", "")),
        ("<think>\na\n</think>\n", None, ("a", "")),
        ("<think>a</think><think>b</think>c", None, ("", "<think>a</think><think>b</think>c")),
        ("b <think>a</think> c", None, ("", "b <think>a</think> c")),
        ("", None, ("", "")),
    ],
)
def test_reasoning_of_every_form_is_split_off(content: str, thought: str | None, expected: tuple[str, str]) -> None:
    assert split_think(content, thought) == expected


def test_what_is_joined_is_split_again() -> None:
    assert split_think(join_think("a\nb", "c")) == ("a\nb", "c")
    assert join_think("", "c") == "c"


def test_the_answer_follows_the_last_closing_tag() -> None:
    assert answer_of("a</think>b</think> c ") == "c"
    assert answer_of("no tag") == "no tag"


def test_tags_are_found_in_any_text() -> None:
    assert has_tags("a", "b </think>") and has_tags("<think>") and not has_tags("think", "")


SOLUTION = "<|begin_of_solution|>\n\nb\n\n<|end_of_solution|>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>a</think>b", ("a", "b", True)),
        (f"<|begin_of_thought|>\n\na\n\n<|end_of_thought|>\n\n{SOLUTION}", ("a", "b", True)),
        (f"a\n<|end_of_thought|>\n{SOLUTION}", ("a", "b", True)),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b", ("a", "b", False)),
        ("<|begin_of_thought|>a", ("a", "", False)),
        ("<thinking>a</thinking>\nb", ("a", "b", True)),
        ("<reasoning>a</reasoning><answer>b</answer>", ("a", "b", True)),
        ("<think>a</think>\n<answer>b", ("a", "b", False)),
        ("<think>a</think><answer>b</answer> as I said", ("a", "<answer>b</answer> as I said", True)),
        ("<think>a</think>Use <thinking> and </thinking> in it.", ("a", "Use <thinking> and </thinking> in it.", True)),
        ("<thought>a</thought>b", ("a", "b", True)),
        ("[THINK]a[/THINK]b", ("a", "b", True)),
        ("Write <thinking> before it.", ("", "Write <thinking> before it.", True)),
        ("<answer>b</answer>", ("", "<answer>b</answer>", True)),
        ("<think>and on", ("and on", "", False)),
        ("", ("", "", True)),
    ],
)
def test_marks_of_others_count_as_tags(content: str, expected: tuple[str, str, bool]) -> None:
    assert split_marked(content) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\na b\n</think>\n\nc d\n", False, ("a b", "c d")),
        ("a</think>\nb\n\n c \n", True, ("a", "b\n\n c")),
        (" \n<think>a</think>b", False, ("a", "b")),
        ("a\n\nb\n</think>\nc", True, ("a\n\nb", "c")),
        ("<think>\n a</think>c", True, ("a", "c")),
        ("a < b </thin> </think> c", True, ("a < b </thin>", "c")),
        ("a </thi", True, ("a </thi", "")),
        ("a \n", True, ("a", "")),
        ("</think>c", True, ("", "c")),
        ("<think></think>", False, ("", "")),
        (" <thi", False, ("", " <thi")),
        ("  plain\n", False, ("", "  plain\n")),
        ("a <think>b</think> c", False, ("", "a <think>b</think> c")),
        ("", False, ("", "")),
    ],
)
def test_a_stream_is_split_as_the_whole_is_wherever_it_is_cut(text: str, is_open: bool, expected, size: int) -> None:
    assert streamed(text, is_open, size) == split_answer(text, is_open) == expected


def streamed(text: str, is_open: bool, size: int) -> tuple[str, ...]:
    """The joined parts of a text that comes so many characters at a time."""
    splitter, parts = ThinkSplitter(is_open), [text[i : i + size] for i in range(0, len(text), size)]
    pairs = [splitter.feed(part) for part in parts] + [splitter.feed("", is_last=True)]
    return tuple(map("".join, zip(*pairs, strict=True)))


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "is_open", "told", "whole"),
    [
        ("two</think>4", False, ("", "two</think>4"), ("two", "4")),
        (" two\n</think>\n4\n", False, ("", " two\n</think>\n4\n"), ("two", "4")),
        ("a</think>b</think>c", True, ("a", "b</think>c"), ("", "<think>a</think>b</think>c")),
        ("<think>a</think><think>b</think>c", False, ("a", "<think>b</think>c"), None),
    ],
)
def test_a_stream_takes_nothing_back_that_it_told(text: str, is_open: bool, told, whole, size: int) -> None:
    assert streamed(text, is_open, size) == told
    assert split_answer(text, is_open) == (whole or ("", text))


def test_a_whole_answer_without_a_thought_stays_as_it_is() -> None:
    assert split_answer(" plain\n") == ("", " plain\n") and split_answer("<think></think> 4\n") == ("", "4")
