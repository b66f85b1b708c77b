"""A Hugging Face directory <-> the nested parameter dictionary of the table in model/spec.py.

Import reads every device's block straight from the files' byte ranges; export fetches a tensor at a time. So host
memory never holds the model a second time, only the tensor in hand.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax.config import UserError, read_text
from bmjax.io import bucket
from bmjax.io.atomic import replacing
from bmjax.io.model_files import quantization
from bmjax.io.safetensors import DTYPES, Checkpoint, Plan, SharedWriter, listing, open_checkpoint
from bmjax.log import write_line
from bmjax.model import spec
from bmjax.model.config import ARCHITECTURES, ModelConfig, context_length
from bmjax.model.spec import EMBEDDING, HEAD, Param
from bmjax.parallel.mesh import sharding
from bmjax.parallel.processes import is_main
from bmjax.urls import url_of
from bmjax.weights.tokenizer import portable_config, write_json, write_tokenizer

FLOATS = ("BF16", "F16", "F32")
SCALES = "_scale_inv"  # what blockwise FP8 adds to a weight's name, for the scales of its blocks
FP8_BLOCK = 128  # rows and columns of a block, as DeepSeek-V3 has them
COMPARE_ROWS = 4096


def load_params(
    directory: str | Path, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> dict[str, Any]:
    """Load the parameters of a directory as the table's nested dictionary of jax.Array.

    Every process reads only the blocks of its devices. mesh None: the default device. dtype None: as stored. Raises
    UserError when the files do not hold exactly the tensors that `config`, the directory's, describes.
    """
    checkpoint = open_params(directory, config)
    dtype = None if dtype is None else np.dtype(dtype)
    return spec.unflatten((row.path, _load_leaf(checkpoint, row, mesh, dtype)) for row in spec.table(config))


def open_params(directory: str | Path, config: ModelConfig) -> Checkpoint:
    """Open the checkpoint of a directory whose config is `config`, for `load_params` or `read_tensor`.

    A tied checkpoint may hold its embedding as lm_head.weight alone: it gets the embedding's name.

    Raises UserError when the files do not hold exactly the tensors that the config describes.
    """
    checkpoint = check_params(open_checkpoint(directory), config)
    if is_main():
        for note in checkpoint.notes:
            write_line(f"bmjax: note: {directory}: {note}")
    return checkpoint


def check_params(checkpoint: Checkpoint, config: ModelConfig, label: str | None = None) -> Checkpoint:
    """Return the checkpoint of a model whose config is `config`, see `open_params`; UserError where it is another's.

    label: what the error begins with; None: the directory.
    """
    if config.tied and HEAD in checkpoint.tensors and EMBEDDING not in checkpoint.tensors:
        # safetensors' save_model keeps the first of two names.
        tensors = {EMBEDDING if name == HEAD else name: info for name, info in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
    if fault := _fault(checkpoint, config):
        raise UserError(f"{label or checkpoint.directory}: {fault}")
    return checkpoint


def _fault(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """Return why a checkpoint does not hold exactly the table's tensors, in shape and in a float type; None: it does.

    A tied checkpoint may also hold lm_head.weight if it equals the embedding; rotary_emb.inv_freq is ignored.
    """
    tensors = checkpoint.tensors
    if config.num_layers > len(tensors):
        return f"config.json says {config.num_layers} layers, the files hold {len(tensors)} tensors"
    expected = {key: row.hf_shape for row in spec.table(config) for key in row.hf_keys()}
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = "; config.json has tie_word_embeddings false" if missing == [HEAD] else ""
        return f"missing {listing(missing)}{hint}"
    scaled = {name for name in expected if tensors[name].dtype == "F8_E4M3" and name + SCALES in tensors}
    surplus = [name for name in tensors if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    surplus = [name for name in surplus if name.removesuffix(SCALES) not in scaled]
    if config.tied and HEAD in surplus:
        embedding, head = tensors[EMBEDDING], tensors[HEAD]
        starts = range(0, embedding.shape[0] if embedding.shape else 0, COMPARE_ROWS)
        blocks = [(slice(start, start + COMPARE_ROWS),) for start in starts]
        if (embedding.shape, embedding.dtype) != (head.shape, head.dtype) or any(
            checkpoint.read(EMBEDDING, rows).tobytes() != checkpoint.read(HEAD, rows).tobytes() for rows in blocks
        ):
            return (
                f"config.json has tie_word_embeddings true, but the files hold a {HEAD} that differs from {EMBEDDING}; "
                "set tie_word_embeddings to false"
            )
        surplus.remove(HEAD)
    for name in scaled:
        shape = [-(-size // FP8_BLOCK) for size in tensors[name].shape]
        if list(tensors[name + SCALES].shape) != shape:
            stored = list(tensors[name + SCALES].shape)
            return f"{name + SCALES} is {stored}, expected {shape}: a scale for every {FP8_BLOCK} x {FP8_BLOCK} entries"
    if scheme := quantization({}, surplus):
        return f"the weights are quantized ({scheme}); expected {', '.join(FLOATS)}, or FP8 with scales of blocks"
    if surplus:
        return f"surplus {listing(surplus)} that a {config.model_type} model with this config.json does not have"
    pairs = [(name, tensors[name], list(shape)) for name, shape in expected.items()]
    misshapen = [f"{name} is {list(i.shape)}, expected {shape}" for name, i, shape in pairs if list(i.shape) != shape]
    not_float = [
        f"{name} is {info.dtype}" for name, info, _ in pairs if info.dtype not in FLOATS and name not in scaled
    ]
    problems, kind, advice = misshapen, "misshapen", "config.json or the file is wrong"
    if not misshapen:
        problems, kind, advice = not_float, "of a type not supported", "use BF16, F16 or F32"
    examples = ", ".join([*problems[:3], *["..."] * (len(problems) > 3)])
    return f"{len(problems)} {kind}: {examples}; {advice}" if problems else None


def _load_leaf(checkpoint: Checkpoint, row: Param, mesh: Mesh | None, dtype: np.dtype | None) -> Array:
    keys = row.hf_keys()
    stored_as = jnp.result_type(*(_float_dtype(checkpoint, key) for key in keys))
    leaf_dtype = stored_as if dtype is None else dtype

    @cache  # devices that hold the same block share one reading of it
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        # Read one layer after another, and turn each to the table's orientation.
        inner = tuple(slice(*pair) for pair in (bounds[1:] if row.stacked else bounds))
        out = np.empty([stop - start for start, stop in bounds], leaf_dtype)
        layers = keys[slice(*bounds[0])] if row.stacked else keys
        for layer, key in zip(out if row.stacked else [out], layers, strict=True):
            tensor = read_tensor(checkpoint, key, inner[::-1] if row.transposed else inner)
            with np.errstate(invalid="ignore", over="ignore"):  # casting keeps NaN and infinity, which is no error
                layer[...] = tensor.T if row.transposed else tensor
        return out

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only fully replicated extended dtypes have none
        return read(tuple(part.indices(size)[:2] for part, size in zip(index, row.shape, strict=True)))

    if mesh is None:
        return jax.device_put(block((slice(None),) * len(row.shape)))
    return jax.make_array_from_callback(row.shape, sharding(mesh, row.axes, row.shape), block)


def _float_dtype(checkpoint: Checkpoint, key: str) -> Any:
    """Return the dtype that a tensor has once it is read: its own, or bfloat16 of FP8."""
    info = checkpoint.tensors[key]
    return jnp.bfloat16 if info.dtype == "F8_E4M3" else info.numpy_dtype


def read_tensor(checkpoint: Checkpoint, key: str, part: tuple[slice, ...] = ()) -> np.ndarray:
    """Read a tensor, or a part of it. Blockwise FP8 is multiplied by the scales of its blocks, in float32."""
    tensor = checkpoint.read(key, part)
    if checkpoint.tensors[key].dtype != "F8_E4M3":
        return tensor
    scales = checkpoint.read(key + SCALES).astype(np.float32)
    shape = checkpoint.tensors[key].shape
    rows, columns = (
        np.arange(size)[piece] // FP8_BLOCK for size, piece in zip(shape, part or (slice(None),) * 2, strict=True)
    )
    return tensor.astype(np.float32) * scales[np.ix_(rows, columns)]


def start_added_tokens(
    params: dict[str, Any], added: Mapping[str, int], end: str | None, end_tokens: Sequence[int]
) -> dict[str, Any]:
    """Give the rows of added tokens a start to learn from.

    The rows of embedding and head that no token used hold anything. The token that ends a turn starts as the model's
    own end token, all others as the mean of the tokens before them.

    Arguments:
        params: of the model; given up.
        added: id of each added token. They follow all others.
        end: the one of them that ends a turn, if it is among them.
        end_tokens: those of the model before.
    """
    first = min(added.values())
    copied = {added[end]: end_tokens[0]} if end is not None and end in added and end_tokens else {}
    ids = np.array(list(added.values()), np.int32)

    def start(rows_VD: jax.Array) -> jax.Array:
        mean_D = rows_VD[:first].astype(jnp.float32).mean(0).astype(rows_VD.dtype)
        rows_VD = rows_VD.at[ids].set(mean_D)
        for token, model_token in copied.items():
            rows_VD = rows_VD.at[token].set(rows_VD[model_token])
        return rows_VD

    embedding = params["embed"]["embedding"]
    params = {**params, "embed": {"embedding": jax.jit(start, out_shardings=embedding.sharding)(embedding)}}
    if "lm_head" in params:
        head = params["lm_head"]["kernel"]
        kernel = jax.jit(lambda kernel_DV: start(kernel_DV.T).T, out_shardings=head.sharding)(head)
        params["lm_head"] = {"kernel": kernel}
    return params


@partial(jax.jit, static_argnames=("dtype", "transposed"))
def hf_tensor(leaf: Array, layer: Any, dtype: Any, transposed: bool) -> Array:
    """Return a tensor in Hugging Face's orientation, as a new array: reading it leaves no host copy on the leaf."""
    part = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jnp.array(part.T if transposed else part, dtype=dtype, copy=True)


def save_hf(
    directory: str | Path,
    params: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    *,
    side_files: Path | None = None,
    tokenizer: Any = None,
    template: str | None = None,
    added: Mapping[str, int] = MappingProxyType({}),
    end: str | None = None,
    dtype: Any = None,
    shard_bytes: float = 5e9,
    eos: Sequence[int] | None = None,
    card: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face directory that transformers loads, replacing `directory` once all of it is on disk.

    hf_config: the content of config.json; its dtype keys are set to the dtype that most numbers are stored in.
    side_files: a directory whose tokenizer, chat template and generation config are copied as they stand. tokenizer,
    template, added, end: see `bmjax.weights.tokenizer.write_tokenizer`. dtype: to store all tensors in; None: that of
    each leaf. shard_bytes: a file ends where the next tensor would take it over this size. eos: end tokens to name in
    place of those of `hf_config` and of the generation config. card: writes the card into the directory, when all else
    is there. Where several processes hold the parameters, all make
    this call. Raises UserError for a directory that holds something else than a model, for a full disk, and for
    parameters that do not fit the config.
    """
    # Plan the tensors layer by layer, as Hugging Face orders them.
    if eos is not None:
        hf_config = {**hf_config, "eos_token_id": list(eos)}
    config = ModelConfig.from_hf(hf_config, "config")
    table = spec.table(config)
    for row in table:
        try:
            leaf = spec.get(params, row.path)
        except (KeyError, TypeError):
            message = f"parameters: {row.name} is missing; config and parameters belong to different models"
            raise UserError(message) from None
        if tuple(leaf.shape) != row.shape:
            raise UserError(f"parameters: {row.name} is {list(leaf.shape)}, the config says {list(row.shape)}")
    rows = [
        (row, layer, np.dtype(spec.get(params, row.path).dtype if dtype is None else dtype))
        for stacked, block in groupby(table, lambda row: row.stacked)
        for layer, row in product(range(config.num_layers) if stacked else [None], block)
    ]
    plan = [(row.hf_key.format(layer=layer), stored_as, row.hf_shape) for row, layer, stored_as in rows]
    if is_main() and bucket.is_folder(directory) and not bucket.exists(bucket.join(directory, "config.json")):
        inside = bucket.names_in(directory) if url_of(directory) else [*Path(directory).iterdir()]
        if inside and not bucket.is_unfinished(directory):
            raise UserError(f"{directory}: exists, is not empty and holds no model; choose another name or empty it")

    def gather(row: Param, layer: int | None, stored_as: np.dtype) -> Array:
        # Every process has a part of each tensor, and joins in as the first one gets all parts.
        tensor = hf_tensor(spec.get(params, row.path), layer, stored_as, row.transposed)
        if tensor.is_fully_addressable:
            return tensor
        assert isinstance(tensor.sharding, NamedSharding)  # several processes share arrays only on a mesh
        return jax.block_until_ready(jax.device_put(tensor, tensor.sharding.update(spec=PartitionSpec())))

    # Write the tensors in the first process.
    if not is_main():
        for tensor in rows:
            gather(*tensor)
        return
    with replacing(directory) as temporary:
        with SharedWriter(temporary, plan, shard_bytes) as writer:
            for (name, _, _), tensor in zip(plan, rows, strict=True):
                writer.write(name, 0, jax.device_get(gather(*tensor)))

        _write_beside(temporary, hf_config, plan, side_files, eos)
        if side_files is not None or tokenizer is not None:
            write_tokenizer(temporary, side_files, tokenizer, template, added, end, context_length(hf_config))
        if card is not None:
            card(temporary)


def tensor_plan(config: ModelConfig, dtype: Any) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    """Return name, dtype and shape of every tensor of a model in one dtype, in the order in which they are written."""
    return [
        (row.hf_key.format(layer=layer), np.dtype(dtype), row.hf_shape)
        for stacked, block in groupby(spec.table(config), lambda row: row.stacked)
        for layer, row in product(range(config.num_layers) if stacked else [None], block)
    ]


def finish_directory(folder: Path, hf_config: Mapping[str, Any], plan: Plan, side_files: Path) -> None:
    """Write what belongs beside the tensors of `plan`, which are in `folder`; arguments as of `save_hf`."""
    _write_beside(folder, hf_config, plan, side_files, None)
    write_tokenizer(folder, side_files, context=context_length(hf_config))


def _write_beside(
    folder: Path, hf_config: Mapping[str, Any], plan: Plan, side_files: Path | None, eos: Sequence[int] | None
) -> None:
    """Write config and generation config of the tensors in `plan`."""
    most = _most((stored_as.name, math.prod(shape)) for _, stored_as, shape in plan)
    values = {"architectures": [ARCHITECTURES[hf_config["model_type"]]], **portable_config(hf_config)}
    write_json(folder / "config.json", values | {"dtype": most, "torch_dtype": most})
    path = folder / "generation_config.json"
    if side_files is not None and (side_files / path.name).is_file():
        shutil.copyfile(side_files / path.name, path)
    else:
        ids = {key: hf_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(path, {key: value for key, value in ids.items() if value is not None})
    if eos is not None:
        stored = {key: value for key, value in json.loads(read_text(path)).items() if key != "transformers_version"}
        write_json(path, stored | {"eos_token_id": list(eos)})


def _most(sizes: Iterable[tuple[str, int]]) -> str:
    """Return the name with the largest sum of sizes."""
    sums: Counter[str] = Counter()
    for name, size in sizes:
        sums[name] += size
    return sums.most_common(1)[0][0]


def stored_dtype(directory: str | Path) -> np.dtype:
    """Return the dtype that most of a directory's parameters are stored in; bfloat16 for FP8."""
    tensors = open_checkpoint(directory).tensors.values()
    if not tensors:
        raise UserError(f"{directory}: the weights hold no tensor")
    most = _most((info.dtype, info.nbytes // info.numpy_dtype.itemsize) for info in tensors)
    return DTYPES["BF16" if most == "F8_E4M3" else most]  # FP8 is dequantized
