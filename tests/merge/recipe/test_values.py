import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.merge.recipe.values import MAX_PATTERN, Value, parse, simplify

ATTENTION, MLP = "model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"


def number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"t: expected a number, found {value!r}")
    return float(value)


def value(text, check=number):
    return simplify("t", parse("t", text, check))


def test_a_plain_number_stays_one():
    assert value(0.1) == 0.1 and value([0.1]) == 0.1 and value({"value": 3}) == 3.0
    assert value([{"filter": "*", "value": 2}, {"value": 1}]) == 2.0


@pytest.mark.parametrize("points", [[0, 1], [0, 0.5, 0.3, 0.7, 1], [1e-3, 1e3, 0.1]])
def test_a_list_is_a_line_over_the_depth(points):
    gradient = value(points)
    for depth in np.linspace(0, 1, 41).tolist():
        expected = np.interp(depth, np.linspace(0, 1, len(points)), points)
        assert gradient.at(ATTENTION, depth) == pytest.approx(expected, rel=1e-12)
    assert [gradient.at("x", i / (len(points) - 1)) for i in range(len(points))] == [float(p) for p in points]
    assert type(gradient.at("x", 0.3)) is float


def test_words_and_switches_change_in_steps():
    switches = value([True, False], lambda v: v)
    assert [switches.at("x", t) for t in (0.0, 0.5, 0.99, 1.0)] == [True, True, True, False]
    words = value(["sum", "mean", "sum"], lambda v: v)
    assert [words.at("x", t) for t in (0.0, 0.49, 0.5, 0.99, 1.0)] == ["sum", "sum", "mean", "mean", "sum"]


def test_the_first_filter_that_fits_decides():
    t = value([
        {"filter": "self_attn", "value": [0, 1]},
        {"regex": r"layers\.[0-3]\.mlp", "value": 0.25},
        {"filter": "mlp", "value": 0.75},
        {"value": [0.5, 0.6]},
    ])  # fmt: skip
    assert t.at(ATTENTION, 0.25) == 0.25
    assert t.at(MLP, 1.0) == 0.25
    assert t.at("model.layers.14.mlp.up_proj.weight", 1.0) == 0.75
    assert t.at("model.norm.weight", 0.0) == 0.5
    assert t.at("model.norm.weight", 1.0) == 0.6


def test_no_fitting_filter_names_the_tensor():
    t = value([{"filter": "mlp", "value": 1}])
    assert t.at(MLP, 0.0) == 1.0
    with pytest.raises(UserError, match=r"'t' has no value for tensor 'model\.norm\.weight'.*`- value: V`"):
        t.at("model.norm.weight", 0.0)


def test_rules_of_the_next_level_where_no_filter_fits():
    levels = (
        *parse("t", [{"filter": "mlp", "value": 1}], number),
        *parse("t", [{"filter": "attn", "value": 2}], number),
    )
    t = simplify("t", (*levels, *parse("t", 3, number)))
    assert isinstance(t, Value)
    assert (t.at(MLP, 0), t.at(ATTENTION, 0), t.at("norm", 0)) == (1.0, 2.0, 3.0)


BAD = {
    "empty": ([], "t: an empty list"),
    "mixed": ([0.5, {"filter": "mlp", "value": 1}], "t: 0.5 stands among filters"),
    "word": (["x"], "t: expected a number, found 'x'"),
    "true": ([0.0, True], "t: expected a number, found True"),
    "nested": ([{"filter": "mlp", "value": [{"value": 1}]}], "t: expected a number, found {'value': 1}"),
    "misspelt": ([{"fliter": "mlp", "value": 1}], "t: unknown key 'fliter'; did you mean 'filter'?"),
    "no value": ([{"filter": "mlp"}], "t: `value` is missing beside {'filter': 'mlp'}"),
    "filter is a number": ([{"filter": 3, "value": 1}], "t: filter: expected a part of tensor names, found 3"),
    "empty filter": ([{"filter": "", "value": 1}], "t: filter: expected a part of tensor names, found ''"),
    "both": ([{"filter": "a", "regex": "b", "value": 1}], "'filter' and 'regex' stand in one entry"),
    "bad regex": ([{"regex": "(", "value": 1}], "t: regex '(' is not one: missing ), unterminated subpattern"),
    "a regex that hangs": ([{"regex": r"(\w+\.?)+!", "value": 1}], r"t: regex '(\w+\.?)+!' could take for ever"),
    "a regex of many stars": ([{"regex": ".*" * 5, "value": 1}], "at most 4 of * + ? {}"),
    "a regex of many choices": ([{"regex": "(a|b)" * 7, "value": 1}], "6 groups"),
    "long regex": ([{"regex": "a" * (MAX_PATTERN + 1), "value": 1}], "regex: 201 characters, at most 200"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values(name):
    text, message = BAD[name]
    with pytest.raises(UserError) as error:
        value(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [r"layers\.(0|1|2|[3-9]|1[0-5])\.(?:mlp|self_attn)?", r"^model\.layers\.\d+\..*\+*?[*+?{]\(\)\*\+$",
     r"(?i)(?P<x>up|down)_proj\.weight", r"\d{1,2}\.mlp"],
)  # fmt: skip
def test_what_a_filters_regex_needs_is_allowed(pattern):
    value([{"regex": pattern, "value": 1}, {"value": 0}])


def test_lists_are_refused_for_whole_numbers():
    assert parse("n", [3], number, line=False)[0].points == (3.0,)
    with pytest.raises(UserError, match="n: expected one value, found a list of 2"):
        parse("n", [3, 4], number, line=False)
