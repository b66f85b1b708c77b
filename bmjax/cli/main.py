"""The commands: parse and call, no logic."""

import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from bmjax.config import DISK_ERRORS, Settings, UserError, describe, disk_error, nearest
from bmjax.version import __version__

INTRO = """bmjax {version}: Branch-Merge distillation (arXiv 2503.04872) in JAX

One student per domain is trained from a common backbone on a teacher's traces; the branches are merged into one
student that is better than the backbone in every domain.

usage: bmjax COMMAND CONFIG [key=value ...]      e.g. bmjax run configs/own_problems.yaml --output runs/own

  demo [--output DIR]         the whole experiment in small, with problems and a teacher of its own; no config needed
  run CONFIG [--output DIR]   the whole experiment: teacher, branches, merges, mixture, scores, report.html
  collect CONFIG              ask a teacher (any OpenAI-compatible endpoint) for reasoning traces
  select CONFIG               keep the traces worth training on, and say why the others were dropped
  train CONFIG                fine-tune a student on a dataset (a branch, the mixture, a backbone)
  plan CONFIG --topology v5p:4x4x4   compile a training for TPUs that are not there: does it fit, how fast at most
  merge RECIPE OUT            merge Hugging Face directories; the same as python -m bmjax.merge
  convert SRC DST --to hf|orbax   Hugging Face directory to Orbax checkpoint of parameters, and back
  eval CONFIG                 accuracy with 95% intervals and held-out loss of a model

Every key of a CONFIG can be overridden: branch.steps=10. `bmjax COMMAND --help` lists all keys with defaults.
A mistake in a config or an input is one line that names it, and exit code 2; nothing half-written stays behind.
"""


def _run(settings: Any, output: str | None) -> None:
    from bmjax.parallel.start import use_cpu_cores, use_gpu_memory
    from bmjax.pipeline.phases import run

    use_cpu_cores()
    use_gpu_memory()
    run(settings, output)


def _demo(rest: list[str]) -> int:
    from bmjax.parallel.start import use_cpu_cores, use_gpu_memory

    if "-h" in rest or "--help" in rest:
        from bmjax.demo.settings import DemoSettings

        print(DEMO_HELP + "\n".join(describe(DemoSettings)))
        return 0
    output, overrides = _option(rest, "--output")
    for argument in overrides:
        if argument.startswith("-") or "=" not in argument:
            raise UserError(f"'{argument}': expected key=value; see bmjax demo --help")
    use_cpu_cores()
    use_gpu_memory()
    from bmjax.demo.run import run_demo

    run_demo(output, overrides)
    return 0


DEMO_HELP = """usage: bmjax demo [--output DIR] [key=value ...]

The whole experiment in small, with problems, a teacher and a tokenizer of its own: about nine minutes on two cores.
It writes what `bmjax run` writes to DIR (runs/demo): report.html, merged/hf, ...

examples:
  bmjax demo
  bmjax demo --output runs/seed1 seed=1 branch.steps=300

keys: those of `bmjax run` (bmjax run --help), and
"""


def _collect(settings: Any, output: str | None) -> None:
    from bmjax.log import write_line
    from bmjax.teach.collect import collect

    failed = collect(settings, write_line)["failed"]
    if failed:
        raise UserError(f"{failed} requests failed, see {settings.output}/failures.jsonl; the same command asks again")


def _select(settings: Any, output: str | None) -> None:
    from bmjax.log import write_line
    from bmjax.teach.select import render_table, select

    print(render_table(select(settings, write_line)))


def _train(settings: Any, output: str | None) -> None:
    from bmjax.branch.train import train
    from bmjax.parallel.start import use_cpu_cores, use_gpu_memory

    use_cpu_cores()
    use_gpu_memory()
    train(settings)


def _eval(settings: Any, output: str | None) -> None:
    from bmjax.evaluate.run import evaluate, summary
    from bmjax.parallel.start import use_cpu_cores

    use_cpu_cores()
    for task, score in evaluate(settings).items():
        print(f"{task}: {summary(score)}")


def _settings_of(command: str) -> type[Settings]:
    if command == "run":
        from bmjax.pipeline.settings import RunSettings

        return RunSettings
    if command in ("collect", "select"):
        from bmjax.teach.settings import CollectSettings, SelectSettings

        return CollectSettings if command == "collect" else SelectSettings
    if command == "train":
        from bmjax.branch.settings import TrainSettings

        return TrainSettings
    from bmjax.evaluate.settings import EvalSettings

    return EvalSettings


CALLS: dict[str, Callable[[Any, str | None], None]] = {
    "run": _run, "collect": _collect, "select": _select, "train": _train, "eval": _eval,
}  # fmt: skip
EXAMPLES = {
    "run": (
        "bmjax run configs/own_problems.yaml --output runs/own",
        "bmjax run own.yaml --output runs/own seed=1 branch.steps=300",
    ),
    "collect": ("bmjax collect collect.yaml teacher.concurrency=64",),
    "select": ("bmjax select select.yaml max_characters=20000",),
    "train": (
        "bmjax train branch.yaml learning_rate=2e-5 output=runs/math",
        "bmjax train branch.yaml freeze=[embed/*]",
    ),
    "eval": ("bmjax eval eval.yaml temperature=0.6 top_p=0.95 samples=16",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for a mistake its user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"bmjax: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"bmjax: error: {disk_error(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bmjax: stopped; the same command continues where it was", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(INTRO.format(version=__version__), end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"bmjax {__version__}")
        return 0
    command, *rest = arguments
    if command == "merge":
        from bmjax.cli.merge import main as merge_main

        return merge_main(rest)
    if command == "convert":
        return _convert(rest)
    if command == "plan":
        return _plan(rest)
    if command == "demo":
        return _demo(rest)
    if command not in CALLS:
        raise UserError(f"unknown command '{command}'{nearest(command, [*CALLS, 'merge', 'convert', 'plan', 'demo'])}")
    kind = _settings_of(command)
    if "-h" in rest or "--help" in rest:
        print(_help(command, kind), end="")
        return 0
    output = None
    if command == "run":
        output, rest = _option(rest, "--output")
    config, overrides = _config(command, rest)
    CALLS[command](kind.read(config, overrides), output)
    return 0


def _config(command: str, rest: list[str]) -> tuple[str, list[str]]:
    """(the CONFIG file, its overrides) of what is left of a command line."""
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        raise UserError(f"unknown option '{unknown[0]}'; settings are given as key=value, see bmjax {command} --help")
    if not rest or "=" in rest[0]:
        raise UserError(f"bmjax {command}: the CONFIG file is missing; see bmjax {command} --help")
    return rest[0], rest[1:]


def _option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """(value, the other arguments) of `NAME VALUE` or `NAME=VALUE`; None where the option is absent."""
    for at, argument in enumerate(arguments):
        if argument == name:
            if at + 1 == len(arguments):
                raise UserError(f"{name}: a value must follow")
            return arguments[at + 1], arguments[:at] + arguments[at + 2 :]
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}="), arguments[:at] + arguments[at + 1 :]
    return None, arguments


def _help(command: str, kind: type[Settings]) -> str:
    option = " [--output DIR]" if command == "run" else ""
    examples = "".join(f"  {line}\n" for line in EXAMPLES[command])
    keys = "\n".join(describe(kind))
    return (
        f"usage: bmjax {command} CONFIG{option} [key=value ...]\n\n{(kind.__doc__ or '').strip()}\n\n"
        f"examples:\n{examples}\n"
        f"keys of CONFIG (YAML), with defaults; nested keys are overridden as a.b=value:\n{keys}\n"
    )


PLAN_HELP = """usage: bmjax plan CONFIG --topology CHIP:SHAPE [--search] [--json] [key=value ...]

Compiles the real training step of a train config for a TPU slice that is not there (v5p:4x4x4, v6e:16x16, v5e:4x4), and
says whether it fits, GiB a chip by kind, FLOPs, what each mesh axis sends, and the least time a step can take. The
student is a directory, or a published Qwen2.5 or DeepSeek-R1-Distill-Qwen by its name; its weights are not needed.

  --search     try meshes, microbatches and remat, and print the best that fits
  --json       print one JSON object: fits, chips, hbm_gib, gib_per_chip, flops_per_step, step_seconds_bound,
               tokens_per_second_bound, collective_bytes (of a chip a step, by mesh axis), compile_seconds, ...

examples:
  bmjax plan configs/tinyr1_32b_math.yaml --topology v5p:4x4x4
  bmjax plan configs/tinyr1_32b_math.yaml --topology v6e:16x16 seq_len=32768
"""


def _plan(rest: list[str]) -> int:
    if "-h" in rest or "--help" in rest:
        print(PLAN_HELP, end="")
        return 0
    topology, rest = _option(rest, "--topology")
    flags = {word for word in rest if word in ("--search", "--json")}
    rest = [word for word in rest if word not in flags]
    config_file, overrides = _config("plan", rest)
    if topology is None:
        raise UserError("bmjax plan: --topology is missing, for instance --topology v5p:4x4x4")
    from bmjax.branch.settings import TrainSettings

    settings = TrainSettings.read(config_file, overrides)
    from bmjax.plan import plan

    config = plan.student_config(settings.student)
    steps = plan.training_steps(settings, config)
    if "--search" in flags:
        found, changes = plan.search(settings, config, topology, log=lambda line: print(line, file=sys.stderr))
        settings = settings.model_copy(update=changes)
    else:
        found, changes = plan.plan(settings, config, topology), {}
    found = dataclasses.replace(found, steps=steps)
    if "--json" in flags:
        print(json.dumps({**found.to_json(), **({"overrides": changes} if changes else {})}))
        return 0
    for line in plan.lines(found, settings):
        print(line)
    if changes:
        print("with", *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    return 0


CONVERT_HELP = """usage: bmjax convert SRC DST --to hf|orbax

  --to orbax   SRC is a Hugging Face directory or hub id; DST gets its parameters as an Orbax checkpoint, with
               config.json and the tokenizer beside it
  --to hf      SRC is such a directory; DST gets safetensors (a training's output holds hf/ already)

DST must not exist. Tensors keep their dtype: hf -> orbax -> hf gives the same bytes.
"""


def _convert(rest: list[str]) -> int:
    if "-h" in rest or "--help" in rest:
        print(CONVERT_HELP, end="")
        return 0
    kind, paths = _option(rest, "--to")
    if kind is None:
        raise UserError("bmjax convert: --to hf or --to orbax is missing")
    unknown = [path for path in paths if path.startswith("-")]
    if unknown:
        raise UserError(f"unknown option '{unknown[0]}'; see bmjax convert --help")
    if kind not in ("hf", "orbax"):
        raise UserError(f"--to: expected hf or orbax, found '{kind}'")
    if len(paths) != 2:
        raise UserError(f"bmjax convert: expected SRC and DST, found {len(paths)} paths")
    from bmjax.weights.convert import to_hf, to_orbax

    (to_hf if kind == "hf" else to_orbax)(paths[0], paths[1])
    return 0


def run(command: Callable[[], int] = main) -> NoReturn:
    """Run a command as this process: exit with its code."""
    code = command()
    # All is written: what the interpreter would take apart piece by piece, for half a second, goes with the process.
    gc.freeze()
    sys.exit(code)
