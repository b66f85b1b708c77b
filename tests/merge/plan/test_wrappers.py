"""Names that training wrappers add to those of tensors, which no class of a model knows."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from tests.merge.plan_helpers import names, planned, soup, tensors


def outside(prefix):
    return lambda name: prefix + name


def inside(part):
    return lambda name: name.replace(".mlp.", f".{part}mlp.").replace(".self_attn.", f".{part}self_attn.")


WRAPPED = {
    "compiled": (outside("_orig_mod."), "'_orig_mod.'"),
    "in data parallel": (outside("module."), "'module.'"),
    "of PEFT": (outside("base_model.model."), "'base_model.model.'"),
    "several": (outside("_orig_mod.module.base_model.model._fsdp_wrapped_module."), "'_orig_mod.'"),
    "checkpointed layers": (inside("_checkpoint_wrapped_module."), "'_checkpoint_wrapped_module.'"),
    "sharded layers": (inside("_fsdp_wrapped_module."), "'_fsdp_wrapped_module.'"),
    "compiled layers, in data parallel": (lambda name: "module." + inside("_orig_mod.")(name), "'module.'"),
    "of an unknown wrapper": (outside("policy."), "'policy.'"),
    "of unknown wrappers": (outside("state_dict.actor."), "'state_dict.actor.'"),
}
LISTS = [("wrapped", "plain"), ("plain", "wrapped"), ("wrapped", "other"), ("wrapped",)]


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("listed", LISTS)
def test_wrappers_names_are_left_out_and_named(save, form, listed):
    wrap, part = WRAPPED[form]
    for seed, model in enumerate(("plain", "wrapped", "other")):
        values = tensors(seed=seed)
        save(model, values if model == "plain" else {wrap(name): value for name, value in values.items()})
    notes = []
    method = {} if len(listed) > 1 else {"merge_method": "passthrough"}
    merge({**soup(*listed), **method, "dtype": "float32"}, "out", log=notes.append)
    merged = load_file("out/model.safetensors")
    assert merged.keys() == tensors().keys()
    models = [tensors(seed=("plain", "wrapped", "other").index(model)) for model in listed]
    for name in merged:
        mean = np.mean([values[name].astype(np.float64) for values in models], axis=0)
        np.testing.assert_allclose(merged[name], mean, atol=1e-7, err_msg=name)
    for model in listed:
        assert (model == "plain") == (not any(f"model '{model}'" in note and part in note for note in notes))
    assert not any("otherwise" in note or "not merged" in note for note in notes)


@pytest.mark.parametrize("config", [{}, {"model_type": "unknown", "tie_word_embeddings": False}])
def test_a_prefix_that_classes_have_stays(save, config):
    """A tied model, a class with its modules inside of another, and parts that only one model has."""
    tied = {name: value for name, value in tensors().items() if name != "lm_head.weight"}
    for number, values in enumerate(
        (tied, {f"transformer.{name.removeprefix('model.')}": value for name, value in tied.items()})
    ):
        result = planned(soup(f"m{number}"), **{f"m{number}": save(f"m{number}", values, **config | {
            "tie_word_embeddings": True})})  # fmt: skip
        assert names(result) == list(values) and result.notes == ()
    if config:  # of a class that may have the prefix, beside models with the same
        values = {f"llm.{name}": value for name, value in tensors().items()}
        result = planned(soup("a", "b"), a=save("a", values, **config), b=save("b", values, **config))
        assert names(result) == list(values)


def test_a_class_inside_of_its_own_prefix(save):
    twice = {f"model.{name}": value for name, value in tensors().items()}
    result = planned(soup("a", "b"), a=save("a", twice), b=save("b", tensors(seed=1)))
    assert names(result) == list(tensors()) and "'model.', a wrapper's" in result.notes[0]


def test_two_copies_of_a_model_keep_their_names(save):
    both = {**tensors(), **{f"module.{name}": value for name, value in tensors(seed=1).items()}}
    assert names(planned(soup("a"), a=save("a", both))) == list(both)
