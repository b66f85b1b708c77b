"""Tensors outside of the layers that hold a part for each of them, as those of Gemma 3n and Gemma 4 do.

`embed_tokens_per_layer` has columns for every layer, `per_layer_model_projection` rows. The parts follow their layers
in a stack, and the rows of the former its tokens.
"""

from dataclasses import replace

from bmjax.config import UserError
from bmjax.io.safetensors import TensorInfo, listing
from bmjax.io.tensor_forms import PartsTensor
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.tensor_names import is_per_layer_embedding, layer
from bmjax.merge.plan.vocabulary import Vocabulary

PER_LAYER_ROWS = "vocab_size_per_layer_input"  # the key of a config for the rows of such an embedding
_AXES = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}  # along which axis the parts lie, by module


def with_moved_parts(layout: Layout) -> Layout:
    """Return the layout with models whose tensors with a part for each layer have the parts of a stack's layers.

    Raises UserError for a stack of several models' layers, whose parts one tensor would have to hold, and for tensors
    of which it is not known where their parts are.
    """
    recipe, slices = layout.recipe, layout.recipe.steps[-1].slices
    with_parts = {model: names for model in recipe.inputs if (names := _with_parts(layout, model))}
    if not with_parts or not layout.stacked_layers()[0]:
        return layout
    is_one_step = len(recipe.steps) == 1 and len({frozenset(part.ranges) for part in slices}) == 1
    for model, names in with_parts.items():
        unknown = [name for name in names if _module(name) not in _AXES]
        if unknown or not is_one_step or model not in slices[0].ranges:
            problem = (
                "where the parts are is not known: merge the whole models"
                if unknown
                else "one tensor cannot follow several models: let every slice of one step read the same models"
            )
            raise UserError(
                f"{listing(unknown or names)} of '{model}' hold a part for each of its layers, and the layers move; "
                f"{problem}"
            )
    changed = dict(layout.models)
    for model, names in with_parts.items():
        numbers = tuple(part.ranges[model][0] + k for part in slices for k in range(part.layers))
        tensors = dict(layout.models[model].tensors)
        tensors |= {name: _moved(tensors[name], numbers, _layers(layout, model)) for name in names}
        changed[model] = replace(layout.models[model], tensors=tensors)
    return Layout(recipe, changed)


def per_layer_rows(layout: Layout, vocabulary: Vocabulary) -> int | None:
    """Return how many rows of tokens the result's embedding for each layer has; None where it has no such tensor.

    It keeps its rows where the donor's tokens stay, of which the last ones (of images and sounds) may have none.
    """
    donor = layout.recipe.donor
    name = next(filter(is_per_layer_embedding, layout.names[donor]), None)
    if name is None:
        return None
    rows = layout.row_count(donor, name)
    return rows if rows is not None and vocabulary.ids[donor] == vocabulary.tokens else vocabulary.size


def _with_parts(layout: Layout, model: str) -> list[str]:
    """Return the tensors of an input, outside of its layers, that have a part for each of them."""
    count = _layers(layout, model)
    return [
        name for name, info in layout.models[model].tensors.items()
        if count and layer(name) is None and "per_layer" in name and "norm" not in name
        and any(size > count and size % count == 0 for size in info.shape)
    ]  # fmt: skip


def _layers(layout: Layout, model: str) -> int:
    stack = layout.stack(model)
    return layout.layers[model][stack] if stack else 0


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _moved(info: TensorInfo, numbers: tuple[int, ...], layers: int) -> TensorInfo:
    """Return a tensor with the parts of `numbers` in place of those of `layers` layers."""
    axis = _AXES[_module(info.name)]
    if len(info.shape) != 2 or info.shape[axis] % layers:
        raise UserError(
            f"tensor '{info.name}' is {list(info.shape)}, expected a matrix with a part for each of {layers} layers "
            f"along axis {axis}"
        )
    size = info.shape[axis] // layers
    shape = tuple(len(numbers) * size if i == axis else n for i, n in enumerate(info.shape))
    return PartsTensor(info.name, info.file, "F32", shape, info.start, info.nbytes, info, axis, numbers, size)
