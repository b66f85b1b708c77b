#!/usr/bin/env python
"""Training speed on this machine: bmjax and Hugging Face Trainer on the same model, data and step, tokens/s of both.

    .venv/bin/python scripts/bench_train.py [--seq-len 512 --batch 8 --steps 12]
    .venv/bin/python scripts/bench_train.py --seq-len 4096 --batch 2 [--documents 300]

Each side runs in a process of its own, in turn, so that neither shares threads or memory with the other; the first
steps (compilation, warm-up) are not counted; the median step is. Float32, full rows, AdamW, clipping at 1. With
--documents the rows are packed with short documents, and the Trainer gets position ids that restart with each: what its
collator for packed rows gives.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4}
VOCAB = 2048
WARM = 3


def make_model(directory: Path, seq_len: int) -> None:
    """A random Qwen2 as both sides load it."""
    from bmjax.model import qwen2
    from bmjax.model.spec import Qwen2Config
    from bmjax.weights import hf

    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": VOCAB, "hidden_act": "silu",
        "hidden_size": SHAPE["hidden_size"], "intermediate_size": SHAPE["intermediate_size"],
        "num_hidden_layers": SHAPE["num_layers"], "num_attention_heads": SHAPE["num_heads"],
        "num_key_value_heads": SHAPE["num_kv_heads"], "max_position_embeddings": seq_len, "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0, "tie_word_embeddings": True, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    hf.save_hf(directory, qwen2.init(Qwen2Config.from_hf(config), 0), config)


def documents(seq_len: int, count: int, mean: int):
    """The same full rows for both sides, and the lengths of the documents that each is made of."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = rng.integers(1, VOCAB, (count, seq_len)).astype(np.int32)
    if not mean:
        return rows, [[seq_len]] * count
    lengths = []
    for _ in range(count):
        ends = np.unique(np.cumsum(rng.integers(mean // 2, 3 * mean // 2, 2 * seq_len // mean)).clip(max=seq_len))
        lengths.append(np.diff(ends, prepend=0).tolist())
    return rows, lengths


def run_bmjax(model: Path, seq_len: int, batch: int, steps: int, mean: int) -> list[float]:
    """Seconds of every step, through the code that `bmjax train` runs."""
    import jax
    import numpy as np

    from bmjax.branch import train as training
    from bmjax.branch.examples import Dataset, Example
    from bmjax.branch.loader import Loader
    from bmjax.branch.settings import TrainSettings
    from bmjax.branch.step import compile_step, init_state, load_batch
    from bmjax.model.spec import Qwen2Config
    from bmjax.parallel.mesh import make_mesh
    from bmjax.parallel.start import use_cpu_cores
    from bmjax.weights import hf

    use_cpu_cores()
    config = Qwen2Config.from_dir(model)
    settings = TrainSettings(
        student=str(model), data="-", output="-", seq_len=seq_len, batch=batch, steps=steps, learning_rate=1e-4,
        compute_dtype="float32", remat="none", shuffle=False, track_move=False, mesh={"data": -1},
    )  # fmt: skip
    mesh = make_mesh(settings.mesh)
    plan = training.step_plan(settings, config, mesh)
    examples, packed = [], []
    for row, lengths in zip(*documents(seq_len, batch * steps, mean), strict=True):
        pieces = np.split(row, np.cumsum(lengths)[:-1])
        packed.append(list(range(len(examples), len(examples) + len(pieces))))
        examples += [Example(piece, np.ones(len(piece), np.uint8)) for piece in pieces]
    loader = Loader(Dataset(tuple(examples), 0, 0, ""), seq_len, batch, packing=True, shuffle=False, seed=0)
    loader.rows = packed  # the same rows as the other side's
    seconds = []
    with jax.set_mesh(mesh):
        state = init_state(plan, hf.load_params(model, config, mesh))
        step_function = compile_step(plan, batch, seq_len)
        for step in range(steps):
            began = time.perf_counter()
            state, metrics = step_function(state, *load_batch(mesh, loader, step), np.float32(1e-4))
            float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
    return seconds


def run_trainer(model: Path, seq_len: int, batch: int, steps: int, mean: int) -> list[float]:
    """Seconds of every step of transformers.Trainer."""
    import torch
    import transformers

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *args, **kwargs) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    data = []
    for row, lengths in zip(*documents(seq_len, batch * steps, mean), strict=True):
        tokens = torch.tensor(row).long()
        one = {"input_ids": tokens, "labels": tokens}
        if mean:
            one["position_ids"] = torch.cat([torch.arange(length) for length in lengths])
        data.append(one)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output, per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-4, use_cpu=True,
            lr_scheduler_type="constant", weight_decay=0.01, adam_beta2=0.95,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        transformers.Trainer(network, arguments, train_dataset=data, callbacks=[clock]).train()
    return clock.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--documents", type=int, default=0, help="tokens of a document, on average; 0: a row each")
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each side runs, in turn; the best median counts"
    )
    parser.add_argument("--side", choices=("bmjax", "trainer"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = run_bmjax if arguments.side == "bmjax" else run_trainer
        seconds = side(Path(arguments.model), arguments.seq_len, arguments.batch, arguments.steps, arguments.documents)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": statistics.median(seconds[WARM:]), "peak_rss_mib": peak}))
        return 0

    tokens = arguments.batch * arguments.seq_len
    results: dict[str, list[dict[str, float]]] = {"bmjax": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, arguments.seq_len)
        for _ in range(arguments.rounds):
            for side in results:
                sizes = {"--seq-len": arguments.seq_len, "--batch": arguments.batch, "--steps": arguments.steps,
                         "--documents": arguments.documents}  # fmt: skip
                command = [sys.executable, __file__, "--side", side, "--model", str(model)]
                command += [word for key, value in sizes.items() for word in (key, str(value))]
                out = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
                results[side].append(json.loads(out.stdout.strip().splitlines()[-1]))
                print(f"{side}: {tokens / results[side][-1]['seconds']:,.0f} tokens/s", file=sys.stderr)
    best = {side: min(runs, key=lambda r: r["seconds"]) for side, runs in results.items()}
    print(f"batch {arguments.batch} x {arguments.seq_len} tokens, float32, {os.cpu_count()} cores")
    for side, name in (("trainer", "HF Trainer"), ("bmjax", "bmjax")):
        print(
            f"  {name:<11} {tokens / best[side]['seconds']:8,.0f} tokens/s   "
            f"peak RSS {best[side]['peak_rss_mib']:6,.0f} MiB"
        )
    print(f"  ratio       {best['trainer']['seconds'] / best['bmjax']['seconds']:8.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
