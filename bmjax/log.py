"""What a command says while it works: one line a remark and progress bars, on standard error."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Log = Callable[[str], None]
REMINDER = 30  # seconds between lines of a long stage where no terminal shows its clock


_state = {"quiet": False}  # of the process: a command's --quiet


@contextlib.contextmanager
def quieted() -> Iterator[None]:
    """Keep every line and every bar of this process from the terminal while the block runs."""
    before, _state["quiet"] = _state["quiet"], True
    try:
        yield
    finally:
        _state["quiet"] = before


def write_line(text: str) -> None:
    """Write one line to standard error, above a progress bar where there is one."""
    from tqdm import tqdm

    if _state["quiet"]:
        return
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def is_seen_with_results() -> bool:
    """Whether one terminal shows standard error and standard output, so that a result need not be said on both."""
    return not _state["quiet"] and sys.stderr.isatty() and sys.stdout.isatty()


def silent(text: str) -> None:
    """Say nothing: the log of a caller that wants none, and of all processes but the first."""


class Bar:
    """How far a piece of work is: tqdm's bar on a terminal, elsewhere a line twice a minute. A context manager.

    The rate is the mean since the beginning. The time in which JAX compiles is no part of it, and is said.

    Attributes:
        count: what is done so far.
        total: the count at the end; None where it is not known.
    """

    def __init__(self, name: str, unit: str, total: int | None, done: int, shown: bool, lines: bool, compiles: bool):
        from tqdm import tqdm

        self._name, self._unit, self._first = name, unit, done
        self.count, self.compiling = done, 0.0
        shown = shown and not _state["quiet"]
        self._tqdm = tqdm(
            desc=name, unit=unit, unit_scale=unit == "B", total=total, initial=done, disable=None if shown else True,
            dynamic_ncols=True, leave=False, smoothing=0, file=sys.stderr,
        )  # fmt: skip
        self._lines, self._total = shown and lines and self._tqdm.disable, total
        self._began = self._said = time.perf_counter()
        self._compiled_until, self._programs, self._lock = self._began, 0, threading.Lock()
        self._monitoring: Any = None
        if compiles and shown:
            from jax import monitoring

            self._monitoring = monitoring
            monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def total(self) -> int | None:
        return self._total

    @total.setter
    def total(self, total: int | None) -> None:
        self._total = self._tqdm.total = total

    @property
    def is_bar(self) -> bool:
        """Whether a terminal shows it."""
        return not self._tqdm.disable

    def update(self, count: int) -> None:
        """Count so many more as done."""
        self.count += count
        self._tqdm.update(count)
        if self._lines and time.perf_counter() - self._said >= REMINDER:
            self._said = time.perf_counter()
            write_line(self.line())

    def remark(self, text: str) -> None:
        """Show a few words behind the bar."""
        self._tqdm.set_postfix_str(text, refresh=False)

    def refresh(self) -> None:
        """Draw the bar now."""
        self._tqdm.refresh()

    def line(self) -> str:
        """Return where the work is in one line: done, rate, time left."""
        meter = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}" + ("" if self._total is None else ", {remaining} left")
        line = self._tqdm.format_meter(
            self.count, self._total, time.perf_counter() - self._began - self.compiling, prefix=self._name,
            unit=self._unit if self._unit == "B" else f" {self._unit}", unit_scale=self._unit == "B", bar_format=meter,
            initial=self._first,
        )  # fmt: skip
        return f"{line}; compiling took {self.compiling:.0f} s beside that" if self.compiling >= 1 else line

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        """Take note of a step of JAX's compiler: a program was lowered, to be compiled next, or was compiled."""
        lowered, compiled = event.endswith("jaxpr_to_mlir_module_duration"), event.endswith("backend_compile_duration")
        if not lowered and not compiled:
            return
        with self._lock:
            if lowered:
                self._programs += 1
            else:
                now = time.perf_counter()
                # Several threads may compile at once: their time counts once.
                spent = max(0.0, now - max(now - duration_secs, self._compiled_until))
                self._compiled_until, self._programs = now, max(0, self._programs - 1)
                self.compiling += spent
                if self.is_bar:
                    self._tqdm.start_t += spent
        if self.is_bar:
            self._tqdm.set_description(f"{self._name}, compiling" if self._programs else self._name)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._monitoring is not None:
            self._monitoring.unregister_event_duration_listener(self._on_event)
        self._tqdm.close()


def progress_bar(
    name: str, unit: str, total: int | None = None, done: int = 0, *, shown: bool = True, lines: bool = True,
    compiles: bool = False,
) -> Bar:  # fmt: skip
    """Return a bar that shows how far a piece of work is.

    Arguments:
        unit: what is counted; "B" is written as kB, MB, GB.
        total, done: the count at the end and at the start.
        shown: whether anything is to be seen.
        lines: whether lines come where there is no terminal; no, where the work writes its own.
        compiles: whether JAX compiles meanwhile, which its rate leaves out.
    """
    return Bar(name, unit, total, done, shown, lines, compiles)


@contextlib.contextmanager
def stage(name: str, log: Log, estimate: str = "", patience: float = 0) -> Iterator[None]:
    """Say that a stage begins, that it goes on, and how many seconds it took.

    For work that cannot tell how far it is. A terminal shows a running clock; elsewhere a line comes twice a minute.

    Arguments:
        name: of the stage, such as "lowering the step".
        log: takes the lines; nothing is shown where it is `silent`.
        estimate: how long it takes, such as "1 to 3 minutes"; it follows the name at the beginning.
        patience: seconds before anything is said, for what may end, or fail, at once.
    """
    from tqdm import tqdm

    began, ended, said = time.monotonic(), threading.Event(), threading.Event()

    def begin() -> None:
        said.set()
        log(f"{name}{f' ({estimate})' if estimate else ''} ...")

    if not patience:
        begin()
    clock = tqdm(
        desc=name,
        bar_format="{desc} {elapsed}",
        file=sys.stderr,
        leave=False,
        disable=None if log is not silent and not _state["quiet"] else True,
    )

    def tick() -> None:
        reminded = began
        while not ended.wait(1):
            if time.monotonic() - began < patience:
                continue
            if not said.is_set():
                begin()
            clock.refresh()
            if clock.disable and time.monotonic() - reminded >= REMINDER:
                reminded = time.monotonic()
                log(f"{name}: not done after {reminded - began:.0f} s")

    ticking = threading.Thread(target=tick, name="clock", daemon=True)
    ticking.start()
    try:
        yield
    finally:
        ended.set()
        ticking.join()
        clock.close()
        if said.is_set():
            log(f"{name}: {time.monotonic() - began:.1f} s")
