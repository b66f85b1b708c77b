"""Embeddings with rows behind `vocab_size` that the head lacks: those of Mllama for images, those of Moshi."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bmjax.calibrate.dispatch import merge
from tests.merge.plan.test_vocabulary import soup, values
from tests.merge.reference import hf_dir

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BEHIND = 3


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes model `number` of plain tokens, with rows of no token behind, the first of which an image's."""
    monkeypatch.chdir(tmp_path)

    def model(name, number, plain, image=None, behind=BEHIND, **config):
        backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(plain)}, unk_token=plain[0]))
        if image:
            backend.add_tokens([AddedToken(image, special=True)])
        count = len(plain)
        tensors = {EMBED: values(number, count + behind), HEAD: -values(number, count)}
        config = {"model_type": "mllama_text_model", "vocab_size": count, "tie_word_embeddings": False} | config
        folder = hf_dir(tmp_path / name, tensors, **config)
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=plain[0]).save_pretrained(folder)

    return model


def merged(recipe):
    notes = []
    merge({**recipe, "dtype": "float32"}, "out", overwrite=True, log=notes.append)
    config = json.loads(Path("out/config.json").read_text())
    tensors = load_file("out/model.safetensors")
    return tensors[EMBED][:, 0].tolist(), tensors[HEAD][:, 0].tolist(), config["vocab_size"], notes


@pytest.mark.parametrize("image", [None, "<image>"])
@pytest.mark.parametrize("source", [None, "base", "union", "b"])
def test_rows_behind_stay_behind_and_the_head_is_that_of_the_tokens(make, source, image):
    make("a", 0, ["u", "x", "y"], image), make("b", 1, ["u", "x", "y"], image)
    embedding, head, size, notes = merged(soup("a", "b", **({"tokenizer_source": source} if source else {})))
    assert embedding == [50 + i for i in range(3 + BEHIND)] and head == [-50 - i for i in range(3)] and size == 3
    assert not any("vocab_size" in note or "rows" in note for note in notes)


@pytest.mark.parametrize("image", [None, "<image>"])
def test_tokens_in_another_order_and_rows_behind(make, image):
    make("a", 0, ["u", "x", "y"], image), make("b", 1, ["u", "y", "x"], image)
    embedding, head, size, _ = merged(soup("a", "b", tokenizer_source="base"))
    # Row i of model a is i, that of b 100 + j for the same token.
    assert embedding == [50, (1 + 102) / 2, (2 + 101) / 2, 53, 54, 55] and size == 3
    assert head == [-row for row in embedding[:3]]


def test_new_tokens_stand_before_the_rows_behind(make):
    make("a", 0, ["u", "x", "y"]), make("b", 1, ["u", "y", "z", "q", "x"])
    embedding, head, size, _ = merged(soup("a", "b", tokenizer_source="union"))
    # z and q are the donor's nowhere, so both models have b's.
    ordinary = [50, (1 + 104) / 2, (2 + 101) / 2, 102, 103]
    assert size == 5 and head == [-row for row in ordinary]
    assert embedding == [*ordinary, (3 + 105) / 2, (4 + 106) / 2, (5 + 107) / 2]


def test_a_new_token_behind_an_image(make):
    make("a", 0, ["u", "x", "y"], "<image>"), make("b", 1, ["u", "x", "y", "z"], "<image>")
    embedding, head, size, _ = merged(soup("a", "b", tokenizer_source="union"))
    # The image keeps its id, 3, which is one of the head's now.
    assert size == 5 and len(head) == 5 and len(embedding) == 5 + BEHIND
    assert embedding[:5] == [50, 51, 52, (3 + 104) / 2, 103]
    assert head[4] == -103


def test_rows_behind_of_which_the_result_has_none_are_named(make):
    make("a", 0, ["u", "x", "y"], behind=0), make("b", 1, ["u", "x", "y"])
    embedding, head, size, notes = merged(soup("a", "b", tokenizer_source="base"))
    assert (len(embedding), len(head), size) == (3, 3, 3)
    assert any("model 'b' has 3 rows of no token behind its vocab_size, the result 0" in note for note in notes)


def test_a_family_whose_loaders_refuse_such_rows_is_noted_or_mended(make):
    for i, name in enumerate("ab"):
        make(name, i, ["u", "x", "y"], "<pad>", 1, model_type="llama")
    *_, notes = merged(soup("a", "b"))
    assert any("its embedding has 4 rows: loaders may refuse the result" in note for note in notes)
    embedding, head, size, _ = merged(soup("a", "b", tokenizer_source="base"))
    assert len(embedding) == len(head) == size == 4
