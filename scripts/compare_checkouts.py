#!/usr/bin/env python
"""Show that two checkouts of bmjax compute the same: record each one's results on fixed inputs, then compare.

    scripts/compare_checkouts.py record CHECKOUT RESULTS.json [merges trainings plans demo]
    scripts/compare_checkouts.py compare BEFORE.json AFTER.json

`record` calls the commands of the checkout in processes of their own, with this interpreter. It keeps the checksum of
the weights that every merge method writes, the losses of a training of 30 steps on one and on eight CPU devices, what
`bmjax plan` says of the 32B configs (needs libtpu), and the scores of the demo. `compare` prints every difference and
exits with 1 when there is one. Without names of parts, all four are recorded.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("merges", "trainings", "plans", "demo")
BRANCHES = ("math", "code", "science")
SEED = 20261127

# Every method with parameters that make it do something; the recipes name base, math, code, science.
PER_BRANCH = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
              "della", "della_linear", "sce", "model_stock", "ram", "ramplus_tl", "isotropic", "tsv", "karcher",
              "multislerp", "arcee_fusion")  # fmt: skip
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4}, "task_arithmetic": {"weight": 0.6, "lambda": 0.9},
    "ties": {"density": 0.3, "weight": 0.7}, "dare_linear": {"density": 0.5, "weight": 0.5},
    "dare_ties": {"density": 0.5, "rescale": True}, "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.05}, "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.5, "epsilon": 0.2}, "sce": {"select_topk": 0.4},
}  # fmt: skip


def main() -> int:
    """Run the subcommand that the command line names."""
    match sys.argv[1:]:
        case ["record", checkout, results, *parts] if set(parts) <= set(PARTS):
            return record(Path(checkout).resolve(), Path(results), parts or list(PARTS))
        case ["compare", before, after]:
            return compare(json.loads(Path(before).read_text()), json.loads(Path(after).read_text()))
    print(__doc__, file=sys.stderr)
    return 2


def record(checkout: Path, results: Path, parts: list[str]) -> int:
    """Write to `results` what the checkout computes in each of `parts`; earlier parts in that file stay."""
    recorded = json.loads(results.read_text()) if results.exists() else {}
    work = {"merges": merges, "trainings": trainings, "plans": plans, "demo": demo}
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            recorded[part] = work[part](checkout, Path(folder))
        results.write_text(json.dumps(recorded, indent=1, sort_keys=True))
        print(f"{part}: recorded", file=sys.stderr)
    return 0


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs between two records; returns 1 if anything does."""
    differences = list(_differences(before, after, ""))
    for line in differences:
        print(line)
    print(f"{len(differences)} differences in {', '.join(sorted(set(before) | set(after)))}")
    return int(bool(differences))


def _differences(before: Any, after: Any, path: str) -> Any:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(key), after.get(key), f"{path}/{key}")
    elif before != after:
        yield f"{path}: {str(before)[:120]} -> {str(after)[:120]}"


def bmjax(checkout: Path, *arguments: str, devices: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of the checkout; its output, or SystemExit with what it said when it fails."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": "cpu",
    }
    if devices is not None:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    command = [sys.executable, "-m", "bmjax", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done


def merges(checkout: Path, folder: Path) -> dict[str, str]:
    """Checksum of the merged weights, by method."""
    _write_models(folder)
    checksums = {}
    for name, recipe in _recipes(folder).items():
        file, out = folder / f"{name}.yaml", folder / "out" / name
        file.write_text(json.dumps(recipe))
        bmjax(checkout, "merge", str(file), str(out), "--quiet")
        digest = hashlib.sha256()
        for shard in sorted(out.glob("*.safetensors")):
            digest.update(shard.read_bytes())
        checksums[name] = digest.hexdigest()
    return checksums


def _recipes(folder: Path) -> dict[str, Any]:
    models = {name: str(folder / name) for name in ("base", *BRANCHES)}
    head = {"sources": models, "base_model": "base"}
    recipes: dict[str, Any] = {
        method: head | {"merge_method": method, "models": list(BRANCHES), "parameters": PARAMETERS.get(method, {})}
        for method in PER_BRANCH
    }
    recipes["slerp"] = {"sources": models, "merge_method": "slerp", "base_model": "math", "models": ["code"],
                        "parameters": {"t": 0.3}}  # fmt: skip
    recipes["nuslerp"] = head | {"merge_method": "nuslerp", "models": ["math", "code"], "parameters": {"weight": 0.5}}
    recipes["nearswap"] = head | {"merge_method": "nearswap", "models": ["math"], "parameters": {"t": 0.001}}
    recipes["passthrough"] = {"sources": models, "merge_method": "passthrough", "models": ["math"]}
    recipes["fisher"] = head | {"merge_method": "fisher", "models": [
        {"model": name, "parameters": {"importance": str(folder / f"{name}_importances")}} for name in BRANCHES
    ]}  # fmt: skip
    recipes["tinyr1"] = {"sources": models, "steps": [
        {"name": "mid", "merge_method": "arcee_fusion", "base_model": "science", "models": ["math"]},
        {"name": "student", "merge_method": "arcee_fusion", "base_model": "code", "models": ["mid"]},
    ]}  # fmt: skip
    recipes["gradient_and_filters"] = head | {
        "merge_method": "ties", "models": list(BRANCHES), "dtype": "bfloat16",
        "parameters": {"density": [0.2, 0.8], "weight": [{"filter": "self_attn", "value": 0.2}, {"value": 0.6}]},
    }  # fmt: skip
    data = [{"model": name, "data": str(folder / f"{name}.jsonl")} for name in BRANCHES]
    settings = {"rows": 4, "held_out": 4, "documents": 40, "seq_len": 64, "remat": "none"}
    recipes["regmean"] = head | {"merge_method": "regmean", "models": data, "parameters": settings}
    learned = settings | {"along": "regmean", "steps": 4, "batch": 2}
    recipes["learned"] = head | {"merge_method": "learned", "models": data, "parameters": learned}
    return recipes


def _write_models(folder: Path) -> None:
    """A tiny Qwen2 and three fine-tunes with heavy-tailed changes, importances of theirs, and rows of three domains."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(SEED)
    tokenizer = _byte_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": len(tokenizer)}  # fmt: skip
    config = shape | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 256,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "torch_dtype": "float32", "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    base = {name: rng.standard_normal(size).astype(np.float32) * 0.05 for name, size in _shapes(shape).items()}
    base |= {name: np.ones_like(value) for name, value in base.items() if "norm" in name}

    def write(name: str, tensors: dict[str, np.ndarray]) -> None:
        directory = folder / name
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(str(directory))

    write("base", base)
    for branch in BRANCHES:
        moves = {name: rng.standard_t(3, value.shape).astype(np.float32) * 2e-3 for name, value in base.items()}
        write(branch, {name: value + moves[name] for name, value in base.items()})
        write(f"{branch}_importances", {name: np.abs(move) for name, move in moves.items()})
        lines = [
            {"prompt": f"{branch}: {a} + {b}?", "reasoning": f"{a} and {b}", "response": str(a + b)}
            for a, b in rng.integers(0, 99, (200, 2)).tolist()
        ]
        (folder / f"{branch}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _shapes(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    d, f, v = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,),
                                           "lm_head.weight": (v, d)}  # fmt: skip
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.self_attn.{p}_proj.weight": (n, d) for p, n in (("q", d), ("k", kv), ("v", kv))}
        tensors |= {f"{at}.self_attn.{p}_proj.bias": (n,) for p, n in (("q", d), ("k", kv), ("v", kv))}
        tensors |= {f"{at}.self_attn.o_proj.weight": (d, d), f"{at}.mlp.down_proj.weight": (d, f)}
        tensors |= {f"{at}.mlp.{p}_proj.weight": (f, d) for p in ("gate", "up")}
        tensors |= {f"{at}.{p}_layernorm.weight": (d,) for p in ("input", "post_attention")}
    return tensors


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return fast


def trainings(checkout: Path, folder: Path) -> dict[str, Any]:
    """Losses, gradient norms and the exported weights' checksum of 30 steps, on one device and on eight."""
    _write_models(folder)
    results = {}
    for devices, mesh in ((1, {"data": 1}), (8, {"data": 2, "fsdp": 2, "context": 1, "tensor": 2})):
        output = folder / f"run{devices}"
        settings = {
            "student": str(folder / "base"), "data": [str(folder / f"{name}.jsonl") for name in BRANCHES],
            "output": str(output), "seed": 3, "seq_len": 128, "batch": 8, "accumulate": 2, "steps": 30,
            "learning_rate": 1e-3, "compute_dtype": "float32", "mesh": mesh, "save_every": 10, "log_every": 30,
        }  # fmt: skip
        config = folder / f"train{devices}.yaml"
        config.write_text(json.dumps(settings))
        bmjax(checkout, "train", str(config), devices=devices)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        weights = hashlib.sha256((output / "hf" / "model.safetensors").read_bytes()).hexdigest()
        steps = {f"{line['step']:02d}": [line["loss"], line["grad_norm"], line["tokens"]] for line in lines}
        results[f"{devices} devices"] = {"steps": steps, "weights": weights}
    return results


def plans(checkout: Path, folder: Path) -> dict[str, Any]:
    """What `bmjax plan` says of the 32B configs, times of compilation left out."""
    results = {}
    for config in sorted((checkout / "configs").glob("tinyr1_32b_*.yaml")):
        text = bmjax(checkout, "plan", str(config), "--topology", "v5p:4x4x4", "--json").stdout
        results[config.name] = {k: v for k, v in json.loads(text).items() if k != "compile_seconds"}
    return results


def demo(checkout: Path, folder: Path) -> dict[str, Any]:
    """The demo's scores for seed 0 by model and domain, and which merge was chosen."""
    has_command = (checkout / "bmjax" / "demo").is_dir()
    command = ["demo"] if has_command else ["run", "configs/demo.yaml"]
    bmjax(checkout, *command, "--output", str(folder / "demo"))
    report = json.loads((folder / "demo" / "report.json").read_text())
    scores = {name: model["scores"] for name, model in report["models"].items()}
    return {"scores": scores, "chosen": report["chosen"]["merge"], "selection": report["selection"]}


if __name__ == "__main__":
    sys.exit(main())
