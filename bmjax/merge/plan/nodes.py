"""What a merge will do, tensor by tensor, known from the models' headers alone.

A tensor of the last step reads tensors of models and of earlier steps, which are nodes themselves, so that nothing
between steps is written. Any architecture: what counts is that names and shapes agree. Models with and without a head
of their own (tied), of different vocabulary sizes and with surplus tensors can be merged; `Plan.notes` says what was
done about it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import DTYPES, Checkpoint, listing
from bmjax.merge.plan.hf_config import config_changes, config_notes
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.output import locate
from bmjax.merge.plan.tensor_names import is_buffer, is_head, is_vocabulary, layer
from bmjax.merge.plan.token_rows import Other, TokenRows
from bmjax.merge.plan.vocabulary import Vocabulary, vocabulary
from bmjax.merge.recipe.recipe import Recipe, Step
from bmjax.merge.recipe.tokenizer import TokenizerPlan

FLOATS = ("F32", "BF16", "F16", "F64")
_FLOAT_TYPES = tuple(DTYPES[name] for name in FLOATS)


@dataclass(frozen=True, eq=False)
class Source:
    """Where a node finds one model's tensor.

    tensor: its name in the model (a tied model's head is its embedding). node: what makes it, if the model is an
    earlier step. rows: for every row of the result the row of the tensor, int64, -1 where the model has none; None:
    the same rows. others: where missing rows come from, as (model, tensor, rows): from the mean of those that have a
    row there, zero if none has. The donor's stands in alone where it has the row.
    """

    tensor: str
    rows: np.ndarray | None = None
    node: "Node | None" = None
    others: tuple[Other, ...] = ()


@dataclass(frozen=True, eq=False)
class Node:
    """One tensor of a step's result.

    step: names the base and the branches; for a slice they are the slice's. inputs: every model that is read, the base
    first. arguments: the method's, for this tensor. dtype: as written; float32 for what only later steps read.
    """

    name: str
    step: Step
    inputs: Mapping[str, Source]
    arguments: Mapping[str, Any]
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        """Whether it is merged. What is not (masks, tables of positions) must be the same in all inputs."""
        return self.dtype in _FLOAT_TYPES

    def files(self) -> Iterator[tuple[str, str]]:
        """(input, tensor) of everything that is read from files for it, each once."""
        yield from dict.fromkeys(self._files())

    def _files(self) -> Iterator[tuple[str, str]]:
        for model, source in self.inputs.items():
            if source.node is None:
                yield model, source.tensor
            else:
                yield from source.node._files()
            yield from ((other, tensor) for other, tensor, _ in source.others)


@dataclass(frozen=True)
class Plan:
    """nodes: in the order in which they are written. config_changes: keys of the donor's config.json that change.
    vocabulary: the tokenizer to save, None where the donor's files are copied."""

    nodes: tuple[Node, ...]
    config_changes: Mapping[str, Any]
    notes: tuple[str, ...]
    vocabulary: Vocabulary | None = None


def plan(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Plan:
    """The plan of a recipe whose inputs are `models`, by the names in `recipe.inputs`.

    Raises UserError, one line, where models do not fit together: a weight that one lacks, other shapes or types, a
    layer range beyond the last layer, a parameter without a value for some tensor.
    """
    for name, model in models.items():
        if not model.tensors:
            raise UserError(f"model '{name}': holds no tensor")
    layout, donor, last = Layout(recipe.steps, models), recipe.donor, recipe.steps[-1]
    tokens = None if recipe.tokenizer is None else _vocabulary(recipe, recipe.tokenizer, layout)
    planner = _Planner(recipe, layout, tokens)
    planned = [planner.node(last, name) for name in layout.names(last.name)]
    planner.check_missing()
    nodes = tuple(node for node in planned if node is not None)
    if not nodes:
        raise UserError(f"step '{last.name}': its result would hold no tensor, by the names of those in '{donor}'")
    stacks = layout.layers(last.name)
    count = max(stacks.values()) if len(stacks) == 1 else 0
    changes, notes = config_changes(
        donor, models,
        head=(any(map(is_head, layout.names(donor))), any(is_head(node.name) for node in nodes)),
        layers=[layout.trace(last.name, number) for number in range(count)],
        donor_layers=max(layout.layers(donor).values(), default=0),
        vocabulary=None if tokens is None else (tokens.size, tokens.source),
    )  # fmt: skip
    notes = [
        *(tokens.notes if tokens else ()),
        *layout.notes,
        *planner.rows.notes,
        *planner.notes,
        *planner.surplus(),
        *planner.idle_filters(),
        *notes,
    ]
    return Plan(nodes, changes, (*notes, *config_notes(donor, models, changes)), tokens)


def _vocabulary(recipe: Recipe, tokenizer: TokenizerPlan, layout: Layout) -> Vocabulary:
    directories = {name: model.directory for name, model in layout.models.items()}
    rows = {}
    for model in recipe.inputs:
        embedding = layout.embedding(model)
        shape = () if embedding is None else layout.models[model].tensors[embedding].shape
        if not shape:
            raise UserError(
                f"model '{model}': no tensor is known as its tokens' embedding; remove the tokenizer's keys"
            )
        rows[model] = shape[0]
    if tokenizer.source not in ("base", "union", *directories):
        directories[tokenizer.source] = locate(recipe, tokenizer.source, weights=False)
    return vocabulary(tokenizer, recipe.donor, directories, rows)


class _Planner:
    def __init__(self, recipe: Recipe, layout: Layout, tokens: Vocabulary | None) -> None:
        self.recipe, self.layout = recipe, layout
        self.rows = TokenRows(recipe, layout, tokens)
        self.notes: dict[str, None] = {}
        self._nodes: dict[tuple[str, str], Node | None] = {}
        self._missing: dict[str, list[str]] = {}
        self._left_out: dict[str, str] = {}
        self._used: dict[str, set[str]] = {}
        self._filters: dict[tuple[str, str, str], bool] = {}

    def node(self, step: Step, name: str) -> Node | None:
        """The node of one tensor of a step's result; None where a model lacks it, see `check_missing`."""
        if (step.name, name) not in self._nodes:
            self._nodes[step.name, name] = self._make(step, name)
        return self._nodes[step.name, name]

    def _make(self, step: Step, name: str) -> Node | None:
        origin = self.layout.origin(step, name)
        sources: dict[str, Source] = {}
        reads = origin.step.reads
        for model in reads:
            source = self._source(model, origin.names.get(model, name), name)
            if source is not None:
                sources[model] = source
        if len(sources) < len(reads):
            return None
        shape = self._shape(name, sources, step)
        stored = self._stored(step.name, name)
        if stored not in FLOATS:
            return Node(name, origin.step, sources, {}, DTYPES[stored], shape)
        dtype = np.dtype(np.float32)
        if step is self.recipe.steps[-1]:
            asked = self.recipe.dtype
            dtype = DTYPES[stored] if asked is None else np.dtype(getattr(ml_dtypes, asked, asked))
        self._note_filters(origin.step, name, origin.names)
        return Node(name, origin.step, sources, origin.step.at(name, origin.depth, origin.names), dtype, shape)

    def _source(self, model: str, tensor: str, result: str) -> Source | None:
        found = self.layout.find(model, tensor)
        if found is None and is_buffer(tensor):
            self._left_out[tensor] = model
        elif found is None:
            self._missing.setdefault(model, []).append(tensor)
        if found is None:
            return None
        if found != tensor:
            self.notes[f"model '{model}' is tied: its embedding counts as its {tensor}"] = None
        if model in self.layout.steps:
            node = self.node(self.layout.steps[model], found)
            return None if node is None else Source(found, None, node)
        self._used.setdefault(model, set()).add(found)
        if not is_vocabulary(result) or not self.layout.models[model].tensors[found].shape:
            return Source(found)
        rows, others = self.rows.of(model, result)
        for other, other_tensor, _ in others:
            self._used.setdefault(other, set()).add(other_tensor)
        return Source(found, rows, None, others)

    def _shape(self, name: str, sources: Mapping[str, Source], step: Step) -> tuple[int, ...]:
        """The one shape of all inputs, whose types must go together too; rows of tokens may differ in number."""
        seen = {model: self._seen(model, source) for model, source in sources.items()}
        if step is self.recipe.steps[-1] and not step.slices and self.recipe.donor not in seen:
            info = self.layout.tensor(self.recipe.donor, name)
            seen |= {} if info is None else {self.recipe.donor: (info.shape, info.dtype)}
        for model, tensor, _ in (other for source in sources.values() for other in source.others):
            entry = self.layout.models[model].tensors[tensor]
            seen.setdefault(model, (entry.shape, entry.dtype))
        leader, (shape, kind) = next(iter(seen.items()))
        for model, (other, other_kind) in seen.items():
            if (other[1:] if is_vocabulary(name) else other) != (shape[1:] if is_vocabulary(name) else shape):
                raise UserError(
                    f"tensor '{name}' has shape {list(other)} in model '{model}' and {list(shape)} in '{leader}'; "
                    "only models of equal sizes can be merged"
                )
            if other_kind != kind and not {other_kind, kind} <= set(FLOATS):
                raise UserError(
                    f"tensor '{name}' is {other_kind} in model '{model}' and {kind} in '{leader}'; "
                    f"only {', '.join(FLOATS)} can be mixed: convert one of them (quantized models: from the original)"
                )
        rows = sources[leader].rows
        return shape if rows is None else (len(rows), *shape[1:])

    def _seen(self, model: str, source: Source) -> tuple[tuple[int, ...], str]:
        if source.node is None:
            info = self.layout.models[model].tensors[source.tensor]
            return info.shape, info.dtype
        return source.node.shape, self._stored(model, source.tensor)

    def _stored(self, model: str, name: str) -> str:
        """The type in which the base stores a tensor, traced back to a file; another model's where it has none."""
        step = self.layout.steps.get(model)
        if step is None:
            info = self.layout.tensor(model, name)
            return "" if info is None else info.dtype
        found = self.layout.find(model, name)
        if found is None:
            return ""
        origin = self.layout.origin(step, found)
        places = [(m, origin.names.get(m, found)) for m in (origin.step.reads if step.slices else step.models)]
        return next((kind for m, tensor in places if (kind := self._stored(m, tensor))), "")

    def _note_filters(self, step: Step, name: str, names: Mapping[str, str]) -> None:
        for branch, value in step.values:
            decides = next((r for r in value.rules if r.fits(names.get(branch, name) if branch else name)), None)
            for rule in value.rules:
                if rule.text is not None:
                    key = (step.name, value.name, rule.text)
                    self._filters[key] = self._filters.get(key, False) or rule is decides

    def idle_filters(self) -> Iterator[str]:
        """A line for every filter that decides nothing."""
        for (step, parameter, text), decides in self._filters.items():
            if not decides:
                yield f"step '{step}': parameter '{parameter}': filter '{text}' decides for no tensor"

    def check_missing(self) -> None:
        """Raises UserError where an input lacks a weight that is needed."""
        for model, names in self._missing.items():
            other = "another model" if model == self.recipe.donor else f"'{self.recipe.donor}'"
            raise UserError(
                f"model '{model}' lacks {listing(list(dict.fromkeys(names)))} that {other} has; "
                "only models of one architecture can be merged"
            )

    def surplus(self) -> Iterator[str]:
        """A line for every input that holds tensors which nothing reads, and for those that loaders compute."""
        for model in dict.fromkeys(self._left_out.values()):
            names = [name for name, lacks in self._left_out.items() if lacks == model]
            yield f"left out {listing(names)}: '{model}' lacks what loaders compute anyway"
        sliced = {name for step in self.recipe.steps for part in step.slices for name in part.ranges}
        for model, used in self._used.items():
            known = {*used, *self._left_out, self.layout.copied_heads.get(model, "")}
            names = [name for name in self.layout.models[model].tensors if name not in known]
            if model in sliced:
                result = self.layout.names(self.recipe.steps[-1].name)
                names = [name for name in names if layer(name) is None and name not in result]
            if names:
                yield f"model '{model}' holds {listing(names)} that '{self.recipe.donor}' lacks; not merged"
