"""Which tensors every model and every step's result has, and what each tensor of a step is made from."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint, TensorInfo
from bmjax.merge.plan.heads import (
    TIED,
    UNTIED_FAMILIES,
    embedding_of,
    heads_by_shape,
    is_tied,
    is_tied_copy,
    says_tied,
    task,
    tied_embedding,
)
from bmjax.merge.plan.shared_tensors import head_without_embedding
from bmjax.merge.plan.stacks import further_token_tensors, language_stack, layer_counts
from bmjax.merge.plan.tensor_names import (
    TOWERS,
    Layer,
    depth,
    is_before_layers,
    is_code_head,
    is_head,
    is_of_tower,
    is_task_head,
    is_vocabulary,
    layer,
    token_axis,
)
from bmjax.merge.recipe.recipe import Recipe
from bmjax.merge.recipe.step import Slice, Step
from bmjax.model.config import read_hf_config

# The final norm and other senses' encoders stand beside the layers, too.
_NOT_A_HEAD = re.compile(rf"norm|(^|\.)ln_|{TOWERS}")

_SENTENCE_TRANSFORMERS = ("modules.json", "config_sentence_transformers.json", "1_Pooling")
# An embedding's name without the `model.` that families with this name have in classes with a head.
_BARE = re.compile(r"(language_model\.|text_model\.)?(embed_tokens|embed_in|tok_embeddings)\.weight")


class Origin(NamedTuple):
    """What makes a tensor."""

    step: Step  # or a slice's
    names: Mapping[str, str]  # the tensor's in that step's models, where they differ
    depth: float


class Layout:
    """The tensors of a recipe's inputs and steps by name, in the order of the files.

    A tied model has no head; a step's result has one if one of its models has. A model of another kind (of rewards, of
    embeddings) has no head either, and none is made of its embedding.
    """

    def __init__(self, recipe: Recipe, models: Mapping[str, Checkpoint]) -> None:
        self.recipe, self.models = recipe, models
        self.steps = {step.name: step for step in recipe.steps}
        self.names: dict[str, dict[str, None]] = {}  # of each input's and each step's tensors
        self.layers: dict[str, dict[str, int]] = {}  # of each input and step, how many each of its stacks has
        self.origins: dict[str, dict[str, Origin]] = {}  # of each step, by tensor
        self.further: dict[str, dict[str, None]] = {}  # of each input and step, what predicts further tokens (MTP)
        self._further_rows: set[str] = set()  # those of them that have a row for each token
        self.copied_heads: dict[str, str] = {}  # of inputs whose head is their embedding once more
        self.notes: dict[str, None] = {}  # remarks on the models, of all who plan with this layout
        self.configs = {name: read_config(model) for name, model in models.items()}
        self._tied: dict[str, bool] = {}  # of inputs without a head
        self._of_embeddings: dict[str, bool] = {}  # of inputs without a head
        self._heads_by_shape = {name for model in models.values() for name in heads_by_shape(model.tensors)}
        self._other_heads: frozenset[str] = frozenset()  # what models of other kinds end in, under names of their own
        for name, model in models.items():
            self.notes |= {f"model '{name}': {note}": None for note in model.notes}
            names = dict.fromkeys(model.tensors)
            heads = [tensor for tensor in names if self.is_head_weight(tensor)]
            if len(heads) == 1 and self._is_copied_embedding(name, heads[0]):
                self.notes[f"model '{name}': {heads[0]} is a copy of its embedding, so it counts as tied"] = None
                self.copied_heads[name] = heads[0]
                del names[heads[0]]
            self.further[name] = further_token_tensors(names, self.configs[name] or {})
            embedding = model.tensors.get(embedding_of(names) or "")
            self._further_rows |= {
                tensor for tensor in self.further[name]
                if embedding is not None and model.tensors[tensor].shape == embedding.shape
            }  # fmt: skip
            self.names[name], self.layers[name] = names, layer_counts(n for n in names if n not in self.further[name])
        self._other_heads = self._heads_of_other_kinds()
        for step in recipe.steps:
            if step.slices:
                origins = self._origins_of_slices(step)
            else:
                names = self._with_heads(self.names[step.donor], step)
                self.further[step.name] = {name: None for name in names if name in self.further[step.donor]}
                stacks = layer_counts(n for n in names if n not in self.further[step.name])
                origins = {name: Origin(step, {}, _depth(name, stacks)) for name in names}
            self.names[step.name] = dict.fromkeys(origins)
            self.layers[step.name] = layer_counts(n for n in origins if n not in self.further[step.name])
            self.origins[step.name] = {name: self._unless_kept(step, name, origin) for name, origin in origins.items()}
            for rule in step.keep:
                if rule.text is not None and not any(map(rule.fits, origins)):
                    self.notes[f"step '{step.name}': keep: '{rule.text}' fits no tensor"] = None

    def embedding(self, model: str) -> str | None:
        """Return the one tensor that holds a model's token embedding; None when none or several do."""
        return embedding_of(self.names[model])

    def is_head(self, name: str) -> bool:
        """Return whether a tensor is a language head's, by its name or by its shape in a model that has it."""
        return is_head(name) or name in self._heads_by_shape

    def is_head_weight(self, name: str) -> bool:
        """Return whether a tensor is the matrix of a language head. The bias alone stands beside a tied embedding."""
        return name.endswith(".weight") and self.is_head(name)

    def scores_codes(self, model: str) -> bool:
        """Return whether an input or a step scores codes in place of tokens, so that it needs no language head."""
        names = self.names[model]
        return any(map(is_code_head, names)) and not any(map(self.is_head_weight, names))

    def is_vocabulary(self, name: str) -> bool:
        """Return whether a tensor has a row for each token."""
        return is_vocabulary(name) or self.is_head(name) or name in self._further_rows

    def stack(self, model: str) -> str | None:
        """Return the language model's stack of layers in an input or a step; None where it cannot be told."""
        donor = self.recipe.donor_of(model)
        stack = language_stack(self.layers[donor], self.configs[donor] or {})
        return stack if stack in self.layers[model] else language_stack(self.layers[model], {})

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

    def stacked_layers(self) -> tuple[list[tuple[str, int]], int]:
        """Return the (input, its layer) of every layer of the result, [] where they are the donor's; and its count."""
        donor, result = self.recipe.donor, self.recipe.steps[-1].name
        stack, donor_stack = self.stack(result), self.stack(donor)
        count = self.layers[donor][donor_stack] if donor_stack else 0
        layers = [self.origin_of_layer(result, n) for n in range(self.layers[result][stack] if stack else 0)]
        return ([] if layers == [(donor, number) for number in range(count)] else layers), count

    def tensor(self, model: str, name: str) -> TensorInfo | None:
        """Return the header entry of an input's tensor; for the head of a tied model that of its embedding."""
        stored_name = self.find(model, name)
        return None if stored_name is None else self.models[model].tensors[stored_name]

    def row_count(self, model: str, name: str) -> int | None:
        """Return how many rows of tokens an input's tensor has; None when it has no such tensor, or a scalar."""
        info = self.tensor(model, name)
        return info.shape[token_axis(name)] if info is not None and info.shape else None

    def find(self, model: str, name: str) -> str | None:
        """Return the name under which an input or a step holds a tensor: a tied model's head is its embedding.

        Raises UserError for a model that lost its head: it has none, and its config says that it is not tied.
        """
        if name in self.names[model]:
            return name
        if not self.is_head_weight(name) or self.is_foreign(model, name) or self.scores_codes(model):
            return None
        if (embedding := self.embedding(model)) is not None:
            self.check_head(model, name)
        return embedding

    def task(self, model: str) -> str | None:
        """Return what an input or a step is for, see `heads.task`."""
        names = self.names[model]
        has_head = any(map(self.is_head, names))
        kind = task(self.config(model), names, has_head)
        is_of_embeddings = kind == "language" and not has_head and self._is_of_embeddings(self.recipe.donor_of(model))
        return "other" if is_of_embeddings else kind

    def config(self, model: str) -> dict[str, Any] | None:
        """Return the config of an input or of a step's donor; of an input without one the donor's."""
        return self.configs[self.recipe.donor_of(model)] or self.configs[self.recipe.donor]

    def is_foreign(self, model: str, name: str) -> bool:
        """Return whether a model lacks a head because it is of another kind than the models that have it."""
        if name in self.names[model]:
            return False
        if is_task_head(name) or name in self._other_heads:
            # A language model is whole without one, also beside a language model with a head of values.
            return self.task(model) in ("language", None) or self.task(model) != self.task(self.recipe.donor)
        if not self.is_head(name) or self.task(model) != "other":
            return False
        # The embedding model of a tied language model still has that model's head.
        return any(map(is_task_head, self.names[model])) or not says_tied(self.config(model) or {})

    def is_tied(self, model: str) -> bool:
        """Return whether an input's config, or its class where the config is silent, makes its embedding its head."""
        if model not in self._tied:
            self._tied[model] = is_tied(self.config(model) or {})
        return self._tied[model]

    def is_tied_result(self) -> bool:
        """Return whether the embedding of the last step's result is its head: whether a model that ends it is tied."""
        last = self.recipe.steps[-1]
        reads = last.slices[-1].step.reads if last.slices else last.reads
        inputs = {self.last_input(model) for model in reads}
        return any(self.task(model) != "other" and self.is_tied(model) for model in inputs)

    def last_input(self, model: str) -> str:
        """Return the input that the last layers, and what stands behind them, come from first."""
        while (step := self.steps.get(model)) is not None:
            model = step.slices[-1].step.reads[0] if step.slices else step.donor
        return model

    def _is_of_embeddings(self, model: str) -> bool:
        """Return whether an input without a head is an embedding model, whose config may name a class that has one.

        sentence-transformers saves its modules beside the weights. A class without a head names its tensors without
        the prefix that the class with a head gives them.
        """
        if model not in self._of_embeddings:
            checkpoint = self.models[model]
            embedding = checkpoint.tensors.get(self.embedding(model) or "")
            has_modules = any((checkpoint.directory / name).exists() for name in _SENTENCE_TRANSFORMERS)
            has_bare_names = embedding is not None and _BARE.fullmatch(embedding.name) is not None
            self._of_embeddings[model] = (has_modules or has_bare_names) and not self.is_tied(model)
            if self._of_embeddings[model] and not has_modules:
                self.notes[
                    f"model '{model}' has no head, is not tied, and names its tensors as a class without a head does "
                    f"('{embedding.name}'): it counts as a model of embeddings"  # type: ignore[union-attr]
                ] = None
        return self._of_embeddings[model]

    def check_head(self, model: str, name: str = "lm_head.weight") -> None:
        """Raise a UserError unless the config of a language model without a head says that it is tied."""
        donor = self.recipe.donor_of(model)
        if not self.is_tied(donor):
            config = self.config(donor) or {}
            says = f"{TIED} false" if says_tied(config) is False else f"nothing of {TIED}, so it is not tied"
            raise UserError(
                f"model '{donor}': its config says {says}, but the weights hold no {name}: the head was lost when it "
                f"was saved; restore it, or write {TIED} true into config.json if its embedding is its head"
            )

    def check_embedding(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a UserError where the result, of tensors of `shapes`, has a head and lacks an embedding."""
        last = self.recipe.steps[-1]
        first = self.recipe.donor_of(last.slices[0].step.reads[0] if last.slices else last.donor)
        if (head := head_without_embedding(shapes, self.config(first) or {})) is not None:
            raise UserError(
                f"model '{first}': its weights hold a head, {head}, and no embedding: it was lost when the model was "
                f"saved; restore it, or write {TIED} true into config.json if its head is its embedding"
            )

    def _heads_of_other_kinds(self) -> frozenset[str]:
        """Return the tensors behind the layers of models of rewards or classes that no language model has."""
        kinds = {name: self.task(name) for name in self.models}
        language = {name for model, kind in kinds.items() if kind == "language" for name in self.names[model]}
        heads = set()
        for model in (model for model, kind in kinds.items() if kind == "other" and language):
            stack = language_stack(self.layers[model], self.configs[model] or {})
            for name in self.names[model]:
                in_layers = stack is not None and (t := layer(name)) is not None and t.stack == stack
                if not (name in language or in_layers or _NOT_A_HEAD.search(name) or is_before_layers(name)):
                    heads.add(name)
        return frozenset(heads)

    def _with_heads(self, names: Iterable[str], step: Step) -> dict[str, None]:
        """Return `names` with the heads that the merged models have, whether the donor has them or not."""
        heads = dict.fromkeys(name for model in step.reads for name in self.names[model] if self.is_head(name))
        if self.task(step.donor) == "other":
            return dict.fromkeys(names)
        return dict.fromkeys([*(name for name in names if not self.is_head(name) or name in heads), *heads])

    @staticmethod
    def _unless_kept(step: Step, name: str, origin: Origin) -> Origin:
        """Return the origin, or the donor's tensor alone where the recipe's `keep` names it."""
        return origin._replace(step=origin.step.kept()) if any(rule.fits(name) for rule in step.keep) else origin

    def _is_copied_embedding(self, model: str, head: str) -> bool:
        """Return whether a tied model's files hold the embedding once more as its head, as some trainers save it."""
        tensors, config = self.models[model].tensors, self.configs[model] or {}
        said, model_type = says_tied(config), config.get("model_type")
        # Where no config ties it, a copy is kept: it costs its bytes, and nothing else.
        if said is False or (said is None and (model_type is None or model_type in UNTIED_FAMILIES)):
            return False
        embedding = tensors.get(tied_embedding(tensors) or "")
        # The class of a silent config may have to be looked up, which takes seconds: few heads begin as the embedding.
        return (
            is_tied_copy(embedding, tensors[head], 2**12) and is_tied(config) and is_tied_copy(embedding, tensors[head])
        )

    def _origins_of_slices(self, step: Step) -> dict[str, Origin]:
        # What stands before the layers is the first slice's, what stands after them the last one's. Other stacks than
        # the language model's count as standing before its layers.
        first, last = step.slices[0].step, step.slices[-1].step
        stacks = {part.step.reads[0]: self.stack(part.step.reads[0]) for part in step.slices}

        def is_layered(name: str, model: str) -> bool:
            in_stack = (t := layer(name)) is not None and t.stack == stacks[model]
            return in_stack or name in self.further[model]

        before, after = ([n for n in self.names[s.reads[0]] if not is_layered(n, s.reads[0])] for s in (first, last))
        counts = self.layers[first.reads[0]]
        origins = {name: Origin(first, {}, _depth(name, counts)) for name in before if self._is_before_layers(name)}
        start = 0
        for part in step.slices:
            self._check_ranges(part)
            lead = part.step.reads[0]
            by_number: dict[int, list[Layer]] = {}
            names = (name for name in self.names[lead] if name not in self.further[lead])
            for tensor in (t for name in names if (t := layer(name)) and t.stack == stacks[lead]):
                by_number.setdefault(tensor.number, []).append(tensor)
            for k in range(part.layers):
                for tensor in by_number.get(part.ranges[lead][0] + k, ()):
                    stored = {m: tensor._replace(number=low + k).name for m, (low, _) in part.ranges.items()}
                    name = tensor._replace(number=start + k).name
                    origins[name] = Origin(part.step, stored, depth(k, part.layers))
            start += part.layers
        further = self._further_of_slices(step, stacks[last.reads[0]], start)
        self.further[step.name] = dict.fromkeys(further)
        tail = [n for n in after if not self._is_before_layers(n)]
        rest = self._with_heads(tail, last)
        is_language, other_models = self.task(last.reads[0]) != "other", first.reads[0] != last.reads[0]
        if is_language and other_models and not any(map(self.is_head_weight, rest)):
            # The last layers' head is their own model's embedding, which the result has only as that model's.
            heads = [name for name in self.names[first.reads[0]] if self.is_head_weight(name)]
            rest |= dict.fromkeys(heads)
            if not heads and self.embedding(first.reads[0]) and self.task(first.reads[0]) != "other":
                self.notes[
                    f"step '{step.name}': the result is tied, as its models are: the embedding of '{first.reads[0]}' "
                    f"is the head behind the last layers, which are those of '{last.reads[0]}'"
                ] = None
        ahead = {
            n: origin for n, origin in further.items() if (t := layer(n)) is None or t.stack not in stacks.values()
        }
        return ahead | origins | further | {name: Origin(last, {}, 0.0) for name in rest}

    def _further_of_slices(self, step: Step, stack: str | None, count: int) -> dict[str, Origin]:
        """Return what predicts further tokens behind `count` stacked layers: the last slice's, layers renumbered."""
        last = step.slices[-1].step
        lead = last.reads[0]
        origins: dict[str, Origin] = {}
        for name in self.further[lead]:
            t = layer(name)
            if t is None or t.stack != stack:
                origins[name] = Origin(last, {}, 1.0 if t else 0.0)
                continue
            behind = t.number - self.layers[lead][stack]
            moved = t._replace(number=count + behind).name
            stored = {
                model: t._replace(number=self.layers[model][stack] + behind).name
                for model in last.reads if self.further[model] and stack in self.layers[model]
            }  # fmt: skip
            origins[moved] = Origin(last, stored, 1.0)
            if name in self._further_rows:
                self._further_rows.add(moved)
        return origins

    def _is_before_layers(self, name: str) -> bool:
        """Return whether a tensor outside of the language model's layers stands before them."""
        return not self.is_head(name) and (is_before_layers(name) or is_of_tower(name) or layer(name) is not None)

    def _check_ranges(self, part: Slice) -> None:
        for model, (_, end) in part.ranges.items():
            stacks, stack = self.layers[model], self.stack(model)
            if stack is None:
                raise UserError(
                    f"model '{model}': slices need one stack of layers; by its tensors' names it has "
                    f"{', '.join(stacks) or 'none'}"
                )
            if end > (count := stacks[stack]):
                hint = ", and what predicts further tokens, which follows by itself" if self.further[model] else ""
                raise UserError(f"model '{model}': layer_range ends at {end}, but {stack} has {count} layers{hint}")


def _depth(name: str, stacks: Mapping[str, int]) -> float:
    t = layer(name)
    count = stacks.get(t.stack, 0) if t else 0
    return 0.0 if t is None else 1.0 if t.number >= count else depth(t.number, count)


def read_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the config.json beside the weights, or None."""
    # A link that leads nowhere is a mistake, not a model without a config.
    return read_hf_config(checkpoint.directory) if os.path.lexists(checkpoint.directory / "config.json") else None
