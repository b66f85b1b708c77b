"""Import and export against transformers and the safetensors library, on one device and on a mesh."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from bmjax.config import UserError
from bmjax.io.safetensors import SharedWriter, open_checkpoint
from bmjax.model import spec
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.parallel.mesh import make_mesh, sharding
from bmjax.weights import hf
from bmjax.weights.tokenizer import end_tokens, load_tokenizer
from tests.conftest import byte_tokenizer
from tests.model.reference import BASE, from_state

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def build(tied: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(BASE | {"tie_word_embeddings": tied}))).eval()


def saved_by_transformers(directory: Path, tied: bool = False, dtype: str = "float32", **options: Any) -> Any:
    model = build(tied).to(getattr(torch, dtype))
    model.save_pretrained(directory, **options)
    return model


def raw_checkpoint(directory: Path, tied: bool = False, dtype: str = "bfloat16", **shape: int) -> dict[str, np.ndarray]:
    """A directory whose tensors are random *bits* (infinities, NaNs, subnormal numbers included)."""
    config = ModelConfig.from_hf({"model_type": "qwen2", **BASE, "tie_word_embeddings": tied, **shape})
    rng = np.random.default_rng(0)
    kind = DTYPES[dtype]
    tensors = {
        key: rng.integers(0, 256, (*row.hf_shape, kind.itemsize), np.uint8).view(kind)[..., 0]
        for row in spec.table(config)
        for key in row.hf_keys()
    }
    write_checkpoint(directory, tensors, tied, **shape)
    return tensors


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray], tied: bool = False, **shape: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    values = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(values, directory / "model.safetensors")
    config = {"model_type": "qwen2", **BASE, "tie_word_embeddings": tied, "torch_dtype": "float32", **shape}
    (directory / "config.json").write_text(json.dumps(config))


def load(directory: Path, mesh: Any = None, dtype: Any = None) -> dict[str, Any]:
    return hf.load_params(directory, ModelConfig.from_dir(directory), mesh, dtype)


def assert_same(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_imports_what_transformers_saved(tmp_path: Path, tied: bool, shard: str | None) -> None:
    model = saved_by_transformers(tmp_path, tied, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard is not None)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    assert_same(load(tmp_path), from_state(ModelConfig.from_dir(tmp_path), state))


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]
)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_mesh_gets_the_same_numbers(tmp_path: Path, sizes: dict[str, int], dtype: str | None) -> None:
    raw_checkpoint(tmp_path, dtype="float16")
    mesh = make_mesh(sizes)
    config = ModelConfig.from_dir(tmp_path)
    on_mesh, whole = (load(tmp_path, m, None if dtype is None else DTYPES[dtype]) for m in (mesh, None))
    assert_same(on_mesh, whole)
    for row in spec.table(config):
        leaf = spec.get(on_mesh, row.path)
        assert leaf.sharding == sharding(mesh, row.axes, row.shape)


def test_casts_round_to_nearest(tmp_path: Path) -> None:
    model = saved_by_transformers(tmp_path)
    state = {key: value.bfloat16().float().numpy() for key, value in model.state_dict().items()}
    expected = from_state(ModelConfig.from_dir(tmp_path), state)
    params = load(tmp_path, dtype=DTYPES["bfloat16"])
    assert_same(jax.tree.map(lambda a: a.astype(np.float32), params), expected)


def test_each_block_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = raw_checkpoint(tmp_path)
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read.append(preadv(fd, buffers, offset)) or read[-1])
    open_checkpoint(tmp_path)
    header = sum(read)
    read.clear()
    load(tmp_path, make_mesh({"data": 8}))
    assert sum(read) == header + sum(value.nbytes for value in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}])
def test_import_then_export_is_byte_identical(tmp_path: Path, dtype: str, tied: bool, mesh: Any) -> None:
    tensors = raw_checkpoint(tmp_path / "in", tied, dtype)
    params = load(tmp_path / "in", make_mesh(mesh) if mesh else None)
    config = read_hf_config(tmp_path / "in")
    for shard_bytes, name in ((5e9, "whole"), (10_000, "shards")):
        hf.save_hf(tmp_path / name, params, config, shard_bytes=shard_bytes)
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert (len(files) > 1) == (name == "shards")
        exported = {key: value for file in files for key, value in safetensors.numpy.load_file(file).items()}
        assert set(exported) == set(tensors)
        for key, value in tensors.items():
            assert exported[key].dtype == value.dtype and exported[key].tobytes() == value.tobytes(), key
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == dtype


def test_tensors_come_layer_by_layer(tmp_path: Path) -> None:
    raw_checkpoint(tmp_path / "in")
    hf.save_hf(tmp_path / "out", load(tmp_path / "in"), read_hf_config(tmp_path / "in"))
    names = list(open_checkpoint(tmp_path / "out").tensors)
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
def test_transformers_loads_the_export(tmp_path: Path, tied: bool, shard_bytes: float) -> None:
    source = saved_by_transformers(tmp_path / "in", tied)
    params = load(tmp_path / "in", make_mesh({"fsdp": 2, "tensor": 2}))
    hf.save_hf(tmp_path / "out", params, read_hf_config(tmp_path / "in"), side_files=tmp_path / "in",
               shard_bytes=shard_bytes)  # fmt: skip
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert model.config.to_dict() == source.config.to_dict() | {"_name_or_path": model.config._name_or_path,
                                                                 "architectures": ["Qwen2ForCausalLM"]}  # fmt: skip
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_casts(tmp_path: Path, dtype: str) -> None:
    source = saved_by_transformers(tmp_path / "in")
    hf.save_hf(tmp_path / "out", load(tmp_path / "in"), read_hf_config(tmp_path / "in"), dtype=DTYPES[dtype])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype) and hf.stored_dtype(tmp_path / "out") == DTYPES[dtype]
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value.to(model.dtype)), key


def test_export_takes_numpy(tmp_path: Path) -> None:
    tensors = raw_checkpoint(tmp_path / "in", dtype="float32")
    params = jax.tree.map(np.asarray, load(tmp_path / "in"))
    hf.save_hf(tmp_path / "out", params, read_hf_config(tmp_path / "in"))
    exported = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert all(exported[key].tobytes() == value.tobytes() for key, value in tensors.items())


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    tensors = raw_checkpoint(tmp_path / "in")
    for name in tensors:
        if "norm" in name:
            tensors[name] = np.ones(tensors[name].shape, np.float32)
    write_checkpoint(tmp_path / "in", tensors)
    hf.save_hf(tmp_path / "out", load(tmp_path / "in"), read_hf_config(tmp_path / "in"))
    exported = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert all(exported[key].dtype == value.dtype and exported[key].tobytes() == value.tobytes()
               for key, value in tensors.items())  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


# What does not fit


def change(tensors: dict[str, np.ndarray], case: str) -> None:
    q, norm = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
    if case == "missing":
        del tensors[q], tensors[norm]
    elif case == "surplus":
        tensors |= {f"model.layers.{i}.mlp.extra": np.ones(2, np.float32) for i in range(5)}
    elif case == "layer_too_many":
        tensors |= {k.replace("layers.2", "layers.3"): v for k, v in tensors.items() if "layers.2" in k}
    elif case == "layer_too_few":
        for name in [name for name in tensors if "layers.2" in name]:
            del tensors[name]
    elif case == "transposed":
        name = "model.layers.0.mlp.gate_proj.weight"
        tensors[name] = tensors[name].T
    elif case == "flat":
        tensors[norm] = tensors[norm].reshape(1, -1)
    elif case == "vocabulary":
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]
    elif case == "quantized":
        tensors[q] = np.ones(tensors[q].shape, np.int8)
    elif case == "no_head":
        del tensors["lm_head.weight"]
    elif case == "prefix":
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
    elif case == "nothing":
        tensors.clear()


BAD_TENSORS = {
    "missing": r"missing 2 tensors \(model.layers.1.self_attn.q_proj.weight, model.norm.weight\)$",
    "surplus": r"surplus 5 tensors \(model.layers.0.mlp.extra, .*2.mlp.extra, \.\.\.\)",
    "layer_too_many": r"surplus 12 tensors \(model.layers.3",
    "layer_too_few": r"missing 12 tensors \(model.layers.2",
    "transposed": r"1 misshapen: model.layers.0.mlp.gate_proj.weight is \[32, 56\], expected \[56, 32\]",
    "flat": r"1 misshapen: model.norm.weight is \[1, 32\], expected \[32\]",
    "vocabulary": r"1 misshapen: model.embed_tokens.weight is \[96, 32\], expected \[97, 32\]",
    "quantized": r"model.layers.1.self_attn.q_proj.weight is I8; use BF16, F16 or F32",
    "no_head": r"missing 1 tensor \(lm_head.weight\); config.json has tie_word_embeddings false",
    "prefix": r"missing 38 tensors \(model.embed_tokens.weight",
    "nothing": r"3 layers, the files hold 0 tensors",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(tmp_path: Path, case: str) -> None:
    tensors = raw_checkpoint(tmp_path, dtype="float32")
    change(tensors, case)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(UserError, match=BAD_TENSORS[case]) as error:
        load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_billion_layers_cost_nothing(tmp_path: Path) -> None:
    raw_checkpoint(tmp_path)
    config = ModelConfig.from_hf({"model_type": "qwen2", **BASE, "num_hidden_layers": 10**9})
    with pytest.raises(UserError, match="1000000000 layers"):
        hf.load_params(tmp_path, config)


def test_a_tied_checkpoint_may_repeat_the_embedding(tmp_path: Path) -> None:
    tensors = raw_checkpoint(tmp_path, tied=True)
    expected = load(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_checkpoint(tmp_path, tensors | inv_freq | {"lm_head.weight": embedding.copy()}, tied=True)
    assert_same(load(tmp_path), expected)
    other = embedding.copy()
    other.view(np.uint8)[-1, -1] ^= 1
    for head in (other, embedding[:-1], embedding.astype(np.float32)):
        write_checkpoint(tmp_path, tensors | {"lm_head.weight": head}, tied=True)
        with pytest.raises(UserError, match=r"tie_word_embeddings true, but .* a lm_head.weight that differs"):
            load(tmp_path)


def test_a_tied_checkpoint_may_hold_its_head_alone(tmp_path: Path) -> None:
    tensors = raw_checkpoint(tmp_path, tied=True)
    expected = load(tmp_path)
    renamed = {spec.HEAD if name == spec.EMBEDDING else name: value for name, value in tensors.items()}
    write_checkpoint(tmp_path, renamed, tied=True)
    assert_same(load(tmp_path), expected)
    write_checkpoint(tmp_path, renamed, tied=False)
    with pytest.raises(UserError, match=r"missing 1 tensor \(model\.embed_tokens\.weight\)"):
        load(tmp_path)


def test_export_refuses_what_does_not_fit(tmp_path: Path) -> None:
    raw_checkpoint(tmp_path / "in")
    params, config = load(tmp_path / "in"), read_hf_config(tmp_path / "in")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"embed/embedding is \[97, 32\], the config says \[98, 32\]"):
        hf.save_hf(out, params, config | {"vocab_size": 98})
    with pytest.raises(UserError, match="final_norm/scale is missing"):
        hf.save_hf(out, {key: value for key, value in params.items() if key != "final_norm"}, config)
    with pytest.raises(UserError, match="model_type is 'llama'"):
        hf.save_hf(out, params, config | {"model_type": "llama"})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no model"):
        hf.save_hf(tmp_path / "home", params, config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "in"]


FULL = """
import resource, sys
from pathlib import Path
from bmjax.config import UserError
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.weights import hf
source, target = map(Path, sys.argv[1:])
params = hf.load_params(source, ModelConfig.from_dir(source))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    hf.save_hf(target, params, read_hf_config(source))
except UserError as error:
    print(error)
"""


def test_full_disk_during_export(tmp_path: Path) -> None:
    raw_checkpoint(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    command = [sys.executable, "-c", FULL, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "out: cannot write: File too large" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


MEMORY = """
import re, sys
from pathlib import Path
import jax, numpy as np
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.weights import hf
from bmjax.parallel.mesh import make_mesh
jax.device_put(np.zeros(4)).block_until_ready()
# Not getrusage: its peak includes that of the process before exec.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
start = peak()
params = hf.load_params(Path(sys.argv[1]), ModelConfig.from_dir(sys.argv[1]), make_mesh())
jax.block_until_ready(params)
loaded = peak()
hf.save_hf(Path(sys.argv[2]), params, read_hf_config(sys.argv[1]))
print(loaded - start, peak() - loaded)
"""


def test_host_memory_holds_the_model_once(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 8000}
    raw_checkpoint(tmp_path / "in", tied=True, dtype="float32", **shape)
    model = (tmp_path / "in" / "model.safetensors").stat().st_size / 2**20
    assert model > 100
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "in"), str(tmp_path / "out")]
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    load_peak, save_peak = map(int, done.stdout.split()) if done.returncode == 0 else pytest.fail(done.stderr)
    # The finished arrays, the largest leaf as it is read and as it is placed, and what the allocator keeps besides.
    leaf = 16 * 256 * 2048 * 4 / 2**20
    assert load_peak < model + 2 * leaf + 24 < 2 * model, (load_peak, model)
    assert save_peak < 0.5 * model, (save_peak, model)


# Side files and tokenizers


@pytest.fixture(scope="module")
def qwen2_tokenizer() -> Path:
    for parent in Path(__file__).resolve().parents:
        for folder in (parent / "shared", parent.parent / "shared"):
            if (folder / "data" / "qwen2_tokenizer" / "vocab.json").exists():
                return folder / "data" / "qwen2_tokenizer"
    pytest.skip("the Qwen2 tokenizer is not here")


def small_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "hello": 3, "world": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def test_side_files_are_copied(tmp_path: Path) -> None:
    raw_checkpoint(tmp_path / "in")
    small_tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": [1, 7], "top_k": 3}')
    (tmp_path / "in" / "README.md").write_text("not copied")
    params, config = load(tmp_path / "in"), read_hf_config(tmp_path / "in")
    hf.save_hf(tmp_path / "out", params, config, side_files=tmp_path / "in")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer("hello world")["input_ids"] == [3, 4]
    assert end_tokens(tmp_path / "out", ModelConfig.from_dir(tmp_path / "out").eos_token_ids, tokenizer) == (1, 7)

    hf.save_hf(tmp_path / "out", params, config, side_files=tmp_path / "in", template="{{ 'other' }}")
    again = load_tokenizer(tmp_path / "out")
    assert again.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "other"
    assert again("hello world")["input_ids"] == [3, 4]
    tokenizer_config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_k"] == 3


def test_a_generation_config_is_written_always(tmp_path: Path) -> None:
    raw_checkpoint(tmp_path / "in")
    hf.save_hf(tmp_path / "out", load(tmp_path / "in"), read_hf_config(tmp_path / "in"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 1
    assert load_tokenizer(tmp_path / "out") is None


def test_an_export_may_replace_its_own_source(tmp_path: Path) -> None:
    tensors = raw_checkpoint(tmp_path / "in")
    small_tokenizer().save_pretrained(tmp_path / "in")
    hf.save_hf(tmp_path / "in", load(tmp_path / "in"), read_hf_config(tmp_path / "in"), side_files=tmp_path / "in")
    exported = safetensors.numpy.load_file(tmp_path / "in" / "model.safetensors")
    assert all(exported[key].tobytes() == value.tobytes() for key, value in tensors.items())
    assert load_tokenizer(tmp_path / "in") is not None


def test_the_real_tokenizer(qwen2_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen2_tokenizer)
    ids = tokenizer("Hello, world! 12 + 34")["input_ids"]
    assert tokenizer.decode(ids) == "Hello, world! 12 + 34"
    assert ids[:4] == [9707, 11, 1879, 0]  # as Qwen2's published tokenizer gives
    assert tokenizer.eos_token_id == 151645 and tokenizer.is_fast
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("It's 1234 für <|im_end|>")["input_ids"] == tokenizer(
        "It's 1234 für <|im_end|>")["input_ids"]  # fmt: skip
    config = ModelConfig.from_dir(qwen2_tokenizer)
    assert end_tokens(qwen2_tokenizer, config.eos_token_ids, tokenizer) == (151645, 151643)


def test_truncation_and_padding_of_a_saved_tokenizer_are_off(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=16, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    backend = load_tokenizer(tmp_path).backend_tokenizer
    for text in ("What is 12 + 34 + 56 + 78 + 90?", "1"):
        alone, *batch = [backend.encode(text, add_special_tokens=False), *backend.encode_batch_fast([text, text + "!"])]
        assert backend.decode(alone.ids) == text and backend.decode(batch[0].ids) == text


def test_bad_tokenizers_and_generation_configs(tmp_path: Path) -> None:
    raw_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    config = ModelConfig.from_dir(tmp_path)
    for text in ("[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config.json: "):
            end_tokens(tmp_path, config.eos_token_ids)


def test_a_tokenizer_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", null]}}'
    )
    (tmp_path / "code.py").write_text("open('ran', 'w')\nclass Config: pass\nclass Mine: pass\n")
    small_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    try:
        assert isinstance(load_tokenizer(tmp_path), transformers.PreTrainedTokenizerBase)
    except UserError as error:
        assert "\n" not in str(error)
    assert not Path("ran").exists()


LOADING = """
import json, resource, sys
import jax
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf
mesh = make_mesh({"fsdp": 4, "tensor": 2})
jax.block_until_ready(jax.device_put(1.0))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params = jax.block_until_ready(hf.load_params(sys.argv[1], ModelConfig.from_dir(sys.argv[1]), mesh, dtype="float32"))
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(json.dumps({"held": held, "above": peak() - before - held}))
"""


@pytest.mark.slow
def test_loading_15b_takes_at_most_1_gib_extra(tmp_path: Path) -> None:
    """Qwen2.5-1.5B's shape in bfloat16, read onto eight devices in float32, by a process of its own."""
    from bmjax.model.config import known

    config = known("Qwen/Qwen2.5-1.5B")
    rng, block = np.random.default_rng(0), np.zeros(0, ml_dtypes.bfloat16)
    plan = [
        (key, np.dtype(ml_dtypes.bfloat16), row.hf_shape) for row in spec.table(config) for key in row.hf_keys()
    ]  # fmt: skip
    with SharedWriter(tmp_path, plan) as writer:
        for name, dtype, shape in plan:
            if block.size < np.prod(shape):
                block = rng.standard_normal(int(np.prod(shape)), np.float32).astype(dtype)
            writer.write(name, 0, block[: int(np.prod(shape))].reshape(shape))
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": 8960, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu",
    }))  # fmt: skip
    memory = json.loads(subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], check=True, capture_output=True, text=True, timeout=600
    ).stdout)  # fmt: skip
    shutil.rmtree(tmp_path)  # 3 GB
    assert 1.0 <= memory["held"] / (4 * spec.count(config)) < 1.001  # norms and biases lie on every device
    assert memory["above"] <= 2**30, memory
