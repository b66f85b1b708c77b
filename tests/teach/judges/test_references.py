"""Every reference of public benchmarks is right in many notations, and wrong when it is off by a little.

The data lie beside the checkout (../shared/data); without them a few rows of our own stand in.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmjax.teach.judges.judge import judge

DATA = Path(__file__).parents[4] / "shared/data"


def rows(name: str) -> list[dict[str, Any]]:
    """Read a file of the benchmarks, or skip the test."""
    if not (DATA / name).exists():
        pytest.skip(f"the file {name} is not part of the repository")
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def grouped(value: float) -> str:
    return f"{value:,}"


def scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.12e}".partition("e")
    return rf"{mantissa.rstrip('0').rstrip('.')} \times 10^{{{int(exponent)}}}"


# Notations of a number, as models write it. Some end in other numbers.
NUMBERS: dict[str, Callable[[Any], str]] = {
    "bare": str,
    "thousands": grouped,
    "cents": lambda v: f"{v:,.2f}",
    "dollars": lambda v: f"The total cost is ${v:,.2f}.",
    "box": lambda v: f"So we get $\\boxed{{{v}}}$.",
    "box with braces": lambda v: rf"\[ \boxed{{{grouped(v).replace(',', '{,}')}}} \]",
    "box with dollars": lambda v: rf"Total: $\boxed{{\${grouped(v)}}}$",
    "box with unit": lambda v: rf"$\boxed{{{v} \text{{ dollars}}}}$",
    "box with percent": lambda v: rf"\boxed{{{v}\%}}",
    "box with equation": lambda v: rf"\boxed{{x = {v}}}",
    "box with text": lambda v: rf"\boxed{{\text{{{v}}}}}",
    "thin spaces": lambda v: rf"\boxed{{{grouped(v).replace(',', chr(92) + ',')}}}",
    "bold in a sentence": lambda v: f"She has **{v}** eggs left after 3 days.",
    "bold dollars": lambda v: f"Janet makes **${grouped(v)}** at the market for 1 day.",
    "final in bold": lambda v: f"**Final answer: {v}**\n\nNote: step 3 used 7 eggs.",
    "hashes and a remark": lambda v: f"2+2=4.\n#### {grouped(v)}\nI hope this helps, see step 2.",
    "stated": lambda v: f"The answer is {v}. There are 12 months in a year.",
    "answer in bold": lambda v: f"With 5 and 6.\n\n**Answer:** {grouped(v)} dollars",
    "Chinese": lambda v: f"计算得到 3 个。答案是{v}。",
    "Chinese with unit": lambda v: f"综上，最终答案为：{grouped(v)}元",
    "last number": lambda v: f"First 3 x 4 = 12. Therefore, she makes {grouped(v)} dollars.",
    "power of ten": lambda v: rf"\boxed{{{scientific(v)}}}",
    "e-notation": lambda v: f"The final answer is {v:.12e}.",
    "tag": lambda v: f"<answer>{v}</answer>",
    "JSON": lambda v: json.dumps({"reasoning": "2+2", "answer": v}),
    "equation": lambda v: f"9 * 2 = {v}",
    "fraction": lambda v: rf"\boxed{{\frac{{{2 * v}}}{{2}}}}",
    "thought": lambda v: f"<think>maybe 99999</think>\n\nThe answer is {v}",
    "heading": lambda v: f"## Answer\n\n{v} eggs",
    "full width": lambda v: str(v).translate(str.maketrans("0123456789", "０１２３４５６７８９")),
    "not but": lambda v: f"So the answer is not {v + 7} but {v}.",
    "retracted": lambda v: f"The answer is {v + 3}. Wait, I made a mistake. The answer is {v}.",
    "code": lambda v: f"The answer is `{v}`.",
}


def check_numbers(solution: str, value: float, styles: list[str]) -> None:
    assert judge(solution, solution).verdict == "right"
    for style in styles:
        right, wrong = NUMBERS[style](value), NUMBERS[style](value + 1)
        assert judge(solution, right).verdict == "right", (style, right)
        assert judge(solution, wrong).verdict == "wrong", (style, wrong)


def test_gsm8k_references_in_one_notation_each() -> None:
    styles = list(NUMBERS)
    for number, row in enumerate(rows("gsm8k/test.jsonl")):
        text = row["answer"].rpartition("####")[2].replace(",", "")
        check_numbers(row["answer"], int(text), [styles[number % len(styles)]])


@pytest.mark.slow
def test_gsm8k_references_in_every_notation() -> None:
    for row in rows("gsm8k/test.jsonl"):
        check_numbers(row["answer"], int(row["answer"].rpartition("####")[2].replace(",", "")), list(NUMBERS))


def test_numbers_in_every_notation() -> None:
    for value in (0, 1, -10, 18, 366, 1200, 70000, 5600000):
        check_numbers(f"We add.\n#### {grouped(value)}", value, list(NUMBERS))


@pytest.mark.parametrize("year", [24, 25])
def test_aime_answers_may_have_leading_zeros(year: int) -> None:
    for row in rows(f"aime/aime{year}.jsonl"):
        answer = int(row["answer"])
        for reference in (answer, str(answer), f"{answer:03d}"):
            for right in (rf"\boxed{{{answer:03d}}}", f"**{answer}**", f"The answer is {answer:03d}."):
                assert judge(reference, right).verdict == "right"
            assert judge(reference, rf"\boxed{{{answer + 1:03d}}}").verdict == "wrong"


def without_sizes(latex: str) -> str:
    return latex.replace("\\left", "").replace("\\right", "")


def unicode_symbols(latex: str) -> str:
    symbols = {"\\pi": "π", "\\infty": "∞", "^\\circ": "°", "\\cup": "∪", "\\pm": "±", "\\cdot": "·"}
    for command, symbol in symbols.items():
        latex = latex.replace(command, symbol)
    return latex


LATEX: dict[str, Callable[[str], str]] = {
    "bare": str,
    "box": lambda a: f"\\boxed{{{a}}}",
    "display": lambda a: f"Thus\n\\[\n\\boxed{{{a}}}\n\\]\n",
    "stated": lambda a: f"The answer is ${a}$.",
    "final in bold": lambda a: f"**Final Answer:** \\({a}\\)",
    "display after an anchor": lambda a: f"The final answer is\n\n$${a}$$",
    "last formula": lambda a: f"We see 3 cases. Therefore it equals ${a}$.",
    "Chinese": lambda a: f"所以最终答案是 ${a}$。",
    "hashes": lambda a: f"#### {a}",
    "tag": lambda a: f"<answer>${a}$</answer>",
    "bold": lambda a: f"It follows that **${a}$** is the value.",
    "display fractions": lambda a: "\\boxed{{{}}}".format(a.replace("\\frac", "\\dfrac")),
    "no sizes": lambda a: f"$\\boxed{{{without_sizes(a)}}}$",
    "Unicode": lambda a: f"\\boxed{{{unicode_symbols(a)}}}",
    "Unicode minus": lambda a: "\\boxed{{{}}}".format(a.replace("-", "−")),
    "brackets of matrices": lambda a: "\\boxed{{{}}}".format(a.replace("pmatrix", "bmatrix")),
    "display style": lambda a: f"\\boxed{{\\displaystyle {a}}}",
}
# Two that are no number: a step away from p - q, and so on.
OTHER = {"p - q": "p + q", "\\pi": "2\\pi", "\\cot x": "\\tan x"}


def off(latex: str) -> str:
    """Change the last number of a value, the first where the last is the base, and words."""
    numbers = list(re.finditer(r"\d+", latex))
    if not numbers:
        return OTHER.get(latex, "\\text{none of them}" if "(" not in latex else "\\text{(D)}")
    last = numbers[-1]
    number = numbers[0] if re.search(r"_\{?$", latex[: last.start()]) else last
    return f"{latex[: number.start()]}{int(number[0]) + 1}{latex[number.end() :]}"


def check_latex(answer: str, styles: list[str]) -> None:
    for style in styles:
        assert judge(answer, LATEX[style](answer)).verdict == "right", (style, answer)
        assert judge(answer, LATEX[style](off(answer))).verdict == "wrong", (style, off(answer))


def test_math500_references_in_one_notation_each() -> None:
    styles = list(LATEX)
    for number, row in enumerate(rows("math500/test.jsonl")):
        check_latex(row["answer"], [styles[number % len(styles)]])
        assert judge(row["answer"], row["solution"]).verdict == "right", row


@pytest.mark.slow
def test_math500_references_in_every_notation() -> None:
    for row in rows("math500/test.jsonl"):
        check_latex(row["answer"], list(LATEX))


LETTERS: dict[str, Callable[[str], str]] = {
    "bare": str,
    "list": lambda a: f"The answer is {', '.join(a)}.",
    "Chinese choice": lambda a: f"A 项错误。故选{'、'.join(a)}。",
    "Chinese answer": lambda a: f"解析：A 错误，B 项也要看。\n答案：{a}",
    "Chinese brackets": lambda a: f"【答案】{a}\n【解析】A、B 都是常见错误。",
    "box": lambda a: f"\\boxed{{\\text{{{a}}}}}",
    "brackets": lambda a: f"So the correct option is {' and '.join(f'({x})' for x in a)}. A particle falls.",
    "bold": lambda a: f"**{a}**",
    "JSON": lambda a: json.dumps({"answer": list(a)}),
    "thought": lambda a: f"<think>答案：D</think>{a}",
}


@pytest.mark.parametrize("subject", ["physics", "chemistry", "biology"])
def test_gaokao_labels_one_or_several(subject: str) -> None:
    for row in rows(f"agieval_science/gaokao-{subject}.jsonl"):
        label = "".join(row["label"])
        wrong = label[:-1] if len(label) > 1 else "ABCD"["ABCD".index(label) - 1]
        for reference in (row["label"], {"answer": row["label"], "options": row["options"]}):
            for style, write in LETTERS.items():
                assert judge(reference, write(label)).verdict == "right", (style, row)
                assert judge(reference, write(wrong)).verdict == "wrong", (style, row)
        texts = [re.sub(r"^\(?[A-D]\)", "", option) for option in row["options"]]
        if len(label) == 1 and len(set(texts)) == 4:
            options = {"answer": label, "options": row["options"]}
            assert judge(options, texts["ABCD".index(label)]).verdict == "right", row
