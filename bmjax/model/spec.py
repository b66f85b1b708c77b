"""THE parameter table: every parameter's path, shape, logical axes, initializer, Hugging Face key and layout.

A new architecture gets its rows here: what a model has no row for (a bias, a head), its modules leave out.
Shapes: V vocabulary, D hidden size, N query heads, K key/value heads, H head size, F feed-forward, L layers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bmjax.model.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # Hugging Face keys


@dataclass(frozen=True)
class Param:
    """One row of the table.

    transposed: the HF tensor is this array's (per layer) transpose, so the HF last axis (in_features, the row a merge
    normalises along) is the second to last axis here.
    """

    path: tuple[str, ...]  # keys in the nested parameter dictionary
    shape: tuple[int, ...]  # of the array there, with the layer axis first where it is stacked over layers
    axes: tuple[str, ...]
    hf_key: str  # name in a Hugging Face checkpoint, with `{layer}` where the array is stacked
    init: str  # 'normal' (standard deviation `initializer_range`), 'zeros' or 'ones'
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the array holds all layers, along its first axis."""
        return "{layer}" in self.hf_key

    @property
    def name(self) -> str:
        """The path as a string, as `freeze:` patterns and logs write it: layers/attention/q/kernel."""
        return "/".join(self.path)

    @property
    def is_matrix(self) -> bool:
        """Two or more dimensions per layer: what weight decay applies to (biases and norms are vectors)."""
        return len(self.hf_shape) >= 2

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor, or of each layer's."""
        per_layer = self.shape[1:] if self.stacked else self.shape
        return per_layer[::-1] if self.transposed else per_layer

    def hf_keys(self) -> list[str]:
        """Return the names of the checkpoint's tensors that make up this parameter, in layer order."""
        return [self.hf_key.format(layer=i) for i in range(self.shape[0])] if self.stacked else [self.hf_key]


def table(c: ModelConfig) -> tuple[Param, ...]:
    """Return a row for every parameter of the model, in the order of a Hugging Face checkpoint."""
    L, D, F, V = c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size
    NH, KH = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def kernel(path: str, shape: tuple[int, int], axes: tuple[str, str], hf: str) -> Param:
        keys, hf_key = ("layers", *path.split("/"), "kernel"), f"model.layers.{{layer}}.{hf}.weight"
        return Param(keys, (L, *shape), ("layers", *axes), hf_key, "normal", transposed=True)

    def vector(path: str, size: int, axis: str, hf: str, init: str) -> Param:
        return Param(("layers", *path.split("/")), (L, size), ("layers", axis), f"model.layers.{{layer}}.{hf}", init)

    rows = [
        Param(("embed", "embedding"), (V, D), ("vocab", "embed"), EMBEDDING, "normal"),
        vector("attention_norm/scale", D, "norm", "input_layernorm.weight", "ones"),
    ]
    for letter, size, axis in (("q", NH, "heads"), ("k", KH, "kv_heads"), ("v", KH, "kv_heads")):
        rows += [
            kernel(f"attention/{letter}", (D, size), ("embed", axis), f"self_attn.{letter}_proj"),
            vector(f"attention/{letter}/bias", size, axis, f"self_attn.{letter}_proj.bias", "zeros"),
        ]
    rows += [
        kernel("attention/o", (NH, D), ("heads", "embed"), "self_attn.o_proj"),
        vector("mlp_norm/scale", D, "norm", "post_attention_layernorm.weight", "ones"),
        kernel("mlp/gate", (D, F), ("embed", "mlp"), "mlp.gate_proj"),
        kernel("mlp/up", (D, F), ("embed", "mlp"), "mlp.up_proj"),
        kernel("mlp/down", (F, D), ("mlp", "embed"), "mlp.down_proj"),
        Param(("final_norm", "scale"), (D,), ("norm",), "model.norm.weight", "ones"),
    ]
    if not c.tied:
        rows.append(Param(("lm_head", "kernel"), (D, V), ("embed", "vocab"), HEAD, "normal", transposed=True))
    return tuple(rows)


def count(c: ModelConfig) -> int:
    """Return the number of parameters (a tied embedding counts once)."""
    return sum(math.prod(row.shape) for row in table(c))


def get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Return the leaf of a nested dictionary at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def unflatten(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Build a nested dictionary from (path, leaf) pairs."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        block = tree
        for key in path[:-1]:
            block = block.setdefault(key, {})
        block[path[-1]] = leaf
    return tree


def pick(params: Any, rows: tuple[Param, ...]) -> dict[str, Any]:
    """Return the nested dictionary of these rows' parameters only."""
    return unflatten((row.path, get(params, row.path)) for row in rows)


def join(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Return two disjoint nested dictionaries as one."""
    out = dict(left)
    for key, value in right.items():
        out[key] = join(out[key], value) if key in out else value
    return out
