#!/usr/bin/env python
"""How fast traces are collected, and a collection re-opened.

    scripts/bench_collect.py collect resume [--samples 6000] [--present 1000000]

collect: samples a second from a server that answers at once, in a process of its own, 64 requests in flight.
resume: seconds and peak memory to re-open a million samples and see that none is missing: without the index of ids,
and with it.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONCURRENCY = 64


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["collect", "resume"])
    parser.add_argument("--samples", type=int, default=6000, help="answers to collect")
    parser.add_argument("--present", type=int, default=1_000_000, help="samples that are there already")
    options = parser.parse_args()
    if "collect" in options.parts:
        collect(options.samples)
    if "resume" in options.parts:
        resume(options.present)


def collect(samples: int) -> None:
    """Print samples a second, whole and streamed."""
    spawn = multiprocessing.get_context("spawn")
    for stream in (False, True):
        here, there = spawn.Pipe()
        server = spawn.Process(target=_serve, args=(there,), daemon=True)
        server.start()
        url = here.recv()
        with tempfile.TemporaryDirectory() as folder:
            _write_problems(Path(folder), samples)
            begun = time.monotonic()
            counts = _collect(Path(folder), url, stream=stream)
            seconds = time.monotonic() - begun
        server.terminate()
        assert counts["right"] == samples
        name = "streamed" if stream else "whole"
        print(f"collect, {name}: {samples / seconds:.0f} samples/s at {CONCURRENCY} requests at once")


def resume(present: int) -> None:
    """Print seconds and peak memory of a collection that has nothing to ask."""
    from bmjax.teach.asking import sampling_parameters
    from bmjax.teach.record import record_id
    from bmjax.teach.settings import TeacherSettings

    sampling = sampling_parameters(TeacherSettings())
    with tempfile.TemporaryDirectory() as folder:
        _write_problems(Path(folder), present)
        output = Path(folder, "out")
        output.mkdir()
        with (output / "traces.jsonl").open("w") as file:
            for number in range(present):
                prompt = _question(number)
                row = {"id": record_id("math", prompt, "m", sampling, 0), "domain": "math", "prompt": prompt}
                row |= {"reasoning": "r" * 1500, "response": str(number), "reference": str(number), "verdict": "right"}
                file.write(json.dumps(row) + "\n")
        size = (output / "traces.jsonl").stat().st_size
        spawn = multiprocessing.get_context("spawn")
        for name in ("no index", "index"):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_reopen, args=(folder, there))
            process.start()
            seconds, memory, counts = here.recv()
            process.join()
            assert counts["present"] == counts["wanted"] == present
            print(f"resume, {name}: {present} samples, {size / 1e9:.1f} GB: {seconds:.1f} s, {memory:.0f} MiB")


def _reopen(folder: str, results: Connection) -> None:
    begun = time.monotonic()
    counts = _collect(Path(folder), "http://127.0.0.1:9/v1")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    results.send((time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, counts))


def _collect(folder: Path, url: str, **teacher: Any) -> dict[str, int]:
    import bmjax

    model = {"base_url": url, "model": "m", "concurrency": CONCURRENCY, **teacher}
    source = {"problems": str(folder / "problems.jsonl"), "domain": "math", "output": str(folder / "out")}
    return bmjax.collect({**source, "teacher": model})


def _question(number: int) -> str:
    return f"A train leaves at {number} o'clock and travels {number % 97} miles an hour for {number % 13} hours. " * 3


def _write_problems(folder: Path, count: int) -> None:
    with (folder / "problems.jsonl").open("w") as file:
        for number in range(count):
            file.write(json.dumps({"question": _question(number), "answer": str(number)}) + "\n")


def _serve(address: Connection) -> None:
    """Answer every request at once with the number of its question, over a few lines of HTTP."""

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport, self.buffer = transport, b""

        def data_received(self, data: bytes) -> None:
            self.buffer += data
            head, mark, rest = self.buffer.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if not mark or len(rest) < length:
                return
            self.buffer = rest[length:]
            request = json.loads(rest[:length])
            number = request["messages"][-1]["content"].split()[4]
            usage = {"prompt_tokens": 60, "completion_tokens": 90}
            message = {"role": "assistant", "content": number, "reasoning_content": "so " * 80}
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()
            if request.get("stream"):
                deltas = [{"reasoning_content": "so "}] * 80 + [{"content": number}]
                events: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
                events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"usage": usage}]
                body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
                body += b"data: [DONE]\n\n"
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=512)
        address.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
