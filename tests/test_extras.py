"""The core merges without the packages of the extras, and what needs an extra says which."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bmjax.errors import install, missing_package

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Runs the command line in a Python that has the core's packages alone.
CORE_ONLY = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from bmjax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
MODULES = {"orbax-checkpoint": "orbax", "markdown-it-py": "markdown_it"}


def packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=;, ]", line)[0] for line in requirements}


def run_core(*words: str) -> "subprocess.CompletedProcess[str]":
    extras = PROJECT["optional-dependencies"]
    absent = packages([line for name in ("train", "teach", "report", "serve") for line in extras[name]])
    absent -= {"bmjax", *packages(PROJECT["dependencies"])}
    # The hub's client comes with httpx, anyio and their like.
    absent -= {"anyio", "certifi", "httpx", "sniffio"}
    names = {MODULES.get(name, name.replace("-", "_")) for name in absent}
    script = CORE_ONLY.format(absent=sorted(names))
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    directories = []
    for name in ("base", "math", "code"):
        directory = tmp_path / name
        directory.mkdir()
        shapes = {"model.embed_tokens.weight": (32, 8), "model.layers.0.mlp.up_proj.weight": (16, 8)}
        tensors = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(tensors, directory / "model.safetensors")
        config = {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 32, "num_hidden_layers": 1}
        (directory / "config.json").write_text(json.dumps(config))
        directories.append(str(directory))
    return directories


@pytest.mark.parametrize("method", ["ties", "arcee_fusion", "linear"])
def test_the_core_merges(tmp_path: Path, models: list[str], method: str) -> None:
    base, math, code = models
    recipe = {
        "merge_method": method,
        "base_model": base,
        "models": [math] if method == "arcee_fusion" else [math, code],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for words in (["--check"], []):
        done = run_core("merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        ("demo --output {0}", "optax", "train"),
        ("convert {0}/base {0}/out --to orbax", "flax", "train"),
        ("serve {0}/base", "uvicorn", "serve"),
        ("judge {0}/traces.jsonl", "mpmath", "teach"),
    ],
)
def test_what_needs_an_extra_says_which(
    tmp_path: Path, models: list[str], words: str, package: str, extra: str
) -> None:
    (tmp_path / "traces.jsonl").write_text("{}\n")
    done = run_core(*words.format(tmp_path).split())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"bmjax: error: this needs the package {package}, which is not installed; {install(extra)} (or '.[all]')"
    )


def test_every_extra_is_known_to_what_is_installed() -> None:
    assert set(importlib.metadata.metadata("bmjax").get_all("Provides-Extra") or []) == set(
        PROJECT["optional-dependencies"]
    )


@pytest.mark.parametrize("name", ["numpyy", "nothing.at.all", None])
def test_other_modules_are_not_explained(name: str | None) -> None:
    assert missing_package(ModuleNotFoundError("No module", name=name)) is None


def test_transformers_without_torch_is_no_alarm() -> None:
    code = "import sys; sys.modules['torch'] = None; import bmjax, transformers; transformers.AutoTokenizer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    without = code.replace("bmjax, ", "")
    assert (
        "PyTorch was not found"
        in subprocess.run([sys.executable, "-c", without], capture_output=True, text=True).stderr
    )
