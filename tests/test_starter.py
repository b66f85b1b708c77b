"""First configs: they are read as they are, and the comments in them are true."""

import json
import re
from pathlib import Path

import pytest
import yaml

from bmjax.cli.commands import COMMANDS
from bmjax.cli.main import main
from bmjax.merge.methods import METHODS
from bmjax.merge.recipe.calibration import CALIBRATED
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.starter import STARTERS, commented, with_answers

ROOT = Path(__file__).resolve().parents[1]


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
    text = (tmp_path / "recipe.yaml").read_text()
    step = read_recipe(tmp_path / "recipe.yaml").steps[0]
    assert (step.method.name, step.base, step.branches) == (
        "task_arithmetic", "Qwen/Qwen2.5-0.5B", ("math_model", "code_model"),
    )  # fmt: skip
    uncommented = re.sub(r"(?m)^# (?=\w+: )", "", text.partition("\n")[2])
    assert read_recipe(yaml.safe_load(uncommented)).dtype == "bfloat16"


@pytest.mark.parametrize("name", [*METHODS, *CALIBRATED])
def test_a_recipe_of_every_method_is_read(name: str, tmp_path: Path, capsys) -> None:
    method = (METHODS | CALIBRATED)[name]
    models = ["a", "b"][: method.branches[1]]
    file = tmp_path / "recipe.yaml"
    done = main(["init", "merge", f"merge_method={name}", f"models={','.join(models)}", "base_model=base",
                 "dtype=float32", "--output", str(file)])  # fmt: skip
    if name == "fisher":  # what its models were trained on is asked of whoever has it
        assert done == 2 and "importance" in capsys.readouterr().err and not file.exists()
        return
    assert done == 0
    values = yaml.safe_load(file.read_text())
    assert (values["merge_method"], values["base_model"], values["dtype"]) == (name, "base", "float32")
    entries = [entry if isinstance(entry, dict) else {"model": entry} for entry in values["models"]]
    assert [entry["model"] for entry in entries] == models
    weights = [entry.get("parameters", {}).get("weight") for entry in entries]
    assert weights == [1 / len(models) if "weight" in getattr(method, "parameters", ()) else None] * len(models)
    assert all(("data" in entry) == (name in CALIBRATED) for entry in entries)


def test_a_recipe_asks_for_what_its_method_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []
    answers = {"fine-tuned models": "x, y , z", "method": "linear", "fine-tuned from": "base"}

    def answer(text: str) -> str:
        asked.append(next(key for key in answers if key in text))
        return answers[asked[-1]]

    monkeypatch.setattr("builtins.input", answer)
    assert main(["init", "merge"]) == 0
    assert asked == ["fine-tuned models", "method"]  # a mean has no base
    values = yaml.safe_load(Path("recipe.yaml").read_text())
    assert "base_model" not in values and [entry["model"] for entry in values["models"]] == ["x", "y", "z"]
    asked.clear()
    assert main(["init", "merge", "merge_method=ties", "--output", "ties.yaml"]) == 0
    assert asked == ["fine-tuned models", "fine-tuned from"]
    assert yaml.safe_load(Path("ties.yaml").read_text())["base_model"] == "base"


@pytest.mark.parametrize("models", ["", "5", "{a: b}"])
def test_models_that_are_no_names_are_refused(tmp_path: Path, capsys, models: str) -> None:
    file = tmp_path / "recipe.yaml"
    done = main(["init", "merge", "merge_method=ties", f"models={models}", "base_model=base", "--output", str(file)])
    assert done == 2 and "models: expected names" in capsys.readouterr().err and not file.exists()


def test_the_schema_of_recipes_knows_every_key_of_the_worked_ones(capsys) -> None:
    assert main(["init", "merge", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    files = [*(ROOT / "configs" / "merge").glob("*.yaml")]
    assert len(files) > 20
    methods = schema["properties"]["merge_method"]["enum"]
    step_keys, entry_keys = (schema["$defs"][name]["properties"] for name in ("StepBlock", "ModelEntry"))
    for file in files:
        for document in yaml.safe_load_all(file.read_text()):
            assert document.keys() <= schema["properties"].keys(), file
            for step in document.get("steps", [document]):
                assert step.keys() <= {*step_keys, *schema["properties"]}, file
                assert step.get("merge_method", methods[0]) in methods, file
                for entry in step.get("models") or ():
                    assert isinstance(entry, str) or entry.keys() <= entry_keys.keys(), file


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("trian", "'trian' takes no config; did you mean 'train'?"),
        ("serve", "'serve' takes no config"),
        ("train sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("train seq_len=many", "seq_len: expected a whole number"),
        ("train batch", "'batch': expected key=value"),
        ("merge dtype=float31", "dtype"),
        ("merge merge_method=tis", "unknown merge_method 'tis'; did you mean 'ties'?"),
        ("merge densty=1", "unknown key 'densty'"),
        ("merge merge_method=slerp", "slerp"),
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
