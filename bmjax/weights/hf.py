"""A Hugging Face directory <-> the nested parameter dictionary of the table in model/spec.py.

Import reads every device's block straight from the files' byte ranges; export fetches a tensor at a time. So host
memory never holds the model a second time, only the tensor in hand. student.py opens config and tokenizer through
here; training, evaluation and the Python interface load and save weights.
"""

import json
import math
import shutil
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bmjax.config import UserError, first_line, read_text
from bmjax.io.atomic import replacing
from bmjax.io.safetensors import DTYPES, Checkpoint, SharedWriter, listing, open_checkpoint
from bmjax.model import spec
from bmjax.model.config import ARCHITECTURES, ModelConfig
from bmjax.model.spec import EMBEDDING, HEAD, Param
from bmjax.parallel.mesh import sharding
from bmjax.parallel.processes import is_main

FLOATS = {name: DTYPES[name] for name in ("BF16", "F16", "F32")}
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    *TEMPLATE_FILES,
)
COMPARE_ROWS = 4096


def load_params(
    directory: str | Path, config: ModelConfig, mesh: Mesh | None = None, dtype: Any = None
) -> dict[str, Any]:
    """Load the parameters of a directory. Every process reads only the blocks of its devices.

    Arguments:
        config: the directory's config.
        mesh: the arrays are laid out on it as the table says. None: on the default device.
        dtype: of the arrays. None: as stored.

    Returns:
        A nested dictionary of jax.Array, as the table has it.

    Raises:
        UserError: when the files do not hold exactly the tensors that `config` describes.
    """
    checkpoint = open_checkpoint(directory)
    check_tensors(checkpoint, config)
    dtype = None if dtype is None else np.dtype(dtype)
    return spec.unflatten([(row.path, _load_leaf(checkpoint, row, mesh, dtype)) for row in spec.table(config)])


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise UserError unless the checkpoint holds exactly the tensors of the table, in shape and in a float type.

    A tied checkpoint may also hold lm_head.weight if it equals the embedding; rotary_emb.inv_freq is ignored.
    """
    directory, tensors = checkpoint.directory, checkpoint.tensors
    if config.num_layers > len(tensors):
        raise UserError(
            f"{directory}: config.json says {config.num_layers} layers, the files hold {len(tensors)} tensors"
        )
    expected = {key: row.hf_shape for row in spec.table(config) for key in row.hf_keys()}
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = "; config.json has tie_word_embeddings false" if missing == [HEAD] else ""
        raise UserError(f"{directory}: missing {listing(missing)}{hint}")
    surplus = [name for name in tensors if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if config.tied and HEAD in surplus:
        _check_tied(checkpoint)
        surplus.remove(HEAD)
    if surplus:
        raise UserError(
            f"{directory}: surplus {listing(surplus)} that a {config.model_type} model with this config.json "
            "does not have"
        )
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    if misshapen:
        raise UserError(
            f"{directory}: {len(misshapen)} misshapen: {_first_three(misshapen)}; config.json or the file is wrong"
        )
    not_float = [f"{name} is {tensors[name].dtype}" for name in expected if tensors[name].dtype not in FLOATS]
    if not_float:
        raise UserError(
            f"{directory}: {len(not_float)} of a type not supported: {_first_three(not_float)}; use BF16, F16 or F32"
        )


def _first_three(problems: Sequence[str]) -> str:
    return ", ".join(problems[:3]) + (", ..." if len(problems) > 3 else "")


def _check_tied(checkpoint: Checkpoint) -> None:
    embedding, head = checkpoint.tensors[EMBEDDING], checkpoint.tensors[HEAD]
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    for start in range(0, embedding.shape[0] if same and embedding.shape else 0, COMPARE_ROWS):
        rows = (slice(start, start + COMPARE_ROWS),)
        same = same and checkpoint.read(EMBEDDING, rows).tobytes() == checkpoint.read(HEAD, rows).tobytes()
    if not same:
        raise UserError(
            f"{checkpoint.directory}: config.json has tie_word_embeddings true, but the files hold a {HEAD} "
            f"that differs from {EMBEDDING}; set tie_word_embeddings to false"
        )


def _load_leaf(checkpoint: Checkpoint, row: Param, mesh: Mesh | None, dtype: np.dtype | None) -> jax.Array:
    keys = row.hf_keys()
    if dtype is None:
        stored = {checkpoint.tensors[key].numpy_dtype for key in keys}
        dtype = stored.pop() if len(stored) == 1 else np.dtype(jnp.result_type(*stored))
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # only fully replicated extended dtypes have none
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, row.shape, strict=True))
        if bounds not in blocks:  # devices that hold the same block share one reading of it
            blocks[bounds] = _read_block(checkpoint, row, keys, bounds, dtype)
        return blocks[bounds]

    if mesh is None:
        return jax.device_put(block((slice(None),) * len(row.shape)))
    return jax.make_array_from_callback(row.shape, sharding(mesh, row.axes, row.shape), block)


def _read_block(
    checkpoint: Checkpoint, row: Param, keys: Sequence[str], bounds: tuple[tuple[int, int], ...], dtype: np.dtype
) -> np.ndarray:
    """Read the block `bounds` of the leaf, one layer after another."""
    inner = tuple(slice(*pair) for pair in (bounds[1:] if row.stacked else bounds))
    index = inner[::-1] if row.transposed else inner
    out = np.empty([stop - start for start, stop in bounds], dtype)
    layers = keys[slice(*bounds[0])] if row.stacked else keys
    for layer, key in zip(out if row.stacked else [out], layers, strict=True):
        tensor = checkpoint.read(key, index)
        with np.errstate(invalid="ignore", over="ignore"):  # casting keeps NaN and infinity, which is no error
            layer[...] = tensor.T if row.transposed else tensor
    return out


@partial(jax.jit, static_argnames=("dtype", "transposed"))
def _hf_tensor(leaf: jax.Array, layer: Any, dtype: Any, transposed: bool) -> jax.Array:
    """Return a tensor in Hugging Face's orientation, as a new array: reading it leaves no host copy on the leaf."""
    part = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jnp.array(part.T if transposed else part, dtype=dtype, copy=True)


def _identity(array: jax.Array) -> jax.Array:
    return array


def _to_host(array: jax.Array) -> np.ndarray | None:
    """Return the whole array in the first process, and None in the others, which make this call, too."""
    if not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)  # several processes share arrays only on a mesh
        replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.block_until_ready(jax.jit(_identity, out_shardings=replicated)(array))
    return jax.device_get(array) if is_main() else None


def save_hf(
    directory: str | Path,
    params: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    *,
    side_files: Path | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
    shard_bytes: float = 5e9,
    eos: Sequence[int] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a Hugging Face directory that transformers loads, replacing `directory` once all of it is on disk.

    Arguments:
        params: nested dictionary of arrays, sharded ones too. Where several processes hold them, all make this call.
        hf_config: the content of config.json; its dtype key is set to the dtype that most numbers are stored in.
        side_files: a directory whose tokenizer, chat template and generation config are copied.
        tokenizer: a transformers tokenizer to save instead of the one in `side_files`.
        dtype: to store all tensors in. None: the dtype of each leaf.
        shard_bytes: a file ends where the next tensor would take it over this size.
        eos: end tokens to name in place of those of `hf_config` and of the generation config.
        texts: further files by name.

    Raises:
        UserError: for a directory that holds something else than a model, for a full disk, and for parameters that do
            not fit the config.
    """
    # Check parameters and directory.
    directory = Path(directory)
    if eos is not None:
        hf_config = {**hf_config, "eos_token_id": list(eos)}
    config = ModelConfig.from_hf(hf_config, "config")
    rows = _file_order(spec.table(config))
    leaves = {row.path: _leaf(params, row) for row, _ in rows}
    dtypes = {path: np.dtype(leaf.dtype if dtype is None else dtype) for path, leaf in leaves.items()}
    plan = [(row.hf_key.format(layer=layer), dtypes[row.path], row.hf_shape) for row, layer in rows]
    if directory.is_dir() and not (directory / "config.json").exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: exists, is not empty and holds no model; choose another name or empty it")

    # Every process has a part of each tensor; the first one gets all parts, and writes them.
    tensors = (_to_host(_hf_tensor(leaves[row.path], layer, dtypes[row.path], row.transposed)) for row, layer in rows)
    if not is_main():
        deque(tensors, maxlen=0)
        return
    with replacing(directory) as temporary:
        with SharedWriter(temporary, plan, shard_bytes) as writer:
            for (name, _, _), tensor in zip(plan, tensors, strict=True):
                assert tensor is not None  # this is the first process
                writer.write(name, 0, tensor)

        # Write config, tokenizer and the other files beside the weights.
        sizes: Counter[str] = Counter()
        for _, stored_as, shape in plan:
            sizes[stored_as.name] += math.prod(shape)
        _write_json(temporary / "config.json", _with_dtype(hf_config, config.model_type, sizes.most_common(1)[0][0]))
        _write_side_files(temporary, hf_config, side_files, tokenizer)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        if eos is not None:
            path = temporary / "generation_config.json"
            _write_json(path, json.loads(read_text(path)) | {"eos_token_id": list(eos)})


def _file_order(table: Sequence[Param]) -> list[tuple[Param, int | None]]:
    """Return (row, layer) of every tensor, layer by layer, as Hugging Face orders them."""
    stacked = [row for row in table if row.stacked]
    first = table.index(stacked[0])
    layers = [(row, layer) for layer in range(stacked[0].shape[0]) for row in stacked]
    head = [(row, None) for row in table[:first]]
    return [*head, *layers, *((row, None) for row in table[first:] if not row.stacked)]


def _leaf(params: Mapping[str, Any], row: Param) -> Any:
    try:
        leaf = spec.get(params, row.path)
    except (KeyError, TypeError):
        raise UserError(
            f"parameters: {row.name} is missing; config and parameters belong to different models"
        ) from None
    if tuple(leaf.shape) != row.shape:
        raise UserError(f"parameters: {row.name} is {list(leaf.shape)}, the config says {list(row.shape)}")
    return leaf


def _with_dtype(hf_config: Mapping[str, Any], model_type: str, dtype: str) -> dict[str, Any]:
    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; both read the latter.
    result = {"architectures": [ARCHITECTURES[model_type]], **hf_config}
    keys = [key for key in ("dtype", "torch_dtype") if key in result] or ["torch_dtype"]
    return result | dict.fromkeys(keys, dtype)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_side_files(target: Path, hf_config: Mapping[str, Any], source: Path | None, tokenizer: Any) -> None:
    if source is not None:
        for name in ("generation_config.json", *(TOKENIZER_FILES if tokenizer is None else ())):
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, target / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
        _name_for_transformers_4(target / "tokenizer_config.json")
    if not (target / "generation_config.json").exists():
        ids = {key: hf_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(target / "generation_config.json", {key: value for key, value in ids.items() if value is not None})


def _name_for_transformers_4(path: Path) -> None:
    # transformers 5 names its general class TokenizersBackend, which 4 does not know; both know the old name.
    if path.is_file():
        values = json.loads(read_text(path))
        if values.get("tokenizer_class") == "TokenizersBackend":
            _write_json(path, values | {"tokenizer_class": "PreTrainedTokenizerFast"})


def stored_dtype(directory: str | Path) -> np.dtype:
    """Return the dtype that most of a directory's parameters are stored in."""
    sizes: Counter[str] = Counter()
    for info in open_checkpoint(directory).tensors.values():
        sizes[info.dtype] += info.nbytes // info.numpy_dtype.itemsize
    if not sizes:
        raise UserError(f"{directory}: the weights hold no tensor")
    return DTYPES[sizes.most_common(1)[0][0]]


def load_tokenizer(directory: str | Path) -> Any:
    """Load the fast tokenizer of a directory; None when it has no tokenizer files. Never runs code from there.

    tokenizer.json is read as it is. transformers' AutoTokenizer is only for directories without it: for some
    architectures it replaces the splitting and normalizing that tokenizer.json says.
    """
    directory = Path(directory)
    files = {name for name in TOKENIZER_FILES if (directory / name).is_file()}
    if not (files & {"tokenizer.json", "tokenizer.model", "vocab.txt"} or {"vocab.json", "merges.txt"} <= files):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if "tokenizer.json" in files:
            return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {first_line(error)}") from None


def end_tokens(directory: str | Path, config: ModelConfig, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the token ids that end a generation: of generation_config.json, of the config, of the tokenizer."""
    path = Path(directory) / "generation_config.json"
    stored: Any = None
    if path.exists():
        try:
            values = json.loads(read_text(path))
            stored = values.get("eos_token_id")
        except (ValueError, AttributeError):
            raise UserError(f"{path}: expected a JSON object") from None
    ids = [] if stored is None else list(stored) if isinstance(stored, list) else [stored]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{path}: eos_token_id is {stored!r}, expected a token id or a list of them")
    ids += config.eos_token_ids
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(ids))
