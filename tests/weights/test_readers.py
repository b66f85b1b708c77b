"""Exports as others read them: transformers 4 and 5, each in an environment of its own, and llama.cpp's converter."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer

from bmjax.branch.settings import TrainSettings
from bmjax.branch.train import train
from bmjax.chat.template import named_template
from tests.branch.test_stopping import DEEPSEEK, ROWS, branch, deepseek_student  # noqa: F401
from tests.conftest import write_rows, write_student
from tests.weights.test_forms import write_fp8_student

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
np.save(out, logits.float().numpy())
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
            wanted = [f"transformers=={version}", "sentencepiece"]  # the latter for llama.cpp's converter
            install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *wanted]
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
@pytest.mark.parametrize(
    "case",
    ["added marks", "own template", "another template", "rope of 5", "yarn of 5", "tied", "sliding windows", "of FP8"],
)
def test_transformers_4_and_5_read_an_export_alike(case, packages, tmp_path, request):
    if case == "added marks":
        directory = request.getfixturevalue("branch")[0]
    elif case == "of FP8":
        # transformers 4 would load bfloat16 as float32.
        directory = export(write_fp8_student(tmp_path)[0], tmp_path, export_dtype="float32")
    else:
        rope = {"rope of 5": ROPE5, "yarn of 5": ROPE5 | {"rope_parameters": YARN}}.get(case, {})
        windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
        shape = {"tied": {"tie_word_embeddings": True}, "sliding windows": windows}.get(case, {})
        student = write_student(tmp_path / "student", **shape)
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


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Path:
    """llama.cpp's converter, from the source of a package that ships it."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    arguments = [
        "-q",
        "--no-binary",
        "llama-cpp-python",
        "--no-deps",
        "--dest",
        str(folder),
        "llama-cpp-python==0.3.36",
    ]
    if subprocess.run([sys.executable, "-m", "pip", "download", *arguments], capture_output=True).returncode:
        pytest.skip("the source of llama-cpp-python cannot be had here")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        wanted = [m for m in archive if re.search(r"llama\.cpp/(convert_hf|conversion/|gguf-py/)", m.name)]
        archive.extractall(folder, wanted, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize("marks", ["qwen", "deepseek"])
@pytest.mark.parametrize("template", [None, "qwen"])
def test_llama_cpp_converts_an_export(marks, template, qwen2_tokenizer, llama_cpp, packages, tmp_path):
    tokenizer = qwen2_tokenizer
    if marks == "deepseek":  # the same pieces of text under R1-Distill's marks
        names = dict(zip(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), DEEPSEEK, strict=False))
        values = json.loads(tokenizer.backend_tokenizer.to_str())
        values["added_tokens"] = [{**t, "content": names[t["content"]]} for t in values["added_tokens"]]
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(values)), eos_token=DEEPSEEK[0], pad_token=DEEPSEEK[0],
            additional_special_tokens=DEEPSEEK[1:3],
        )  # fmt: skip
        tokenizer.chat_template = named_template("deepseek-r1")
    student = write_student(tmp_path / "student", vocab_size=152_064, eos_token_id=tokenizer.eos_token_id)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (student / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(student)
    directory = export(student, tmp_path, template=template)
    environment = {**os.environ, "PYTHONPATH": f"{packages[4]}:{llama_cpp / 'gguf-py'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "convert_hf_to_gguf.py", str(directory), "--outfile", str(tmp_path / "x.gguf")]
    result = subprocess.run(command, cwd=llama_cpp, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "x.gguf").stat().st_size > 2e7, result.stderr[-2000:]
    end = {"qwen": 151645, "deepseek": 151647 if template else 151643}[marks]
    assert f"Setting special token type eos to {end}" in result.stderr + result.stdout
