"""Several processes train as one: the same numbers as one, the same bits after a kill, an end together.

The slow ones resume on other numbers of processes, kill peers, and end by SIGTERM.
"""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.branch.multiprocess import finish, start
from tests.conftest import sums, write_rows

STEPS = 20


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory) -> Path:
    """With config.yaml: 20 steps of packed rows, checkpoints every 3."""
    folder = tmp_path_factory.mktemp("several")
    values = {
        "student": str(student), "data": str(write_rows(folder / "rows.jsonl", sums(60))), "steps": STEPS,
        "output": "-", "seq_len": 128, "batch": 8, "accumulate": 2, "learning_rate": 3e-3, "save_every": 3,
        "compute_dtype": "float32", "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def run(folder: Path, name: str, processes: int, *overrides: str) -> list[tuple[int, str]]:
    ended = finish(start(folder / "config.yaml", processes, f"output={folder / name}", *overrides))
    assert [code for code, _ in ended] == [0] * processes, ended
    return ended


def lines(folder: Path, name: str) -> list[dict]:
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(folder: Path, name: str, steps: int) -> None:
    until = time.monotonic() + 120
    while len(lines(folder, name)) < steps:
        assert time.monotonic() < until, f"{name}: not at step {steps} after 120 s"
        time.sleep(0.02)


def same_steps(folder: Path, name: str, atol: float) -> None:
    """Every step once, of the same rows, with losses that equal the undisturbed ones'."""
    want, metrics = lines(folder, "undisturbed"), lines(folder, name)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in metrics] == [line["tokens"] for line in want]
    np.testing.assert_allclose([line["loss"] for line in metrics], [line["loss"] for line in want], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(folder) -> bytes:
    run(folder, "undisturbed", 2)
    return (folder / "undisturbed" / "hf" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def killed(folder, undisturbed) -> Path:
    """What two processes left that were killed after their eleventh step."""
    processes = start(folder / "config.yaml", 2, f"output={folder / 'killed'}")
    wait_for_steps(folder, "killed", 11)
    for process in processes:
        process.kill()
    assert [code for code, _ in finish(processes)] == [-signal.SIGKILL] * 2
    assert not (folder / "killed" / "hf").exists()
    return folder / "killed"


@pytest.mark.slow
def test_two_killed_processes_resume_to_the_same_bits(folder, undisturbed, killed):
    shutil.copytree(killed, folder / "resumed")
    said = run(folder, "resumed", 2)[0][1]
    step = int(re.search(r"resuming at step (\d+)", said)[1])
    assert 6 <= step <= 12 and step % 3 == 0
    same_steps(folder, "resumed", 0)
    assert (folder / "resumed" / "hf" / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_another_number_of_processes_sees_the_same_rows(folder, killed, processes):
    name = f"resumed{processes}"
    shutil.copytree(killed, folder / name)
    said = run(folder, name, processes)[0][1]
    assert "resuming at step" in said
    same_steps(folder, name, 1e-5)


def test_other_data_in_one_process_stops_all_of_them(folder):
    other = write_rows(folder / "other.jsonl", sums(60, seed=1))
    text = (folder / "config.yaml").read_text()
    (folder / "other.yaml").write_text(text.replace(str(folder / "rows.jsonl"), str(other)))
    first = start(folder / "config.yaml", 2, f"output={folder / 'apart'}")
    first[1].kill()
    address = next(word for word in first[0].args if word.startswith("coordinator="))
    second = start(folder / "other.yaml", 2, f"output={folder / 'apart'}", address)
    second[0].kill()
    ended = finish([first[0], second[1]])
    for code, said in ended:
        assert code == 2 and "data: process 1 has another value or other contents than process 0" in said, said
    assert not (folder / "apart" / "checkpoints").exists()


@pytest.mark.slow
def test_a_failing_process_tells_the_others_why(folder):
    """Process 0 cannot write the checkpoints; three processes, so that one is neither it nor reads it first."""
    (folder / "failing").mkdir()
    (folder / "failing" / "checkpoints").write_text("in the way")
    ended = finish(start(folder / "config.yaml", 3, f"output={folder / 'failing'}", "mesh={data: 6}", "batch=12"))
    assert [code for code, _ in ended] == [2, 1, 1]
    assert "cannot hold checkpoints" in ended[0][1]
    for _, said in ended[1:]:
        assert "bmjax: error: process 0 of 3 stopped: " in said and "cannot hold checkpoints" in said, said


@pytest.mark.slow
def test_a_dead_process_is_named_and_stops_the_others(folder):
    processes = start(folder / "config.yaml", 2, f"output={folder / 'peer'}", "steps=100000", timeout=6)
    wait_for_steps(folder, "peer", 3)
    processes[1].kill()
    began = time.monotonic()
    code, said = finish(processes[:1], 60)[0]
    assert time.monotonic() - began < 20
    # Gloo notices a closed connection; where the transport just waits, as TPUs' do, the watch speaks.
    reason = re.search(
        "(process 0 of 2: a device or another process failed|process 1 of 2 has not been heard of)", said
    )
    assert reason and code == (2 if "failed" in reason[1] else 1) and "resumes from the newest checkpoint" in said


@pytest.mark.slow
def test_when_process_0_is_killed_the_last_line_says_what_to_do(folder):
    processes = start(folder / "config.yaml", 2, f"output={folder / 'first'}", "steps=100000", timeout=6)
    wait_for_steps(folder, "first", 3)
    processes[0].kill()
    began = time.monotonic()
    (killed, its_line), (code, said) = finish(processes, 60)
    assert killed == -signal.SIGKILL and code != 0 and time.monotonic() - began < 20
    assert "bmjax: error: process 0 of 2 was killed" in its_line.splitlines()[-1]
    # Gloo may notice it first, and then the process ends by itself.
    last = said.splitlines()[-1]
    assert "process 0 at 127.0.0.1" in last or "a device or another process failed" in said
    assert last.count("bmjax: error: process 1 of 2") == 1 and "resumes from the newest checkpoint" in last


@pytest.mark.slow
def test_a_hanging_process_is_named_and_stops_the_others(folder):
    several = ["mesh={data: 6}", "batch=12", "steps=100000"]
    processes = start(folder / "config.yaml", 3, f"output={folder / 'hangs'}", *several, timeout=6)
    wait_for_steps(folder, "hangs", 3)
    processes[1].send_signal(signal.SIGSTOP)
    ended = finish([processes[0], processes[2]], 60)
    processes[1].kill()
    for code, said in ended:
        assert code == 1
        assert "process 1 of 3 has not been heard of for" in said and "resumes from the newest checkpoint" in said


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all(folder, undisturbed):
    processes = start(folder / "config.yaml", 2, f"output={folder / 'term'}")
    wait_for_steps(folder, "term", 2)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _ in ended] == [0, 0]
    step = int(re.search(r"SIGTERM: saved after step (\d+) of 20", ended[0][1])[1])
    assert (folder / "term" / "checkpoints" / str(step)).is_dir()
    run(folder, "term", 2)
    same_steps(folder, "term", 0)
    assert (folder / "term" / "hf" / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.slow
def test_twenty_kills_lose_and_repeat_nothing(folder):
    """One process that saves after every step, so that most kills fall into a save."""
    changes = ["steps=400", "save_every=1", "mesh={}", "accumulate=1", "batch=2", "track_move=false"]
    run(folder, "calm", 1, *changes)
    rng, resumed = np.random.default_rng(0), []
    for kill in range(20):
        before = len(lines(folder, "twenty"))
        (process,) = start(folder / "config.yaml", 1, f"output={folder / 'twenty'}", *changes)
        if kill % 4:  # else at any moment of the start
            wait_for_steps(folder, "twenty", before + 2)
        time.sleep(rng.uniform(0, 0.5) if kill % 4 else rng.uniform(1, 8))
        process.kill()
        said = finish([process])[0][1]
        resumed += [int(step) for step in re.findall(r"resuming at step (\d+)", said)]
    assert resumed == sorted(resumed) and len(set(resumed)) > 10 and resumed[-1] < 400
    run(folder, "twenty", 1, *changes)
    keys = ("step", "loss", "grad_norm", "tokens", "learning_rate")
    want, steps = ([[line[key] for key in keys] for line in lines(folder, name)] for name in ("calm", "twenty"))
    assert steps == want and [row[0] for row in steps] == list(range(1, 401))
    files = [folder / name / "hf" / "model.safetensors" for name in ("calm", "twenty")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["num_processes=2"], "coordinator, process_id: missing"),
        (["coordinator=host:1234"], "num_processes, process_id: missing"),
        (["coordinator=host", "num_processes=2", "process_id=0"], "coordinator: 'host' is not like host:port"),
        (["coordinator=host:1", "num_processes=2", "process_id=2"], "process_id: 2 is not one of 0 to 1"),
    ],
)
def test_settings_that_do_not_belong_together(folder, overrides, problem, capsys):
    from bmjax.cli import main as cli

    assert cli.main(["train", str(folder / "config.yaml"), *overrides]) == 2
    assert problem in capsys.readouterr().err
