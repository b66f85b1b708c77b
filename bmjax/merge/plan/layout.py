"""Which tensors every model and every step's result has, and what each tensor of a step is made from."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint, TensorInfo
from bmjax.merge.plan.hf_config import says_untied
from bmjax.merge.plan.tensor_names import Layer, depth, is_before_layers, is_embedding, is_head, layer
from bmjax.merge.recipe.recipe import Slice, Step

_SAMPLED_ROWS = 16
_ROW_BYTES = 2**20  # of an embedding's row, at most; what has larger ones is not read to find out


class Origin(NamedTuple):
    """What a tensor is made by: a whole step or a slice's; its names in that one's models where they differ; depth."""

    step: Step
    names: Mapping[str, str]
    depth: float


class Layout:
    """The tensors of inputs and steps by name, in the order of the files. `notes` gathers what was found."""

    def __init__(self, steps: Iterable[Step], models: Mapping[str, Checkpoint]) -> None:
        self.steps = {step.name: step for step in steps}
        self.models = models
        self.notes: dict[str, None] = {}
        self.copied_heads: dict[str, str] = {}
        self._names: dict[str, dict[str, None]] = {}
        self._origins: dict[tuple[str, str], Origin] = {}
        self._layers: dict[str, dict[str, int]] = {}

    def names(self, model: str) -> dict[str, None]:
        """The tensors of an input or of a step's result. A tied model has no head; a step has one if a model has."""
        if model not in self._names:
            step = self.steps.get(model)
            if step is None:
                self._names[model] = self._of_files(model)
            elif step.slices:
                self._names[model] = self._of_slices(step)
            else:
                self._names[model] = self._with_heads(self.names(step.donor), step)
        return self._names[model]

    def layers(self, model: str) -> dict[str, int]:
        """How many layers each stack of a model has."""
        if model not in self._layers:
            stacks: dict[str, int] = {}
            for found in filter(None, map(layer, self.names(model))):
                stacks[found.stack] = max(stacks.get(found.stack, 0), found.number + 1)
            self._layers[model] = stacks
        return self._layers[model]

    def embedding(self, model: str) -> str | None:
        """The one tensor that holds a model's token embedding."""
        return self._embedding(self.names(model))

    def origin(self, step: Step, name: str) -> Origin:
        """What one tensor of a step's result is made from."""
        if step.slices:
            self.names(step.name)
            return self._origins[step.name, name]
        at = layer(name)
        return Origin(step, {}, 0.0 if at is None else depth(at.number, self.layers(step.name)[at.stack]))

    def trace(self, model: str, number: int) -> tuple[str, int]:
        """(input, layer) whose place in the config a layer of a model or step takes."""
        step = self.steps.get(model)
        if step is None:
            return model, number
        start = 0
        for part in step.slices:
            if number < start + part.layers:
                lead = part.step.reads[0]
                return self.trace(lead, part.ranges[lead][0] + number - start)
            start += part.layers
        return self.trace(step.donor, number)

    def tensor(self, model: str, name: str) -> TensorInfo | None:
        """The header entry of an input's tensor; for the head of a tied model that of its embedding."""
        found = self.find(model, name)
        return None if found is None else self.models[model].tensors[found]

    def shape(self, model: str, name: str) -> tuple[int, ...]:
        """The shape of an input's tensor, () where it has none."""
        found = self.tensor(model, name)
        return () if found is None else found.shape

    def find(self, model: str, name: str) -> str | None:
        """The name under which an input or a step holds a tensor: a tied model's head is its embedding."""
        if name in self.names(model):
            return name
        return self.embedding(model) if is_head(name) and name.endswith(".weight") else None

    def _embedding(self, names: Iterable[str]) -> str | None:
        found = [name for name in names if is_embedding(name)]
        return found[0] if len(found) == 1 else None

    def _of_files(self, model: str) -> dict[str, None]:
        names = dict.fromkeys(self.models[model].tensors)
        heads = [name for name in names if is_head(name)]
        if len(heads) == 1 and self._is_copy(model, heads[0]):
            self.notes[f"model '{model}': {heads[0]} is a copy of its embedding, so it counts as tied"] = None
            self.copied_heads[model] = heads[0]
            del names[heads[0]]
        return names

    def _is_copy(self, model: str, head: str) -> bool:
        """Whether a head in the files is the embedding once more, as some trainers save tied models."""
        checkpoint = self.models[model]
        embedding = self._embedding(checkpoint.tensors)
        if embedding is None or says_untied(checkpoint):
            return False
        one, other = checkpoint.tensors[embedding], checkpoint.tensors[head]
        if (one.shape, one.dtype) != (other.shape, other.dtype) or not one.shape or not one.nbytes:
            return False
        if one.nbytes // one.shape[0] > _ROW_BYTES:
            return False
        rows = np.unique(np.linspace(0, one.shape[0] - 1, _SAMPLED_ROWS).astype(int)).tolist()
        pairs = ([checkpoint.read(name, (slice(row, row + 1),)) for name in (embedding, head)] for row in rows)
        return all(a.tobytes() == b.tobytes() for a, b in pairs)

    def _with_heads(self, names: Iterable[str], step: Step) -> dict[str, None]:
        """`names` with the heads that the merged models have, whether the donor has them or not."""
        heads = dict.fromkeys(name for model in step.reads for name in self.names(model) if is_head(name))
        return dict.fromkeys([*(name for name in names if not is_head(name) or name in heads), *heads])

    def _of_slices(self, step: Step) -> dict[str, None]:
        first, last = step.slices[0], step.slices[-1]
        for name in self._outside_layers(first, before=True):
            self._origins[step.name, name] = Origin(first.step, {}, 0.0)
        start = 0
        for part in step.slices:
            self._check_ranges(part)
            self._origins.update({(step.name, name): origin for name, origin in self._of_slice(part, start)})
            start += part.layers
        for name in self._with_heads(self._outside_layers(last, before=False), last.step):
            self._origins[step.name, name] = Origin(last.step, {}, 0.0)
        return dict.fromkeys(name for made, name in self._origins if made == step.name)

    def _outside_layers(self, part: Slice, *, before: bool) -> list[str]:
        names = self.names(part.step.reads[0])
        return [name for name in names if layer(name) is None and is_before_layers(name) == before]

    def _of_slice(self, part: Slice, start: int) -> Iterable[tuple[str, Origin]]:
        """The tensors of a slice's layers, which are number `start` and on in the result."""
        lead = part.step.reads[0]
        numbered: dict[int, list[Layer]] = {}
        for found in filter(None, map(layer, self.names(lead))):
            numbered.setdefault(found.number, []).append(found)
        for k in range(part.layers):
            for one in numbered.get(part.ranges[lead][0] + k, ()):
                own = {model: one._replace(number=at + k).name for model, (at, _) in part.ranges.items()}
                yield one._replace(number=start + k).name, Origin(part.step, own, depth(k, part.layers))

    def _check_ranges(self, part: Slice) -> None:
        for model, (_, end) in part.ranges.items():
            stacks = self.layers(model)
            if len(stacks) != 1:
                found = ", ".join(stacks) or "none"
                raise UserError(
                    f"model '{model}': slices need one stack of layers; by its tensors' names it has {found}"
                )
            ((stack, count),) = stacks.items()
            if end > count:
                raise UserError(f"model '{model}': layer_range ends at {end}, but {stack} has {count} layers")
