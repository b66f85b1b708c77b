import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmjax.calibrate import dispatch
from bmjax.merge.__main__ import main
from tests.merge.reference import BF16, SMALL, hf_dir, hf_tensors

BACKBONE = hf_tensors(SMALL, 0)
RECIPE = """\
sources: {math: models/math}
steps:
  - {name: mid, merge_method: arcee_fusion, base_model: models/science, models: [math]}
  - {name: student, merge_method: linear, base_model: config, models: [mid, models/science]}
out_dtype: bfloat16
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("models/math", "models/science", "config")):
        tensors = hf_tensors(SMALL, i, BACKBONE)
        hf_dir(tmp_path / name, {k: v.astype(BF16) for k, v in tensors.items()} if i == 0 else tensors)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def snapshot(directory):
    return sorted(str(path) for path in directory.rglob("*"))


def test_check_says_what_is_read_and_written(models, capsys):
    before = snapshot(models)
    assert main(["recipe.yaml", "out", "--check", "--memory", "64MiB"]) == 0
    assert snapshot(models) == before
    lines = capsys.readouterr().out.splitlines()
    values = sum(value.size for value in BACKBONE.values())
    kb = {size: f"{size * values / 1000:.1f} KB" for size in (2, 4, 6)}
    assert lines[5].endswith(" are free there")
    assert [*lines[:5], lines[5].split(";")[0]] == [
        "step mid: arcee_fusion of math into models/science",
        "step student: linear of mid, models/science",
        f"read models/science: {len(BACKBONE)} tensors, float32, 1 file, {kb[4]}",
        f"read math (models/math): {len(BACKBONE)} tensors, bfloat16, 1 file, {kb[2]}",
        f"read config: {len(BACKBONE)} tensors, float32, 1 file, config and tokenizer only",
        f"write out: {len(BACKBONE)} tensors, {kb[2]}, bfloat16, 1 file",
    ]
    assert "memory: at most 67.1 MB of tensors at a time" in lines
    assert any(line.startswith("time: about 1 s for") and kb[6] in line for line in lines)


def test_check_counts_files_and_tells_notes_and_config_changes(models, capsys):
    tensors = {k: v for k, v in BACKBONE.items() if k != "lm_head.weight"}
    hf_dir(models / "tied", tensors, tie_word_embeddings=True)
    (models / "recipe.yaml").write_text("merge_method: linear\nmodels: [tied, models/science]\n")
    assert main(["recipe.yaml", "out", "--check", "--shard-size", "50KB"]) == 0
    out = capsys.readouterr().out
    size = sum(value.nbytes for value in BACKBONE.values())
    assert f", {-(-size // 50_000)} files;" in out
    assert "config.json: tie_word_embeddings: False" in out
    assert "note: model 'tied' is tied" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.yaml", "out"], "nothing.yaml: no such file"),
        (["recipe.yaml", "models/math"], "is (or contains) the input"),
        (["recipe.yaml", "out", "--memory", "2G"], "--memory: expected a size"),
        (["recipe.yaml", "out", "--shard-size", "big"], "--shard-size: expected a size"),
        (["recipe.yaml", "out", "--seed", "x"], "seed: expected a whole number"),
        (["recipe.yaml", "out", "sources.math=models/mathe"], "no such model directory; did you mean 'models/math'?"),
        (["recipe.yaml", "out", "sources.math=misfit"], "has shape [3] in model 'math'"),
    ],
)
def test_check_fails_where_the_merge_would(models, capsys, arguments, message):
    hf_dir(models / "misfit", {**BACKBONE, "model.norm.weight": np.ones(3, np.float32)})
    before = snapshot(models)
    assert main([*arguments, "--check"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and snapshot(models) == before
    assert printed.err.startswith("bmjax: error: ") and printed.err.count("\n") == 1
    assert message in printed.err


def test_a_seed_from_the_command_line_is_the_recipes(models, monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "check", lambda recipe, *rest, **more: seen.append((recipe.seed, more)) or ())
    assert main(["recipe.yaml", "out", "--check", "--seed", "5", "--memory", "1GiB", "--shard-size", "2GB"]) == 0
    assert seen == [(5, {"memory": 2**30, "shard_bytes": 2 * 10**9, "device": "auto"})]


def test_neither_check_nor_help_loads_jax(models):
    """Half of a second's start-up would be for nothing."""
    code = "import sys; from bmjax.merge.__main__ import main; code = main(['recipe.yaml', 'out', '--check']); "
    code += "print('jax' in sys.modules, 'transformers' in sys.modules); sys.exit(code)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False False"
