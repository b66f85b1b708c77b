"""YAML and text files of any origin are read safely, and what is wrong with them is one line."""

import os

import pytest

from bmjax.errors import UserError
from bmjax.safe_yaml import parse_yaml_documents, read_text, read_yaml
from tests.test_config import Outer, problem


@pytest.mark.parametrize("text, line", [
    ("steps: 1\nkind: b\nsteps: 2\n", "line 3: key 'steps' stands twice in the same block; remove one"),
    ("steps: 1\ninner:\n  rate: 0.1\n  rate: 0.2\n", "line 4: key 'rate' stands twice"),
    ("- 1\n", "expected `key: value` lines at the top, found a list '[1]'"),
    ("[]\n", "expected `key: value` lines at the top, found a list '[]'"),
    ("steps\n", "expected `key: value` lines at the top, found text 'steps'"),
    ("steps: 1\n---\nsteps: 2\n", "2 YAML documents, expected one"),
    ("steps: [1\n", "line 2: not valid YAML"),
    ("steps: !!python/object/apply:os.system ['true']\n", "line 1: not valid YAML: could not determine a constructor"),
    ("steps: !!python/name:os.system\n", "line 1: not valid YAML: could not determine a constructor"),
    ("steps: !!python/tuple 3\n", "line 1: not valid YAML: expected a sequence node"),
    ("steps: 2024-13-45\n", "not valid YAML: a value is not what its tag or form says: month must be in 1..12"),
    ("steps: !!int x\n", "not valid YAML: a value is not what its tag or form says"),
    ("steps: !!bool x\n", "not valid YAML: a value is not what its tag or form says"),
    ("steps: !!timestamp x\n", "not valid YAML: a value is not what its tag or form says"),
    ("? [a]\n: 1\n", "line 1: not valid YAML: found unhashable key"),
    ("steps: \x07\n", "not valid YAML: unacceptable character"),
    ("[" * 5000, "not valid YAML: nested too deeply"),
    ("a: &a [*a]\n", "an anchor contains itself"),
    ("steps: *nowhere\n", "line 1: not valid YAML: found undefined alias 'nowhere'"),
])  # fmt: skip
def test_bad_yaml_is_one_line(tmp_path, text, line):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = problem(file)
    assert message.startswith(f"{file}: {line}"), message


def test_alias_bomb_is_refused_before_it_is_built(tmp_path):
    file = tmp_path / "run.yaml"
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    file.write_text("\n".join(levels))
    assert problem(file) == f"{file}: more than 100000 values once aliases are written out; refused"


def test_pipes_devices_and_huge_files_are_refused(tmp_path):
    pipe, link, device = tmp_path / "pipe.yaml", tmp_path / "link.yaml", tmp_path / "device.yaml"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, link, device):
        assert problem(path) == f"{path}: not a regular file"
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert problem(loop) == f"{loop}: no such file, only a link that leads nowhere"
    large = tmp_path / "large.yaml"
    large.write_text("a: 1\n" * 60_000)
    assert problem(large) == f"{large}: more than 262144 characters; refused, is it the right file?"
    os.truncate(large, 10**11)  # a hole, which is not read
    assert problem(large) == f"{large}: more than 262144 characters; refused, is it the right file?"


def test_half_characters_and_sets_are_refused():
    for text in ('a: "x\\uD800"', '"\\uDFFF": 1', "- ['\\', \"\\uD83D\"]"):
        with pytest.raises(UserError, match=r"^x: line 1: .* is no text: half a character"):
            parse_yaml_documents(text, "x")
    assert parse_yaml_documents('"\\U0001F600 é"', "x") == ["😀 é"]
    with pytest.raises(UserError, match="not valid YAML"):
        parse_yaml_documents("!!set {b, a}", "x")
    with pytest.raises(UserError, match="expected key=value"):
        Outer.read({"steps": 1}, ["\udcff=1"])


@pytest.mark.parametrize(
    "text", ["1" * 401, "0x" + "F" * 400_000, "1" + ":1" * 60_000, "1." + "1" * 500, "1e" + "1" * 500]
)
def test_endless_number_is_refused_before_it_is_computed(text):
    with pytest.raises(UserError, match=r"line 2: a number of .* characters; refused"):
        parse_yaml_documents(f"steps: 1\nrate: {text}\n", "x")


def test_anchors_unicode_and_numbers_are_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "steps: 3\ninner: &i\n  rate: 1e-1\ntasks:\n  m: *i\n  n:\n    <<: *i\n    names: [é]\n", encoding="utf-8"
    )
    settings = Outer.read(file)
    assert settings.tasks["m"].rate == settings.tasks["n"].rate == settings.inner.rate == 0.1
    assert settings.tasks["n"].names == ["é"]
    numbers = ("1e-5", "-2E3", ".5e1", "1.0", "1e", "0x10")
    assert [parse_yaml_documents(f"x: {text}", "")[0]["x"] for text in numbers] == [
        1e-5, -2000.0, 5.0, 1.0, "1e", 16,
    ]  # fmt: skip
    assert parse_yaml_documents("x: !!python/tuple [0, !!python/tuple [1]]", "") == [{"x": [0, [1]]}]
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert read_yaml(empty) == {}
    assert problem(empty) == f"{empty}: key 'steps' is missing; it has no default"


def test_unreadable_files_say_why(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b"x: \xe9")
    for name, line in [
        ("demmo.yaml", f"no such file; did you mean {tmp_path / 'demo.yaml'}?"),
        ("zzz", "no such file"),
        ("nowhere/x.yaml", "no such file"),
        (".", "is a directory, expected a file"),
        ("latin.yaml", "not UTF-8 text"),
        ("x" * 300, "File name too long"),
        ("demo.yaml/x", "no such file"),
    ]:
        with pytest.raises(UserError) as error:
            read_text(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {line}"
