"""What is said to JAX before it starts, in processes of their own."""

import os
import subprocess
import sys

import pytest

COUNT = "from bmjax.parallel.start import use_cpu_cores; use_cpu_cores(); import jax; print(jax.device_count())"


def output(code: str, **environment: str) -> str:
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR") and "MEM_FRACTION" not in k
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean | environment
    )
    return done.stdout.strip()


def test_one_cpu_device_for_each_core_up_to_a_power_of_two() -> None:
    cores = min(len(os.sched_getaffinity(0)), 8)
    expected = max(n for n in (1, 2, 4, 8) if n <= cores)
    assert output(COUNT, JAX_PLATFORMS="cpu") == str(expected)


def test_devices_counted_by_the_environment_stay() -> None:
    assert output(COUNT, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=3") == "3"


def test_an_absent_tpu_is_not_looked_for(tmp_path) -> None:
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").write_text("raise RuntimeError('looked for a TPU')")
    places = os.pathsep.join([str(tmp_path), *sys.path])
    for code in (
        COUNT,
        "from bmjax.parallel.mesh import make_mesh; make_mesh(); import jax; print(jax.device_count())",
    ):
        printed = output(f"{code}; print(jax.config.jax_platforms)", JAX_PLATFORMS="", PYTHONPATH=places)
        count, platforms = printed.splitlines()
        assert int(count) >= 1 and platforms in ("cpu", "cuda,cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_a_large_freed_block_is_not_cleared_again() -> None:
    """Page faults of the second use of 256 MiB: none where freed memory is kept, 65,536 where it is not."""
    code = (
        "import ctypes, resource\n"
        "{start}\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; libc.malloc.argtypes = [ctypes.c_size_t]\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "def use():\n"
        "    block = libc.malloc(2**28); ctypes.memset(block, 1, 2**28); libc.free(block)\n"
        "use()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "use()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    start = "from bmjax.parallel.start import use_cpu_cores; use_cpu_cores()"
    assert int(output(code.format(start=start), JAX_PLATFORMS="cpu")) < 100
    assert int(output(code.format(start=""), JAX_PLATFORMS="cpu")) > 100  # the test can tell them apart


COMPILE = (
    "from bmjax.parallel.start import keep_compiled_programs; keep_compiled_programs()\n"
    "import jax, numpy as np\n"
    "print(jax.jit(lambda x: x * 3 + 1)(np.float32(2)))\n"
)


def test_compiled_programs_are_kept_for_the_next_process(tmp_path) -> None:
    assert output(COMPILE, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path)) == "7.0"
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*-cache")}
    assert kept and all("bmjax" in path.parts for path in kept)
    # One that a killed process left half-written is compiled again, without a word.
    for path, data in kept.items():
        path.write_bytes(data[: len(data) // 2])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True,
        env={**{k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
             "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""},
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("7.0", "")


def test_whoever_makes_a_mesh_keeps_compiled_programs(tmp_path) -> None:
    mesh = COMPILE.replace("parallel.start import keep_compiled_programs; keep_compiled_programs()",
                           "parallel.mesh import make_mesh; make_mesh()")  # fmt: skip
    assert output(mesh, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path / "a")) == "7.0"
    assert list((tmp_path / "a" / "bmjax").rglob("*-cache"))
    # A directory that the user has set stays.
    chosen = f"import jax; jax.config.update('jax_compilation_cache_dir', {str(tmp_path / 'mine')!r})\n{mesh}"
    assert output(chosen, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path / "b")) == "7.0"
    assert not (tmp_path / "b").exists()


def test_without_a_cache_directory_nothing_is_kept(tmp_path) -> None:
    (tmp_path / "file").touch()
    assert output(COMPILE, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path / "file")) == "7.0"
    assert output(COMPILE, JAX_PLATFORMS="cpu", XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="") == "7.0"
    assert not list(tmp_path.rglob("*-cache"))


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, ["0.95", None]), ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, ["0.5", None]),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, [None, "0.5"]),
])  # fmt: skip
def test_gpu_memory_is_taken_unless_the_user_set_it(environment, expected) -> None:
    code = (
        "import os; from bmjax.parallel.start import use_gpu_memory; use_gpu_memory(); "
        "print([os.environ.get(n) for n in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')])"
    )
    assert output(code, **environment) == str(expected)
