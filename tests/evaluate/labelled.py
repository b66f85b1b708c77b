"""Answers as models write them, labelled by hand: (judge, reference, finish reason, answer, right or wrong)."""

from typing import Any

OPTIONS = {"answer": "C", "options": ["the electron", "the photon", "the neutrino", "the proton"]}
DOUBLE = {"tests": [{"input": "4\n", "output": "8\n"}, {"input": "-3\n", "output": "-6\n"}]}
SQUARE = {"tests": {"inputs": ["3", "-2"], "outputs": ["9", "4"], "fn_name": "square"}}

_READS = "n = int(input())\nprint(2 * n)"
_SHOWN = f"Here:\n```python\n{_READS}\n```\nFor example:\n```\n$ echo 4 | python a.py\n8\n```"
_MAIN = "def main():\n    print(2 * int(input()))\n\nif __name__ == '__main__':\n    main()"
_EXITS = "import sys\nprint(2 * int(sys.stdin.readline()))\nsys.exit(1)"
_METHOD = "class Solution:\n    def square(self, x):\n        return x * x"

MATHEMATICS: list[tuple[str, Any, str, str, str]] = [
    ("math", 204, "stop", "<think>\nLet v be it.\n</think>\nThe walk takes $\\boxed{204}$ minutes.", "right"),
    ("math", 204, "stop", "</think>\n\nSo t = 24 and the total is 204.\n\n**Answer:** \\(\\boxed{204}\\)", "right"),
    ("math", 204, "stop", "<think>\nIs it \\boxed{204}? No, I forgot t.\n</think>\n\\boxed{180}", "wrong"),
    ("math", 204, "length", "<think>\nso the answer is \\boxed{204}. Wait, let me check that again", "wrong"),
    ("math", 204, "length", "<think>\nok\n</think>\nTherefore $\\boxed{204}$. To check, put s = 2.5 in", "wrong"),
    ("math", 204, "stop", "The guess \\boxed{180} fails; the second one holds: \\boxed{204}.", "right"),
    ("math", 204, "stop", "She needs two hundred and four minutes, i.e. **204** minutes.", "right"),
    ("math", 204, "stop", "**204 minutes**", "right"),
    ("math", 204, "stop", "The answer is not 204 but 240.", "wrong"),
    ("math", 204, "stop", "", "wrong"),
    ("math", "073", "stop", "$\\boxed{73}$", "right"),
    ("math", 73, "stop", "$\\boxed{073}$", "right"),
    ("math", 73, "stop", "\\boxed{73.0}", "right"),
    ("math", 73, "stop", "\\boxed{m+n = 73}", "right"),
    ("math", 73, "stop", "\\boxed{\\frac{146}{2}}", "right"),
    ("math", 73, "stop", "\\boxed{72}\n\nI checked this with small cases.", "wrong"),
    ("math", "\\frac{1}{2}", "stop", "So the probability is $\\boxed{0.5}$.", "right"),
    ("math", "\\frac{1}{2}", "stop", "\\boxed{\\dfrac12}", "right"),
    ("math", "\\frac{1}{2}", "stop", "\\boxed{50\\%}", "right"),
    ("math", "\\frac{1}{2}", "stop", "\\boxed{-\\frac{1}{2}}", "wrong"),
    ("math", "(3, \\frac{\\pi}{2})", "stop", "$\\boxed{\\left(3,\\frac{\\pi}{2}\\right)}$", "right"),
    ("math", "(3, \\frac{\\pi}{2})", "stop", "\\boxed{(\\pi/2, 3)}", "wrong"),
    ("math", "x^2 - 1", "stop", "It factors: \\[\\boxed{(x-1)(x+1)}\\]", "right"),
    ("math", "3\\sqrt{13}", "stop", "\\boxed{\\sqrt{117}}", "right"),
    ("math", "3\\sqrt{13}", "stop", "\\boxed{3\\sqrt{14}}", "wrong"),
    ("math", "18", "stop", "Janet sells 9 eggs at $2 each.\nShe makes 9 * 2 = $18 a day.\n#### 18", "right"),
    ("math", "18", "stop", "So she makes **$18** every day at the farmers' market.", "right"),
    ("math", "70,000", "stop", "The profit is $\\boxed{70000}$ dollars.", "right"),
    ("math", "18", "stop", "She sells 16 - 3 - 4 = 9 eggs, which is 9 * 2 = 18. #### 9", "wrong"),
    ("math", "2\\pi", "stop", "答案是 $\\boxed{2\\pi}$。", "right"),
    ("math", "12", "stop", "<think>\n先设 x。\n</think>\n因此，最终答案为 12。", "right"),
    ("math", "12", "stop", "<think>\n先设 x。\n</think>\n综上，答案：24。", "wrong"),
]  # fmt: skip

CHOICES: list[tuple[str, Any, str, str, str]] = [
    ("choice", "C", "stop", "<think>\nA is tempting.\n</think>\nThe correct answer is **C**.", "right"),
    ("choice", "C", "stop", "<think>\nAnswer: A\n</think>\nAnswer: C", "right"),
    ("choice", "C", "stop", "<think>\nAnswer: C\n</think>\nAnswer: A", "wrong"),
    ("choice", "C", "stop", "$\\boxed{C}$", "right"),
    ("choice", "C", "stop", "\\boxed{\\text{(C)}}", "right"),
    ("choice", "C", "stop", "\\boxed{\\textbf{C. } 3.2\\times10^{-4}}", "right"),
    ("choice", "C", "stop", "Of the four options, (B) and (D) break parity, so the answer is (C).", "right"),
    ("choice", "C", "stop", "I would choose option B, because C ignores the recoil.", "wrong"),
    ("choice", "C", "stop", "A and C are both plausible, it is hard to say.", "wrong"),
    ("choice", "C", "length", "<think>\nSo C must be right. The answer is C. But wait", "wrong"),
    ("choice", "C", "length", "The answer is $\\boxed{C}$ because the neutrino carries", "wrong"),
    ("choice", OPTIONS, "stop", "It must be the neutrino.", "right"),
    ("choice", OPTIONS, "stop", "\\boxed{\\text{the neutrino}}", "right"),
    ("choice", OPTIONS, "stop", "\\boxed{\\text{the photon}}", "wrong"),
    ("choice", OPTIONS, "stop", "Answer: (C) the neutrino", "right"),
    ("choice", "B", "stop", "<think>\n分析各选项。\n</think>\n故选：B", "right"),
    ("choice", "B", "stop", "A 项错误；B 项正确。所以本题选 B。", "right"),
    ("choice", "B", "stop", "综上所述，正确答案是 D。", "wrong"),
    ("choice", "AC", "stop", "因此正确的选项是 \\boxed{AC}", "right"),
    ("choice", "AC", "stop", "因此正确的选项是 \\boxed{A}", "wrong"),
]  # fmt: skip

PROGRAMS: list[tuple[str, Any, str, str, str]] = [
    ("tests", DOUBLE, "stop", f"<think>\nDouble it.\n</think>\n```python\n{_READS}\n```", "right"),
    ("tests", DOUBLE, "stop", _SHOWN, "right"),
    ("tests", DOUBLE, "stop", "```python\nn = int(input())\nprint(n * n)\n```", "wrong"),
    ("tests", DOUBLE, "stop", f"<think>\n```python\n{_READS}\n```\n</think>\n```python\nprint(8)\n```", "wrong"),
    ("tests", DOUBLE, "length", f"<think>\nI could write\n```python\n{_READS}\n```\nbut negative", "wrong"),
    ("tests", DOUBLE, "stop", "I cannot solve this problem.", "wrong"),
    ("tests", DOUBLE, "stop", f"```python\n{_MAIN}\n```", "right"),
    ("tests", DOUBLE, "stop", f"```python\n{_EXITS}\n```", "wrong"),
    ("tests", SQUARE, "stop", f"```python\n{_METHOD}\n```", "right"),
    ("tests", SQUARE, "stop", "```python\ndef square(x):\n    return x ** 2\n```", "right"),
    ("tests", SQUARE, "stop", "```python\ndef square(x):\n    return abs(x) * 3\n```", "wrong"),
]  # fmt: skip

TEXTS: list[tuple[str, Any, str, str, str]] = [
    ("text", "Paris", "stop", "<think>\nFrance's capital.\n</think>\nThe capital of France is Paris.", "right"),
    ("text", "Paris", "stop", "The answer is **paris**.", "right"),
    ("text", "Paris", "stop", "The answer is Lyon, not Paris.", "wrong"),
    ("text", "yes", "stop", "Yes, because both sides are even.", "right"),
    ("text", "yes", "stop", "No. The two sets differ.", "wrong"),
    ("exact", "NaCl", "stop", "\\boxed{NaCl}", "right"),
    ("exact", "NaCl", "stop", "\\boxed{NACL}", "wrong"),
]  # fmt: skip

LABELLED = [*MATHEMATICS, *CHOICES, *PROGRAMS, *TEXTS]
