import contextlib
import io
import random
import re
from fractions import Fraction

import pytest

from bmjax.config import UserError
from bmjax.demo.problems import DOMAINS, Problem, make_problems, solve, solve_with_slip, split_of

STEP = re.compile(r"(?<![\d])(-?\d+)([-+*/])(-?\d+)=(-?\d+)")


@pytest.fixture(scope="module", params=DOMAINS)
def problems(request: pytest.FixtureRequest) -> list[Problem]:
    return make_problems(request.param, 6000, seed=3)


def test_problems_are_distinct_and_splits_share_none(problems: list[Problem]) -> None:
    domain = problems[0].domain
    splits = [problems, make_problems(domain, 600, seed=9, split="val"), make_problems(domain, 800, split="test")]
    prompts = [{p.prompt for p in split} for split in splits]
    assert [len(p) for p in prompts] == [6000, 600, 800]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert {split_of(p) for p in prompts[2]} == {"test"}


@pytest.mark.parametrize("domain", DOMAINS)
def test_level_one_alone_is_enough_for_a_backbone(domain: str) -> None:
    problems = make_problems(domain, 2000, levels=[1])
    assert len({p.prompt for p in problems}) == 2000
    assert {p.level for p in problems} == {1}


def test_the_solver_agrees_with_the_generator(problems: list[Problem]) -> None:
    assert [p.prompt for p in problems if solve(p.prompt).answer != p.reference] == []


def test_every_step_of_the_reasoning_is_true_arithmetic_in_range(problems: list[Problem]) -> None:
    for problem in problems:
        steps = STEP.findall(solve(problem.prompt).reasoning)
        assert steps or problem.domain == "code", problem
        for left, operator, right, result in steps:
            a, b = Fraction(left), Fraction(right)
            expected = {"+": a + b, "-": a - b, "*": a * b}.get(operator)
            assert (a / b if expected is None else expected) == Fraction(result), problem
            assert 0 <= int(result) <= (60000 if problem.domain == "science" else 50), problem


def test_texts_are_short(problems: list[Problem]) -> None:
    lengths = [len(p.prompt) + len(solve(p.prompt).reasoning) for p in problems]
    assert max(lengths) <= 160
    assert sum(lengths) / len(lengths) < 120


def test_levels_come_in_turn_and_a_smaller_n_is_a_prefix(problems: list[Problem]) -> None:
    assert [p.level for p in problems[:6]] == [1, 2, 3, 1, 2, 3]
    assert make_problems(problems[0].domain, 50, seed=3) == problems[:50]
    assert make_problems(problems[0].domain, 50, seed=4) != problems[:50]


def test_excluded_prompts_do_not_come_back(problems: list[Problem]) -> None:
    taken = {p.prompt for p in problems[:200]}
    assert not taken & {p.prompt for p in make_problems(problems[0].domain, 200, seed=3, exclude=taken)}


def test_programs_print_what_the_reference_says() -> None:
    for problem in make_problems("code", 3000, seed=11):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(problem.prompt.partition("\n")[2], {})
        assert printed.getvalue().strip() == problem.reference, problem.prompt


def test_expressions_have_the_value_python_gives_them() -> None:
    expressions = [p for p in make_problems("math", 3000, seed=12) if p.prompt.startswith("Compute ")]
    assert len(expressions) > 1000
    for problem in expressions:
        assert eval(problem.prompt.removeprefix("Compute ").removesuffix(".")) == int(problem.reference)


def test_word_problems_against_an_independent_reading() -> None:
    stories = [p for p in make_problems("math", 3000, seed=13) if not p.prompt.startswith("Compute ")]
    assert len(stories) > 500
    for problem in stories:
        first, *clauses = problem.prompt.partition(". How")[0].split(", ")
        value = Fraction(re.search(r"\d+", first)[0])
        for clause in clauses:
            numbers = [int(n) for n in re.findall(r"\d+", clause)]
            verb = clause.split()[0]
            if verb in ("buys", "finds", "gets"):
                value += numbers[0]
            elif verb in ("loses", "sells", "gives"):
                value -= numbers[0]
            elif verb == "keeps":
                value /= numbers[1]
            else:
                value *= {"doubles": 2, "triples": 3}[verb]
        assert value == Fraction(problem.reference), problem.prompt


# The physics once more, written apart from the package: (words of the stem, value of its numbers in order).
PHYSICS = [
    (r"goes at (\d+) m/s for (\d+) s\. Dist", lambda v, t: v * t),
    (r"A (\d+) kg \w+ gains (\d+) m/s each s\. F", lambda m, a: m * a),
    (r"A (\d+) kg \w+ gains (\d+) m/s each s for (\d+) m\. W", lambda m, a, d: m * a * d),
    (r"A (\d+) ohm \w+ carries (\d+) A\. V", lambda r, i: r * i),
    (r"A (\d+) ohm \w+ carries (\d+) A\. P", lambda r, i: r * i * i),
    (r"A (\d+) ohm \w+ gets (\d+) V\. C", lambda r, u: Fraction(u, r)),
    (r"A (\d+) ohm \w+ gets (\d+) V\. P", lambda r, u: Fraction(u * u, r)),
    (r"A (\d+) V \w+ draws (\d+) A\. P", lambda u, i: u * i),
    (r"at (\d+) V draws (\d+) A\. R", lambda u, i: Fraction(u, i)),
    (r"^(\d+) N push a \w+ (\d+) m\. W", lambda f, d: f * d),
    (r"^(\d+) N push a (\d+) kg \w+\. A", lambda f, m: Fraction(f, m)),
    (r"^(\d+) N push a (\d+) kg \w+ for (\d+) s", lambda f, m, t: Fraction(f * t, m)),
    (r"of (\d+) cm3 has (\d+) g/cm3\. M", lambda v, d: v * d),
    (r"of (\d+) cm3 weighs (\d+) g\. D", lambda v, m: Fraction(m, v)),
    (r"of (\d+) cm3 weighs (\d+) kg\. D", lambda v, m: Fraction(1000 * m, v)),
    (r"goes (\d+) m in (\d+) s\. S", lambda d, t: Fraction(d, t)),
    (r"goes (\d+) km in (\d+) s\. S", lambda d, t: Fraction(1000 * d, t)),
    (r"goes (\d+) m at (\d+) m/s\. T", lambda d, v: Fraction(d, v)),
    (r"goes (\d+) km\. Distance in m\?", lambda d: 1000 * d),
    (r"is (\d+) m long\. Length in cm", lambda d: 100 * d),
    (r"runs (\d+) h\. Time in min", lambda t: 60 * t),
    (r"runs (\d+) min\. Time in s", lambda t: 60 * t),
    (r"has (\d+) kg\. Mass in g", lambda m: 1000 * m),
]


def test_choices_are_right_and_their_order_tells_nothing() -> None:
    used, places = set(), [0, 0, 0, 0]
    for problem in make_problems("science", 4000, seed=14):
        stem, _, listed = problem.prompt.partition("\n")
        choices = re.findall(r"\d+", listed)
        assert len(set(choices)) == 4
        matching = [(p, value) for p, value in PHYSICS if re.search(p, stem)]
        assert len(matching) == 1, stem
        pattern, value = matching[0]
        used.add(pattern)
        assert Fraction(problem.reference) == value(*map(int, re.search(pattern, stem).groups())), stem
        places[choices.index(problem.reference)] += 1
    assert used == {pattern for pattern, _ in PHYSICS}
    assert all(850 < n < 1150 for n in places)


def test_a_stem_has_one_prompt_only() -> None:
    stems = [p.prompt.partition("\n")[0] for p in make_problems("science", 6000, seed=1)]
    assert len(set(stems)) == len(stems)


def test_a_slip_always_reaches_the_answer(problems: list[Problem]) -> None:
    for problem in problems[:1500]:
        wrong = solve_with_slip(problem.prompt, random.Random(problem.prompt))
        assert wrong.answer != problem.reference
        assert wrong == solve_with_slip(problem.prompt, random.Random(problem.prompt))
        false = [s for s in STEP.findall(wrong.reasoning) if eval(f"{s[0]}{s[1]}{s[2]}") != int(s[3])]
        assert len(false) >= 1


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Who wrote Faust?",
        "Compute .",
        "Compute 7.",
        "Compute 3 / 0.",
        "Compute 7 / 2.",
        "Compute 2 ** 9.",
        "Compute " + "(" * 150 + "1" + ")" * 150 + ".",
        "Compute " + "9" * 190 + " * 9.",
        "Tom has 7 pens, eats 3. How many now?",
        "What does this print?\nimport os\nprint(1)",
        "What does this print?\nprint(__import__('os'))",
        "What does this print?\nx = 3",
        "What does this print?\nx = 1\nfor i in range(999999999):\n  x += 1\nprint(x)",
        "What does this print?\nx = 9\nfor i in range(20):\n  x *= x\nprint(x)",
        "What does this print?\nprint(y)",
        "What does this print?\nx = [1]\nprint(x[4])",
        "What does this print?\nx = 'a'\nprint(x + 1)",
        "What does this print?\n)(",
        "A car goes 60 m in 5 s. Speed in m/s?\n1, 2, 3 or 4?",
        "A car goes 60 m in 5 s. Speed in m/s?",
        "x" * 100_000,
    ],
)
def test_an_unknown_prompt_is_a_value_error(prompt: str) -> None:
    with pytest.raises(ValueError):
        solve(prompt)


def test_asking_for_more_problems_than_there_are_is_told() -> None:
    with pytest.raises(UserError, match=r"only [0-9]+ distinct test problems"):
        make_problems("science", 5000, levels=[1], split="test")
