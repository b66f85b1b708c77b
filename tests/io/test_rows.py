"""Rows of every kind of file and of hub data sets: values, names in errors, memory."""

import csv
import gc
import gzip
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.io import hub
from bmjax.io.rows import fill, mapped, read_rows, shared_fields
from tests.conftest import write_rows

ROWS = [{"prompt": "Q\u2028?", "response": "A"}, {"prompt": "R", "response": "B"}]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(*names: str | Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(names)]


def test_fields_braces_and_whole_values() -> None:
    row = {"q": "1 + 1", "n": 3, "tests": {"tests": [1]}}
    assert fill("Solve {q} in \\boxed{{}}, {n} times", row, "f:1", "prompt") == "Solve 1 + 1 in \\boxed{}, 3 times"
    assert fill("{tests}", row, "f:1", "reference") == {"tests": [1]}
    assert fill("f() {} {{a-b}} \\frac{{1}}{{{n}}}", row, "f:1", "prompt") == "f() {} {a-b} \\frac{1}{3}"
    assert fill("{q}{q}", {"q": "{q}"}, "f:1", "prompt") == "{q}{q}"


def test_dotted_paths_lead_into_fields() -> None:
    row = {"a": {"b": {"c": "x"}, "n": None}, "choices": ["p", {"t": "q"}], "d.e": 1, "gone": None, "{q}": "{a}"}
    assert fill("{a.b.c}-{ a.b.c }-{choices.0}{choices[1].t}-{d.e}", row, "f:1", "prompt") == "x-x-pq-1"
    assert fill("{a.b}", row, "f:1", "reference") == {"c": "x"}
    assert fill("{ a.b.c }", row, "f:1", "reference") == "x"
    assert fill("{a.n}", row, "f:1", "reference") is None and fill("{gone.x.y}", row, "f:1", "reference") is None
    values = {"q": "\\frac{1}{2} {answer} {{x}}", "answer": "7"}
    assert fill("{q}?", values, "f:1", "prompt") == "\\frac{1}{2} {answer} {{x}}?"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{a.c}", "asks for field 'a.c'.*did you mean"),
        ("{extra_info.qestion}", "did you mean 'extra_info.question'"),
        ("x {q.__class__}", "asks for field 'q.__class__', which the row lacks"),
        ("\\frac{1}{2} {q}", "asks for field '1', which the row lacks.*write {{ and }} for braces"),
        ("{choices.2}", "asks for field 'choices.2'"),
        ("set { {q} }", "single '{' in"),
        ("\\boxed{ans", "single '{' in"),
        ("{q}}", "single '}' in"),
        ("{a.n}!", "field 'a.n', which is null"),
    ],
)
def test_a_brace_that_is_no_field_is_an_error(template: str, problem: str) -> None:
    row = {"a": {"b": 1, "n": None}, "q": "Q", "choices": ["p"], "extra_info": {"question": "Q"}}
    with pytest.raises(UserError, match=problem):
        fill(template, row, "f:1", "prompt")


def test_templates_that_share_a_field() -> None:
    assert shared_fields("{q} \\boxed{{{answer}}}", "{answer}") == ["answer"]
    assert shared_fields("{extra.q} {extra}", "{ extra.answer }") == ["extra"]
    assert shared_fields("{extra.q} {{answer}} {}", "{extra.answer}") == []


def test_a_missing_field_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"data.jsonl:4: prompt asks for field 'question'.*did you mean 'questions'"):
        fill("{question}", {"questions": "x"}, "data.jsonl:4", "prompt")


def test_json_lines_json_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "rows.jsonl", ROWS)
    lines.write_text(lines.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(ROWS, indent=2))
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode())
    parquet = write_parquet(tmp_path / "rows.parquet", ROWS)
    for file in (lines, array, marked, parquet):
        assert read(file) == ROWS
    assert [location for location, _ in read_rows([str(lines), str(array)])][1:3] == [
        f"{lines}, row 2",
        f"{array}, row 1",
    ]


def test_content_not_the_name_tells_the_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(write_parquet(tmp_path / "a.jsonl", ROWS)) == ROWS
    assert read(write_rows(tmp_path / "b.json", ROWS)) == ROWS
    (tmp_path / "c").write_text(json.dumps(ROWS))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(tmp_path / "c") == read("~/c") == ROWS


def test_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(read_rows(path)) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 3", {"a": 2})]
    path.write_text('{"a": 1}\n7\n')
    with pytest.raises(UserError, match=r"rows.jsonl, row 2: expected a JSON object, found int"):
        read(path)


@pytest.mark.parametrize(("text", "problem"), [
    ('[{"a": 1} {"a": 2}]', "row 2: not valid JSON: expected a comma"),
    ('[{"a": 1}, ]', "row 2: not valid JSON"),
    ('[, {"a": 1}]', "row 1: not valid JSON"),
    ('[{"a": 1}', "row 2: not valid JSON: expected a comma"),
    ('[{"a": 1', "row 1: not valid JSON"),
    ('[{"a": 1}] {"a": 2}', "not valid JSON: text follows the closing bracket"),
    ("[]", "no rows; expected at least one"),
    ('[{"a": 1}, null]', "row 2: expected a JSON object, found NoneType"),
])  # fmt: skip
def test_a_broken_json_array_names_its_row(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read(path)


def test_rows_longer_than_a_read_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmjax.io.rows._CHUNK", 7)
    rows = [{"text": "x" * n, "list": [n, {"b": "]"}]} for n in range(40)]
    path = tmp_path / "rows.json"
    for indent in (None, 3):
        path.write_text(json.dumps(rows, indent=indent) + "\n \n")
        assert read(path) == rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    import pyarrow

    rows = [{"text": f"{n} " + "x" * 4000} for n in range(6000)]  # 24 MB
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    else:
        path.write_text(json.dumps(rows)) if kind == "json" else write_rows(path, rows)
    del rows
    assert path.stat().st_size > 20e6
    gc.collect()
    before = pyarrow.total_allocated_bytes()
    most_arrow = count = 0
    tracemalloc.start()
    try:
        for _ in read_rows(path):
            count += 1
            most_arrow = max(most_arrow, pyarrow.total_allocated_bytes() - before)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 6000
    assert most + most_arrow < 12e6


def test_what_is_no_file_of_rows_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{}])
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean .*train.jsonl"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"trian.parquet: no such file"):
        read(tmp_path / "trian.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no file of rows in it; expected JSON Lines"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"x-\*.jsonl: no file of rows matches"):
        read(tmp_path / "x-*.jsonl")
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    for name in ("broken.parquet", "torn.parquet", "latin.jsonl"):
        with pytest.raises(UserError, match=name) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="problems: an empty list: no rows"):
        list(read_rows([], "problems"))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "train", None)),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train", None)),
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test", None)),
        ("openai/gsm8k::test", ("openai/gsm8k", None, "test", None)),
        ("openai/gsm8k@v1.0:main:test", ("openai/gsm8k", "main", "test", "v1.0")),
        ("imdb", ("imdb", None, "train", None)),
    ],
)
def test_a_hub_data_set_by_subset_split_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[Any, ...]
) -> None:
    import datasets

    def load_dataset(repository: str, subset: str | None, split: str, revision: str | None) -> list[dict[str, str]]:
        assert (repository, subset, split, revision) == asked
        return [{"prompt": "a", "response": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()  # shares the owner's name, and hides nothing
    assert list(read_rows(name)) == [(f"{name}, row 1", {"prompt": "a", "response": "b"})]


@pytest.mark.parametrize("name", ["rows.jsonl", "data/rows.json", "a/b/c", "/data/rows", "~/rows", "a/b.parquet", ""])
def test_names_that_are_files_are_not_asked_of_the_hub(name: str) -> None:
    assert not hub.is_dataset_id(name)


@pytest.fixture
def cached_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of `org/name`, subset `main`, revision abc123, as `datasets` caches it."""
    import datasets

    source = write_rows(tmp_path / "rows.jsonl", ROWS)
    datasets.load_dataset("json", "main", data_files={"train": str(source)}, cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made" / "json").glob("*/*/*/")
    copy = tmp_path / "cache" / "org___name" / "main" / "0.0.0" / "abc123"
    copy.mkdir(parents=True)
    shutil.copy(made / "json-train.arrow", copy / "name-train.arrow")
    info = json.loads((made / "dataset_info.json").read_text()) | {"dataset_name": "name", "config_name": "main"}
    (copy / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)


def test_a_cached_data_set_is_read_without_a_network(cached_data_set: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert read("org/name:main") == read("org/name@abc123:main:train") == ROWS
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="data: org/name@def:main: the hub cannot be reached, and the cached copy is"):
        read("org/name@def:main")
    with pytest.raises(UserError, match=r"problems: org/name:other: no such file, nor .*hub cannot be reached"):
        list(read_rows("org/name:other", "problems"))
    with pytest.raises(UserError, match="org/name:main:test: no such file, nor"):
        read("org/name:main:test")


def test_the_hub_is_asked_once_and_not_at_all_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.utils

    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"data: org/none: no such file, nor .*the hub cannot be reached"):
        read("org/none")
    assert len(asked) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        read("org/none")
    assert len(asked) == 1


def packed(path: Path, data: bytes) -> Path:
    """Write bytes, packed as the name's ending says."""
    if path.suffix == ".zst":
        import pyarrow

        data = pyarrow.compress(data, "zstd", asbytes=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_every_form_gives_the_same_rows_packed_or_not(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.ipc

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for name in ("a.jsonl.gz", "b.jsonl.zst", "misnamed.jsonl"):
        assert read(packed(tmp_path / name, lines)) == ROWS
    assert read(packed(tmp_path / "c.gz", lines.replace(b"\n", b"\r\n"))) == ROWS
    assert read(packed(tmp_path / "d.json.gz", json.dumps(ROWS, indent=1).encode())) == ROWS
    assert read(packed(tmp_path / "parts.gz", lines)) == ROWS
    (tmp_path / "twice.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes() * 2)
    (tmp_path / "twice.zst").write_bytes((tmp_path / "b.jsonl.zst").read_bytes() * 2)
    assert read(tmp_path / "twice.gz") == read(tmp_path / "twice.zst") == ROWS * 2
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "marked.jsonl").write_bytes(lines.decode().replace("\n", "\r\n").encode(encoding))
        assert read(tmp_path / "marked.jsonl") == ROWS
    table = pyarrow.Table.from_pylist(ROWS)
    for name, writer in (("f.arrow", pyarrow.ipc.new_file), ("s.arrow", pyarrow.ipc.new_stream)):
        with writer(tmp_path / name, table.schema) as sink:
            sink.write_table(table)
        assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_csv_is_read_by_its_header(tmp_path: Path, delimiter: str, encoding: str) -> None:
    path = tmp_path / "table.data"
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [["prompt", "response", "note"], ['a,\t;b\n"c"', "é" * 200_000, ""]]
        )
    assert read(path) == [{"prompt": 'a,\t;b\n"c"', "response": "é" * 200_000, "note": None}]
    with path.open("a", newline="", encoding=encoding.removesuffix("-sig")) as file:
        file.write(delimiter.join(["x", "y"]) + "\r\n")
    if encoding != "utf-16":  # a second byte-order mark would follow
        with pytest.raises(UserError, match=r"table.data, row 2: 2 cells, the header has 3"):
            read(path)


def test_what_is_no_form_of_rows_lists_the_forms(tmp_path: Path) -> None:
    for name, content in (
        ("prose.txt", b"Once upon a time, there was a king.\n"), ("code.py", b"print('hi')\n"),
        ("a.zip", b"PK\x03\x04rest"), ("a.jsonl.bz2", b"BZh9rest"), ("yaml.jsonl", b"prompt: a\nresponse: b\n"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: .*expected JSON Lines, a JSON array, CSV") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "torn.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode() * 9)[:-12])
    with pytest.raises(UserError, match=r"torn.gz"):
        read(tmp_path / "torn.gz")


def test_folders_and_patterns_are_read_in_natural_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for number in (10, 9, 1):
        write_rows(folder / f"shard-{number}.jsonl", [{"n": number}])
    packed(folder / "more" / "shard-2.jsonl.gz", b'{"n": 2}\n')
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json"):
        (folder / name).write_text("{}")
    said: list[str] = []
    rows = list(read_rows(folder, log=said.append))
    assert [row["n"] for _, row in rows] == [2, 1, 9, 10]
    assert rows[1][0] == f"{folder / 'shard-1.jsonl'}, row 1"
    assert said == [f"{folder}: left out, not rows to train on: README.md, dataset_info.json"]
    monkeypatch.chdir(tmp_path)
    assert [row["n"] for row in read("shards/*.jsonl")] == [1, 9, 10]
    assert [row["n"] for row in read("shards/**/*.gz", "shards/shard-[19].jsonl")] == [2, 1, 9]


def test_a_saved_data_set_is_a_folder_of_rows(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ROWS


def test_halves_of_surrogate_pairs_are_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\\ud83dy", "b": ["\\udc00"]}\n{"a": "\\ud83d\\ude00"}\n{"\\ud800": 1}\n')
    said: list[str] = []
    rows = [row for _, row in read_rows(path, log=said.append)]
    assert rows == [{"a": "x\ufffdy", "b": ["\ufffd"]}, {"a": "\U0001f600"}, {"\ufffd": 1}]
    assert said == [f"{path}: 2 rows hold halves of surrogate pairs, replaced by U+FFFD"]


def test_a_folder_with_splits_gives_the_rows_to_train_on(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", [{"name": name}])
    said: list[str] = []
    rows = [row["name"] for _, row in read_rows(tmp_path / "data", log=said.append)]
    assert rows == ["train-00000-of-00002", "train-00001-of-00002"] and "test-00000-of-00001.jsonl" in said[0]
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "train" / "cache-0123abcd.arrow").write_bytes(b"ARROW1")
    assert read(tmp_path / "saved") == ROWS


@pytest.mark.parametrize("text", [
    ",prompt,response\n0,Q,A\n", "\nprompt,response\nQ,A\n", "prompt\tresponse\nQ\tA\n", "prompt;response\nQ;A\n",
])  # fmt: skip
def test_tables_as_programs_write_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert read(tmp_path / "rows.csv") == [{"prompt": "Q", "response": "A"}]


def test_a_table_named_so_may_have_any_headings(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('What is asked in words?,The answer\n"a ""b""",c\n')
    assert read(tmp_path / "rows.csv") == [{"What is asked in words?": 'a "b"', "The answer": "c"}]
    (tmp_path / "rows.tsv").write_text('q\ta\n"Start" of it\tx "y"\n')
    assert read(tmp_path / "rows.tsv") == [{"q": "Start of it", "a": 'x "y"'}]
    row = {"What is asked in words?": "Q", "n": 3}
    assert fill("{What is asked in words?}", row, "f:1", "prompt") == "Q"
    assert fill("Q: {What is asked in words?} {{x y}}", row, "f:1", "prompt") == "Q: Q {x y}"
    with pytest.raises(UserError, match="asks for field 'Question text'"):
        fill("{Question text}", row, "f:1", "prompt")
    with pytest.raises(UserError, match="field 'n', which is null"):
        fill("a {n}", {"n": None}, "f:1", "prompt")


def test_what_is_not_the_rows_themselves_is_said(tmp_path: Path) -> None:
    for name, content, problem in (
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, not the file"),
        ("b.json", b'{\n  "prompt": "Q"\n}\n', "a JSON object over several lines"),
        ("c.jsonl.gz", gzip.compress(b"x" * 10_000)[:40] + b"broken" * 9, "c.jsonl.gz"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=problem):
            read(tmp_path / name)


def test_nulls_that_a_table_fills_in_are_absent_and_those_of_json_stay(tmp_path: Path) -> None:
    rows = [{"calls": [{"a": 1, "b": {"c": None, "d": 2}}, {"e": None}], "x": None}, {"calls": [{"e": [None]}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == rows
    tidy = [{"calls": [{"a": 1, "b": {"d": 2}}, {}], "x": None}, {"calls": [{"e": [None]}], "x": None}]
    assert read(write_parquet(tmp_path / "rows.parquet", rows)) == tidy


def test_a_mapping_keeps_the_fields_that_it_is_told_to_keep() -> None:
    rows = [("here", {"q": "Q", "images": ["a"], "documents": "D", "id": 1})]
    templates = {"prompt": "{documents}: {q}", "tools": "{images}"}
    assert list(mapped(rows, templates, ("images", "documents", "train"))) == [
        ("here", {"prompt": "D: Q", "tools": ["a"]})
    ]
    assert list(mapped(rows, {"prompt": "{q}"}, ("images",))) == [("here", {"images": ["a"], "prompt": "Q"})]
    assert list(mapped(rows, {}, ("images",))) == rows
