"""Errors are one line of bounded length, and hints take no time."""

import time

from bmjax.errors import UserError, nearest


def test_error_is_one_line_of_bounded_length():
    assert str(UserError("tensor 'a\n\x1b[2Jb\udc80é'")) == "tensor 'a  [2Jb é'"
    assert str(UserError("x" * 5000)) == "x" * 1000 + "..."


def test_hint_about_an_endless_word_is_quick():
    word = "".join(chr(0x4E00 + i % 500) for i in range(50_000))
    start = time.monotonic()
    assert nearest(word, [word + "a"]).startswith("; known here: ")
    assert nearest("stepz", [word, "steps"]) == "; did you mean 'steps'?"
    assert time.monotonic() - start < 1


def test_nearest_word_is_named():
    assert nearest("stpes", ["steps", "epochs"]) == "; did you mean 'steps'?"
    assert nearest("zzz", ["b", "a"]) == "; known here: a, b" and nearest("zzz", []) == ""
