"""Tokenizers with more tokens than the embedding has rows, and models without config or tokenizer."""

import itertools
import json
import shutil

import pytest

from bmjax.calibrate.dispatch import check, merge
from bmjax.config import UserError
from bmjax.merge.plan.tokenizer_text import largest_id, tokenizer_difference
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import soup, tensors

WORDS = {"a": 0, "b": 1, "c": 2}
DECODER = {"added_tokens_decoder": {"8": {"content": "<y>"}, "x": {"content": "<z>"}, "9": "<v>"}}
FORMS = {
    "words": ({"tokenizer.json": {"model": {"vocab": WORDS}, "added_tokens": []}}, 2),
    "added tokens": ({"tokenizer.json": {"model": {"vocab": WORDS}, "added_tokens": [{"id": 9, "content": "<x>"}]}}, 9),
    "scores": ({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}}, 1),
    "slow": ({"vocab.json": WORDS, "added_tokens.json": {"<x>": 7}}, 7),
    "a config's added tokens": ({"vocab.json": WORDS, "tokenizer_config.json": DECODER}, 8),
    "beside the fast one": ({"tokenizer.json": {"model": {"vocab": WORDS}}, "tokenizer_config.json": DECODER}, 8),
    "none": ({}, None),
    "broken": ({"tokenizer.json": ["a"], "vocab.json": {"a": "b"}}, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_largest_id(tmp_path, form):
    files, expected = FORMS[form]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert largest_id(tmp_path) == expected


def write_pieces(path, tokens):
    """Write a SentencePiece model as its own package would, by transformers' copy of the format."""
    pytest.importorskip("google.protobuf")
    from transformers.utils import sentencepiece_model_pb2_new as protobuf

    model = protobuf.ModelProto()
    for i, token in enumerate(tokens):
        model.pieces.add(piece=token, score=-i * 0.5, type=protobuf.ModelProto.SentencePiece.NORMAL)
    model.trainer_spec.model_prefix = "x" * 300
    path.write_bytes(model.SerializeToString())


def tokenizer(folder, kind, tokens):
    folder.mkdir(exist_ok=True)
    ids = {token: i for i, token in enumerate(tokens)}
    if kind == "tokenizer.json":
        (folder / kind).write_text(json.dumps({"model": {"vocab": ids}}))
    elif kind == "vocab.json":
        (folder / kind).write_text(json.dumps(ids))
    elif kind == "vocab.txt":
        (folder / kind).write_text("\n".join(tokens))
    else:
        write_pieces(folder / kind, tokens)
    return folder


def added(folder, form, tokens):
    """Add tokens, by id, in one of the files that list them."""
    if form == "added_tokens.json":
        (folder / form).write_text(json.dumps({text: i for i, text in tokens.items()}))
    else:
        listed = {str(i): {"content": text} for i, text in tokens.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))


KINDS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_count_beside_one_vocabulary(tmp_path, kind, form):
    first, second = (tokenizer(tmp_path / name, kind, ["a", "é", "c"]) for name in "ab")
    assert tokenizer_difference(first, second) is None
    added(first, form, {3: "<x>", 4: "<y>"})
    assert tokenizer_difference(first, second) == "2 ids differ (3: no token for '<x>'; 4: no token for '<y>')"
    assert tokenizer_difference(second, first) == "2 ids differ (3: '<x>' for no token; 4: '<y>' for no token)"
    for other in ("added_tokens.json", "tokenizer_config.json"):  # in either file, they are the same tokens
        shutil.copytree(second, tmp_path / f"c-{other}")
        added(tmp_path / f"c-{other}", other, {3: "<x>", 4: "<z>"})
        assert tokenizer_difference(first, tmp_path / f"c-{other}") == "1 id differs (4: '<z>' for '<y>')"
    # What is listed once more is no other token.
    added(second, "tokenizer_config.json", {0: "a", 3: "<x>", 4: "<y>"})
    assert tokenizer_difference(first, second) is None
    assert largest_id(first) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_other_vocabularies_of_one_kind(tmp_path, kind):
    first, second = tokenizer(tmp_path / "a", kind, ["a", "b"]), tokenizer(tmp_path / "b", kind, ["a", "ü", "d"])
    assert tokenizer_difference(first, second) == "2 ids differ (1: 'ü' for 'b'; 2: 'd' for no token)"
    assert largest_id(second) == 2


def test_a_token_may_hold_what_ends_lines_elsewhere(tmp_path):
    tokens = ["a", "b\u2028c", "\x0b", "\x85", "d"]
    first, second = tokenizer(tmp_path / "a", "vocab.txt", tokens), tokenizer(tmp_path / "b", "vocab.txt", tokens)
    (second / "vocab.txt").write_bytes("\r\n".join([*tokens, ""]).encode())  # as Windows writes it
    assert largest_id(first) == largest_id(second) == 4
    assert tokenizer_difference(first, second) is None


@pytest.mark.parametrize(("kind", "other"), itertools.permutations(KINDS, 2))
def test_vocabularies_in_files_of_other_kinds(tmp_path, kind, other):
    first, second = tokenizer(tmp_path / "a", kind, ["a", "b"]), tokenizer(tmp_path / "b", other, ["a", "b"])
    assert tokenizer_difference(first, second) is None
    tokenizer(second, other, ["b", "a"])
    expected = f"its tokens are in {other}, not in {kind}, and the two cannot be compared"
    assert tokenizer_difference(first, second) == expected


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"\x0f", b"\xff" * 20, b"one", b"\x0a\x00"]
)
def test_what_is_no_sentencepiece_model_is_compared_by_its_bytes(tmp_path, content):
    first, second = tokenizer(tmp_path / "a", "tokenizer.model", ["a"]), tokenizer(tmp_path / "b", "vocab.txt", ["a"])
    (second / "tokenizer.model").write_bytes(content)
    assert tokenizer_difference(first, second) == "tokenizer.model differs"
    (first / "tokenizer.model").write_bytes(content)
    assert tokenizer_difference(first, second) is None
    added(first, "added_tokens.json", {1: "<x>"})
    assert tokenizer_difference(first, second) == "its added tokens differ"


def test_tokens_without_a_row_are_told(save, tmp_path):
    save("a", tensors(vocabulary=6)), save("b", tensors(vocabulary=6, seed=1))
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(FORMS["added tokens"][0]["tokenizer.json"]))
    lines = list(check(read_recipe(soup("a", "b")), "out"))
    assert any("model 'a': its tokenizer has ids up to 9, its embedding 6 rows" in line for line in lines)
    assert not any("ids up to" in line for line in check(read_recipe(soup("b", "a")), "out"))


def test_models_without_a_config(save, tmp_path):
    for i, name in enumerate("ab"):
        save(name, tensors(seed=i))
    (tmp_path / "a/config.json").unlink()
    with pytest.raises(UserError, match=r"model 'a' gives .* and has no config\.json"):
        list(check(read_recipe(soup("a", "b")), "out"))
    merge(soup("b", "a"), "out")
    assert (tmp_path / "out/config.json").is_file()
