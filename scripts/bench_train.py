#!/usr/bin/env python
"""Training speed on this machine: bmjax and Hugging Face Trainer on the same model, data and step, tokens/s of both.

    .venv/bin/python scripts/bench_train.py [--seq-len 512 --batch 8 --steps 12]

Each side runs in a process of its own, in turn, so that neither shares threads or memory with the other; the first
steps (compilation, warm-up) are not counted; the median step is. Float32, full rows, AdamW, clipping at 1.
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


def documents(seq_len: int, count: int):
    """The same full rows for both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(1, VOCAB, (count, seq_len)).astype(np.int32)


def run_bmjax(model: Path, seq_len: int, batch: int, steps: int) -> list[float]:
    """Seconds of every step, through the code that `bmjax train` runs."""
    import jax
    import numpy as np

    from bmjax.branch import train as training
    from bmjax.branch.examples import Dataset, Example
    from bmjax.branch.loader import Loader
    from bmjax.branch.settings import TrainSettings
    from bmjax.branch.step import init_state, make_step, place_batch
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
    rows = documents(seq_len, batch * steps)
    examples = tuple(Example(row, np.ones(seq_len, np.uint8)) for row in rows)
    loader = Loader(Dataset(examples, 0, 0, ""), seq_len, batch, packing=True, shuffle=False, seed=0)
    seconds = []
    with jax.set_mesh(mesh):
        state, step_function = init_state(plan, hf.load_params(model, config, mesh)), make_step(plan)
        for step in range(steps):
            began = time.perf_counter()
            b = loader.at(step)
            arrays = place_batch(mesh, b.tokens, b.segment_ids, b.loss_mask)
            state, metrics = step_function(state, *arrays, np.float32(1e-4))
            float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
    return seconds


def run_trainer(model: Path, seq_len: int, batch: int, steps: int) -> list[float]:
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

    rows = torch.tensor(documents(seq_len, batch * steps)).long()
    data = [{"input_ids": row, "labels": row} for row in rows]
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
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each side runs, in turn; the best median counts"
    )
    parser.add_argument("--side", choices=("bmjax", "trainer"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = run_bmjax if arguments.side == "bmjax" else run_trainer
        seconds = side(Path(arguments.model), arguments.seq_len, arguments.batch, arguments.steps)
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
                sizes = {"--seq-len": arguments.seq_len, "--batch": arguments.batch, "--steps": arguments.steps}
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
