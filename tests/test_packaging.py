"""The wheel and the source archive: they hold all of bmjax, and a fresh environment merges with the core alone."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_wrong_uses import write_model

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("bmjax", "pyproject.toml", "README.md", "LICENSE")
BUILD = (
    "from setuptools import build_meta; print(build_meta.build_wheel('dist')); print(build_meta.build_sdist('dist'))"
)

pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A fresh virtual environment with setuptools; its directory's `bin`."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    run(folder / "venv" / "bin" / "pip", "install", "--quiet", "setuptools>=77", cwd=folder)
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def built(environment, tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source archive of this tree."""
    folder = tmp_path_factory.mktemp("build")
    for part in PARTS:
        source = ROOT / part
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / part, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    (folder / "dist").mkdir()
    run(environment / "python", "-c", BUILD, cwd=folder)
    (wheel,), (archive,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, archive


def test_both_hold_every_file(built):
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "bmjax").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    wheel, archive = built
    with zipfile.ZipFile(wheel) as content:
        assert files <= {*content.namelist()}
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert files | {*PARTS} <= names


def test_the_core_merges_in_a_fresh_environment(environment, built, tmp_path):
    run(environment / "pip", "install", "--quiet", built[0], cwd=tmp_path)
    packages = {entry["name"] for entry in json.loads(run(environment / "pip", "list", "--format=json", cwd=tmp_path))}
    assert "bmjax" in packages
    assert not packages & {"torch", "transformers", "datasets", "pandas", "pyarrow", "matplotlib", "math-verify"}
    for seed, name in enumerate(("base", "math", "code")):
        write_model(tmp_path / name, seed)
    (tmp_path / "recipe.yaml").write_text("merge_method: ties\nbase_model: base\nmodels: [math, code]\n")
    report = json.loads(run(environment / "bmjax", "merge", "recipe.yaml", "out", "--json", "--quiet", cwd=tmp_path))
    assert report["tensors"] == 2 and (tmp_path / "out" / "model.safetensors").exists()
    assert "bmjax train" in run(environment / "bmjax", "train", "--help", cwd=tmp_path)
