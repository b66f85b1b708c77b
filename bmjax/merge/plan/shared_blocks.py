"""Blocks that several layers share (Zamba), stored with the first of them, with an adapter for each by its place.

A stack that has these layers in another order, or more of them, would lack the block or adapters, and loaders would
make them at random.
"""

import re
from collections.abc import Sequence

from bmjax.config import UserError
from bmjax.io.safetensors import listing
from bmjax.merge.plan.layout import Layout
from bmjax.merge.plan.tensor_names import layer

_SHARED = re.compile(r"shared_transf(ormer)?\.")
_SHARING = re.compile(
    r"(shared_transf(ormer)?|mamba_decoder)\."
)  # what a layer with such a block has, wherever that is
_ADAPTER = re.compile(r"_adapter_list\.\d+\.")


def refuse_moved_blocks(layout: Layout, layers: Sequence[tuple[str, int]]) -> None:
    """Raise a UserError where layers that share a block do not stand in the result as they do in their model.

    layers: (input, its layer) that each layer of the result comes from.
    """
    for model in dict.fromkeys(model for model, _ in layers):
        tensors = {name: t for name in layout.names[model] if (t := layer(name)) and t.stack == layout.stack(model)}
        shared = [name for name, t in tensors.items() if _SHARED.match(t.tensor)]
        if not shared:
            continue
        sharing = sorted({t.number for t in tensors.values() if _SHARING.match(t.tensor)})
        others = {other for other, _ in layers} - {model}
        moved = [number for other, number in layers if other == model and number in sharing]
        has_adapters = any(map(_ADAPTER.search, shared))
        # The first ones in their order need nothing else. Without adapters those behind the first may stand anywhere.
        is_whole = moved == sharing[: len(moved)] if has_adapters else moved[:1] == sharing[:1]
        if not moved or (is_whole and not others):
            continue
        also = ", with an adapter for each by its place among them" if has_adapters else ""
        found = " and ".join(["layers " + ", ".join(map(str, moved)), *(f"layers of '{other}'" for other in others)])
        raise UserError(
            f"model '{model}': its layers {', '.join(map(str, sharing))} share a block, {listing(shared[:1])}, stored "
            f"with the first of them{also}; the result would have {found} of it, and loaders would make what it lacks "
            "at random: choose slices that have all of these layers, or the first ones, once and in this order"
        )
