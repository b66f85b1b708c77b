#!/usr/bin/env python
"""Measures the phase of traces: `scripts/bench_select.py select decontaminate`.

select        makes traces like those of a reasoning model (--gigabytes) and selects them with all rules: MB/s, memory
decontaminate which share of the labelled leaks of MATH-500 is met, against the prompts that are flagged (--data)
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bmjax.teach.contamination.matcher import ALL, Matcher
from bmjax.teach.contamination.words import tokenize
from bmjax.teach.select import select
from bmjax.teach.settings import SelectSettings

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_WORDS = """so we have to find the value let me think about this again wait if then because since therefore the sum of
all terms is equal to that means we can write number function square root positive integer check case first second
substitute expand factor triangle angle circle probability prime modulo remainder sequence recurrence bound hence
thus but actually hmm okay maybe another way would be consider suppose given show compute simplify"""
_POOL = _WORDS.split()


def make_traces(path: Path, size: int, seed: int = 0) -> None:
    """Write traces of about 30 kB each, four samples a prompt, until the file has `size` bytes."""
    chance = random.Random(seed)

    def sentence() -> str:
        words = " ".join(chance.choice(_POOL) for _ in range(chance.randint(6, 22)))
        if chance.random() < 0.5:
            a, b, c = (chance.randint(1, 999) for _ in range(3))
            words += chance.choice((
                f" $x^2 + {a}x = {b}$", f" \\( \\frac{{{a}}}{{{b}}} \\)", f" {a} * {b} = {a * b}", f" f({a}) = {c}",
                f" {a} ≡ {c} (mod {b})", f" √{a} ≈ {a**0.5:.3f}",
            ))  # fmt: skip
        return words.capitalize() + chance.choice((". ", ". ", ".\n\n", ", "))

    # Sentences are drawn from a pool: making each anew would take longer than selecting it.
    pool = [sentence() for _ in range(200_000)]
    with path.open("w", encoding="utf-8") as file:
        number = written = 0
        while written < size:
            prompt = f"Problem {number // 4}: " + "".join(chance.choices(pool, k=4))
            reasoning = "".join(chance.choices(pool, k=chance.randint(60, 620)))
            row = {
                "id": f"{chance.getrandbits(256):064x}", "domain": "math", "prompt": prompt, "reference": "42",
                "reasoning": reasoning, "response": "".join(chance.choices(pool, k=10)) + "\\boxed{42}",
                "source": f"set{number % 7}", "finish_reason": "stop" if number % 20 else "length",
                "teacher": {"model": "teacher"}, "usage": {"completion_tokens": len(reasoning) // 4},
                "verdict": "right" if number % 5 else "wrong", "verdict_by": "math-verify",
            }  # fmt: skip
            written += file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1


def bench_select(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        traces = Path(name) / "traces.jsonl"
        make_traces(traces, int(arguments.gigabytes * 1e9))
        rules: dict[str, Any] = {
            "max_tokens": 16384, "languages": ["en"], "max_repetition": 0.5, "near_duplicates": 0.8, "per_prompt": 2,
            "prefer": "most_agreed", "pass_rate": [0.0, 1.0], "per_source": 1_000_000,
        }  # fmt: skip
        benchmark = arguments.data / "math500" / "test.jsonl"
        cases = {"defaults": {}, "all rules": rules}
        if benchmark.exists():
            cases["all rules, decontaminated"] = rules | {"decontaminate": [str(benchmark)]}
        size = traces.stat().st_size / 1e6
        for label, options in cases.items():
            output = Path(name) / "out"
            settings = SelectSettings.read({"traces": str(traces), "output": str(output), **options})
            wall, cpu = time.perf_counter(), time.process_time()
            table = select(settings)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"select, {label}: {size:,.0f} MB, {sum(table['math'].values()):,} traces, {table['math']['kept']:,} "
                f"kept: {size / wall:.1f} MB/s, {size / cpu:.1f} MB/s of CPU time, peak {peak:,.0f} MiB",
                flush=True,
            )


def flags(questions: list[str], prompts: list[str], run: int, share: float) -> set[str]:
    """Return the prompts that are flagged as decontamination does it."""
    flagged: set[str] = set()
    distinct = sorted(set(prompts))
    batches = [distinct[start : start + 256] for start in range(0, len(distinct), 256)]
    parts = Matcher(questions, part=3, share=share, fuzzy=True)
    runs = Matcher(questions, run=run, run_kinds=ALL, latex=False, shortest=2**31)
    for matcher in (parts, runs):
        for batch in batches:
            matcher.count(tokenize(batch, matcher.latex))
        for batch in batches:
            flagged |= {batch[number] for number in matcher.hits(tokenize(batch, matcher.latex))}
    return flagged


def plain_ngrams(questions: list[str], prompts: list[str], size: int = 8) -> set[str]:
    """Return the prompts that share plain words in a row with a question, as many published filters do it."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return set(zip(*(words[start:] for start in range(size)), strict=False))

    known = set().union(*map(grams, questions))
    return {prompt for prompt in set(prompts) if not known.isdisjoint(grams(prompt))}


def bench_decontaminate(arguments: argparse.Namespace) -> None:
    def column(path: str, name: str) -> list[str]:
        text = (arguments.data / path).read_text(encoding="utf-8")
        rows = json.loads(text) if path.endswith(".json") else map(json.loads, text.splitlines())
        return [row[name] for row in rows]

    questions = column("math500/test.jsonl", "problem")
    sets = {
        "OpenThoughts lexical": column("contamination/openthoughts_c_lex.jsonl", "train_problem"),
        "s1K lexical": column("contamination/s1_c_lex.jsonl", "train_problem"),
        "OpenThoughts semantic": column("contamination/openthoughts_c_sem.jsonl", "train_problem"),
        "math_train flagged": column("math_train/rllm_data_train_math_math.json", "problem"),
        "gsm8k flagged": column("gsm8k/train.jsonl", "question"),
    }
    print(f"{'':24}" + "".join(f"{f'{name} ({len(rows)})':>30}" for name, rows in sets.items()))

    def line(label: str, flagged: dict[str, set[str]]) -> None:
        counts = {name: sum(prompt in flagged[name] for prompt in rows) for name, rows in sets.items()}
        print(f"{label:24}" + "".join(f"{count:>30}" for count in counts.values()), flush=True)

    line("plain words, 8 in a row", {name: plain_ngrams(questions, rows) for name, rows in sets.items()})
    for run, share in ((20, 0.95), (16, 0.9), (14, 0.85), (13, 0.8), (12, 0.75), (10, 0.7)):
        mark = " *" if (run, share) == (13, 0.8) else ""
        line(
            f"run {run}, part {share}{mark}", {name: flags(questions, rows, run, share) for name, rows in sets.items()}
        )
    print("* the default of `decontaminate`")


PARTS = {"select": bench_select, "decontaminate": bench_decontaminate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of traces to select (0.5)")
    parser.add_argument("--directory", help="where they are written; by default that of temporary files")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of benchmarks ({DATA})")
    arguments = parser.parse_args()
    for part in arguments.parts or PARTS:
        if part not in PARTS:
            sys.exit(f"bench_select.py: no part '{part}'; there are {', '.join(PARTS)}")
        PARTS[part](arguments)


if __name__ == "__main__":
    main()
