"""Names of TPU slices: XLA's shapes and Google's sizes."""

import pytest

from bmjax.config import UserError
from bmjax.parallel.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("v5p:4x4x4", (1, "v5p", "4x4x4")),
        ("V5P:4x4x4", (1, "v5p", "4x4x4")),
        ("2xv5p:4x4x4", (2, "v5p", "4x4x4")),
        ("v5p-128", (1, "v5p", "4x4x4")),
        ("v5p-8", (1, "v5p", "2x2x1")),
        ("v4-8", (1, "v4", "2x2x1")),
        ("v4-4096", (1, "v4", "8x16x16")),
        ("v5litepod-16", (1, "v5e", "4x4")),
        ("v5e-16", (1, "v5e", "4x4")),
        ("v6e-8", (1, "v6e", "2x4")),
        ("tpu-v6e-16x16", (1, "v6e", "16x16")),
        ("V6E-256", (1, "v6e", "16x16")),
        ("4xv6e-256", (4, "v6e", "16x16")),
        ("tpu7x:2x2x1", (1, "tpu7x", "2x2x1")),
        ("TPU7x-128", (1, "tpu7x", "4x4x4")),
        ("ironwood-8", (1, "tpu7x", "2x2x1")),
    ],
)
def test_a_slice_by_shape_and_by_googles_name(name, parsed):
    assert parse_topology(name) == parsed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("8xh100", "GPUs cannot be planned for"),
        ("a3-highgpu-8g", "GPUs cannot be planned for"),
        ("l40s", "GPUs cannot be planned for"),
        ("NVIDIA-H100-80GB", "GPUs cannot be planned for"),
        ("ironwood", "'ironwood' is not like v5p:4x4x4"),
        ("h100:8", "h100:8: GPUs cannot be planned for"),
        ("H200-8", "GPUs cannot be planned for"),
        ("a100", "GPUs cannot be planned for"),
        ("v3-8", "TPU v3 cannot be planned for; v4, v5e, v5p, v6e, tpu7x can"),
        ("v5q:4x4x4", "unknown chip 'v5q'; did you mean 'v5p'"),
        ("v5p-100", "Google has no slice of that size; v5p- 8, 16, 32"),
        ("v5p", "'v5p' is not like v5p:4x4x4"),
        ("0xv5p:4x4x4", "is not like v5p:4x4x4"),
        ("", "is not like v5p:4x4x4"),
    ],
)
def test_what_cannot_be_planned_is_said(name, message):
    with pytest.raises(UserError, match=message) as error:
        parse_topology(name)
    assert "\n" not in str(error.value)
