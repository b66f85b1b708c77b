"""Rows of benchmarks' forms, made here: none is a row of GPQA or LiveCodeBench."""

import base64
import json
import pickle
import zlib

DOUBLE = "n = int(input())\nprint(2 * n)"


def lcb_row(number: int, day: str, calls: bool = False, private=None) -> dict:
    """A row of LiveCodeBench's form: print or return twice the input; the private test is packed as theirs are."""
    public = [{"input": "4", "output": "8", "testtype": "functional" if calls else "stdin"}]
    hidden = [{"input": str(number), "output": str(2 * number), "testtype": public[0]["testtype"]}]
    text = private or base64.b64encode(zlib.compress(pickle.dumps(json.dumps(hidden)))).decode()
    return {
        "question_title": f"double {number}", "question_content": f"Problem {number}: double the number.",
        "platform": "leetcode" if calls else "atcoder", "question_id": f"q{number}", "contest_id": f"c{number}",
        "contest_date": f"{day}T00:00:00", "difficulty": "easy",
        "starter_code": "class Solution:\n    def double(self, n: int) -> int:\n        " if calls else "",
        "public_test_cases": json.dumps(public), "private_test_cases": text,
        "metadata": json.dumps({"func_name": "double"} if calls else {}),
    }  # fmt: skip


def gpqa_row(number: int) -> dict:
    """A row of GPQA's form about nothing of GPQA."""
    return {
        "Question": f"What is {number} squared?", "Correct Answer": f"{number * number} exactly",
        "Incorrect Answer 1": f"{number} or so", "Incorrect Answer 2": "none of the others",
        "Incorrect Answer 3": "B cells",
        "Record ID": f"rec{number}", "Subdomain": "Arithmetic",
    }  # fmt: skip
