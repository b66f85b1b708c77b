"""Wrong uses of every command: each is one line that names the key or file and says what to do, exit code 2.

A command line is read in a directory that `furnish` fills. Nothing that was not there may be there afterwards.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bmjax.cli import main as cli
from bmjax.cli.commands import COMMANDS
from tests.conftest import sums, write_rows, write_student

ROOT = Path(__file__).resolve().parents[1]
TENSORS = {"model.embed_tokens.weight": (32, 8), "model.layers.0.mlp.up_proj.weight": (16, 8)}
MODEL_CONFIG = {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 32, "num_hidden_layers": 1}


def write_model(directory: Path, seed: int, width: int = 8, config: dict | None = MODEL_CONFIG) -> None:
    """A model that merges: two tensors and a config."""
    directory.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=(rows, width)).astype(np.float32) for name, (rows, _) in TENSORS.items()}
    save_file(tensors, directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))


def furnish(desk: Path) -> None:
    """Fill a directory with models, rows and configs; what is wrong with some says their name."""
    for seed, name in enumerate(("base", "math", "code")):
        write_model(desk / name, seed)
    write_model(desk / "wide", 3, width=16)
    write_model(desk / "bare", 4, config=None)
    write_model(desk / "torn", 5)
    weights = desk / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (desk / "pickled").mkdir()
    (desk / "pickled" / "config.json").write_text(json.dumps(MODEL_CONFIG))
    (desk / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (desk / "empty").mkdir()
    (desk / "notes").mkdir()
    (desk / "notes" / "todo.txt").write_text("mine\n")
    write_student(desk / "student")
    write_model(desk / "llama", 6, config=MODEL_CONFIG | {"model_type": "llama"})
    write_rows(desk / "rows.jsonl", sums(20))
    trace = {"id": "0", "domain": "math", "prompt": "1+1", "reference": "2", "finish_reason": "stop"}
    write_rows(desk / "traces.jsonl", [trace | {"response": "3", "verdict": "wrong"}])
    reasoning = "I count both of them. " * 20
    write_rows(desk / "right.jsonl", [trace | {"response": "2", "reasoning": reasoning, "verdict": "right"}])
    (desk / "none.jsonl").write_text("")
    (desk / "cut.jsonl").write_text('{"prompt": "1+1", "response": "2"}\n{"prompt": "1+')
    (desk / "other.jsonl").write_text('{"input_ids": [1, 2], "labels": [1, 2]}\n')
    (desk / "a.bin").write_bytes(bytes(range(256)))
    (desk / "train.yaml").write_text(
        "student: student\ndata: rows.jsonl\noutput: out\nsteps: 1\nbatch: 8\nseq_len: 64\n"
    )
    (desk / "list.yaml").write_text("- student\n- rows.jsonl\n")
    (desk / "twice.yaml").write_text("student: student\nsteps: 1\nsteps: 2\n")
    (desk / "broken.yaml").write_text("student: [student\n")
    (desk / "tab.yaml").write_text("student: student\nmesh:\n\tfsdp: 1\n")
    (desk / "nothing.yaml").write_text("")
    (desk / "merge.yaml").write_text("merge_method: ties\nbase_model: base\nmodels: [math, code]\n")
    (desk / "linear.yaml").write_text("merge_method: linear\nmodels: [base, math, code]\n")
    (desk / "learned.yaml").write_text(
        "merge_method: learned\nbase_model: base\nmodels: [{model: math, data: rows.jsonl}]\n"
    )
    (desk / "collect.yaml").write_text(
        "problems: rows.jsonl\nprompt: '{prompt}'\nreference: '{reference}'\ndomain: math\noutput: out\n"
        "teacher: {base_url: 'http://127.0.0.1:9/v1', model: m, patience: 0.1}\n"
    )
    (desk / "select.yaml").write_text("traces: traces.jsonl\noutput: out\n")
    (desk / "eval.yaml").write_text("model: student\noutput: out\ntasks: {sums: {questions: rows.jsonl}}\n")
    (desk / "run.yaml").write_text(
        "student: student\noutput: out\nteacher: {base_url: 'http://127.0.0.1:9/v1', model: m}\ndomains:\n"
        "  math: {problems: {data: rows.jsonl, prompt: '{prompt}', reference: '{reference}'}, test_share: 0.2}\n"
        "  code: {train: {data: rows.jsonl}, test_share: 0.2}\n"
        "branch: {steps: 1, batch: 8, seq_len: 64}\nmerges: {mean: {merge_method: linear, models: [math, code]}}\n"
    )


CASES = [
    # commands, words and options
    ("trian train.yaml", ["unknown command 'trian'", "did you mean 'train'"]),
    ("--verson", ["unknown option '--verson'", "bmjax --help"]),
    ("train", ["CONFIG is missing", "bmjax train --help"]),
    ("train train.yaml --steps 3", ["unknown option '--steps'", "key=value"]),
    ("train train.yaml steps", ["'steps'", "key=value"]),
    ("train train.yaml =3", ["key=value"]),
    ("merge merge.yaml", ["OUT is missing", "bmjax merge --help"]),
    ("merge merge.yaml out --chek", ["--chek", "did you mean '--check'"]),
    ("cache everything", ["'everything'", "bmjax cache --help"]),
    ("convert student out", ["--to is missing"]),
    ("convert student out --to gguf", ["--to", "hf or orbax", "gguf"]),
    ("help trian", ["unknown command 'trian'"]),
    # config files
    ("train nowhere.yaml", ["nowhere.yaml", "no such file"]),
    ("train student", ["student", "directory"]),
    ("train a.bin", ["a.bin"]),
    ("train list.yaml", ["list.yaml", "key: value"]),
    ("train twice.yaml", ["twice.yaml", "'steps'", "twice"]),
    ("train broken.yaml", ["broken.yaml", "line"]),
    ("train tab.yaml", ["tab.yaml", "tab"]),
    ("train nothing.yaml", ["nothing.yaml", "student"]),
    ("train rows.jsonl", ["rows.jsonl"]),
    # keys and values of a training
    ("train train.yaml stpes=3", ["unknown key 'stpes'", "did you mean 'steps'"]),
    ("train train.yaml steps=ten", ["steps", "a whole number", "'ten'"]),
    ("train train.yaml steps=0", ["steps", "greater than or equal to 1"]),
    ("train train.yaml steps=-3", ["steps"]),
    ("train train.yaml steps=true", ["steps", "a whole number"]),
    ("train train.yaml learning_rate=.nan", ["learning_rate"]),
    ("train train.yaml learning_rate=-1", ["learning_rate"]),
    ("train train.yaml learning_rate=1e-5x", ["learning_rate", "a number"]),
    ("train train.yaml epochs=3", ["steps", "epochs"]),
    ("train train.yaml batch=0", ["batch"]),
    ("train train.yaml accumulate=3", ["batch 8", "accumulate 3"]),
    ("train train.yaml schedule=cosin", ["schedule", "cosine"]),
    ("train train.yaml seq_len=9999", ["seq_len", "256", "lower it"]),
    ("train train.yaml mesh={fsdp:3}", ["mesh.fsdp:3", "space"]),
    ("train train.yaml mesh.fsdp=", ["mesh.fsdp", "a whole number"]),
    ("train train.yaml 'mesh={fsdp: 0}'", ["mesh", "at least 1"]),
    ("train train.yaml 'mesh={fsdp: 64}'", ["mesh", "64 devices", "8"]),
    ("train train.yaml 'mesh={fsdp: -1, data: 3}'", ["mesh", "8 devices", "3"]),
    ("train train.yaml 'mesh={fspd: 1}'", ["mesh", "'fspd'", "fsdp"]),
    ("train train.yaml 'mesh={data: 3}'", ["batch", "mesh", "3"]),
    ("train train.yaml 'mesh={tensor: 8}'", ["mesh", "4 attention heads"]),
    ("train train.yaml attention=splash data=nowhere.jsonl", ["attention", "splash"]),
    ("train train.yaml attention=cudnn data=nowhere.jsonl", ["attention", "cudnn"]),
    ("train train.yaml attention=flash", ["attention", "splash"]),
    ("train train.yaml freeze=[layrs/*]", ["freeze", "layrs/*"]),
    ("train train.yaml template=chatlm", ["template", "chatml"]),
    ("train train.yaml template=nowhere.jinja", ["template", "nowhere.jinja"]),
    ("train train.yaml wandb=project", ["wandb", "pip install"]),
    # a training's student, data and output
    ("train train.yaml student=studnet", ["studnet", "did you mean 'student'"]),
    ("train train.yaml student=./nowhere", ["./nowhere", "no such model directory"]),
    ("train train.yaml student=rows.jsonl", ["rows.jsonl", "is a file"]),
    ("train train.yaml student=empty", ["empty", "config.json"]),
    ("train train.yaml student=llama", ["llama", "qwen2"]),
    ("train train.yaml student=Qwen/Qwen2.5-0.5", ["Qwen/Qwen2.5-0.5", "HF_HUB_OFFLINE", "HF_HOME"]),
    ("train train.yaml student=gs:bucket/model", ["student", "gs://BUCKET/PATH"]),
    ("train train.yaml student=ftp://host/model", ["student", "ftp://", "no bucket"]),
    ("train train.yaml data=nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    ("train train.yaml data=rowz.jsonl", ["rowz.jsonl", "did you mean rows.jsonl"]),
    ("train train.yaml data=none.jsonl", ["none.jsonl", "no row"]),
    ("train train.yaml data=cut.jsonl", ["cut.jsonl, line 2", "mend it"]),
    ("train train.yaml data=other.jsonl", ["other.jsonl", "row 1"]),
    ("train train.yaml data=a.bin", ["a.bin"]),
    ("train train.yaml data=empty", ["empty"]),
    ("train train.yaml data=openai/gsm8q", ["openai/gsm8q", "hub"]),
    ("train train.yaml output=rows.jsonl", ["rows.jsonl"]),
    ("train train.yaml output=/proc/foo", ["/proc/foo"]),
    ("train train.yaml output=base", ["output", "base", "new directory"]),
    # merges
    ("merge nowhere.yaml out", ["nowhere.yaml", "no such file"]),
    ("merge list.yaml out", ["list.yaml"]),
    ("merge nothing.yaml out", ["nothing.yaml"]),
    ("merge twice.yaml out", ["twice.yaml", "twice"]),
    ("merge merge.yaml out merge_method=tise", ["merge_method", "'tise'", "did you mean 'ties'"]),
    ("merge merge.yaml out merge_methd=ties", ["unknown key 'merge_methd'", "did you mean 'merge_method'"]),
    ("merge merge.yaml out parameters.densty=0.5", ["densty", "did you mean 'density'"]),
    ("merge merge.yaml out parameters.density=2", ["density"]),
    ("merge merge.yaml out parameters.density=.nan", ["density"]),
    ("merge merge.yaml out parameters.weight=half", ["weight", "a number"]),
    ("merge merge.yaml out base_model=bsae", ["bsae", "did you mean 'base'"]),
    ("merge merge.yaml out base_model=null", ["base_model"]),
    ("merge merge.yaml out models=[math,math]", ["'math'", "twice"]),
    ("merge merge.yaml out models=[]", ["ties", "1 model"]),
    ("merge merge.yaml out merge_method=slerp", ["slerp", "1 model"]),
    ("merge merge.yaml out models=[math,wide]", ["wide", "shape"]),
    ("merge merge.yaml out models=[math,torn]", ["torn", "bytes"]),
    ("merge merge.yaml out models=[math,pickled]", ["pickled", "safetensors"]),
    ("merge merge.yaml out models=[math,empty]", ["empty"]),
    ("merge merge.yaml out models=[math,org/modle]", ["org/modle", "HF_HUB_OFFLINE"]),
    ("merge merge.yaml out dtype=float23", ["dtype", "float32"]),
    ("merge merge.yaml out base_model=bare", ["bare", "config.json"]),
    ("merge merge.yaml math", ["math", "input"]),
    ("merge merge.yaml base/out", ["base", "input"]),
    ("merge merge.yaml notes", ["notes", "choose another output"]),
    ("merge merge.yaml notes --overwrite", ["notes", "never overwritten"]),
    ("merge merge.yaml rows.jsonl", ["rows.jsonl", "directory"]),
    ("merge merge.yaml /proc/foo", ["/proc/foo"]),
    ("merge merge.yaml out --memory=5apples", ["--memory", "2GiB", "5apples"]),
    ("merge merge.yaml out --shard-size=0GB", ["--shard-size", "0GB"]),
    ("merge merge.yaml out --seed=x", ["seed", "a whole number"]),
    ("merge merge.yaml out --seed", ["--seed", "a value must follow"]),
    ("merge learned.yaml out", ["base", "config.json", "num_attention_heads"]),
    ("merge linear.yaml out parameters.weight=[0.5,.inf,1]", ["weight"]),
    # conversions
    ("convert nowhere out --to orbax", ["nowhere"]),
    ("convert student student --to orbax", ["student", "exists"]),
    ("convert student out --to hf", ["student", "orbax"]),
    ("convert rows.jsonl out --to orbax", ["rows.jsonl"]),
    ("convert llama out --to orbax", ["llama", "qwen2"]),
    # teachers and traces
    ("collect collect.yaml --quiet", ["127.0.0.1:9", "running?"]),
    ("collect collect.yaml teacher.base_url=127.0.0.1:9", ["base_url", "http"]),
    ("collect collect.yaml teacher.api_key_env=NO_SUCH_KEY", ["NO_SUCH_KEY"]),
    ("collect collect.yaml teacher.samples=0", ["teacher.samples"]),
    ("collect collect.yaml teacher.temprature=1", ["teacher.temprature", "did you mean 'temperature'"]),
    ("collect collect.yaml problems=nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    ("collect collect.yaml prompt={question}", ["question", "row 1"]),
    ("collect collect.yaml domain=a/b", ["domain", "a/b"]),
    ("collect collect.yaml output=rows.jsonl", ["rows.jsonl"]),
    ("judge nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    ("judge traces.jsonl judge=maths", ["judge"]),
    ("judge other.jsonl", ["other.jsonl"]),
    ("select select.yaml traces=nowhere.jsonl", ["nowhere.jsonl", "no such file"]),
    ("select select.yaml", ["math", "none of 1"]),
    ("select select.yaml keep=[rihgt]", ["keep"]),
    ("select select.yaml decontaminate=[aime42]", ["aime42"]),
    ("select select.yaml --show many", ["--show", "a whole number", "'many'"]),
    ("select select.yaml traces=right.jsonl output=rows.jsonl", ["rows.jsonl"]),
    # scores
    ("eval eval.yaml model=nowhere", ["nowhere"]),
    ("eval eval.yaml model=base", ["base"]),
    ("eval eval.yaml tasks=[aime42]", ["tasks.aime42"]),
    ("eval eval.yaml tasks.sums.questions=nowhere.jsonl", ["nowhere.jsonl"]),
    ("eval eval.yaml base_url=http://127.0.0.1:9/v1 tasks.sums.traces=rows.jsonl", ["sums.traces", "remove base_url"]),
    ("eval eval.yaml max_new_tokens=0", ["max_new_tokens"]),
    ("eval eval.yaml base_url=http://127.0.0.1:9/v1 patience=0.1", ["127.0.0.1:9"]),
    ("eval eval.yaml compute_dtype=float8", ["compute_dtype", "float32"]),
    ("eval --compare out", ["--compare", "2 values"]),
    ("eval --compare nowhere notes", ["nowhere"]),
    ("eval eval.yaml 'mesh={data: 64}'", ["mesh", "64 devices"]),
    # plans
    ("plan train.yaml", ["--topology is missing"]),
    ("plan train.yaml --topology v9:2x2", ["v9", "v5p"]),
    ("plan train.yaml --topology v5p", ["v5p"]),
    ("plan train.yaml --topology v5p:4by4", ["v5p:4by4"]),
    # the whole loop
    ("run run.yaml domains=null", ["domains"]),
    ("run run.yaml domains.math.problems.data=nowhere.jsonl", ["nowhere.jsonl"]),
    ("run run.yaml domains.math.problems.prompt={question}", ["prompt", "text"]),
    ("run run.yaml domains.math.prblems=3", ["prblems", "did you mean 'problems'"]),
    ("run run.yaml student=nowhere", ["nowhere"]),
    ("run run.yaml --output rows.jsonl", ["rows.jsonl"]),
    ("demo --output rows.jsonl", ["rows.jsonl"]),
    ("demo sede=1", ["sede", "did you mean 'seed'"]),
    # first configs, serving, chatting
    ("completion ksh", ["'ksh'", "bash, zsh, fish"]),
    ("init trian", ["trian", "train"]),
    ("init train --output train.yaml", ["train.yaml", "exists"]),
    ("init train stpes=3", ["stpes", "did you mean 'steps'"]),
    ("push student", ["REPOSITORY"]),
    ("push nowhere me/model", ["nowhere"]),
    ("push student me/model/again --check", ["me/model/again"]),
    ("push notes me/model --check", ["notes"]),
    ("serve nowhere", ["nowhere"]),
    ("serve student --port eighty", ["--port", "'eighty'"]),
    ("serve student --port 99999", ["port"]),
    ("serve student --api-key-env NO_SUCH_KEY", ["NO_SUCH_KEY"]),
    ("chat nowhere", ["nowhere"]),
    ("chat http://127.0.0.1:9/v1", ["127.0.0.1:9"]),
    ("chat student temperature=hot", ["temperature", "a number"]),
]  # fmt: skip


def one_line(code: int, out: str, err: str) -> str:
    """The one line of a mistake."""
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("bmjax: error: ") and len(err) < 700
    return err


def content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    furnish(folder)
    return folder


def test_they_are_many():
    assert len(CASES) >= 150 and {words[0] for line, _ in CASES if (words := line.split())} > {*COMMANDS}


@pytest.mark.parametrize("line, parts", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_use_is_one_line(capsys, monkeypatch, desk, line, parts):
    monkeypatch.chdir(desk)
    before = content(desk)
    code = cli.main(shlex.split(line))
    error = one_line(code, *capsys.readouterr())
    assert not [part for part in parts if part not in error], error
    assert content(desk) == before


NOTED = [
    ("merge linear.yaml out parameters.weight=[0.5,0.5] --check", ["weight: [0.5, 0.5] goes along the depth", "model"]),
]


@pytest.mark.parametrize("line, parts", NOTED)
def test_what_may_be_meant_is_noted(capsys, monkeypatch, desk, line, parts):
    monkeypatch.chdir(desk)
    cli.main(shlex.split(line))
    text = "".join(capsys.readouterr())
    assert not [part for part in parts if part not in text], text


# Processes of their own: what the system, the network or the installation refuses, and how long a start takes.
# (command line, environment, modules that are not installed, most bytes of a file, what the line says)
UNREACHABLE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
PROCESSES = [
    ("train train.yaml stpes=3", {}, "", 0, ["did you mean 'steps'"]),
    ("merge merge.yaml out merge_method=tise", {}, "", 0, ["did you mean 'ties'"]),
    ("init train --output new.yaml", {}, "", 10, ["new.yaml", "File too large", "free some space"]),
    ("select select.yaml traces=right.jsonl", {}, "", 100, ["out", "free some space"]),
    ("merge merge.yaml out models=[math,org/model]", UNREACHABLE, "", 0,
     ["org/model", "cannot be reached", "HF_HOME"]),
    ("chat http://127.0.0.1:9/v1", {}, "httpx", 0, ["the package httpx", "pip install '.[teach]'"]),
    ("convert student out --to orbax", {}, "flax", 0, ["the package flax", "pip install '.[train]'"]),
    ("collect collect.yaml -q", {}, "", 0, ["127.0.0.1:9", "is the server running?"]),
]  # fmt: skip
RUN = """
import resource, sys
for name in {absent!r}.split():
    sys.modules[name] = None
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from bmjax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("line, environment, absent, limit, parts", PROCESSES, ids=[row[0] for row in PROCESSES])
def test_a_wrong_use_of_a_process_is_quick(desk, line, environment, absent, limit, parts):
    before, spent = content(desk), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(absent=absent, limit=limit), *shlex.split(line)],
        cwd=desk, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
    )  # fmt: skip
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    error = one_line(done.returncode, done.stdout, done.stderr)
    assert not [part for part in parts if part not in error], error
    assert now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime < 3
    assert content(desk) == before
