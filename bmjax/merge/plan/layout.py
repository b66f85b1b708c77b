"""Which tensors every model and every step's result has, and what each tensor of a step is made from."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint, TensorInfo
from bmjax.merge.plan.tensor_names import Layer, depth, is_before_layers, is_embedding, is_head, layer
from bmjax.merge.recipe.recipe import Recipe
from bmjax.merge.recipe.step import Slice, Step
from bmjax.model.config import read_hf_config

TIED = "tie_word_embeddings"
_NESTED = ("text_config", "llm_config", "language_config")
_SAMPLED_ROWS = 16
_MAX_ROW_BYTES = 2**20  # of an embedding's row; what has larger ones is not read to compare it with a head


class Origin(NamedTuple):
    """What makes a tensor."""

    step: Step  # or a slice's
    names: Mapping[str, str]  # the tensor's in that step's models, where they differ
    depth: float


class Layout:
    """The tensors of a recipe's inputs and steps by name, in the order of the files.

    A tied model has no head; a step's result has one if one of its models has.
    """

    def __init__(self, recipe: Recipe, models: Mapping[str, Checkpoint]) -> None:
        self.recipe, self.models = recipe, models
        self.steps = {step.name: step for step in recipe.steps}
        self.names: dict[str, dict[str, None]] = {}  # of each input's and each step's tensors
        self.layers: dict[str, dict[str, int]] = {}  # of each input and step, how many each of its stacks has
        self.origins: dict[str, dict[str, Origin]] = {}  # of each step, by tensor
        self.copied_heads: dict[str, str] = {}  # of inputs whose head is their embedding once more
        self.notes: dict[str, None] = {}  # remarks on the models, of all who plan with this layout
        for name, model in models.items():
            names = dict.fromkeys(model.tensors)
            heads = [tensor for tensor in names if is_head(tensor)]
            if len(heads) == 1 and _is_copied_embedding(model, heads[0]):
                self.notes[f"model '{name}': {heads[0]} is a copy of its embedding, so it counts as tied"] = None
                self.copied_heads[name] = heads[0]
                del names[heads[0]]
            self.names[name], self.layers[name] = names, _stacks(names)
        for step in recipe.steps:
            if step.slices:
                origins = self._origins_of_slices(step)
            else:
                names = self._with_heads(self.names[step.donor], step)
                stacks = _stacks(names)
                origins = {
                    name: Origin(step, {}, depth(t.number, stacks[t.stack]) if (t := layer(name)) else 0.0)
                    for name in names
                }
            self.names[step.name], self.layers[step.name] = dict.fromkeys(origins), _stacks(origins)
            self.origins[step.name] = origins

    def embedding(self, model: str) -> str | None:
        """Return the one tensor that holds a model's token embedding; None when none or several do."""
        return _embedding(self.names[model])

    def origin_of_layer(self, model: str, number: int) -> tuple[str, int]:
        """Return the (input, its layer) that a result's layer comes from, for per-layer entries of config.json."""
        step = self.steps.get(model)
        if step is None:
            return model, number
        start = 0
        for part in step.slices:
            if number < start + part.layers:
                lead = part.step.reads[0]
                return self.origin_of_layer(lead, part.ranges[lead][0] + number - start)
            start += part.layers
        return self.origin_of_layer(step.donor, number)

    def tensor(self, model: str, name: str) -> TensorInfo | None:
        """Return the header entry of an input's tensor; for the head of a tied model that of its embedding."""
        stored_name = self.find(model, name)
        return None if stored_name is None else self.models[model].tensors[stored_name]

    def row_count(self, model: str, name: str) -> int | None:
        """Return how many rows an input's tensor has; None when it has no such tensor, or a scalar."""
        info = self.tensor(model, name)
        return info.shape[0] if info is not None and info.shape else None

    def find(self, model: str, name: str) -> str | None:
        """Return the name under which an input or a step holds a tensor: a tied model's head is its embedding."""
        if name in self.names[model]:
            return name
        return self.embedding(model) if is_head(name) and name.endswith(".weight") else None

    def _with_heads(self, names: Iterable[str], step: Step) -> dict[str, None]:
        """Return `names` with the heads that the merged models have, whether the donor has them or not."""
        heads = dict.fromkeys(name for model in step.reads for name in self.names[model] if is_head(name))
        return dict.fromkeys([*(name for name in names if not is_head(name) or name in heads), *heads])

    def _origins_of_slices(self, step: Step) -> dict[str, Origin]:
        # What stands before the layers is the first slice's, what stands after them the last one's.
        first, last = step.slices[0].step, step.slices[-1].step
        before, after = ([name for name in self.names[s.reads[0]] if layer(name) is None] for s in (first, last))
        origins = {name: Origin(first, {}, 0.0) for name in before if is_before_layers(name)}
        start = 0
        for part in step.slices:
            self._check_ranges(part)
            lead = part.step.reads[0]
            by_number: dict[int, list[Layer]] = {}
            for tensor in filter(None, map(layer, self.names[lead])):
                by_number.setdefault(tensor.number, []).append(tensor)
            for k in range(part.layers):
                for tensor in by_number.get(part.ranges[lead][0] + k, ()):
                    names = {m: tensor._replace(number=low + k).name for m, (low, _) in part.ranges.items()}
                    name = tensor._replace(number=start + k).name
                    origins[name] = Origin(part.step, names, depth(k, part.layers))
            start += part.layers
        rest = self._with_heads([name for name in after if not is_before_layers(name)], last)
        return origins | {name: Origin(last, {}, 0.0) for name in rest}

    def _check_ranges(self, part: Slice) -> None:
        for model, (_, end) in part.ranges.items():
            stacks = self.layers[model]
            if len(stacks) != 1:
                raise UserError(
                    f"model '{model}': slices need one stack of layers; by its tensors' names it has "
                    f"{', '.join(stacks) or 'none'}"
                )
            ((stack, count),) = stacks.items()
            if end > count:
                raise UserError(f"model '{model}': layer_range ends at {end}, but {stack} has {count} layers")


def _stacks(names: Iterable[str]) -> dict[str, int]:
    """Return how many layers each stack has."""
    stacks: dict[str, int] = {}
    for tensor in filter(None, map(layer, names)):
        stacks[tensor.stack] = max(stacks.get(tensor.stack, 0), tensor.number + 1)
    return stacks


def _embedding(names: Iterable[str]) -> str | None:
    embeddings = [name for name in names if is_embedding(name)]
    return embeddings[0] if len(embeddings) == 1 else None


def _is_copied_embedding(checkpoint: Checkpoint, head: str) -> bool:
    """Return whether a head in the files is the embedding once more, as some trainers save tied models."""
    embedding = _embedding(checkpoint.tensors)
    if embedding is None or any(block.get(TIED) is False for block in config_blocks(read_config(checkpoint) or {})):
        return False
    info, head_info = checkpoint.tensors[embedding], checkpoint.tensors[head]
    if (info.shape, info.dtype) != (head_info.shape, head_info.dtype) or not info.shape or not info.nbytes:
        return False
    if info.nbytes // info.shape[0] > _MAX_ROW_BYTES:
        return False
    rows = np.unique(np.linspace(0, info.shape[0] - 1, _SAMPLED_ROWS).astype(int)).tolist()
    pairs = ([checkpoint.read(name, (slice(row, row + 1),)) for name in (embedding, head)] for row in rows)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def read_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the config.json beside the weights, or None."""
    # A link that leads nowhere is a mistake, not a model without a config.
    return read_hf_config(checkpoint.directory) if os.path.lexists(checkpoint.directory / "config.json") else None


def config_blocks(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config, and those of a language model inside another model's config."""
    yield config
    yield from (config[key] for key in _NESTED if isinstance(config.get(key), dict))
