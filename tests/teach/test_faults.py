"""Collecting from an endpoint that fails: nothing is lost, nothing is paid twice, no limit is exceeded."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.teach import client, waits
from bmjax.teach.collect import collect
from bmjax.teach.limits import SlidingWindow
from bmjax.teach.record import read_records
from bmjax.teach.settings import CollectSettings
from tests.teach.faulty import FaultyServer, most_in_window


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(waits, "LONGEST_WAIT", 0.3)


def write_problems(folder: Path, count: int, start: int = 0) -> str:
    path = folder / f"problems{start}-{count}.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"q{n}", "answer": f"so q{n}"}) + "\n" for n in range(start, count))
    )
    return str(path)


def settings(folder: Path, server: FaultyServer, problems: str, **changes: Any) -> CollectSettings:
    teacher = {"base_url": server.base_url, "model": "m", "timeout": 3.0, "retries": 30, **changes.pop("teacher", {})}
    source = {
        "problems": problems,
        "domain": "text",
        "judge": "exact",
        "output": str(folder / "out"),
        "teacher": teacher,
    }
    return CollectSettings.read({**source, **changes})


def check_all_there(folder: Path, count: int) -> None:
    records = list(read_records(folder / "out" / "traces.jsonl"))
    assert len({record.id for record in records}) == len(records) == count
    for record in records:
        assert (record.reasoning, record.response, record.finish_reason) == ("hm", f"so {record.prompt}", "stop")
        assert record.usage["completion_tokens"] == 20 and record.verdict == "right"


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stream", [False, True])
def test_every_sample_of_a_faulty_endpoint_is_recorded_and_paid_once(tmp_path: Path, count: int, stream: bool) -> None:
    with FaultyServer(seed=count) as server:
        teacher = {"concurrency": 64, "stream": stream}
        counts = collect(settings(tmp_path, server, write_problems(tmp_path, count), teacher=teacher))
    assert (counts["collected"], counts["failed"], counts["right"]) == (count, 0, count)
    check_all_there(tmp_path, count)
    assert sorted(server.paid) == sorted(f"q{n}" for n in range(count))
    assert len(server.arrivals) > 1.2 * count


def test_without_retries_each_sample_is_recorded_or_listed_as_failed(tmp_path: Path) -> None:
    with FaultyServer(seed=5) as server:
        asked = settings(tmp_path, server, write_problems(tmp_path, 300), teacher={"retries": 0, "timeout": 2.5})
        counts = collect(asked)
        assert counts["collected"] + counts["failed"] == 300 and counts["failed"] > 40
        listed = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
        recorded = {record.id for record in read_records(tmp_path / "out" / "traces.jsonl")}
        assert len({failure["id"] for failure in listed} | recorded) == 300 and len(listed) == counts["failed"]
        assert all(failure["error"] and failure["attempts"] == 1 for failure in listed)
        server.share = 0.0
        assert collect(asked)["collected"] == counts["failed"]
    check_all_there(tmp_path, 300)


def test_no_sliding_window_has_more_requests_than_allowed(tmp_path: Path) -> None:
    with FaultyServer(share=0.1, hang_seconds=0.4, seed=2) as server:
        teacher = {"requests_per_second": 40, "requests_per_minute": 150, "concurrency": 32}
        counts = collect(settings(tmp_path, server, write_problems(tmp_path, 110), teacher=teacher))
    assert counts["collected"] == 110
    times = [moment for moment, _ in server.arrivals]
    assert most_in_window(times, 1.0) <= 40 and most_in_window(times, 60.0) <= 150
    assert times[-1] - times[0] < 20


def test_no_sliding_window_has_more_tokens_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A minute as a second.
    monkeypatch.setattr(client, "SlidingWindow", lambda limit, seconds: SlidingWindow(limit, seconds / 60))
    with FaultyServer(share=0.1, hang_seconds=0.4, seed=4) as server:
        teacher = {"tokens_per_minute": 400, "max_tokens": 30, "concurrency": 32}
        counts = collect(settings(tmp_path, server, write_problems(tmp_path, 60), teacher=teacher))
    assert counts["collected"] == 60
    assert 25 * most_in_window(server.paid_at, 1.0) <= 400
    assert most_in_window(server.paid_at, 1.0) > 4  # the true number of tokens counts once it is known


def test_adding_and_reordering_problems_and_samples_pays_only_what_is_new(tmp_path: Path) -> None:
    with FaultyServer(share=0.0) as server:
        collect(settings(tmp_path, server, write_problems(tmp_path, 40), teacher={"samples": 2}))
        assert len(server.paid) == 80
        (tmp_path / "other.jsonl").write_text(
            "".join(json.dumps({"question": f"q{n}", "answer": f"so q{n}"}) + "\n" for n in range(50, 10, -1))
        )
        counts = collect(settings(tmp_path, server, str(tmp_path / "other.jsonl"), teacher={"samples": 2}))
        assert (counts["wanted"], counts["present"], counts["collected"]) == (80, 58, 22)
        counts = collect(settings(tmp_path, server, write_problems(tmp_path, 40), teacher={"samples": 4}))
        assert (counts["present"], counts["collected"]) == (80, 80)
    check_all_there(tmp_path, 182)


KILLED = (
    "import sys; from bmjax.teach.collect import collect; from bmjax.teach.settings import CollectSettings\n"
    "from bmjax.teach import waits; waits.FIRST_WAIT = 0.01; waits.LONGEST_WAIT = 0.3\n"
    "collect(CollectSettings.model_validate_json(sys.argv[1]))"
)


@pytest.mark.parametrize(("count", "kills"), [(300, 2), pytest.param(2000, 10, marks=pytest.mark.slow)])
def test_killed_on_the_way_the_set_is_the_same(tmp_path: Path, count: int, kills: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    traces = tmp_path / "out" / "traces.jsonl"
    with FaultyServer(seed=kills, think_seconds=0.05) as server:
        asked = settings(tmp_path, server, write_problems(tmp_path, count), teacher={"concurrency": 16})
        survivors: list[str] = []
        for kill in range(1, kills + 1):
            process = subprocess.Popen([sys.executable, "-c", KILLED, asked.model_dump_json()], env=environment)
            goal, deadline = kill * count // (kills + 1), time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if traces.exists() and traces.read_bytes().count(b"\n") >= goal:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            ids = [record.id for record in read_records(traces)]
            assert ids[: len(survivors)] == survivors
            survivors = ids
        paid_before = -1
        while paid_before != len(server.paid):  # what the killed collector had asked is answered, to no one
            paid_before = len(server.paid)
            time.sleep(1)
        counts = collect(asked)
        assert counts["collected"] == count - len(survivors) == len(server.paid) - paid_before > 0
    check_all_there(tmp_path, count)


def test_ctrl_c_once_drains_and_twice_stops_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with FaultyServer(share=0.0, think_seconds=1.5) as server:
        asked = settings(tmp_path, server, write_problems(tmp_path, 60), teacher={"concurrency": 8, "timeout": 20})
        for interrupts in (1, 2):
            config = tmp_path / "collect.yaml"
            config.write_text(asked.model_dump_json())
            process = subprocess.Popen(
                [sys.executable, "-m", "bmjax", "collect", str(config)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            before, started = len(server.arrivals), time.monotonic()
            while len(server.arrivals) < before + 8 and time.monotonic() < started + 60:
                time.sleep(0.01)
            time.sleep(0.1)
            for _ in range(interrupts):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            assert process.stderr is not None
            text = process.stderr.read()
            assert process.wait(timeout=30) == 130, text
            assert "Ctrl-C again stops now" in text and "the same command continues" in text and "Traceback" not in text
            assert len(server.arrivals) == before + 8  # nothing more is asked
            assert len(list(read_records(tmp_path / "out" / "traces.jsonl"))) == 8
        assert len(server.paid) >= 8


def test_a_server_that_dies_ends_the_run_soon(tmp_path: Path) -> None:
    with FaultyServer(share=0.0, think_seconds=0.02) as server:
        asked = settings(
            tmp_path,
            server,
            write_problems(tmp_path, 4000),
            teacher={"concurrency": 16, "patience": 1.0, "timeout": 20},
        )

        timer = threading.Timer(2.0, server.__exit__)
        timer.start()
        started = time.monotonic()
        with pytest.raises(UserError, match=r"connections lost in a row.*is the server running"):
            collect(asked)
        assert time.monotonic() - started < 30
    recorded = len(list(read_records(tmp_path / "out" / "traces.jsonl")))
    assert 0 < recorded < 4000
