"""Cards of exported models: a head that the hub's own parser takes, how to load and ask, no path of this machine."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

import bmjax
from bmjax.chat.template import TEMPLATE_NAMES, named_template, render_prompt
from bmjax.io.card import public_name, public_values, read_head
from bmjax.model.config import context_length
from bmjax.weights.card import QUESTION, add_results, store_sampling, write_copy_card
from bmjax.weights.tokenizer import set_longest, stored_template
from tests.conftest import write_student


@pytest.fixture(scope="module")
def trained(student, train_file, tmp_path_factory):
    """The output of a training of two steps, from a student whose card names a base and a license."""
    output = tmp_path_factory.mktemp("runs") / "sums"
    (student / "README.md").write_text("---\nbase_model: org/small\nlicense: apache-2.0\n---\n")
    keys = {
        "student": str(student), "data": str(train_file), "output": str(output), "steps": 2, "seq_len": 64, "batch": 4,
        "packing": False, "compute_dtype": "float32", "save_every": 1, "mesh": {"data": 1},
    }  # fmt: skip
    bmjax.train(keys)
    (student / "README.md").unlink()
    return output


def body_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_trainings_card(trained, student, train_file):
    folder = trained / "hf"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == ["org/small"] and card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"bmjax", "sft"} <= set(card.data.tags)
    text = body_of(folder)
    assert str(train_file.parent) not in text and str(student.parent) not in text and str(trained) not in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["steps"] == 2 and settings["seq_len"] == 64 and "output" not in settings
    assert "2 steps" in text and "vllm serve ." in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")
    assert "jax " in text.partition("## Versions")[2]


def test_configs_say_what_is_true(trained):
    folder = trained / "hf"
    config = json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 256
    assert "transformers_version" not in config


def test_a_conversion_keeps_the_card_and_makes_one_where_there_is_none(trained, student, tmp_path):
    bmjax.convert(trained / "hf", tmp_path / "orbax", to="orbax")
    bmjax.convert(tmp_path / "orbax", tmp_path / "again", to="hf")
    assert body_of(tmp_path / "again") == body_of(trained / "hf")
    bmjax.convert(trained / "checkpoints" / "1", tmp_path / "first", to="hf")
    assert "1 steps" in body_of(tmp_path / "first")
    bmjax.convert(student, tmp_path / "plain", to="orbax")
    (tmp_path / "plain" / "README.md").unlink(missing_ok=True)
    bmjax.convert(tmp_path / "plain", tmp_path / "back", to="hf")
    ModelCard.load(tmp_path / "back" / "README.md")
    assert "Converted by bmjax from `plain`" in body_of(tmp_path / "back")


@pytest.mark.parametrize("name", [name for name in TEMPLATE_NAMES if name != "mistral"])
def test_the_prompt_is_what_transformers_writes(tmp_path, tokenizer, name):
    template = named_template(name)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    write_copy_card(tmp_path, "org/model", tmp_path, "A test.")
    text = body_of(tmp_path)
    turns = [{"role": "user", "content": QUESTION}]
    expected = render_prompt(tokenizer, turns, template, "test")
    assert f"The chat template is `{name}`." in text and f"```text\n{expected}\n```" in text
    assert read_head(tmp_path)["base_model"] == ["org/model"]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_cannot_be_rendered_has_no_example(tmp_path, template):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "chat_template.jinja").write_text(template)
    write_copy_card(tmp_path, "org/model", tmp_path, "A test.")
    assert stored_template(tmp_path) == template and "## Prompt format" not in body_of(tmp_path)


def test_results_are_added_once_and_other_links_to_the_card_stay(tmp_path):
    (tmp_path / "model").mkdir()
    write_copy_card(tmp_path / "model", "org/model", tmp_path / "model", "A test.")
    before = body_of(tmp_path / "model")
    (tmp_path / "link.md").hardlink_to(tmp_path / "model" / "README.md")
    scores = {"validation": {"math": {"accuracy": 0.51234, "ci95": [0.4, 0.6], "n": 3}, "co|de": {"loss": 1.5}}}
    add_results(tmp_path / "model", "ties", {"validation": {"math": {"accuracy": 0.1}}})
    add_results(tmp_path / "model", "ties", scores, "Made of nothing.", {"datasets": ["org/rows"]})
    text, card = body_of(tmp_path / "model"), ModelCard.load(tmp_path / "model" / "README.md")
    results = card.data.eval_results
    assert card.data.model_name == "ties" and card.data.datasets == ["org/rows"]
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        ("math (validation)", "accuracy", 0.5123), ("co|de (validation)", "loss", 1.5),
    ]  # fmt: skip
    assert "| `math` | 51.2 | 40.0 to 60.0 |  |" in text and "| `co\\|de` |  |  | 1.5000 |" in text
    assert text.count("## Scores") == 1 and "## Lineage\n\nMade of nothing." in text
    assert (tmp_path / "link.md").read_text() == before
    state = (tmp_path / "model" / "README.md").stat().st_mtime_ns
    add_results(tmp_path / "model", "ties", scores, "Made of nothing.", {"datasets": ["org/rows"]})
    assert (tmp_path / "model" / "README.md").stat().st_mtime_ns == state


def test_a_model_scored_greedily_answers_greedily(tmp_path):
    folder = write_student(tmp_path / "model")
    path = folder / "generation_config.json"
    stored = {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": 2, "transformers_version": "4.37.0"}
    path.write_text(json.dumps(stored))
    store_sampling(folder, 0.0)
    assert json.loads(path.read_text()) == {"eos_token_id": 2, "do_sample": False}
    from transformers import GenerationConfig

    GenerationConfig.from_pretrained(folder).validate(strict=True)
    store_sampling(folder, 0.6, 0.95)
    changed = {"eos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    assert json.loads(path.read_text()) == changed


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}


@pytest.mark.parametrize(
    ("config", "stated", "expected"),
    [
        ({"max_position_embeddings": 100}, int(1e30), 100),
        ({"max_position_embeddings": 100}, None, 100),
        ({"max_position_embeddings": 100}, 300, 100),
        ({"max_position_embeddings": 100}, 60, 60),
        ({"max_position_embeddings": 100, "rope_scaling": YARN}, 300, 300),
        ({"max_position_embeddings": 100, "rope_scaling": YARN}, 500, 400),
        ({"max_position_embeddings": 100, "rope_scaling": "odd"}, 500, 100),
        ({}, 500, 500),
    ],
)
def test_no_tokenizer_promises_more_than_the_context(config, stated, expected):
    tokenizer = {} if stated is None else {"model_max_length": stated}
    set_longest(tokenizer, context_length(config))
    assert tokenizer == {"model_max_length": expected}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("org/model", "org/model"),
        ("org/model@" + "a" * 40, "org/model@aaaaaaaaaaaa"),
        ("/home/me/runs/math/hf", "math"),
        ("/home/me/train.jsonl", "train.jsonl"),
        ("/Users/me/hf", "hf"),
        ("gs://bucket/math/hf/", "math"),
        ("/data/base+/data/lora", "base+lora"),
        ("runs/data/math/train.jsonl", "math"),
        ("/", "local"),
    ],
)
def test_public_names(name, shown):
    assert public_name(name) == shown


def test_only_paths_are_shortened_in_values(tmp_path):
    values = {"models": [str(tmp_path), "org/model"], "density": 0.5, "filter": "mlp/up", "template": "{% x %}\n/a"}
    assert public_values(values) == {**values, "models": [tmp_path.name, "org/model"]}
