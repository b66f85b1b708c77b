"""Layers that share a block stand in a stack as they do in their model, or the stack is refused."""

import numpy as np
import pytest

from bmjax.config import UserError
from tests.merge.plan_helpers import names, planned

ONES = np.ones((4, 4), np.float32)
SHARING = (1, 3, 5)  # of 6 layers


def model(block, adapters):
    values = {"model.embed_tokens.weight": ONES}
    for i in range(6):
        hybrid = i in SHARING
        values[f"model.layers.{i}.{'mamba_decoder.' * hybrid}mamba.in_proj.weight"] = ONES
        if hybrid:
            values[f"model.layers.{i}.linear.weight"] = ONES
    values[f"model.layers.1.{block}.self_attn.q_proj.weight"] = ONES
    if adapters:
        values |= {f"model.layers.1.{block}.gate_up_proj_adapter_list.{k}.0.weight": ONES for k in range(3)}
    return values


def stack(*ranges):
    slices = [{"sources": [{"model": "a", "layer_range": list(part)}]} for part in ranges]
    return {"merge_method": "passthrough", "slices": slices}


@pytest.mark.parametrize("ranges", [[(0, 4), (2, 6)], [(2, 6)], [(0, 2), (4, 6)], [(2, 6), (0, 2)]], ids=str)
def test_a_shared_block_with_adapters_is_refused_in_another_order(save, ranges):
    a = save("a", model("shared_transformer", True), num_hidden_layers=6)
    with pytest.raises(
        UserError, match=r"model 'a': its layers 1, 3, 5 share a block.* an adapter for each.*at random"
    ):
        planned(stack(*ranges), a=a)


@pytest.mark.parametrize("ranges", [[(0, 4)], [(0, 5), (4, 6)], [(0, 1), (0, 6)], [(2, 3)]], ids=str)
def test_layers_that_keep_their_place_among_those_that_share_are_taken(save, ranges):
    a = save("a", model("shared_transformer", True), num_hidden_layers=6)
    assert names(planned(stack(*ranges), a=a))


def test_a_shared_block_without_adapters_needs_the_layer_that_has_it(save):
    a = save("a", model("shared_transf", False), num_hidden_layers=6)
    assert names(planned(stack((0, 4), (2, 6)), a=a))
    with pytest.raises(UserError, match=r"model 'a': its layers 1, 3, 5 share a block"):
        planned(stack((2, 6)), a=a)


def test_layers_of_two_models_that_share_blocks_are_refused(save):
    models = {name: save(name, model("shared_transf", False), num_hidden_layers=6) for name in "ab"}
    slices = [{"sources": [{"model": name, "layer_range": part}]} for name, part in (("a", [0, 3]), ("b", [3, 6]))]
    with pytest.raises(UserError, match="share a block"):
        planned({"merge_method": "passthrough", "slices": slices}, **models)


def test_a_whole_model_with_a_shared_block_is_merged(save):
    models = {name: save(name, model("shared_transformer", True), num_hidden_layers=6) for name in "ab"}
    assert names(planned({"merge_method": "linear", "models": ["a", "b"]}, **models))
