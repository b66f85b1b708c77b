#!/usr/bin/env python
"""How fast programs are judged: `scripts/bench_programs.py [--runs 200]`.

Runs of short programs a second through the judge, as many threads at once as there are cores, beside one
`subprocess` with a fresh Python for each and no limits at all.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="programs to run each way")
    programs(parser.parse_args().runs)


def programs(runs: int) -> None:
    """Print runs a second of programs on stdin and with asserts, and of plain subprocesses."""
    from bmjax.teach.judges.programs import judge

    source = "import sys, heapq\nprint(sum(map(int, sys.stdin.read().split())))"
    streams = {"tests": [{"input": "1 2 3", "output": "6"}]}
    asserts = {"tests": ["assert f(1) == 2", "assert f(2) == 3"]}

    def stream(_: int) -> bool:
        return judge(streams, f"```python\n{source}\n```").verdict == "right"

    def function(_: int) -> bool:
        return judge(asserts, "```python\nimport math\ndef f(x):\n    return x + 1\n```").verdict == "right"

    def plain(_: int) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "main.py")
            file.write_text(source)
            done = subprocess.run(
                [sys.executable, str(file)], input="1 2 3", capture_output=True, text=True, cwd=folder
            )
        return done.stdout == "6\n"

    print(f"programs: {runs} runs each, {CORES} at once")
    for name, run in (("plain subprocess", plain), ("judged, stdin", stream), ("judged, asserts", function)):
        print(f"  {name:18} {_rate(run, runs):7.1f} runs/s")


def _rate(run: Callable[[int], bool], runs: int) -> float:
    """Return calls a second of `run` in as many threads as there are cores, after one that starts what it needs."""
    assert run(0)
    begun = time.monotonic()
    with ThreadPoolExecutor(CORES) as pool:
        assert all(pool.map(run, range(runs)))
    return runs / (time.monotonic() - begun)


if __name__ == "__main__":
    main()
