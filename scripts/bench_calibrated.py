#!/usr/bin/env python
"""Time and memory of a merge that looks at data, at the shape of Qwen2.5-7B, and whether a killed one gives the same.

    .venv/bin/python scripts/bench_calibrated.py --work DIR --methods regmean,layerwise [--layers 28 --kill-after 3]

Random bf16 weights, a base and three branches, are made once and kept under --work (61 GB with all 28 layers, less
on disk: embedding and head are one file for all, the third branch shares its layers' files with the other two). A
merge runs as a process of its own; peak RSS is the kernel's. With --kill-after N it is killed after N parts of its
last walk, started again, and its files are compared with those of the run that was left alone.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BRANCHES = ("a", "b", "c")
# Hidden size, width of the MLP, layers, heads, key-value heads, vocabulary.
SIZES = {
    "7b": (3584, 18_944, 28, 28, 4, 152_064),
    "wide": (1024, 512, 2, 16, 4, 152_064),  # nearly all of it is embedding and head
    "tiny": (64, 176, 3, 2, 2, 512),
}
# A recipe's method, `along`, whether it takes --steps, and the label of its last walk over the parts.
METHODS = {
    "regmean": ("regmean", "regmean", False, "start"),
    "layerwise": ("layerwise", "changes", True, "learned"),
    "fisher": ("learned", "fisher", False, "start"),
    "learned": ("learned", "changes", True, "learned"),
    "learned-fisher": ("learned", "fisher", True, "learned"),
}
POOL = 2**24  # random numbers that all tensors are cut from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has, where the disk is small")
    parser.add_argument("--methods", default="regmean,layerwise", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rows", type=int, default=1, help="packed rows of each domain")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="of the coefficients; of layerwise in each layer")
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--kill-after", type=int, help="parts of the last walk")
    options = parser.parse_args()
    make_models(options.work, options.shape, options.layers)
    for method in options.methods.split(","):
        print(json.dumps({"method": method, **measure(options, method)}), flush=True)


def measure(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """Merge, and once more with a kill where that is asked for; returns seconds, peak RSS and what was compared."""
    recipe = options.work / f"{method}.json"
    merge_method, along, has_steps, last = METHODS[method]
    parameters = {
        "rows": options.rows, "batch": 1, "held_out": 2, "documents": 60, "seq_len": options.seq_len, "along": along,
        "steps": options.steps if has_steps else 0, "compute_dtype": options.compute_dtype,
    }  # fmt: skip
    recipe.write_text(json.dumps({
        "merge_method": merge_method, "base_model": "base", "dtype": "bfloat16", "parameters": parameters,
        "sources": {name: str(options.work / name) for name in ("base", *BRANCHES)},
        "models": [{"model": name, "data": str(options.work / f"{name}.jsonl")} for name in BRANCHES],
    }))  # fmt: skip
    out = options.work / f"out-{method}"
    shutil.rmtree(out, ignore_errors=True)
    result: dict[str, Any] = {}
    if options.kill_after is not None:
        partial = out.parent / f".{out.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        process = start(recipe, out)
        while process.poll() is None:
            journals = list(partial.glob(".steps/.step-0.partial/scratch/progress.jsonl"))
            if journals and f'["{last}/{options.kill_after}"' in journals[0].read_text():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.2)
        assert process.returncode == -signal.SIGKILL, process.returncode
        result["resumed"] = run(recipe, out)
        killed = digests(out)
        shutil.rmtree(out)
    result |= run(recipe, out)
    if options.kill_after is not None:
        result["same_bytes"] = killed == digests(out)
    shutil.rmtree(out)
    return result


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    return subprocess.Popen([sys.executable, "-m", "bmjax", "merge", str(recipe), str(out), "-q"], env=environment)


def run(recipe: Path, out: Path) -> dict[str, Any]:
    """Run a merge to its end; returns its seconds, processor seconds and peak RSS in GiB."""
    began = time.perf_counter()
    process = start(recipe, out)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.returncode
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file of weights."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            result[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def make_models(work: Path, shape: str, layers: int | None) -> None:
    """Write a base and its branches, a file for each layer, and rows for each branch; what is there is kept."""
    import ml_dtypes
    import safetensors.numpy

    from bmjax.demo.tokenizer import train_tokenizer

    hidden, mlp, depth, heads, kv_heads, vocab = SIZES[shape]
    depth = layers or depth
    key_values = hidden // heads * kv_heads
    work.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in BRANCHES:
        words = [" ".join(map(str, rng.integers(0, 9999, 24))) for _ in range(60)]
        rows = ({"prompt": f"{name} {i}", "response": text} for i, text in enumerate(words))
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = rng.normal(0, 0.02, POOL).astype(np.float32)
    layer = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden), "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (key_values, hidden), "self_attn.k_proj.bias": (key_values,),
        "self_attn.v_proj.weight": (key_values, hidden), "self_attn.v_proj.bias": (key_values,),
        "self_attn.o_proj.weight": (hidden, hidden), "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden), "mlp.down_proj.weight": (hidden, mlp),
    }  # fmt: skip
    ends = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}  # fmt: skip # noqa: E501
    files = {f"layer-{i:02d}.safetensors": {f"model.layers.{i}.{k}": s for k, s in layer.items()} for i in range(depth)}
    files |= {f"{key}.safetensors": {key: size} for key, size in ends.items()}

    def tensor(model: str, key: str, size: tuple[int, ...]) -> np.ndarray:
        # The base's numbers, and for a branch a small change of every entry.
        count, (begin, other) = int(np.prod(size)), (int(hashlib.sha256(f"{m}{key}".encode()).hexdigest()[:6], 16)
                                                     for m in ("", model))  # fmt: skip
        flat = np.empty(count, ml_dtypes.bfloat16)
        for done in range(0, count, POOL // 2):
            stop = min(count, done + POOL // 2)
            values = pool[begin % (POOL // 2) :][: stop - done] + float("norm" in key)
            if model != "base":
                values = values + 0.05 * pool[other % (POOL // 2) :][: stop - done]
            flat[done:stop] = values
        return flat.reshape(size)

    for position, name in enumerate(("base", *BRANCHES)):
        folder = work / name
        folder.mkdir(exist_ok=True)
        for i, (file, tensors) in enumerate(files.items()):
            shared = "base" if not file.startswith("layer") else "ab"[i % 2] if position == 3 else name
            if (folder / file).exists():
                continue
            if shared != name:
                os.link(work / shared / file, folder / file)
                continue
            arrays = {key: tensor(name, key, size) for key, size in tensors.items()}
            safetensors.numpy.save_file(arrays, folder / "new", {"format": "pt"})
            os.rename(folder / "new", folder / file)
        index = {key: file for file, tensors in files.items() for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (folder / "config.json").write_text(json.dumps({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab, "hidden_size": hidden,
            "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "max_position_embeddings": 32_768, "rope_theta": 1e6, "eos_token_id": 2,
            "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
        }))  # fmt: skip
        train_tokenizer([work / f"{n}.jsonl" for n in BRANCHES], 400).save_pretrained(str(folder))


if __name__ == "__main__":
    main()
