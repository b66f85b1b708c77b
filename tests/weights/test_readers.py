"""Exports read by transformers 4 and 5, each in an environment of its own: equal tokens, templates and logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmjax.branch.settings import TrainSettings
from bmjax.branch.train import train
from tests.branch.test_stopping import ROWS, branch, deepseek_student  # noqa: F401
from tests.conftest import write_rows, write_student

VERSIONS = {4: "4.57.6", 5: None}  # None: the one that is installed

READ = """
import json, sys
import numpy as np, torch, transformers
directory, out = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
turns = [{"role": "user", "content": "Say c."}]
text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    logits = model(**ids).logits
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
np.save(out, logits.numpy())
print(json.dumps({"version": transformers.__version__, "text": text, "ids": ids["input_ids"][0].tolist(),
                  "answer": tokenizer.decode(answer), "eos": tokenizer.eos_token, "dtype": str(model.dtype)}))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[int, str]:
    """What goes before the installed packages, by the major version of transformers."""
    paths = {}
    for major, version in VERSIONS.items():
        folder = tmp_path_factory.mktemp(f"transformers{major}")
        if version is not None:
            install = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--target",
                str(folder),
                f"transformers=={version}",
            ]
            if subprocess.run(install, capture_output=True).returncode:
                pytest.skip(f"transformers {version} cannot be installed here")
        paths[major] = str(folder)
    return paths


def read(directory: Path, path: str, out: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READ, str(directory), str(out)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1]) | {"logits": np.load(out)}


def export(student: Path, folder: Path, **changes) -> Path:
    settings = TrainSettings(
        student=str(student), data=str(write_rows(folder / "rows.jsonl", ROWS)), output=str(folder / "run"), steps=2,
        batch=8, seq_len=128, packing=False, compute_dtype="float32", warmup=0, **changes,
    )  # fmt: skip
    train(settings, lambda line: None, progress=False)
    return folder / "run" / "hf"


ROPE5 = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "torch_dtype": None}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["added marks", "own template", "another template", "rope of 5", "yarn of 5"])
def test_transformers_4_and_5_read_an_export_alike(case, packages, tmp_path, request):
    if case == "added marks":
        directory = request.getfixturevalue("branch")[0]
    else:
        rope = {"rope of 5": ROPE5, "yarn of 5": ROPE5 | {"rope_parameters": YARN}}.get(case, {})
        student = write_student(tmp_path / "student")
        config = json.loads((student / "config.json").read_text())
        for key in ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype"):
            config.pop(key, None)
        values = {key: value for key, value in rope.items() if value is not None} or {"rope_theta": 10_000.0}
        (student / "config.json").write_text(json.dumps(config | values))
        changes = {"template": "qwen"} if case == "another template" else {}
        directory = export(student, tmp_path, **changes)
    results = {major: read(directory, path, tmp_path / f"{major}.npy") for major, path in packages.items()}
    assert [results[major]["version"].split(".")[0] for major in (4, 5)] == ["4", "5"]
    for key in ("text", "ids", "answer", "eos", "dtype"):
        assert results[4][key] == results[5][key], key
    np.testing.assert_allclose(results[4]["logits"], results[5]["logits"], atol=1e-4)
    if case == "added marks":
        assert results[4]["answer"] == "ccc<|im_end|>"
