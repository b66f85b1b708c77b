"""Errors are one line of bounded length, and hints take no time."""

import time
from pathlib import Path

import pytest
import yaml

from bmjax import errors
from bmjax.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize(("start", "maker"), [*errors._MAKERS.items()])
def test_what_examples_name_is_made_by_the_command_that_the_hint_names(start: str, maker: str) -> None:
    assert errors.maker_hint(f"{start}/hf") == errors.maker_hint(f"/home/me/{start}") == f"; {maker} makes it"
    assert errors.maker_hint(f"{start}s") == errors.maker_hint(f"my{start}") == ""
    program, *words = maker.split()
    if program != "bmjax":
        assert (ROOT / program).exists()
        return
    config = yaml.safe_load((ROOT / words[1]).read_text(encoding="utf-8"))
    output = words[words.index("--output") + 1] if "--output" in words else config["output"]
    assert output == start
