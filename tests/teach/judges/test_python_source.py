"""Python source is parsed rightly from many threads at once."""

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bmjax.teach.judges.python_source import UNREADABLE, literal, parse, try_parse


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_threads_do_not_disturb_each_others_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    # Garbage with finalizers makes the collector run Python code, and switch threads, while a tree is built. With the
    # bare `ast.parse` of CPython 3.11 this raises SystemError.
    rows = ", ".join(f"'{n}': [{n}, [{n}]]" for n in range(1500))
    functions = "\n".join(f"def f{n}(x):\n    return [[x + {n} * (1 + x)]]" for n in range(300))
    source = f"ANSWERS = {{{rows}}}\n{functions}"

    def work(_: int) -> list[int]:
        lengths = []
        for _ in range(3):
            for _ in range(50):
                weakref.finalize(_Cycle(), sum, range(50))
            lengths.append(len(parse(source).body))
        return lengths

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [[301] * 3] * 8
    finally:
        sys.setswitchinterval(interval)
        gc.collect()


@pytest.mark.parametrize("text", ["def f(:", "a\0b", "(" * 5000, "-" * 200_000 + "1", "x = '\ud800'"])
def test_text_that_is_no_python(text: str) -> None:
    assert try_parse(text) is None
    with pytest.raises(UNREADABLE):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value"), [(" [1, 'a'] ", [1, "a"]), ("{'k': (1, 2)}", {"k": (1, 2)}), ("None", None)]
)
def test_literals(text: str, value: Any) -> None:
    assert literal(text) == value
    with pytest.raises(UNREADABLE):
        literal("f(1)")
