"""The core merges without the packages of the extras, every extra alone does what docs/installation.md says, and what
needs an extra says which."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from safetensors.numpy import save_file

from bmjax.errors import install, missing_package
from tests.conftest import sums, write_rows

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Hides packages from the Python that runs it.
HIDING = """
import sys
from importlib.machinery import PathFinder

class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else super().find_spec(name, path, target)

sys.meta_path = [Present if finder is PathFinder else finder for finder in sys.meta_path]
from bmjax.cli.main import main
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(*extras: str) -> set[str]:
    """Return the distributions that an installation of bmjax with these extras has, bmjax's own and all they need."""
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    waiting, seen, names = [*map(Requirement, lines)], set(), {"bmjax"}
    while waiting:
        needed = waiting.pop()
        key = (canonical(needed.name), frozenset(needed.extras))
        if key in seen:
            continue
        seen.add(key)
        if needed.name == "bmjax":
            waiting += [Requirement(line) for extra in needed.extras for line in optional[extra]]
            continue
        names.add(key[0])
        try:
            further = [*map(Requirement, importlib.metadata.requires(needed.name) or ())]
        except importlib.metadata.PackageNotFoundError:  # not on this system
            continue
        of_extras = [{"extra": extra} for extra in (*needed.extras, "")]
        waiting += [line for line in further if line.marker is None or any(map(line.marker.evaluate, of_extras))]
    return names


def run_with(extras: tuple[str, ...], code: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a Python that has the packages of the core and of the extras alone."""
    present = brought_by(*extras)
    absent = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not present & {canonical(name) for name in distributions}
    }
    script = HIDING.format(absent=sorted(absent)) + code
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True, timeout=240
    )


def run_core(*words: str) -> "subprocess.CompletedProcess[str]":
    return run_with((), "sys.exit(main(sys.argv[1:]))", *words)


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


@pytest.fixture
def files(tmp_path: Path, student: Path) -> Path:
    """A directory with a model, rows to train on, traces and problems."""
    (tmp_path / "model").symlink_to(student)
    rows = sums(12)
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "problems.jsonl", [{key: row[key] for key in ("prompt", "reference")} for row in rows])
    trace = {"domain": "sums", "finish_reason": "stop", "verdict": "right"}
    write_rows(tmp_path / "traces.jsonl", [{"id": f"{n:064x}", **trace, **row} for n, row in enumerate(rows)])
    branch = {"model": "branch/hf", "data": "rows.jsonl"}
    recipe = {"merge_method": "regmean", "base_model": "model", "models": [branch]}
    recipe["parameters"] = {"rows": 2, "held_out": 2, "documents": 8, "seq_len": 128}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


# What docs/installation.md says of each extra: commands that run with it alone, and Python that does.
ALONE = {
    "train": (
        [
            "train train.yaml steps=1 batch=8",
            "convert model orbax --to orbax",
            "eval loss.yaml",
            "merge recipe.yaml merged",
        ],
        "import bmjax, bmjax.plan.plan; m = bmjax.load('model'); assert bmjax.generate(m, [[5]], max_new_tokens=1)",
    ),
    "teach": (
        [
            "judge traces.jsonl",
            "select select.yaml",
            "collect collect.yaml prompt={prompt} reference={reference} --check",
            "eval endpoint.yaml --check",
        ],
        "import bmjax, bmjax.generate.terminal; assert bmjax.judge('1/2', '0.5').verdict == 'right'",
    ),
    "report": ([], "import bmjax.report.figures, bmjax.report.page"),
    "serve": ([], "import bmjax.generate.server.serve"),
}


@pytest.mark.parametrize("extra", ALONE)
def test_an_extra_alone_does_what_it_is_for(files: Path, monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    monkeypatch.chdir(files)
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "teacher"}
    configs = {
        "train": {"student": "model", "data": "rows.jsonl", "output": "branch"},
        "loss": {"model": "model", "tasks": {"sums": {"traces": "rows.jsonl"}}, "output": "loss"},
        "select": {"traces": "traces.jsonl", "output": "selected"},
        "collect": {"problems": "problems.jsonl", "domain": "sums", "teacher": endpoint, "output": "collected"},
        "endpoint": {**endpoint, "tasks": {"sums": {"questions": "problems.jsonl"}}, "output": "scores"},
    }
    for name, values in configs.items():
        (files / f"{name}.yaml").write_text(json.dumps(values))
    commands, code = ALONE[extra]
    calls = "".join(f"assert main({words.split()}) == 0, {words!r}\n" for words in commands)
    done = run_with((extra,), calls + code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        ("demo --output out", "optax", "all"),
        ("train train.yaml", "optax", "train"),
        ("convert model out --to orbax", "flax", "train"),
        ("eval eval.yaml", "optax", "train"),
        ("serve model", "uvicorn", "serve"),
        ("judge traces.jsonl", "mpmath", "teach"),
        ("select select.yaml", "datasets", "teach"),
    ],
)
def test_what_needs_an_extra_says_which(
    files: Path, monkeypatch: pytest.MonkeyPatch, words: str, package: str, extra: str
) -> None:
    monkeypatch.chdir(files)
    configs = {
        "train": {"student": "model", "data": "rows.jsonl", "output": "out"},
        "eval": {"model": "model", "tasks": {"sums": {"traces": "rows.jsonl"}}, "output": "out"},
        "select": {"traces": "org/traces", "output": "out"},
    }
    for name, values in configs.items():
        Path(f"{name}.yaml").write_text(json.dumps(values))
    done = run_core(*words.split())
    assert done.returncode == 2, done.stderr
    otherwise = "" if extra == "all" else " (or '.[all]')"
    assert done.stderr.splitlines()[-1] == (
        f"bmjax: error: this needs the package {package}, which is not installed; {install(extra)}{otherwise}"
    )


def test_answers_are_not_left_unjudged_where_a_judge_is_missing() -> None:
    """With `train` alone a directory has a loss, and answers need `teach`: the line says so, nothing is scored."""
    code = (
        "import bmjax\n"
        "for reference, name in (('1/2', 'math'), ('B', 'choice')):\n"
        "    try:\n        bmjax.judge(reference, 'B', name)\n"
        "    except ModuleNotFoundError as error:\n        print(error)\n"
    )
    done = run_with(("train",), code)
    assert done.stdout.count("this needs the package mpmath") == 2, done.stderr
    assert done.stdout.count(install("teach")) == 2


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
