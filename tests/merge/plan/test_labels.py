"""Classifiers whose classes have the same labels in another order, others, or none."""

import numpy as np
import pytest

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from bmjax.merge.plan.labels import labels_of
from bmjax.model.config import read_hf_config
from tests.merge.plan_helpers import planned, soup, tensors

CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False}
HEADS = ["score.weight", "classifier.weight", "classifier.out_proj.weight", "score.0.weight", "head.fc.weight"]
GENERIC = ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.fixture
def classifier(save):
    """Makes a classifier whose head's row of a class, and entry of the bias, is `values` of its label."""

    def model(name, labels, values, head="score.weight", **more):
        column = np.array([values[label] for label in labels], np.float32)
        stored = tensors(head=False) | {head: np.repeat(column[:, None], 4, 1)}
        stored[head.removesuffix("weight") + "bias"] = column
        config = {"id2label": {str(i): label for i, label in enumerate(labels)}}
        return save(name, stored, **CLASSIFIER | config | more)

    return model


@pytest.mark.parametrize("labels", [["no", "yes", "so"], ["so", "no", "yes"], ["No", "YES", "so "]], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_rows_of_classes_are_put_in_the_donors_order(classifier, tmp_path, head, labels):
    classifier("a", ["yes", "no", "so"], {"yes": 0, "no": 1, "so": 2}, head)
    classifier("b", labels, {label: {"y": 4, "n": 5, "s": 6}[label[0].lower()] for label in labels}, head)
    notes = []
    merge(soup("a", "b"), "out", log=notes.append)
    result = open_checkpoint(tmp_path / "out")
    assert result.read(head)[:, 0].tolist() == result.read(head.removesuffix("weight") + "bias").tolist() == [2, 3, 4]
    assert read_hf_config(tmp_path / "out")["id2label"] == {"0": "yes", "1": "no", "2": "so"}
    told = [note for note in notes if "in another order" in note]
    assert not any("differs from 'a' in" in note for note in notes)
    assert len(told) == 1 and "(yes, no, so)" in told[0] and head in told[0]


@pytest.mark.parametrize("labels", [["yes", "no", "maybe"], ["yes", "no", "no"], ["a", "b", "c"]], ids=str)
def test_other_classes_are_refused_unless_the_head_is_kept(classifier, labels):
    values = dict.fromkeys([*labels, "yes", "no", "so"], 1)
    models = {"a": classifier("a", ["yes", "no", "so"], values), "b": classifier("b", labels, values)}
    with pytest.raises(UserError) as error:
        planned(soup("a", "b"), **models)
    message = str(error.value)
    assert ", ".join(labels) in message and "'b'" in message and "yes, no, so" in message and "keep: [score]" in message
    assert planned(soup("a", "b", keep=["score"]), **models).nodes


@pytest.mark.parametrize("config", [{}, {"id2label": dict(enumerate(GENERIC))}, {"id2label": None}], ids=str)
@pytest.mark.parametrize("nameless", ["a", "b"])
def test_a_model_that_names_no_classes_is_told(classifier, config, nameless):
    values = dict.fromkeys([*GENERIC, "yes", "no", "so"], 1)
    models = {name: classifier(name, ["yes", "no", "so"], values) for name in "ab" if name != nameless}
    models[nameless] = classifier(nameless, GENERIC, values, **config)
    named = next(name for name in "ab" if name != nameless)
    told = f"model '{nameless}' does not name its classes, '{named}' does (yes, no, so): they are merged by number"
    assert told in planned(soup("a", "b"), **models).notes


def test_models_without_names_of_classes_merge_by_number(classifier):
    models = {name: classifier(name, GENERIC, dict.fromkeys(GENERIC, 1)) for name in "ab"}
    assert planned(soup("a", "b"), **models).notes == ()


def test_branches_are_put_in_one_order_where_the_donor_names_no_classes(classifier):
    values = dict.fromkeys([*GENERIC, "yes", "no", "so"], 1)
    models = {"a": classifier("a", GENERIC, values), "b": classifier("b", ["yes", "no", "so"], values),
              "c": classifier("c", ["so", "no", "yes"], values)}  # fmt: skip
    result = planned(soup("a", "b", "c"), **models)
    node = next(node for node in result.nodes if node.name == "score.weight")
    assert node.inputs["a"].rows is None and node.inputs["b"].rows is None
    assert node.inputs["c"].rows.tolist() == [2, 1, 0]
    assert sum("classes" in note for note in result.notes) == 2


def test_a_square_head_in_another_order_is_refused(classifier):
    labels = ["a", "b", "c", "d"]
    values = dict.fromkeys(labels, 1)
    models = {"a": classifier("a", labels, values), "b": classifier("b", labels[::-1], values)}
    with pytest.raises(UserError, match="has 4 rows and columns: which are the classes cannot be told"):
        planned(soup("a", "b"), **models)


def test_classes_of_a_head_that_is_not_known_are_told(save):
    values = tensors(head=False) | {"thing.weight": np.ones((3, 4), np.float32)}
    config = {"architectures": ["DetrForObjectDetection"]}
    models = {name: save(name, values, **config, id2label=dict(enumerate(order)))
              for name, order in (("a", "xy"), ("b", "yx"))}  # fmt: skip
    assert any("no tensor is known to have a row for each" in note for note in planned(soup("a", "b"), **models).notes)


@pytest.mark.parametrize("config, labels", [
    ({"id2label": {"1": "b", "0": "a"}}, ["a", "b"]), ({"label2id": {"b": 1, "a": 0}}, ["a", "b"]),
    ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None), ({"id2label": {"0": "a", "2": "b"}}, None),
    ({"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}, ["LABEL_1", "LABEL_0"]), ({"id2label": {}}, None), ({}, None),
    ({"id2label": ["a"]}, None), ({"id2label": {"x": "a"}}, None), (None, None),
], ids=str)  # fmt: skip
def test_labels_of_a_config(config, labels):
    assert labels_of(config) == labels
