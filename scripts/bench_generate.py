#!/usr/bin/env python
"""Generation speed on this machine: bmjax's engine and transformers' generate on the same model and requests.

    .venv/bin/python scripts/bench_generate.py [--rounds 3]
    .venv/bin/python scripts/bench_generate.py --cpu-time
    python scripts/bench_generate.py --gpu          # a 3B shape alone, on a GPU: share of the memory's bandwidth

Two workloads, greedy, float32, 3.7 M parameters:
- even: 8 requests of 64 tokens with 128 new tokens each;
- mixed: 64 requests, prompts of 16 to 256 tokens, answers of a heavy tail: the median has 40 tokens, the longest 512.
transformers gets every request's own length by a stopping criterion, and for `mixed` the best of three ways to cut them
into batches (64, 16 and 8 at a time, sorted by the length of the prompts). Only new tokens that were asked for count.
Each side runs in a process of its own, in turn; compilation and a first run are not counted, the best round is. On a
busy machine --cpu-time counts the seconds of one thread, so that waiting does not count.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

SHAPE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "rope_theta": 10_000.0, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    "eos_token_id": None, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
SHAPE_3B = SHAPE | {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "rope_theta": 1_000_000.0, "max_position_embeddings": 8192,
}  # fmt: skip
# GB/s of the memory, by the device's name.
BANDWIDTH = {"H100": 3350, "H200": 4800, "A100": 2039, "L4": 300, "B200": 8000}
CUTS = (64, 16, 8)  # requests of a batch of transformers
SLOTS = 16  # of the engine, at most


def requests(workload: str) -> list[tuple[list[int], int]]:
    """(prompt, new tokens) of every request."""
    import numpy as np

    rng = np.random.default_rng(0)
    if workload == "even":
        sizes = [(64, 128)] * 8
    else:
        answers = np.clip(rng.lognormal(np.log(40), 1.1, 64).astype(int), 4, 512)
        answers[answers.argmax()] = 512
        sizes = list(zip(rng.integers(16, 257, 64).tolist(), answers.tolist(), strict=True))
    return [(rng.integers(1, SHAPE["vocab_size"], prompt).tolist(), new) for prompt, new in sizes]


def run_bmjax(workload: str, clock: Callable[[], float]) -> dict:
    """Seconds of a run of all requests, on one device that uses all cores, as `bmjax.generate` does."""
    from bmjax.parallel.start import keep_compiled_programs

    keep_compiled_programs()
    from bmjax.generate.engine import Engine
    from bmjax.generate.requests import Request, Sampling
    from bmjax.model import qwen2
    from bmjax.model.config import ModelConfig

    config = ModelConfig.from_hf({"model_type": "qwen2", **SHAPE})
    wanted, params = requests(workload), qwen2.init(config, 0)

    def once() -> float:
        engine = Engine(config, params, (), slots=min(SLOTS, len(wanted)))  # a new one: no prompt is in its cache
        count = 0

        def on_tokens(tokens, reason) -> None:
            nonlocal count
            count += len(tokens)

        began = clock()
        for prompt, new in wanted:
            engine.submit(Request(tuple(prompt), Sampling(new, ignore_end=True)), on_tokens)
        engine.run()
        assert count == sum(new for _, new in wanted)
        return clock() - began

    once()
    return {"seconds": min(once() for _ in range(3)), "way": f"{min(SLOTS, len(wanted))} slots"}


def run_transformers(workload: str, clock: Callable[[], float]) -> dict:
    """Seconds of a run of all requests, the best way to cut them into batches."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen2", **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    wanted = sorted(requests(workload), key=lambda request: len(request[0]))

    class Lengths(transformers.StoppingCriteria):
        def __init__(self, prompt: int, limits: list[int]) -> None:
            self.ends = prompt + torch.tensor(limits)

        def __call__(self, ids, scores, **options):
            return ids.shape[1] >= self.ends

    def once(cut: int) -> float:
        began = clock()
        for start in range(0, len(wanted), cut):
            batch = wanted[start : start + cut]
            longest, limits = max(len(prompt) for prompt, _ in batch), [new for _, new in batch]
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=max(limits), do_sample=False,
                stopping_criteria=[Lengths(longest, limits)],
            )  # fmt: skip
            assert out.shape[1] == longest + max(limits)
        return clock() - began

    with torch.no_grad():
        cuts = [cut for cut in CUTS if cut <= len(wanted)]
        once(cuts[-1])
        seconds, cut = min((min(once(cut) for _ in range(2)), cut) for cut in cuts)
    return {"seconds": seconds, "way": f"batches of {cut}"}


def run_gpu() -> int:
    """Print tokens/s of a 3B shape in bfloat16: one row, as share of the memory's bandwidth, and 64 rows at 4k."""
    from bmjax.parallel.start import use_gpu_memory

    use_gpu_memory()
    import jax
    import jax.numpy as jnp

    from bmjax.generate.engine import Engine
    from bmjax.generate.requests import Request, Sampling
    from bmjax.model import qwen2, spec
    from bmjax.model.config import ModelConfig

    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit("--gpu: there is no GPU here")
    config = ModelConfig.from_hf({"model_type": "qwen2", **SHAPE_3B})
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), qwen2.init(config, 0))
    engine = Engine(config, params, (), dtype=jnp.bfloat16, slots=64, tokens_per_call=32)
    del params
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in device.device_kind), None)
    for rows, prompt, new in ((1, 128, 512), (64, 3968, 128)):

        def once(new: int, rows: int = rows, prompt: int = prompt) -> float:
            began = time.perf_counter()
            for row in range(rows):
                tokens = tuple(1 + (row * 31 + i) % 1000 for i in range(prompt))
                engine.submit(Request(tokens, Sampling(new, ignore_end=True)), lambda tokens, reason: None)
            engine.run()
            return time.perf_counter() - began

        once(new)
        # What the prompts take is the difference of two runs.
        seconds = once(new) - once(32)
        speed = rows * (new - 32) / seconds
        read = 2 * spec.count(config) * speed / rows / 1e9
        share = f", {read / bandwidth:.0%} of the memory's bandwidth for the weights" if bandwidth and rows == 1 else ""
        print(f"{device.device_kind}: 3B bfloat16, {rows} rows from {prompt} tokens: {speed:,.0f} tokens/s{share}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs, in turn; the best one counts")
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU's seconds, with one thread a side")
    parser.add_argument("--gpu", action="store_true", help="measure a 3B shape on a GPU instead; bmjax alone")
    parser.add_argument("--workload", choices=("even", "mixed"), help="this one alone")
    parser.add_argument("--side", choices=RUN, help="measure this one alone, and print JSON")
    arguments = parser.parse_args()
    if arguments.gpu:
        return run_gpu()
    if arguments.side:
        result = RUN[arguments.side](arguments.workload, time.process_time if arguments.cpu_time else time.perf_counter)
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return 0
    for workload in [arguments.workload] if arguments.workload else ["even", "mixed"]:
        results: dict[str, list[dict]] = {side: [] for side in RUN}
        for _ in range(arguments.rounds):
            for side in RUN:
                command = [sys.executable, *sys.argv, "--workload", workload, "--side", side]
                threads = {"OMP_NUM_THREADS": "1", "NPROC": "1"} if arguments.cpu_time else {}
                out = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
                if out.returncode:
                    sys.exit(f"{side} failed:\n{out.stderr[-2000:]}")
                results[side].append(json.loads(out.stdout.strip().splitlines()[-1]))
        best = {side: min(runs, key=lambda run: run["seconds"]) for side, runs in results.items()}
        wanted = requests(workload)
        tokens = sum(new for _, new in wanted)
        cores = "CPU time of one thread" if arguments.cpu_time else f"{os.cpu_count()} cores"
        print(f"{workload}: {len(wanted)} requests, {tokens:,} new tokens, {cores}")
        for side, run in best.items():
            speed = tokens / run["seconds"]
            print(f"  {side:<13}{speed:9,.0f} tokens/s   peak {run['peak_mib']:6,.0f} MiB   {run['way']}")
        print(f"  ratio        {best['transformers']['seconds'] / best['bmjax']['seconds']:9.2f}x")
    return 0


RUN = {"transformers": run_transformers, "bmjax": run_bmjax}


if __name__ == "__main__":
    sys.exit(main())
