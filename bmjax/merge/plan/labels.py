"""Classes of classifiers: which rows of a model's head are the classes of the result, by their labels.

Plans ask it for each tensor that they read. It reads configs and headers alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bmjax.config import UserError, shortened
from bmjax.io.safetensors import TensorInfo
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.tensor_names import is_before_layers, is_task_head, layer

_NO_HEAD = re.compile(r"norm|(^|\.)ln_")


def source_of_class(layout: Layout) -> str:
    """Return the input whose class and labels the result has.

    It is the donor, or the model of the last layers where slices end in a model of another kind.
    """
    donor, last = layout.recipe.donor, layout.last_input(layout.recipe.steps[-1].name)
    is_donors = layout.configs[last] is None or layout.task(last) in (layout.task(donor), None)
    return donor if last == donor or is_donors else last


class Labels:
    """The labels of every input's classes. Remarks on other orders go to `layout.notes`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._labels = {model: labels_of(config) for model, config in layout.configs.items()}
        # Whose order the result has: that of its config, or where that names no classes, of the first that does.
        models = [source_of_class(layout), *layout.recipe.inputs]
        self.source = next((model for model in models if self._labels[model]), models[0])
        self._rows: dict[str, np.ndarray] = {}  # of the models whose classes have another order
        self._moved: dict[str, list[str]] = {}  # of those, the tensors that were put in order

    def rows(self, model: str, name: str, info: TensorInfo) -> np.ndarray | None:
        """Return for each class of the result the row of an input's tensor: int64; None: as they are.

        Raises UserError for a row for each class where the classes are others than the result's.
        """
        labels, wanted = self._labels[model], self._labels[self.source]
        if wanted is None or labels == wanted or len(wanted) < 2:
            return None
        if not self._is_of_classes(model, name, info, len(wanted)):
            return None
        if labels is None:
            self.layout.notes[
                f"model '{model}' does not name its classes, '{self.source}' does ({_shown(wanted)}): they are merged "
                "by number"
            ] = None
            return None
        first, second = _comparable(wanted), _comparable(labels)
        stem = name.removesuffix(".weight").removesuffix(".bias")
        if len(set(first)) < len(first) or sorted(first) != sorted(second):
            raise UserError(
                f"tensor '{name}' has a row for each class: in model '{model}' {_shown(labels)}, in '{self.source}' "
                f"{_shown(wanted)}; rows of other classes cannot be merged: make id2label equal if they mean the same, "
                f"or leave the head to the donor with `keep: [{stem}]`"
            )
        if first == second:
            return None
        if len(info.shape) > 1 and info.shape[1] == len(first):
            raise UserError(
                f"tensor '{name}' has {len(first)} rows and columns: which are the classes cannot be told, and model "
                f"'{model}' has them in another order ({_shown(labels)}) than '{self.source}' ({_shown(wanted)}); put "
                f"them in one order, or leave the head to the donor with `keep: [{stem}]`"
            )
        self._moved.setdefault(model, []).append(name)
        return self._rows.setdefault(model, np.array([second.index(label) for label in first], np.int64))

    def remarks(self) -> Iterator[str]:
        """Yield a line for every model whose classes were put in order, or should have been."""
        wanted = self._labels[self.source] or []
        for model, labels in self._labels.items():
            if labels is None or (first := _comparable(wanted)) == (second := _comparable(labels)):
                continue
            orders = (
                f"model '{model}' has its classes in another order ({_shown(labels)}) than '{self.source}' "
                f"({_shown(wanted)})"
            )
            tensors = self.layout.models[model].tensors
            if model in self._moved:
                names = ", ".join(dict.fromkeys(self._moved[model]))
                yield f"{orders}: its rows of {names} are put in that one's order"
            elif (
                sorted(first) == sorted(second)
                and self.layout.task(model) == "other"
                and not any(self._is_of_classes(model, name, info, len(first)) for name, info in tensors.items())
            ):
                yield f"{orders}, and no tensor is known to have a row for each: all are merged by number"

    def _is_of_classes(self, model: str, name: str, info: TensorInfo, count: int) -> bool:
        """Return whether a tensor has a row for each of `count` classes."""
        if not info.shape or info.shape[0] != count or layer(name) or self.layout.is_vocabulary(name):
            return False
        architectures = (self.layout.configs[model] or {}).get("architectures")
        is_classifier = "Classification" in str(architectures) and not is_before_layers(name)
        return is_task_head(name) or (is_classifier and _NO_HEAD.search(name) is None)


def labels_of(config: Mapping[str, Any] | None) -> list[str] | None:
    """Return the labels of a config's classes in order; None where it has none but LABEL_0, LABEL_1 and so on."""
    named, numbered = (config or {}).get("id2label"), (config or {}).get("label2id")
    if isinstance(named, dict):
        pairs = list(named.items())
    else:
        pairs = [(i, label) for label, i in numbered.items()] if isinstance(numbered, dict) else []
    by_id = {int(i): str(label) for i, label in pairs if re.fullmatch(r"[0-9]{1,6}", str(i))}
    labels = [by_id.get(i, "") for i in range(len(pairs))]
    is_whole = len(by_id) == len(pairs) and all(i in by_id for i in range(len(pairs)))
    return labels if is_whole and labels != [f"LABEL_{i}" for i in range(len(pairs))] and labels else None


def has_same_labels(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two configs have the same labels of classes, in whatever order."""
    return sorted(_comparable(labels_of(first) or [])) == sorted(_comparable(labels_of(second) or []))


def _comparable(labels: Sequence[str]) -> list[str]:
    """Return labels without their case, where they stay distinct."""
    folded = [label.strip().casefold() for label in labels]
    return folded if len(set(folded)) == len(set(labels)) else list(labels)


def _shown(labels: Sequence[str] | None) -> str:
    return shortened(labels or (), 4)
