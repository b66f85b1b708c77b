"""What a user gets wrong in a config is one line that names the key, what was found and the fix."""

from typing import Literal

import pytest
from pydantic import Field, model_validator

from bmjax.branch.settings import TrainSettings
from bmjax.config import Settings, UserError, describe, parse_yaml_documents
from bmjax.evaluate.settings import EvalSettings
from bmjax.generate.settings import ChatSettings, ServeSettings
from bmjax.pipeline.settings import RunSettings
from bmjax.teach.settings import CollectSettings, SelectSettings


class Inner(Settings):
    """A block."""

    rate: float = Field(0.5, ge=0, le=1, description="a share")
    names: list[str] = Field([], description="names")


class Outer(Settings):
    """Settings for these tests."""

    steps: int = Field(description="how many")
    kind: Literal["a", "b"] = Field("a", description="which")
    flag: bool = Field(False, description="whether")
    inner: Inner = Field(Inner(), description="more")
    maybe: Inner | None = Field(None, description="or nothing")
    source: str | list[str] | Inner = Field("x", description="where from")
    tasks: dict[str, Inner] = Field({}, description="by name")
    pairs: dict[str, tuple[int, int]] = Field({}, description="bounds")

    @model_validator(mode="after")
    def _together(self):
        if self.flag and self.steps > 10:
            raise ValueError("flag needs at most 10 steps")
        return self


def problem(source, *overrides) -> str:
    with pytest.raises(UserError) as error:
        Outer.read(source, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("values, line", [
    ({"max_tokens": 1, "max_new_tokens": 2}, "max_new_tokens and max_tokens are names of one key; give one of them"),
    ({"tasks": {"t": {"questions": "f", "k": 2, "samples": 2}}},
     "tasks.t: samples and k are names of one key; give one of them"),
    ({"tasks": {"aime24": {"data": "f", "questions": "f"}}},
     "tasks.aime24: questions and data are names of one key; give one of them"),
    ({"tasks": {"t": {"questions": "f", "verify": "math", "kind": "math", "judge": None}}},
     "tasks.t: judge and verify and kind are names of one key; give one of them"),
])  # fmt: skip
def test_two_names_of_one_key_are_told(values, line):
    with pytest.raises(UserError) as error:
        EvalSettings.read({"model": "m", "output": "o", "tasks": {"t": {"questions": "f"}}} | values)
    assert str(error.value) == f"settings: {line}"


@pytest.mark.parametrize("values, line", [
    ({}, "key 'steps' is missing; it has no default"),
    ({"stpes": 1}, "unknown key 'stpes'; did you mean 'steps'?"),
    ({"steps": 1, "zzz": 1}, "unknown key 'zzz'; known here: flag, inner, kind, maybe, pairs, source, steps, tasks"),
    ({"steps": "ten"}, "steps: expected a whole number, found text 'ten'"),
    ({"steps": 1.5}, "steps: expected a whole number, found a number '1.5'"),
    ({"steps": True}, "steps: expected a whole number, found true/false 'True'"),
    ({"steps": 1, "inner": {"rate": True}}, "inner.rate: expected a number, found true/false 'True'"),
    ({"steps": None}, "steps: expected a whole number, found nothing"),
    ({"steps": [1]}, "steps: expected a whole number, found a list '[1]'"),
    ({"steps": 1, "kind": "c"}, "kind: expected 'a' or 'b', found text 'c'"),
    ({"steps": 1, "flag": "perhaps"}, "flag: expected true or false, found text 'perhaps'"),
    ({"steps": 11, "flag": True}, "flag needs at most 10 steps"),
    ({"steps": 1, "inner": 3}, "inner: expected a block of keys, found a whole number '3'"),
    ({"steps": 1, "inner": {"rtae": 1}}, "unknown key 'inner.rtae'; did you mean 'rate'?"),
    ({"inner": {"rate": 2}, "steps": 1}, "inner.rate: expected a number less than or equal to 1, found a whole"),
    ({"steps": 1, "inner": {"rate": float("nan")}}, "inner.rate: expected a finite number, found a number 'nan'"),
    ({"steps": 1, "inner": {"names": "x"}}, "inner.names: expected a list, found text 'x'"),
    ({"steps": 1, "inner": {"names": ["x", 3]}}, "inner.names.1: expected text, found a whole number '3'"),
    ({"steps": 1, "maybe": {"rtae": 1}}, "unknown key 'maybe.rtae'; did you mean 'rate'?"),
    ({"steps": 1, "source": 3}, "source: expected text, a list or a block of keys, found a whole number '3'"),
    ({"steps": 1, "source": ["x", 3]}, "source.1: expected text, found a whole number '3'"),
    ({"steps": 1, "source": {"rtae": 1}}, "unknown key 'source.rtae'; did you mean 'rate'?"),
    ({"steps": 1, "source": {"names": 1}}, "source.names: expected a list, found a whole number '1'"),
    ({"steps": 1, "tasks": {"MATH": {"rtae": 1}}}, "unknown key 'tasks.MATH.rtae'; did you mean 'rate'?"),
    ({"steps": 1, "tasks": {"str": {"rate": "x"}}}, "tasks.str.rate: expected a number, found text 'x'"),
    ({"steps": 1, "tasks": {3: {}}}, "tasks.3: expected a name as key, found a whole number '3'; write it in quotes"),
    ({"steps": 1, 7: 1}, "7: expected a name as key, found a whole number '7'; write it in quotes"),
    ({"steps": 1, "pairs": {"id": [1]}}, "pairs.id: too few values: the one with index 1 is missing"),
])  # fmt: skip
def test_wrong_values_are_named(values, line):
    assert problem(values).startswith(f"settings: {line}")


@pytest.mark.parametrize("cls, text, line", [
    (CollectSettings, "{domain: d, problems: 1}", "problems: expected text or a list, found a whole number '1'"),
    (CollectSettings, "{domain: d, problems: p, teacher: {sampels: 0}}", "unknown key 'teacher.sampels'; did you mean"),
    (CollectSettings, "{domain: d, problems: p, teacher: {extra: 1}}", "teacher.extra: expected a block of keys"),
    (RunSettings, "{domains: {m: {problems: 1}}}", "domains.m.problems: expected a block of keys, found a whole"),
    (SelectSettings, "{traces: t, keep: [rihgt]}", "keep.0: expected 'right', 'unjudged' or 'wrong', found"),
    (EvalSettings, "{model: m, tasks: {m: {question: q}}}", "unknown key 'tasks.m.question'; did you mean 'questions'"),
    (TrainSettings, "{student: s, data: {a: 1}, steps: 1}", "data: expected text or a list, found a block of keys"),
    (TrainSettings, "{student: s, data: d, steps: 1, epochs: 1}", "give exactly one of 'steps' and 'epochs'"),
    (TrainSettings, "{student: s, data: d, steps: 1, batch: 6, accumulate: 4}", "batch 6 is not a multiple of acc"),
])  # fmt: skip
def test_settings_of_every_phase_name_their_keys(cls, text, line):
    with pytest.raises(UserError) as error:
        cls.read({"output": "o"} | parse_yaml_documents(text, "")[0])
    assert str(error.value).startswith(f"settings: {line}")


def test_overrides_come_after_the_file_in_order(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 3\ninner: {rate: 0.2, names: [a]}\n")
    settings = Outer.read(
        file, ["steps=4", "steps=5", "inner.rate=1e-1", "tasks.new.names=[p, q/*]", "maybe.rate=1", "source=a=b"]
    )
    assert (settings.steps, settings.inner.rate, settings.inner.names) == (5, 0.1, ["a"])
    assert (
        settings.tasks["new"].names == ["p", "q/*"] and settings.maybe == Inner(rate=1.0) and settings.source == "a=b"
    )
    assert Outer.read({"steps": 1, "maybe": {}}, ["maybe="]).maybe is None
    assert Outer.read({"steps": 1}, ["maybe={rate: 1}"]).maybe == Inner(rate=1.0)


def test_an_override_of_a_text_may_begin_with_a_brace():
    class Templates(Settings):
        prompt: str
        system: str | None = None

    class WithTemplates(Settings):
        rows: Templates | None = None

    assert Templates.read({}, ["prompt={q}"]).prompt == "{q}"
    assert WithTemplates.read({}, ["rows.prompt={a} and {b}", "rows.system={c}"]).rows == Templates(
        prompt="{a} and {b}", system="{c}"
    )


@pytest.mark.parametrize("override, line", [
    ("steps", "'steps': expected key=value or key.sub=value"),
    ("=3", "'=3': expected key=value or key.sub=value"),
    ("stpes=3", "settings: unknown key 'stpes'; did you mean 'steps'?"),
    ("inner.rtae=3", "settings: unknown key 'inner.rtae'; did you mean 'rate'?"),
    ("steps.x=3", "settings: steps: expected a whole number, found a block of keys \"{'x': 3}\""),
    ("steps=[3", "override 'steps=[3': line 1: not valid YAML"),
    ("steps=!!python/name:os.system", "override 'steps=!!python/name:os.system': line 1: not valid YAML"),
])  # fmt: skip
def test_bad_overrides_are_one_line(override, line):
    assert problem({"steps": 1}, override).startswith(line)


def test_reading_leaves_the_mapping_alone():
    values = {"steps": 1, "inner": {"rate": 0.1}}
    assert Outer.read(values, ["inner.rate=0.3"]).inner.rate == 0.3
    assert values == {"steps": 1, "inner": {"rate": 0.1}}
    with pytest.raises(Exception, match="frozen"):
        Outer.read(values).steps = 2


def all_settings(cls=Settings):
    return [kind for sub in cls.__subclasses__() for kind in (sub, *all_settings(sub))]


def keys_of(cls, prefix=""):
    """Every key that a user can write, found without `describe`."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        text = str(field.annotation)
        for inner in all_settings():
            if inner.__name__ in text:
                yield from keys_of(inner, prefix + name + (".NAME." if text.startswith("dict") else "."))


@pytest.mark.parametrize(
    "cls",
    [Outer, TrainSettings, EvalSettings, CollectSettings, SelectSettings, RunSettings, ServeSettings, ChatSettings],
)
def test_describe_has_a_line_for_every_key(cls):
    lines = describe(cls)
    keys = [line.split(":")[0].strip() for line in lines]
    assert len(keys) == len(set(keys)) and set(keys_of(cls)) == set(keys)
    for line in lines:
        assert line.rstrip().rpartition(". ")[2], f"no description: {line}"


def test_describe_shows_defaults_and_types():
    lines = "\n".join(" ".join(line.split()) for line in describe(Outer))
    for part in (
        "steps: (required) whole number. how many", "kind: a a|b. which", "flag: false true|false. whether",
        "inner.rate: 0.5 number. a share", "maybe: null block or null. or nothing", "tasks.NAME.names: [] list. names",
        "source: x text or list or block. where from",
    ):  # fmt: skip
        assert part in lines, part


@pytest.mark.parametrize("key", ["output", "student", "data"])
@pytest.mark.parametrize("path", ["gss://bucket/x", "s4://bucket/x", "Bucket:/x"])
def test_unknown_schemes_are_refused_before_anything_is_read(key, path, tmp_path, monkeypatch):
    from bmjax.branch.settings import TrainSettings

    monkeypatch.chdir(tmp_path)
    values = {"student": "missing", "data": ["rows.jsonl"], "output": "run"} | {key: [path] if key == "data" else path}
    with pytest.raises(UserError, match=rf"{key}: '{path}': no file system has the scheme"):
        TrainSettings.read(values)
    assert not list(tmp_path.iterdir())
