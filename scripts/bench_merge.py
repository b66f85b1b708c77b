#!/usr/bin/env python
"""Merging speed and memory on this machine: bmjax and mergekit on the same recipes and checkpoints, whole processes.

    .venv/bin/python scripts/bench_merge.py [--work DIR --methods ties,arcee_fusion --runs 3]
    .venv/bin/python scripts/bench_merge.py --shape 3b --work DIR [--cold]

Qwen2-shaped bf16 checkpoints, a base and its branches, are made once and kept under --work; mergekit gets a virtual
environment of its own. A round of a method copies the bytes that its merge moves, then runs either tool; outputs are
removed and disks synced in between, inputs stay in the page cache where they fit; with --cold they are put out of it
before each. Medians count. Peak RSS is the kernel's for the whole child process. --shape 3b measures bmjax alone unless
--mergekit-env is given.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# A child's peak RSS starts at what its parent holds at the fork, so numpy and bmjax are only imported where needed.

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch==2.13.0", "mergekit==0.1.5")
BRANCHES = 3
CHUNK_BYTES = 16 * 2**20
CHUNK_ELEMENTS = 4 * 2**20
OUTLIERS = 4  # entries of each tensor that a branch changed much
LARGEST = 0.3  # change of an entry
ABSENT = "unknown merge_method"


class Shape(NamedTuple):
    """The sizes of a Qwen2; its embedding is tied."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    branches: int = BRANCHES


SHAPES = {
    "tiny": Shape(256, 64, 176, 3, 2, 2),
    "0.5b": Shape(151_936, 896, 4864, 24, 14, 2),
    "3b": Shape(151_936, 2048, 11_008, 36, 16, 2, branches=2),
}


@dataclass(frozen=True)
class Case:
    """One recipe: its method, how many branches it takes (None: all there are), and its parameters."""

    method: str
    shared: dict[str, Any] = field(default_factory=dict)
    each: dict[str, Any] = field(default_factory=dict)
    branches: int | None = None
    base: bool = True

    def models(self, available: int) -> int:
        """How many models it reads where `available` branches lie beside the base."""
        return (self.branches or available) + self.base

    def recipe(self, models: Path, available: int, **top: Any) -> dict[str, Any]:
        """The recipe as both tools read it. A parameter of `each` that is a list has a value per branch."""
        entries = []
        for i in range(self.branches or available):
            values = {k: v[i] if isinstance(v, list) else v for k, v in self.each.items()}
            entries.append({"model": str(models / f"branch{i + 1}"), **({"parameters": values} if values else {})})
        return {
            "merge_method": self.method,
            **({"base_model": str(models / "base")} if self.base else {}),
            "models": entries,
            **({"parameters": dict(self.shared)} if self.shared else {}),
            **top,
        }


WEIGHT = {"weight": [0.5, 0.3, 0.2]}
HALF = {**WEIGHT, "density": 0.5}
CASES = {
    case.method: case
    for case in (
        Case("linear", each=WEIGHT, base=False),
        Case("slerp", {"t": 0.5}, branches=1),
        Case("nuslerp", each=WEIGHT, branches=2),
        # Without a base: with one, mergekit refuses tensors that no branch changed, such as norms in bf16.
        Case("multislerp", each=WEIGHT, base=False),
        Case("karcher", base=False),
        Case("task_arithmetic", each=WEIGHT),
        Case("ties", each=HALF),
        Case("dare_linear", each=HALF),
        Case("dare_ties", each=HALF),
        Case("breadcrumbs", each=HALF),
        Case("breadcrumbs_ties", each=HALF),
        Case("della", each=HALF),
        Case("della_linear", each=HALF),
        Case("sce", {"select_topk": 0.1}),
        Case("model_stock"),
        Case("arcee_fusion", branches=1),
        Case("nearswap", {"t": 0.0003}, branches=1),
        Case("ram"),
        Case("ramplus_tl"),
        Case("passthrough", branches=1, base=False),
    )
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen2's tensors, as Hugging Face saves them."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (shape.hidden,)
        yield f"{at}.post_attention_layernorm.weight", (shape.hidden,)
        for name, rows in (("q", shape.hidden), ("k", kv), ("v", kv)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, shape.hidden)
            yield f"{at}.self_attn.{name}_proj.bias", (rows,)
        yield f"{at}.self_attn.o_proj.weight", (shape.hidden, shape.hidden)
        yield f"{at}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{at}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{at}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
    yield "model.norm.weight", (shape.hidden,)


def make_models(folder: Path, shape: Shape, largest: float) -> None:
    """`base` and its branches under `folder`, bf16, each made whole or not at all.

    Weights are normal with rms 0.02, norms near 1. A branch's change of a tensor is as fine-tuning leaves it: normal,
    its rms between 2e-4 and 5e-4 before rounding, but for OUTLIERS entries of a sixth of `largest` to `largest`.
    """
    import ml_dtypes
    import numpy as np

    from bmjax.io.atomic import replacing
    from bmjax.io.safetensors import SharedWriter, open_checkpoint

    plan = [(name, np.dtype(ml_dtypes.bfloat16), size) for name, size in tensors(shape)]
    for number in range(shape.branches + 1):
        target = folder / (f"branch{number}" if number else "base")
        if target.exists():
            continue
        print(f"making {target.name} of {folder.name}", file=sys.stderr)
        base = open_checkpoint(folder / "base") if number else None
        with replacing(target) as whole:
            with SharedWriter(whole, plan) as writer:
                for i, (name, dtype, size) in enumerate(plan):
                    random = np.random.Generator(np.random.SFC64([number, i]))
                    tensor = np.empty(size, dtype)
                    scale = np.float32(math.exp(random.uniform(math.log(2e-4), math.log(5e-4))))
                    outliers = random.integers(math.prod(size), size=OUTLIERS)
                    changes = random.choice([-1, 1], OUTLIERS) * random.uniform(largest / 6, largest, OUTLIERS)
                    rows = max(1, CHUNK_ELEMENTS // math.prod(size[1:]))
                    for start in range(0, size[0], rows):
                        part = slice(start, min(start + rows, size[0]))
                        unit = random.standard_normal(tensor[part].shape, np.float32)
                        if base:
                            tensor[part] = base.read(name, (part,)).astype(np.float32) + scale * unit
                        else:
                            tensor[part] = 1 + 0.1 * unit if "norm" in name else 0.02 * unit
                    if base:
                        flat = tensor.reshape(-1)
                        flat[outliers] = flat[outliers].astype(np.float32) + changes
                    writer.write(name, 0, tensor)
            write_side_files(whole, shape, "bfloat16")


def write_side_files(folder: Path, shape: Shape, dtype: str) -> None:
    """A config and a tokenizer that both tools accept."""
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": shape.vocab, "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "tie_word_embeddings": True, "torch_dtype": dtype,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    from tokenizers import Tokenizer, models

    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")


def make_mergekit(folder: Path) -> Path:
    """The directory of mergekit's programs in the environment `folder`, which is made when it does not exist."""
    if not folder.exists():
        print(f"installing {' and '.join(PACKAGES)} into {folder} (once)", file=sys.stderr)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            for package in PACKAGES:
                subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "-qq", package], check=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder / "bin"


class Run(NamedTuple):
    """A finished child process: wall seconds, peak RSS, exit code, the last line that it said."""

    seconds: float
    mib: float
    code: int
    said: str


def run(command: Sequence[str | Path]) -> Run:
    """Runs a whole process on the CPU, from the repository's root, off the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages have their bytecode
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in command], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            cwd=ROOT, env=environment,
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    return Run(seconds, usage.ru_maxrss / 1024, child.returncode, lines[-1] if lines else "")


def copy(models: Sequence[Path], out: Path) -> float:
    """Seconds to read the models' weights and write as many bytes as the first one has, down to the disk."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    out.mkdir()
    began = time.perf_counter()
    for model in models:
        for path in sorted(model.glob("*.safetensors")):
            kept = model == models[0]
            copied = out / path.name if kept else os.devnull
            with open(path, "rb", buffering=0) as source, open(copied, "wb", buffering=0) as target:
                while count := source.readinto(buffer):
                    target.write(buffer[:count])
                if kept:
                    os.fsync(target.fileno())
    return time.perf_counter() - began


def clear(out: Path, evicted: Sequence[Path] = ()) -> None:
    """Leaves nothing of the last run that the next one would pay for, nor the files `evicted` in the page cache."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for path in evicted:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    tools: dict[str, list[str | Path]], case: Case, shape: Shape, models: Path, runs: int, cold: bool
) -> dict[str, Any]:
    """Medians of a method: seconds of `copy`, and (seconds, MiB) of each tool or a word that says why not."""
    recipe, out = models.parent / "recipe.yaml", models.parent / "out"
    recipe.write_text(yaml.safe_dump(case.recipe(models, shape.branches, dtype="bfloat16"), sort_keys=False))
    names = [*(["base"] if case.base else []), *(f"branch{i + 1}" for i in range(case.branches or shape.branches))]
    evicted = sorted(models.glob("*/*.safetensors")) if cold else []
    copies: list[float] = []
    done: dict[str, list[Run]] = {tool: [] for tool in tools}
    results: dict[str, Any] = {}
    for _ in range(runs):
        clear(out, evicted)
        copies.append(copy([models / name for name in names], out))
        for tool, command in tools.items():
            if tool in results:
                continue
            clear(out, evicted)
            result = run([*command, recipe, out])
            if result.code:
                absent = tool == "bmjax" and ABSENT in result.said
                results[tool] = "absent" if absent else "failed"
                print(f"{case.method}: {tool} {'has no such method' if absent else result.said}", file=sys.stderr)
                continue
            done[tool].append(result)
            print(f"{case.method}: {tool} {result.seconds:.1f} s, {result.mib:,.0f} MiB", file=sys.stderr)
    clear(out)
    recipe.unlink()
    for tool, all_runs in done.items():
        if tool not in results:
            results[tool] = tuple(statistics.median(values) for values in zip(*(r[:2] for r in all_runs), strict=True))
    return {"copy": statistics.median(copies), **results}


def row(method: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    ours, theirs, copied = result.get("bmjax"), result.get("mergekit"), result["copy"]
    both = isinstance(ours, tuple) and isinstance(theirs, tuple)
    cells = [method]
    cells += [f"{tool[0]:.1f}" if isinstance(tool, tuple) else tool or "" for tool in (ours, theirs)]
    cells.append(f"{theirs[0] / ours[0]:.1f}x" if both else "")
    cells += [f"{tool[1]:,.0f}" if isinstance(tool, tuple) else "" for tool in (ours, theirs)]
    cells += [f"{copied:.1f}", f"{ours[0] / copied:.1f}x" if isinstance(ours, tuple) else ""]
    return "| " + " | ".join(cells) + " |"


def small(tools: dict[str, list[str | Path]], models: Path, shape: Shape, runs: int) -> Iterator[str]:
    """Lines of what a user waits for before any weights are read, and for a merge of next to no weights."""
    recipe, out, tiny = models.parent / "recipe.yaml", models.parent / "out", models.parent / "tiny"
    case = CASES["linear"]
    for what, folder in (("--help", None), ("--check", models), ("a tiny merge", tiny)):
        option = [what] if what.startswith("--") else []
        if folder:
            branches = (shape if folder == models else SHAPES["tiny"]).branches
            top = case.recipe(folder, branches, dtype="bfloat16")
            recipe.write_text(yaml.safe_dump(top, sort_keys=False))
        cells = []
        for tool, command in tools.items():
            if what == "--check" and tool == "mergekit":
                continue
            results = []
            for _ in range(runs):
                clear(out)
                results.append(run([*command, *([recipe, out] if folder else []), *option]))
            if any(r.code for r in results):
                unknown = what == "--check" and "unrecognized arguments: --check" in results[0].said
                cells.append(f"{tool} {'has no --check' if unknown else 'failed: ' + results[0].said}")
                continue
            seconds, mib = (statistics.median(values) for values in zip(*(r[:2] for r in results), strict=True))
            cells.append(f"{tool} {seconds:.2f} s, {mib:,.0f} MiB")
        if cells:
            yield f"{what}: {'; '.join(cells)}"
    clear(out)
    recipe.unlink()


def _methods(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CASES:
            raise argparse.ArgumentTypeError(f"unknown method '{name}'; known are {', '.join(CASES)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoints and mergekit are kept (default: nowhere)")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--methods", type=_methods, default=list(CASES), metavar="A,B", help="default: all")
    parser.add_argument("--largest", type=float, default=LARGEST, metavar="X",
                        help=f"largest change of an entry, {OUTLIERS} a tensor ({LARGEST}; 0: none)")  # fmt: skip
    parser.add_argument("--runs", type=int, default=1, help="rounds of each method; their median counts")
    parser.add_argument("--cold", action="store_true", help="put the inputs out of the page cache before each run")
    parser.add_argument("--mergekit-env", type=Path, metavar="DIR",
                        help="mergekit's environment, made if need be (default: WORK/mergekit)")  # fmt: skip
    parser.add_argument("--skip-mergekit", action="store_true", help="measure bmjax alone")
    parser.add_argument("--skip-bmjax", action="store_true", help="measure mergekit alone")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_models(arguments.make, SHAPES[arguments.shape], arguments.largest)
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        models = work / (arguments.shape + ("" if arguments.largest == LARGEST else f"-{arguments.largest:g}"))
        for name, folder in {arguments.shape: models, "tiny": work / "tiny"}.items():
            making = [sys.executable, __file__, "--shape", name, "--make", str(folder)]
            making += ["--largest", str(arguments.largest)]
            subprocess.run(making, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        tools: dict[str, list[str | Path]] = {}
        if not arguments.skip_bmjax:
            tools["bmjax"] = [sys.executable, "-m", "bmjax.merge"]
        if not arguments.skip_mergekit and (arguments.shape != "3b" or arguments.mergekit_env):
            environment = (arguments.mergekit_env or work / "mergekit").resolve()
            tools["mergekit"] = [make_mergekit(environment) / "mergekit-yaml"]
        failed = bench(tools, models, arguments.shape, arguments.methods, arguments.runs, arguments.cold)
    return failed


def bench(
    tools: dict[str, list[str | Path]], models: Path, name: str, methods: Sequence[str], runs: int, cold: bool
) -> int:
    """Prints the table; 1 when a tool failed at a method that it has."""
    shape = SHAPES[name]
    weights = sorted(models.glob("*/*.safetensors"))
    total = sum(path.stat().st_size for path in weights)
    for path in () if cold else weights:
        with open(path, "rb", buffering=0) as file:
            while file.read(CHUNK_BYTES):
                pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = "; cold inputs" if cold else "" if total < 0.8 * memory else "; the inputs do not fit in it"
    print(f"{models.name}: {shape.branches} branches and their base, {total / 1e9:.1f} GB bf16; "
          f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB memory{fits}\n")  # fmt: skip
    print("| method | bmjax s | mergekit s | ratio | bmjax MiB | mergekit MiB | copy s | bmjax / copy |")
    print("|---|---|---|---|---|---|---|---|")
    failed = False
    for method in methods:
        result = measure(tools, CASES[method], shape, models, runs, cold)
        failed |= "failed" in result.values()
        print(row(method, result), flush=True)
    print()
    for line in small(tools, models, shape, runs):
        print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
