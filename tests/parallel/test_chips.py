"""What is known of devices by their names, and a GPU's capability."""

from types import SimpleNamespace

import jax
import pytest

from bmjax.config import UserError
from bmjax.parallel.chips import gpu_capability, peak_flops, topology_devices


@pytest.mark.parametrize(
    ("text", "capability"), [("9.0", (9, 0)), ("10.3", (10, 3)), ("8.9", (8, 9)), ("gfx942", None), (None, None)]
)
def test_a_gpus_capability(monkeypatch, text, capability):
    """As numbers, so that 10 is above 9; None for GPUs of other makers and for CPUs."""
    device = SimpleNamespace() if text is None else SimpleNamespace(compute_capability=text)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert gpu_capability() == capability


def test_peaks_by_the_devices_kind():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA L40S") is None and peak_flops("cpu") is None


@pytest.mark.parametrize(
    ("name", "message"), [("v5p", "is not like v5p:4x4x4"), ("v5x:4x4", "unknown chip 'v5x'"), ("0xv5p:2", "not like")]
)
def test_malformed_topologies_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        topology_devices(name)
