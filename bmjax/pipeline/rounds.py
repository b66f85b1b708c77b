"""The outer step between two rounds: where the next one starts, from the last start and the merge of the branches.

With `outer_rate` r, `outer_momentum` m, start s and merge M of a round, the next start is

    s + r (d + m v),   d = M - s,   v = d + m v of the round before,

which is SGD with Nesterov momentum on the change, the outer optimizer of DiLoCo (arXiv 2311.08105). With r = 1 and
m = 0 it is M. The file engine computes it, so that models of any size pass through. The velocity is kept as the model
s + v: entries that nothing changed are then exactly those of s. Called by phases.py.

DIR/rounds/NUMBER/merged/hf    M
DIR/rounds/NUMBER/velocity/hf  s + v, where there is momentum; in the first round it is M
DIR/rounds/NUMBER/start/hf     the next start, where it is not M
"""

from pathlib import Path

from bmjax.calibrate import dispatch
from bmjax.pipeline.settings import RunSettings


def folders(settings: RunSettings, number: int) -> tuple[str, ...]:
    """Return the folders of a round, counted from 1, that its merge and the outer step write."""
    velocity = ("velocity",) if settings.outer_momentum and number > 1 else ()
    start = ("start",) if settings.outer_momentum or settings.outer_rate != 1 else ()
    return ("merged", *velocity, *start)


def next_start(settings: RunSettings, number: int, directory: Path) -> str:
    """Return the directory of the model that the round after this one starts from."""
    return str(directory / "rounds" / str(number) / folders(settings, number)[-1] / "hf")


def outer_step(settings: RunSettings, number: int, directory: Path, start: str, earlier_start: str | None) -> None:
    """Write what the outer step makes of a round's merge.

    Arguments:
        number: of the round, counted from 1.
        directory: of the run.
        start, earlier_start: the models that this round and the one before it started from.
    """
    rate, momentum = settings.outer_rate, settings.outer_momentum
    merged, velocity = (directory / "rounds" / str(number) / kind / "hf" for kind in ("merged", "velocity"))
    if momentum and number > 1:
        # M + m v of the round before = s + v
        earlier = directory / "rounds" / str(number - 1)
        earlier_velocity = earlier / ("velocity" if number > 2 else "merged") / "hf"
        _add(str(merged), [(str(earlier_velocity), momentum)], velocity, earlier_start)
        changes = [(str(merged), rate), (str(velocity), rate * momentum)]
    else:
        changes = [(str(merged), rate * (1 + momentum))]  # in the first round v = d
    if folders(settings, number)[-1] == "start":
        _add(start, changes, Path(next_start(settings, number, directory)))


def _add(base: str, models: list[tuple[str, float]], output: Path, origin: str | None = None) -> None:
    """Write base + the weighted changes of models, each from `origin` (default: the base), in float32."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": model, "parameters": {"weight": weight}} for model, weight in models],
        "parameters": {} if origin is None else {"rebase": origin},
        "dtype": "float32",
    }
    dispatch.merge(recipe, output, overwrite=True)
