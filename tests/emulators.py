"""Buckets on this machine: servers that speak S3's and Google Cloud Storage's protocols, from memory."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

BUCKET = "bucket"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """Run a server until the block ends; yields its address."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{command[0]} did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def emulators() -> Iterator[dict[str, str]]:
    """Start both servers with an empty bucket each; yields the environment that names them."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported
    for package in ("moto", "gcp_storage_emulator", "s3fs", "gcsfs"):
        pytest.importorskip(package)
    s3, gs = free_port(), free_port()
    # It lets five connections wait; those that the system turns away come again after a second.
    start = "import socketserver as s; s.TCPServer.request_queue_size = 256; "
    start += "from gcp_storage_emulator.__main__ import main; main()"
    google = ["start", "--host", "127.0.0.1", "--port", str(gs), "--in-memory", f"--default-bucket={BUCKET}"]
    with (
        serving([sys.executable, "-m", "moto.server", "-p", str(s3)], s3) as s3_address,
        serving([sys.executable, "-c", start, *google], gs) as gs_address,
    ):
        environment = {
            "AWS_ENDPOINT_URL": s3_address, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "STORAGE_EMULATOR_HOST": gs_address,
        }  # fmt: skip
        subprocess.run(
            [sys.executable, "-c", f"import s3fs; s3fs.S3FileSystem().mkdir({BUCKET!r})"],
            env=os.environ | environment, check=True,
        )  # fmt: skip
        yield environment


@pytest.fixture(scope="session")
def emulator_environment():
    with emulators() as environment:
        yield environment


@pytest.fixture(scope="module")
def buckets(emulator_environment):
    """Let this process and those that it starts see the emulators."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in emulator_environment.items():
            patch.setenv(name, value)
        yield emulator_environment
