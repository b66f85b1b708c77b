#!/usr/bin/env python
"""Many streaming clients at once against `bmjax serve`, which runs in a process of its own.

    scripts/bench_serve.py MODEL [--clients 200] [--seconds 120] [--slots 64] [key=value ...]

Every client asks one of 64 chats, each with a seed, over and over, and reads the answer as a stream. The answers were
asked one by one before: in float32 an answer depends on its prompt and seed alone, so that another text is a crossed
answer, and a stream that ends without a finish reason a lost one. Printed: both counts, answers and tokens a second,
times to the first text and to the end, and the server's memory in each quarter of the time. Exit code 1 where an
answer was lost or crossed.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

CHATS, LONGEST = 64, 96


@dataclass
class Outcome:
    """What all clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0


def main() -> int:
    """Run the server and its clients; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory or hub id")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of bmjax serve: mesh.data=-1 for all devices")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--slots", type=int, default=64)
    options = parser.parse_intermixed_args()  # key=value may follow options
    command = [sys.executable, "-m", "bmjax", "serve", options.model, "--port", "0", f"slots={options.slots}",
               "name=model", *options.settings]  # fmt: skip
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="")
        if match := re.search(r"serving at (http\S+?),? ", line):
            break
    else:
        return 1
    threading.Thread(target=lambda: sys.stderr.writelines(server.stderr), daemon=True).start()
    try:
        return asyncio.run(measure(match[1], server.pid, options))
    finally:
        server.terminate()
        server.wait()


def body(number: int) -> dict:
    """The request of a chat."""
    turn = {"role": "user", "content": f"Question {number}: what is {number} + {number * 7 % 100}?"}
    return {"model": "model", "messages": [turn], "seed": number, "temperature": 1.0, "stream": True,
            "max_tokens": LONGEST - number % 64, "stream_options": {"include_usage": True},
            "ignore_eos": True}  # fmt: skip


async def read_stream(client: httpx.AsyncClient, url: str, number: int) -> tuple[str, str | None, float, int]:
    """Ask a chat; return its text, finish reason, seconds to the first text, and tokens."""
    began, first, text, reason, tokens = time.monotonic(), 0.0, [], None, 0
    async with client.stream("POST", f"{url}/chat/completions", json=body(number)) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                delta = choice["delta"].get("content") or choice["delta"].get("reasoning_content") or ""
                if delta and not first:
                    first = time.monotonic() - began
                text.append(delta)
                reason = choice["finish_reason"] or reason
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return "".join(text), reason, first, tokens


def memory(pid: int) -> float:
    """The resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def measure(url: str, pid: int, options: argparse.Namespace) -> int:
    """Ask as all clients do and print what came; return 1 where an answer was lost or crossed."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(timeout=600.0, limits=limits) as client:
        expected = [(await read_stream(client, url, number))[0] for number in range(CHATS)]
        assert len(set(expected)) > CHATS // 2, "the model answers all chats alike; crossed answers would not show"
        # Once all at the same time, so that what is compiled for many rows is compiled before the clock starts.
        await asyncio.gather(*(read_stream(client, url, number % CHATS) for number in range(options.clients)))
        outcome, memories = Outcome(), []
        end = time.monotonic() + options.seconds

        async def converse(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                chat, began = rng.randrange(CHATS), time.monotonic()
                try:
                    text, reason, first, tokens = await read_stream(client, url, chat)
                except (httpx.HTTPError, ValueError) as error:
                    outcome.counts[f"failed: {type(error).__name__}"] += 1
                    continue
                outcome.counts["lost" if reason is None else "right" if text == expected[chat] else "crossed"] += 1
                outcome.tokens += tokens
                outcome.first.append(first)
                outcome.whole.append(time.monotonic() - began)

        async def watch() -> None:
            while time.monotonic() < end:
                memories.append(memory(pid))
                await asyncio.sleep(1)

        began = time.monotonic()
        await asyncio.gather(watch(), *(converse(number) for number in range(options.clients)))
        seconds = time.monotonic() - began
    print(f"{options.clients} clients, {options.slots} slots, {seconds:.0f} s: {dict(outcome.counts)}")
    print(f"{len(outcome.whole) / seconds:.1f} answers/s, {outcome.tokens / seconds:.0f} tokens/s")
    for name, values in (("first text", outcome.first), ("whole answer", outcome.whole)):
        cuts = statistics.quantiles(values, n=100)
        print(f"{name}: median {cuts[49]:.2f} s, 95 % {cuts[94]:.2f} s, 99 % {cuts[98]:.2f} s")
    cuts = [round(len(memories) * part / 4) for part in range(5)]
    quarters = [statistics.mean(memories[a:b] or memories) for a, b in itertools.pairwise(cuts)]
    print(f"memory by quarters of the time: {', '.join(f'{size:.0f}' for size in quarters)} MiB")
    return int(sum(outcome.counts.values()) != outcome.counts["right"])


if __name__ == "__main__":
    sys.exit(main())
