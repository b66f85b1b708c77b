#!/usr/bin/env python
"""Speed of the judges of mathematics: `scripts/bench_judges.py [--data FILE] [--checks N]`.

Symbolic checks a second of the judges, called from as many threads as there are cores, beside math-verify in
one process, on the same checks: MATH-500's references that are no plain number against themselves, rewritten and
changed by one. Checks are shuffled; none is asked twice. Start-up of the workers is not counted on either side.
"""

import argparse
import json
import logging
import os
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Check = tuple[str, str, bool]  # reference, answer, whether it is right


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/math500/test.jsonl", help="MATH-500 as JSON Lines")
    parser.add_argument("--checks", type=int, default=1500)
    parser.add_argument("--peer-checks", type=int, default=300, help="checks of math-verify, which is slower")
    judges(parser.parse_args())


def judges(options: argparse.Namespace) -> None:
    """Print checks a second of the judges and of math-verify, and how many verdicts of each are as they should be."""
    from bmjax.teach.judges import symbolic
    from bmjax.teach.judges.judge import judge

    checks = symbolic_checks(Path(options.data))[: options.checks]
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda number: symbolic.equal(f"x+{number}", f"${number}+x$"), range(threads)))
        begun = time.perf_counter()
        verdicts = list(pool.map(lambda check: judge(check[0], check[1], "math"), checks))
        ours = len(checks) / (time.perf_counter() - begun)
    agreed = sum((verdict.verdict == "right") == check[2] for verdict, check in zip(verdicts, checks, strict=True))
    by = ", ".join(f"{name} {count}" for name, count in Counter(verdict.judge for verdict in verdicts).most_common())
    disagreed = sum(bool(verdict.disagreement) for verdict in verdicts)
    print(
        f"judges       {ours:8.1f} checks/s  {agreed} of {len(checks)} as labelled  ({by}; {disagreed} disagreements)"
    )

    checks = checks[: options.peer_checks]
    begun = time.perf_counter()
    peer_agreed = sum(math_verify(reference, answer) == right for reference, answer, right in checks)
    peer = len(checks) / (time.perf_counter() - begun)
    print(f"math-verify  {peer:8.1f} checks/s  {peer_agreed} of {len(checks)} as labelled  (one process)")
    print(f"ours / peer: {ours / peer:.1f}x")


def symbolic_checks(path: Path) -> list[Check]:
    """Make shuffled checks of the references that are no plain number, none of them twice."""
    rewritings = [
        lambda a: f"\\boxed{{{a}}}",
        lambda a: "The answer is ${}$.".format(a.replace("\\frac", "\\dfrac")),
        lambda a: "\\[\\boxed{{{}}}\\]".format(a.replace("\\left", "").replace("\\right", "")),
        lambda a: "\\boxed{{{}}}".format(re.sub(r"\\d?frac\{(\w+)\}\{(\w+)\}", r"\1/\2", a)),
        lambda a: "\\boxed{{{}}}".format(re.sub(r"\\sqrt\{(\d+)\}", r"\1^{1/2}", a)),
        lambda a: "\\boxed{{{}}}".format(a.replace("\\pi", "π").replace("\\infty", "∞").replace("^\\circ", "°")),
        lambda a: (
            "**Final answer:** ${}$".format(re.sub(r"^([\w^]+) ([+-]) (.*)$", r"\2\3+\1", a)) if "=" not in a else a
        ),
    ]
    checks: dict[tuple[str, str], bool] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)["answer"]
        numbers = list(re.finditer(r"\d+", answer))
        if re.fullmatch(r"-?[\d.,]+", answer) or not numbers or "text{(" in answer or re.match(r"\d\\frac", answer):
            continue
        last = numbers[0] if re.search(r"_\{?$", answer[: numbers[-1].start()]) else numbers[-1]
        wrong = f"{answer[: last.start()]}{int(last[0]) + 1}{answer[last.end() :]}"
        for rewrite in rewritings:
            checks[answer, rewrite(answer)] = True
            checks[answer, rewrite(wrong)] = False
    shuffled = [(reference, answer, right) for (reference, answer), right in checks.items()]
    random.Random(0).shuffle(shuffled)
    return shuffled


def math_verify(reference: str, answer: str) -> bool:
    """Ask math-verify itself, in this process."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    return bool(verify(parse(f"${reference}$"), parse(answer)))


if __name__ == "__main__":
    main()
