"""Where a training's numbers go beside metrics.jsonl: TensorBoard's files, Weights & Biases and MLflow if asked for.

The loop's `metrics_log` calls it. No tracker can stop or slow a training: each works in a thread of its own, and one
that raises, falls behind or does not end in time is said in one line and left. A training that goes on adds to what it
began: no step is there twice.
"""

import contextlib
import importlib
import importlib.util
import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from bmjax.branch.settings import Training, TrainSettings
from bmjax.config import UserError
from bmjax.errors import first_line, install
from bmjax.io import bucket
from bmjax.io.atomic import write_atomic
from bmjax.log import Log
from bmjax.urls import url_of

TENSORBOARD, RUNS = "tensorboard", "trackers.json"  # in the output: event files, and the trackers' names of this run
WAITING = 1000  # steps that may wait for a tracker
GRACE = 30.0  # seconds that a tracker has to send the last steps
Numbers = Mapping[str, float]


class Sink(Protocol):
    """A tracker once it is open. Its methods are called in one thread."""

    def write(self, step: int, numbers: Numbers) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Hands steps to a tracker in a thread of its own, until it fails.

    Arguments:
        name: of the tracker, for the line that says that it failed.
        open_sink: opens it; called in the thread, since a service may keep one waiting.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], log: Log) -> None:
        self._name, self._open, self._log = name, open_sink, log
        self._queue: queue.Queue[tuple[int, Numbers] | None] = queue.Queue(WAITING)
        self._is_off = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, numbers: Numbers) -> None:
        """Pass on a step; it never waits."""
        try:
            if not self._is_off:
                self._queue.put_nowait((step, numbers))
        except queue.Full:
            self._off(f"{WAITING} steps wait for it")

    def close(self, grace: float = GRACE) -> None:
        """Wait until all steps are sent, but no longer than `grace` seconds."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(0 if self._is_off else grace)
        if self._thread.is_alive() and not self._is_off:
            self._off(f"it did not end within {grace:g} s")

    def _off(self, reason: str) -> None:
        if not self._is_off:
            self._is_off = True
            self._log(f"{self._name}: off, {reason}; the training goes on, metrics.jsonl has every step")

    def _work(self) -> None:
        try:
            sink = self._open()
            while (entry := self._queue.get()) is not None and not self._is_off:
                sink.write(*entry)
            sink.close()
        except BaseException as error:  # whatever it is, a SystemExit too, it is the tracker's affair
            self._off(first_line(error))


class TensorBoard:
    """Event files, which `tensorboard --logdir` shows. Steps that a killed training left beyond `begin` are purged."""

    def __init__(self, folder: Path, begin: int) -> None:
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        # A file is named by the second: a training that goes on within it must not write over what there is.
        self._writer = SummaryWriter(str(folder), purge_step=begin + 1, flush_secs=10, filename_suffix=f".{begin}")

    def write(self, step: int, numbers: Numbers) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(f"train/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed training goes on with; steps that it has are not sent again."""

    def __init__(self, project: str, settings: TrainSettings, identity: str) -> None:
        self._run = importlib.import_module("wandb").init(
            project=project, name=Path(settings.output).name, config=settings.model_dump(), id=identity, resume="allow"
        )
        self._first = int(getattr(self._run, "step", 0) or 0)

    def write(self, step: int, numbers: Numbers) -> None:
        if step >= self._first:
            self._run.log({"step": step, **numbers}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI. It keeps twice what is sent twice, so it is asked for the last step."""

    def __init__(
        self, experiment: str, settings: TrainSettings, identity: str | None, keep: Callable[[str], None]
    ) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._client = client = self._mlflow.MlflowClient()
        self._last = 0
        if identity is not None:
            client.update_run(identity, status="RUNNING")
            self._last = max((metric.step for metric in client.get_metric_history(identity, "loss")), default=0)
        else:
            stored = client.get_experiment_by_name(experiment)
            number = client.create_experiment(experiment) if stored is None else stored.experiment_id
            identity = client.create_run(number, run_name=Path(settings.output).name).info.run_id
            keep(identity)
            for key, value in settings.model_dump(mode="json", exclude_defaults=True).items():
                client.log_param(identity, key, str(value)[:500])
        self._identity = identity

    def write(self, step: int, numbers: Numbers) -> None:
        if step > self._last:
            metric, now = self._mlflow.entities.Metric, int(1000 * time.time())
            self._client.log_batch(self._identity, [metric(key, value, now, step) for key, value in numbers.items()])

    def close(self) -> None:
        self._client.set_terminated(self._identity)


def check_installed(settings: Training) -> None:
    """Raise UserError for a tracker that is asked for and not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(settings, name) is not None:
            try:
                importlib.import_module(name)
            except ImportError:
                raise UserError(f"{name}: the package is not installed; {install(name)}, or remove the key") from None


@contextlib.contextmanager
def tracking(settings: TrainSettings, begin: int, log: Log) -> Iterator[Callable[[int, Numbers], None]]:
    """Give the function that passes a step's numbers to every tracker.

    begin: optimizer steps done before; a resumed training goes on with the runs that trackers.json names.
    """
    output, trackers = Path(settings.output), list[Tracker]()
    runs = _read(output / RUNS) if begin else {}

    def keep(name: str, identity: str) -> None:
        runs[name] = identity
        write_atomic(output / RUNS, json.dumps(runs))

    if url_of(settings.output):
        log("TensorBoard: its files are written on disks alone; metrics.jsonl has every step")
    elif importlib.util.find_spec("tensorboardX") is None:
        log(f"TensorBoard: off, tensorboardX is not installed; {install('train')}; metrics.jsonl has every step")
    else:
        trackers.append(Tracker("TensorBoard", lambda: TensorBoard(output / TENSORBOARD, begin), log))
    if project := settings.wandb:
        if "wandb" not in runs:
            keep("wandb", secrets.token_hex(4))
        trackers.append(Tracker("wandb", lambda: WeightsAndBiases(project, settings, runs["wandb"]), log))
    if experiment := settings.mlflow:
        identity = runs.get("mlflow")
        trackers.append(
            Tracker("mlflow", lambda: MLflow(experiment, settings, identity, lambda run: keep("mlflow", run)), log)
        )

    def write(step: int, numbers: Numbers) -> None:
        for tracker in trackers:
            tracker.write(step, numbers)

    try:
        yield write
    finally:
        for tracker in trackers:
            tracker.close()


def _read(path: Path) -> dict[str, str]:
    """Return the runs that a training began, by tracker; none where it begins."""
    try:
        values = json.loads(bucket.local(path).read_text(encoding="utf-8")) if bucket.exists(path) else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
