"""A pytest plugin for `compare_mergekit.py --suite`: mergekit's own tests with `bmjax merge` in the place of its merge.

It runs in mergekit's environment. BMJAX_PYTHON names the interpreter that has bmjax. Results are written in small
shards, because the tests expect an index.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SHARD_SIZE = "20KB"


def merge(config: Any, out_path: str, options: Any) -> None:
    """Carry out one of mergekit's configurations with bmjax; ValueError with its error line where it refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(config.to_yaml())
        command = [os.environ["BMJAX_PYTHON"], "-m", "bmjax", "merge", str(recipe), out_path, "--quiet"]
        done = subprocess.run([*command, "--shard-size", SHARD_SIZE], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip())


def pytest_configure(config: Any) -> None:
    import mergekit.merge

    mergekit.merge.run_merge = merge
