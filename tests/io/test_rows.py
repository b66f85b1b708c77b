from pathlib import Path

import pytest

from bmjax.config import UserError
from bmjax.io.rows import fill, read_rows


def test_fields_braces_and_whole_values() -> None:
    row = {"q": "1 + 1", "n": 3, "tests": {"tests": [1]}}
    assert fill("Solve {q} in \\boxed{{}}, {n} times", row, "f:1", "prompt") == "Solve 1 + 1 in \\boxed{}, 3 times"
    assert fill("{tests}", row, "f:1", "reference") == {"tests": [1]}
    assert fill("{} {a-b} {q.__class__}", row, "f:1", "prompt") == "{} {a-b} {q.__class__}"
    assert fill("{q}{q}", {"q": "{q}"}, "f:1", "prompt") == "{q}{q}"


def test_a_missing_field_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"data.jsonl:4: prompt asks for field 'question'.*did you mean 'questions'"):
        fill("{question}", {"questions": "x"}, "data.jsonl:4", "prompt")


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(read_rows(path)) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 3", {"a": 2})]
    path.write_text('{"a": 1}\n7\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: expected an object"):
        list(read_rows(path))
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(tmp_path / "row.jsonl"))
    with pytest.raises(UserError, match="is a directory"):
        list(read_rows(tmp_path))
