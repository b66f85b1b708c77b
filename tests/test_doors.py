"""One name, one meaning: every key that takes rows or a model takes the same names, and reads the same from them."""

import json

import pytest

from bmjax.api import load, merge
from bmjax.branch import prepare
from bmjax.branch.export import open_student
from bmjax.branch.settings import TrainSettings
from bmjax.calibrate import data as calibration_data
from bmjax.evaluate import run as evaluation
from bmjax.evaluate.answering import Generated
from bmjax.evaluate.local import LocalAnswerer
from bmjax.evaluate.settings import EvalSettings
from bmjax.io import hub
from bmjax.io.rows import read_rows
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.parallel.mesh import make_mesh
from bmjax.plan import plan
from bmjax.teach.collect import wanted_samples
from bmjax.teach.select import select
from bmjax.teach.settings import CollectSettings, SelectSettings
from bmjax.weights import student as students
from bmjax.weights.convert import convert
from tests.conftest import sums, write_rows, write_student

ROWS = [{"id": str(n), "domain": "sums", "verdict": "right"} | row for n, row in enumerate(sums(12, 5))]
REGMEAN = {"rows": 2, "batch": 1, "documents": 8, "held_out": 2, "seq_len": 128, "remat": "none", "mesh": {}}


@pytest.fixture(params=["rows.jsonl", "rows.json", "rows.parquet", "org/rows:main:test"])
def data(request, tmp_path, monkeypatch):
    """ROWS by each kind of name."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    def load_dataset(repository, subset, split, revision):
        assert (repository, subset, split, revision) == ("org/rows", "main", "test", None)
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    if ":" in request.param:
        return request.param
    path = tmp_path / request.param
    if path.suffix == ".jsonl":
        write_rows(path, ROWS)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


def test_train_reads_data(student, data):
    settings = TrainSettings.read(
        {"student": str(student), "data": data, "output": "unused", "seq_len": 200, "steps": 1, "batch": 1}
    )
    loader = prepare.load_data(settings, open_student(settings))
    assert len(loader.dataset.examples) == len(ROWS)


def test_collect_reads_problems(tmp_path, data):
    settings = CollectSettings.read(
        {"problems": data, "domain": "sums", "prompt": "{prompt}", "reference": "{reference}",
         "output": str(tmp_path / "out"), "teacher": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "samples": 2}}
    )  # fmt: skip
    assert len(wanted_samples(settings)) == 2 * len(ROWS)


def test_select_reads_held_out(tmp_path, data):
    prompts = [ROWS[0]["prompt"], "Another one?", ROWS[7]["prompt"]]
    traces = [
        {"id": str(n), "domain": "sums", "prompt": prompt, "reasoning": "r", "response": "1", "verdict": "right"}
        for n, prompt in enumerate(prompts)
    ]
    file = write_rows(tmp_path / "traces.jsonl", traces)
    table = select(SelectSettings.read({"traces": str(file), "output": str(tmp_path / "out"), "held_out": data}))
    assert (table["sums"]["kept"], table["sums"]["held out"]) == (1, 2)


def test_select_reads_traces(tmp_path, data):
    output = tmp_path / "out"
    settings = SelectSettings.read({"traces": data, "output": str(output), "require_reasoning": False})
    assert select(settings)["sums"]["kept"] == len(ROWS)
    names = ("prompt", "response", "reference", "id")
    rows = [{name: row[name] for name in names} for _, row in read_rows(output / "sums.jsonl")]
    assert rows == [{name: row[name] for name in names} for row in sorted(ROWS, key=lambda row: row["id"])]


def test_evaluate_reads_questions_and_traces(student, tmp_path, data, monkeypatch):
    def answer(self, name, asked, receive):
        for sample in asked:
            receive(sample, Generated(sample.reference, "stop", 1, 1))
        return []

    monkeypatch.setattr(LocalAnswerer, "answer", answer)
    task = {"questions": data, "traces": data, "limit": 8}
    settings = EvalSettings.read(
        {"model": str(student), "output": str(tmp_path / "out"), "tasks": {"sums": task}, "seq_len": 200, "mesh": {}}
    )
    score = evaluation.evaluate(settings)["sums"]
    assert (score["accuracy"], score["n"]) == (1.0, 8) and score["loss_tokens"] > 8


def test_calibration_reads_data(student, data):
    recipe = {
        "merge_method": "regmean", "base_model": "b", "models": [{"model": "m", "data": data}], "parameters": REGMEAN,
    }  # fmt: skip
    (step,) = read_recipe(recipe).steps
    opened = students.open(student, purpose="calibration")
    calibration = calibration_data.read(step, step.calibration, 0, opened, make_mesh({}))
    assert len(calibration.loaders) == 1 and len(calibration.loaders[0].dataset.examples) == 6


@pytest.fixture(params=["directory", "org/student", "org/student@v1"])
def model(request, tmp_path_factory, student, monkeypatch):
    """The student by each kind of name; the hub is faked."""
    import huggingface_hub

    def snapshot_download(name, revision=None, **options):
        assert (name, revision) == ("org/student", "v1" if "@" in request.param else None)
        return str(student)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    return str(student) if request.param == "directory" else request.param


def test_train_opens_the_student(student, model):
    settings = TrainSettings.read({"student": model, "data": "unused", "output": "unused", "steps": 1})
    assert open_student(settings).directory == student


def test_evaluate_loads_the_model(tmp_path, train_file, model):
    settings = EvalSettings.read(
        {"model": model, "output": str(tmp_path), "tasks": {"sums": {"traces": str(train_file)}}, "seq_len": 200,
         "mesh": {}}
    )  # fmt: skip
    assert evaluation.evaluate(settings)["sums"]["loss_tokens"] > 0


def test_the_api_loads_the_model(student, model):
    assert load(model).directory == student


def test_convert_reads_the_model(tmp_path, model):
    convert(model, str(tmp_path / "orbax"), "orbax")
    assert (tmp_path / "orbax" / "config.json").is_file()


def test_plan_reads_the_config(model):
    assert plan.student_config(model).vocab_size == 300


@pytest.mark.parametrize("method", ["ties", "regmean"])
def test_merges_read_the_model(tmp_path, train_file, model, method):
    recipe = {"merge_method": method, "base_model": str(write_student(tmp_path / "base", seed=1)), "dtype": "float32"}
    if method == "ties":
        recipe |= {"models": [{"model": model, "parameters": {"weight": 1.0, "density": 0.5}}]}
    else:
        recipe |= {"models": [{"model": model, "data": str(train_file)}], "parameters": REGMEAN}
    merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
