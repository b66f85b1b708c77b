"""Which device a merge computes on."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.merge.__main__ import main
from bmjax.merge.engine import device, passes
from bmjax.merge.methods import METHODS
from tests.merge.reference import SMALL, hf_dir, hf_tensors


@pytest.fixture
def gpu(monkeypatch):
    """JAX as it answers on a machine with a GPU."""
    found = {"gpu": SimpleNamespace(platform="gpu", device_kind="H200"), "cpu": jax.local_devices()[0]}

    def local_devices(backend=None):
        if backend not in (None, *found):
            raise RuntimeError(f"Unknown backend {backend}")
        return [found[backend or "gpu"]]

    monkeypatch.setattr(jax, "local_devices", local_devices)
    return found


@pytest.mark.parametrize(
    ("name", "methods", "platform"),
    [
        ("auto", ["linear"], "cpu"),
        ("auto", ["slerp", "task_arithmetic"], "cpu"),
        ("auto", ["ties"], "gpu"),
        ("auto", ["linear", "arcee_fusion"], "gpu"),
        ("cpu", ["ties"], "cpu"),
        ("gpu", ["linear"], "gpu"),
    ],
)
def test_auto_leaves_to_the_cpu_what_is_as_quick_as_copying(gpu, name, methods, platform):
    assert device.choose(name, methods).platform == platform


@pytest.mark.parametrize(("name", "text"), [("tpu", r"no tpu here, only gpu.*\.\[tpu\]"), ("mps", "expected")])
def test_a_device_that_is_not_there_is_refused(gpu, name, text):
    with pytest.raises(UserError, match=text):
        device.choose(name, ["ties"])


def test_methods_bound_by_bytes_are_methods():
    assert METHODS.keys() >= device.BOUND_BY_BYTES


def test_programs_run_on_the_chosen_device_and_others_as_before():
    chosen = jax.local_devices()[3]
    program = passes.statistics()
    x = passes.block(np.ones((2, 4), np.float32), [np.zeros((2, 4), np.float32)], {})

    def other_thread():
        device.compute_on(chosen)
        return program(x, x.base, [])[0].devices()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(other_thread).result() == {chosen}
    assert program(x, x.base, [])[0].devices() == jnp.ones(1).devices() == {jax.local_devices()[0]}


def test_auto_takes_the_device_that_jax_computes_on(gpu, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [gpu["gpu"]] if backend != "cpu" else _raise())
    assert device.choose("auto", ["linear"]).platform == "gpu"  # JAX_PLATFORMS=cuda leaves no CPU
    with pytest.raises(UserError, match="JAX_PLATFORMS=gpu,cpu"):
        device.choose("cpu", ["linear"])
    chosen = SimpleNamespace(platform="gpu", device_kind="the third")
    monkeypatch.setattr(device.jax, "config", SimpleNamespace(jax_default_device=chosen))
    assert device.choose("auto", ["ties"]) is chosen and device.platform() == "gpu"


def _raise():
    raise RuntimeError("Unknown backend cpu")


def test_a_merge_says_its_device_and_refuses_what_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        hf_dir(tmp_path / name, hf_tensors(SMALL, seed))
    Path("recipe.yaml").write_text("{merge_method: ties, base_model: base, models: [math]}")
    before = jax.config.jax_default_device
    assert main(["recipe.yaml", "out", "--device", "cpu"]) == 0
    assert json.loads(Path("out/merge_report.json").read_text())["device"] == "cpu"
    assert jax.config.jax_default_device == before
    capsys.readouterr()
    for extra in ([], ["--check"]):
        assert main(["recipe.yaml", "other", "--device", "gpu", *extra]) == 2
        assert "JAX finds no gpu here, only cpu" in capsys.readouterr().err
    assert not Path("other").exists()
