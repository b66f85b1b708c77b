"""Layers that a model lost as it was saved, and configs that say another number of layers than the weights hold."""

import numpy as np
import pytest

from bmjax.config import UserError
from tests.merge.plan_helpers import names, planned, soup, tensors

ONES = np.ones((4, 4), np.float32)
STACKS = ["model.layers", "model.language_model.layers", "transformer.h", "bert.encoder.layer", "transformer.blocks"]


def without(number, seed=0, layers=4, stack="model.layers"):
    named = {name.replace("model.layers", stack): value for name, value in tensors(layers, seed=seed).items()}
    return {name: value for name, value in named.items() if f"{stack}.{number}." not in name}


def stacked(*parts):
    slices = [{"sources": [{"model": model, "layer_range": list(range_)}]} for model, range_ in parts]
    return {"merge_method": "passthrough", "slices": slices}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 4}], ids=["silent", "said"])
def test_a_layer_that_was_lost_is_refused(save, stack, number, config):
    models = {name: save(name, without(number, i, stack=stack), **config) for i, name in enumerate("ab")}
    models["whole"] = save("whole", without(None, 2, stack=stack), **config)
    step = {**soup("a", "b"), "name": "mid"}
    ties = {"merge_method": "ties", "base_model": "a", "models": ["b"], "parameters": {"density": 0.5}}
    for recipe in (soup("a", "b"), soup("a", "whole"), {"steps": [step, soup("mid", "whole")]}, ties):
        with pytest.raises(UserError, match=rf"model 'a': .* no tensor of layer {number} of {stack}, whose last is 3"):
            planned(recipe, **models)


def test_a_layer_is_lost_where_the_config_counts_it_though_no_two_are_alike(save):
    values = {f"model.layers.{i}.part_{i}.weight": ONES for i in (0, 1, 3)}
    with pytest.raises(UserError, match=r"no tensor of layer 2 of model\.layers"):
        planned(soup("a"), a=save("a", values, num_hidden_layers=4))
    assert names(planned(soup("b"), b=save("b", values))) == list(values)


def test_slices_may_not_go_over_a_layer_that_was_lost_and_may_leave_it_out(save):
    a = save("a", without(2, layers=6))
    with pytest.raises(UserError, match=r"model 'a': .* no tensor of layer 2 of"):
        planned(stacked(("a", (0, 2)), ("a", (1, 4))), a=a)
    result = planned(stacked(("a", (0, 2)), ("a", (3, 6))), a=a)
    assert sum("up_proj" in name for name in names(result)) == 5


@pytest.mark.parametrize("part", ["encoder.block", "decoder.block", "model.decoder.layers"])
def test_a_layer_that_an_encoder_or_a_decoder_lost_is_refused(save, part):
    prefix = "model." if part.startswith("model") else ""
    kind = part.rpartition(".")[2]
    all_names = [f"{prefix}{side}.{kind}.{i}.wi.weight" for side in ("encoder", "decoder") for i in range(3)]
    values = {name: ONES for name in [f"{prefix}shared.weight", *all_names] if not name.startswith(f"{part}.1.")}
    with pytest.raises(UserError, match=rf"no tensor of layer 1 of {part}, whose last is 2"):
        planned(soup("a"), a=save("a", values, model_type="t5", tie_word_embeddings=True))


def codec(stack):
    """As EnCodec and Mimi: convolutions of several widths and blocks, with activations between them."""
    modules = {"0.conv": (8, 4), "1.lstm": (16, 4), "3.conv": (8, 8), "4.block.1.conv": (4, 4), "6.conv": (4, 8)}
    return {f"{stack}.{name}.weight": np.ones(shape, np.float32) for name, shape in modules.items()}


@pytest.mark.parametrize("values, config", [
    (codec("decoder.layers") | codec("encoder.layers"), {"model_type": "encodec"}),
    (codec("layers"), {}),
    ({f"decoder.layers.{i}.weight": ONES for i in (0, 2, 4)}, {}),
    ({"net.0.weight": ONES, "net.2.weight": ONES}, {}),
    (without(2), {"block_configs": [{}] * 4}),
    (without(0, layers=5), {"num_hidden_layers": 4}),
    (tensors() | {f"visual.blocks.{i}.w": ONES for i in (0, 2)}, {}),
], ids=["two codecs", "a codec", "alike modules", "modules in a row", "layers without tensors", "numbered from 1",
        "another stack"])  # fmt: skip
def test_numbers_that_are_left_out_on_purpose(save, values, config):
    result = planned(soup("a"), a=save("a", values, **config))
    assert names(result) == list(values) and result.notes == ()


def test_a_config_of_more_layers_than_the_weights_hold_is_refused(save):
    models = {name: save(name, tensors(seed=i), num_hidden_layers=6) for i, name in enumerate("ab")}
    with pytest.raises(
        UserError, match=r"model 'a': its config\.json says 6 layers, its weights hold 4 in model\.layers"
    ):
        planned(soup("a", "b"), **models)


@pytest.mark.parametrize(
    "said, words", [(6, "its loaders make the others at random"), (3, "its loaders leave some out")]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_config_of_other_layers_than_the_weights_hold_is_noted(save, said, words, nested):
    count = {"text_config": {"num_hidden_layers": said}} if nested else {"num_hidden_layers": said}
    a = save("a", tensors(), **count, model_type="unknown", tie_word_embeddings=False)
    (note,) = planned(soup("a"), a=a).notes
    assert note == f"config.json of 'a' says {said} layers, its weights hold 4 in model.layers: {words}"
    # A stack of its layers has their number in its config.
    result = planned(stacked(("a", (0, 4)), ("a", (3, 4))), a=a)
    assert result.config_changes == ({"text_config": {"num_hidden_layers": 5}} if nested else {"num_hidden_layers": 5})
    assert list(result.notes) == [note]


def test_a_number_of_layers_that_its_class_computes_is_no_count_of_the_stack(save):
    values = {f"efficientnet.encoder.blocks.{i}.expansion.conv.weight": ONES for i in range(7)}
    a = save("a", values, model_type="efficientnet", num_hidden_layers=64, num_block_repeats=[1, 2, 2, 3, 3, 4, 1])
    assert planned(soup("a"), a=a).notes == ()


def lacking(*suffixes, layers=6, seed=0):
    return {name: value for name, value in tensors(layers, seed=seed).items() if not name.endswith(suffixes)}


def test_tensors_that_a_layer_lost_in_all_models_are_noted(save):
    a, b = (save(name, lacking("2.mlp.up_proj.weight", seed=i)) for i, name in enumerate("ab"))
    (note,) = planned(soup("a", "b"), a=a, b=b).notes
    assert note == (
        "models 'a' and 'b': lost 1 tensor (model.layers.2.mlp.up_proj.weight): 5 of 6 layers have it, so loaders "
        "will make it at random"
    )


@pytest.mark.parametrize("values, config", [
    (lacking("0.mlp.up_proj.weight"), {}),
    (lacking("5.mlp.up_proj.weight"), {}),
    (lacking("2.mlp.up_proj.weight", "3.mlp.up_proj.weight"), {}),
    (lacking("2.mlp.up_proj.weight") | {"model.layers.2.mlp.experts.0.weight": ONES}, {}),
    (lacking("2.mlp.up_proj.weight"), {"block_configs": [{}] * 6}),
], ids=["first", "last", "two of a kind", "another kind", "blocks that the config describes"])  # fmt: skip
def test_layers_of_fewer_tensors_on_purpose(save, values, config):
    assert planned(soup("a"), a=save("a", values, **config)).notes == ()
