"""What a merge will do, tensor by tensor, known from the models' headers alone.

A tensor of the last step reads tensors of models and of earlier steps, which are nodes themselves, so that nothing
between steps is written. Models with and without a head of their own (tied), of different vocabulary sizes and with
surplus tensors can be merged; `MergePlan.notes` says what was done about it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import DTYPES, Checkpoint, byte_count, listing, open_checkpoint
from bmjax.merge.plan import prefixes, quantized, wrappers
from bmjax.merge.plan.adapters import adapted as apply_adapters
from bmjax.merge.plan.chat import Chat, chat_of
from bmjax.merge.plan.damaged_files import check_side_files
from bmjax.merge.plan.heads import is_same_tensor, says_tied
from bmjax.merge.plan.inputs import (
    experts_of_two_layouts,
    layers_beside_config,
    refuse_lost_layers,
    refuse_twins,
    same_files,
    tensors_lost_in_layers,
    tokens_without_rows,
    with_masks_of_one_type,
)
from bmjax.merge.plan.labels import Labels
from bmjax.merge.plan.layout import Layout, Origin, read_config
from bmjax.merge.plan.merged_config import config_changes, settings_changes
from bmjax.merge.plan.node import FLOATS, Node, TensorSource, rounded_to_float32
from bmjax.merge.plan.output import check_target
from bmjax.merge.plan.per_layer_tensors import with_moved_parts
from bmjax.merge.plan.shared_blocks import refuse_moved_blocks
from bmjax.merge.plan.shared_tensors import with_embeddings, with_shared_tensors
from bmjax.merge.plan.side_files import lost_by_overwriting, side_files
from bmjax.merge.plan.some_models import without_models
from bmjax.merge.plan.stored_zeros import ends_in_zeros
from bmjax.merge.plan.tensor_names import is_buffer, is_of_tower, layer, with_tokens
from bmjax.merge.plan.token_rows import TokenRows
from bmjax.merge.plan.tokenizer_remarks import tokenizer_remarks
from bmjax.merge.plan.vocabulary import Vocabulary, vocabulary
from bmjax.merge.recipe.recipe import Recipe
from bmjax.merge.recipe.step import Step
from bmjax.merge.recipe.tokenizer import WORDS

_COMPARED_BYTES = 2**20  # of a tensor of whole numbers, which is read for a plan


@dataclass(frozen=True)
class MergePlan:
    """All of a merge."""

    recipe: Recipe
    models: Mapping[str, Checkpoint]  # the inputs, by the recipe's names
    nodes: tuple[Node, ...]  # in the order in which they are written
    config_changes: Mapping[str, Any]  # keys of the donor's config.json; of quantization None: the key goes
    notes: tuple[str, ...]  # the recipe's, and what is remarkable about the models
    vocabulary: Vocabulary | None = None  # the tokenizer to save, None where the donor's files are copied
    chat: Chat = field(default_factory=Chat)  # what changes in its chat template and end tokens
    side_changes: Mapping[str, Any] = field(default_factory=dict)  # the new content of some of the donor's JSON files

    @property
    def nbytes(self) -> int:
        """Bytes of the result's tensors."""
        return sum(byte_count(node.dtype, node.shape) for node in self.nodes)


def prepare(recipe: Recipe, output: str | Path, overwrite: bool = False, *, download: bool = True) -> MergePlan:
    """Open a recipe's inputs and plan its merge into `output`. Reads only headers, writes nothing.

    download False: hub models must have been fetched before.

    Raises:
        UserError: for an input that is not there, an output that may not be written, and whatever `plan` refuses.
    """
    directories = {name: recipe.directory(name, download=download) for name in recipe.inputs}
    adapters = {name: folder for name in directories if (folder := recipe.adapter(name, download=download))}
    refuse_twins(recipe, directories, adapters)
    sources = [*directories.values(), *adapters.values()]
    if recipe.tokenizer is not None and recipe.tokenizer.source not in (*WORDS, *recipe.inputs):
        sources.append(recipe.directory(recipe.tokenizer.source, download=download, weights=False, key="tokenizer"))
    replaced = check_target(Path(output), sources, overwrite)
    planned = plan(recipe, {name: open_checkpoint(directory) for name, directory in directories.items()}, adapters)
    if note := lost_by_overwriting(output, replaced, planned.models[recipe.donor].directory):
        planned = replace(planned, notes=(*planned.notes, note))
    return planned


def plan(
    recipe: Recipe, models: Mapping[str, Checkpoint], adapters: Mapping[str, Path] = MappingProxyType({})
) -> MergePlan:
    """Plan a recipe whose inputs are `models`, by the names in `recipe.inputs`. adapters: directories of some models'.

    Raises UserError where models do not fit together: a weight that one lacks, other shapes or types, a layer range
    beyond the last layer, a parameter without a value for some tensor.
    """
    if empty := [name for name, model in models.items() if not model.tensors]:
        raise UserError(f"model '{empty[0]}': holds no tensor")
    damaged = check_side_files(recipe.donor, models[recipe.donor].directory)
    # What the models are, before anything compares them.
    configs = {name: read_config(model) or {} for name, model in models.items()}
    models, unwrapped = wrappers.unwrapped(models, {name: configs[name] or configs[recipe.donor] for name in models})
    models, dequantized = quantized.dequantized(recipe, models, configs, always=bool(adapters))
    all_configs = {name: config or configs[recipe.donor] for name, config in configs.items()}
    models, named = with_embeddings(models, all_configs)
    models, adapted = apply_adapters(models, adapters, configs)
    models, renamed = prefixes.match(models, recipe.donor)
    models = with_masks_of_one_type(models, recipe.donor)
    models, shared = with_shared_tensors(models, all_configs)
    layout, last = Layout(recipe, models), recipe.steps[-1]
    refuse_lost_layers(layout)
    refuse_moved_blocks(layout, layout.stacked_layers()[0])
    layout = with_moved_parts(layout)
    models = layout.models
    tokens = None if recipe.tokenizer is None else vocabulary(recipe.tokenizer, layout)
    planner = _Planner(layout, tokens)
    nodes = tuple(node for name in layout.names[last.name] if (node := planner.node(last, name)) is not None)
    planner.check_missing()
    if not nodes:
        raise UserError(
            f"step '{last.name}': its result would hold no tensor, by the names of those in '{recipe.donor}'"
        )
    planner.check_heads(nodes)
    has_head = any(layout.is_head_weight(node.name) for node in nodes)
    changes, notes = config_changes(layout, has_head, tokens, is_quantized=not dequantized)
    side_changes, side_notes = ({}, []) if dequantized else settings_changes(layout)
    donor_config = layout.configs[recipe.donor]
    chat = chat_of(layout, {**(donor_config or {}), **changes}, tokens)
    if donor_config is not None:
        changes |= chat.config_changes({**donor_config, **changes})
    if dequantized:
        changes |= quantized.without_settings({**configs[recipe.donor], **changes})
    remarks = [
        *recipe.notes,
        *unwrapped,
        *dequantized,
        *named,
        *adapted,
        *renamed,
        *shared,
        *(tokens.notes if tokens else ()),
        *([] if tokens else tokens_without_rows(layout)),
        *layers_beside_config(layout),
        *tensors_lost_in_layers(layout),
        *ends_in_zeros(models),
        *rounded_to_float32(nodes),
        *layout.notes,
        *same_files(models),
        *planner.remarks(),
        *notes,
        *side_notes,
        *chat.notes,
        *side_files(models[recipe.donor].directory).notes,
        *damaged,
    ]
    return MergePlan(recipe, models, nodes, changes, tuple(remarks), tokens, chat, side_changes)


class _Planner:
    """Makes nodes, and remembers what was read, missing or never decided. Remarks go to `layout.notes`."""

    def __init__(self, layout: Layout, tokens: Vocabulary | None) -> None:
        self.layout, self.recipe, self.rows = layout, layout.recipe, TokenRows(layout, tokens)
        self.labels = Labels(layout)
        self._nodes: dict[tuple[str, str], Node | None] = {}
        self._missing: dict[str, list[str]] = {}
        self._left_out: dict[str, str] = {}
        self._read: dict[str, set[str]] = {}
        self._filters: dict[tuple[str, str, str], bool] = {}
        self._weight_type = _weight_type(layout.models[self.recipe.donor])
        self._kept_wide: list[str] = []

    def node(self, step: Step, name: str) -> Node | None:
        """Return the node of one tensor of a step's result; None where a model lacks it, see `check_missing`."""
        if (step.name, name) not in self._nodes:
            self._nodes[step.name, name] = self._make(step, name)
        return self._nodes[step.name, name]

    def _make(self, step: Step, name: str) -> Node | None:
        origin = self.layout.origins[step.name][name]
        is_further = name in self.layout.further[step.name]
        part = self._without_foreign(origin, name, is_further)
        reads = part.reads
        tensors = {model: origin.names.get(model, name) for model in reads}
        sources = {model: self._source(model, t, t if is_further else name) for model, t in tensors.items()}
        inputs = {model: source for model, source in sources.items() if source is not None}
        if len(inputs) < len(reads):
            return None
        shape = self._check_inputs(name, inputs, step)
        stored = self._stored_type(step.name, name)
        if stored not in FLOATS:
            self._check_whole_numbers(name, inputs)
            return Node(name, part, inputs, {}, DTYPES[stored], shape)
        # What only later steps read stays float32.
        asked = self.recipe.dtype if step is self.recipe.steps[-1] else "float32"
        dtype = DTYPES[stored] if asked is None else np.dtype(getattr(ml_dtypes, asked, asked))
        if DTYPES[stored].itemsize > max(dtype.itemsize, self._weight_type.itemsize):
            dtype = DTYPES[stored]
            self._kept_wide.append(name)
        self._note_filters(origin.step, name, origin.names)
        return Node(name, part, inputs, part.at(name, origin.depth, origin.names), dtype, shape)

    def _without_foreign(self, origin: Origin, name: str, is_further: bool) -> Step:
        """Return what merges a head: the step without the models of other kinds that have none, or a copy of one's."""
        step = origin.step
        if is_further:  # MTP is lacking in whole or not at all
            foreign = [model for model in step.reads if not self.layout.further[model]]
        else:
            foreign = [model for model in step.reads if self.layout.is_foreign(model, name)]
        if not foreign:
            return step
        arguments = step.at(name, origin.depth, origin.names)
        if is_further:
            name = "what predicts further tokens (MTP)"
        part = without_models(step, foreign, arguments)
        shown = ", ".join(f"'{model}'" for model in foreign)
        if part.method is step.method and len(part.reads) > 1:
            self.layout.notes[f"{name}: {shown} has none, so it is merged from the others"] = None
        else:
            self.layout.notes[f"{name}: {shown} has none, so that of '{part.branches[0]}' is copied"] = None
        return part

    def _source(self, model: str, tensor: str, result: str) -> TensorSource | None:
        stored_name = self.layout.find(model, tensor)
        if stored_name is None:
            if is_buffer(tensor):
                self._left_out[tensor] = model
            else:
                self._missing.setdefault(model, []).append(tensor)
            return None
        if stored_name != tensor:
            self.layout.notes[f"model '{model}' is tied: its embedding counts as its {tensor}"] = None
        if model in self.layout.steps:
            node = self.node(self.layout.steps[model], stored_name)
            return None if node is None else TensorSource(stored_name, node=node)
        self._read.setdefault(model, set()).add(stored_name)
        info = self.layout.models[model].tensors[stored_name]
        if info.dtype in FLOATS and 0 in info.shape:
            raise UserError(
                f"model '{model}': tensor '{stored_name}' has shape {list(info.shape)}, so it holds nothing: it was "
                "saved without gathering its shards (ZeRO-3); save it again, gathered"
            )
        if not self.layout.is_vocabulary(result) or not info.shape:
            return TensorSource(stored_name, self.labels.rows(model, stored_name, info))
        rows, others = self.rows.of(model, result)
        for other, other_tensor, _ in others:
            self._read.setdefault(other, set()).add(other_tensor)
        return TensorSource(stored_name, rows, others=others)

    def _check_inputs(self, name: str, inputs: Mapping[str, TensorSource], step: Step) -> tuple[int, ...]:
        """Return the result's shape. Shapes and types of all inputs must agree; rows of tokens may differ in number."""
        forms: dict[str, tuple[tuple[int, ...], str]] = {}
        for model, source in inputs.items():
            shape = source.node.shape if source.node else self.layout.models[model].tensors[source.tensor].shape
            forms[model] = shape, self._stored_type(model, source.tensor)
        donor = self.recipe.donor
        is_whole_result = step is self.recipe.steps[-1] and not step.slices
        if is_whole_result and donor not in forms and (stored := self.layout.tensor(donor, name)) is not None:
            forms[donor] = stored.shape, stored.kept_dtype
        for model, tensor, _ in (other for source in inputs.values() for other in source.others):
            info = self.layout.models[model].tensors[tensor]
            forms.setdefault(model, (info.shape, info.kept_dtype))
        leader, (shape, kind) = next(iter(forms.items()))
        is_vocabulary = self.layout.is_vocabulary(name)
        for model, (other_shape, other_kind) in forms.items():
            shapes = other_shape, shape
            if len({with_tokens(name, s) if is_vocabulary else s for s in shapes}) > 1:
                raise UserError(
                    f"tensor '{name}' has shape {list(other_shape)} in model '{model}' and {list(shape)} in "
                    f"'{leader}'; only models of equal sizes can be merged"
                )
            if other_kind != kind and not {other_kind, kind} <= set(FLOATS):
                raise UserError(
                    f"tensor '{name}' is {other_kind} in model '{model}' and {kind} in '{leader}'; "
                    f"only {', '.join(FLOATS)} can be mixed: convert one of them (quantized models: from the original)"
                )
        rows = inputs[leader].rows
        return shape if rows is None else with_tokens(name, shape, len(rows))

    def _check_whole_numbers(self, name: str, inputs: Mapping[str, TensorSource]) -> None:
        """Raise a UserError where a small tensor that is no number to merge differs, which a merge would find late."""
        infos = {
            model: self.layout.models[model].tensors[source.tensor]
            for model, source in inputs.items()
            if source.node is None and source.rows is None
        }
        leader, first = next(iter(infos.items()), ("", None))
        for model, info in infos.items():
            if first is None or model == leader or not 0 < first.nbytes <= _COMPARED_BYTES:
                continue
            if (first.dtype, first.shape) == (info.dtype, info.shape) and not is_same_tensor(first, info):
                raise UserError(
                    f"tensor '{name}' is {first.numpy_dtype.name} and differs between models '{leader}' and '{model}'; "
                    f"only floating-point tensors can be merged: leave it to the donor with `keep: [{name}]`"
                )

    def _stored_type(self, model: str, name: str) -> str:
        """Return the type in which the base stores a tensor, traced back to a file; "" where no model has it."""
        step = self.layout.steps.get(model)
        if step is None:
            info = self.layout.tensor(model, name)
            return "" if info is None else info.kept_dtype
        stored_name = self.layout.find(model, name)
        if stored_name is None:
            return ""
        origin = self.layout.origins[model][stored_name]
        models = origin.step.reads if step.slices else step.models
        types = (self._stored_type(m, origin.names.get(m, stored_name)) for m in models)
        return next((kind for kind in types if kind), "")

    def _note_filters(self, step: Step, name: str, names: Mapping[str, str]) -> None:
        for branch, value in step.values:
            deciding = value.rule(names.get(branch, name) if branch else name)
            for rule in value.rules:
                if rule.text is not None:
                    key = (step.name, value.name, rule.text)
                    self._filters[key] = self._filters.get(key, False) or rule is deciding

    def check_missing(self) -> None:
        """Raise a UserError where an input lacks a weight that is needed."""
        for model, names in self._missing.items():
            donor, hint = self.recipe.donor, ""
            other = "another model" if model == donor else f"'{donor}'"
            if line := experts_of_two_layouts(self.layout.names[model], self.layout.names[donor], model, donor):
                raise UserError(line)
            if model != donor:
                hint = f", or leave them to '{donor}' with `keep: [{_parts_of(names)}]`"
            raise UserError(
                f"model '{model}' lacks {listing(list(dict.fromkeys(names)))} that {other} has; "
                f"only models of one architecture can be merged{hint}"
            )

    def check_heads(self, nodes: Sequence[Node]) -> None:
        """Raise a UserError where the result has no head, or no embedding, because a language model lost its own."""
        self.layout.check_embedding({node.name: node.shape for node in nodes})
        if any(self.layout.is_head_weight(node.name) for node in nodes):
            return
        for model, read in self._read.items():
            names = self.layout.names[model]
            if self.layout.embedding(model) not in read or any(map(self.layout.is_head_weight, names)):
                continue
            if self.layout.scores_codes(model):
                continue
            kind, said = self.layout.task(model), says_tied(self.layout.config(model) or {})
            if kind == "language" or (kind is None and said is False):
                self.layout.check_head(model)

    def remarks(self) -> Iterator[str]:
        """Yield a line for tensors that loaders compute, for those that nothing reads, and for idle filters."""
        for model in dict.fromkeys(self._left_out.values()):
            names = [name for name, lacking in self._left_out.items() if lacking == model]
            yield f"left out {listing(names)}: '{model}' lacks what loaders compute anyway"
        sliced = {name for step in self.recipe.steps for part in step.slices for name in part.ranges}
        for model, read in self._read.items():
            known = {*read, *self._left_out, self.layout.copied_heads.get(model, "")}
            kept = [rule for step in self.recipe.steps for rule in step.keep]
            names = [
                name
                for name in self.layout.models[model].tensors
                if name not in known and not any(rule.fits(name) for rule in kept)
            ]
            if model in sliced:
                result = self.layout.names[self.recipe.steps[-1].name]
                names = [name for name in names if layer(name) is None and name not in result]
            if names:
                lacking = (
                    f"'{self.recipe.donor}' lacks" if model != self.recipe.donor else "the result has no place for"
                )
                yield f"model '{model}' holds {listing(names)} that {lacking}; not merged"
        with_rows = [model for model, read in self._read.items() if any(map(self.layout.is_vocabulary, read))]
        yield from tokenizer_remarks(self.layout, with_rows, self.rows.tokens)
        yield from self.labels.remarks()
        yield from self.rows.remarks(self._read.get(self.recipe.donor, ()))
        if self._kept_wide:
            yield (
                f"{listing(self._kept_wide)} stay as '{self.recipe.donor}' stores them, wider than its "
                f"{self._weight_type.name} weights; dtype is for the others"
            )
        for (step, parameter, text), decides in self._filters.items():
            if not decides:
                yield f"step '{step}': parameter '{parameter}': filter '{text}' decides for no tensor"


def _parts_of(names: Iterable[str]) -> str:
    """Return what `keep` needs to name tensors: towers, `visual, audio_tower`, or a few by name; words for more."""
    names = list(dict.fromkeys(names))
    towers = [next((part for part in name.split(".") if is_of_tower(part)), None) for name in names]
    if None in towers:
        return ", ".join(names) if len(names) <= 2 else "PART OF THEIR NAMES"
    return ", ".join(dict.fromkeys(filter(None, towers)))


def _weight_type(donor: Checkpoint) -> np.dtype:
    """Return the floating type in which most of a model is stored."""
    sizes: Counter[np.dtype] = Counter()
    for info in donor.tensors.values():
        if info.kept_dtype in FLOATS:
            sizes[DTYPES[info.kept_dtype]] += byte_count(DTYPES[info.kept_dtype], info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=DTYPES["F32"])
