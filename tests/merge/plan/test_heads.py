"""Heads: tied where a config says so, compared in every row, and never made of another kind of model."""

import numpy as np
import pytest

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.plan import heads
from bmjax.merge.plan.heads import TIED, TIED_FAMILIES, UNTIED_FAMILIES, is_tied_by_default
from bmjax.merge.plan.tensor_names import is_task_head
from bmjax.model.config import read_hf_config
from tests.merge.plan_helpers import EMBED, HEAD, names, planned, soup, tensors

CAUSAL = {"architectures": ["LlamaForCausalLM"]}
REWARD = {"architectures": ["LlamaForSequenceClassification"], TIED: False}


def copied(changed_rows=(), seed=0, vocabulary=500):
    values = tensors(vocabulary=vocabulary, seed=seed)
    values[HEAD] = values[EMBED].copy()
    values[HEAD][list(changed_rows)] += 1
    return values


def reward(seed=0, **more):
    return {**tensors(head=False, seed=seed), "score.weight": np.full((1, 4), seed, np.float32), **more}


@pytest.mark.parametrize("config", [{}, {TIED: True}, {TIED: False}, {"model_type": "gemma2"}], ids=str)
@pytest.mark.parametrize("rows", [(0,), (499,), (251, 253)], ids=str)
def test_a_head_with_few_trained_rows_stays_and_the_config_unties_it(save, config, rows):
    a = save("a", copied(rows), **config)
    result = planned(soup("a"), a=a)
    assert HEAD in names(result)
    silent_llama = TIED not in config and "model_type" not in config
    assert result.config_changes.get(TIED, False) is False
    assert (TIED in result.config_changes) == (not silent_llama and config.get(TIED) is not False)


@pytest.mark.parametrize("config, kept", [({}, True), ({TIED: False}, True), ({TIED: True}, False),
                                          ({"model_type": "gemma2"}, False)], ids=str)  # fmt: skip
def test_a_copied_head_is_tied_where_the_config_or_its_class_says_so(save, config, kept):
    a = save("a", copied(), **config)
    result = planned(soup("a"), a=a)
    assert (HEAD in names(result)) == kept and result.config_changes == {}
    assert any("counts as tied" in note for note in result.notes) != kept


def test_rows_are_compared_across_blocks(save, monkeypatch):
    monkeypatch.setattr(heads, "BOUNCE_BYTES", 4096)
    for name, rows in (("a", ()), ("b", (499,))):
        model = save(name, copied(rows), **{TIED: True})
        assert (HEAD in names(planned(soup(name), **{name: model}))) == bool(rows)


@pytest.mark.parametrize("others", [("whole",), ()], ids=["beside a whole model", "alone"])
@pytest.mark.parametrize("config", [{**CAUSAL, TIED: False}, CAUSAL, {TIED: False}], ids=str)
def test_a_lost_head_is_refused(save, config, others):
    models = {"lost": save("lost", tensors(head=False), **config), "whole": save("whole", tensors(seed=1), **CAUSAL)}
    for recipe in (soup("lost", *others), soup(*others, "lost")):
        with pytest.raises(UserError, match=rf"model 'lost': .*{TIED}.*no lm_head.weight: the head was lost"):
            planned(recipe, **models)


@pytest.mark.parametrize("config", [{TIED: True}, {"model_type": "gemma2"}, {"text_config": {TIED: True}}], ids=str)
def test_a_tied_model_without_a_head_is_merged_with_its_embedding(save, config):
    tied, whole = save("tied", tensors(head=False), **CAUSAL, **config), save("whole", tensors(seed=1), **CAUSAL)
    head = planned(soup("whole", "tied"), tied=tied, whole=whole).nodes[-1]
    assert head.name == HEAD and head.files() == [("whole", HEAD), ("tied", EMBED)]
    assert planned(soup("tied"), tied=tied).config_changes == {}


@pytest.mark.parametrize("method, branches, kept", [("linear", ("a", "reward", "b"), ["a", "b"]),
                                                    ("task_arithmetic", ("reward", "a"), ["base", "a"]),
                                                    ("task_arithmetic", ("reward",), ["base"]),
                                                    ("slerp", ("reward",), ["base"])])  # fmt: skip
def test_a_reward_models_embedding_never_goes_into_a_language_head(save, method, branches, kept):
    models = {name: save(name, tensors(seed=i), **CAUSAL) for i, name in enumerate(("base", "a", "b"))}
    models["reward"] = save("reward", reward(), **REWARD)
    base = {} if method == "linear" else {"base_model": "base"}
    weights = {"parameters": {"weight": 0.3}} if method == "linear" else {}
    result = planned({"merge_method": method, "models": list(branches), **base, **weights}, **models)
    head = next(node for node in result.nodes if node.name == HEAD)
    assert [model for model, _ in head.files()] == kept
    assert any(HEAD in note and "'reward' has none" in note for note in result.notes)
    assert any("'reward' holds 1 tensor (score.weight)" in note for note in result.notes)
    up = next(node for node in result.nodes if "up_proj" in node.name)
    assert "reward" in dict(up.files())


def test_a_reward_model_as_the_base_keeps_its_own_head_and_gets_no_other(save):
    models = {"base": save("base", reward(1), **REWARD), "a": save("a", tensors(seed=2), **CAUSAL)}
    result = planned({"merge_method": "task_arithmetic", "base_model": "base", "models": ["a"]}, **models)
    assert HEAD not in names(result) and result.config_changes == {}
    (score,) = [node for node in result.nodes if node.name == "score.weight"]
    assert score.files() == [("base", "score.weight")]
    two = {"base": models["base"], "b": save("b", reward(3), **REWARD)}
    score = planned(soup("base", "b"), **two).nodes[-1]
    assert score.name == "score.weight" and [model for model, _ in score.files()] == ["base", "b"]


@pytest.mark.parametrize("branches", [["reward", "a"], ["reward"]], ids=str)
def test_what_is_written_of_a_head_beside_a_reward_model(save, branches):
    values = {name: tensors(seed=i) for i, name in enumerate(("base", "a"))}
    for name in values:
        save(name, values[name], **CAUSAL)
    save("reward", reward(), **REWARD)
    report = merge({"merge_method": "task_arithmetic", "base_model": "base", "models": branches}, "out")
    np.testing.assert_allclose(
        open_checkpoint("out").read(HEAD), values[branches[-1] if "a" in branches else "base"][HEAD], atol=1e-6
    )
    assert report["total"]["merged"]["models"].keys() == set(branches)


@pytest.mark.parametrize("config", [CAUSAL, {}], ids=str)
def test_a_head_of_values_beside_the_language_head_stays_the_donors(save, config):
    values = tensors(seed=3) | {f"v_head.summary.{part}": np.ones((1, 4), np.float32) for part in ("weight", "bias")}
    models = {"critic": save("critic", values, **config), "a": save("a", tensors(), **config)}
    result = planned(soup("critic", "a"), **models)
    files = {node.name: [model for model, _ in node.files()] for node in result.nodes}
    assert files["v_head.summary.weight"] == ["critic"] and files[HEAD] == ["critic", "a"]
    assert "v_head.summary.weight" not in names(planned(soup("a", "critic"), **models))


@pytest.mark.parametrize(
    "name", ["v_head", "cls_head", "value_head", "rm_head", "reward_layer", "score", "regression_layer"]
)
def test_names_of_task_heads(name):
    assert is_task_head(f"{name}.weight") and is_task_head(f"model.{name}.summary.weight")


@pytest.mark.parametrize("name", ["cross_attn.v_proj", "attn.value_proj", "value_layer", "vs_proj", "cls_layer"])
def test_values_of_attention_are_no_task_heads(name):
    assert not is_task_head(f"multi_modal_projector.{name}.weight")


def test_embedding_models_have_no_head_to_lose(save):
    config = {"architectures": ["LlamaModel"], TIED: False}
    models = {name: save(name, tensors(head=False, seed=i), **config) for i, name in enumerate("ab")}
    result = planned(soup("a", "b"), **models)
    assert HEAD not in names(result) and result.config_changes == {} and result.notes == ()


def stacked(*models):
    return {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": name, "layer_range": [0, 2]}]} for name in models
    ]}  # fmt: skip


def test_a_tied_model_stacked_on_an_untied_one_gets_its_embedding_as_head(save):
    tied, whole = save("tied", tensors(head=False), **CAUSAL, **{TIED: True}), save("whole", tensors(seed=1), **CAUSAL)
    head = planned(stacked("whole", "tied"), tied=tied, whole=whole).nodes[-1]
    assert head.name == HEAD and head.files() == [("tied", EMBED)]
    result = planned(stacked("tied", "whole"), tied=tied, whole=whole)
    assert result.nodes[-1].files() == [("whole", HEAD)] and result.config_changes[TIED] is False


def test_a_stack_of_tied_models_says_whose_embedding_is_the_head(save):
    models = {name: save(name, tensors(head=False, seed=i), **CAUSAL, **{TIED: True}) for i, name in enumerate("ab")}
    result = planned(stacked("a", "b"), **models)
    assert HEAD not in names(result)
    assert any("the embedding of 'a' is the head behind the last layers" in note for note in result.notes)
    assert not any("is the head" in note for note in planned(stacked("a", "a"), **models).notes)


def test_families_that_need_no_look_up_tie_nothing_by_default():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert not [family for family in UNTIED_FAMILIES if CONFIG_MAPPING[family]().tie_word_embeddings]
    assert all(CONFIG_MAPPING[family]().tie_word_embeddings for family in TIED_FAMILIES)
    assert is_tied_by_default({"model_type": "starcoder2"}) and not is_tied_by_default({"model_type": "nothing known"})


# Names of Qwen2.5-Math-PRM, ArmoRM and critics of trainers; the last two have no form that is known by name.
REWARD_HEADS = [
    ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"),
    ("regression_layer.weight", "gating.layers.0.weight", "gating.temperature"), ("v_head.summary.weight",),
    ("reward_head.0.weight", "reward_head.2.weight"), ("rm_head.weight",), ("scorer.weight",), ("value_head.weight",),
    ("token_classifier.weight",), ("dense.weight", "linear.weight"), ("gate.layers.0.weight", "gate.layers.1.weight"),
]  # fmt: skip


@pytest.mark.parametrize("head", REWARD_HEADS, ids=lambda head: head[0])
@pytest.mark.parametrize("name", ["LlamaForProcessRewardModel", "LlamaForSequenceClassification"])
def test_a_language_model_merged_into_a_reward_model_leaves_its_head_as_it_is(save, head, name):
    values = tensors(head=False) | {part: np.ones((2, 4), np.float32) for part in head}
    models = {"reward": save("reward", values, architectures=[name], **{TIED: False}, num_hidden_layers=4)}
    models |= {"a": save("a", tensors(seed=1), **CAUSAL, num_hidden_layers=4)}
    result = planned({"merge_method": "task_arithmetic", "base_model": "reward", "models": ["a"]}, **models)
    files = {node.name: node.files() for node in result.nodes}
    assert files.keys() == values.keys() and result.config_changes == {}
    assert all(files[part] == [("reward", part)] for part in head)
    assert files["model.norm.weight"] == [("reward", "model.norm.weight"), ("a", "model.norm.weight")]
    # The other way round the language model's head stays.
    result = planned({"merge_method": "task_arithmetic", "base_model": "a", "models": ["reward"]}, **models)
    files = {node.name: node.files() for node in result.nodes}
    assert files[HEAD] == [("a", HEAD)] and files.keys().isdisjoint(head)


def test_modules_of_a_reward_head_are_no_stack_of_layers(save):
    values = reward(1, **{f"score.{i}.weight": np.ones((4, 4), np.float32) for i in (0, 2)})
    del values["score.weight"]
    models = {"reward": save("reward", values, **REWARD), "a": save("a", tensors(), **CAUSAL)}
    result = planned(stacked("a", "reward"), **models)
    assert {"score.0.weight", "score.2.weight"} < set(names(result)) and HEAD not in names(result)
    assert sum("up_proj" in name for name in names(result)) == 4


def test_a_final_norm_that_a_language_model_lacks_is_no_head(save):
    lacking = tensors()
    del lacking["model.norm.weight"]
    models = {"reward": save("reward", reward(1), **REWARD), "a": save("a", lacking, **CAUSAL)}
    with pytest.raises(UserError, match=r"model 'a' lacks 1 tensor \(model\.norm\.weight\)"):
        planned(soup("reward", "a"), **models)


# (embedding, head) as InternLM2, InternVL2, RWKV-4, OLMo, GPT-J's Phi, ModernBERT, T5Gemma, ChatGLM, Megatron, XLM,
# XLNet, OpenAI GPT, persimmon, ELECTRA, GIT, TrOCR, mamba_ssm name them; the last one is nobody's.
NAMED_OTHERWISE = [
    ("model.tok_embeddings.weight", "output.weight"),
    ("language_model.model.tok_embeddings.weight", "language_model.output.weight"),
    ("rwkv.embeddings.weight", "head.weight"),
    ("emb.weight", "head.weight"),
    ("model.transformer.wte.weight", "model.transformer.ff_out.weight"),
    ("transformer.embd.wte.weight", "lm_head.linear.weight"),
    ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
    ("model.decoder.embed_tokens.weight", "lm_head.out_proj.weight"),
    ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"),
    ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"),
    ("transformer.embeddings.weight", "pred_layer.proj.weight"),
    ("transformer.word_embedding.weight", "lm_loss.weight"),
    ("transformer.tokens_embed.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "word_embeddings_for_head.weight"),
    ("electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "output_projection.weight"),
    ("backbone.embedding.weight", "lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    ("model.embed_tokens.weight", "model.to_tokens.weight"),
]


def named(embedding, head, seed=0, **sizes):
    names = {EMBED: embedding, HEAD: head}
    values = tensors(seed=seed, **sizes) | {"model.dense.weight": np.ones((4, 4), np.float32)}
    return {names.get(name, name): value for name, value in values.items()}


@pytest.mark.parametrize(("embedding", "head"), NAMED_OTHERWISE, ids=str)
@pytest.mark.parametrize("said", [False, None], ids=["untied", "silent"])
def test_heads_by_any_name_are_heads(save, embedding, head, said):
    config = CAUSAL if said is None else {**CAUSAL, TIED: said}
    models = {name: save(name, named(embedding, head, seed=i), **config) for i, name in enumerate("ab")}
    result = planned(soup("a", "b"), **models)
    assert head in names(result) and not result.notes
    # Beside a reward model, and of a model with other rows of tokens: both go by what is a head.
    rewards = {name: value for name, value in named(embedding, head, seed=2).items() if name != head}
    models["reward"] = save("reward", rewards | {"score.weight": np.ones((1, 4), np.float32)}, **REWARD)
    models["wide"] = save("wide", named(embedding, head, seed=3, vocabulary=9), **config)
    result = planned(soup("a", "reward", "wide"), **models)
    (node,) = [node for node in result.nodes if node.name == head]
    assert node.shape == (6, 4) and [model for model, _ in node.files()] == ["a", "wide"]
    franken = planned(stacked("reward", "a"), **models)
    assert next(node for node in franken.nodes if node.name == head).files() == [("a", head)]


@pytest.mark.parametrize(("embedding", "head"), NAMED_OTHERWISE, ids=str)
def test_a_tied_models_embedding_goes_into_a_head_of_any_name(save, embedding, head):
    tied = {name: value for name, value in named(embedding, head).items() if name != head}
    models = {"tied": save("tied", tied, **CAUSAL, **{TIED: True}), "a": save("a", named(embedding, head, 1), **CAUSAL)}
    result = planned(soup("tied", "a"), **models)
    node = next(node for node in result.nodes if node.name == head)
    assert node.files() == [("tied", embedding), ("a", head)] and result.config_changes[TIED] is False
    lost = save("lost", tied, **CAUSAL, **{TIED: False})
    with pytest.raises(UserError, match="the head was lost"):
        planned(soup("lost", "a"), lost=lost, a=models["a"])


def test_a_matrix_of_another_module_is_no_head(save):
    # Position tables, other senses' encoders and matrices of layers may have the embedding's shape.
    others = ("visual.out.weight", "wpe.weight", "model.layers.0.mlp.out.weight", "score.weight")
    values = tensors(head=False) | {name: np.ones((6, 4), np.float32) for name in others}
    a = save("a", values, **CAUSAL, **{TIED: True})
    result = planned(soup("a"), a=a)
    assert result.config_changes == {}
    assert heads.heads_by_shape(a.tensors) == set()


@pytest.mark.parametrize("bias", ["lm_head.bias", "decoder.bias", "cls.predictions.bias"])
def test_the_bias_of_a_tied_head_does_not_untie_it(save, bias):
    values = {name: tensors(head=False, seed=i) | {bias: np.ones(6, np.float32)} for i, name in enumerate("ab")}
    config = {"architectures": ["LlamaForMaskedLM"], TIED: True}
    result = planned(soup("a", "b"), **{name: save(name, values[name], **config) for name in values})
    assert result.config_changes == {} and bias in names(result)
    wide = save("wide", tensors(head=False, vocabulary=9) | {bias: np.ones(9, np.float32)}, **config)
    result = planned(soup("a", "wide"), a=open_checkpoint("a"), wide=wide)
    assert next(node for node in result.nodes if node.name == bias).shape == (6,)


def bare(values):
    return {name.removeprefix("model."): value for name, value in values.items()}


SIGNS = ["modules.json", "config_sentence_transformers.json", "1_Pooling", "bare names", "bare VL names"]


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("said", [False, None], ids=["untied", "silent"])
def test_embedding_models_whose_config_names_a_class_with_a_head(save, sign, said):
    config = CAUSAL if said is None else {**CAUSAL, TIED: said}
    models = {}
    for i, name in enumerate("ab"):
        values = tensors(head=False, seed=i)
        if sign.startswith("bare"):
            prefix = "language_model." if "VL" in sign else ""
            values = {prefix + key: value for key, value in bare(values).items()}
        models[name] = save(name, values, **config)
        if sign == "1_Pooling":
            (models[name].directory / sign).mkdir()
        elif "." in sign:
            (models[name].directory / sign).write_text("[]")
    result = planned(soup("a", "b"), **models)
    assert not any(map(heads.is_head, names(result))) and result.config_changes == {}
    assert all("counts as a model of embeddings" in note for note in result.notes)
    assert len(result.notes) == (2 if sign.startswith("bare") else 0)
    # Its embedding is no head beside a language model, whose own is copied.
    models["whole"] = save("whole", tensors(seed=3), **CAUSAL, **{TIED: False})
    result = planned(soup("a", "whole", base_model="whole"), **models)
    assert next(node for node in result.nodes if node.name == HEAD).files() == [("whole", HEAD)]


def test_bare_names_of_a_tied_class_are_a_language_models(save):
    values = {"wte.weight": np.ones((6, 4), np.float32), "h.0.w": np.ones((4, 4), np.float32)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    models = {name: save(name, values, **config) for name in "ab"}
    assert planned(soup("a", "b"), **models).notes == ()
    whole = save("whole", {**values, "lm_head.weight": np.ones((6, 4), np.float32)}, **config, **{TIED: False})
    head = planned(soup("whole", "a"), whole=whole, a=models["a"]).nodes[-1]
    assert head.files() == [("whole", HEAD), ("a", "wte.weight")]


AVERAGES = [("linear", {}), ("linear", {"normalize": False}), ("multislerp", {}), ("karcher", {}), ("nuslerp", {}),
            ("multislerp", {"normalize_weights": False})]  # fmt: skip


@pytest.mark.parametrize(("method", "settings"), AVERAGES, ids=str)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75), (0, 1)], ids=str)
def test_the_only_head_among_averaged_models_is_copied(save, method, settings, weights):
    head = tensors(seed=1)[HEAD]
    save("a", tensors(seed=1), **CAUSAL), save("reward", reward(), **REWARD)
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in zip(("a", "reward"), weights, strict=True)]
    merge({"merge_method": method, "models": entries, "parameters": settings}, "out")
    np.testing.assert_array_equal(open_checkpoint("out").read(HEAD), head)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_heads_that_are_left_keep_the_sum_of_the_weights(save, normalize):
    values = {name: tensors(seed=i) for i, name in enumerate("ab")}
    models = {name: save(name, values[name], **CAUSAL) for name in values}
    models["reward"] = save("reward", reward(), **REWARD)
    weights = {"a": 0.3, "b": 0.1, "reward": 0.4}
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in weights.items()]
    recipe = {"merge_method": "linear", "models": entries, "parameters": {"normalize": normalize}}
    head = next(node for node in planned(recipe, **models).nodes if node.name == HEAD)
    merge(recipe, "out")
    expected = (0.75 * values["a"][HEAD] + 0.25 * values["b"][HEAD]) * (1 if normalize else 0.8)
    np.testing.assert_allclose(open_checkpoint("out").read(HEAD), expected, atol=1e-6)
    assert list(head.inputs) == ["a", "b"]


@pytest.mark.parametrize("left", [(0, 0), (1, -1)], ids=str)
@pytest.mark.parametrize("method, settings", [("linear", {"normalize": False}), ("linear", {}), ("karcher", {}),
                                              ("task_arithmetic", {"normalize": True})], ids=str)  # fmt: skip
def test_heads_whose_weights_cancel_without_the_others_are_the_donors(save, left, method, settings):
    models = {name: save(name, tensors(seed=i), **CAUSAL) for i, name in enumerate(("base", "a", "b"))}
    models["reward"] = save("reward", reward(), **REWARD)
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in zip("ab", left, strict=True)]
    entries.append({"model": "reward", "parameters": {"weight": 1}})
    recipe = {"merge_method": method, "models": entries, "parameters": settings, "base_model": "base"}
    if method == "karcher" and -1 in left:
        with pytest.raises(UserError, match="weights of at least 0"):
            planned(recipe, **models)
        return
    head = next(node for node in planned(recipe, **models).nodes if node.name == HEAD)
    assert head.files() == [("base", HEAD)]
    merge(recipe, "out")
    np.testing.assert_array_equal(open_checkpoint("out").read(HEAD), tensors(seed=0)[HEAD])


def test_a_filter_for_a_head_that_is_copied_has_had_its_say(save):
    models = {"a": save("a", tensors(seed=1), **CAUSAL), "reward": save("reward", reward(), **REWARD)}
    weight = [{"filter": "lm_head", "value": 0.5}, {"value": 1}]
    result = planned(soup("a", "reward", parameters={"weight": weight}), **models)
    assert not any("decides for no tensor" in note for note in result.notes)


@pytest.mark.parametrize("said", [False, None], ids=["untied", "silent"])
@pytest.mark.parametrize("step", [False, True], ids=["slices", "a step of slices"])
def test_the_config_follows_the_head_that_slices_end_in(save, said, step):
    labels = {"id2label": {"0": "bad", "1": "good"}, "num_labels": 2}
    tied = {} if said is None else {TIED: said}
    models = {"a": save("a", tensors(), **CAUSAL, **tied), "reward": save("reward", reward(), **REWARD, **labels)}
    recipes = [stacked("a", "reward"), stacked("reward", "a")]
    if step:
        copy = {"merge_method": "passthrough", "models": ["mid"]}
        recipes = [{"steps": [{**recipe, "name": "mid"}, copy]} for recipe in recipes]
    result = planned(recipes[0], **models)
    assert "score.weight" in names(result) and HEAD not in names(result)
    assert result.config_changes == {"architectures": REWARD["architectures"], **labels}
    assert any("ends as 'reward' does" in note for note in result.notes)
    result = planned(recipes[1], **models)
    assert HEAD in names(result) and "score.weight" not in names(result)
    assert result.config_changes["architectures"] == CAUSAL["architectures"]
    merge(recipes[1], "out")
    assert read_hf_config(open_checkpoint("out").directory)[TIED] is False


def test_only_a_tied_model_makes_the_result_of_slices_tied(save):
    models = {"a": save("a", tensors(), **CAUSAL, **{TIED: False})}
    models["embedder"] = save("embedder", tensors(head=False, seed=1), architectures=["LlamaModel"])
    result = planned(stacked("a", "embedder"), **models)
    assert HEAD not in names(result) and result.config_changes == {"architectures": ["LlamaModel"]}
