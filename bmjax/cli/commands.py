"""The table of commands: what each is called, what it takes, and the few lines that hand it to its phase.

A new command is a row of COMMANDS, a function that calls the phase, and a text in help/. Phases are imported inside the
functions, so that a mistake in the arguments is told at once.
"""

import json
from argparse import Namespace

from bmjax.cli import merge
from bmjax.cli.parser import Command, Option
from bmjax.errors import UserError


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
    from bmjax.log import write_line
    from bmjax.teach.collect import collect

    failed = collect(options.settings, write_line)["failed"]
    if failed:
        failures = f"{options.settings.output}/failures.jsonl"
        raise UserError(f"{failed} requests failed, see {failures}; the same command asks again")


def _select(options: Namespace) -> None:
    from bmjax.log import write_line
    from bmjax.teach.select import render_table, select

    print(render_table(select(options.settings, write_line)))


def _train(options: Namespace) -> None:
    from bmjax.branch.train import train

    _use_machine()
    train(options.settings)


def _eval(options: Namespace) -> None:
    from bmjax.evaluate.run import evaluate, summary
    from bmjax.parallel.start import use_cpu_cores

    use_cpu_cores()
    for task, score in evaluate(options.settings).items():
        print(f"{task}: {summary(score)}")


def _plan(options: Namespace) -> None:
    from bmjax.log import write_line
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


def _convert(options: Namespace) -> None:
    from bmjax.weights.convert import convert

    convert(options.src, options.dst, options.to)
    print(f"{options.dst}: written")


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
        settings=_TRAINING),
    Command("plan", "compile a training for TPUs that are not there: does it fit, how fast at most", _plan,
        settings=_TRAINING, stopped="stopped; nothing was written",
        options=(
            Option("--topology", metavar="CHIP:SHAPE", required=True, help="the slice, for instance v5p:4x4x4"),
            Option("--search", action="store_true", help="try meshes, microbatches, remat; print the best that fits"),
            Option("--json", action="store_true", help="print one JSON object"))),
    Command("merge", "merge Hugging Face directories; the same as python -m bmjax.merge", merge.merge,
        words=("RECIPE", "OUT"), options=merge.OPTIONS, details=merge.methods_text,
        stopped="interrupted; OUT is as it was, and the same command goes on with the merge"),
    Command("convert", "a Hugging Face directory to an Orbax checkpoint of parameters, and back", _convert,
        words=("SRC", "DST"), overrides=False, stopped="stopped; DST is as it was",
        options=(
            Option("--to", metavar="hf|orbax", required=True, choices=("hf", "orbax"), help="what DST is to be"),)),
    Command("eval", "accuracy with 95% intervals and held-out loss of a model", _eval,
        settings="bmjax.evaluate.settings:EvalSettings", stopped="stopped; the same command begins again"),
)  # fmt: skip
COMMANDS = {row.name: row for row in _ROWS}
