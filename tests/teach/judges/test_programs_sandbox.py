"""What a program may do to this machine, and what it may use. Nothing is left of any, and no limit is passed."""

# ruff: noqa: E501  programs and replies stay as they are

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bmjax.teach.judges.programs import judge
from bmjax.teach.judges.sandbox import client
from bmjax.teach.judges.sandbox.client import Job, Outcome, run, run_program

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")


@pytest.fixture(params=["namespaces", "plain"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[str]:
    """The sandbox as it is here, and as it is on machines whose kernel refuses namespaces."""
    client._stop()
    client._current.append(client._Server(namespaces=request.param == "namespaces"))
    yield request.param
    client._stop()


def left_over(wait: float = 3.0) -> list[int]:
    """The forks of this server that are there for a while, what they have become, and orphans of any server.

    What other servers have at work is theirs.
    """
    deadline = time.monotonic() + wait
    while (left := forks()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def forks() -> list[int]:
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path("/proc", name, "cmdline").read_bytes()
            if b"sandbox.server" in words or b"86399.25" in words:
                parents[int(name)] = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
    server, left = client._server().process.pid, []
    for process in parents:
        top = process
        while parents[top] in parents:
            top = parents[top]
        if process != server and (top == server or parents[top] == 1):
            left.append(process)
    return left


def test_what_is_at_work_is_seen() -> None:
    run_program("print(1)")
    assert left_over() == []
    thread = threading.Thread(target=run_program, args=("import time\ntime.sleep(1.5)",))
    thread.start()
    deadline = time.monotonic() + 20
    while not forks() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert forks()
    thread.join()
    assert left_over() == []


HOSTILE = {
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a fork bomb that sleeps": "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)",
    "a thread bomb": "import threading\nwhile True:\n    try: threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\n"
    "    except RuntimeError: pass",
    "an endless loop": "while True: pass",
    "an endless loop that ignores signals": "import signal\nfor n in range(1, 60):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "an endless loop of children": "import os\nwhile True:\n    if os.fork() == 0:\n        sum(range(10**5)); os._exit(0)\n    os.wait()",
    "endless sleep": "import time\ntime.sleep(99999)",
    "a deadlock": "import threading\nlock = threading.Lock()\nlock.acquire(); lock.acquire()",
    "one big block of memory": "x = bytearray(8 * 2**30)\nprint(1)",
    "memory piece by piece": "x = []\nwhile True: x.append(bytearray(10**7))",
    "memory in many processes": "import os, time\nfor _ in range(20): os.fork()\nx = bytearray(b'1' * 2 * 10**8)\ntime.sleep(99)",
    "a flood of output": "while True: print('x' * 10**6)",
    "a flood of errors": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "a flood of files": "n = 0\nwhile True:\n    open(str(n), 'w').write('x' * 10**5)\n    n += 1",
    "a stack that never ends": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "daemons": "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
    "            os.execvp('sleep', ['sleep', '86399.25'])\n        os._exit(0)\ntime.sleep(0.2)\nprint(2)",
    "killing all it can": "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nexcept OSError: pass\nwhile True: pass",
    "killing its parent": "import os, signal\ntry: os.kill(os.getppid(), signal.SIGKILL)\nexcept OSError: pass\nraise SystemExit(1)",
    "more time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))\nwhile True: pass",
}  # fmt: skip


@linux
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_programs_are_contained(kind: str) -> None:
    reference = {"tests": [{"input": "", "output": "1"}], "seconds": 1, "memory_mib": 512}
    begun = time.monotonic()
    verdict = judge(reference, f"```python\n{HOSTILE[kind]}\n```")
    assert verdict.verdict == "wrong", verdict
    assert time.monotonic() - begun < 60
    assert left_over() == []
    assert judge(reference, "```python\nprint(1)\n```").verdict == "right"


@linux
@pytest.mark.parametrize("kind", ["a fork bomb", "an endless loop", "memory piece by piece", "daemons", "a deadlock"])
def test_hostile_programs_are_contained_without_namespaces(kind: str) -> None:
    if os.geteuid() != 0 and "fork" in kind:
        pytest.skip("the processes of this user are counted together")
    client._stop()
    client._current.append(client._Server(namespaces=False))
    try:
        test_hostile_programs_are_contained(kind)
    finally:
        client._stop()


def printed(source: str, **settings: float) -> Outcome:
    return run(Job(source, **settings))  # type: ignore[arg-type]


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    targets = [str(tmp_path / "made"), "/tmp/bmjax-made", str(Path(__file__).with_name("made")), "/dev/shm/bmjax-made"]
    source = (
        f"for path in {targets}:\n    try: open(path, 'w').write('x')\n    except OSError: pass\n"
        "open('made', 'w').write('x')\nprint(open('made').read())"
    )
    assert run_program(source).stdout == "x\n"
    if client._server() and _has_namespaces():
        assert not any(os.path.exists(path) for path in targets)


def _has_namespaces() -> bool:
    return run_program("import os\nprint(os.getpid())").stdout == "2\n"


def test_runs_do_not_see_each_other(sandbox: str) -> None:
    assert run_program("open('note', 'w').write('x')\nprint(1)").stdout == "1\n"
    assert run_program("import os\nprint(sorted(os.listdir()))").stdout == "['main.py']\n"
    if _has_namespaces():
        assert run_program("import os\nprint(sum(map(str.isdigit, os.listdir('/proc'))))").stdout == "2\n"


def test_the_network_is_out_of_reach() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        source = (
            "import socket\ntry:\n"
            f"    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)\n    print('reached')\n"
            "except OSError as error:\n    print('no network')"
        )
        if _has_namespaces():
            assert run_program(source).stdout == "no network\n"


def test_the_environment_is_not_handed_over(monkeypatch: pytest.MonkeyPatch, sandbox: str) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    client._stop()
    source = "import os\nprint(os.environ.get('SOME_API_KEY'))\nprint(sorted(map(int, os.listdir('/dev/fd')))[:4])"
    assert run_program(source).stdout.startswith("None\n")
    if _has_namespaces():
        source = (
            "import os\nfor name in os.listdir('/proc'):\n    if name.isdigit():\n"
            "        try: print(b'secret' in open(f'/proc/{name}/environ', 'rb').read())\n"
            "        except OSError: print(False)"
        )
        assert "True" not in run_program(source).stdout


@linux
def test_a_program_has_no_rights() -> None:
    status = run_program("print(open('/proc/self/status').read())").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Uid"].split()[0] != "0"


def test_cpu_time_is_the_limit_and_a_reference_may_set_it() -> None:
    busy = "import time\nwhile time.process_time() < 0.8: pass\nprint(1)"
    pair = {"input": "", "output": "1"}
    assert judge({"tests": [pair], "seconds": 0.3}, f"```python\n{busy}\n```").verdict == "wrong"
    for limit in ({"seconds": 4}, {"time_limit": "4 seconds"}, {"timeout_ms": 4000}, {}):
        assert judge({"tests": [pair], **limit}, f"```python\n{busy}\n```").verdict == "right"
    reason = judge({"tests": [pair], "seconds": 0.3}, f"```python\n{busy}\n```").reason
    assert reason == "test 1 of 1: ran longer than 0.3 s of CPU time"


def test_on_a_slow_machine_the_limit_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine that takes four times as long for the unit of work gives a program four times the seconds.
    busy = "```python\nimport time\nwhile time.process_time() < 0.5: pass\nprint(1)\n```"
    reference = {"tests": [{"input": "", "output": "1"}], "seconds": 0.3}
    assert judge(reference, busy).verdict == "wrong"
    monkeypatch.setattr(client._server(), "factor", 4.0)
    assert judge(reference, busy).verdict == "right"


def test_each_test_has_the_whole_limit() -> None:
    program = "import time\ndef f(x):\n    end = time.process_time() + 0.4\n    while time.process_time() < end: pass\n    return x"
    asserts = {"tests": [f"assert f({n}) == {n}" for n in range(3)], "seconds": 0.7}
    calls = {"fn_name": "f", "inputs": [[0], [1], [2]], "outputs": [0, 1, 2], "seconds": 0.7}
    for reference in (asserts, calls):
        assert judge(reference, f"```python\n{program}\n```").verdict == "right"
        assert judge(reference, f"```python\n{program.replace('0.4', '1.5')}\n```").verdict == "wrong"


def test_memory_is_the_limit_of_all_processes_together() -> None:
    source = "import time\nx = bytearray(b'1' * 300 * 2**20)\ntime.sleep(0.3)\nprint(1)"
    assert printed(source, memory_mib=200).ended_by == "memory"
    assert printed(source, memory_mib=1000).stdout == "1\n"


def test_a_busy_machine_is_no_fault_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_WALL_FACTOR", 0.0)
    monkeypatch.setattr(client, "_WALL_SECONDS", 0.3)
    verdict = judge({"tests": ["assert f(1)"], "seconds": 60}, "```python\ndef f(x):\n    while True: pass\n```")
    assert verdict.verdict == "unjudged" and "too busy" in verdict.reason


@pytest.mark.slow
def test_sixteen_at_once_are_judged_as_they_are_one_by_one() -> None:
    busy = "import time\nwhile time.process_time() < 2: pass\nprint(1)"
    reference = {"tests": [{"input": "", "output": "1"}], "seconds": 3}
    with ThreadPoolExecutor(16) as pool:
        verdicts = list(pool.map(lambda _: judge(reference, f"```python\n{busy}\n```").verdict, range(16)))
    assert verdicts == ["right"] * 16


def test_a_server_that_was_killed_starts_again() -> None:
    assert run_program("print(1)").stdout == "1\n"
    server = client._server()
    server.process.kill()
    server.process.wait()
    assert run_program("print(2)").stdout == "2\n"


@linux
@pytest.mark.parametrize("namespaces", [True, False])
def test_nothing_is_left_when_bmjax_is_killed(namespaces: bool) -> None:
    source = "import os, time\nif os.fork() == 0: os.setsid()\nos.write(1, b'x')\ntime.sleep(600)"
    code = (
        "from bmjax.teach.judges.sandbox import client\n"
        f"client._current.append(client._Server({namespaces}))\n"
        f"print(client._current[0].process.pid, flush=True)\nclient.run(client.Job({source!r}, seconds=600))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    server = int(process.stdout.readline())
    deadline = time.monotonic() + 30
    while len(family := descendants(server)) < (4 if namespaces else 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(family) >= 3
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in [server, *family] if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def descendants(process: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
        children = [int(word) for word in text.split()]
    return children + [pid for child in children for pid in descendants(child)]


def alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_many_threads_get_their_own_outcomes() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: run_program(f"print({n})").stdout, range(24)))
    assert texts == [f"{n}\n" for n in range(24)]


def test_a_process_that_forks_gets_a_server_of_its_own() -> None:
    run_program("print(1)")
    parent = client._server().process.pid
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(
                writing, f"{run_program('print(3)').stdout.strip()} {client._server().process.pid != parent}".encode()
            )
            client._stop()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"3 True"
    assert run_program("print(2)").stdout == "2\n"


def test_what_a_program_prints_comes_back_whole() -> None:
    outcome = run_program(
        "import sys\nprint(input())\nprint('é')\nsys.stdout.flush()\nsys.stdout.buffer.write(b'\\xff')\nsys.exit(3)",
        "a\r\n",
    )
    assert (outcome.stdout, outcome.exit_code, outcome.ended_by) == ("a\r\né\n�", 3, "exit")
    assert run_program("raise KeyError('x')").error == "KeyError: 'x'"
    assert threading.active_count() < 50


def test_programs_are_judged_the_same_every_time() -> None:
    source = "print({'a', 'b', 'c', 'd', 'e', 'f'})"
    assert len({run_program(source).stdout for _ in range(3)}) == 1
