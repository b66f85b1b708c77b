#!/usr/bin/env python
"""Time and memory of tokenizing traces at the paper's size, beside `datasets.map` with the same tokenizer alone.

    scripts/bench_data.py --tokenizer DIR --texts FILE.jsonl [...] [--tokens 350e6] [--work DIR] [--limit-gib 4]

Traces are made of the texts of FILEs (any JSON Lines; all their strings), with lengths as reasoning traces have them:
log-normal, with a median of 4,000 tokens and a heavy tail. Each side runs in a process of its own, one after the other,
with at most --limit-gib of data memory. The peer maps the tokenizer over the joined texts in two processes, as a user
would. Ours reads rows, renders the template, masks and writes a cache; a second start then gives the first batch.
Printed: tokens a second, peak memory, the ratio, and the seconds until the first batch.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TEMPLATE = "chatml"


def main() -> None:
    """Make the traces, run both sides, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="directory of a tokenizer")
    parser.add_argument(
        "--texts", nargs="+", required=True, help="JSON Lines files whose strings the traces are made of"
    )
    parser.add_argument("--tokens", type=float, default=350e6)
    parser.add_argument("--work", default="runs/bench_data")
    parser.add_argument("--limit-gib", type=float, default=4.0)
    parser.add_argument("--side", choices=("peer", "ours", "again"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = Path(options.work)
    if options.side:
        limit = int(options.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        {"peer": peer, "ours": ours, "again": again}[options.side](work, options.tokenizer)
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_traces(work / "traces.jsonl", options.texts, options.tokens)
    results = {side: run(side, options) for side in ("peer", "ours", "again")}
    for side, result in results.items():
        print(f"{side:6}", *(f"{key} {value:,.1f}" for key, value in result.items()), sep="  ")
    print(f"ours / peer: {results['ours']['tokens_per_second'] / results['peer']['tokens_per_second']:.2f}x")


def make_traces(path: Path, files: list[str], tokens: float) -> None:
    """Write rows of prompt, reasoning and response until they hold about so many tokens (3.2 characters each)."""
    texts = [
        value
        for file in files
        for line in Path(file).read_text(encoding="utf-8").splitlines()
        for value in json.loads(line).values()
        if isinstance(value, str) and len(value) > 20
    ]
    rng, written = np.random.default_rng(0), 0
    with path.open("w", encoding="utf-8") as out:
        while written < tokens * 3.2:
            length, pieces = int(min(rng.lognormal(np.log(4000), 0.8), 16_000) * 3.2), []
            while sum(map(len, pieces)) < length:
                pieces.append(texts[rng.integers(len(texts))])
            row = {"prompt": pieces[0], "reasoning": "\n\n".join(pieces)[:length], "response": pieces[-1]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += length


def run(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one side in a process of its own; its last line is its result."""
    command = [sys.executable, __file__, "--side", side, "--tokenizer", options.tokenizer, "--texts", "-",
               "--work", options.work, "--limit-gib", str(options.limit_gib)]  # fmt: skip
    cache = str(Path(options.work).resolve() / "cache")
    environment = {**os.environ, "BMJAX_CACHE": cache, "HF_HOME": cache, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


def report(tokens: int, seconds: float, **more: float) -> None:
    """Print a result: tokens a second, and the peak memory of this process and its children."""
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    print(
        json.dumps(
            {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_mib": peak} | more
        )
    )


def peer(work: Path, tokenizer_directory: str) -> None:
    """`datasets.map` with the tokenizer alone, over the text of each row."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    rows = datasets.load_dataset("json", data_files=str(work / "traces.jsonl"), split="train")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [a + b + c for a, b, c in zip(batch["prompt"], batch["reasoning"], batch["response"], strict=True)]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    began = time.monotonic()
    mapped = rows.map(tokenize, batched=True, batch_size=100, num_proc=2, remove_columns=rows.column_names)
    seconds = time.monotonic() - began
    report(sum(len(ids) for batch in mapped.with_format("numpy").iter(1000) for ids in batch["input_ids"]), seconds)


def load(work: Path, tokenizer_directory: str):
    """Our documents of the traces, from the cache where there is one."""
    from bmjax.branch import cache
    from bmjax.branch.examples import Encoding
    from bmjax.chat.template import named_template
    from bmjax.weights.tokenizer import load_tokenizer

    encoding = Encoding(load_tokenizer(tokenizer_directory), named_template(TEMPLATE), 16_384)
    return cache.load(str(work / "traces.jsonl"), {}, encoding, lambda line: print(line, file=sys.stderr))


def ours(work: Path, tokenizer_directory: str) -> None:
    """Rows to a cache of tokens and masks."""
    began = time.monotonic()
    data = load(work, tokenizer_directory)
    report(data.tokens, time.monotonic() - began)


def again(work: Path, tokenizer_directory: str) -> None:
    """A second start: the seconds until the first packed batch is in memory."""
    began = time.monotonic()
    from bmjax.branch.loader import Loader

    data = load(work, tokenizer_directory)
    Loader(data, 16_384, 96, True, True, 0).at(0)
    report(data.tokens, time.monotonic() - began)


if __name__ == "__main__":
    main()
