"""THE parameter table: every parameter's path, shape, logical axes, initializer, Hugging Face key and layout.

A new architecture gets its rows here: what a model has no row for (a bias, a head), its modules leave out.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bmjax.model.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # Hugging Face keys


@dataclass(frozen=True)
class Param:
    """One row of the table."""

    path: tuple[str, ...]  # keys in the nested parameter dictionary
    shape: tuple[int, ...]  # of the array there, with the layer axis first where it is stacked over layers
    axes: tuple[str, ...]
    hf_key: str  # name in a Hugging Face checkpoint, with `{layer}` where the array is stacked
    init: str  # 'normal' (standard deviation `initializer_range`), 'zeros' or 'ones'
    # The HF tensor is this array's (per layer) transpose, so the HF last axis (in_features, the row a merge normalises
    # along) is the second to last axis here.
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

    def of_layer(self, layer: int) -> "Param":
        """Return the row of one layer's part of a stacked parameter."""
        return replace(self, shape=self.shape[1:], axes=self.axes[1:], hf_key=self.hf_key.format(layer=layer))


# Path, logical axes, Hugging Face key.
_TABLE = (
    ("embed/embedding", "vocab embed", EMBEDDING),
    ("layers/attention_norm/scale", "layers norm", "model.layers.{layer}.input_layernorm.weight"),
    ("layers/attention/q/kernel", "layers embed heads", "model.layers.{layer}.self_attn.q_proj.weight"),
    ("layers/attention/q/bias", "layers heads", "model.layers.{layer}.self_attn.q_proj.bias"),
    ("layers/attention/k/kernel", "layers embed kv_heads", "model.layers.{layer}.self_attn.k_proj.weight"),
    ("layers/attention/k/bias", "layers kv_heads", "model.layers.{layer}.self_attn.k_proj.bias"),
    ("layers/attention/v/kernel", "layers embed kv_heads", "model.layers.{layer}.self_attn.v_proj.weight"),
    ("layers/attention/v/bias", "layers kv_heads", "model.layers.{layer}.self_attn.v_proj.bias"),
    ("layers/attention/o/kernel", "layers heads embed", "model.layers.{layer}.self_attn.o_proj.weight"),
    ("layers/mlp_norm/scale", "layers norm", "model.layers.{layer}.post_attention_layernorm.weight"),
    ("layers/mlp/gate/kernel", "layers embed mlp", "model.layers.{layer}.mlp.gate_proj.weight"),
    ("layers/mlp/up/kernel", "layers embed mlp", "model.layers.{layer}.mlp.up_proj.weight"),
    ("layers/mlp/down/kernel", "layers mlp embed", "model.layers.{layer}.mlp.down_proj.weight"),
    ("final_norm/scale", "norm", "model.norm.weight"),
    ("lm_head/kernel", "embed vocab", HEAD),
)
_INITIALIZERS = {"embedding": "normal", "kernel": "normal", "bias": "zeros", "scale": "ones"}


def table(c: ModelConfig) -> tuple[Param, ...]:
    """Return a row for every parameter of the model, in the order of a Hugging Face checkpoint."""
    sizes = {
        "layers": c.num_layers, "vocab": c.vocab_size, "embed": c.hidden_size, "norm": c.hidden_size,
        "heads": c.num_heads * c.head_dim, "kv_heads": c.num_kv_heads * c.head_dim, "mlp": c.intermediate_size,
    }  # fmt: skip
    rows = []
    for name, logical_axes, hf_key in _TABLE:
        path, axes = tuple(name.split("/")), tuple(logical_axes.split())
        shape, kind = tuple(sizes[axis] for axis in axes), path[-1]
        rows.append(Param(path, shape, axes, hf_key, _INITIALIZERS[kind], transposed=kind == "kernel"))
    return tuple(rows[:-1] if c.tied else rows)


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
