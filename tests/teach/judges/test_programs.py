"""Verdicts on programs: what passes and what does not, whatever shape the tests have."""

# ruff: noqa: E501  programs and replies stay as they are

import json
from typing import Any

import pytest

from bmjax.config import UserError
from bmjax.teach.judges.outputs import same_output, same_value
from bmjax.teach.judges.programs import check, has_tests, judge
from bmjax.teach.judges.verdict import Verdict


def block(program: str) -> str:
    return f"Here:\n```python\n{program}\n```\n"


def verdict(reference: Any, program: str) -> str:
    check(reference)
    assert has_tests(reference)
    return judge(reference, block(program)).verdict


SUM = {"tests": [{"input": "1 2 3\n", "output": "6\n"}]}


@pytest.mark.parametrize(
    "program",
    [
        "print(sum(int(x) for x in input().split()))\n",
        "import sys\nprint(sum(map(int, sys.stdin.readline().split())))",
        "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
        "import sys\ninput = sys.stdin.buffer.readline\nprint(sum(map(int, input().split())))",
        "print(sum(map(int, open(0).read().split())))",
        "import os\nprint(sum(map(int, os.read(0, 100).split())))",
        "import os, io\nprint(sum(map(int, io.BytesIO(os.read(0, os.fstat(0).st_size)).readline().split())))",
        "print(sum(map(int, open('/dev/stdin').read().split())))",
        "total = 0\ndef f():\n    global total\n    total = sum(map(int, input().split()))\nf()\nprint(total)",
        "import sys\nif __name__ == '__main__':\n    print(sum(map(int, input().split())))\n    sys.exit()",
        "print(sum(map(int, input().split())))\nexit()",
        "import threading\ndef f(): print(sum(map(int, input().split())))\nt = threading.Thread(target=f)\nt.start()",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**28)\n"
        "def g(n): return 0 if n == 0 else g(n - 1)\n"
        "def f():\n    g(50000)\n    print(sum(map(int, input().split())))\n"
        "t = threading.Thread(target=f)\nt.start()\nt.join()",
        "import sys\nsys.stdout.write(str(sum(map(int, input().split()))))",
        "import os\nos.write(1, b'6')",
        "import atexit\nout = []\natexit.register(lambda: print(*out))\nout.append(sum(map(int, input().split())))",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else f(n - 1)\nf(20000)\n"
        "print(sum(map(int, input().split())))",
        "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
        "import os\nout = os.fdopen(os.dup(1), 'w')\ndef f(): print(sum(map(int, input().split())), file=out)\nf()",
        "import sys, io\nclass Buffer:\n    def __init__(self): self.parts = []\n    def write(self, text): self.parts.append(text)\n"
        "    def flush(self):\n        os.write(1, ''.join(self.parts).encode()); self.parts.clear()\n"
        "import os\nsys.stdout = Buffer()\nprint(sum(map(int, input().split())))",
        "import sys\nsys.stderr.write('debug')\nprint(sum(map(int, input().split())), flush=True)\nsys.stdout.close()",
        "import asyncio\nasync def main(): print(sum(map(int, input().split())))\nasyncio.run(main())",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nprint(A(sum(map(int, input().split()))).x)",
        "import sys, os\nfrom io import BytesIO, IOBase\nsys.stdin = open(0)\nprint(sum(map(int, sys.stdin.read().split())))",
        "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')\nprint(sum(map(int, input().split())))",
        "try:\n    while True:\n        print(sum(map(int, input().split())))\nexcept EOFError:\n    pass",
    ],
)  # fmt: skip
def test_every_honest_way_to_read_and_to_end_passes(program: str) -> None:
    assert verdict(SUM, program) == "right"
    assert verdict({"tests": [{"input": "1 2 3\n", "output": "7\n"}]}, program) == "wrong"


INCREMENT = {"tests": ["assert f(1) == 2", "assert f(2) == 3"]}


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "quit()",
        "exit(0)",
        "import os\ndef f(x): os._exit(0)",
        "def f(x): raise SystemExit(0)",
        "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return x",
        "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
        "import os\ndef f(x):\n    os.execvp('true', ['true'])",
        "import os\ndef f(x):\n    if os.fork(): os._exit(0)\n    return x + 1\nimport time",
        "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return A(7)",
        "import builtins\nbuiltins.AssertionError = SystemExit\ndef f(x): return 0",
        "import ast, builtins\nast.parse = lambda *a, **k: ast.Module([], [])\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "def f(x): return 0",
        "import os, json\nos.write = json.dumps = os.read = lambda *a, **k: b''\ndef f(x): return 0",
        "print('ready')\nprint('{\"passed\": 0}')\nprint('0' * 32)\ndef f(x): return x",
        "import os\nfor fd in range(1, 200):\n    try: os.write(fd, b'{\"passed\": 0}\\n' + b'0' * 32)\n    except OSError: pass\n"
        "os._exit(0)",
        "import sys\nsys.modules['__main__'].passed = True\ndef f(x): return x",
        "import threading, os\nthreading.Timer(0, lambda: os._exit(0)).start()\ndef f(x):\n    while True: pass",
        "def f(x) return",
        "f = None",
        "",
    ],
)  # fmt: skip
def test_only_what_ran_to_the_last_test_passes(program: str) -> None:
    assert judge(INCREMENT, block(program)).verdict == "wrong"


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): return x + 1",
        "def f(x): return x + 1\nif __name__ == '__main__':\n    print(f(int(input())))",
        "def f(x): return x + 1\nprint(f(int(input())))",
        "import sys\ndef f(x): return x + 1\nsys.exit(0)",
        "def f(x): return x + 1\ndef main():\n    print(f(1))\nmain()",
        "f = lambda x: x + 1",
        "import functools\n@functools.lru_cache\ndef f(x): return x + 1",
        "import numpy as np\ndef f(x): return np.int64(x) + 1",
        "import sys\nsys.setrecursionlimit(10**6)\ndef g(n): return 0 if n == 0 else g(n - 1)\ndef f(x): return x + 1 + g(20000)",
        "import pickle\nclass P:\n    pass\ndef f(x): return pickle.loads(pickle.dumps(P())).__class__ is P and x + 1",
        "import os\ndef f(x):\n    if os.fork() == 0: os._exit(0)\n    return x + 1",
    ],
)
def test_honest_functions_pass(program: str) -> None:
    assert verdict(INCREMENT, program) == "right"


def test_the_programs_built_ins_are_not_the_tests() -> None:
    reference = {"tests": ["assert set(f([1, 1])) == {1}", "assert abs(g() - 1.5) < 1e-6"]}
    honest = "def f(x): return x\ndef g(): return 1.5"
    assert verdict(reference, honest) == "right"
    assert (
        verdict(reference, "def f(x): return [3]\ndef g(): return 9\nset = lambda x: {1}\nabs = lambda x: 0") == "wrong"
    )
    assert (
        verdict(reference, "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return x\ndef g(): return 9")
        == "wrong"
    )
    assert verdict({"tests": ["assert sum([1, 2]) == 7"]}, "def sum(x): return 7") == "right"


def test_a_class_of_the_problem_may_compare_as_it_likes() -> None:
    reference = {"tests": ["assert P(1) == P(1)", "assert P(1) != P(2)", "assert P(1) == 1"]}
    program = (
        "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return self.x == getattr(o, 'x', o)"
    )
    assert verdict(reference, program) == "right"


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        pytest.param(["assert f(1) == 2", "assert f(2) == 3"], "def f(x): return x + 1", "def f(x): return 2", id="list"),
        pytest.param("assert f(1) == 2\nassert f(2) == 3", "def f(x): return x + 1", "def f(x): return 2", id="text"),
        pytest.param(
            {"test_list": ["assert f(1) == root"], "test_setup_code": "root = 2", "test_imports": ["import math"]},
            "def f(x): return x + 1", "def f(x): return x", id="MBPP",
        ),
        pytest.param(
            {
                "prompt": "from typing import List\ndef g(x): return x\n\ndef f(x: List[int]) -> int:\n    '''Doc.'''\n",
                "entry_point": "f", "test": "def check(candidate):\n    assert candidate([2]) == g(3)\n", "task_id": "x/1",
            },
            "def f(x: List[int]) -> int:\n    return x[0] + 1", "def f(x):\n    return 2", id="HumanEval",
        ),
        pytest.param(
            {"test": "def check(candidate):\n    assert candidate(x=1) == 2\n", "entry_point": "Solution().f"},
            "class Solution:\n    def f(self, x): return x + 1", "class Solution:\n    def f(self, x): return x", id="LeetCode",
        ),
        pytest.param(
            {"test": "from solution import f\ndef test_one():\n    assert f(1) == 2\ndef test_two():\n    assert f(2) == 3\n"},
            "def f(x): return x + 1", "def f(x): return 2", id="test functions",
        ),
        pytest.param(
            {"test": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), 2)\n"},
            "def f(x): return x + 1", "def f(x): return x", id="unittest",
        ),
        pytest.param({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]}, "print(int(input()) + 1)", "print(2)", id="pairs"),
        pytest.param(
            {"tests": {"inputs": [["1", "5"], ["2", "6"]], "outputs": [["1", "5"], ["2", "6"]]}},
            "print(input())\nprint(input())", "print(input())\nprint(5)", id="lists of lines",
        ),
        pytest.param(
            [{"input": ["1", "5"], "output": ["1", "5"]}], "print(input())\nprint(input())", "print(1)", id="lines of a pair",
        ),
        pytest.param([{"input": "3", "output": 4}], "print(int(input()) + 1)", "print(3)", id="a number is expected"),
        pytest.param(
            {"input_output": json.dumps({"inputs": ["1"], "outputs": ["2"]})}, "print(2)", "print(3)", id="APPS",
        ),
        pytest.param(json.dumps({"inputs": ["1"], "outputs": ["2"]}), "print(2)", "print(3)", id="JSON text"),
        pytest.param(
            {"input_output": json.dumps({"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], [3]]})},
            "def f(x): return x + 1", "def f(x): return 2", id="APPS, called, results wrapped",
        ),
        pytest.param(
            {"fn_name": "f", "inputs": [[[1, 2]], [[3]]], "outputs": [[2, 1], [3]]},
            "class Solution:\n    def f(self, x: List[int]) -> List[int]: return x[::-1]",
            "class Solution:\n    def f(self, x): return x", id="TACO, called",
        ),
        pytest.param(
            {
                "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "[3, 1, 2]", "testtype": "functional"}]),
                "private_test_cases": [{"input": "[]\n1", "output": "[1]", "testtype": "functional"}],
                "metadata": json.dumps({"func_name": "f"}), "starter_code": "class Solution:\n    def f(self, a, b):\n        ",
            },
            "class Solution:\n    def f(self, a, b): return (b, *a)", "class Solution:\n    def f(self, a, b): return [1]",
            id="LiveCodeBench, called",
        ),
        pytest.param(
            {"public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "stdin"}]), "metadata": "{}"},
            "print(int(input()) + int(input()))", "print(1)", id="LiveCodeBench",
        ),
        pytest.param(
            {
                "public_tests": {"input": ["1"], "output": ["2"]}, "private_tests": {"input": [], "output": []},
                "generated_tests": {"input": ["2", "3"], "output": ["3", "4"]}, "time_limit": {"seconds": 2, "nanos": 0},
                "memory_limit_bytes": 256000000,
            },
            "print(int(input()) + 1)", "print(2)", id="CodeContests",
        ),
        pytest.param(
            {"test_cases": [{"fn_name": "f", "type": "function_call", "input": [1], "output": 2}], "language": "python"},
            "def f(x): return x + 1", "def f(x): return x", id="function_call",
        ),
        pytest.param(
            {"fn_name": "f", "tests": [{"input": {"x": 1, "y": 2}, "output": {"1": [1.0, None]}}]},
            "def f(y, x): return {x: (1, None)}", "def f(y, x): return {x: (2, None)}", id="arguments by name",
        ),
        pytest.param(
            {"official_tests": [{"input": "1\r\nab\r\n", "output": "ab\r\n"}], "input_mode": "stdio", "time_limit": 1.0},
            "input()\nassert input() == 'ab'\nprint('ab')", "print(1)", id="Codeforces",
        ),
        pytest.param(
            ["assert f(1) == 2", {"input": "1", "output": "2"}],
            "def f(x): return x + 1\nif __name__ == '__main__': print(f(int(input())))", "def f(x): return x + 1",
            id="asserts and streams",
        ),
        pytest.param([{"input": "", "output": "0.3333333"}], "print(0.3333333)", "print(1/3)", id="exact"),
        pytest.param(
            {"tests": [{"input": "", "output": "0.3333333"}], "tolerance": 1e-6}, "print(1/3)", "print(0.3334)", id="tolerance",
        ),
        pytest.param(
            {"tests": [{"input": "", "output": "1000000"}], "checker": {"tolerance": 1e-6}}, "print(1000000.5)",
            "print(1000002)", id="a tolerance is relative too",
        ),
        pytest.param(
            {
                "tests": [{"input": "6", "output": "2 3"}],
                "checker": "import sys\na, b = map(int, open(sys.argv[3]).read().split())\n"
                "print(int(a * b == int(open(sys.argv[1]).read())))",
            },
            "print(3, 2)", "print(3, 3)", id="a checker",
        ),
        pytest.param(
            {
                "tests": [{"input": "6", "output": "2 3"}],
                "checker": "def check(input, expected, output):\n    return sorted(output.split()) == sorted(expected.split())",
            },
            "print(3, 2)", "print(3, 3)", id="a checker that is a function",
        ),
        pytest.param({"tests": [{"input": "", "output": "YES"}], "checker": "yesno"}, "print('Yes')", "print('no')", id="yesno"),
    ],
)  # fmt: skip
def test_shapes_of_tests(reference: Any, right: str, wrong: str) -> None:
    assert verdict(reference, right) == "right"
    assert verdict(reference, wrong) == "wrong"


@pytest.mark.parametrize(
    "reference",
    [
        {"tests": [3]}, {"tests": "eJxrYJk6"}, {"tests": ["f(1)"]}, {"tests": [{"input": "x"}]}, {"tests": 5},
        {"inputs": ["1"], "outputs": []}, {"inputs": "1", "outputs": "2"}, {"tests": [{"input": "", "output": {"a": 1}}]},
        {"tests": [{"input": "1 2", "output": "3"}], "fn_name": "f"}, {"tests": ["assert 1"], "seconds": -1},
        {"tests": [{"input": [1], "output": 2, "testtype": "functional"}]}, {"tests": ["assert 1"], "seconds": "soon"},
        {"tests": ["assert 1"], "secnods": 9}, {"test": "def check(candidate):\n    assert candidate(1) == 2\n"},
        {"tests": [{"input": "", "output": ""}], "checker": "compare somehow"}, {"tests": ["assert f(1 == 2"]},
    ],
)  # fmt: skip
def test_tests_of_another_shape_are_an_error_at_loading(reference: Any) -> None:
    assert has_tests(reference)
    with pytest.raises(UserError) as error:
        check(reference)
    assert "\n" not in str(error.value)
    assert "found" in str(error.value) or "unknown key" in str(error.value)
    assert judge(reference, block("def f(x): return x")).verdict == "unjudged"


@pytest.mark.parametrize(
    "reference",
    [None, "", "12", 12, "C", "[1, 2]", [1, 2], ["3", "4"], {"answer": 3}, [], {}, "x = 3", "assert that this is prose",
     {"input": "a"}, "{1, 2}", "check(5)", "raise ValueError(x)", r"\\frac{1}{2}", "{'a': 1}"],
)  # fmt: skip
def test_other_references_have_no_tests(reference: Any) -> None:
    assert not has_tests(reference)


@pytest.mark.parametrize(
    "ending", ["raise ValueError", "import sys\nsys.exit(1)", "import sys\nsys.exit('bye')", "import os\nos.abort()"]
)
def test_a_program_that_ends_in_failure_is_wrong_whatever_it_printed(ending: str) -> None:
    assert judge(SUM, block(f"print(6, flush=True)\n{ending}")).verdict == "wrong"
    assert judge(SUM, block("print(6, flush=True)\nimport sys\nsys.exit(None)")).verdict == "right"


def test_tests_that_cannot_run_here_say_nothing_of_the_program() -> None:
    reference = {"tests": ["import no_such_module\nassert f(1) == 2"]}
    verdict = judge(reference, block("def f(x): return x + 1"))
    assert verdict.verdict == "unjudged" and "no_such_module" in verdict.reason


def test_limits_are_the_callers_where_the_reference_has_none() -> None:
    busy = "import time\ndef f(x):\n    while time.process_time() < 1: pass\n    return x + 1"
    assert judge(INCREMENT, block(busy), seconds=0.3).verdict == "wrong"
    assert judge({**INCREMENT, "seconds": 9}, block(busy), seconds=0.3).verdict == "right"


def test_no_tests_and_no_program() -> None:
    assert judge({"tests": []}, block("x = 1")) == Verdict("unjudged", "the reference has no tests", "none")
    assert judge(SUM, "I cannot.") == Verdict("wrong", "the answer has no program", "tests")


def test_reasons_name_the_test_and_what_happened() -> None:
    pairs = {"inputs": ["1", "2"], "outputs": ["1", "3"]}
    assert judge(pairs, block("print(input())")).reason == "test 2 of 2: expected '3', found '2'"
    assert judge(INCREMENT, block("def f(x): return 2")).reason == "test 2 of 2: AssertionError"
    assert judge(SUM, block("print(1 / 0)")).reason == "test 1 of 1: ZeroDivisionError: division by zero"
    assert judge(INCREMENT, block("def g(x): return 2")).reason == "test 1 of 2: NameError: name 'f' is not defined"
    assert judge(INCREMENT, block("def f(x): return x + 1")).reason == "passes all tests (2)"


def test_a_body_alone_goes_on_with_the_prompt() -> None:
    reference = {
        "prompt": "def f(x):\n    '''Add one.'''\n", "entry_point": "f", "test": "def check(c):\n    assert c(1) == 2",
    }  # fmt: skip
    assert verdict(reference, "    return x + 1") == "right"
    assert verdict(reference, "    return x") == "wrong"
    assert judge(reference, "    y = x + 1\n    return y\n").verdict == "right"


def test_output_is_compared_by_lines_and_numbers() -> None:
    assert same_output("1.50 a \n\n2\n\n", "1.5 a\n2")
    assert not same_output("1 2", "1\n2")
    assert not same_output("0.1", "0.10000001")
    assert not same_output("nan", "1")
    assert not same_output("1_0", "10")
    assert not same_output("Yes", "YES")
    assert same_output("1e3 -0", "1000 0")
    assert not same_output("1", "1e999999999", tolerance=1e-6)


def test_values_are_compared_as_json_has_them() -> None:
    assert same_value([1, (2, 3)], [1, [2, 3]])
    assert same_value(1.6666666, 1.66667)
    assert not same_value(1, 2) and not same_value("1", 1) and not same_value(None, 0)
    assert same_value(10**400, 10**400) and not same_value(10**400, 1.0)
    assert not same_value([1], [1, 2]) and not same_value({"a": 1}, {"b": 1})
    assert same_value({"1": 2}, {1: 2})
