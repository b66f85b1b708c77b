"""Malformed inputs to the merge command: one line that names the culprit, exit code 2, and a disk as it was.

A case makes something wrong in a folder with the models base, math and code, and says what the line must hold.
"""

import inspect
import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from bmjax.merge.__main__ import main
from bmjax.merge.methods import METHODS

SECONDS = 20  # of a case, on a machine busy with others; nearly all take milliseconds
ALLOCATED = 100 * 2**20
GB = 10**9
EMBEDDING, UP, NORM, HEAD = (
    "model.embed_tokens.weight",
    "model.layers.1.up.weight",
    "model.norm.weight",
    "lm_head.weight",
)
TIES = {"merge_method": "ties", "base_model": "base", "models": ["math", "code"]}
LINEAR = {"merge_method": "linear", "models": ["math", "code"]}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(6)}, "unk_token": "t0"},
}  # fmt: skip


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {EMBEDDING: (6, 4), "model.layers.0.up.weight": (4, 4), UP: (4, 4), NORM: (4,), HEAD: (6, 4)}
    values: dict[str, np.ndarray] = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    return {**values, "model.positions": np.arange(5)}


MODELS = {name: tensors(i) for i, name in enumerate(("base", "math", "code"))}


def write_model(folder: Path, values: dict[str, np.ndarray], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(save(values))
    (folder / "config.json").write_text(json.dumps({"model_type": "other", "num_hidden_layers": 2, **config}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))


def snapshot(root: Path) -> dict[str, tuple[int, int, Any]]:
    """Every entry, links and pipes as such; contents of all but the sparse giants."""
    state = {}
    for parent, folders, files in os.walk(root):
        for path in (Path(parent) / name for name in (*folders, *files)):
            about = path.lstat()
            content: Any = None
            if stat.S_ISLNK(about.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(about.st_mode) and about.st_size < 2**24:
                content = path.read_bytes()
            state[str(path.relative_to(root))] = (about.st_mode, about.st_mtime_ns, content)
    return state


Prepare = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """says: fragments of the line. check: whether `--check` sees it too; what only the weights tell, it cannot."""

    prepare: Prepare | None
    recipe: Any
    says: tuple[str, ...]
    options: tuple[str, ...] = ()
    out: str = "out"
    check: bool = True


CASES: dict[str, Case] = {}


def case(name: str, prepare: Prepare | None, recipe: Any, *says: str, **more: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(prepare, recipe, says, **more)


# Weights: one file


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any, start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def put(name: str, content: bytes | str, size: int | None = None) -> Prepare:
    """A file in place of what is there; size: made so long, by a hole."""

    def prepare(root: Path) -> None:
        path = root / name
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if size is not None:
            os.truncate(path, size)

    return prepare


def cut(name: str, keep: int) -> Prepare:
    return lambda root: os.truncate(root / name, keep if keep >= 0 else (root / name).stat().st_size + keep)


def damage(name: str, offset: int, data: bytes) -> Prepare:
    def prepare(root: Path) -> None:
        with open(root / name, "r+b") as file:
            file.seek(offset)
            file.write(data)

    return prepare


WEIGHTS = "math/model.safetensors"
TWO = {"a": entry([2], 0, 8), "b": entry([1], 8, 12)}


def header(name: str, content: bytes, *says: str, size: int | None = None) -> None:
    case(f"header {name}", put(WEIGHTS, content, size), TIES, WEIGHTS, *says)


header("of no bytes", b"", "0 bytes")
header("of 7 bytes", b"\1" * 7, "7 bytes")
header("length 0", raw(b"", b"\0" * 64), "not valid JSON")
header("length 100 GB", raw(TWO, b"\0" * 12, 100 * GB), "claims 100000000000 bytes")
header("length 2**64-1", raw(TWO, b"\0" * 12, 2**64 - 1), "claims 18446744073709551615")
header("length beyond the file", raw(TWO, b"", 500), "claims 500")
header("length 100 GB and there", raw(b"", b"", 90 * GB), "claims", size=100 * GB)
header("length one short", raw(TWO, b"\0" * 12, len(json.dumps(TWO)) - 1), "not valid JSON")
header("length one long", raw(TWO, b"\0" * 12, len(json.dumps(TWO)) + 1), "not valid JSON")
header("big-endian", struct.pack(">Q", len(json.dumps(TWO))) + json.dumps(TWO).encode() + b"\0" * 12, "claims")
header("of zeros", b"\0" * 4096, "not valid JSON")
header("no JSON", raw(b"{'a': 1}"), "not valid JSON")
header("no UTF-8", raw(b'{"\xff": {}}'), "not valid JSON")
header("UTF-16", raw(json.dumps(TWO).encode("utf-16")), "not valid JSON")
header("deep lists", raw(b"[" * 10**6), "not valid JSON")
header("deep objects", raw(b'{"a":' * 10**5), "not valid JSON")
header("list", raw([1, 2]), "JSON object")
header("null", raw(b"null"), "JSON object")
header("number of 5000 digits", raw(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"), "not valid JSON")
ONCE, AGAIN = (json.dumps(entry([1], start, start + 4)).encode() for start in (0, 4))
header("duplicate name", raw(b'{"a":' + ONCE + b',"a":' + AGAIN + b"}", b"\0" * 8), "'a' stands twice")
header("entry a number", raw({"a": 3}), "expected dtype, shape")
header("entry null", raw({"a": None}), "expected dtype, shape")
header("without dtype", raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "dtype None")
header("without shape", raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4), "shape None")
header("without offsets", raw({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "data_offsets None")
header("dtype unknown", raw({"a": entry([1], 0, 4, "F99")}, b"\0" * 4), "dtype 'F99'")
header("dtype lower case", raw({"a": entry([1], 0, 4, "f32")}, b"\0" * 4), "dtype 'f32'")
header("dtype a list", raw({"a": entry([1], 0, 4, ["F32"])}, b"\0" * 4), "dtype ['F32']")
header("dtype a number", raw({"a": entry([1], 0, 4, 32)}, b"\0" * 4), "dtype 32")
header("dtype of other size", raw({"a": entry([2], 0, 8, "BF16")}, b"\0" * 8), "8 bytes, but BF16")
header("shape negative", raw({"a": entry([-1, -2], 0, 8)}, b"\0" * 8), "shape")
header("shape NaN", raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4), "shape")
header("shape a float", raw({"a": entry([1.0], 0, 4)}, b"\0" * 4), "shape [1.0]")
header("shape true", raw({"a": entry([True], 0, 4)}, b"\0" * 4), "shape [True]")
header("shape a text", raw({"a": entry("1", 0, 4)}, b"\0" * 4), "shape '1'")
header("shape of 65 dimensions", raw({"a": entry([1] * 65, 0, 4)}, b"\0" * 4), "shape")
header("shape beyond 64 bits", raw({"a": entry([2**62, 4], 0, 0)}), "0 bytes, but F32")
header("shape too large", raw({"a": entry([3], 0, 8)}, b"\0" * 8), "8 bytes, but F32 [3]")
header("offsets negative", raw({"a": entry([2], -8, 0)}, b"\0" * 8), "data_offsets [-8, 0]")
header("offsets reversed", raw({"a": entry([2], 8, 0)}, b"\0" * 8), "data_offsets [8, 0]")
header("offsets floats", raw({"a": entry([2], 0.0, 8.0)}, b"\0" * 8), "data_offsets")
header("offsets of three", raw({"a": entry([2], 0, 8) | {"data_offsets": [0, 8, 8]}}, b"\0" * 8), "data_offsets")
header("offsets a number", raw({"a": entry([2], 0, 8) | {"data_offsets": 8}}, b"\0" * 8), "data_offsets 8")
header("offsets infinite", raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}'), "data_offsets")
header("tensors overlap", raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12), "'b'", "overlaps")
header("tensors share bytes", raw({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8), "overlaps")
header("gap", raw({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, b"\0" * 16), "'b'", "gap")
header("gap at the start", raw({"a": entry([2], 4, 12)}, b"\0" * 12), "gap")
header("tensor of 100 GB", raw({"a": entry([25 * GB], 0, 100 * GB)}, b"\0" * 8), "less than its header describes")
header("tensor of 2**70 bytes", raw({"a": entry([2**68], 0, 2**70)}, b"\0" * 8), "less than its header describes")
header("and bytes too many", raw(TWO, b"\0" * 13), "1 more than")
header("metadata a list", raw({"__metadata__": ["x"], **TWO}, b"\0" * 12), "__metadata__")
header("metadata of numbers", raw({"__metadata__": {"format": 1}, **TWO}, b"\0" * 12), "__metadata__")
header("name of half a character", raw({"\ud800": entry([1], 0, 4)}, b"\0" * 4), "'\\ud800'")
header("name of lines", raw({"a\nb\x1b[31m": entry([1], 0, 8)}, b"\0" * 8), "a\\nb")
case("header of no tensors", put(WEIGHTS, raw({})), TIES, "model 'math': holds no tensor")
case("header of metadata alone", put(WEIGHTS, raw({"__metadata__": {"a": "b"}})), TIES, "model 'math': holds no tensor")
case("base of no tensors", put("base/model.safetensors", raw({})), TIES, "model 'base': holds no tensor")
for keep in (9, 100, 300, -1, -16):
    case(f"cut to {keep}", cut(WEIGHTS, keep), TIES, WEIGHTS)
for offset in (0, 7, 8, 9, 40, 77):
    case(f"byte {offset} damaged", damage(WEIGHTS, offset, b"\xff"), TIES, WEIGHTS)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


PICKLE = pickle.dumps(Malicious())
case("pickle named safetensors", put(WEIGHTS, PICKLE), TIES, WEIGHTS, "claims")
case("zip named safetensors", put(WEIGHTS, b"PK\3\4" + b"\0" * 200), TIES, WEIGHTS)
case(
    "git-lfs pointer", put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), TIES, WEIGHTS
)
case("HTML page", put(WEIGHTS, "<!DOCTYPE html><html><body>404</body></html>"), TIES, WEIGHTS)


# Weights: what stands in the folder


def lone(name: str, content: bytes = b"") -> Prepare:
    """`math` with that file in place of its weights."""

    def prepare(root: Path) -> None:
        (root / WEIGHTS).unlink()
        (root / "math" / name).write_bytes(content)

    return prepare


def pipe(name: str) -> Prepare:
    def prepare(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)

    return prepare


def link(name: str, to: str) -> Prepare:
    def prepare(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        os.symlink(to, root / name)

    return prepare


def folder(name: str) -> Prepare:
    def prepare(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).mkdir()

    return prepare


def both(*all_of: Prepare) -> Prepare:
    def prepare(root: Path) -> None:
        for step in all_of:
            step(root)

    return prepare


def remove(name: str) -> Prepare:
    return lambda root: (root / name).unlink()


for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth", "x.ckpt"):
    case(f"weights {pickled}", lone(pickled, PICKLE), TIES, pickled, "pickle weights are refused")
case("weights absent", remove(WEIGHTS), TIES, "math: no weights")
case("weights of another name", lone("adapter_model.safetensors"), TIES, "adapter_model.safetensors but neither")
case("weights a folder", folder(WEIGHTS), TIES, WEIGHTS, "not a regular file")
case("weights a pipe", pipe(WEIGHTS), TIES, WEIGHTS, "not a regular file")
case("weights a device", link(WEIGHTS, "/dev/zero"), TIES, WEIGHTS, "not a regular file")
case("weights a link to a folder", link(WEIGHTS, "../code"), TIES, WEIGHTS, "not a regular file")
case("weights a link to itself", link(WEIGHTS, "model.safetensors"), TIES, WEIGHTS, "Too many levels of symbolic links")
case("weights a link to nothing", link(WEIGHTS, "nothing"), TIES, WEIGHTS, "No such file")
case("model a link to itself", link("self", "self"), {**TIES, "models": ["self"]}, "self: no such model directory")
case("model a loop of links", both(link("one", "two"), link("two", "one")), {**TIES, "models": ["one"]}, "one: no such")
case("model a file", None, {**TIES, "models": ["math/config.json"]}, "math/config.json: is a file")
case("model a pipe", pipe("p"), {**TIES, "models": ["p"]}, "p: is a file")
case("model absent", None, {**TIES, "models": ["mahts"]}, "mahts: no such model directory")
case("model above", None, {**TIES, "models": ["../../../nothing/x"]}, "nothing/x: no such model directory")
case("model a name of 5000", None, {**TIES, "models": ["m" * 5000]}, "mmmmm", "name is too long")
case("model lines of 5000", None, {**TIES, "models": ["m\n" * 2500]}, "name is too long")
case("model with a zero byte", None, {**TIES, "models": ["ma\0th"]}, "no such model directory")
case("model half a character", None, 'merge_method: linear\nmodels: ["\\uD800"]\n', "recipe.yaml")
case("alias half a character", None, "merge_method: linear\nmodels: [\"\\uD800\"]\nsources: {\"\\uD800\": math}\n",
     "recipe.yaml")  # fmt: skip


# Weights: the index

SHARDED = {name: f"{'one' if i % 2 else 'two'}.safetensors" for i, name in enumerate(sorted(MODELS["math"]))}
INDEX = "math/model.safetensors.index.json"


def sharded(index: Any) -> Prepare:
    """`math` in two files, and an index: a mapping of changes, or its text."""

    def prepare(root: Path) -> None:
        (root / WEIGHTS).unlink()
        for file in ("one.safetensors", "two.safetensors"):
            values = {k: v for k, v in MODELS["math"].items() if SHARDED[k] == file}
            (root / "math" / file).write_bytes(save(values))
        text = json.dumps({"weight_map": {**SHARDED, **index}}) if isinstance(index, dict) else index
        (root / INDEX).write_text(text)

    return prepare


def index(name: str, content: Any, *says: str, then: Prepare = lambda root: None) -> None:
    case(f"index {name}", both(sharded(content), then), TIES, *(says or (INDEX,)))


index("cut off", '{"weight_map": {"a": ', INDEX, "not valid JSON")
index("empty file", "", INDEX, "not valid JSON")
index("a list", "[]", INDEX, "weight_map")
index("without map", "{}", INDEX, "weight_map")
index("of nothing", '{"weight_map": {}}', INDEX, "weight_map")
index("map a list", '{"weight_map": ["one.safetensors"]}', INDEX, "weight_map")
index("map NaN", '{"weight_map": NaN}', INDEX, "weight_map")
index("deep", '{"weight_map": ' + "[" * 10**5, INDEX, "not valid JSON")
index("duplicate name", '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', INDEX, "'a' stands twice")
index("file a number", {UP: 3}, INDEX, f"'{UP}' is said to be in 3")
index("file null", {UP: None}, INDEX, "said to be in None")
index("file of no name", {UP: ""}, INDEX, "same directory")
index("parent folder", {UP: "../code/model.safetensors"}, INDEX, "'../code/model.safetensors'", "same directory")
index("absolute", {UP: "/etc/passwd"}, INDEX, "'/etc/passwd'", "same directory")
index("dots", {UP: ".."}, INDEX, "same directory")
index("subfolder", {UP: "sub/one.safetensors"}, INDEX, "same directory")
index("backslashes", {UP: "..\\code\\model.safetensors"}, INDEX, "same directory")
index("zero byte", {UP: "one\0.safetensors"}, INDEX, "same directory")
index("half a character", {UP: "a\ud800.safetensors"}, INDEX, "same directory")
index("absent file", {UP: "a.safetensors"}, "math/a.safetensors", "No such file")
index("name of 5000", {UP: "a" * 900}, "math/aaaa", "File name too long")
index("absent tensor", {"x": "one.safetensors"}, "math/one.safetensors", "lacks 1 tensor (x)")
index("swapped", {UP: "two.safetensors" if SHARDED[UP][0] == "o" else "one.safetensors"}, "math/", "1 tensor")
index("names itself", {UP: "model.safetensors.index.json"}, INDEX)
index("names the config", {UP: "config.json"}, "math/config.json", "claims")
index("names a folder", {UP: "a"}, "math/a", "not a regular file", then=lambda root: (root / "math/a").mkdir())
index("names a pipe", {UP: "a"}, "math/a", "not a regular file", then=pipe("math/a"))
index("names a pickle", {UP: "a.bin"}, "math/a.bin", then=put("math/a.bin", PICKLE))
index("names a link to itself", {UP: "a"}, "math/a", "symbolic links", then=link("math/a", "a"))
index("a pipe", "{}", INDEX, "not a regular file", then=pipe(INDEX))
index("a folder", "{}", INDEX, "is a directory", then=folder(INDEX))
index("a link to itself", "{}", INDEX, "link", then=link(INDEX, "model.safetensors.index.json"))
index("of 100 GB", "{}", INDEX, "refused", then=put(INDEX, '{"weight_map": ', 100 * GB))
index("empty shard", {}, "math/one.safetensors", "0 bytes", then=put("math/one.safetensors", b""))
index("shard of no tensors", {}, "math/one.safetensors", "lacks", then=put("math/one.safetensors", raw({})))
index("cut shard", {}, "math/two.safetensors", then=cut("math/two.safetensors", -3))
index("shard absent", {}, "math/two.safetensors", "No such file", then=remove("math/two.safetensors"))


# Weights: models that do not fit together


def change(name: str, edit: Callable[[dict[str, np.ndarray]], Any], **config: Any) -> Prepare:
    def prepare(root: Path) -> None:
        values = {key: value.copy() for key, value in MODELS[name].items()}
        edit(values)
        write_model(root / name, values, **config)

    return prepare


def change_all(edit: Callable[[dict[str, np.ndarray]], Any]) -> Prepare:
    return both(*(change(name, edit) for name in MODELS))


def retype(name: str, dtype: Any) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda values: values.update({name: values[name].astype(dtype)})


def reshape(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda values: values.update({name: np.ones(shape, np.float32)})


case("shape differs", change("math", reshape(UP, 4, 5)), TIES, f"'{UP}' has shape [4, 5] in model 'math'")
case("shape transposed", change("math", reshape(UP, 2, 8)), TIES, f"'{UP}' has shape [2, 8] in model 'math'")
case("shape flattened", change("math", reshape(UP, 16)), TIES, f"'{UP}' has shape [16] in model 'math'")
case("shape a scalar", change("math", reshape(UP)), TIES, f"'{UP}' has shape [] in model 'math'")
case("shape of nothing", change("math", reshape(UP, 0, 4)), TIES, f"model 'math': tensor '{UP}' has shape [0, 4]")
case("embedding's width differs", change("math", reshape(EMBEDDING, 6, 5)), TIES, EMBEDDING, "'math'")
case("tensor missing", change("math", lambda t: t.pop(NORM)), TIES, f"'math' lacks 1 tensor ({NORM})")
case("all tensors others", change("math", lambda t: (t.clear(), t.update(x=np.ones(2)))), TIES, "'math' lacks 6")
case("integers differ", change("math", lambda t: t["model.positions"].__iadd__(1)), TIES, "'model.positions' is int64",
     "'math'", check=False)  # fmt: skip
case("integers of other types", change("math", retype("model.positions", np.int32)), TIES, "'model.positions' is I32")
for kind, text in ((np.int8, "I8"), (np.uint8, "U8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int32, "I32")):
    case(f"quantized to {text}", change("math", retype(UP, kind)), TIES, f"'math': its weights are quantized ({text} ")
case("all quantized", both(*(change(n, retype(UP, np.int8)) for n in ("math", "code"))),
     {**LINEAR, "models": ["math", "code"]}, "its weights are quantized (I8 weights)")  # fmt: skip
case("all float8", both(*(change(n, lambda t: t.update({UP: (t[UP] * 9).astype(ml_dtypes.float8_e5m2)}))
                          for n in ("math", "code"))), LINEAR, "its weights are quantized (F8_E5M2 ")  # fmt: skip
case("float64 beyond float32", both(*(change(n, lambda t: t.update({UP: np.full((4, 4), 1e300)})) for n in MODELS)),
     LINEAR, UP, check=False)  # fmt: skip
case("overflow of float16", change("math", lambda t: t[UP].fill(1e6)), {**LINEAR, "dtype": "float16"}, UP,
     "overflow float16", check=False)  # fmt: skip


def spoil(model: str, tensor: str, position: int, value: float, dtype: Any = np.float32) -> Prepare:
    def edit(values: dict[str, np.ndarray]) -> None:
        values[tensor] = values[tensor].astype(dtype)
        values[tensor].reshape(-1)[position] = value

    return change(model, edit)


for model in MODELS:
    for tensor in (EMBEDDING, UP, NORM, HEAD):
        for position, value in ((0, np.nan), (-1, -np.inf)):
            case(f"{value} in {model} {tensor.split('.')[-2]} {position}", spoil(model, tensor, position, value), TIES,
                 f"model '{model}': tensor '{tensor}' holds NaN or infinity", check=False)  # fmt: skip
for kind in (ml_dtypes.bfloat16, np.float16, np.float64):
    case(f"NaN of {np.dtype(kind)}", spoil("math", UP, 7, np.nan, kind), TIES, "model 'math'", UP, "NaN", check=False)
TWO_STEPS = {
    "steps": [{**TIES, "name": "mid"}, {"merge_method": "linear", "base_model": "base", "models": ["mid", "base"]}]
}
case("NaN in an early step", spoil("code", UP, 3, np.nan), TWO_STEPS, "model 'code'", UP, "NaN", check=False)


# Giants: files of 100 GB, true to their headers, full of holes


def giant(model: str, *names: str, shape: tuple[int, ...]) -> Prepare:
    def prepare(root: Path) -> None:
        size = int(np.prod(shape)) * 4
        head = raw({name: entry(list(shape), i * size, (i + 1) * size) for i, name in enumerate(names)})
        put(f"{model}/model.safetensors", head, len(head) + size * len(names))(root)

    return prepare


def giants(*names: str, shape: tuple[int, ...]) -> Prepare:
    return both(*(giant(model, *names, shape=shape) for model in MODELS))


case("giant matrix", giants(UP, shape=(25 * GB // 4, 4)), TIES, "the result takes 100.0 GB")
case("giant embedding", giants(EMBEDDING, shape=(25 * GB, 1)), TIES, "the result takes 100.0 GB")
case("giant row and head", giants(EMBEDDING, "lm_head.weight", shape=(1, 25 * GB)), TIES, "the result takes 200.0 GB")
case("giant base embedding", both(giant("base", EMBEDDING, shape=(25 * GB, 1)), giant("math", EMBEDDING, shape=(4, 1)),
                                  giant("code", EMBEDDING, shape=(4, 1))), TIES, EMBEDDING, "25000000000")  # fmt: skip
case("embedding of 2**60 empty rows", both(
    *(put(f"{m}/model.safetensors", raw({EMBEDDING: entry([rows, 0], 0, 0)}))
      for m, rows in (("base", 2**60), ("math", 4), ("code", 4)))), TIES, EMBEDDING)  # fmt: skip
case("giant config", put("base/config.json", '{"a": ', 100 * GB), TIES, "base/config.json", "refused")
case("giant recipe", put("recipe.yaml", "a: ", 100 * GB), None, "recipe.yaml", "refused")
case("giant tokenizer", put("base/tokenizer.json", "{", 100 * GB), {**TIES, "tokenizer_source": "base"},
     "base/tokenizer.json", "refused")  # fmt: skip
case("giant side file", put("base/tokenizer.json", "{", 100 * GB), TIES, "the result takes 100.0 GB", check=False)


# config.json

for model in ("base", "math"):
    for name, text, says in (
        ("empty", "", "not valid JSON"), ("cut off", '{"model_type": ', "not valid JSON"), ("a list", "[]", "object"),
        ("null", "null", "JSON object"), ("deep", "[" * 10**6, "nested too deeply"), ("no UTF-8", b"\xff\xfe", "UTF-8"),
        ("number of 5000 digits", '{"vocab_size": ' + "9" * 5000 + "}", "not valid JSON"),
    ):  # fmt: skip
        case(f"config {name} in {model}", put(f"{model}/config.json", text), TIES, f"{model}/config.json", says)
case("config a pipe", pipe("base/config.json"), TIES, "base/config.json", "not a regular file")
case("config a folder", folder("base/config.json"), TIES, "base/config.json", "is a directory")
case("config a link to itself", link("base/config.json", "config.json"), TIES, "base/config.json", "link")


# Recipes


def recipe(name: str, content: Any, *says: str, **more: Any) -> None:
    case(f"recipe {name}", None, content, *says, **more)


def text(name: str, content: bytes | str, *says: str) -> None:
    case(f"recipe {name}", put("recipe.yaml", content), None, "recipe.yaml", *says)


HEAD_OF = "merge_method: linear\nmodels: [math, code]\n"
text("empty", "", "merge_method")
text("comments alone", "# nothing\n", "merge_method")
text("of zero bytes", b"\0" * 1000, "not valid YAML")
text("no UTF-8", b"merge_method: \xff\xfe\n", "UTF-8")
text("a list", "- a\n- b\n", "expected `key: value` lines")
text("a number", "42\n", "expected `key: value` lines")
text("JSON cut off", '{"merge_method": "linear", "models": [', "not valid YAML")
text("tabs", "merge_method:\n\t- linear\n", "not valid YAML")
text("duplicate key", HEAD_OF + "merge_method: ties\n", "'merge_method' stands twice")
text("duplicate parameter", HEAD_OF + "parameters: {weight: 1, weight: 2}\n", "'weight' stands twice")
text("alias bomb", "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)), "aliases are written out")  # fmt: skip
text("merge bomb", "m0: &m0 {a: 1}\n" + "".join(
    f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9)}]\n" for i in range(1, 9)), "recipe.yaml")  # fmt: skip
text("anchor of itself", "a: &a [*a]\n", "contains itself")
text("deep", "a: " + "[" * 1500, "nested too deeply")
text("of 300 KB", "# " + "x" * 300_000, "refused")
for tag in ("!!python/object/apply:os.mkdir ['pwned']", "!!python/name:os.system", "!!python/object:os.Popen {}",
            "!!python/module:os", "!!python/dict {a: 1}", "!include /etc/passwd"):  # fmt: skip
    text(f"tag {tag.split()[0][1:]}", f"merge_method: {tag}\n", "not valid YAML")
text("tuple for a method", "merge_method: !!python/tuple [1, 2]\nmodels: [math]\n", "merge_method: expected text")
text("unknown alias", "models: *nothing\n", "not valid YAML")
text("date that is none", "models: [2024-13-45]\nmerge_method: linear\n", "recipe.yaml")
text("binary", "merge_method: !!binary //79\nmodels: [math]\n", "recipe.yaml")
text("set", "merge_method: linear\nmodels: !!set {math, code}\n", "not valid YAML")
text("number of 100000 digits", f"{HEAD_OF}seed: {'9' * 100_000}\n", "a number of 100000 characters")
text("hexadecimal number", f"{HEAD_OF}seed: 0x{'f' * 300}\n", "seed")
case(
    "recipe 15000 models",
    None,
    f"merge_method: linear\nmodels: [{', '.join(f'm{i}' for i in range(15_000))}]\n",
    "m0: no such model",
)
text("one model 15000 times", f"merge_method: linear\nmodels: [{'math, ' * 15_000}]\n", "'math' is listed twice")
text("giant names", "".join(f"{key}: {{? {''.join(chr(0x4E00 + i % 500) for i in range(40_000))}{key} : x}}\n"
                            for key in ("sources", "parameters")) + HEAD_OF, "unknown parameter")  # fmt: skip
case("recipe a pipe", pipe("recipe.yaml"), None, "recipe.yaml", "not a regular file")
case("recipe a folder", folder("recipe.yaml"), None, "recipe.yaml", "is a directory")
case("recipe a link to itself", link("recipe.yaml", "recipe.yaml"), None, "recipe.yaml")
case("recipe absent", None, None, "recipe.yaml", "no such file")
case("recipe a model", link("recipe.yaml", WEIGHTS), None, "recipe.yaml", "UTF-8")

recipe("method unknown", {**TIES, "merge_method": "tise"}, "did you mean 'ties'?")
recipe("method a list", {**TIES, "merge_method": ["ties"]}, "merge_method: expected text")
recipe("method null", {**TIES, "merge_method": None}, "merge_method")
recipe("without method", {"models": ["math"]}, "'merge_method' is missing")
recipe("without models", {"merge_method": "linear"}, "'models' is missing")
recipe("without base", {"merge_method": "ties", "models": ["math"]}, "ties needs 'base_model'")
recipe("base alone", {**TIES, "models": ["base"]}, "beside the base, found 0")
recipe("base a list", {**TIES, "base_model": ["base"]}, "base_model: expected text")
recipe("base absent", {**TIES, "base_model": "bse"}, "bse: no such model directory; did you mean 'base'?")
recipe("base empty", {**TIES, "base_model": ""}, "base_model")
recipe("models a text", {**TIES, "models": "math"}, "models: expected a list")
recipe("models a mapping", {**TIES, "models": {"math": 1}}, "models: expected a list")
recipe("models of numbers", {**TIES, "models": [1, 2]}, "expected a model's name")
recipe("models of null", {**TIES, "models": [None]}, "expected a model's name")
recipe("models of lists", {**TIES, "models": [["math"]]}, "expected a model's name")
recipe("models empty", {**TIES, "models": []}, "found 0")
recipe("model of no name", {**TIES, "models": [""]}, "expected a model's name")
recipe("model twice", {**TIES, "models": ["math", "math"]}, "'math' is listed twice")
recipe("model a number", {**TIES, "models": [{"model": 3}]}, "write the name in quotes")
recipe("model misspelt", {**TIES, "models": [{"modle": "math"}]}, "did you mean 'model'?")
recipe("unknown key", {**TIES, "base_modle": "x"}, "did you mean 'base_model'?")
recipe("key a number", {**TIES, 3: 4}, "unknown key '3'")
recipe("modules", {**TIES, "modules": {}}, "modules: expected a block for each module")
recipe("parameters a list", {**TIES, "parameters": [1]}, "parameters: expected a block of keys")
recipe("parameter unknown", {**TIES, "parameters": {"densty": 1}}, "did you mean 'density'?")
recipe("parameter key a number", {**TIES, "parameters": {1: 2}}, "parameters")
BAD_NUMBERS = {
    "a text": "x", "true": True, "NaN": float("nan"), "infinite": float("inf"), "empty": {}, "null": None,
    "an empty list": [], "a mixed list": [1, "x"], "a list of lists": [[1]], "of 380 digits": 10**380, "above 1": 2.0,
    "below 0": -0.1, "a bad filter": {"value": 1, "x": 2}, "a filter and a number": [{"filter": "up", "value": 1}, 3],
    "a number's filter": {"filter": 3, "value": 1}, "a filter without value": {"filter": "up"},
    "a broken regex": {"regex": "(", "value": 1}, "a regex of 300": {"regex": "a" * 300, "value": 1},
    "a regex of powers": {"regex": "(a{9999}){9999}", "value": 1},
    "a regex that hangs": {"regex": r"(\w+\.?)+!", "value": 1},
    "a regex of stars": {"regex": r"\w*" * 20 + "!", "value": 1},
    "a regex of choices": {"regex": r"(\w|\w)" * 20 + "!", "value": 1},
}  # fmt: skip
for label, value in BAD_NUMBERS.items():
    recipe(f"density {label}", {**TIES, "parameters": {"density": value}}, "density")
recipe("dtype unknown", {**TIES, "dtype": "float8"}, "dtype")
recipe("dtype a number", {**TIES, "dtype": 16}, "dtype")
recipe("out_dtype an integer's", {**TIES, "out_dtype": "int8"}, "out_dtype")
recipe("seed a text", {**TIES, "seed": "x"}, "seed: expected a whole number")
recipe("seed negative", {**TIES, "seed": -1}, "seed: expected a number greater")
recipe("seed beyond 64 bits", {**TIES, "seed": 2**63}, "seed: expected a number less")
recipe("seed a fraction", {**TIES, "seed": 0.5}, "seed")
recipe("seed true", {**TIES, "seed": True}, "seed")
recipe("sources a list", {**TIES, "sources": ["math"]}, "sources: expected a block of keys")
recipe("source a number", {**TIES, "sources": {"math": 3}}, "sources.math: expected a model's name")
recipe("source absent", {**TIES, "sources": {"math": "nowhere"}}, "model 'math': nowhere: no such model directory")
recipe("compat unknown", {**TIES, "compat": "x"}, "compat")
recipe("steps a text", {"steps": "x"}, "steps")
recipe("steps empty", {"steps": []}, "steps")
recipe("steps of numbers", {"steps": [1]}, "steps")
recipe("step reads itself", {"steps": [{**TIES, "name": "a", "models": ["a"]}]}, "reads itself")
recipe("step reads a later one", {"steps": [{**TIES, "name": "a", "models": ["b"]}, {**TIES, "name": "b"}]}, "after it")
recipe("steps of one name", {"steps": [{**TIES, "name": "a"}, {**TIES, "name": "a"}]}, "two steps are named 'a'")


def sliced(*sources: list[Any], **more: Any) -> dict[str, Any]:
    """One slice of sources, each a model and what its range is."""
    entries = [{"model": model, "layer_range": of[0] if len(of) == 1 else of} for model, *of in sources]
    return {"merge_method": "passthrough", "slices": [{"sources": entries}], **more}


recipe("layers beyond the last", sliced(["math", 0, 3]), "layer_range ends at 3", "'math'")
recipe("layers 10**12", sliced(["math", 0, 10**12]), "layer_range ends at 1000000000000")
recipe("layers backwards", sliced(["math", 2, 1]), "layer_range [2, 1]")
recipe("layers negative", sliced(["math", -1, 1]), "layer_range [-1, 1]")
recipe("layers of none", sliced(["math", 1, 1]), "its layer_range holds no layer")
recipe("layers a text", sliced(["math", "all"]), "layer_range")
recipe("layers of fractions", sliced(["math", 0, 1.5]), "layer_range")
recipe("layers of three", sliced(["math", 0, 1, 2]), "layer_range")
recipe("layers unequal", {**sliced(["math", 0, 2], ["code", 0, 1]), "merge_method": "linear"}, "gives 2 layers")
recipe("slices and models", {**sliced(["math", 0, 1]), "models": ["math"]}, "both stand")
recipe("slices empty", {"merge_method": "linear", "slices": []}, "slices")
recipe("slice without sources", {"merge_method": "linear", "slices": [{"sources": []}]}, "slices.0.sources")
recipe("layers of a model without", sliced(["flat", 0, 1]), "flat", "one stack of layers")
recipe("layers in the sky", sliced(["tall", 0, 99_999]), "'tall'")

recipe("tokenizer absent", {**TIES, "tokenizer_source": "nowhere"}, "nowhere: no such model directory")
recipe("tokenizer a number", {**TIES, "tokenizer_source": 3}, "tokenizer_source: expected a model's name")
recipe("tokenizer twice", {**TIES, "tokenizer_source": "base", "tokenizer": {}}, "both stand")
recipe("tokenizer a list", {**TIES, "tokenizer": []}, "tokenizer")
recipe("tokenizer of no key", {**TIES, "tokenizer": {"sorce": "base"}}, "did you mean 'source'?")
recipe("padded to nothing", {**TIES, "tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of")
recipe("padded to 10**15", {**TIES, "tokenizer": {"pad_to_multiple_of": 10**15}}, "pad_to_multiple_of")
recipe("token of no model", {**TIES, "tokenizer": {"tokens": {"<x>": {"source": "meth"}}}}, "did you mean 'math'?")
recipe("token beyond the rows", {**TIES, "tokenizer": {"source": "base", "tokens": {"<x>": {
    "source": {"kind": "model_token", "model": "math", "token_id": 99}}}}}, "has no token id 99")  # fmt: skip
recipe("token of no kind", {**TIES, "tokenizer": {"tokens": {"<x>": {"source": {"kind": "zer"}}}}}, "mean 'zero'?")
recipe("token empty", {**TIES, "tokenizer": {"tokens": {"": None}}}, "a token is empty text")
recipe("template unknown", {**TIES, "chat_template": "chatlm"}, "did you mean 'chatml'?")
recipe("template broken", {**TIES, "chat_template": "{% if %}"}, "not valid jinja")
text("template half a character", json.dumps({**TIES, "chat_template": "{{ '\ud800' }}"}))
case("tokenizer cut off", put("base/tokenizer.json", '{"version": '), {**TIES, "tokenizer_source": "base"},
     "base/tokenizer.json", "cut off or damaged")  # fmt: skip
case("tokenizer a pipe", pipe("base/tokenizer.json"), {**TIES, "tokenizer_source": "base"}, "base")
case("tokenizer of huge ids", put("base/tokenizer.json", json.dumps({**TOKENIZER, "model": {
    "type": "WordLevel", "vocab": {"t0": 0, "t1": 2**32 - 1}, "unk_token": "t0"}})),
    {**TIES, "tokenizer_source": "base"}, "4294967296")  # fmt: skip


# Options and where the result goes

recipe("is not given", LINEAR, "--help", options=("--nothing",))
for option, value in (("--memory", "lots"), ("--memory", "-1GiB"), ("--memory", "0B"), ("--memory", "1e9"),
                      ("--memory", "9" * 400), ("--shard-size", "5"), ("--shard-size", "0GB"), ("--shard-size", "NaN"),
                      ("--shard-size", ""), ("--seed", "x"), ("--seed", "-1"), ("--seed", "1.5"), ("--seed", "{}"),
                      ("--seed", str(2**64)), ("--seed", "")):  # fmt: skip
    recipe(f"{option} {value[:9]}", LINEAR, option.removeprefix("--"), options=(f"{option}={value}",))
recipe("override unknown", LINEAR, "did you mean 'dtype'?", options=("dtyp=float32",))
recipe("override half", LINEAR, "expected key=value", options=("dtype",))
recipe("override of bad YAML", LINEAR, "not valid YAML", options=("parameters.weight=[",))
recipe("override with a tag", LINEAR, "not valid YAML", options=("parameters.weight=!!python/name:os.system",))
recipe("override bomb", LINEAR, "a number of", options=(f"seed={'9' * 5000}",))
recipe("override half a character", LINEAR, "expected key=value", options=("sources.\udcff=math",))

for out in ("math", "./math/", "math/../math", "code/."):
    recipe(f"out is {out}", LINEAR, "is (or contains) the input", out=out, options=("--overwrite",))
case("out a link to an input", link("l", "math"), LINEAR, "the input math", out="l", options=("--overwrite",))
case("out beside through a link", link("l", "."), LINEAR, "the input math", out="l/math", options=("--overwrite",))
case("model a link to out", link("l", "math"), {**LINEAR, "models": ["l", "code"]}, "the input l", out="math",
     options=("--overwrite",))  # fmt: skip
recipe("out no text", LINEAR, "no Unicode text", out="o\udcff")
recipe("out around the inputs", LINEAR, "contains", out=".", options=("--overwrite",))
recipe("out inside an input", LINEAR, "math/merged", "inside the input math", out="math/merged")
recipe("out deep inside an input", LINEAR, "inside the input math", out="math/a/b")
recipe("out is the tokenizer's source", {**LINEAR, "tokenizer_source": "flat"}, "the input flat", out="flat",
       options=("--overwrite",))  # fmt: skip
case("out a file", put("out", "x"), LINEAR, "out: exists and is not a directory", options=("--overwrite",))
case("out a pipe", pipe("out"), LINEAR, "out: exists and is not a directory")
case("out below a file", put("f", "x"), LINEAR, "f/out: Not a directory", out="f/out")
case("out occupied", lambda root: write_model(root / "out", {"x": np.ones(2)}), LINEAR, "--overwrite")
case("out no model", lambda root: (root / "out/sub").mkdir(parents=True), LINEAR, "is not a model directory",
     options=("--overwrite",))  # fmt: skip
case("out a link to itself", link("out", "out"), LINEAR, "out")
recipe("out a name of 300", LINEAR, "File name too long", out="o" * 300)
recipe("out a name of 250", LINEAR, "File name too long", out="o" * 250, check=False)


# Files that cannot be read

if os.geteuid() != 0:
    for name in (WEIGHTS, "base/config.json", "recipe.yaml"):
        case(f"unreadable {name}", lambda root, name=name: (root / name).chmod(0), TIES, name, "Permission denied")
    case("unwritable", lambda root: (root / "closed").mkdir(mode=0o500), TIES, "closed", out="closed/out")


class Blocked(Exception):
    pass


def blocked(signal_number: int, frame: Any) -> None:
    raise Blocked(f"not done in {SECONDS} s")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, values in MODELS.items():
        write_model(tmp_path / name, values)
    write_model(tmp_path / "flat", {"x": np.ones(2, np.float32)})
    write_model(tmp_path / "tall", {"model.layers.99999.x": np.ones(2, np.float32)})
    # Whatever this machine has: a giant must not fit.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50 * GB))
    return tmp_path


def prepared(root: Path, mistake: Case) -> list[str]:
    """Makes the case in `root`; the command's arguments."""
    if mistake.recipe is not None:
        (root / "recipe.yaml").write_text(
            mistake.recipe if isinstance(mistake.recipe, str) else yaml.safe_dump(mistake.recipe)
        )
    if mistake.prepare:
        mistake.prepare(root)
    return ["recipe.yaml", mistake.out, *mistake.options]


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str], traced: bool = False) -> str:
    """Runs the command, which must refuse; its line."""
    old = signal.signal(signal.SIGALRM, blocked)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if traced:
        tracemalloc.start()
    try:
        code = main(arguments)
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
    finally:
        if traced:
            tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    printed = capsys.readouterr()
    assert code == 2
    assert not [line for line in printed.out.splitlines() if line]
    lines = [line for line in printed.err.splitlines() if not line.startswith("bmjax: note: ")]
    assert len(lines) == 1 and lines[0].startswith("bmjax: error: ") and printed.err.endswith("\n"), printed.err
    assert len(lines[0]) < 1100
    assert peak < ALLOCATED
    return lines[0]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line_with_nothing_written(name, root, capsys):
    mistake = CASES[name]
    arguments = prepared(root, mistake)
    before = snapshot(root)
    # It takes three times as long.
    traced = any(word in name for word in ("GB", "giant", "2**", "10**", "64"))
    lines = [refuse([*arguments, "--check"], capsys, traced)] if mistake.check else []
    lines.append(refuse(arguments, capsys, traced))
    for line in lines:
        assert all(part in line for part in mistake.says), line
    assert snapshot(root) == before


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("method", METHODS)
def test_no_method_merges_what_is_not_finite(method, root, capsys, monkeypatch):
    about = METHODS[method]
    names = ["math", "code"][: about.branches[1] or 2]
    values: dict[str, Any] = {
        "merge_method": method,
        "models": list(names),
        **({"base_model": "base"} if about.base == "required" else {}),
    }
    needed = [p.name for p in about.parameters.values() if p.default is inspect.Parameter.empty]
    if needed:  # a model of importances
        monkeypatch.setitem(MODELS, "sure", {name: np.abs(value) for name, value in MODELS["base"].items()})
        write_model(root / "sure", MODELS["sure"])
        values["parameters"] = dict.fromkeys(needed, "sure")
        names.append("sure")
    for model in [*names, *(["base"] if about.base == "required" else [])]:
        for position, value in ((5, np.nan), (-1, np.inf)):
            arguments = prepared(root, Case(spoil(model, UP, position, value), values, ()))
            before = snapshot(root)
            assert f"model '{model}': tensor '{UP}' holds NaN or infinity" in refuse(arguments, capsys)
            assert snapshot(root) == before
        write_model(root / model, MODELS[model])


@pytest.mark.parametrize(
    "name", ["weights a pipe", "recipe a pipe", "pickle named safetensors", "recipe alias bomb", "giant config",
             "header length 100 GB and there", "index absolute", "out a link to an input", "float64 beyond float32"],
)  # fmt: skip
def test_as_a_command_in_little_memory(name, root):
    mistake = CASES[name]
    arguments = prepared(root, mistake)
    before = snapshot(root)
    start = time.monotonic()
    command = [sys.executable, "-m", "bmjax.merge", *arguments]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 2 and out == ""
    (line,) = (line for line in err.splitlines() if not line.startswith("bmjax: note: "))
    assert line.startswith("bmjax: error: ") and all(part in line for part in mistake.says)
    assert time.monotonic() - start < 30
    assert snapshot(root) == before


def test_out_in_new_folders_leaves_none_of_them(root, capsys):
    arguments = prepared(root, Case(spoil("math", UP, 0, np.nan), TIES, (), out="new/folder/out"))
    before = snapshot(root)
    refuse(arguments, capsys)
    assert snapshot(root) == before


def test_what_is_odd_but_right_is_merged(root, capsys):
    """What a zealous check would refuse: links as hub caches have them, infinite numbers in a config, no config."""
    (root / "blobs").mkdir()
    for file in ("model.safetensors", "config.json"):
        (root / "math" / file).rename(root / "blobs" / file)
        os.symlink(f"../blobs/{file}", root / "math" / file)
    (root / "base/config.json").write_text('{"time_step_limit": [0.0, Infinity], "x": NaN}')
    (root / "code/config.json").unlink()
    (root / "code/pytorch_model.bin").write_bytes(PICKLE)
    assert main([*prepared(root, Case(None, TIES, ())), "--quiet"]) == 0
    assert (root / "out/config.json").read_text().count("Infinity") == 1
    assert sorted(path.name for path in root.iterdir() if path.name.startswith((".", "pwned"))) == []


def test_there_are_more_than_a_hundred():
    assert len(CASES) > 300
