"""Rows of programming: the task, and tests as reference, in the forms that the judge of programs reads."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from bmjax.teach.adapters.adapter import LeftOut, Row, question_of, text_of
from bmjax.teach.judges.python_source import try_parse

FUNCTION = "Answer with the whole function in one ```python block."
PROGRAM = (
    "Write a Python program that reads from standard input and writes to standard output. "
    "Answer with the whole program in one ```python block."
)

# Time limits of contests are for compiled languages; Python gets three times as long, and at least the judge's own.
_PYTHON, _JUDGE_SECONDS = 3, 6


def as_tests(row: Row) -> str:
    """Return the name of the judge that runs programs."""
    return "tests"


def function_instruction(row: Row) -> str:
    """Return what a task that asks for a function ends with."""
    return FUNCTION


def contest_instruction(row: Row) -> str:
    """Return what a contest's task ends with."""
    return FUNCTION if text_of(row, "starter_code") else PROGRAM


def mbpp_prompt(row: Row) -> str:
    """Return the task and the tests, which name the function."""
    tests = "\n".join(_asserts(row))
    return f"{question_of(row, 'text', 'prompt')}\nYour code must pass these tests:\n\n```python\n{tests}\n```"


def mbpp_reference(row: Row) -> dict[str, Any]:
    """Return the asserts, behind what has to run before them."""
    asserts = _asserts(row)
    setup = "\n".join([*(row.get("test_imports") or []), text_of(row, "test_setup_code")]).strip()
    # Asserts that need a setup are one test with it, for every test may run in a process of its own.
    return {"tests": ["\n".join([setup, *asserts])] if setup else asserts}


def _asserts(row: Row) -> list[str]:
    tests = row["test_list"]
    if not tests:
        raise LeftOut("no tests")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise TypeError("'test_list' is no list of asserts")
    return tests


def humaneval_prompt(row: Row) -> str:
    """Return the head of the function, as code to complete."""
    return f"Complete this function:\n\n```python\n{str(row['prompt']).strip()}\n```"


def humaneval_reference(row: Row) -> dict[str, Any]:
    """Return `check` and its call, behind the helpers of the prompt, which an answer may leave out and tests use."""
    test, name = text_of(row, "test"), text_of(row, "entry_point")
    if not test or not name:
        raise LeftOut("no tests")
    tree = try_parse(str(row["prompt"]))
    head = tree.body if tree else []
    helpers = [ast.unparse(node) for node in head if not (isinstance(node, ast.FunctionDef) and node.name == name)]
    return {"tests": ["\n".join([*helpers, test, f"check({name})"])]}


def contest_prompt(row: Row) -> str:
    """Return the statement of a contest's problem with its formats, examples and starter code."""
    # A picture in a statement illustrates it; the tests decide all the same.
    if not (statement := text_of(row, "description", "problem", "question")):
        raise LeftOut("no question")
    if text_of(row, "interaction_format"):
        raise LeftOut("interactive")
    if text_of(row, "input_mode") == "file" or text_of(row, "input_file"):
        raise LeftOut("reads a file")
    if row.get("images") or text_of(row, "picture_num") not in ("", "0"):
        raise LeftOut("an image")
    parts = [statement]
    for title, column in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        if text := text_of(row, column):
            parts.append(f"{title}:\n{text}")
    for example in row.get("examples") or []:
        parts.append(f"Example input:\n{example['input']}\nExample output:\n{example['output']}")
    if starter := text_of(row, "starter_code"):
        parts.append(f"Begin with this code:\n\n```python\n{starter}\n```")
    return "\n\n".join(parts)


def contest_reference(row: Row) -> dict[str, Any]:
    """Return the tests of a contest's problem as pairs of input and output, or as calls of a function."""
    tests = [test for column in _TEST_COLUMNS if row.get(column) for test in _tests(_decoded(row[column]))]
    if not tests:
        raise LeftOut("no tests")
    names = {test["fn_name"] for test in tests if "fn_name" in test}
    reference: dict[str, Any] = {"tests": [{key: test[key] for key in ("input", "output")} for test in tests]}
    if names:
        if len(names) > 1 or any("fn_name" not in test for test in tests):
            raise LeftOut("tests of several kinds")
        inputs, outputs = ([test[key] for test in tests] for key in ("input", "output"))
        reference = {"tests": {"inputs": inputs, "outputs": outputs, "fn_name": names.pop()}}
    if checker := text_of(row, "generated_checker"):  # many outputs are right, and it decides
        if try_parse(checker) is None:
            raise LeftOut("a checker that is no Python program")
        reference["checker"] = checker
    seconds = _PYTHON * _time_limit(row)
    return reference | ({"seconds": seconds} if seconds > _JUDGE_SECONDS else {})


_TEST_COLUMNS = (
    "tests", "test_cases", "test_case", "input_output", "official_tests", "public_tests", "private_tests",
    "generated_tests",
)  # fmt: skip


def _decoded(value: Any) -> Any:
    """Return tests, decoded where the column holds them as JSON. LeftOut for what is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise LeftOut("tests that cannot be read") from None


def _tests(value: Any) -> list[dict[str, Any]]:
    """Return tests of any of the known forms as {input, output}, those that call a function with its fn_name.

    Forms: a list of {input, output}, and lists of both under `inputs` and `outputs`, or `input` and `output`.
    """
    if isinstance(value, Mapping):
        inputs = value.get("inputs", value.get("input"))
        outputs = value.get("outputs", value.get("output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise LeftOut("tests that cannot be read")
        function = {"fn_name": value["fn_name"]} if value.get("fn_name") else {}
        return [{"input": a, "output": b} | function for a, b in zip(inputs, outputs, strict=True)]
    if not isinstance(value, list) or not all(
        isinstance(test, Mapping) and {"input", "output"} <= {*test} for test in value
    ):
        raise LeftOut("tests that cannot be read")
    tests = []
    for test in value:
        metadata = test.get("metadata")
        name = test.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, Mapping) else None)
        tests.append({"input": test["input"], "output": test["output"]} | ({"fn_name": name} if name else {}))
    return tests


def _time_limit(row: Row) -> float:
    """Return the seconds of a contest's limit, 0 where none is stated as a number."""
    limit = row.get("time_limit")
    if isinstance(limit, Mapping):
        return float(limit.get("seconds") or 0) + float(limit.get("nanos") or 0) / 1e9
    return float(limit) if isinstance(limit, (int, float)) and limit == limit else 0.0
