"""A signal ends a process with one line even while a compiler's code runs."""

import signal
import subprocess
import sys

import pytest

WAIT = """
import ctypes, signal, sys
from bmjax.parallel.processes import stopping_at_once
with stopping_at_once("first"):
    pass
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
with stopping_at_once("stopped; nothing was written"):
    print("ready", flush=True)
    # A read that the signal does not end, as within code that runs no Python: glibc starts it again.
    ctypes.CDLL(None).getchar()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_foreign_code_is_one_line(number):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WAIT], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr.read() == "bmjax: stopped; nothing was written\n"
