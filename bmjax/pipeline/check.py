"""What a run would do: `bmjax run --check`."""

from pathlib import Path

from bmjax.log import silent
from bmjax.pipeline.phases import Experiment
from bmjax.pipeline.settings import RunSettings
from bmjax.pipeline.stages import DONE, Stages, run_directory


def describe(settings: RunSettings, output: str | Path | None = None) -> list[str]:
    """Return what `run` would do, in lines: every stage, whether it is done, and what those that can tell will take.

    It writes nothing. Raises UserError for what `run` refuses before its first stage.
    """
    directory = run_directory(output or settings.output)
    experiment, stages = Experiment(settings, directory, silent), Stages(directory, silent)
    for rows in experiment.rows.values():
        rows.check_sources()
    lines, left, all_stages = [], 0, experiment.stages()
    for stage in all_stages:
        state = stages.state(stage)
        left += state != DONE
        lines.append(f"{state:<6} {stage.name}")
        if state == DONE or stage.plan is None:
            continue
        try:
            lines += [f"       {line}" for line in stage.plan()]
        except (OSError, KeyError):  # it reads what a stage before it writes
            lines.append("       more is known when the stages before it are done")
    return [*lines, f"{directory}: {len(all_stages)} stages, {left} to do; nothing was written"]
