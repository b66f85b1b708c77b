"""`--check`: one flag of several commands, which say what they would do, do not do it, and write nothing."""

import json

import pytest

from bmjax.cli.commands import COMMANDS
from bmjax.cli.main import main
from tests.conftest import sums, write_rows

CHECKED = {"run", "collect", "train", "eval", "merge", "push"}


def lines_of(capsys, *words: object) -> list[str]:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "rows.jsonl", sums(10))
    return tmp_path


def test_the_flag_is_declared_in_one_place():
    assert {name for name, command in COMMANDS.items() if command.check} == CHECKED
    assert not any("--check" in option.flags for command in COMMANDS.values() for option in command.options)
    assert all("[--check]" in COMMANDS[name].usage for name in CHECKED)


def test_collect_tells_requests_tokens_and_cost(folder, capsys):
    config = folder / "collect.yaml"
    teacher = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "samples": 3, "max_tokens": 1000}
    values = {
        "problems": str(folder / "rows.jsonl"), "prompt": "{prompt}", "reference": "{reference}", "domain": "sums",
        "output": str(folder / "out"), "teacher": teacher | {"price": {"output": 2.0}},
    }  # fmt: skip
    config.write_text(json.dumps(values))
    lines = lines_of(capsys, "collect", config, "--check")
    assert lines[0] == "collect sums: 30 traces wanted, 0 already there"
    assert lines[1].startswith("30 requests of m at http://127.0.0.1:9/v1")
    assert "answers of at most 30,000 tokens; cost 0.06" in lines
    assert lines[-1] == "nothing was asked or written" and not (folder / "out").exists()
    # Answers that are there are not asked for again, and tell how long others will be.
    from bmjax.teach.collect import wanted_samples
    from bmjax.teach.settings import CollectSettings

    identities = list(wanted_samples(CollectSettings.read(values)))[:6]
    record = {"domain": "sums", "source": "x", "prompt": "p", "reference": "1", "reasoning": "", "response": "1",
              "finish_reason": "stop", "teacher": {}, "usage": {"completion_tokens": 50}, "verdict": "right",
              "verdict_by": "x"}  # fmt: skip
    write_rows(folder / "traces.jsonl", [{"id": identity} | record for identity in identities])
    (folder / "out").mkdir()
    (folder / "traces.jsonl").rename(folder / "out" / "traces.jsonl")
    lines = lines_of(capsys, "collect", config, "--check")
    assert lines[0] == "collect sums: 30 traces wanted, 6 already there"
    assert any(line.startswith("answers of about 1,200 tokens, as 6 answers there; cost 0.00") for line in lines)
    assert [path.name for path in (folder / "out").iterdir()] == ["traces.jsonl"]


def test_eval_tells_answers_and_memory(folder, student, capsys):
    task = {"questions": str(folder / "rows.jsonl"), "traces": str(folder / "rows.jsonl"), "samples": 2}
    config = folder / "eval.yaml"
    values = {"model": str(student), "output": str(folder / "out"), "tasks": {"sums": task}, "max_new_tokens": 20}
    config.write_text(json.dumps(values))
    lines = lines_of(capsys, "eval", config, "--check")
    assert lines[0].startswith(
        "sums: 10 questions, 2 samples each; 0 answers are there, 20 to ask for, at most 400 tok"
    )
    assert lines[1] == "sums: held-out loss of 10 traces"
    assert "parameters in float32" in lines[2] and lines[2].endswith("nothing was written")
    assert not (folder / "out").exists()
    assert main(["eval", "--compare", "a", "b", "--check"]) == 2
    task.pop("traces")
    config.write_text(json.dumps(values | {"base_url": "http://127.0.0.1:9/v1"}))
    assert lines_of(capsys, "eval", config, "--check")[-1].startswith(f"20 requests of {student} at http://127.0.0.1:9")


def test_train_tells_steps_and_memory(folder, student, capsys):
    config = folder / "train.yaml"
    values = {"student": str(student), "data": str(folder / "rows.jsonl"), "output": str(folder / "out")}
    config.write_text(json.dumps(values | {"remat": "none"}))
    lines = lines_of(capsys, "train", config, "--check")
    assert lines[0].startswith("chosen,") and any(line.startswith("a step takes ") for line in lines)
    assert "5.00 epochs" in lines[-1] and not (folder / "out").exists()


def test_a_password_in_an_address_is_not_shown(folder, capsys):
    secret = "http://me:hunter2@127.0.0.1:9/v1"
    rows = str(folder / "rows.jsonl")
    collect = {"problems": rows, "prompt": "{prompt}", "reference": "{reference}", "domain": "sums",
               "output": str(folder / "out"), "teacher": {"base_url": secret, "model": "m"}}  # fmt: skip
    task = {"questions": rows, "prompt": "{prompt}", "reference": "{reference}"}
    evaluation = {"model": "m", "base_url": secret, "output": str(folder / "scores"), "tasks": {"sums": task}}
    for name, values in (("collect", collect), ("eval", evaluation)):
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps(values))
        lines = lines_of(capsys, name, config, "--check")
        assert any("http://127.0.0.1:9/v1" in line for line in lines) and "hunter2" not in "".join(lines)
    assert main(["chat", secret]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9/v1" in error and "hunter2" not in error


def test_ctrl_d_at_a_question_of_init_writes_nothing(folder, capsys, monkeypatch):
    def end(question: str) -> str:
        raise EOFError

    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", end)
    assert main(["init", "train"]) == 130
    assert not (folder / "train.yaml").exists() and "nothing was written" in capsys.readouterr().err
