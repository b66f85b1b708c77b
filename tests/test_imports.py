"""Imports point one way, phases never import each other, and `import bmjax` stays light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "bmjax").rglob("*.py"))

# A module may import its own part and the parts before it; parts in one set know nothing of each other. An entry point
# is a file that Python runs (`__main__.py`): nothing imports one.
ORDER = [
    {"version"}, {"errors"}, {"safe_yaml", "urls"}, {"config"}, {"starter"}, {"log"}, {"io"}, {"chat", "parallel"},
    {"model"}, {"weights"},
    {"teach", "branch", "merge", "generate"},
    {"plan", "calibrate", "evaluate"}, {"report"}, {"pipeline"}, {"demo"}, {"api"}, {"cli"}, {"__init__"},
    {"entry point"},
]  # fmt: skip
# Settings have to load fast: `--help` and `import bmjax.config` read no arrays.
HEAVY = {
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "transformers",
    "tokenizers",
    "datasets",
    "torch",
    "httpx",
    "matplotlib",
    "math_verify",
}


def rank(part: str) -> int:
    return next(position for position, parts in enumerate(ORDER) if part in parts)


def part_of(file: Path) -> str:
    if file.name == "__main__.py":
        return "entry point"
    return file.relative_to(ROOT / "bmjax").with_suffix("").parts[0]


def imported(file: Path, top_only: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, names from packages spelled out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = []
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return names


def ours(file: Path) -> list[tuple[int, str]]:
    return [(line, name) for line, name in imported(file) if name == "bmjax" or name.startswith("bmjax.")]


def test_every_file_has_its_place():
    assert len(FILES) > 50
    for file in FILES:
        rank(part_of(file))


def test_imports_point_one_way():
    wrong = []
    for file in FILES:
        mine = part_of(file)
        for line, name in ours(file):
            other = name.split(".")[1]
            if other != mine and rank(other) >= rank(mine):
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {mine} imports {name}")
    assert not wrong, "\n".join(wrong)


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package is its `__init__.py`."""
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports, at its top or in functions; `from package import module` is the module."""
    names = set()
    for _, name in ours(file):
        while name and name not in known:
            name = name.rpartition(".")[0]
        names.add(name)
    return names


def test_no_circle_of_modules():
    known = modules()
    remaining = {name: imports_of(file, known) - {name} for name, file in known.items()}
    while free := [name for name, needed in remaining.items() if not needed & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert not remaining, "these modules import each other in a circle: " + ", ".join(sorted(remaining))


def test_nothing_imports_an_entry_point():
    for file in FILES:
        assert file.name == "__main__.py" or not any("__main__" in name for _, name in ours(file)), file


def test_settings_import_nothing_heavy():
    for file in FILES:
        if file.name == "settings.py" or file.parent.name == "bmjax":
            if file.name == "api.py":
                continue
            names = {name.split(".")[0] for _, name in imported(file, top_only=True)}
            assert not names & HEAVY, f"{file.relative_to(ROOT)}: {names & HEAVY}"


def test_nothing_reads_pickles_or_runs_a_models_code():
    forbidden = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    for file in FILES:
        assert not {name.split(".")[0] for _, name in imported(file)} & forbidden, file
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text and "allow_pickle=True" not in text, file


def run(code: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_import_bmjax_is_light_and_fast():
    code = (
        "import time, sys; before = time.process_time(); import bmjax; spent = time.process_time() - before\n"
        "print(spent, *sorted({name.split('.')[0] for name in sys.modules})); assert 'train' in dir(bmjax)"
    )
    spent, *modules = run(code)
    assert float(spent) < 0.5
    assert not {*modules} & (HEAVY | {"pydantic", "numpy", "yaml"})


def test_the_public_names_are_there():
    import bmjax

    for name in bmjax.__all__:
        assert getattr(bmjax, name) is not None, name
    assert bmjax.UserError.__module__ == "bmjax.errors"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = bmjax.lod
    assert {"load", "save", "generate", "merge", "train", "run"} <= set(dir(bmjax))


@pytest.mark.parametrize(
    "module",
    [
        "bmjax.config",
        "bmjax.cli.main",
        "bmjax.branch.settings",
        "bmjax.evaluate.settings",
        "bmjax.teach.settings",
        "bmjax.generate.settings",
    ],
)
def test_help_needs_nothing_heavy(module):
    modules = run(f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))")
    assert not {*modules} & HEAVY
