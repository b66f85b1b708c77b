import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.plan.nodes import plan
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.reference import hf_dir

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HIDDEN = 3


def values(model, rows):
    """Row i of a model's embedding is [100 * model + i] * 3, its head's the negative."""
    column = np.arange(rows, dtype=np.float32)[:, None] + 100 * model
    return np.repeat(column, HIDDEN, axis=1)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes model `number` with plain and marked tokens, and an embedding of `rows`."""
    monkeypatch.chdir(tmp_path)

    def model(name, number, plain, marked=(), rows=None, head=True, **config):
        backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(plain)}, unk_token=plain[0]))
        backend.add_tokens([AddedToken(token, special=True) for token in marked])
        rows = rows or len(plain) + len(marked)
        tensors = {EMBED: values(number, rows), "model.norm.weight": np.ones(HIDDEN, np.float32)}
        folder = hf_dir(tmp_path / name, tensors | ({HEAD: -values(number, rows)} if head else {}), **config)
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=plain[0]).save_pretrained(folder)
        return folder

    return model


def merge_rows(recipe):
    """(plan, for every vocabulary tensor the array of each model that a step would see, by the plan's own words)."""
    recipe = read_recipe(recipe)
    checkpoints = {name: open_checkpoint(name) for name in recipe.inputs}
    planned = plan(recipe, checkpoints)
    seen = {}
    for node in planned.nodes:
        if node.name not in (EMBED, HEAD):
            continue
        assert node.shape[1:] == (HIDDEN,)
        for name, source in node.inputs.items():
            stored = checkpoints[name].read(source.tensor)
            rows = np.arange(node.shape[0]) if source.rows is None else source.rows
            array = np.full(node.shape, np.nan, np.float32)
            for i, row in enumerate(rows):
                others = [(m, t, at[i]) for m, t, at in source.others if at[i] >= 0]
                lent = [checkpoints[m].read(t)[at] for m, t, at in others]
                array[i] = stored[row] if row >= 0 else np.mean(lent, axis=0) if lent else 0
            assert np.ptp(array, axis=1).max() == 0
            seen[node.name, name] = array[:, 0].tolist()
    return planned, seen


def tokens_of(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()


def soup(*models, **more):
    return {"merge_method": "linear", "models": list(models), **more}


def test_union(make, tmp_path):
    make("a", 0, ["u", "x", "y"], ["<s>"])
    make("b", 1, ["u", "y", "z"], ["<s>", "<t>"])
    make("c", 2, ["u", "z", "x", "q"], [])
    planned, rows = merge_rows(soup("a", "b", "c", tokenizer_source="union"))
    tokens = planned.vocabulary.tokens
    assert {t: tokens[t] for t in ("u", "x", "y", "<s>")} == {"u": 0, "x": 1, "y": 2, "<s>": 3}
    assert set(tokens) == {"u", "x", "y", "<s>", "z", "q", "<t>"} and planned.vocabulary.size == 7
    token_ids = {"a": {"u": 0, "x": 1, "y": 2, "<s>": 3}, "b": {"u": 100, "y": 101, "z": 102, "<s>": 103, "<t>": 104},
                 "c": {"u": 200, "z": 201, "x": 202, "q": 203}}  # fmt: skip
    for token, i in tokens.items():
        # mergekit: the base's row if it has the token, else the mean of those that have it.
        having = [token_ids[m][token] for m in "abc" if token in token_ids[m]]
        default = token_ids["a"].get(token, sum(having) / len(having))
        for m in "abc":
            assert rows[EMBED, m][i] == token_ids[m].get(token, default), (token, m)
            assert rows[HEAD, m][i] == -token_ids[m].get(token, default), (token, m)
    assert planned.config_changes == {"vocab_size": 7}
    assert "the tokenizer of 'a' gets 3 tokens more" in planned.notes


def test_the_union_tokenizer_is_written(make, tmp_path):
    a = make("a", 0, ["u", "x"], ["<s>"])
    make("b", 1, ["u", "z"], ["<t>"])
    planned, _ = merge_rows(soup("a", "b", tokenizer_source="union"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.json").write_text("{}")
    planned.vocabulary.save(out)
    assert tokens_of(out) == planned.vocabulary.tokens
    assert not (out / "vocab.json").exists()
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (a, out))
    assert after.token_to_id("<s>") == before.token_to_id("<s>") == 2
    special = {token.content: token.special for token in after.get_added_tokens_decoder().values()}
    assert {token: special[token] for token in ("<s>", "z", "<t>")} == {"<s>": True, "z": False, "<t>": True}
    text = PreTrainedTokenizerFast.from_pretrained(out)
    assert text.encode("<t>", add_special_tokens=False) == [planned.vocabulary.tokens["<t>"]]


def test_base_puts_the_other_models_rows_in_its_order(make):
    make("a", 0, ["u", "x", "y"])
    make("b", 1, ["y", "u", "w"])
    recipe = {"merge_method": "task_arithmetic", "base_model": "a", "models": ["b"], "tokenizer_source": "base"}
    planned, rows = merge_rows(recipe)
    assert rows[EMBED, "a"] == [0, 1, 2] and rows[EMBED, "b"] == [101, 1, 100]
    assert planned.config_changes == {"vocab_size": 3}
    assert not [note for note in planned.notes if "token" in note]


def test_equal_tokenizers_keep_padding_rows(make):
    make("a", 0, ["u", "x", "y"], rows=8, vocab_size=8)
    make("b", 1, ["u", "x", "y"], rows=8)
    for source in ("base", "union", "b"):
        planned, _ = merge_rows(soup("a", "b", tokenizer_source=source))
        node = next(node for node in planned.nodes if node.name == EMBED)
        assert node.shape == (8, HIDDEN) and planned.config_changes == {}
        assert all(source.rows is None and not source.others for source in node.inputs.values())


def test_padding_rows_beside_another_tokenizer(make):
    make("a", 0, ["u", "x"], rows=6)
    make("b", 1, ["u", "x", "y", "z"], rows=5)
    _, rows = merge_rows(soup("a", "b", tokenizer_source="base"))
    assert rows[EMBED, "a"] == [0, 1, 2, 3, 4, 5]
    # b's rows 2 and 3 are of tokens that the result lacks; row 4 is padding in both, row 5 only in a.
    assert rows[EMBED, "b"] == [100, 101, 2, 3, 104, 5]


def test_pad_to_multiple_of(make):
    make("a", 0, ["u", "x", "y"])
    make("b", 1, ["u", "x", "z"])
    planned, rows = merge_rows(soup("a", "b", tokenizer={"source": "union", "pad_to_multiple_of": 8}))
    assert planned.vocabulary.size == 8 and planned.config_changes == {"vocab_size": 8}
    assert rows[EMBED, "a"] == [0, 1, 2, 102, 0, 0, 0, 0] and rows[EMBED, "b"] == [100, 101, 2, 102, 0, 0, 0, 0]


def test_rules_of_single_tokens(make):
    make("a", 0, ["u", "x", "y"])
    make("b", 1, ["u", "x", "z"])
    tokens = {
        "x": {"source": "b", "force": True},
        "y": {"source": {"kind": "zero"}},
        "z": {"source": {"kind": "model_token", "model": "a", "token": "y"}},
        "new": {"source": {"kind": "model_token", "model": "b", "token_id": 2}},
        "newer": None,
        "zero": {"source": {"kind": "zero"}, "force": True},
    }
    planned, rows = merge_rows(soup("a", "b", tokenizer={"source": "union", "tokens": tokens}))
    ids = planned.vocabulary.tokens
    assert sorted(ids) == ["new", "newer", "u", "x", "y", "z", "zero"]
    rows_of_token = {token: (rows[EMBED, "a"][i], rows[EMBED, "b"][i]) for token, i in ids.items()}
    assert rows_of_token == {
        "u": (0, 100), "x": (101, 101), "y": (2, 0), "z": (2, 102), "new": (102, 102), "newer": (0, 0), "zero": (0, 0),
    }  # fmt: skip
    assert "1 tokens have a row in no model; theirs are zeros" in planned.notes


def test_a_tokenizer_of_another_model(make):
    make("a", 0, ["u", "x"], eos_token_id=1)
    make("b", 1, ["x", "u"])
    folder = make("elsewhere", 2, ["x", "y", "u"], eos_token_id=2)
    planned, rows = merge_rows(soup("a", "b", tokenizer_source="elsewhere"))
    assert rows[EMBED, "a"] == [1, 0, 0] and rows[EMBED, "b"] == [100, 0, 101]
    assert planned.config_changes == {"vocab_size": 3, "eos_token_id": 2}
    assert planned.vocabulary.source.resolve() == folder.resolve()


def test_tokens_beyond_the_embedding_have_no_row(make):
    make("a", 0, ["u", "x", "y"], rows=2)
    make("b", 1, ["u", "x", "y"], rows=3)
    planned, rows = merge_rows(soup("a", "b", tokenizer_source="base"))
    assert rows[EMBED, "a"] == [0, 1, 102] and rows[EMBED, "b"] == [100, 101, 102]
    assert planned.vocabulary.size == 3


def test_tied_and_untied_models_of_different_tokenizers(make):
    make("a", 0, ["u", "x"], head=False, tie_word_embeddings=True)
    make("b", 1, ["x", "y", "u"])
    _, rows = merge_rows(soup("a", "b", tokenizer_source="union"))
    assert rows[HEAD, "a"] == [0, 1, -101] and rows[HEAD, "b"] == [-102, -100, -101]
    assert rows[EMBED, "a"] == [0, 1, 101] and rows[EMBED, "b"] == [102, 100, 101]


def test_a_model_without_a_tokenizer(make):
    make("a", 0, ["u", "x"])
    hf_dir(make("b", 1, ["x", "u"]).parent / "c", {EMBED: values(2, 2), HEAD: values(2, 2),
           "model.norm.weight": np.ones(HIDDEN, np.float32)})  # fmt: skip
    (open_checkpoint("c").directory / "tokenizer.json").unlink()
    planned, rows = merge_rows(soup("a", "b", "c", tokenizer_source="base"))
    assert rows[EMBED, "b"] == [101, 100] and rows[EMBED, "c"] == [200, 201]
    assert any(note.startswith("model 'c' has no tokenizer") for note in planned.notes)


def test_steps_in_between_already_have_the_results_rows(make):
    make("a", 0, ["u", "x"])
    make("b", 1, ["x", "u"])
    make("c", 2, ["u", "z"])
    steps = [{"name": "mid", **soup("a", "b")}, {"name": "end", **soup("mid", "c")}]
    recipe = read_recipe({"steps": steps, "tokenizer_source": "union"})
    planned = plan(recipe, {name: open_checkpoint(name) for name in recipe.inputs})
    embedding = next(node for node in planned.nodes if node.name == EMBED)
    mid = embedding.inputs["mid"]
    assert mid.rows is None and mid.node.shape == embedding.shape == (3, HIDDEN)
    assert mid.node.inputs["b"].rows.tolist() == [1, 0, -1]
    assert embedding.inputs["c"].rows.tolist() == [0, -1, 1]


def broken(folder):
    (folder / "tokenizer.json").write_text("{}")


BAD = {
    "no such token": (None, {"x": {"source": {"kind": "model_token", "model": "b", "token": "q"}}},
                      "tokenizer.tokens.x: model 'b' has no token 'q' among its 3 rows"),
    "id beyond": (None, {"x": {"source": {"kind": "model_token", "model": "b", "token_id": 3}}},
                  "tokenizer.tokens.x: model 'b' has no token id 3 among its 3 rows"),
    "lacks it": (None, {"y": {"source": "b"}}, "tokenizer.tokens.y: model 'b' has no token 'y'"),
    "broken": (broken, {}, "tokenizer.json: the tokenizer cannot be loaded"),
    "none": (lambda folder: (folder / "tokenizer.json").unlink(), {}, "has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_tokenizers(make, name):
    change, tokens, message = BAD[name]
    a = make("a", 0, ["u", "x", "y"])
    make("b", 1, ["u", "x", "z"])
    if change:
        change(a)
    with pytest.raises(UserError) as error:
        merge_rows(soup("a", "b", tokenizer={"source": "base", "tokens": tokens}))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_embedding(make, tmp_path):
    hf_dir(tmp_path / "a", {"conv.0.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="model 'a': no tensor is known as its tokens' embedding"):
        merge_rows(soup("a", tokenizer_source="base"))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("tokens, told", [
    (["x", "u", "y"], "2 ids differ (0: 'x' for 'u'; 1: 'u' for 'x')"),
    (["u", "x", "z"], "1 id differs (2: 'z' for 'y')"),
    (["u", "x"], "1 id differs (2: no token for 'y')"),
    (["u", "x", "y"], None),
], ids=str)  # fmt: skip
def test_another_tokenizer_behind_equal_shapes_is_noted_with_the_ids(make, tokens, told):
    make("a", 0, ["u", "x", "y"], rows=4)
    folder = make("b", 1, tokens, rows=4)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # the same in other bytes
    notes = [note for note in merge_rows(soup("a", "b"))[0].notes if "another tokenizer" in note]
    if told is None:
        assert not notes
        return
    (note,) = notes
    assert note.startswith("model 'b' has another tokenizer than 'a': ") and told in note and "by number" in note
    by_token = merge_rows(soup("a", "b", tokenizer_source="base"))[0]
    assert not any("another tokenizer" in note for note in by_token.notes)


def test_tokenizers_that_cannot_be_read_are_compared_by_their_bytes(make):
    for name in "ab":
        (make(name, 0, ["u", "x"]) / "tokenizer.json").write_text(json.dumps({"of": name}))
    assert any("tokenizer.json differs" in note for note in merge_rows(soup("a", "b"))[0].notes)
    for name in "ab":
        (open_checkpoint(name).directory / "tokenizer.json").unlink()
        (open_checkpoint(name).directory / "tokenizer.model").write_text("one")
    assert not merge_rows(soup("a", "b"))[0].notes


def spellings(name, root):
    """Names under which a recipe may speak of the model `name`."""
    block = {"model": {"path": name}}
    return [name, f"./{name}", f"{name}/", str(root / name), "alias", "link", f"model:{name}", block, block["model"]]


@pytest.mark.parametrize("i", range(9))
def test_a_model_has_its_rows_and_tokens_however_it_is_spelt(make, tmp_path, i):
    """Padding rows behind the tokens stay, and rules of tokens find the model."""
    make("a", 0, "uvwx", ["<t>"], rows=10)
    make("b", 1, "uvwxyz", rows=10)
    (tmp_path / "link").symlink_to("b")
    recipe = {"merge_method": "linear", "base_model": "a", "models": ["a", "b"], "sources": {"alias": "b"}}
    spelt = spellings("b", tmp_path)[i]
    for keys in ({"tokenizer_source": spelt}, {"tokenizer": {"source": spelt}}):
        planned, seen = merge_rows(recipe | keys)
        assert planned.vocabulary.size == 10 and seen[EMBED, "b"] == list(range(100, 110))
    for source in (spelt, {"kind": "model_token", "model": spelt, "token_id": 9}):
        rule = {"source": source, "force": True}
        _, seen = merge_rows(recipe | {"tokenizer": {"source": "b", "tokens": {"x": rule}}})
        assert seen[EMBED, "a"][3] == (103 if source is spelt else 109)


def test_a_model_called_as_a_word_is_named_by_its_directory(make):
    make("base", 0, "uv", rows=8)
    make("donor", 1, "xy", rows=4)
    recipe = {"merge_method": "linear", "models": ["donor", "base"]}
    assert merge_rows(recipe | {"tokenizer_source": "base"})[0].vocabulary.size == 4
    planned, _ = merge_rows(recipe | {"tokenizer_source": "./base"})
    assert planned.vocabulary.size == 8 and planned.vocabulary.tokens == {"u": 0, "v": 1}
    with pytest.raises(UserError, match=r"tokenizer_source: .*'base' means no model here; write \./base"):
        read_recipe(recipe | {"tokenizer_source": "model:base"})


@pytest.mark.parametrize("generation", ["of the donor", "of both"])
@pytest.mark.parametrize("stated", [{}, {"eos_token_id": 2}], ids=["none stated", "end stated"])
def test_ids_in_the_configs_follow_another_models_tokenizer(make, tmp_path, generation, stated):
    nested = {"text_config": {"image_token_id": 3, "vocab_size": 5}}
    a = make("a", 0, ["u", "x", "<end>"], ["<image>", "<pad>"], eos_token_id=2, pad_token_id=4, **nested)
    b = make("b", 1, ["u", "x"], ["<end>", "<pad>", "<image>"], image_token_id=4, **stated)
    (a / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4], "top_k": 1}))
    if generation == "of both":
        (b / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 9}))
    planned, _ = merge_rows(soup("a", "b", tokenizer_source="b"))
    assert planned.config_changes == {"pad_token_id": 3, "text_config": {"image_token_id": 4, "vocab_size": 5}}
    out = tmp_path / "out"
    out.mkdir()
    (out / "generation_config.json").write_text((a / "generation_config.json").read_text())
    planned.vocabulary.save(out)
    written = json.loads((out / "generation_config.json").read_text())
    ends = 2 if stated else [2, 3]
    assert written == (
        {"eos_token_id": 2, "top_k": 9} if generation == "of both" else {"eos_token_id": ends, "top_k": 1}
    )
    notes = [note for note in planned.notes if "by the result's tokenizer" in note]
    assert [note.split(":")[0] for note in notes] == (
        ["config.json"] if generation == "of both" else ["generation_config.json", "config.json"]
    )


@pytest.mark.parametrize("source", ["base", "union"])
def test_ids_stay_under_the_donors_own_tokenizer(make, tmp_path, source):
    a = make("a", 0, ["u", "x"], ["<image>"], rows=4, vocab_size=4, eos_token_id=1, image_token_id=2,
             pad_token_id=3)  # fmt: skip
    make("b", 1, ["x", "u"], ["<new>", "<image>"], rows=4, eos_token_id=0, image_token_id=3, pad_token_id=3)
    (a / "generation_config.json").write_text('{"eos_token_id":  1}')
    planned, _ = merge_rows(soup("a", "b", tokenizer_source=source))
    assert planned.config_changes == {}
    notes = [note for note in planned.notes if "config.json" in note]
    # Padding's id is a token's once the tokenizer grows. Ids of models that mean the same tokens do not differ.
    told = "config.json: pad_token_id: 3 was no token's id, so it stays, and is now '<new>': look at it"
    assert notes == ([told] if source == "union" else [])


BIASES = {"final_logits_bias": (1, -1), "lm_head.bias": (-1,), "model.final_logits_bias": (1, -1)}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_a_bias_of_scores_follows_the_tokens(make, tmp_path, bias, source):
    tokens = {"a": ["u", "x", "y"], "b": ["y", "u", "z", "w"]}
    for name, texts in tokens.items():
        folder = make(name, 0, texts)
        stored = load_file(folder / "model.safetensors")
        stored[bias] = np.array([ord(text) for text in texts], np.float32).reshape(BIASES[bias])
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    merge(soup("a", "b", tokenizer_source=source), "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[bias]
    ids = tokens_of(tmp_path / "out")
    assert merged.shape == np.empty(len(ids)).reshape(BIASES[bias]).shape
    assert merged.ravel().tolist() == [ord(text) for text in sorted(ids, key=lambda text: ids[text])]


@pytest.mark.parametrize("shape", [(6, 2), (2, 6), (5, 4)])
def test_a_tensor_that_may_go_along_the_tokens_is_told_when_rows_move(make, tmp_path, shape):
    for name, texts in (("a", "uvwxyz"), ("b", "zuvwxy")):
        folder = make(name, 0, list(texts), hidden_size=HIDDEN, vocab_size_per_layer_input=5)
        stored = load_file(folder / "model.safetensors") | {"model.embed_tokens_per_layer": np.zeros(shape, np.float32)}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    told = "1 tensor (model.embed_tokens_per_layer) of 'a': an axis is as long as its rows of tokens, which move"
    assert any(note.startswith(told) for note in merge_rows(soup("a", "b", tokenizer_source="base"))[0].notes)
    assert not any("axis" in note for note in merge_rows(soup("a", "b"))[0].notes)
    assert not any("axis" in note for note in merge_rows(soup("a", tokenizer_source="base"))[0].notes)


@pytest.mark.parametrize("rows", [6, 4])
@pytest.mark.parametrize("source", ["base", "union"])
def test_embeddings_of_each_layer_follow_their_tokens(make, tmp_path, rows, source):
    stored = {}
    for seed, (name, texts) in enumerate((("a", "uvwxyz"), ("b", "zuvwxq"))):
        folder = make(name, seed, list(texts), hidden_size=HIDDEN, vocab_size_per_layer_input=rows)
        # Tokens beyond the last row take the first, as their class does.
        table = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) + 100 * seed
        stored[name] = {text: table[i if i < rows else 0] for i, text in enumerate(texts)}
        values = load_file(folder / "model.safetensors") | {"model.embed_tokens_per_layer.weight": table}
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    merge(soup("a", "b", tokenizer_source=source), "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens_per_layer.weight"]
    size = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size_per_layer_input"]
    ids = tokens_of(tmp_path / "out")
    assert len(merged) == size == (7 if source == "union" else rows)
    for text, i in ids.items():
        if i < size:  # of a token that one model lacks the other's row counts for both
            both = [stored[name].get(text, stored[other].get(text)) for name, other in (("a", "b"), ("b", "a"))]
            np.testing.assert_allclose(merged[i], np.mean(both, 0), err_msg=text)


def test_both_vocabulary_sizes_of_an_encoder_decoder_change(make):
    make("a", 0, ["u", "x"], vocab_size=2, decoder_vocab_size=2)
    make("b", 1, ["u", "y"])
    planned, _ = merge_rows(soup("a", "b", tokenizer_source="union"))
    assert planned.config_changes == {"vocab_size": 3, "decoder_vocab_size": 3}
