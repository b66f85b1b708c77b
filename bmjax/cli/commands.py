"""The table of commands: what each is called, what it takes, and the few lines that hand it to its phase.

A new command is a row of COMMANDS, a function that calls the phase, and a text in help/. Phases are imported inside the
functions, so that a mistake in the arguments is told at once.
"""

import gc
import json
import time
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bmjax.cli.foreign_options import MERGEKIT
from bmjax.cli.methods_help import methods_text
from bmjax.cli.parser import Command, Option, Outcome
from bmjax.errors import UserError
from bmjax.log import is_seen_with_results, progress_bar, stage, write_line


def _use_machine() -> None:
    from bmjax.parallel.start import use_cpu_cores, use_gpu_memory

    use_cpu_cores()
    use_gpu_memory()


def _demo(options: Namespace) -> Outcome:
    from bmjax.demo.run import run_demo

    _use_machine()
    return Outcome(value=run_demo(options.output, options.overrides))


def _demo_keys() -> str:
    from bmjax.config import describe
    from bmjax.demo.settings import DemoSettings

    return "\n".join(["keys, beside those of `bmjax run`:", *describe(DemoSettings)])


def _run(options: Namespace) -> Outcome:
    from bmjax.pipeline.phases import run

    _use_machine()
    return Outcome(value=run(options.settings, options.output))


def _check_run(options: Namespace) -> list[str]:
    from bmjax.pipeline.check import describe

    _use_machine()
    return describe(options.settings, options.output)


def _init(options: Namespace) -> Outcome:
    from bmjax.cli.init import write_config

    return write_config(options, {name: command.settings_class for name, command in COMMANDS.items()})


def _collect(options: Namespace) -> Outcome:
    from bmjax.teach.collect import FAILURES, collect, output_folder

    counts = collect(options.settings, write_line)
    failures = output_folder(options.settings) / FAILURES
    problem = f"{counts['failed']} requests failed, see {failures}; the same command asks again"
    return Outcome(value=counts, problem=problem if counts["failed"] else None)


def _check_collect(options: Namespace) -> list[str]:
    from bmjax.teach.estimate import describe

    return describe(options.settings, write_line)


def _judge(options: Namespace) -> Outcome:
    from bmjax.teach.rejudge import rejudge, summary
    from bmjax.teach.settings import JudgeSettings

    is_config = options.traces.endswith((".yaml", ".yml"))
    source = options.traces if is_config else {"traces": options.traces}
    counts = rejudge(JudgeSettings.read(source, options.overrides), write_line)
    return Outcome([summary(counts)], counts)


def _judge_keys() -> str:
    from bmjax.config import describe
    from bmjax.teach.settings import JudgeSettings

    return "\n".join(["keys, given as key=value, or in FILE.yaml in place of TRACES:", *describe(JudgeSettings)])


def _select(options: Namespace) -> Outcome:
    from bmjax.teach.select import render_table, select

    settings = options.settings
    if options.show is not None:
        if not options.show.isdecimal():
            raise UserError(f"--show: expected a whole number, found '{options.show}'")
        settings = settings.model_copy(update={"show": int(options.show)})
    table = select(settings, write_line)
    return Outcome([render_table(table)], table)


def _train(options: Namespace) -> Outcome:
    from bmjax.branch.train import train

    _use_machine()
    return Outcome(value=train(options.settings))


def _check_train(options: Namespace) -> list[str]:
    from bmjax.branch.train import describe

    _use_machine()
    return describe(options.settings)


def _cache(options: Namespace) -> Outcome:
    from bmjax.branch.cache import caches, folder
    from bmjax.io import bucket

    entries, copies, lines = caches(), bucket.copies(), list[str]()
    for cache in entries:
        age = f"used {(time.time() - cache.used) / 86400:.0f} days ago"
        removed = options.all or (options.clear and cache.is_dead)
        state = "removed" if removed else "its data changed or are gone" if cache.is_dead else "in use"
        lines.append(f"{cache.path}: {cache.size / 1e9:.2f} GB of {', '.join(cache.data)}, {age}; {state}")
        if removed:
            cache.remove()
    if copies:
        size = sum(copy.stat().st_size for copy in copies) / 1e9
        state = "removed" if options.all else "--all removes them"
        lines.append(
            f"{bucket.cache_folder('buckets')}: {size:.2f} GB in {len(copies)} copies of files of buckets; {state}"
        )
        for copy in copies if options.all else ():
            bucket.remove_copy(copy)
    if not entries and not copies:
        lines.append(f"{folder().parent}: nothing is cached")
    return Outcome(lines)


def _eval(options: Namespace) -> Outcome:
    if options.compare is not None:
        from bmjax.evaluate.compare import compare, lines

        comparison = compare(*options.compare)
        return Outcome([*lines(comparison)], comparison)
    from bmjax.evaluate.run import evaluate, summary
    from bmjax.io import bucket

    if options.settings.base_url is None:
        _use_machine()
    scores = evaluate(options.settings, write_line)
    # On a terminal every score stands there since its task was done.
    texts = [] if is_seen_with_results() else [f"{task}: {summary(score)}" for task, score in scores.items()]
    if options.settings.table is not None:
        table = bucket.local(bucket.join(options.settings.output, "table.md"))
        texts.append(table.read_text(encoding="utf-8").rstrip("\n"))
    return Outcome(texts, scores)


def _check_eval(options: Namespace) -> list[str]:
    from bmjax.evaluate.run import describe

    if options.settings.base_url is None:
        _use_machine()
    return describe(options.settings, write_line)


def _plan(options: Namespace) -> Outcome:
    from bmjax.branch.choose import without_data
    from bmjax.parallel.chips import topology_devices
    from bmjax.parallel.processes import stopping_at_once
    from bmjax.plan import plan

    topology_devices(options.topology)  # loads the TPU's compiler, and with it its handlers of signals
    with stopping_at_once("stopped; nothing was written"):
        result = plan.plan_training(options.settings, options.topology, options.search, write_line)
    changes = result.get("overrides", {})
    texts = [*plan.lines(result, without_data(options.settings, "a plan").model_copy(update=changes))]
    if changes:
        texts.append(" ".join(["with", *(f"{key}={json.dumps(value)}" for key, value in changes.items())]))
    return Outcome(texts, result)


def _read_merge(options: Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the recipe of a merge, and the sizes that its options give."""
    from bmjax.merge.plan.output import parse_size
    from bmjax.merge.recipe.recipe import read_recipe

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    recipe = read_recipe(options.recipe, [*options.overrides, *seed])
    memory = None if options.memory is None else parse_size(options.memory, "--memory")
    shard_bytes = parse_size(options.shard_size, "--shard-size")
    return recipe, {"shard_bytes": shard_bytes, "memory": memory, "device": options.device}


def _check_merge(options: Namespace) -> Iterable[str]:
    from bmjax.calibrate import dispatch

    recipe, sizes = _read_merge(options)
    return dispatch.check(recipe, options.out, options.overwrite, **sizes)


@contextmanager
def _importing() -> Iterator[None]:
    """Look for no garbage meanwhile: what modules make stays, and the search takes a third of the time of imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _merge(options: Namespace) -> Outcome:
    from bmjax.parallel.sorting import use_fast_sort

    use_fast_sort()  # before NumPy is imported
    with _importing():
        from bmjax.calibrate import dispatch
        from bmjax.merge.plan.output import size_text
        from bmjax.merge.report.statistics import summary_lines
        from bmjax.parallel.start import use_cpu_cores, use_own_threads

        recipe, sizes = _read_merge(options)
    if recipe.is_calibrated:
        use_cpu_cores(keep_memory=False)
    else:
        use_own_threads()
    start = time.perf_counter()
    bar = progress_bar("merge", "B", shown=not recipe.is_calibrated, compiles=True)

    def progress(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.update(done - bar.count)

    def log(line: str) -> None:
        write_line(f"bmjax: note: {line}")

    with bar, warnings.catch_warnings():
        # What is not finite is said once, in words.
        warnings.simplefilter("ignore", RuntimeWarning)
        report = dispatch.merge(recipe, options.out, options.overwrite, log=log, progress=progress, **sizes)
    seconds, tensors = round(time.perf_counter() - start, 1), len(report["tensors"])
    read = f"{size_text(bar.count)} read, " if bar.count else ""
    lines = [*summary_lines(report), f"{options.out}: {tensors} tensors, {read}{seconds:.1f} s"]
    whole = {name: value for name, value in report.items() if name != "tensors"}
    return Outcome(lines, {**whole, "output": options.out, "tensors": tensors, "seconds": seconds})


def _convert(options: Namespace) -> Outcome:
    from bmjax.api import convert

    with stage(f"converting {options.src}", write_line, patience=2):
        convert(options.src, options.dst, options.to)
    return Outcome([f"{options.dst}: written"], {"output": options.dst, "to": options.to})


def _completion(options: Namespace) -> Outcome:
    from bmjax.cli.completion import script

    return Outcome([script(options.shell, COMMANDS).rstrip("\n")])


def _push(options: Namespace) -> Outcome:
    from bmjax.io.push import prepare, push

    upload = prepare(options.dir, options.repository)
    for note in upload.notes:
        write_line(note)
    url = push(upload, options.private, options.revision, write_line)
    return Outcome([url], {"url": url})


def _check_push(options: Namespace) -> list[str]:
    from bmjax.io.push import prepare

    return prepare(options.dir, options.repository).lines(options.private, options.revision)


def _model_source(model: str, options: Namespace, key: str = "model") -> tuple[Any, list[str]]:
    """Return the settings' source and overrides of a command whose word is a model, or a FILE.yaml of its keys."""
    values = {name: getattr(options, name, None) for name in ("host", "port", "api_key_env")}
    overrides = [f"{name}={json.dumps(value)}" for name, value in values.items() if value is not None]
    return model if model.endswith((".yaml", ".yml")) else {key: model}, [*options.overrides, *overrides]


def _serve(options: Namespace) -> None:
    from bmjax.generate.settings import ServeSettings

    if options.port is not None and not options.port.isdecimal():
        raise UserError(f"--port: expected a whole number, found '{options.port}'")
    options.port = None if options.port is None else int(options.port)
    settings = ServeSettings.read(*_model_source(options.model, options))
    from bmjax.generate.server.serve import serve

    _use_machine()
    serve(settings, options.api_key, write_line)


def _serve_keys() -> str:
    from bmjax.config import describe
    from bmjax.generate.settings import ServeSettings

    return "\n".join(["keys, given as key=value, or in FILE.yaml in place of MODEL:", *describe(ServeSettings)])


def _chat(options: Namespace) -> None:
    from bmjax.generate.settings import ChatSettings

    key = "base_url" if options.model.startswith(("http://", "https://")) else "model"
    settings = ChatSettings.read(*_model_source(options.model, options, key))
    from bmjax.generate.terminal import chat

    if settings.base_url is None:
        _use_machine()
    chat(settings)


def _chat_keys() -> str:
    from bmjax.config import describe
    from bmjax.generate.settings import ChatSettings

    return "\n".join(["keys, given as key=value, or in FILE.yaml in place of MODEL:", *describe(ChatSettings)])


_MERGE_OPTIONS = (
    Option("--overwrite", action="store_true", help="replace a model directory OUT once the merge is done"),
    Option("--seed", metavar="N", help="of random masks, in place of the recipe's"),
    Option("--memory", metavar="SIZE", help="of tensors in memory at a time: 512MiB, 2GiB"),
    Option("--shard-size", metavar="SIZE", default="5GB", help="of a file of the result (5GB)"),
    Option(
        "--device",
        metavar="auto|cpu|gpu|tpu",
        default="auto",
        choices=("auto", "cpu", "gpu", "tpu"),
        help="to compute on; auto: the CPU for methods as quick as copying, else what JAX finds",
    ),
)
_TRAINING = "bmjax.branch.settings:TrainSettings"
_ROWS = (
    Command("demo", "the whole experiment in small, with problems and a teacher of its own; no config needed", _demo,
        words=(), extra="all", details=_demo_keys,
        options=(Option("--output", metavar="DIR", help="directory of the run (runs/demo)"),), json=True),
    Command("run", "the whole experiment: teacher, branches, merges, mixture, scores, report.html", _run,
        settings="bmjax.pipeline.settings:RunSettings", extra="all", check=_check_run,
        options=(Option("--output", metavar="DIR", help="directory of the run, in place of the config's `output`"),),
        json=True),
    Command("init", "write a first config for a command, every key explained", _init, words=("COMMAND",),
        stopped="stopped; nothing was written",
        options=(
            Option("--output", metavar="FILE", help="the file to write (COMMAND.yaml)"),
            Option("--schema", action="store_true", help="print the config's JSON Schema instead, for editors"))),
    Command("collect", "ask a teacher (any OpenAI-compatible endpoint) for reasoning traces", _collect,
        settings="bmjax.teach.settings:CollectSettings", extra="teach", check=_check_collect, json=True),
    Command("judge", "judge existing traces again, with new references if you give them; no teacher is asked", _judge,
        words=("TRACES",), extra="teach", details=_judge_keys, stopped="stopped; the traces are as they were",
        json=True),
    Command("select", "keep the traces worth training on, and say why the others were dropped", _select,
        settings="bmjax.teach.settings:SelectSettings", extra="teach", stopped="stopped; the same command begins again",
        options=(Option("--show", metavar="N", help="print N examples kept, and N dropped by each rule"),), json=True),
    Command("train", "fine-tune a student on a dataset (a branch, the mixture, a backbone)", _train,
        settings=_TRAINING, check=_check_train, json=True),
    Command("cache", "list tokenized data and copies of buckets' files on disk, and clear them", _cache, words=(),
        overrides=False, options=(
            Option("--clear", action="store_true", help="remove those whose data have changed or are gone"),
            Option("--all", action="store_true", help="remove all of them, copies too"))),
    Command("plan", "compile the training step for TPUs that you don't have: does it fit, how fast at most", _plan,
        settings=_TRAINING, stopped="stopped; nothing was written",
        options=(
            Option("--topology", metavar="CHIP:SHAPE", required=True, help="the slice, for instance v5p:4x4x4"),
            Option("--search", action="store_true", help="try meshes, microbatches, remat; print the best that fits")),
        json=True),
    Command("merge", "merge Hugging Face directories; the same as python -m bmjax.merge", _merge,
        words=("RECIPE", "OUT"), options=_MERGE_OPTIONS, details=methods_text, check=_check_merge, foreign=MERGEKIT,
        stopped="interrupted; OUT is as it was, and the same command goes on with the merge", json=True),
    Command("convert", "a Hugging Face directory to an Orbax checkpoint of parameters, and back", _convert,
        words=("SRC", "DST"), overrides=False, stopped="stopped; DST is as it was",
        options=(
            Option("--to", metavar="hf|orbax", required=True, choices=("hf", "orbax"), help="what DST is to be"),),
        json=True),
    Command("push", "put a model or a data set on the Hugging Face Hub, in one commit", _push,
        words=("DIR", "REPOSITORY"), overrides=False, check=_check_push,
        stopped="stopped; no file on the hub has changed",
        options=(
            Option("--private", action="store_true", default=None, help="make a new repository private"),
            Option("--revision", metavar="BRANCH", help="the branch to commit to, made where it is missing (main)")),
        json=True),
    Command("serve", "a model behind an OpenAI-compatible endpoint", _serve, words=("MODEL",), details=_serve_keys,
        extra="serve", stopped="stopped",
        options=(
            Option("--host", metavar="HOST", help="address to listen at (127.0.0.1; 0.0.0.0: all of this machine's)"),
            Option("--port", metavar="N", help="port to listen at (8000; 0: a free one)"),
            Option("--api-key", metavar="KEY", help="what clients must send; other users of this machine can see it"),
            Option("--api-key-env", metavar="NAME", help="the same, from an environment variable"))),
    Command("chat", "talk to a model in the terminal, computed here or behind an endpoint's URL", _chat,
        words=("MODEL",), details=_chat_keys, stopped="stopped"),
    Command("eval", "scores of a model, or behind an endpoint, with 95% intervals; compares two evaluations", _eval,
        settings="bmjax.evaluate.settings:EvalSettings", alone="compare", check=_check_eval,
        options=(
            Option("--compare", nargs=2, metavar=("A", "B"), help="instead of CONFIG: how B differs from A, by task"),),
        json=True),
    Command("completion", "print what completes these commands in bash, zsh or fish", _completion, words=("SHELL",),
        overrides=False),
)  # fmt: skip
COMMANDS = {row.name: row for row in _ROWS}
