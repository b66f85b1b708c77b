#!/usr/bin/env python
"""Training speed on this machine: bmjax and Hugging Face Trainer on the same model, data and step, tokens/s of both.

    .venv/bin/python scripts/bench_train.py [--seq-len 512 --batch 8 --steps 12]
    .venv/bin/python scripts/bench_train.py --seq-len 4096 --batch 2 [--documents 300]
    python scripts/bench_train.py --model 3b --seq-len 16384 --batch 4 --accumulate 4 --remat minimal   # on a GPU

Each side runs in a process of its own, in turn, so that neither shares threads or memory with the other; the first
steps (compilation, warm-up) are not counted; the median step is. Full rows, AdamW with float32 weights and moments,
clipping at 1; products in float32 on CPUs, in bfloat16 on GPUs (the Trainer: SDPA, bf16, gradient checkpointing). With
--documents the rows are packed with short documents, and the Trainer gets position ids that restart with each: what its
collator for packed rows gives. MFU counts what the model needs (attention within documents), nothing computed again.
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

SHAPES = {
    "small": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rope_theta": 10_000.0,
    },
    "1.5b": {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "rope_theta": 1_000_000.0,
    },
    "3b": {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "rope_theta": 1_000_000.0,
    },
}  # fmt: skip
LEARNING_RATE = 1e-5


def hf_config(arguments: argparse.Namespace) -> dict:
    """Qwen2.5 of the shape that is asked for; every run has random weights of its own."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": arguments.seq_len, "tie_word_embeddings": True, "eos_token_id": 0,
        "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.02, **SHAPES[arguments.model],
    }  # fmt: skip


def documents(arguments: argparse.Namespace):
    """The same full rows for both sides, and the lengths of the documents that each is made of."""
    import numpy as np

    length, mean = arguments.seq_len, arguments.documents
    count = arguments.batch * arguments.steps
    rng = np.random.default_rng(0)
    rows = rng.integers(1, SHAPES[arguments.model]["vocab_size"], (count, length)).astype(np.int32)
    if not mean:
        return rows, [[length]] * count
    lengths = []
    for _ in range(count):
        ends = np.unique(np.cumsum(rng.integers(mean // 2, 3 * mean // 2, 2 * length // mean + 2)).clip(max=length))
        lengths.append(np.diff(ends, prepend=0).tolist())
    assert all(sum(row) == length for row in lengths)  # full rows: no padding, which would be a document more
    return rows, lengths


def run_bmjax(arguments: argparse.Namespace) -> dict:
    """Seconds of every step, through the code that `bmjax train` runs."""
    from bmjax.parallel.start import use_cpu_cores, use_gpu_memory

    use_cpu_cores()
    use_gpu_memory()
    import jax
    import numpy as np

    from bmjax.branch import prepare
    from bmjax.branch.choose import without_data
    from bmjax.branch.examples import Dataset, Example
    from bmjax.branch.loader import Loader, read_ahead
    from bmjax.branch.settings import TrainSettings
    from bmjax.branch.step import compile_step, flops_per_token, init_state, memory_line
    from bmjax.model import qwen2
    from bmjax.model.config import ModelConfig
    from bmjax.parallel.chips import peak_flops
    from bmjax.parallel.mesh import make_mesh

    config = ModelConfig.from_hf(hf_config(arguments))
    on_cpu = jax.default_backend() == "cpu"
    given = TrainSettings(
        student="-", data="-", output="-", seq_len=arguments.seq_len, batch=arguments.batch, steps=arguments.steps,
        accumulate=arguments.accumulate, learning_rate=LEARNING_RATE, compute_dtype="float32" if on_cpu else "bfloat16",
        remat=arguments.remat, attention=arguments.attention, moments_dtype=arguments.moments_dtype, shuffle=False,
        track_move=False, mesh={"data": -1},
    )  # fmt: skip
    settings = without_data(given, "a benchmark")
    mesh = make_mesh(settings.mesh)
    examples, packed = [], []
    rows, lengths = documents(arguments)
    for row, sizes in zip(rows, lengths, strict=True):
        pieces = np.split(row, np.cumsum(sizes)[:-1])
        packed.append(list(range(len(examples), len(examples) + len(pieces))))
        examples += [Example(piece, np.ones(len(piece), np.uint8)) for piece in pieces]
    loader = Loader(
        Dataset(tuple(examples), 0, 0, "", sum(map(len, rows)), 0),
        arguments.seq_len,
        arguments.batch,
        packing=True,
        shuffle=False,
        seed=0,
    )
    loader.rows = packed  # the same rows as the other side's
    plan = prepare.step_plan(settings, config, mesh, max(map(len, packed)))
    seconds = []
    with jax.set_mesh(mesh), read_ahead(mesh, loader, 0, arguments.steps) as batches:
        state = init_state(plan, qwen2.init(config, 0, mesh))
        began = time.perf_counter()
        step_function = compile_step(plan, arguments.batch, arguments.seq_len)
        compiling = time.perf_counter() - began
        print(memory_line(step_function, state, mesh.local_devices[0]), file=sys.stderr)
        for _ in range(arguments.steps):
            began = time.perf_counter()
            state, metrics = step_function(state, next(batches), np.float32(LEARNING_RATE))
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
    device = jax.devices()[0]
    seen = sum(size * size for row in lengths for size in row) / rows.size  # what a token's document holds, on average
    return {
        "steps": seconds, "loss": loss, "compile_seconds": compiling, "device": device.device_kind,
        "flops_per_token": flops_per_token(config, round(seen)), "peak_flops": peak_flops(device.device_kind),
        "peak_mib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20,
    }  # fmt: skip


def run_trainer(arguments: argparse.Namespace) -> dict:
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
            if cuda:
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    cuda = torch.cuda.is_available()
    data = []
    for row, lengths in zip(*documents(arguments), strict=True):
        tokens = torch.tensor(row).long()
        example = {"input_ids": tokens, "labels": tokens}
        if arguments.documents:
            example["position_ids"] = torch.cat([torch.arange(length) for length in lengths])
        data.append(example)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        options = transformers.TrainingArguments(
            output_dir=output, per_device_train_batch_size=arguments.batch // arguments.accumulate,
            gradient_accumulation_steps=arguments.accumulate, max_steps=arguments.steps, learning_rate=LEARNING_RATE,
            use_cpu=not cuda, bf16=cuda, gradient_checkpointing=cuda,
            gradient_checkpointing_kwargs={"use_reentrant": False}, lr_scheduler_type="constant", weight_decay=0.01,
            adam_beta2=0.95, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            max_grad_norm=1.0,
        )  # fmt: skip
        with torch.device("cuda" if cuda else "cpu"):
            network = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**hf_config(arguments)), dtype=torch.float32,
                attn_implementation="sdpa",
            )  # fmt: skip
        transformers.Trainer(network, options, train_dataset=data, callbacks=[clock]).train()
    return {"steps": clock.seconds, "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--documents", type=int, default=0, help="tokens of a document, on average; 0: a row each")
    parser.add_argument("--remat", default="none", help="bmjax's, see `bmjax train --help`")
    parser.add_argument("--attention", default="auto", help="bmjax's, likewise")
    parser.add_argument("--moments-dtype", default="float32", help="bmjax's, likewise")
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often each side runs, in turn; the best median counts"
    )
    parser.add_argument("--side", choices=RUN, help="measure this one alone, and print JSON")
    arguments = parser.parse_args()
    if arguments.side:
        result = RUN[arguments.side](arguments)
        result["seconds"] = statistics.median(result["steps"][arguments.warm :])
        result["peak_mib"] = result["peak_mib"] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return 0

    tokens = arguments.batch * arguments.seq_len
    results: dict[str, list[dict]] = {side: [] for side in RUN}
    for _ in range(arguments.rounds):
        for side in results:
            command = [sys.executable, *sys.argv, "--side", side]
            out = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
            if out.returncode:
                sys.exit(f"{side} failed:\n{out.stderr[-2000:]}")
            results[side].append(json.loads(out.stdout.strip().splitlines()[-1]))
            print(f"{side}: {tokens / results[side][-1]['seconds']:,.0f} tokens/s", file=sys.stderr)
    best = {side: min(runs, key=lambda r: r["seconds"]) for side, runs in results.items()}
    ours = best["bmjax"]
    where = f"{os.cpu_count()} cores" if ours["peak_flops"] is None else ours["device"]
    packed = f" packed with documents of about {arguments.documents}" if arguments.documents else ""
    print(f"{arguments.model}: batch {arguments.batch} x {arguments.seq_len} tokens{packed}, {where}")
    for side, name in (("trainer", "HF Trainer"), ("bmjax", "bmjax")):
        speed = tokens / best[side]["seconds"]
        peak = ours["peak_flops"]
        mfu = f"   MFU {speed * ours['flops_per_token'] / peak:.1%}" if peak else ""
        print(f"  {name:<11} {speed:8,.0f} tokens/s   peak {best[side]['peak_mib']:6,.0f} MiB{mfu}")
    print(f"  ratio       {best['trainer']['seconds'] / ours['seconds']:8.2f}x")
    return 0


RUN = {"bmjax": run_bmjax, "trainer": run_trainer}


if __name__ == "__main__":
    sys.exit(main())
