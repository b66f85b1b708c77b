"""Independent float64 formulas of the merge methods, and small checkpoints to merge."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bmjax.merge.engine.trees import merge_trees
from bmjax.model.config import ModelConfig
from bmjax.model.spec import Param, table

EPSILON = 1e-8
BF16 = ml_dtypes.bfloat16


def merge_by(method, base, branches, rows, *, seed=0, compat=None, dtype=None, **parameters):
    """`merge_trees` by one method, of trees that are not named or by their names.

    parameters: the method's, a tuple or list with one value a branch. `rebase` is a tree, `importance` one a branch.
    """
    models = branches if isinstance(branches, dict) else {f"branch {i}": tree for i, tree in enumerate(branches)}
    entries = [{"model": name, "parameters": {}} for name in models]
    recipe = {"merge_method": method, "models": entries, "parameters": {}, "seed": seed}
    recipe |= {} if compat is None else {"compat": compat}
    if base is not None:
        models, recipe["base_model"] = {**models, "base": base}, "base"
    for argument, value in parameters.items():
        name = argument.rstrip("_")
        if name == "rebase":
            models, recipe["parameters"][name] = {**models, name: value}, name
        elif isinstance(value, (list, tuple)):
            for i, (entry, item) in enumerate(zip(entries, value, strict=True)):
                if name == "importance":
                    models, item = {**models, f"importance {i}": item}, f"importance {i}"
                entry["parameters"][name] = item
        else:
            recipe["parameters"][name] = value
    return merge_trees(recipe, models, rows, dtype=dtype)


def merge_arrays(method, base, branches, **parameters):
    """One tensor in the Hugging Face layout: (merged, float32, and the share of entries taken of each branch).

    parameters: as of `merge_by`; `rebase` is an array, `importance` one a branch.
    """
    shape = np.shape(branches[0])
    rows = [Param(("w",), shape, ("rows",) * len(shape), "", "normal")]
    if "rebase" in parameters:
        parameters["rebase"] = {"w": parameters["rebase"]}
    if "importance" in parameters and method == "fisher":
        parameters["importance"] = [{"w": array} for array in parameters["importance"]]
    trees = [{"w": array} for array in branches]
    base = None if base is None else {"w": base}
    params, report = merge_by(method, base, trees, rows, dtype="float32", **parameters)
    models = report["total"]["merged"]["models"]
    return params["w"], np.array([model["kept"] for model in models.values()])


def leaf(method, base, branches, **parameters):
    """What the method makes of one tensor, as a numpy array."""
    return np.asarray(merge_arrays(method, base, branches, **parameters)[0])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def fusion_mask(base, branch, origin=None):
    """The textbook arcee fusion mask in float64: base, branch of one HF tensor (1-D: the vector is the row)."""
    b, w = base.astype(np.float64), branch.astype(np.float64)
    if origin is not None:
        w = b + (w - origin.astype(np.float64))
    importance = np.abs(w - b)
    size = max(1, 2**24 // b.shape[-1])  # rows at a time, for whole embeddings
    rows = [slice(None)] if b.ndim < 2 else [slice(i, i + size) for i in range(0, len(b), size)]
    for at in rows:
        p, q = softmax(w[at]) + EPSILON, softmax(b[at]) + EPSILON
        importance[at] *= np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    ordered = np.sort(importance.ravel())
    q1, median, q3 = (ordered[int(np.floor(share * (ordered.size - 1)))] for share in (0.25, 0.5, 0.75))
    return (importance >= median + 1.5 * (q3 - q1)) & (w != b)


def fuse(base, branch, origin=None):
    mask = fusion_mask(base, branch, origin)
    b, w = base.astype(np.float64), branch.astype(np.float64)
    return np.where(mask, w if origin is None else b + (w - origin.astype(np.float64)), b)


def jaccard(a, b):
    union = np.sum(a | b)
    return 1.0 if union == 0 else np.sum(a & b) / union


def real_sized(shape, seed, weight_rms=0.02, delta_rms=2e-4, branches=1):
    """A base and branches as fine-tuning leaves them: float32."""
    rng = np.random.default_rng(seed)
    base = (weight_rms * rng.standard_normal(shape)).astype(np.float32)
    return base, [(base + delta_rms * rng.standard_normal(shape)).astype(np.float32) for _ in range(branches)]


def heavy_tailed(shape, seed, branches=1):
    """Student's t with 3 degrees of freedom: some weights and changes far out."""
    rng = np.random.default_rng(seed)
    base = (0.05 * rng.standard_t(3, shape)).astype(np.float32)
    return base, [(base + 0.01 * rng.standard_t(3, shape)).astype(np.float32) for _ in range(branches)]


# Few different shapes, because each is a compilation.
SMALL = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8,
    max_length=64,
)  # fmt: skip


def hf_tensors(config, seed, base=None, delta=1e-3, dtype=np.float32):
    """Random HF tensors of a config, or `base` moved a little."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for row in table(config):
        for key in row.hf_keys():
            noise = rng.standard_normal(row.hf_shape)
            value = 0.05 * noise if base is None else base[key].astype(np.float64) + delta * noise
            tensors[key] = value.astype(dtype)
    return tensors


def hf_dir(directory: Path, tensors, **config):
    """An HF directory as the safetensors library writes it."""
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    kinds = {str(t.dtype) for t in tensors.values()}
    config = {"model_type": "qwen2", "dtype": kinds.pop() if len(kinds) == 1 else "float32", **config}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps({"made for": directory.name}))
    return directory


def tree_of(config, tensors):
    """The nested dictionary of numpy arrays that holds HF tensors, by the table."""
    tree = {}
    for row in table(config):
        leaves = [tensors[key].T if row.transposed else tensors[key] for key in row.hf_keys()]
        block = tree
        for key in row.path[:-1]:
            block = block.setdefault(key, {})
        block[row.path[-1]] = np.stack(leaves) if row.stacked else leaves[0]
    return tree


def tensors_of(config, tree):
    """The inverse of `tree_of`."""
    tensors = {}
    for row in table(config):
        leaf = tree
        for key in row.path:
            leaf = leaf[key]
        leaf = np.asarray(leaf)
        for i, key in enumerate(row.hf_keys()):
            tensor = leaf[i] if row.stacked else leaf
            tensors[key] = tensor.T if row.transposed else tensor
    return tensors
