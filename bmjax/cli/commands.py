"""The table of commands: what each is called, what it takes, and the few lines that hand it to its phase.

A new command is a row of COMMANDS, a function that calls the phase, and a text in help/. Phases are imported inside the
functions, so that a mistake in the arguments is told at once.
"""

import json
import time
import warnings
from argparse import Namespace
from typing import Any

from bmjax.cli.parser import Command, Option
from bmjax.errors import UserError
from bmjax.log import progress_bar, silent, write_line


def _use_machine() -> None:
    from bmjax.parallel.start import use_cpu_cores, use_gpu_memory

    use_cpu_cores()
    use_gpu_memory()


def _demo(options: Namespace) -> None:
    from bmjax.demo.run import run_demo

    _use_machine()
    run_demo(options.output, options.overrides)


def _demo_keys() -> str:
    from bmjax.config import describe
    from bmjax.demo.settings import DemoSettings

    return "\n".join(["keys, beside those of `bmjax run`:", *describe(DemoSettings)])


def _run(options: Namespace) -> None:
    from bmjax.pipeline.phases import run

    _use_machine()
    run(options.settings, options.output)


def _collect(options: Namespace) -> None:
    from bmjax.teach.collect import collect

    failed = collect(options.settings, write_line)["failed"]
    if failed:
        failures = f"{options.settings.output}/failures.jsonl"
        raise UserError(f"{failed} requests failed, see {failures}; the same command asks again")


def _select(options: Namespace) -> None:
    from bmjax.teach.select import render_table, select

    print(render_table(select(options.settings, write_line)))


def _train(options: Namespace) -> None:
    from bmjax.branch.train import describe, train

    _use_machine()
    if options.check:
        print(*describe(options.settings), sep="\n")
    else:
        train(options.settings)


def _cache(options: Namespace) -> None:
    from bmjax.branch.cache import caches, folder

    entries = caches()
    for cache in entries:
        age = f"used {(time.time() - cache.used) / 86400:.0f} days ago"
        removed = options.all or (options.clear and cache.is_dead)
        state = "removed" if removed else "its data changed or are gone" if cache.is_dead else "in use"
        print(f"{cache.path}: {cache.size / 1e9:.2f} GB of {', '.join(cache.data)}, {age}; {state}")
        if removed:
            cache.remove()
    if not entries:
        print(f"{folder()}: nothing is cached")


def _eval(options: Namespace) -> None:
    from bmjax.evaluate.run import evaluate, summary
    from bmjax.parallel.start import use_cpu_cores

    use_cpu_cores()
    for task, score in evaluate(options.settings).items():
        print(f"{task}: {summary(score)}")


def _plan(options: Namespace) -> None:
    from bmjax.plan import plan

    result = plan.plan_training(options.settings, options.topology, options.search, write_line)
    if options.json:
        print(json.dumps(result))
        return
    changes = result.get("overrides", {})
    for line in plan.lines(result, options.settings.model_copy(update=changes)):
        print(line)
    if changes:
        print("with", *(f"{key}={json.dumps(value)}" for key, value in changes.items()))


def _merge(options: Namespace) -> None:
    from bmjax.calibrate import dispatch
    from bmjax.merge.plan.output import parse_size
    from bmjax.merge.recipe.recipe import read_recipe

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    recipe = read_recipe(options.recipe, [*options.overrides, *seed])
    memory = None if options.memory is None else parse_size(options.memory, "--memory")
    sizes: dict[str, Any] = {"shard_bytes": parse_size(options.shard_size, "--shard-size"), "memory": memory}
    if options.check:
        for line in dispatch.check(recipe, options.out, options.overwrite, **sizes):
            print(line)
        return
    from bmjax.merge.report.statistics import summary_lines
    from bmjax.parallel.start import keep_compiled_programs, use_cpu_cores, use_own_threads

    if recipe.is_calibrated:
        use_cpu_cores()
    else:
        use_own_threads()
        keep_compiled_programs()
    start = time.perf_counter()
    bar = progress_bar("merge", "B", shown=not options.quiet)
    bytes_read = 0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal bytes_read
        bar.total = total
        bar.update(done - bytes_read)
        bytes_read = done

    log = silent if options.quiet else lambda line: write_line(f"bmjax: note: {line}")
    with bar, warnings.catch_warnings():
        # What is not finite is said once, in words.
        warnings.simplefilter("ignore", RuntimeWarning)
        report = dispatch.merge(recipe, options.out, options.overwrite, log=log, progress=progress, **sizes)
    if not options.quiet:
        for line in summary_lines(report):
            print(line)
        seconds = time.perf_counter() - start
        read = f"{bytes_read / 1e9:.2f} GB read, " if bytes_read else ""
        print(f"{options.out}: {len(report['tensors'])} tensors, {read}{seconds:.1f} s")


def _methods_text() -> str:
    from bmjax.config import describe
    from bmjax.merge.methods import METHODS
    from bmjax.merge.methods.method import WITHOUT_EFFECT
    from bmjax.merge.recipe.calibration import CALIBRATED, CalibrationSettings

    lines = ["methods and their parameters (a * marks those given per model, or once for all):"]
    lines += [f"  all accept {p.name}, which has no effect: {p.about.text}" for p in WITHOUT_EFFECT.values()]
    for method in METHODS.values():
        least, most = method.branches
        count = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
        base = "base_model and " if method.base == "required" else ""
        lines += ["", f"  {method.name}: {base}{count} model{'s' * (count != '1')}"]
        lines += [f"    {line}".rstrip() for line in method.summary.splitlines()]
        for p in method.parameters.values():
            default = p.default[0] if isinstance(p.default, tuple) else p.default  # one number for all models
            # A parameter that must be given has inspect's mark, a type.
            text = "(required)" if isinstance(default, type) else str(default).lower()
            title = f"{p.name}{'*' if p.about.per_model else ''}: {text}"
            lines.append(f"      {title:<18} {p.expected}. {p.about.text[:1].upper()}{p.about.text[1:]}.")
    lines += [
        "",
        f"  {', '.join(CALIBRATED)}: base_model and 1 or more models, each with `data:` (rows of its domain)",
        "    Merges that look at data: student = base + sum of coefficient * contribution, the coefficients learned",
        "    by gradient descent through the merge and the model. regmean: not learned, all 1. All in memory.",
        *(f"      {line}" for line in describe(CalibrationSettings)),
    ]
    return "\n".join(lines)


def _convert(options: Namespace) -> None:
    from bmjax.api import convert

    convert(options.src, options.dst, options.to)
    print(f"{options.dst}: written")


_MERGE_OPTIONS = (
    Option("--check", action="store_true", help="only say what would be read and written; headers are read"),
    Option("--overwrite", action="store_true", help="replace a model directory OUT once the merge is done"),
    Option("--seed", metavar="N", help="of random masks, in place of the recipe's"),
    Option("--memory", metavar="SIZE", help="of tensors in memory at a time: 512MiB, 2GiB"),
    Option("--shard-size", metavar="SIZE", default="5GB", help="of a file of the result (5GB)"),
    Option("--quiet", "-q", action="store_true", help="print nothing but errors"),
)
_TRAINING = "bmjax.branch.settings:TrainSettings"
_ROWS = (
    Command("demo", "the whole experiment in small, with problems and a teacher of its own; no config needed", _demo,
        words=(), details=_demo_keys,
        options=(Option("--output", metavar="DIR", help="directory of the run (runs/demo)"),)),
    Command("run", "the whole experiment: teacher, branches, merges, mixture, scores, report.html", _run,
        settings="bmjax.pipeline.settings:RunSettings",
        options=(Option("--output", metavar="DIR", help="directory of the run, in place of the config's `output`"),)),
    Command("collect", "ask a teacher (any OpenAI-compatible endpoint) for reasoning traces", _collect,
        settings="bmjax.teach.settings:CollectSettings"),
    Command("select", "keep the traces worth training on, and say why the others were dropped", _select,
        settings="bmjax.teach.settings:SelectSettings", stopped="stopped; the same command begins again"),
    Command("train", "fine-tune a student on a dataset (a branch, the mixture, a backbone)", _train,
        settings=_TRAINING,
        options=(Option("--check", action="store_true", help="say documents, tokens, rows and steps; do not train"),)),
    Command("cache", "list the tokenized data on disk, and clear what is of no use", _cache, words=(), overrides=False,
        options=(
            Option("--clear", action="store_true", help="remove those whose data have changed or are gone"),
            Option("--all", action="store_true", help="remove all of them"))),
    Command("plan", "compile a training for TPUs that are not there: does it fit, how fast at most", _plan,
        settings=_TRAINING, stopped="stopped; nothing was written",
        options=(
            Option("--topology", metavar="CHIP:SHAPE", required=True, help="the slice, for instance v5p:4x4x4"),
            Option("--search", action="store_true", help="try meshes, microbatches, remat; print the best that fits"),
            Option("--json", action="store_true", help="print one JSON object"))),
    Command("merge", "merge Hugging Face directories; the same as python -m bmjax.merge", _merge,
        words=("RECIPE", "OUT"), options=_MERGE_OPTIONS, details=_methods_text,
        stopped="interrupted; OUT is as it was, and the same command goes on with the merge"),
    Command("convert", "a Hugging Face directory to an Orbax checkpoint of parameters, and back", _convert,
        words=("SRC", "DST"), overrides=False, stopped="stopped; DST is as it was",
        options=(
            Option("--to", metavar="hf|orbax", required=True, choices=("hf", "orbax"), help="what DST is to be"),)),
    Command("eval", "accuracy with 95% intervals and held-out loss of a model", _eval,
        settings="bmjax.evaluate.settings:EvalSettings", stopped="stopped; the same command begins again"),
)  # fmt: skip
COMMANDS = {row.name: row for row in _ROWS}
