"""How NumPy sorts, which has to be settled before NumPy is imported."""

import importlib.metadata
import os
import sys
from pathlib import Path

VARIABLE = "NPY_DISABLE_CPU_FEATURES"
# NumPy's names of what its AVX-512 code needs, from 2.4 on and before.
GROUPS = "X86_V4 AVX512_ICL"
SINGLE_FEATURES = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"


def use_fast_sort() -> None:
    """Have NumPy sort by AVX2 instead of AVX-512 on AMD's Zen 4: up to six times as fast.

    NumPy's AVX-512 sort stores compressed vectors, and that instruction is slow on Zen 4. No result changes. Nothing
    happens where NumPy is imported already, and where the user has set the variable.
    """
    if "numpy" in sys.modules or VARIABLE in os.environ or not _is_zen4():
        return
    major, minor, *_ = importlib.metadata.version("numpy").split(".")
    os.environ[VARIABLE] = GROUPS if (int(major), int(minor)) >= (2, 4) else SINGLE_FEATURES


def _is_zen4(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this is a processor of AMD's family 25 with AVX-512, which Zen 3 of the same family has not."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return False
    facts = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in lines)}
    return (
        facts.get("vendor_id") == ["AuthenticAMD"]
        and facts.get("cpu family") == ["25"]
        and "avx512f" in facts.get("flags", [])
    )
