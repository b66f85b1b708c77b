"""Outputs that are somebody's inputs, and outputs in buckets: nothing is lost, nothing is asked twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmjax.cli import main as cli
from bmjax.config import UserError
from bmjax.io import bucket
from bmjax.teach.collect import collect
from bmjax.teach.record import read_records
from bmjax.teach.rejudge import rejudge
from bmjax.teach.select import select
from bmjax.teach.settings import CollectSettings, JudgeSettings, SelectSettings
from tests.conftest import write_rows
from tests.pipeline.endpoint import Endpoint


def trace(number, **changes):
    return {
        "id": f"{number:04}", "domain": "sums", "prompt": f"What is {number} + 1?", "reference": str(number + 1),
        "reasoning": "thought", "response": str(number + 1), "verdict": "right", "source": "a.jsonl, row 1",
    } | changes  # fmt: skip


@pytest.fixture
def endpoint():
    with Endpoint(lambda prompt, seed: ("<think>so</think>\\boxed{4}", "stop")) as server:
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))


def settings(endpoint, folder: Path, output: str, count: int = 12, **keys) -> CollectSettings:
    rows = [{"question": f"What is {n} + {4 - n}?", "answer": "4"} for n in range(count)]
    teacher = {"base_url": endpoint.base_url, "model": "r1", "concurrency": 4}
    problems = str(write_rows(folder / "problems.jsonl", rows))
    return CollectSettings.read({"problems": problems, "output": output, "domain": "sums", "teacher": teacher} | keys)


def selection(traces, output, **keys) -> SelectSettings:
    return SelectSettings.read({"traces": str(traces), "output": str(output)} | keys)


def test_a_collection_in_a_bucket_is_paid_once(tmp_path, endpoint, cache, request):
    root = f"memory://{request.node.name}"
    first = collect(settings(endpoint, tmp_path, f"{root}/out"))
    again = collect(settings(endpoint, tmp_path, f"{root}/out"))
    assert (first["collected"], again["present"], again["collected"], len(endpoint.asked)) == (12, 12, 0, 12)
    for number in range(2):
        collect(settings(endpoint, tmp_path, f"{root}/shards", shard=[number, 2]))
    assert collect(settings(endpoint, tmp_path, f"{root}/shards"))["present"] == 12
    assert len(endpoint.asked) == 24
    assert not [name for name in bucket.names_in(root) if name.endswith(".lock")]


def test_another_machine_goes_on_with_a_collection_in_a_bucket(tmp_path, endpoint, monkeypatch, request):
    output = f"memory://{request.node.name}/out"
    for number, count in enumerate((5, 12)):
        monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / f"machine {number}"))
        collect(settings(endpoint, tmp_path, output, count))
    assert len(endpoint.asked) == len({*endpoint.asked}) == 12
    assert len([*read_records(bucket.local(f"{output}/traces.jsonl"))]) == 12


def test_a_second_machine_does_not_collect_into_the_same_bucket(tmp_path, endpoint, cache, request, monkeypatch):
    output = f"memory://{request.node.name}/out"
    said = []

    def alive(url):
        said.append(url)
        return json.dumps({"host": "another", "pid": 1, "nonce": "x", "beat": len(said)}).encode()

    monkeypatch.setattr("bmjax.io.bucket_lock.read", alive)
    with pytest.raises(UserError, match=r"another process collects into it \(process 1 of another\)"):
        collect(settings(endpoint, tmp_path, output))
    assert not endpoint.asked


def test_parts_in_a_bucket_are_joined(tmp_path, cache, request):
    root = f"memory://{request.node.name}"
    traces = write_rows(tmp_path / "traces.jsonl", [trace(n) for n in range(9)])
    for number in range(2):
        select(selection(traces, f"{root}/out", shard=[number, 2]))
    select(selection(traces, f"{root}/out", join=True))
    select(selection(traces, tmp_path / "whole"))
    assert bucket.read(f"{root}/out/sums.jsonl") == (tmp_path / "whole" / "sums.jsonl").read_bytes()


def test_traces_in_a_bucket_are_judged_in_place(tmp_path, cache, request):
    url = f"memory://{request.node.name}/out/traces.jsonl"
    bucket.write(url, json.dumps(trace(1, verdict="wrong")).encode() + b"\n")
    counts = rejudge(JudgeSettings.read({"traces": url.removesuffix("/traces.jsonl")}))
    assert counts["changed"] == {"wrong -> right": 1} and counts["output"] == url
    assert json.loads(bucket.read(url))["verdict"] == "right"
    assert bucket.names_in(url.removesuffix("/traces.jsonl")) == ["traces.jsonl"]


@pytest.mark.parametrize("keys", [{"shard": [0, 2]}, {"only": {"prompt": "What is 1 + 1?"}}])
def test_judging_a_part_never_replaces_the_whole(tmp_path, keys):
    file = write_rows(tmp_path / "traces.jsonl", [trace(n) for n in range(9)])
    before = file.read_bytes()
    for output in (file, tmp_path):
        with pytest.raises(UserError, match="one of the traces, of which it would lose some"):
            rejudge(JudgeSettings.read({"traces": str(file), "output": str(output), **keys}))
    assert file.read_bytes() == before


def test_judging_never_replaces_another_form_by_name(tmp_path):
    row = {"prompt": "2 + 2?", "response": "4", "reference": "4"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps([row, row]))
    with pytest.raises(UserError, match="not traces of `bmjax collect`"):
        rejudge(JudgeSettings.read({"traces": str(file), "output": str(file), "domain": "sums"}))
    assert json.loads(file.read_text()) == [row, row]


def test_a_template_of_one_field_may_be_an_override(tmp_path, capsys):
    file = write_rows(tmp_path / "traces.jsonl", [trace(1)])
    problems = write_rows(tmp_path / "problems.jsonl", [{"q": "What is 1 + 1?", "a": "3"}])
    assert cli.main(["judge", str(file), f"problems={problems}", "prompt={q}", "reference={a}"]) == 0
    assert json.loads(file.read_text())["reference"] == "3"
    assert "right -> wrong: 1" in capsys.readouterr().out


def test_selection_never_replaces_its_traces(tmp_path):
    file = write_rows(tmp_path / "sums.jsonl", [trace(1), trace(2, verdict="wrong")])
    before = file.read_bytes()
    with pytest.raises(UserError, match="is a file of `traces`"):
        select(selection(file, tmp_path))
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("domain", ["traces", "failures", "contamination", "a/b", "", "..", "x\n"])
def test_a_domain_that_names_no_file_of_its_own_is_refused_before_it_is_paid(tmp_path, endpoint, domain):
    with pytest.raises(UserError, match="domain"):
        settings(endpoint, tmp_path, "out", domain=domain)
    file = write_rows(tmp_path / "rows.jsonl", [trace(1, domain=domain)])
    with pytest.raises(UserError, match="domain"):
        select(selection(file, tmp_path / "out"))


@pytest.mark.parametrize(("name", "content"), [("part.json", b"{"), ("part.json", b"[]"), ("ledger.sqlite", b"x" * 99)])
def test_a_damaged_part_is_named(tmp_path, name, content):
    file = write_rows(tmp_path / "rows.jsonl", [trace(n) for n in range(4)])
    for number in range(2):
        select(selection(file, tmp_path / "out", shard=[number, 2]))
    (tmp_path / "out/parts/x-of-y").mkdir()
    (tmp_path / "out/parts/1-of-2" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"1-of-2: damaged: .*make it again: shard=\[1, 2\]"):
        select(selection(file, tmp_path / "out", join=True))
    select(selection(file, tmp_path / "out", shard=[1, 2]))
    select(selection(file, tmp_path / "out", join=True))


def test_a_single_part_is_joined_twice_alike(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [trace(n) for n in range(4)])
    select(selection(file, tmp_path / "out", shard=[0, 1]))
    before = (tmp_path / "out/parts/0-of-1/ledger.sqlite").read_bytes()
    select(selection(file, tmp_path / "out", join=True))
    assert (tmp_path / "out/parts/0-of-1/ledger.sqlite").read_bytes() == before


def test_a_source_without_traces_and_an_embedding_without_benchmarks_are_said(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [trace(1)])
    said = []
    select(selection(file, tmp_path / "out", per_source={"a.json": 1}), said.append)
    assert "select: per_source: no trace has the source 'a.json'; did you mean 'a.jsonl'?" in said
    with pytest.raises(UserError, match="embedding"):
        selection(file, tmp_path / "out", embedding="org/model")


def test_problems_with_the_same_prompt_are_said(tmp_path, endpoint, capsys):
    keys = settings(endpoint, tmp_path, str(tmp_path / "out"), 3)
    counts = collect(keys.model_copy(update={"problems": [keys.problems, keys.problems]}))
    assert counts["collected"] == 3
    assert "3 of them repeat the prompt of an earlier one" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["sk-1234567890", "hf_abcdefghij", "gsk_AbCd1234"])
def test_a_key_in_place_of_its_variable_is_not_shown(tmp_path, endpoint, key, capsys):
    keys = settings(endpoint, tmp_path, str(tmp_path / "out")).model_dump(mode="json")
    config = tmp_path / "collect.yaml"
    config.write_text(json.dumps(keys))
    assert cli.main(["collect", str(config), f"teacher.api_key_env={key}"]) == 2
    line = capsys.readouterr().err
    assert key not in line and "never the key" in line and line.count("\n") == 1


def test_a_collector_that_is_killed_while_it_sends_pays_nothing_twice(tmp_path, endpoint, buckets, cache, request):
    output = f"s3://bucket/{request.node.name}"
    config = tmp_path / "collect.yaml"
    keys = settings(endpoint, tmp_path, output).model_dump(mode="json", exclude_unset=True)
    config.write_text(json.dumps(keys))
    # The file arrives in the bucket, and the process dies before it knows.
    program = f"""
import os, sys
from bmjax.cli.main import main
from bmjax.io import bucket
import s3fs
put = s3fs.S3FileSystem._put_file
async def killed(self, *arguments, **keys):
    await put(self, *arguments, **keys)
    if os.path.getsize(arguments[0]):
        os.kill(os.getpid(), 9)
s3fs.S3FileSystem._put_file = killed
main(["collect", {str(config)!r}])
"""
    process = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True)
    assert process.returncode == -9
    asked = len(endpoint.asked)
    said = []
    counts = collect(CollectSettings.read(config), said.append)
    assert asked and counts["present"] + counts["collected"] == 12 and len({*endpoint.asked}) == 12
    assert len(endpoint.asked) == 12 and not [*(tmp_path / "cache").rglob("*.unsent")]
    assert bucket.read(f"{output}/traces.jsonl").count(b"\n") == 12
