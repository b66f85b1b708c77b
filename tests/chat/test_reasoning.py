"""Reasoning split from a reply, joined for training, skipped by judges."""

import pytest

from bmjax.chat.reasoning import answer_of, has_tags, join_think, split_think


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
