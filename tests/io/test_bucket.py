"""Files in buckets: copied when they change, sent whole, locked, refused by name."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.io import bucket, bucket_lock, hub
from bmjax.io.atomic import held, replacing, replacing_file, write_atomic
from bmjax.io.jsonl import JsonLines, read_lines, write_jsonl
from bmjax.io.rows import read_rows
from bmjax.io.states import data_states, file_states
from bmjax.urls import url_of, url_problem
from tests.conftest import write_student

pytestmark = pytest.mark.usefixtures("buckets")


@pytest.fixture(params=["s3", "gs", "memory"])
def root(request, tmp_path_factory) -> str:
    """An empty folder of a bucket."""
    return f"{request.param}://bucket/{tmp_path_factory.mktemp('folder').name}"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))


def objects(url: str) -> dict[str, bytes]:
    """All that a folder of a bucket holds."""
    return {name: bucket.read(f"{url}/{name}") for name in bucket.names_in(url)}


def test_a_file_is_written_whole_and_read_again(root):
    write_atomic(f"{root}/deep/x.json", '{"a": 1}')
    write_atomic(Path(f"{root}/deep/x.json"), '{"a": 2}')  # pathlib takes one slash away
    assert objects(root) == {"deep/x.json": b'{"a": 2}'}
    assert bucket.local(f"{root}/deep/x.json").read_text() == '{"a": 2}'


def test_a_write_that_fails_leaves_the_old_content(root):
    write_atomic(f"{root}/x", "old")
    with pytest.raises(RuntimeError), replacing_file(f"{root}/x") as file:
        file.write(b"new")
        raise RuntimeError
    assert objects(root) == {"x": b"old"}


def test_a_changed_file_is_copied_again_and_another_is_not(root, monkeypatch):
    for name in ("a", "b"):
        bucket.write(f"{root}/{name}.json", b'{"n": 1}')
    bucket.fetch(root)
    time.sleep(1.1)  # S3 tells the time in seconds
    bucket.write(f"{root}/b.json", b'{"n": 2}')
    copied = []
    monkeypatch.setattr(
        bucket,
        "_download",
        lambda url, names, *rest, call=bucket._download: (copied.extend(names), call(url, names, *rest)),
    )
    assert [path.read_text() for path in bucket.fetch(root)] == ['{"n": 1}', '{"n": 2}']
    assert copied == [f"{root}/b.json"]
    bucket.remove(f"{root}/a.json")
    assert [path.name for path in bucket.fetch(root)] == ["b.json"]
    assert not bucket.mirror(f"{root}/a.json").exists()


def test_rows_are_read_from_files_folders_and_patterns(root):
    for number in (10, 9):
        bucket.write(f"{root}/rows/part-{number}.jsonl", json.dumps({"n": number}).encode() + b"\n")
    bucket.write(f"{root}/rows/part-8.jsonl.gz", gzip.compress(b'{"n": 8}\n'))
    bucket.write(f"{root}/rows/README.md", b"about")
    said = []
    assert [row["n"] for _, row in read_rows(f"{root}/rows", log=said.append)] == [8, 9, 10]
    assert said == [f"{root}/rows: left out, not rows to train on: README.md"]
    assert [at for at, _ in read_rows(f"{root}/rows/part-*.jsonl")] == [
        f"{root}/rows/part-9.jsonl, row 1", f"{root}/rows/part-10.jsonl, row 1",
    ]  # fmt: skip
    bucket.write(f"{root}/bad.jsonl", b"{\n")
    with pytest.raises(UserError, match=f"^{root}/bad.jsonl: "):
        list(read_rows(f"{root}/bad.jsonl"))
    with pytest.raises(UserError, match=f"{root}/none.jsonl: no such file"):
        list(read_rows(f"{root}/none.jsonl"))


def test_the_state_of_a_file_does_not_depend_on_the_machine(root, monkeypatch, tmp_path):
    bucket.write(f"{root}/rows.jsonl", b'{"n": 1}\n')
    first = data_states([f"{root}/rows.jsonl"])
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "other"))
    assert data_states([f"{root}/rows.jsonl"]) == first


def test_a_changed_file_of_any_kind_in_a_bucket_is_seen_and_nothing_copied(root, tmp_path):
    for name in ("model.safetensors", "config.json", "chat_template.jinja"):
        bucket.write(f"{root}/student/{name}", b"1")
    before = file_states([f"{root}/student", f"{root}/none"])
    assert [name for name, *_ in before[0][1:]] == [
        f"{root}/student/{name}" for name in ("chat_template.jinja", "config.json", "model.safetensors")
    ]
    assert before == file_states([f"{root}/student", f"{root}/none"]) and before[1] == [f"{root}/none"]
    assert not bucket.mirror(f"{root}/student").exists()
    bucket.write(f"{root}/student/model.safetensors", b"23")
    assert file_states([f"{root}/student", f"{root}/none"]) != before
    # A copy has the state that the bucket tells.
    assert file_states([f"{root}/student/config.json"])[0][1:] == data_states([f"{root}/student/config.json"])


def test_a_directory_is_sent_with_the_file_that_says_it_is_whole_last(root, monkeypatch, tmp_path):
    with replacing(f"{root}/model") as folder:
        (folder / "sub").mkdir()
        for name in ("config.json", "model.safetensors", "sub/config.json"):
            (folder / name).write_text(name)
    assert sorted(objects(f"{root}/model")) == ["config.json", "model.safetensors", "sub/config.json"]

    class Stop(Exception):
        pass

    def put(copies, names):
        raise Stop("the network is gone")

    system = bucket._open(root)
    with monkeypatch.context() as patch:
        patch.setattr(system, "put", put)
        with (
            pytest.raises(UserError, match=f"{root}/model: Stop: .*what was to be sent is whole in"),
            replacing(f"{root}/model") as folder,
        ):
            (folder / "config.json").write_text("new")
            (folder / "other.safetensors").write_text("new")
    assert "config.json" not in objects(f"{root}/model")  # it is not whole
    assert bucket.is_unfinished(f"{root}/model")
    bucket.write(f"{root}/model/scores.json", b"of a file that is sent last elsewhere")
    with replacing(f"{root}/model") as folder:
        (folder / "config.json").write_text("new")
        (folder / "other.safetensors").write_text("new")
    assert objects(f"{root}/model") == {"config.json": b"new", "other.safetensors": b"new"}
    bucket.write(f"{root}/other/x", b"of somebody else")
    assert not any(bucket.is_unfinished(path) for path in (f"{root}/model", f"{root}/other", f"{root}/none", tmp_path))


def test_a_model_is_opened_from_a_bucket_when_it_is_whole(root, tmp_path):
    bucket.send_folder(write_student(tmp_path / "student"), f"{root}/student")
    directory = hub.model_directory(f"{root}/student/")
    assert {path.name for path in directory.iterdir() if path.name[0] != "."} == {
        path.name for path in (tmp_path / "student").iterdir()
    }
    bucket.remove(f"{root}/student/config.json")
    with pytest.raises(UserError, match=r"no config\.json, which is written last; is the model still being written"):
        hub.model_directory(f"{root}/student")
    with pytest.raises(UserError, match=f"student: {root}/none: no such model directory in the bucket"):
        hub.model_directory(f"{root}/none", label="student: ")


def test_lines_grow_in_a_bucket_and_survive_a_kill(root):
    url = f"{root}/lines.jsonl"
    program = f"""
from bmjax.io.jsonl import JsonLines
import os
with JsonLines({url!r}) as file:
    for n in range(3):
        file.append({{"n": n}})
    os.kill(os.getpid(), 9)
"""
    if root.startswith("memory"):
        pytest.skip("a bucket in memory has one process")
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    with JsonLines(url) as file:
        file.append({"n": 3})
    assert [json.loads(line)["n"] for line in bucket.read(url).splitlines()] == [0, 1, 2, 3]
    assert [value["n"] for _, value in read_lines(url)] == [0, 1, 2, 3]


def test_lines_that_were_not_sent_are_kept_when_another_machine_wrote(root, monkeypatch, tmp_path):
    url = f"{root}/lines.jsonl"
    write_jsonl(url, [{"n": 0}])
    with bucket.mirror(url).open("a") as file:
        file.write('{"n": "unsent"}\n')
    time.sleep(1.1)
    bucket.write(url, b'{"n": 0}\n{"n": 1}\n')
    said = []
    copy = bucket.open_growing(url, said.append)
    assert copy.read_text() == '{"n": 0}\n{"n": 1}\n'
    assert "another machine has written to it" in said[0]
    assert '"unsent"' in next(copy.parent.glob("*.unsent")).read_text()


def test_a_copy_that_grows_is_not_replaced(root, monkeypatch):
    url = f"{root}/lines.jsonl"
    write_jsonl(url, [{"n": 0}])
    with JsonLines(url) as file:
        file.append({"n": 1})
        bucket._tag_file(bucket.mirror(url)).write_text("of a sending that has not ended")
        bucket.fetch(root)
        file.append({"n": 2})
    assert [json.loads(line)["n"] for line in bucket.read(url).splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("lines", [2, 0])
def test_a_sending_that_was_not_noted_loses_nothing(root, lines):
    url = f"{root}/lines.jsonl"
    with JsonLines(url) as file:
        file.append({"n": 0})
    copy = bucket.mirror(url)
    bucket._tag_file(copy).write_text("of an earlier sending")
    more = "".join(f'{{"n": {n + 1}}}\n' for n in range(lines))
    with copy.open("a") as unsent:
        unsent.write(more)
    said = []
    assert bucket.open_growing(url, said.append).read_text() == '{"n": 0}\n' + more
    assert not said and not [*copy.parent.glob("*.unsent")]


def test_a_lock_that_was_taken_over_is_left_to_its_new_holder(root, monkeypatch, capsys):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.1)
    url = f"{root}/run/.lock"
    other = json.dumps({"host": "another", "pid": 1, "nonce": "x", "beat": 7}).encode()
    with held(url, "another training is writing here"):
        bucket.write(url, other)
        for _ in range(100):
            if "took this lock" in (said := capsys.readouterr().err):
                break
            time.sleep(0.1)
        assert "another process took this lock" in said
    assert bucket.read(url) == other


def test_a_lock_keeps_the_second_out_and_a_dead_one_is_taken_over(root, monkeypatch, tmp_path):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.2)
    monkeypatch.setattr(bucket_lock, "SILENT", 1.5)
    url = f"{root}/run/.lock"
    with held(url, "another training is writing here"):
        with (
            pytest.raises(UserError, match="another training is writing here"),
            held(url, "another training is writing here"),
        ):
            pass
        # Another machine has another cache.
        monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "other"))
        with (
            pytest.raises(UserError, match="another training is writing here"),
            held(url, "another training is writing here"),
        ):
            pass
        monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    assert objects(root) == {}
    bucket.write(url, json.dumps({"host": "gone", "pid": 1, "nonce": "x", "beat": 7}).encode())
    with held(url, "another training is writing here"):
        assert json.loads(bucket.read(url))["pid"] == os.getpid()


def test_the_lock_of_a_host_with_the_same_name_and_paths_is_respected(root, monkeypatch, tmp_path):
    monkeypatch.setattr(bucket_lock, "BEAT", 0.2)
    monkeypatch.setattr(bucket_lock, "SILENT", 1.5)
    url = f"{root}/run/.lock"
    with held(url, "another training is writing here"):
        # The same path on another disk, as two containers have it.
        (tmp_path / "cache").rename(tmp_path / "of the other host")
        with pytest.raises(UserError, match="another training is writing"), held(url, "another training is writing"):
            pass


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(root, monkeypatch, capsys):
    if root.startswith("memory"):
        pytest.skip("a bucket in memory has one process")
    url = f"{root}/run/.lock"
    program = f"""
from bmjax.io.atomic import held
import os
with held({url!r}, "another training is writing here"):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    with held(url, "another training is writing here"):
        assert json.loads(bucket.read(url))["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert "taking over" in said and "looking whether it lives" not in said
    # After a restart of the machine, or on another one that shares the cache, its file says nothing.
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    monkeypatch.setattr(bucket_lock, "_boot", lambda: "another")
    monkeypatch.setattr(bucket_lock, "SILENT", 0.5)
    with held(url, "another training is writing here"):
        assert "looking whether it lives" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("gss://b/x", "no file system has the scheme 'gss'; did you mean 'gs'"),
        ("foo://b/x", "no file system has the scheme 'foo'"),
        ("file:///tmp/x", "remove 'file://'"),
        ("s3://", "names no bucket"),
        ("abfs://b/x", "needs the package adlfs; pip install adlfs"),
    ],
)
def test_a_scheme_that_cannot_be_used_is_refused_by_name(path, problem):
    assert problem in url_problem(path)
    with pytest.raises(UserError, match=problem.replace("'", ".")):
        write_atomic(path, "x")


def test_what_looks_like_a_scheme_and_is_none():
    assert url_of("C:/x") is None or url_problem("C:/x")
    assert url_of("a/b:c") is None
    assert "expected gs://BUCKET/PATH" in url_problem("gs:b/x") and url_problem("org/name:subset") is None
    assert url_of("org/name:subset:train") is None
    assert url_of(Path("gs://bucket/x/")) == "gs://bucket/x"


def test_an_error_of_the_bucket_names_the_url(monkeypatch):
    with pytest.raises(UserError, match="s3://no-such-bucket/x"):
        write_atomic("s3://no-such-bucket/x", "text")


def test_copies_are_listed_and_unsent_files_are_not(root):
    write_jsonl(f"{root}/a.jsonl", [{"n": 0}])
    write_jsonl(f"{root}/b.jsonl", [{"n": 0}])
    with bucket.mirror(f"{root}/b.jsonl").open("a") as file:
        file.write('{"n": 1}\n')
    assert [bucket.name_of(copy) for copy in bucket.copies()] == [f"{root}/a.jsonl"]


def test_two_processes_copy_a_folder_once(root, monkeypatch):
    bucket.write(f"{root}/a.json", b"{}")
    downloads = []
    monkeypatch.setattr(
        bucket,
        "_download",
        lambda url, names, *rest, call=bucket._download: (downloads.append(names), call(url, names, *rest)),
    )
    threads = [threading.Thread(target=bucket.fetch, args=(root,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
