#!/usr/bin/env python
"""What bmjax and mergekit make of the same recipes: largest difference, or agreement in distribution.

    .venv/bin/python scripts/compare_mergekit.py [--work DIR --mergekit-env DIR --seeds 20]
    .venv/bin/python scripts/compare_mergekit.py --suite DIR [--work DIR --mergekit-env DIR]

Tiny float32 checkpoints, `dtype` and `out_dtype` float32: a base (rms 0.02) and three branches whose changes are normal
of rms 2e-4, as fine-tuning leaves them, or heavy-tailed (Student's t, 3 degrees of freedom) of rms 5e-3. The exit code
is 1 where a recipe without an explanation differs by more than 1e-5 of its tensor's rms, or the means, variances or
shares of changed entries of a random method do by more than 1%.

`--suite DIR`: the recipe-level tests of a checkout of mergekit, with `bmjax merge` in the place of its merge. The exit
code is 1 where one fails whose expectation is not known to be wrong.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_merge import HALF, SHAPES, WEIGHT, Case, make_mergekit, tensors, write_side_files

# The same file runs in mergekit's environment, where neither bmjax nor JAX is: they are imported where needed.

SHAPE = SHAPES["tiny"]
CHANGES = {"fine-tuned": (2e-4, math.inf), "heavy-tailed": (5e-3, 3.0)}
FLOAT32 = {"dtype": "float32", "out_dtype": "float32"}
TOLERANCE = 1e-5
STATISTICAL = 0.01


@dataclass(frozen=True)
class Row:
    """A recipe to compare, and why the results may differ on the checkpoints `where`."""

    label: str
    case: Case
    why: str = ""
    where: tuple[str, ...] = tuple(CHANGES)

    def explains(self, changes: str) -> bool:
        return bool(self.why) and changes in self.where


def case(method: str, each: dict[str, Any] | None = None, branches: int | None = None, base: bool = True,
         **shared: Any) -> Case:  # fmt: skip
    return Case(method, shared, each or {}, branches, base)


OPPOSED = {"weight": [0.5, -0.3, 0.2]}
FILTERED = [{"filter": "mlp", "value": 0.9}, {"filter": "self_attn", "value": [0.1, 0.5]}, {"value": 0.3}]
LERP = "mergekit takes the straight line where cos > 0.9995, as between fine-tunes; the arc differs by angle²/8"
UNIFORM = "mergekit's weights become uniform where the mean squares of the changes sum to less than 1e-6"
ROWS = "mergekit's nuslerp_row_wise takes columns (dim 0), and its absence rows"
ANGLES = "mergekit's float32 cosines cannot tell norms of angles below 3e-4 apart, and steps along the rounding"
NOISE = "mergekit's KL cancels in float32, so its mask is partly noise"
EXACT = (
    Row("linear", case("linear", WEIGHT, base=False)),
    Row("linear, normalize: false", case("linear", OPPOSED, base=False, normalize=False)),
    Row("linear, gradient and filters", case("linear", {"weight": [[0.0, 1.0], FILTERED, 0.5]}, base=False)),
    Row("slerp", case("slerp", branches=1, t=0.3), LERP, ("fine-tuned",)),
    Row("slerp, gradient", case("slerp", branches=1, t=[0.0, 0.5, 1.0, 0.25]), LERP, ("fine-tuned",)),
    Row("nuslerp", case("nuslerp", WEIGHT, branches=2)),
    Row("nuslerp without base", case("nuslerp", WEIGHT, branches=2, base=False)),
    Row("nuslerp, nuslerp_flatten: false", case("nuslerp", WEIGHT, branches=2, nuslerp_flatten=False), ROWS),
    Row("nuslerp, nuslerp_row_wise",
        case("nuslerp", WEIGHT, branches=2, nuslerp_flatten=False, nuslerp_row_wise=True), ROWS),
    Row("multislerp", case("multislerp", WEIGHT)),
    Row("multislerp without base", case("multislerp", WEIGHT, base=False)),
    Row("multislerp, normalize_weights: false", case("multislerp", WEIGHT, normalize_weights=False)),
    Row("karcher", case("karcher", base=False), ANGLES, ("fine-tuned",)),
    Row("task_arithmetic", case("task_arithmetic", WEIGHT)),
    Row("task_arithmetic, normalize, lambda 0.7", case("task_arithmetic", OPPOSED, normalize=True, **{"lambda": 0.7})),
    Row("ties", case("ties", HALF)),
    Row("ties, density 0.1, lambda 0.7", case("ties", {**WEIGHT, "density": 0.1}, **{"lambda": 0.7})),
    Row("ties, density 1", case("ties", WEIGHT)),
    Row("ties, negative weight", case("ties", {**OPPOSED, "density": 0.5})),
    Row("ties, normalize: false, rescale", case("ties", HALF, normalize=False, rescale=True)),
    Row("breadcrumbs", case("breadcrumbs", HALF)),
    Row("breadcrumbs, gamma 0", case("breadcrumbs", {**HALF, "gamma": 0.0})),
    Row("breadcrumbs, gamma 0.2", case("breadcrumbs", {**HALF, "gamma": 0.2})),
    Row("breadcrumbs, density 0.9, gamma 0.2", case("breadcrumbs", {**WEIGHT, "density": 0.9, "gamma": 0.2})),
    Row("breadcrumbs_ties", case("breadcrumbs_ties", HALF)),
    Row("breadcrumbs_ties, normalize, rescale", case("breadcrumbs_ties", HALF, normalize=True, rescale=True)),
    Row("sce", case("sce"), UNIFORM, ("fine-tuned",)),
    Row("sce, select_topk 0.1", case("sce", select_topk=0.1), UNIFORM, ("fine-tuned",)),
    Row("model_stock", case("model_stock")),
    Row("model_stock, filter_wise", case("model_stock", filter_wise=True)),
    Row("arcee_fusion", case("arcee_fusion", branches=1), NOISE),
    Row("nearswap", case("nearswap", branches=1, t=0.0003)),
    Row("ram", case("ram")),
    Row("ram, epsilon 2e-4", case("ram", epsilon=2e-4)),
    Row("ramplus_tl", case("ramplus_tl", epsilon=2e-4)),
    Row("passthrough", case("passthrough", branches=1, base=False)),
    Row("passthrough, scale", case("passthrough", {"scale": 0.5}, branches=1, base=False)),
)  # fmt: skip
L1 = "mergekit restores each tensor's L1 norm, bmjax divides by the density: the same to 1%"
OWN_L1 = "mergekit restores each tensor's L1 norm; the paper divides each entry by its own probability"
RANDOM = tuple(
    row
    for method, why, where in (
        ("dare_linear", L1, ()), ("dare_ties", L1, ()),
        ("della_linear", OWN_L1, tuple(CHANGES)), ("della", OWN_L1, tuple(CHANGES)),
    )
    for row in (
        Row(f"{method}, rescale: false", case(method, HALF, rescale=False)),
        Row(f"{method}, rescale: true", case(method, HALF, rescale=True), why, where),
    )
)  # fmt: skip


def make_models(folder: Path, rms: float, tail: float) -> None:
    """The base and its branches, float32. No two changes of a tensor have the same magnitude.

    Where the k-th magnitude stands twice, bmjax keeps both entries and mergekit one of them, which is no difference
    that is meant here.
    """
    import numpy as np

    from bmjax.io.atomic import replacing
    from bmjax.io.safetensors import SharedWriter

    random = np.random.default_rng(0)

    def change(size: int) -> np.ndarray:
        unit = random.standard_normal(size) if math.isinf(tail) else random.standard_t(tail, size)
        return (unit * (rms if math.isinf(tail) else rms * math.sqrt((tail - 2) / tail))).astype(np.float32)

    plan = [(name, np.dtype(np.float32), size) for name, size in tensors(SHAPE)]
    models: dict[str, dict[str, np.ndarray]] = {"base": {}}
    for name, _, size in plan:
        unit = random.standard_normal(math.prod(size), np.float32)
        models["base"][name] = 1 + 0.1 * unit if "norm" in name else 0.02 * unit
    for number in range(SHAPE.branches):
        branch = models.setdefault(f"branch{number + 1}", {})
        for name, base in models["base"].items():
            tensor, again = np.empty_like(base), np.arange(base.size)
            while again.size:
                tensor[again] = base[again] + change(again.size)
                _, first = np.unique(np.abs(tensor - base), return_index=True)
                again = np.setdiff1d(np.arange(base.size), first)
            branch[name] = tensor
    for model, arrays in models.items():
        with replacing(folder / model) as whole:
            with SharedWriter(whole, plan) as writer:
                for name, _, size in plan:
                    writer.write(name, 0, arrays[name].reshape(size))
            write_side_files(whole, SHAPE, "float32")


def run_theirs(jobs: list[dict[str, Any]]) -> None:
    """In mergekit's environment: every job's recipe as mergekit-yaml would run it, or OUT.error with its complaint."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    for job in jobs:
        try:
            options = MergeOptions(random_seed=job["seed"], quiet=True, write_model_card=False)
            run_merge(MergeConfiguration.model_validate(job["recipe"]), job["out"], options)
        except Exception as error:
            Path(job["out"] + ".error").write_text(f"{type(error).__name__}: {error}")


class Failure(Exception):
    """A tool did not merge: its own words."""


def read_theirs(out: Path) -> dict[str, Any]:
    """The tensors of a model directory, unless mergekit did not write it."""
    from bmjax.io.safetensors import open_checkpoint

    if (error := Path(f"{out}.error")).exists():
        raise Failure(f"mergekit: {error.read_text()[:100]}")
    checkpoint = open_checkpoint(out)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def run_ours(recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    """The tensors that bmjax makes of a recipe; it is written to `out`, over what is there."""
    from bmjax.calibrate.dispatch import merge
    from bmjax.config import UserError
    from bmjax.io.safetensors import open_checkpoint

    try:
        merge(recipe, out, overwrite=True)
    except UserError as error:
        raise Failure(f"bmjax: {str(error)[:100]}") from None
    checkpoint = open_checkpoint(out)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def known(row: Row) -> bool:
    """Whether this build of bmjax has the row's method."""
    from bmjax.merge.methods import METHODS

    return row.case.method in METHODS


def worst(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """The largest difference in units of its tensor's rms, and that tensor."""
    import numpy as np

    if ours.keys() != theirs.keys():
        raise Failure(f"tensors differ: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    off = {}
    for name, value in theirs.items():
        exact = value.astype(np.float64)
        off[name] = float(np.max(np.abs(ours[name] - exact)) / np.sqrt(np.mean(exact * exact)))
    # A NaN is the worst of all.
    name = max(off, key=lambda n: math.inf if math.isnan(off[n]) else off[n])
    return off[name], name


class Moments:
    """Statistics over seeds of what a random merge changed: share of entries, mean and variance.

    The mean is that along the full change sum(weight * change), as a multiple of it; the variance is summed over the
    entries, in units of the full change's square.
    """

    def __init__(self, base: Any, full: Any) -> None:
        self.base, self.full = base, full
        self.count, self.changed, self.total, self.squares = 0, 0.0, 0.0 * full, 0.0 * full

    def add(self, merged: Any) -> None:
        delta = merged - self.base
        self.count += 1
        self.changed += (delta != 0).mean()
        self.total += delta
        self.squares += delta * delta

    def numbers(self) -> tuple[float, float, float]:
        mean = self.total / self.count
        variance = (self.squares - self.count * mean * mean) / (self.count - 1)
        unit = (self.full * self.full).sum()
        return self.changed / self.count, float((mean * self.full).sum() / unit), float(variance.sum() / unit)


def _flat(model: dict[str, Any]) -> Any:
    import numpy as np

    return np.concatenate([model[name].astype(np.float64).ravel() for name, _ in tensors(SHAPE)])


def jobs_of(work: Path, seeds: int) -> Iterator[tuple[str, Row, dict[str, Any]]]:
    """Every merge of mergekit: the checkpoints' name, the row, and recipe, seed and output."""
    for changes in CHANGES:
        for i, row in enumerate(EXACT):
            recipe = row.case.recipe(work / changes, SHAPE.branches, **FLOAT32)
            yield changes, row, {"recipe": recipe, "seed": 0, "out": str(work / f"{changes}-{i}")}
    for i, row in enumerate(RANDOM):
        recipe = row.case.recipe(work / "fine-tuned", SHAPE.branches, **FLOAT32)
        for seed in range(seeds):
            yield "fine-tuned", row, {"recipe": recipe, "seed": seed, "out": str(work / f"random-{i}-{seed}")}


def compare_exact(row: Row, changes: str, job: dict[str, Any], ours: Path) -> tuple[str, bool]:
    """A cell of the first table, and whether it is a failure."""
    if not known(row):
        return "absent", False
    try:
        theirs = read_theirs(Path(job["out"]))
        off, name = worst(run_ours(job["recipe"], ours), theirs)
    except Failure as failure:
        return str(failure), True
    short = name.removeprefix("model.").removesuffix(".weight")
    bad = not off <= TOLERANCE
    return f"{off:.1e} ({short})", bad and not row.explains(changes)


def compare_random(row: Row, jobs: list[dict[str, Any]], models: Path, ours: Path) -> tuple[list[str], bool]:
    """The cells of the second table, bmjax / mergekit, and whether they fail."""
    if not known(row):
        return ["absent", "", ""], False
    base = _flat(read_theirs(models / "base"))
    branches = [_flat(read_theirs(models / f"branch{i + 1}")) for i in range(SHAPE.branches)]
    full = sum(w * (x - base) for w, x in zip(WEIGHT["weight"], branches, strict=True))
    of_ours, of_theirs = Moments(base, full), Moments(base, full)
    try:
        for job in jobs:
            of_theirs.add(_flat(read_theirs(Path(job["out"]))))
        for job in jobs:
            of_ours.add(_flat(run_ours({**job["recipe"], "seed": job["seed"]}, ours)))
    except Failure as failure:
        return [str(failure), "", ""], True
    pairs = list(zip(of_ours.numbers(), of_theirs.numbers(), strict=True))
    bad = any(not abs(a - b) <= STATISTICAL * abs(b) for a, b in pairs)
    return [f"{a:.4f} / {b:.4f}" for a, b in pairs], bad and not row.explains("fine-tuned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where mergekit's environment is kept (default: nowhere)")
    parser.add_argument("--mergekit-env", type=Path, metavar="DIR",
                        help="mergekit's environment, made if need be (default: WORK/mergekit)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=20, help="merges of each random method")
    parser.add_argument("--suite", type=Path, metavar="DIR", help="a checkout of mergekit, whose tests are run instead")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.theirs:
        run_theirs(json.loads(arguments.theirs.read_text()))
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        environment = (arguments.mergekit_env or (arguments.work or work) / "mergekit").resolve()
        programs = make_mergekit(environment)
        if arguments.suite:
            return run_suite(arguments.suite.resolve(), programs / "python", work)
        for name, (rms, tail) in CHANGES.items():
            make_models(work / name, rms, tail)
        jobs = list(jobs_of(work, arguments.seeds))
        (work / "jobs.json").write_text(json.dumps([job for _, _, job in jobs]))
        print(f"mergekit: {len(jobs)} merges", file=sys.stderr)
        command = [str(programs / "python"), __file__, "--theirs", str(work / "jobs.json")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print("bmjax: the same", file=sys.stderr)
        return report(jobs, work)


SUITE = ("test_basic_merges.py", "test_tokenizer.py")
# Tests of mergekit whose expectation is not bmjax's, and why.
CLASS_NAMES = "expects the class's names of tensors; the result keeps the files', which transformers wrote and reads"
VISION_TESTS = ("linear", "slerp", "task_arithmetic", "breadcrumbs", "ties", "dare_ties", "model_stock",
                "model_stock_filterwise")  # fmt: skip
OTHER_EXPECTATIONS = {
    "test_nuslerp_merges": "expects weights that sum to 0 to mean halves; bmjax refuses them, as they give no share",
    "test_mismatched_vocabulary_requires_alignment": "expects a refusal; bmjax keeps the base's rows and says so",
    "test_nuslerp_VLM_merges": CLASS_NAMES,
    **{f"test_{method}_VLM_merge": CLASS_NAMES for method in VISION_TESTS},
}


def run_suite(checkout: Path, python: Path, work: Path) -> int:
    """Run mergekit's recipe-level tests with bmjax and print what each came to; 1 for a failure without a reason."""
    results = work / "suite.xml"
    scripts, environment = Path(__file__).parent, dict(os.environ)
    environment["BMJAX_PYTHON"] = sys.executable
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(scripts), str(checkout), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if subprocess.run([str(python), "-c", "import pytest"], env=environment, capture_output=True).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "pytest"], check=True)
    files = [str(checkout / "tests" / name) for name in SUITE]
    command = [str(python), "-m", "pytest", "-q", "-p", "mergekit_suite", f"--junitxml={results}", *files]
    subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.DEVNULL, check=False)
    if not results.is_file():
        raise SystemExit(f"{checkout}: pytest wrote no results; are its tests and pytest there?")
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    faults = [(case.get("name", ""), fault) for case in cases for kind in ("failure", "error")
              for fault in case.findall(kind)]  # fmt: skip
    for name, fault in faults:
        message = (fault.get("message") or "").partition("\n")[0][:300]
        print(f"{name}: {OTHER_EXPECTATIONS.get(name, 'FAILS')}: {message}")
    unexplained = [name for name, _ in faults if name not in OTHER_EXPECTATIONS]
    print(f"{len(cases)} tests: {len(cases) - len(faults)} pass, {len(unexplained)} others fail without a reason")
    return int(bool(unexplained) or not cases)


def report(jobs: list[tuple[str, Row, dict[str, Any]]], work: Path) -> int:
    """Prints both tables; 1 when a difference has no explanation."""
    failed, ours = False, work / "ours"
    print("Largest difference, in units of its tensor's rms:\n")
    print(f"| recipe | {' | '.join(f'changes {name}' for name in CHANGES)} | |")
    print("|---" * (len(CHANGES) + 2) + "|")
    for row in EXACT:
        cells = []
        for changes in CHANGES:
            job = next(job for name, at, job in jobs if at is row and name == changes)
            cell, bad = compare_exact(row, changes, job, ours)
            cells.append(f"**{cell}**" if bad else cell)
            failed |= bad
        print(f"| {row.label} | {' | '.join(cells)} | {row.why} |", flush=True)
    print("\nOver seeds, bmjax / mergekit; mean and variance in units of the full change and its square:\n")
    print("| recipe | share of entries changed | mean | variance | |\n|---|---|---|---|---|")
    for row in RANDOM:
        cells, bad = compare_random(row, [job for _, at, job in jobs if at is row], work / "fine-tuned", ours)
        cells = [f"**{cell}**" if bad and cell else cell for cell in cells]
        failed |= bad
        print(f"| {row.label} | {' | '.join(cells)} | {row.why} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
