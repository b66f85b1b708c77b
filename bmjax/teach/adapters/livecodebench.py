"""Rows of LiveCodeBench: the question, and its tests, whose private part is packed and pickled.

A row's private tests may unpack to a hundred times their size. So the reference of a problem keeps them packed, and
`unpacked` reads them each time that an answer is judged.
"""

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from typing import Any

from bmjax.config import UserError
from bmjax.teach.adapters.adapter import LeftOut, Row, text_of
from bmjax.teach.adapters.pickled import NotPlain, read_plain_pickle

MOST_BYTES = 2**30  # of one problem's private tests, unpacked
PACKED = "livecodebench"  # the key of a reference whose tests are packed

# LiveCodeBench's own words (lcb_runner/prompts/code_generation.py).
_TASK = "Generate a correct Python program that matches the specification and passes all tests."
_READS_INPUT = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
_STARTER_CODE = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)


def prompt(row: Row) -> str:
    """Return the question."""
    if not (question := text_of(row, "question_content")):
        raise LeftOut("no question")
    return question


def instruction(row: Row) -> str:
    """Return what LiveCodeBench asks for after the question: a program, or the starter code filled in."""
    starter = str(row.get("starter_code") or "").strip()
    words, code = (_STARTER_CODE, starter) if starter else (_READS_INPUT, "# YOUR CODE HERE")
    return f"{_TASK} {words}\n```python\n{code}\n```"


def reference(row: Row) -> dict[str, Any]:
    """Return the tests as the row has them, private ones packed, and the name of the function that they call."""
    metadata = row.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    public, private = (str(row[f"{kind}_test_cases"] or "") for kind in ("public", "private"))
    if not public and not private:
        raise LeftOut("no tests")
    return {PACKED: {"public": public, "private": private, "fn_name": name}}


def is_packed(reference: Any) -> bool:
    """Return whether a reference holds tests of LiveCodeBench that are still packed."""
    return isinstance(reference, Mapping) and isinstance(reference.get(PACKED), Mapping)


def unpacked(reference: Any) -> Any:
    """Return a reference with the tests in it as the judge of programs reads them; any other as it is.

    Raises:
        UserError: for tests that cannot be read, or that are none.
    """
    if not is_packed(reference):
        return reference
    tests = reference[PACKED]
    cases = [case for kind in ("public", "private") for case in _cases(str(tests.get(kind) or ""), kind)]
    if not cases:
        raise UserError("livecodebench: the problem has no tests")
    inputs, outputs = ([case[key] for case in cases] for key in ("input", "output"))
    if tests.get("fn_name"):
        return {"tests": {"inputs": inputs, "outputs": outputs, "fn_name": tests["fn_name"]}}
    return {"tests": [{"input": stdin, "output": stdout} for stdin, stdout in zip(inputs, outputs, strict=True)]}


def _cases(text: str, kind: str) -> list[dict[str, str]]:
    """Read tests: JSON, or JSON that was pickled, compressed and written in base 64."""
    if not text:
        return []
    try:
        cases = json.loads(text if text.lstrip().startswith("[") else _unpack(text))
    except (ValueError, RecursionError) as error:  # also of base 64 and NotPlain
        raise UserError(f"livecodebench: the {kind} tests cannot be read: {str(error)[:200]}") from None
    is_list = isinstance(cases, list) and all(
        isinstance(case, dict) and all(isinstance(case.get(key), str) for key in ("input", "output")) for case in cases
    )
    if not is_list:
        raise UserError(f"livecodebench: the {kind} tests are no list of {{input, output}} in text")
    return cases


def _unpack(text: str) -> str:
    try:
        compressed = base64.b64decode(text, validate=True)
        stream = zlib.decompressobj()
        data = stream.decompress(compressed, MOST_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(str(error)) from None
    if stream.unconsumed_tail:
        raise ValueError(f"more than {MOST_BYTES} bytes when unpacked")
    if not stream.eof:
        raise ValueError("the compressed data end too early")
    value = read_plain_pickle(data)
    if not isinstance(value, str):
        raise NotPlain(f"the pickle holds {type(value).__name__}, expected JSON text")
    return value
