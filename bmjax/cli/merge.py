"""`bmjax merge RECIPE OUT`: its options, the list of methods in its help, and the call of the merge."""

import time
import warnings
from argparse import Namespace
from typing import Any

from bmjax.cli.parser import Option
from bmjax.log import progress_bar, silent, write_line

OPTIONS = (
    Option("--check", action="store_true", help="only say what would be read and written; headers are read"),
    Option("--overwrite", action="store_true", help="replace a model directory OUT once the merge is done"),
    Option("--seed", metavar="N", help="of random masks, in place of the recipe's"),
    Option("--memory", metavar="SIZE", help="of tensors in memory at a time: 512MiB, 2GiB"),
    Option("--shard-size", metavar="SIZE", default="5GB", help="of a file of the result (5GB)"),
    Option("--quiet", "-q", action="store_true", help="print nothing but errors"),
)


def methods_text() -> str:
    """Return every merge method with its parameters and their defaults, as the help shows them."""
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


def merge(options: Namespace) -> None:
    """Merge, or with --check say what a merge would do, and print what came of it."""
    from bmjax.calibrate import dispatch
    from bmjax.merge.plan.output import parse_size
    from bmjax.merge.recipe.recipe import read_recipe

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    recipe = read_recipe(options.recipe, [*options.overrides, *seed])
    sizes: dict[str, Any] = {"shard_bytes": parse_size(options.shard_size, "--shard-size")}
    if options.memory is not None:
        sizes["memory"] = parse_size(options.memory, "--memory")
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
