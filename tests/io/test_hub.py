"""Names of models and data sets: directories first, then the hub; what errors say."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from bmjax.config import UserError
from bmjax.io import hub


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with two models, a file, and a directory that only shares an owner's name with the hub."""
    for directory in ("models/student", "models/backbone", "org"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Hub:
    """The hub's place: records what is asked for, gives a directory, and fails for some names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.asked.append((name, options))
        if name.endswith("absent") or options.get("local_files_only"):
            raise OSError("404 Client Error\nmany\nlines")
        return str(self.directory)


@pytest.fixture
def asked(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    fake = Hub(workplace / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake.asked


def test_directories_come_first(workplace: Path, asked: list) -> None:
    assert hub.model_directory("models/student") == Path("models/student")
    assert hub.model_directory(workplace / "models" / "student") == workplace / "models" / "student"
    assert asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./x", r"^\./x: no such model directory; a hub id looks like org/name$"),
        ("./models/studnet", r"^\./models/studnet: no such model directory; did you mean 'models/student'\?$"),
        ("/no/such", "^/no/such: no such model directory"),
        ("a/b/c", "^a/b/c: no such model directory"),
        ("", "^'': no such model directory"),
        ("file", "^file: is a file, expected a model directory or a hub id like org/name$"),
        ("models/student@main", "^models/student is a directory, which has no revisions; remove @main$"),
        ("a/b/c@main", "a hub model's revision is given as org/name@revision$"),
        ("org/name+adapter", "LoRA adapters"),
        ("x" * 5000, "the name is too long$"),
    ],
)
def test_names_that_mean_no_model(asked: list, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        hub.model_directory(name)
    assert asked == [] and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "identity", "revision"),
    [
        ("org/name", "org/name", None),
        ("gpt2", "gpt2", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("gpt2@refs/pr/3", "gpt2", "refs/pr/3"),
        ("models/other", "models/other", None),
    ],
)
def test_ids_go_to_the_hub(workplace: Path, asked: list, name: str, identity: str, revision: str | None) -> None:
    """With and without an owner and a revision; a directory with the owner's name hides nothing."""
    assert hub.model_directory(name) == workplace / "snapshot"
    ((asked_name, options),) = asked
    assert asked_name == identity and options["revision"] == revision
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern or pattern == "*" for pattern in options["allow_patterns"])


def test_without_weights_no_weights_are_fetched(asked: list) -> None:
    hub.model_directory("org/name", weights=False)
    assert "*.safetensors" not in asked[0][1]["allow_patterns"] and "*.json" in asked[0][1]["allow_patterns"]


def test_what_the_hub_says_is_told_in_one_line(asked: list) -> None:
    with pytest.raises(UserError) as error:
        hub.model_directory("org/absent@v2", label="model 'math': ")
    assert str(error.value) == (
        "model 'math': org/absent@v2: no such model directory; a hub id looks like org/name; "
        "the Hugging Face Hub did not give it, either: 404 Client Error"
    )


def test_a_misspelt_directory_gets_a_hint(asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        raise OSError("404")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as error:
        hub.model_directory("models/studnet")
    assert str(error.value) == (
        "models/studnet: no such model directory; did you mean 'models/student'?; "
        "the Hugging Face Hub did not give it, either: 404"
    )


def test_other_possible_names_are_listed(asked: list) -> None:
    with pytest.raises(UserError, match="absent: no such model directory; known here: math, code; the Hugging"):
        hub.model_directory("absent", known=["math", "code"])


def test_without_download_only_fetched_models_are_there(asked: list) -> None:
    with pytest.raises(UserError, match=r"the hub's model of that name is not here yet, so it cannot be checked$"):
        hub.model_directory("org/name", download=False)
    assert asked[0][1]["local_files_only"]


def test_the_hub_offline() -> None:
    with pytest.raises(UserError, match=r"org-of-nobody/model: no such model directory.* did not give it") as error:
        hub.model_directory("org-of-nobody/model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("openai/gsm8k", True), ("openai/gsm8k:main:train", True), ("org/data@v1:main", True), ("squad", True),
        ("rows.jsonl", False), ("org/rows.parquet", False), ("file", False), ("a/b/c", False), ("./data", False),
    ],
)  # fmt: skip
def test_names_of_data_sets(name: str, is_id: bool) -> None:
    assert hub.is_dataset_id(name) == is_id


def test_rows_of_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(repository: str, subset: str | None, split: str, revision: str | None) -> list[dict[str, int]]:
        calls.append((repository, subset, split, revision))
        if repository == "org/absent":
            raise ValueError("no such data set\nmore")
        return [{"a": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    assert list(hub.dataset_rows("org/data")) == [{"a": 1}]
    list(hub.dataset_rows("org/data@v1:main:test"))
    assert calls == [("org/data", None, "train", None), ("org/data", "main", "test", "v1")]
    with pytest.raises(UserError, match=r"data: org/absent: no such file, nor a data set .*: no such data set$"):
        list(hub.dataset_rows("org/absent"))
