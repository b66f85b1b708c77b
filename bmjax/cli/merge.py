"""`python -m bmjax.merge RECIPE OUT [key=value ...]`, which is also `bmjax merge`."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from bmjax.calibrate import dispatch
from bmjax.config import DISK_ERRORS, UserError, describe, disk_error
from bmjax.merge.methods import METHODS
from bmjax.merge.plan.output import parse_size
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.merge.recipe.recipe import Recipe, read_recipe

_ABOUT = """\
Merge fine-tuned models of one architecture into one: reads Hugging Face directories (safetensors), writes one.

Arithmetic is float32 whatever the files hold, rounded once at the end; quantiles are exact; the same recipe gives the
same bytes. OUT appears when it is complete, beside it nothing does. OUT/merge_report.json tells per tensor and layer
what was kept of each model.
"""

_RECIPE = """\
a recipe (mergekit's YAML, as it stands):
  merge_method: arcee_fusion          # one of the methods below
  base_model: models/science          # changes are measured against it; gives config and tokenizer
  models:
    - models/math                     # a directory, a hub model org/name or org/name@revision
    - model: models/code              # the same with parameters of its own
      parameters: {weight: 0.5}
  parameters: {lambda: 1.0}           # of the method; of its models where they have none of their own
  dtype: bfloat16                     # default: as the base stores each tensor

a parameter's value is one for all tensors, or a list along the depth, or chosen by the tensors' names:
  weight: [0.2, 0.5, 1.0]             # first, middle and last layer, straight lines between
  weight:
    - {filter: self_attn, value: 0}   # the name contains this text
    - {regex: 'layers\\.[0-9]\\.', value: [0, 1]}
    - {value: 0.5}                    # every other tensor

layers from several places (parameters may stand in a source, a slice, or the recipe; the nearest one counts):
  slices:
    - sources: [{model: models/math, layer_range: [0, 24]}]
    - sources: [{model: models/code, layer_range: [8, 32]}]

several merges in a row, without writing those between (this is TinyR1's recipe):
  sources: {math: models/math, science: models/science, code: models/code}
  steps:                              # or several YAML documents with `name:`
    - {name: mid, merge_method: arcee_fusion, base_model: science, models: [math]}
    - {name: student, merge_method: arcee_fusion, base_model: code, models: [mid]}

more keys: seed (of random masks, 0), compat: mergekit (its arithmetic), tokenizer_source or tokenizer, chat_template

overrides: parameters.lambda=0.5   dtype=float32   sources.math=DIR   steps.mid.parameters.lambda=0.5
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _methods() -> str:
    lines = ["methods and their parameters (a * marks those given per model, or once for all):"]
    for method in METHODS.values():
        least, most = method.branches
        count = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
        base = "base_model and " if method.base == "required" else ""
        lines += ["", f"  {method.name}: {base}{count} model{'s' * (count != '1')}"]
        lines += [f"    {line}".rstrip() for line in method.summary.splitlines()]
        for p in method.parameters.values():
            default = "none" if p.default is None else str(p.default).lower()
            title = f"{p.name}{'*' if p.about.each else ''}: {default}"
            lines.append(f"      {title:<18} {p.expected}. {p.about.text[:1].upper()}{p.about.text[1:]}.")
    lines += ["", "  learned, regmean: base_model and 1 or more models, each with `data:` (rows of its domain)"]
    lines += [
        "    Merges that look at data: student = base + sum of coefficient * contribution, the coefficients learned",
        "    by gradient descent through the merge and the model. regmean: not learned, all 1. All in memory.",
    ]
    lines += [f"      {line}" for line in describe(CalibrationSettings)]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bmjax merge",
        description=_ABOUT,
        epilog=f"{_RECIPE}\n{_methods()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="the YAML file")
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty, is never an input")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change the recipe's keys")
    parser.add_argument(
        "--check", action="store_true", help="only say what would be read and written; headers are read"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model directory OUT once the merge is done")
    parser.add_argument("--seed", metavar="N", help="of random masks, in place of the recipe's")
    parser.add_argument("--memory", metavar="SIZE", help="of tensors in memory at a time: 512MiB, 2GiB")
    parser.add_argument("--shard-size", metavar="SIZE", default="5GB", help="of a file of the result (5GB)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 2 a mistake in the input, 130 interrupted."""
    try:
        _run(_parser().parse_intermixed_args(argv))
    except UserError as error:
        print(f"bmjax: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"bmjax: error: {UserError(disk_error(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bmjax: interrupted; OUT is as it was, and the same command goes on with the merge", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    seed = [] if options.seed is None else [f"seed={options.seed}"]
    recipe = read_recipe(options.recipe, [*options.overrides, *seed])
    settings: dict[str, Any] = {"shard_bytes": parse_size(options.shard_size, "--shard-size")}
    if options.memory is not None:
        settings["memory"] = parse_size(options.memory, "--memory")
    if options.check:
        for line in dispatch.check(recipe, options.out, options.overwrite, **settings):
            print(line)
    else:
        _merge(recipe, options, settings)


def _merge(recipe: Recipe, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    # Not needed, and slow to load, where a recipe is only checked or the help shown.
    from tqdm import tqdm

    from bmjax.merge.report.statistics import summary_lines
    from bmjax.parallel.start import keep_compiled_programs, use_cpu_cores, use_own_threads

    if recipe.is_calibrated:
        use_cpu_cores()
    else:
        use_own_threads()
        keep_compiled_programs()
    start, last = time.perf_counter(), 0
    bar = tqdm(unit="B", unit_scale=True, desc="merge", disable=options.quiet or not sys.stderr.isatty(), leave=False)

    def progress(done: int, total: int, name: str) -> None:
        nonlocal last
        bar.total = total
        bar.update(done - last)
        last = done

    def log(line: str) -> None:
        if not options.quiet:
            tqdm.write(f"bmjax: note: {line}", file=sys.stderr)

    with bar, warnings.catch_warnings():
        # What is not finite is said once, in words.
        warnings.simplefilter("ignore", RuntimeWarning)
        report = dispatch.merge(recipe, options.out, options.overwrite, log=log, progress=progress, **settings)
    if options.quiet:
        return
    for line in summary_lines(recipe, report):
        print(line)
    seconds = time.perf_counter() - start
    print(f"{options.out}: {len(report['tensors'])} tensors, {last / 1e9:.2f} GB read, {seconds:.1f} s")
