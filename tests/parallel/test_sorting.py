"""NumPy's sort on processors where that by AVX-512 is slow."""

import os
import subprocess
import sys

import pytest

from bmjax.parallel import sorting

ZEN4 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n"
SET_AND_SORT = """
from pathlib import Path
from bmjax.parallel import sorting
is_zen4 = sorting._is_zen4
sorting._is_zen4 = lambda: is_zen4(Path({path!r}))
sorting.use_fast_sort()
import numpy as np
values = np.random.default_rng(0).standard_normal((8, 5000)).astype(np.float32)
print(np.array_equal(np.sort(values, axis=-1), [sorted(row) for row in values.tolist()]))
"""


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (ZEN4, True),
        (ZEN4.replace(" avx512f", ""), False),  # Zen 3
        (ZEN4.replace(": 25", ": 26"), False),  # Zen 5
        (ZEN4.replace("AuthenticAMD", "GenuineIntel"), False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),  # ARM
        ("", False),
        (None, False),  # another system
    ],
)
def test_the_processor_is_known(tmp_path, cpuinfo, expected):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert sorting._is_zen4(path) is expected


@pytest.mark.parametrize("user", [None, "AVX512_ICL"])
def test_numpy_sorts_right_whatever_is_set(tmp_path, user):
    """NumPy knows the features by the names that it is given, says nothing, and a user's choice stays."""
    path = tmp_path / "cpuinfo"
    path.write_text(ZEN4)
    environment = {k: v for k, v in os.environ.items() if k != sorting.VARIABLE}
    code = SET_AND_SORT.format(path=str(path)) + f"import os; print(os.environ[{sorting.VARIABLE!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=environment | ({sorting.VARIABLE: user} if user else {}),
    )  # fmt: skip
    right, chosen = done.stdout.splitlines()
    assert right == "True"
    assert chosen in ([user] if user else [sorting.GROUPS, sorting.SINGLE_FEATURES])
    assert done.stderr == ""


def test_nothing_is_set_once_numpy_is_there(monkeypatch):
    monkeypatch.delenv(sorting.VARIABLE, raising=False)
    monkeypatch.setattr(sorting, "_is_zen4", lambda: True)
    assert "numpy" in sys.modules
    sorting.use_fast_sort()
    assert sorting.VARIABLE not in os.environ
