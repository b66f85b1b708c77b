import os
import time
from pathlib import Path

import pytest

from bmjax.teach.judges.programs import last_code_block, passes, same_output
from bmjax.teach.judges.verdict import JudgeError


def stdin_test(text: str, expected: str) -> list[dict[str, str]]:
    return [{"input": text, "output": expected}]


@pytest.mark.parametrize(
    "program",
    [
        "print(sum(int(x) for x in input().split()))\n",
        "import sys\nprint(sum(map(int, sys.stdin.readline().split())))",
        "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
        "print(sum(map(int, open(0).read().split())))",
        "import os\nprint(sum(map(int, os.read(0, 100).split())))",
        "total = 0\ndef f():\n    global total\n    total = sum(map(int, input().split()))\nf()\nprint(total)",
        "import sys\nif __name__ == '__main__':\n    print(sum(map(int, input().split())))\n    sys.exit()",
        "import threading\ndef f(): print(sum(map(int, input().split())))\nt = threading.Thread(target=f)\nt.start()",
    ],
)
def test_every_honest_way_to_read_stdin_passes(program: str) -> None:
    assert passes(program, stdin_test("1 2 3\n", "6\n"))
    assert not passes(program, stdin_test("1 2 3\n", "7\n"))


def test_asserts_of_a_function() -> None:
    assert passes("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 3"])
    assert not passes("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 4"])
    assert not passes("def f(x) return", ["assert True"])


def test_an_endless_program_is_stopped() -> None:
    begun = time.monotonic()
    assert not passes("while True: pass", ["assert True"], seconds=1)
    assert not passes("import time\ntime.sleep(99)", ["assert True"], seconds=1)
    assert time.monotonic() - begun < 8


def test_a_flood_of_output_or_memory_is_stopped() -> None:
    assert not passes("while True: print('x' * 1000000)", stdin_test("", ""), seconds=4)
    assert not passes("x = bytearray(8 * 2**30)", ["assert True"], seconds=4)


def test_children_die_with_the_program(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    program = (
        "import os, time\nif os.fork() == 0:\n    while True:\n"
        f"        open({str(mark)!r}, 'w').write(str(time.time())); time.sleep(0.05)\ntime.sleep(0.5)\nprint(1)"
    )
    assert passes(program, stdin_test("", "1"))
    before = mark.read_text()
    time.sleep(0.3)
    assert mark.read_text() == before


def test_files_land_in_a_folder_that_is_gone_afterwards() -> None:
    here = set(os.listdir())
    assert passes("import os\nopen('made', 'w').write('x')\nprint(os.path.exists('made'))", stdin_test("", "True"))
    assert set(os.listdir()) == here


def test_the_environment_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    assert passes("import os\nprint(os.environ.get('SOME_API_KEY'))", stdin_test("", "None"))


def test_a_test_of_another_shape_is_the_judges_problem() -> None:
    for tests in ([], [1], [{"input": "x"}]):
        with pytest.raises(JudgeError):
            passes("print(1)", tests)


def test_output_is_compared_by_lines_and_numbers() -> None:
    assert same_output("1.50 a \n2\n\n", "1.5 a\n2")
    assert not same_output("1 2", "1\n2")
    assert not same_output("0.1", "0.10000001")
    assert not same_output("nan", "1")


def test_the_last_complete_block_counts() -> None:
    assert last_code_block("```python\na\n```\ntext\n```\nb\n```\n```python\nunfinished") == "b\n"
    assert last_code_block("none") is None
