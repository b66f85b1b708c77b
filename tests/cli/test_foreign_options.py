"""Options of mergekit-yaml typed after `bmjax merge`: one line says of each what to do in its place."""

import pytest

from bmjax.cli.commands import COMMANDS
from bmjax.cli.foreign_options import MERGEKIT
from bmjax.cli.main import main


def refused(capsys, *options):
    assert main(["merge", "recipe.yaml", "out", *options]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


@pytest.mark.parametrize("option", MERGEKIT)
def test_each_says_what_to_do(capsys, option):
    line = refused(capsys, option)
    assert line == f"bmjax: error: bmjax merge has no such option: {option}: {MERGEKIT[option]}"
    assert "key=value" not in line


@pytest.mark.parametrize("written", ["--no-lazy-unpickle", "--lazy_unpickle", "--lazy-unpickle=1"])
def test_other_spellings(capsys, written):
    assert f"{written.partition('=')[0]}: leave it out" in refused(capsys, written)


def test_several_in_one_line(capsys):
    line = refused(capsys, "--cuda", "--foo", "--copy-tokenizer", "--out-shard-size", "5B")
    assert "--cuda: write --device gpu; --copy-tokenizer: leave it out" in line and "--shard-size SIZE" in line


def test_what_is_named_in_their_place_is_an_option():
    named = {word.strip(",()") for text in MERGEKIT.values() for word in text.split() if word.startswith("--")}
    assert named <= {flag for option in COMMANDS["merge"].all_options for flag in option.flags}
    assert not {*MERGEKIT} & {flag for option in COMMANDS["merge"].all_options for flag in option.flags}
