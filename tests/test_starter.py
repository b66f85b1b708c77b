"""First configs: they are read as they are, and the comments in them are true."""

import json
import re
from pathlib import Path

import pytest
import yaml

from bmjax.cli.commands import COMMANDS
from bmjax.cli.main import main
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.starter import RECIPE, STARTERS, commented, with_answers


@pytest.mark.parametrize("name", STARTERS)
def test_a_first_config_is_read_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", name]) == 0
    settings = COMMANDS[name].settings_class()
    assert settings.read(tmp_path / f"{name}.yaml") == settings.read(with_answers(STARTERS[name], {}))
    printed = capsys.readouterr().out
    assert STARTERS[name].next.replace("FILE", f"{name}.yaml") in printed


@pytest.mark.parametrize("name", STARTERS)
def test_every_commented_key_has_its_default(name: str) -> None:
    settings = COMMANDS[name].settings_class()
    values = with_answers(STARTERS[name], {})
    lines = commented(settings, values)
    plain = yaml.safe_load("\n".join(re.sub(r"^( *)# ", r"\1", line) for line in lines))
    # A known task has values of its own where a config is silent; once all keys are given, it has the config's.
    differing = {"tasks"} if name == "eval" else set()
    assert settings.read(plain).model_dump(exclude=differing) == settings.read(values).model_dump(exclude=differing)
    optional = {key for key, field in settings.model_fields.items() if not field.is_required()}
    assert optional <= set(plain)


def test_answers_and_overrides_are_written(tmp_path: Path, capsys) -> None:
    file = tmp_path / "c.yaml"
    words = ["init", "train", "student=org/name", "data=[a.jsonl, b.jsonl]", "seq_len=128", "mesh.data=2"]
    assert main([*words, "--output", str(file)]) == 0
    values = yaml.safe_load(file.read_text())
    assert (values["student"], values["data"], values["seq_len"]) == ("org/name", ["a.jsonl", "b.jsonl"], 128)
    before = file.read_text()
    assert main([*words, "--output", str(file)]) == 2
    assert (file.read_text(), "exists" in capsys.readouterr().err) == (before, True)


def test_questions_are_asked_at_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def answer(text: str) -> str:
        asked.append(text)
        return "" if len(asked) == 1 else "mine.jsonl"

    monkeypatch.setattr("builtins.input", answer)
    assert main(["init", "train", "output=runs/x"]) == 0
    values = yaml.safe_load((tmp_path / "train.yaml").read_text())
    assert len(asked) == 2
    assert (values["student"], values["data"], values["output"]) == (
        STARTERS["train"].questions[0].default, "mine.jsonl", "runs/x",
    )  # fmt: skip


def test_a_recipe_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "merge"]) == 0
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE
    assert read_recipe(tmp_path / "recipe.yaml").steps[0].method.name == "task_arithmetic"
    uncommented = re.sub(r"(?m)^# (?=\w+: )", "", RECIPE.partition("\n")[2])
    assert read_recipe(yaml.safe_load(uncommented)).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("trian", "'trian' takes no config; did you mean 'train'?"),
        ("serve", "'serve' takes no config"),
        ("train sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("train seq_len=many", "seq_len: expected a whole number"),
        ("train batch", "'batch': expected key=value"),
        ("merge dtype=float32", "takes no keys"),
    ],
)
def test_a_wrong_use_writes_nothing(
    words: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *words.split()]) == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STARTERS)
def test_the_schema_knows_every_key(name: str, capsys) -> None:
    assert main(["init", name, "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) >= set(with_answers(STARTERS[name], {}))
    assert schema["additionalProperties"] is False
    assert all("description" in entry for entry in schema["properties"].values())
