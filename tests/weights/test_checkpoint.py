"""Checkpoints: exact, atomic, bounded in number, and one-line errors for a full disk or another model's files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.parallel.mesh import make_mesh, sharding
from bmjax.weights.checkpoint import DiskCheckpoints

META = {"tokens": 123456789012, "values": {"loss": 0.1, "none": None}, "list": [1, [2, "für"]], "flag": True}


def arrays(seed: int = 0) -> dict[str, Any]:
    """A small training state; bits drawn at random, so bf16 holds NaNs and subnormal numbers too."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, (16, 24), np.uint16)
    return {
        "params": {
            "embed": {"embedding": rng.standard_normal((16, 8)).astype(np.float32)},
            "w": bits.view(jnp.bfloat16),
        },
        "moments": [rng.standard_normal((3, 8, 4)).astype(np.float32), np.int32(7)],
    }


def on_device(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, sharding), state)


def abstract(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding or a.sharding), state)


def assert_exact(restored: Any, expected: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    state = on_device(arrays())
    checkpoints = DiskCheckpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    checkpoints.save(10, state, META)
    checkpoints.close()
    again = DiskCheckpoints(tmp_path / "c", keep=2)
    assert again.latest() == 10
    restored, meta = again.restore(abstract(state))
    assert_exact(restored, arrays())
    assert meta == again.meta() == META
    again.close()


def test_onto_another_mesh(tmp_path: Path) -> None:
    first, second = make_mesh({"fsdp": 4, "tensor": 2}), make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    value = np.random.default_rng(0).standard_normal((16, 8)).astype(jnp.bfloat16)
    state = {"w": jax.device_put(value, sharding(first, ("embed", "mlp"), (16, 8))), "n": jnp.float32(3)}
    checkpoints = DiskCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    target = {"w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=sharding(second, ("mlp", "embed"), (16, 8))),
              "n": jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding(second, (), ()))}  # fmt: skip
    restored, _ = checkpoints.restore(target)
    checkpoints.close()
    assert restored["w"].sharding == target["w"].sharding
    assert_exact(restored, {"w": value, "n": np.float32(3)})


def test_into_another_precision(tmp_path: Path) -> None:
    value = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    checkpoints = DiskCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, {"w": jax.device_put(value)}, {})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=device)})
    checkpoints.close()
    assert_exact(restored, {"w": value.astype(jnp.bfloat16)})


def test_keeps_multiples_besides_the_last(tmp_path: Path) -> None:
    state = on_device(arrays())
    checkpoints = DiskCheckpoints(tmp_path, keep=1, keep_every=10)
    for step in (5, 10, 15, 20, 25, 30, 35):
        checkpoints.save(step, state, {})
    assert checkpoints.latest() == 35
    checkpoints.close()
    assert steps_in(tmp_path) == ["10", "20", "30", "35"]


def test_keeps_the_last(tmp_path: Path) -> None:
    state = on_device(arrays())
    checkpoints = DiskCheckpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 17):
        checkpoints.save(step, state, {"step": step})
    assert checkpoints.latest() == 17
    assert steps_in(tmp_path) == ["15", "17"]
    assert checkpoints.restore(abstract(state))[1] == {"step": 17}
    with pytest.raises(ValueError, match="step 16 is not after the newest checkpoint, 17"):
        checkpoints.save(16, state, {})
    with pytest.raises(TypeError):
        checkpoints.save(18.0, state, {})  # type: ignore[arg-type]
    checkpoints.close()


def test_arrays_may_be_donated_after_save(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda a: a * 0 - 1, state), donate_argnums=0)
    expected = {"x": np.arange(2_000_000, dtype=np.float32)}
    checkpoints = DiskCheckpoints(tmp_path, keep=1)
    for step in range(1, 4):
        state = on_device(expected)
        shapes = abstract(state)
        checkpoints.save(step, state, {})
        jax.block_until_ready(overwrite(state))
        assert_exact(checkpoints.restore(shapes)[0], expected)
    checkpoints.close()


def test_leftovers_are_ignored_and_cleared(tmp_path: Path) -> None:
    state = on_device(arrays())
    checkpoints = DiskCheckpoints(tmp_path, keep=3)
    checkpoints.save(1, state, {})
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    again = DiskCheckpoints(tmp_path, keep=3)
    assert again.latest() == 1
    assert steps_in(tmp_path) == ["1"]
    again.save(2, state, {"two": 2})
    assert again.restore(abstract(state))[1] == {"two": 2}
    again.close()


def differing(state: Any) -> dict[str, tuple[Any, str]]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    extra = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=device)
    shapes = abstract(state)
    params = shapes["params"]
    return {
        "shape": (
            shapes | {"params": params | {"w": jax.ShapeDtypeStruct((16, 25), jnp.bfloat16, sharding=device)}},
            r"params/w is bfloat16 \[16, 24\], expected bfloat16 \[16, 25\]",
        ),
        "dtype": (
            shapes | {"params": params | {"w": jax.ShapeDtypeStruct((16, 24), jnp.int32, sharding=device)}},
            r"params/w is bfloat16 \[16, 24\], expected int32",
        ),
        "extra": (shapes | {"params": params | {"b": extra}}, r"params/b is absent, expected float32 \[2\]"),
        "fewer": ({"params": params}, r"moments/0 is float32 \[3, 8, 4\], expected absent"),
        "renamed": ({"weights": params, "moments": shapes["moments"]}, r"weights/embed/embedding is absent"),
    }


def test_another_models_checkpoint(tmp_path: Path) -> None:
    state = on_device(arrays())
    checkpoints = DiskCheckpoints(tmp_path, keep=1)
    with pytest.raises(UserError, match=r"no checkpoint$"):
        checkpoints.restore(abstract(state))
    checkpoints.save(1, state, {})
    for target, message in differing(state).values():
        with pytest.raises(UserError, match=message) as error:
            checkpoints.restore(target)
        assert str(error.value).startswith(str(tmp_path / "1")) and "\n" not in str(error.value)
    checkpoints.close()


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    state = on_device(arrays())
    checkpoints = DiskCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    assert checkpoints.latest() == 1
    for path in (tmp_path / "1").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=r"1: the checkpoint is damaged: ") as error:
        checkpoints.restore(abstract(state))
    assert "\n" not in str(error.value)
    checkpoints.close()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot hold checkpoints"):
        DiskCheckpoints(tmp_path / "file", keep=1)


def test_small_saves_are_cheap(tmp_path: Path) -> None:
    state = on_device({f"p{i}": np.ones(2**14, np.float32) for i in range(16)})  # 1 MiB
    checkpoints = DiskCheckpoints(tmp_path, keep=2)
    seconds = []
    for step in range(1, 6):
        start = time.perf_counter()
        checkpoints.save(step, state, {})
        checkpoints.latest()
        seconds.append(time.perf_counter() - start)
    checkpoints.close()
    assert min(seconds) < 0.3, seconds


FULL = """
import resource, sys
import jax.numpy as jnp
from bmjax.config import UserError
from bmjax.weights.checkpoint import DiskCheckpoints
checkpoints = DiskCheckpoints(sys.argv[1], keep=3)
checkpoints.save(1, {"x": jnp.arange(1000.)}, {"n": 1})
checkpoints.latest()
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, {"x": jnp.arange(2_000_000.)}, {"n": 2})
    checkpoints.close()
except UserError as error:
    print(error)
"""


def check_full(directory: Path, kind: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(directory), kind], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == (
        f"{directory}: cannot write a checkpoint: {message}; the earlier ones are intact, "
        "make room and run again to resume\n"
    ), done.stderr
    assert "Traceback" not in done.stderr
    assert steps_in(directory) == ["1"]
    checkpoints = DiskCheckpoints(directory, keep=3)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, meta = checkpoints.restore({"x": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=device)})
    checkpoints.close()
    assert meta == {"n": 1}
    assert np.array_equal(state["x"], np.arange(1000, dtype=np.float32))


def test_a_file_too_large(tmp_path: Path) -> None:
    check_full(tmp_path / "c", "limit", "File too large")


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        check_full(disk / "c", "disk", "No space left on device")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


KILLED = """
import sys
import jax.numpy as jnp
from bmjax.weights.checkpoint import DiskCheckpoints
checkpoints = DiskCheckpoints(sys.argv[1], keep=2)
step = checkpoints.latest() or 0
while True:
    step += 1
    checkpoints.save(step, {"x": jnp.full((300_000,), float(step)), "y": jnp.full((5,), float(step))}, {"step": step})
    print(step, flush=True)
"""


def test_a_kill_never_leaves_a_half(tmp_path: Path) -> None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"x": jax.ShapeDtypeStruct((300_000,), jnp.float32, sharding=device),
              "y": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=device)}  # fmt: skip
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(3):
                seen = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.2))
            os.kill(process.pid, signal.SIGKILL)
        checkpoints = DiskCheckpoints(tmp_path, keep=2)
        latest = checkpoints.latest()
        assert latest is not None and latest >= seen - 1  # a later save began only after the one before was whole
        state, meta = checkpoints.restore(shapes)
        checkpoints.close()
        assert meta == {"step": latest}
        assert np.unique(state["x"]).tolist() == np.unique(state["y"]).tolist() == [latest]
