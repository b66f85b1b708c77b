"""Merges that are killed, interrupted, raced or out of disk: the result is the same bytes, or nothing changed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import SharedWriter
from bmjax.merge.__main__ import main
from bmjax.merge.engine import chunks, files, stream
from tests.merge.reference import SMALL, hf_dir, hf_tensors

REPOSITORY = Path(__file__).parents[3]
JOURNAL = ".out.partial/merge_journal.jsonl"
NAMES = ("base", "math", "code", "science")
TIES = {"merge_method": "ties", "base_model": "base", "models": ["math", "code"], "parameters": {"density": 0.5}}
BASE = hf_tensors(SMALL, 0)

HELP = "; free some space, or write to another place; nothing was changed"


def errors(printed):
    """What was printed but for notes."""
    return [line for line in printed.splitlines() if not line.startswith("bmjax: note: ")]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# Processes that are killed


def write_large(root: Path, rows: int, tensors: int) -> None:
    """Models of `tensors` bfloat16 matrices of `rows` rows, and a recipe of two steps."""
    rng = np.random.default_rng(0)
    shape = (rows, 1024)
    base = 0.1 * (rng.random(shape, np.float32) - 0.5)
    for i, name in enumerate(NAMES):
        (root / name).mkdir()
        plan = [(f"model.layers.{k}.up.weight", np.dtype(ml_dtypes.bfloat16), shape) for k in range(tensors)]
        change = 0.001 * (rng.random(shape, np.float32) - 0.5)
        with SharedWriter(root / name, plan, 2 * base.nbytes) as writer:
            for k, (tensor, dtype, _) in enumerate(plan):
                writer.write(tensor, 0, (np.roll(base, k, 0) + (i > 0) * np.roll(change, 7 * k, 1)).astype(dtype))
        (root / name / "config.json").write_text(json.dumps({"model_type": "other", "made for": name}))
        (root / name / "additional_chat_templates").mkdir()
        (root / name / "additional_chat_templates/tools.jinja").write_text(name)
    (root / "recipe.yaml").write_text(
        "steps:\n"
        "- {name: mid, merge_method: dare_ties, base_model: base, models: [math, code], parameters: {density: 0.5}}\n"
        "- {merge_method: ties, base_model: base, models: [mid, science], parameters: {density: 0.3}}\n"
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(folder of large models, what a merge of them that nobody disturbs writes, its seconds)."""
    root = tmp_path_factory.mktemp("large")
    write_large(root, 512, 14)
    start = time.monotonic()
    finish(root, out="undisturbed")
    seconds = time.monotonic() - start
    yield root, snapshot(root / "undisturbed"), seconds
    shutil.rmtree(root)


def start(root: Path, *options: str, out: str = "out") -> subprocess.Popen:
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "bmjax.merge", "recipe.yaml", out, "--quiet", "--shard-size", "8MB", *options],
        cwd=root, env={**os.environ, "PYTHONPATH": paths}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Tests that a script runs in the background would hand down that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(root: Path, *options: str, out: str = "out") -> None:
    with start(root, *options, out=out) as process:
        try:
            printed = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, printed) == (0, ("", ""))


def lines(root: Path) -> int:
    """How many lines the journal has."""
    try:
        return (root / JOURNAL).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for_lines(root: Path, process: subprocess.Popen, count: int) -> None:
    """Until the journal has `count` lines."""
    deadline = time.monotonic() + 120
    while lines(root) < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> tuple[str, str]:
    process.send_signal(number)
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def clean(large):
    """`large`, with no OUT before and after."""
    root, expected, seconds = large

    def clear() -> None:
        for name in ("out", ".out.partial", ".out.replaced"):
            shutil.rmtree(root / name, ignore_errors=True)

    clear()
    yield root, expected, seconds
    clear()


@pytest.mark.parametrize("count", [3, 10])
def test_a_killed_merge_resumes_to_the_same_bytes(clean, count):
    root, expected, _ = clean
    shutil.copytree(root / "science", root / "out")
    old = snapshot(root / "out")
    process = start(root, "--overwrite")
    wait_for_lines(root, process, count)
    end(process)
    assert process.returncode == -signal.SIGKILL
    assert snapshot(root / "out") == old and hidden(root) == [".out.partial"]
    finish(root, "--overwrite")
    assert snapshot(root / "out") == expected
    assert hidden(root) == []


@pytest.mark.slow
def test_twenty_kills_at_random_moments(clean):
    root, expected, seconds = clean
    rng = np.random.default_rng(int(os.environ.get("BMJAX_KILL_SEED", "0")))
    kills = 0
    while kills < 20:
        for _ in range(rng.integers(1, 4)):  # one merge may be killed several times
            process = start(root)
            time.sleep(rng.uniform(0.2, 1.1) * seconds)
            end(process)
            kills += process.returncode == -signal.SIGKILL
        if not (root / "out").exists():
            finish(root)
        assert snapshot(root / "out") == expected
        assert hidden(root) == []
        shutil.rmtree(root / "out")


def test_an_interrupted_merge_says_that_it_resumes(clean):
    root, expected, _ = clean
    process = start(root)
    wait_for_lines(root, process, 4)
    before = time.monotonic()
    out, err = end(process, signal.SIGINT)
    assert process.returncode == 130
    assert time.monotonic() - before < 10
    assert out == ""
    assert err == "bmjax: interrupted; OUT is as it was, and the same command goes on with the merge\n"
    assert not (root / "out").exists() and hidden(root) == [".out.partial"] and lines(root) >= 4
    finish(root)
    assert snapshot(root / "out") == expected


def test_a_second_run_is_refused_while_one_works(clean, monkeypatch, capsys):
    root, expected, _ = clean
    monkeypatch.chdir(root)
    process = start(root)
    try:
        wait_for_lines(root, process, 1)  # early, because on a busy machine the merge goes on before it stops
        process.send_signal(signal.SIGSTOP)
        before = lines(root)
        assert main(["recipe.yaml", "out"]) == 2
        error = capsys.readouterr().err
        assert error.endswith("bmjax: error: out: another process is writing it; wait for it, or stop it\n")
        assert lines(root) == before
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == 0
    finally:
        process.kill()
        process.wait()
    assert snapshot(root / "out") == expected


@pytest.mark.parametrize(
    "memory", ["512MiB", *(pytest.param(memory, marks=pytest.mark.slow) for memory in ("1MB", "16MiB", "8GiB", None))]
)
def test_the_same_bytes_again_and_in_any_memory(clean, memory):
    root, expected, _ = clean
    finish(root, *(() if memory is None else ("--memory", memory)))
    assert snapshot(root / "out") == expected


# The same in this process: an interrupt after so many tensors


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Small models in the current directory."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(NAMES):
        folder = hf_dir(tmp_path / name, hf_tensors(SMALL, i, BASE) if i else BASE)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tools.jinja").write_text(name)
    return tmp_path


def interrupt(after: int, recipe=TIES, **options) -> None:
    """A merge to `out` that Ctrl-C ends when `after` tensors are done."""
    done: list[str] = []

    def progress(now: int, total: int, name: str) -> None:
        done.append(name)
        if len(done) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, "out", progress=progress, **options)


@pytest.fixture
def written(monkeypatch):
    """The names of tensors that are written from now on."""
    names: set[str] = set()
    write = SharedWriter.write

    def spy(self, name, start, data):
        names.add(name)
        write(self, name, start, data)

    monkeypatch.setattr(SharedWriter, "write", spy)
    return names


def reference(root: Path, recipe=TIES, **options) -> dict[str, bytes]:
    merge(recipe, "reference", **options)
    return snapshot(root / "reference")


def entries(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / JOURNAL).read_text().splitlines()[1:]]


ARCEE = {"merge_method": "arcee_fusion", "base_model": "base", "models": ["math"]}


@pytest.mark.parametrize("recipe, after", [(TIES, 1), (TIES, 9), (ARCEE, 9), (ARCEE, len(BASE))])
def test_resuming_makes_only_missing_tensors(models, written, recipe, after):
    expected = reference(models, recipe)
    interrupt(after, recipe)
    done = {line["name"] for line in entries(models)}
    assert len(done) >= after
    written.clear()
    merge(recipe, "out")
    assert written == set(BASE) - done
    assert snapshot(models / "out") == expected
    assert hidden(models) == []


@pytest.mark.parametrize("damage", [b'{"name": "x", "dig', b"\0" * 100, b"\xff\xfe\n", b"5\n", b"[]\n{}\n", b"null\n"])
def test_a_journal_with_a_damaged_end(models, written, damage):
    expected = reference(models)
    interrupt(5)
    done = {line["name"] for line in entries(models)}
    with open(models / JOURNAL, "ab") as file:
        file.write(damage)
    written.clear()
    merge(TIES, "out")
    assert written == set(BASE) - done
    assert snapshot(models / "out") == expected


def test_a_journal_with_a_cut_last_line(models, written):
    expected = reference(models)
    interrupt(5)
    *done, last = entries(models)
    os.truncate(models / JOURNAL, (models / JOURNAL).stat().st_size - 10)
    written.clear()
    interrupt(len(done) + 1)  # and again, so that its lines stand after the cut one
    assert last["name"] not in {line["name"] for line in done}
    merge(TIES, "out")
    assert not written & {line["name"] for line in done}
    assert snapshot(models / "out") == expected


@pytest.mark.parametrize("content", [b"", b"{", b'{"merge": "another"}\n', b"\xff"])
def test_a_journal_of_another_merge_is_ignored(models, written, content):
    expected = reference(models)
    interrupt(5)
    (models / JOURNAL).write_bytes(content)
    written.clear()
    merge(TIES, "out")
    assert written == set(BASE)
    assert snapshot(models / "out") == expected


def test_a_damaged_tensor_is_made_again(models, written):
    expected = reference(models)
    interrupt(6)
    done = [line["name"] for line in entries(models)]
    file = models / ".out.partial/model.safetensors"
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first = 8 + int.from_bytes(content[:8], "little")
    with open(file, "r+b") as opened:
        opened.seek(first + header[done[0]]["data_offsets"][1] - 1)
        opened.write(bytes([content[first + header[done[0]]["data_offsets"][1] - 1] ^ 1]))
        opened.seek(first + header[done[1]]["data_offsets"][0])
        opened.write(bytes([content[first + header[done[1]]["data_offsets"][0]] ^ 128]))
    written.clear()
    merge(TIES, "out")
    assert written == set(BASE) - set(done[2:])
    assert snapshot(models / "out") == expected


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"density": 0.4}}, {"models": ["code", "math"]}, {"seed": 1}, {"dtype": "bfloat16"},
        {"merge_method": "dare_ties"}, {"base_model": "science"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_recipe_starts_anew(models, written, change):
    expected = reference(models, TIES | change)
    interrupt(5)
    written.clear()
    merge(TIES | change, "out")
    assert written == set(BASE)
    assert snapshot(models / "out") == expected


def test_changed_weights_and_other_shards_start_anew(models, written):
    interrupt(5)
    written.clear()
    merge(TIES, "out", shard_bytes=9000)
    assert written == set(BASE)
    shutil.rmtree("out")
    interrupt(5)
    shutil.rmtree("math")
    hf_dir(models / "math", hf_tensors(SMALL, 9, BASE))
    written.clear()
    merge(TIES, "out")
    assert written == set(BASE)


def test_leftovers_of_a_late_kill_are_not_in_the_result(models):
    expected = reference(models)
    interrupt(len(BASE))
    partial = models / ".out.partial"
    shutil.copytree("base/additional_chat_templates", partial / "additional_chat_templates")
    (partial / "chat_template.jinja").write_text("of a donor that has it no more")
    (partial / "config.json").write_text("{")
    merge(TIES, "out")
    assert snapshot(models / "out") == expected
    shutil.rmtree("out")
    # Killed after the journal was removed: nothing tells whose these are.
    shutil.copytree("reference", partial)
    (partial / "folder").mkdir()
    merge(TIES, "out")
    assert snapshot(models / "out") == expected and hidden(models) == []


def test_a_link_to_an_unfinished_merge_is_not_followed(models):
    (models / "thesis").mkdir()
    (models / "thesis/chapter.tex").write_text("years of work")
    os.symlink("thesis", models / ".out.partial")
    with pytest.raises(UserError, match="out: cannot write"):
        merge(TIES, "out")
    assert (models / "thesis/chapter.tex").read_text() == "years of work"
    assert not (models / "out").exists()


def test_a_kill_between_the_renames_restores_the_old_result(models):
    merge(TIES, "out")
    old = snapshot(models / "out")
    (models / "out").rename(models / ".out.replaced")
    interrupt(1, TIES | {"seed": 1})
    assert snapshot(models / "out") == old
    merge(TIES | {"seed": 1}, "out", overwrite=True)
    assert hidden(models) == []


# Full disks


def fail_from(monkeypatch, function: str, call: int) -> None:
    """The system's `function` finds the disk full from that call on."""
    real, calls = getattr(os, function), [0]

    def failing(*arguments):
        calls[0] += 1
        if calls[0] >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize(
    "function, call", [("posix_fallocate", 1), ("posix_fallocate", 3), ("pwrite", 1), ("pwrite", 12), ("fsync", 1)]
)
def test_a_full_disk_changes_nothing(models, monkeypatch, capsys, function, call):
    merge({"merge_method": "linear", "models": ["math", "code"]}, "out")
    (models / "recipe.json").write_text(json.dumps(TIES))
    before = snapshot(models)
    fail_from(monkeypatch, function, call)
    assert main(["recipe.json", "out", "--overwrite", "--shard-size=9KB"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = errors(printed.err)
    assert line == f"bmjax: error: out: cannot write: No space left on device{HELP}"
    assert snapshot(models) == before and hidden(models) == []


def test_too_little_space_is_known_before_anything_is_read(models, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    monkeypatch.setattr(files, "Stream", None)
    with pytest.raises(UserError, match=r"out: the result takes .* KB, 5\.0 KB are free there"):
        merge(TIES, "out")
    assert not (models / "out").exists() and hidden(models) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from bmjax.merge.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_limit_on_files_changes_nothing(models):
    (models / "recipe.json").write_text(json.dumps(TIES))
    before = snapshot(models)
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "recipe.json", "out"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert errors(done.stderr) == [f"bmjax: error: out: cannot write: File too large{HELP}"]
    assert snapshot(models) == before and hidden(models) == []


# The same bytes in any memory


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "arcee_fusion", "sce", "karcher"])
def test_small_chunks_give_the_same_bytes_in_any_memory(models, monkeypatch, method):
    for module in (chunks, stream):
        monkeypatch.setattr(module, "CHUNK", 512)
    monkeypatch.setattr(chunks, "COLUMNS", 32)
    monkeypatch.setattr(chunks, "SAMPLE", 64)
    recipe = {"merge_method": method, "models": ["math", "code", "science"]}
    if method not in ("linear", "karcher"):
        recipe["base_model"] = "base"
    expected = reference(models, recipe)
    for i, memory in enumerate((1, 100_000, 2**29, 2**33)):
        merge(recipe, f"out{i}", memory=memory)
        assert snapshot(models / f"out{i}") == expected
    merged = load_file("reference/model.safetensors")
    assert any(not np.array_equal(merged[name], BASE[name]) for name in BASE)
