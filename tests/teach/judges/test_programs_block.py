"""Which block of a reply is the program: every layout holds the same function f(x) = x + 1."""

# ruff: noqa: E501  programs and replies stay as they are

import pytest

from bmjax.teach.judges.code_block import code_blocks, find_program

F = "def f(x):\n    return x + 1\n"


def indented(text: str, blanks: int) -> str:
    return "".join(" " * blanks + line for line in text.splitlines(keepends=True))


LAYOUTS = {
    "a python block": f"Text\n```python\n{F}```\n",
    "a block of output after it": f"```python\n{F}```\nOutput:\n```\n5\n```\n",
    "output that parses": f"```python\n{F}```\nOutput:\n```text\nx = 5\n```\n",
    "output that parses, without languages": f"```\n{F}```\n```\n[1, 2]\n```\n```\nYES\n```\n",
    "output that does not parse": f"```\n{F}```\n```\n1 2 3\n```",
    "a shell block": f"```python\n{F}```\nRun:\n```bash\npython main.py\n```\n",
    "shell lines in a python block": f"```python\n{F}```\n```python\npip install numpy\n```",
    "a block that installs, before": f"```bash\npip install numpy\n```\n```python\n{F}```",
    "a notebook's lines in the program": f"```python\n!pip install numpy\n%matplotlib inline\n{F}```",
    "in a list": f"1. Do:\n\n{indented(f'```python{chr(10)}{F}```', 3)}\n\n2. done",
    "in a list, without a blank line": f"- Do:\n{indented(f'```python{chr(10)}{F}```', 2)}\n- done",
    "in a list, too far to the right": f"- Do:\n\n{indented(f'```python{chr(10)}{F}```', 8)}\n- done",
    "indented by four": f"Do:\n\n{indented(f'```python{chr(10)}{F}```', 4)}\n",
    "tildes": f"~~~python\n{F}~~~",
    "four backticks": f"````python\n{F}````",
    "a closing fence that is longer": f"```python\n{F}``````",
    "after text on its line": f"Here it is: ```python\n{F}```\nGood.",
    "text after the language": f'```python title="x.py" linenums="1"\n{F}```',
    "a file's name after the language": f"```python:main.py\n{F}```",
    "Python 3": f"```Python 3\n{F}```",
    "python3": f"```python3\n{F}```",
    "py": f"``` py\n{F}```",
    "pypy3": f"```pypy3\n{F}```",
    "pandoc's braces": f"```{{.python .numberLines}}\n{F}```",
    "no language": f"So:\n```\n{F}```",
    "another language's name": f"```text\n{F}```",
    "bare code": F,
    "Windows line ends": f"Text\n```python\n{F}```\n".replace("\n", "\r\n"),
    "an unclosed fence": f"So:\n```python\n{F}",
    "an unclosed fence that does not parse": f"```python\n{F}```\nmore\n```python\ndef g(",
    "a fence closed on the last line of code": "```python\ndef f(x):\n    return x + 1```",
    "fences in a docstring": f'```python\n"""Do.\n\n```\nf(1)\n```\n"""\n{F}```\nEnd',
    "an indented fence in a docstring": '```python\ndef f(x):\n    """Do.\n\n    ```\n    f(1)\n    ```\n    """\n'
    "    return x + 1\n```\n",
    "a session after it": f"```python\n{F}```\n```python\n>>> f(1)\n2\n```",
    "a session's language": f"```python\n{F}```\n```pycon\n>>> f(1)\n2\n```",
    "only a session": "```python\n>>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2\n```",
    "a use of it after it": f"```python\n{F}```\nUsage:\n```python\nprint(f(1))\n```",
    "tests after it": f"```python\n{F}```\n```python\nassert f(1) == 2\n```",
    "an unrelated block after it": f"```python\n{F}```\nComplexity:\n```python\nn = 10\nprint(n * n)\n```",
    "parts that build on each other": "```python\nimport math\n```\n```python\ndef g(x): return math.floor(x)\n```\n"
    "then\n```python\ndef f(x): return g(x) + 1\n```",
    "parts, then the whole": f"```python\nimport math\nraise ValueError\n```\nTogether:\n```python\nimport math\n{F}```",
    "a draft before it": f"```python\ndef f(x):\n    return x - 1\n```\nNo:\n```python\n{F}```",
    "another language after it": f"```python\n{F}```\nIn C++:\n```cpp\nint main() {{}}\n```",
    "JSON after it": f'```\n{F}```\n```json\n{{"a": 1}}\n```',
    "in a quote": "> ```python\n> def f(x):\n>     return x + 1\n> ```",
    "in HTML": f"<details>\n```python\n{F}```\n</details>",
    "in a block of Markdown": f"````markdown\n# Answer\n```python\n{F}```\n````",
    "after a heading and bold text": f"### Solution\n**Code**\n```python\n{F}```\n**Note** `x`",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str) -> None:
    program = find_program(LAYOUTS[layout], {"f"})
    assert program is not None
    names: dict = {}
    exec(program, names)
    assert names["f"](1) == 2


@pytest.mark.parametrize(
    "reply",
    [
        "", "I do not know", "Hello", "42", "yes, no", "```\n5\n```", "```bash\nls\n```", "```python\n```",
        "```python\npip install numpy\n```",
    ],
)  # fmt: skip
def test_no_program(reply: str) -> None:
    assert find_program(reply) is None


def test_a_program_that_does_not_parse_is_what_was_handed_in() -> None:
    reply = f"```python\n{F}```\nBetter:\n```python\ndef f(x)\n    return x\n```"
    assert find_program(reply, {"f"}) == "def f(x)\n    return x\n"


def test_the_last_program_counts_without_names_to_look_for() -> None:
    assert find_program("```python\nprint(1)\n```\n```python\nprint(2)\n```") == "print(2)\n"
    assert find_program("import sys\nprint(sys.stdin.read())") == "import sys\nprint(sys.stdin.read())"


def test_a_program_that_reads_input_counts_where_there_is_some() -> None:
    program = "def solve(text):\n    return text\nif __name__ == '__main__':\n    print(solve(input()))\n"
    reply = f"```python\n{program}```\nExample:\n```python\nprint(solve('1'))\n```"
    assert find_program(reply, reads_input=True) == program
    parts = "```python\ndata = input().split()\n```\n```python\nprint(len(data))\n```"
    assert find_program(parts, reads_input=True) == "data = input().split()\n\n\nprint(len(data))\n"
    parts = "```python\nimport sys\n```\n```python\nprint(sys.stdin.read())\n```"
    assert find_program(parts, reads_input=True) == "import sys\n\n\nprint(sys.stdin.read())\n"


def test_a_long_program_stays_whole() -> None:
    program = f"DATA = {'x' * 500_000!r}\n{F}"
    assert find_program(f"So:\n```python\n{program}```", {"f"}) == program


def test_blocks_know_their_language_and_whether_they_end() -> None:
    first, second = code_blocks("```py\na\n```\n~~~\nb")
    assert (first.info, first.code, first.closed, first.is_python) == ("py", "a\n", True, True)
    assert (second.code, second.closed, second.is_python) == ("b", False, False)


@pytest.mark.parametrize(
    "text",
    [
        "```" * 50_000, "> " * 20_000 + "```python\nx\n", "- " * 20_000, "```python\n" * 10_000, f"```python\n{F}```\n" * 3000,
        "```python\n(\n```\n" * 3000, "```python" * 10_000, "a" * 1_000_000, "```\n```\n" + "    x\n" * 50_000, "```\n```\n" + "1.\n" * 20_000,
        "```python\n" + "(" * 100_000 + "\n```", "```python\n" + "-" * 100_000 + "1\n```", "\ud800\x00",
    ],
)  # fmt: skip
def test_hostile_replies_end(text: str) -> None:
    program = find_program(text, {"f"})
    assert program is None or isinstance(program, str)
