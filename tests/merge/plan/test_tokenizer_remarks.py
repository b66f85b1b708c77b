"""Notes on tokenizers of the same tokens that split, mark or wrap text otherwise."""

import json

import pytest

from bmjax.merge.plan.nodes import plan
from bmjax.merge.plan.tokenizer_remarks import differing_parts
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import planned, soup, tensors

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "c": 5}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


def content(**changes):
    added = [
        {"id": i, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}
        for i, text in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": WORDS, "merges": ["a b"]}
    parts = {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
    return {"version": "1.0", "added_tokens": added, **parts, "model": model} | changes


def put(folder, tokenizer=None, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content() if tokenizer is None else tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def marked(flag, value):
    changed = content()
    for token in changed["added_tokens"]:
        token[flag] = value
    return changed


@pytest.mark.parametrize(
    "tokenizer, differing",
    [
        (content(pre_tokenizer={"type": "WhitespaceSplit"}), ["pre_tokenizer WhitespaceSplit for Whitespace"]),
        (content(normalizer={"type": "NFC"}), ["normalizer NFC for none"]),
        (content(decoder={"type": "Fuse"}), ["decoder Fuse for none"]),
        (content(post_processor=TEMPLATE), ["post_processor TemplateProcessing for none"]),
        (content(model={"type": "BPE", "vocab": WORDS, "merges": []}), ["model.merges"]),
        (content(model={**content()["model"], "byte_fallback": True}), ["model.byte_fallback"]),
        (marked("special", False), ["`special` of <s>, </s>"]),
        (marked("lstrip", True), ["`lstrip` of <s>, </s>"]),
        # The same in another spelling.
        (content(model={"type": "BPE", "vocab": WORDS, "merges": [["a", "b"]]}), []),
        (content(model={**content()["model"], "byte_fallback": False, "dropout": None}), []),
        (content(truncation={"max_length": 8}), []),
    ],
)
def test_parts_of_tokenizer_json(tmp_path, tokenizer, differing):
    assert differing_parts(put(tmp_path / "a"), put(tmp_path / "b", tokenizer)) == differing


def test_parts_as_older_versions_wrote_them_are_the_same(tmp_path):
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    new = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    first = put(tmp_path / "a", content(pre_tokenizer=new, decoder=new))
    assert differing_parts(first, put(tmp_path / "b", content(pre_tokenizer=old, decoder=old))) == []
    other = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    assert differing_parts(first, put(tmp_path / "c", content(pre_tokenizer=other, decoder=new))) == [
        "pre_tokenizer ByteLevel for Metaspace"
    ]


@pytest.mark.parametrize(
    "ours, theirs, differing",
    [
        ({}, {"add_bos_token": True}, ["add_bos_token true for false"]),
        ({"add_bos_token": False}, {}, []),
        ({"padding_side": "left"}, {}, ["padding_side 'right' for 'left'"]),
        ({"padding_side": "right"}, {}, []),
        ({"pad_token": "</s>"}, {"pad_token": {"content": "<s>"}}, ["pad_token '<s>' for '</s>'"]),
        ({"pad_token": "</s>"}, {"pad_token": {"content": "</s>"}}, []),
        ({"pad_token": "</s>"}, {}, []),
        ({}, {"model_max_length": 9, "chat_template": "{{ x }}", "tokenizer_class": "Other"}, []),
    ],
)
def test_settings(tmp_path, ours, theirs, differing):
    assert differing_parts(put(tmp_path / "a", **ours), put(tmp_path / "b", **theirs)) == differing


@pytest.mark.parametrize("source", [{}, {"tokenizer_source": "base"}, {"tokenizer_source": "union"}])
def test_one_note_a_model_names_all_that_differs(save, source):
    models = {name: save(name, tensors(seed=i)) for i, name in enumerate("abc")}
    for name in "ac":
        put(models[name].directory, content(post_processor=TEMPLATE))
    changed = content(pre_tokenizer={"type": "WhitespaceSplit"})
    put(models["b"].directory, changed, padding_side="left")
    notes = [note for note in planned(soup("a", "b", "c", **source), **models).notes if "reads or writes text" in note]
    assert len(notes) == 1 and notes[0].startswith("model 'b': ")
    assert notes[0].endswith(
        "pre_tokenizer WhitespaceSplit for Whitespace, post_processor none for TemplateProcessing, padding_side 'left' "
        "for 'right'"
    )


def test_ids_in_a_template_differ_where_tokens_are_matched_by_text(save):
    models = {name: save(name, tensors(seed=i)) for i, name in enumerate("ab")}
    put(models["a"].directory, content(post_processor=TEMPLATE))
    moved = {"a": 0, "<s>": 1, "</s>": 2, "b": 3, "ab": 4, "c": 5}
    template = {**TEMPLATE, "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    model = {"type": "BPE", "vocab": moved, "merges": ["a b"]}
    changed = content(post_processor=template, model=model)
    for i, token in enumerate(changed["added_tokens"], 1):
        token["id"] = i
    put(models["b"].directory, changed)
    recipe = read_recipe(soup("a", "b", tokenizer_source="base"))
    assert not [note for note in plan(recipe, models).notes if "reads or writes text" in note]
