"""Names of models and data sets: directories first, then the hub; what errors say."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

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
        ("org/name+adapter", "a LoRA adapter"),
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
    assert [name for name, _ in asked] == [identity] * 2
    assert [options["revision"] for _, options in asked] == [revision] * 2


class Repository(Hub):
    """A repository of the hub, of which what the patterns let through lands in the directory."""

    def __init__(self, directory: Path, files: dict[str, str]) -> None:
        super().__init__(directory)
        self.files = files

    def snapshot_download(self, name: str, **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        patterns = {key: options.get(key) for key in ("allow_patterns", "ignore_patterns")}
        for file in filter_repo_objects(self.files, **patterns):
            path = self.directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.files[file])
        return super().snapshot_download(name, **options)


SMALL = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "modeling_own.py", "LICENSE",
         "README.md", "NOTICE", "1_Pooling/config.json", "2_Dense/model.safetensors",
         "additional_chat_templates/tools.jinja", "source.spm", "vocab.bpe", "vocab.model", "bpe.codes", "tekken.json",
         "qwen.tiktoken", "custom.yaml", "USE_POLICY.md"]  # fmt: skip
NEEDLESS = ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "pytorch_model.bin",
            "onnx/model.onnx", "onnx/config.json", "checkpoint-100/model.safetensors", "model.gguf",
            "checkpoint-100/trainer_state.json", "trainer_state.json", "variants/model.safetensors"]  # fmt: skip
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
WEIGHT_MAP = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))})


def fetched(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "weights",
    [
        {"model.safetensors": ""},
        {"model.safetensors.index.json": WEIGHT_MAP, SHARDS[0]: "", SHARDS[1]: ""},
        {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
    ],
    ids=["one file", "shards", "adapter"],
)
def test_only_what_is_needed_is_fetched(workplace: Path, monkeypatch: pytest.MonkeyPatch, weights: dict) -> None:
    repository = Repository(workplace / "fetched", dict.fromkeys([*SMALL, *NEEDLESS], "") | weights)
    if "adapter_config.json" in weights:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
        with pytest.raises(UserError, match=r"an adapter \(LoRA\)"):
            hub.model_directory("org/name")
    else:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
        assert hub.model_directory("org/name") == workplace / "fetched"
    assert fetched(workplace / "fetched") == {*SMALL, *weights}


def test_a_stray_file_beside_shards_is_not_fetched(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"model.safetensors.index.json": WEIGHT_MAP, SHARDS[0]: "", SHARDS[1]: ""}
    repository = Repository(workplace / "fetched", weights | {"model.safetensors": ""})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
    hub.model_directory("org/name")
    assert fetched(workplace / "fetched") == weights.keys()


def test_of_an_adapter_only_the_adapter_is_fetched(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin", "optimizer.pt"]
    repository = Repository(workplace / "fetched", dict.fromkeys(files, ""))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
    assert hub.adapter_directory("org/adapter@v2") == workplace / "fetched"
    assert repository.asked[0][1]["revision"] == "v2" and fetched(workplace / "fetched") == set(files[:3])
    with pytest.raises(UserError, match="no such adapter directory"):
        hub.adapter_directory("./nowhere")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name+org/adapter@v2", ("org/name", "org/adapter@v2")), ("org/name", ("org/name", None)),
        ("models/student+x", ("models/student", "x")), ("with+plus", ("with+plus", None)),
        ("with+plus+x", ("with+plus", "x")), ("+x", ("+x", None)), ("x+", ("x+", None)),
        ("gs://b/m+models/student", ("gs://b/m", "models/student")), ("x+gs://b/l", ("x", "gs://b/l")),
        ("gs://b/m+n+s3://b/l", ("gs://b/m+n", "s3://b/l")),
    ],
)  # fmt: skip
def test_names_of_adapters(workplace: Path, name: str, parts: tuple[str, str | None]) -> None:
    (workplace / "with+plus").mkdir()
    assert hub.split_adapter(name) == parts


def test_without_weights_no_weights_are_fetched(asked: list) -> None:
    hub.model_directory("org/name", weights=False)
    ((_, options),) = asked
    assert not any("safetensors" in pattern for pattern in options["allow_patterns"])
    assert "*.json" in options["allow_patterns"]


def test_what_the_hub_says_is_told_in_one_line(asked: list) -> None:
    with pytest.raises(UserError) as error:
        hub.model_directory("org/absent@v2", label="model 'math': ")
    assert str(error.value) == (
        "model 'math': org/absent@v2: no such model directory; "
        "the Hugging Face Hub did not give it, either: 404 Client Error"
    )


REASONS = {
    "gated": (errors.GatedRepoError, "it is gated; accept its terms at .*/org/name, then run `hf auth login`"),
    "private or misspelt": (errors.RepositoryNotFoundError, "no model of that name, or a private one; .*hf auth login"),
    "no such revision": (errors.RevisionNotFoundError, "its model has no revision 'v2'"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_why_the_hub_gives_nothing_and_what_helps(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    error, message = REASONS[kind]

    def fail(name: str, **options: Any) -> str:
        raise error("401 Client Error. (Request ID: Root=1-x)", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        hub.model_directory("org/name@v2")


@pytest.mark.parametrize(
    ("file", "message"), [("model.Q4_K_M.gguf", "org/name: the weights are GGUF"), ("pytorch_model.bin", "are pickled")]
)
def test_weights_on_the_hub_in_another_form_are_named(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, file: str, message: str
) -> None:
    repository = Repository(workplace / "fetched", {"config.json": "{}", file: ""})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: ["config.json", file])
    with pytest.raises(UserError, match=message):
        hub.model_directory("org/name")
    assert fetched(workplace / "fetched") == {"config.json"}


def test_a_copy_without_needless_files_is_here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: Any) -> str:
        error = OSError("incomplete")
        error.snapshot_path = str(workplace / "models/student")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert hub.model_directory("org/name", download=False) == workplace / "models/student"
    with pytest.raises(UserError, match="did not give it"):
        hub.model_directory("org/name")


def test_an_id_with_a_slash_behind_it(workplace: Path, asked: list) -> None:
    assert hub.model_directory("org/name/") == workplace / "snapshot"
    assert {name for name, _ in asked} == {"org/name"}


def test_the_commit_of_a_copy(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: f"/cache/{name}/snapshots/{commit}")
    assert hub.pinned("org/name") == hub.pinned("org/name@main") == f"org/name@{commit}"
    assert hub.pinned("gpt2") == f"gpt2@{commit}"
    for name in ("models/student", "./x", "gs://b/m", "/no/such"):
        assert hub.pinned(name) == name


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
    for name, fetch in (("org/name", "org/name"), ("org/name@v2", "org/name --revision v2")):
        with pytest.raises(UserError) as error:
            hub.model_directory(name, download=False)
        assert str(error.value) == (
            f"{name}: no such model directory; the hub's model of that name is not in the cache, so it cannot be "
            f"checked; run `hf download {fetch}` first, or merge without --check"
        )
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
