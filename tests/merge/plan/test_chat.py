"""The chat template of a result, and end tokens that follow it."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bmjax.calibrate.dispatch import merge
from bmjax.chat.template import named_template
from bmjax.merge.plan.tokenizer_text import token_ids
from bmjax.model.config import read_hf_config
from bmjax.weights.tokenizer import stored_template
from tests.merge.plan_helpers import planned, tensors

TEXT_END, TURN_END = "<|endoftext|>", "<|im_end|>"
TOKENS = ["a", "b", "c", TEXT_END, "<|im_start|>", TURN_END]
CHATML, OTHER = named_template("chatml"), "{% for m in messages %}[{{ m.content }}]<|im_end|>{% endfor %}"


@pytest.fixture
def make(save):
    """Makes a model with a tokenizer of TOKENS that ends at `end` in all its files, and has `template`."""

    def model(name, template=None, end=TEXT_END, where="chat_template.jinja", tokens=TOKENS, generation=True):
        checkpoint = save(name, tensors(seed=len(name)), eos_token_id=tokens.index(end))
        folder = checkpoint.directory
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens[:3])}, unk_token=tokens[0]))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_special_tokens([AddedToken(token, special=True) for token in tokens[3:]])
        backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        if template is not None and where == "tokenizer_config.json":
            config["chat_template"] = template
        elif template is not None and where == "named":
            config["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
        elif template is not None:
            text = template if where.endswith("jinja") else json.dumps({"chat_template": template})
            (folder / where).write_text(text)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": end}}))
        if generation:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens.index(end), "top_k": 1}))
        return checkpoint

    return model


def ties(*branches, **more):
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": list(branches),
        "parameters": {"density": 0.5},
    } | more


def ends(folder):
    """The end tokens that the four files of a directory name."""
    maps = [json.loads((folder / name).read_text()) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    texts = [m["eos_token"]["content"] if isinstance(m["eos_token"], dict) else m["eos_token"] for m in maps]
    generation = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return read_hf_config(folder)["eos_token_id"], generation, *texts


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json", "named"])
def test_auto_takes_the_template_that_most_models_have_and_its_end_token(make, tmp_path, where):
    make("base")
    for name, template in (("a", CHATML), ("bb", CHATML), ("ccc", OTHER)):
        make(name, template, TURN_END, where)
    notes = []
    merge(ties("a", "bb", "ccc", chat_template="auto"), "out", log=notes.append)
    assert stored_template(tmp_path / "out") == CHATML
    assert any("that of 'a', 'bb', 2 of the 3 models" in note for note in notes)
    assert ends(tmp_path / "out") == ([5, 3], [5, 3], TURN_END, TURN_END)
    assert not any("may not stop" in note for note in notes)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["top_k"] == 1


def test_auto_prefers_the_donors_own_among_equals_and_changes_nothing_then(make, tmp_path):
    make("base", OTHER, TURN_END, "tokenizer_config.json"), make("a", CHATML, TURN_END)
    merge(ties("a", chat_template="auto"), "out")
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        assert (
            json.loads((tmp_path / "out" / name).read_text()).items()
            >= json.loads((tmp_path / "base" / name).read_text()).items()
        )
    assert not (tmp_path / "out/chat_template.jinja").exists()


def test_another_template_than_the_results_is_noted(make):
    models = {"base": make("base", CHATML), "a": make("a", OTHER), "bb": make("bb", CHATML + "\n")}
    (note,) = (note for note in planned(ties("a", "bb"), **models).notes if "chat template" in note)
    assert "is not that of 'a';" in note and "chat_template: auto" in note
    assert not any("'a'" in note for note in planned(ties("a", "bb", chat_template="chatml"), **models).notes)


def test_auto_without_any_template_says_so(make):
    models = {"base": make("base"), "a": make("a")}
    result = planned(ties("a", chat_template="auto"), **models)
    assert result.chat.template is None and any("no model has one" in note for note in result.notes)


@pytest.mark.parametrize("template", ["chatml", OTHER], ids=["name", "jinja"])
def test_end_tokens_follow_a_template_of_the_recipe(make, tmp_path, template):
    make("base"), make("a", CHATML, TURN_END)
    merge(ties("a", chat_template=template), "out")
    assert ends(tmp_path / "out") == ([5, 3], [5, 3], TURN_END, TURN_END)


def test_an_end_of_turn_that_is_no_token_is_said(make):
    plain = [*TOKENS[:4], "<x>", "<y>"]
    models = {"base": make("base", tokens=plain), "a": make("a", tokens=plain)}
    result = planned(ties("a", chat_template="chatml"), **models)
    assert any(f"ends turns with '{TURN_END}', which is no token" in note for note in result.notes)
    assert result.config_changes == {} and result.chat.end is None


@pytest.mark.parametrize("kind", ["same tokenizer", "no generation config", "tokenizer cannot be read"])
def test_other_end_tokens_of_a_branch_are_noted(make, kind):
    models = {"base": make("base", generation=kind != "no generation config"), "a": make("a", CHATML, TURN_END)}
    if kind == "tokenizer cannot be read":
        for model in models.values():
            (model.directory / "tokenizer.json").write_text("{}")
    notes = planned(ties("a"), **models).notes
    assert any("model 'a' ends an answer at" in note and TURN_END in note and "may not stop" in note for note in notes)
    assert any("the result has no chat template" in note and "chat_template: auto" in note for note in notes)
    turned = {"base": make("base2"), "a": models["base"]}
    assert not any("may not stop" in note for note in planned(ties("a"), **turned).notes)


def test_end_tokens_in_one_file_of_the_donor_are_enough(make):
    base, a = make("base", CHATML), make("a", CHATML, TURN_END)
    (base.directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert planned(ties("a"), base=base, a=a).notes == ()


def test_the_end_token_of_another_models_tokenizer(make, tmp_path):
    make("base"), make("a", OTHER, "<turn>", tokens=["b", "a", "<turn>", TEXT_END, "x", "y"])
    merge(ties("a", tokenizer_source="union", chat_template="auto"), "out")
    ids = token_ids(tmp_path / "out")
    assert stored_template(tmp_path / "out") == OTHER
    assert read_hf_config(tmp_path / "out")["eos_token_id"] == [ids[TURN_END], ids[TEXT_END]]


def with_tool_template(folder, where):
    """Gives a directory a template for tools, in one of the forms in which loaders look for it."""
    entries = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old tools"}]
    named = {entry["name"]: entry["template"] for entry in entries}
    if where == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("old tools")
        (folder / "chat_template.jinja").write_text("old")
    elif where == "list":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": entries}))
    else:
        (folder / f"{where}.json").write_text(json.dumps({"chat_template": named, "x": 1}))


@pytest.mark.parametrize("where", ["folder", "list", "chat_template", "processor_config"])
@pytest.mark.parametrize("template", ["chatml", "auto", None])
@pytest.mark.parametrize("source", [None, "base", "union"])
def test_templates_for_tools_go_with_the_template_that_is_replaced(make, tmp_path, where, template, source):
    base = make("base").directory
    make("a", CHATML, TURN_END), make("b", CHATML, TURN_END)
    with_tool_template(base, where)
    notes, keys = [], {"tokenizer_source": source} if source else {}
    merge(ties("a", "b", **({"chat_template": template} if template else {}), **keys), "out", log=notes.append)
    out = tmp_path / "out"
    told = "chat_template: the tokenizer's other templates (tool_use) are left out"
    assert sum(note.startswith(told) for note in notes) == (template is not None)
    texts = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".jinja")]
    assert any("old tools" in text for text in texts) == (template is None)
    if template is not None:
        assert set(templates_of(out).values()) == {CHATML}


def templates_of(folder):
    """The chat templates that transformers finds in a directory, by name."""
    loaded = PreTrainedTokenizerFast.from_pretrained(folder).chat_template
    return loaded if isinstance(loaded, dict) else {"default": loaded}


def test_auto_takes_no_template_for_tools_of_another_model_and_says_so(make):
    base, a = make("base"), make("a", CHATML, TURN_END)
    (a.directory / "additional_chat_templates").mkdir()
    (a.directory / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    notes = planned(ties("a", chat_template="auto"), base=base, a=a).notes
    assert "chat_template: not taken of 'a', the default alone is: tool_use" in notes
