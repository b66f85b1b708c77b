"""What is cut, left out or too little among the rows of a merge is said, and refused before the first step."""

import json

import pytest

from bmjax.calibrate import dispatch, steps
from bmjax.calibrate.rows import notes_of_rows, read_domains
from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from bmjax.weights import student
from tests.calibrate.tiny_models import recipe
from tests.conftest import sums, write_rows


def read(models, tmp_path, data, unseen=None, **parameters):
    """(domains, lines said) of a recipe whose model a has these rows, and such to judge by."""
    merge = recipe(models, **parameters)
    merge["models"][0] = {"model": "a", "data": str(write_rows(tmp_path / "rows.jsonl", data))}
    if unseen is not None:
        merge["models"][0]["held_out_data"] = str(write_rows(tmp_path / "unseen.jsonl", unseen))
    (step,) = read_recipe(merge).steps
    domains = read_domains(step, 0, student.open(models / "base", purpose="calibration"))
    return domains, list(notes_of_rows(step, domains))


def documents(loader):
    return [tuple(example.tokens) for example in loader.dataset.examples]


NO_ANSWER = {"prompt": "What?", "response": ""}
LONG_PROMPT = {"prompt": "x" * 300, "response": "y"}


@pytest.mark.parametrize(
    ("rows", "parameters", "words"),
    [
        ([*sums(20), NO_ANSWER], {}, "data: 1 rows: no answer to learn"),
        (sums(20), {"seq_len": 48}, "documents are cut at seq_len 48"),
        ([*sums(20), LONG_PROMPT], {}, "1 rows: the prompt alone fills seq_len 128: left out"),
        ([*sums(30), *[sums(1)[0]] * 9], {}, "documents are copies of others"),
        (sums(9), {"along": "regmean", "rows": 30}, "packed rows of 128 tokens, fewer than rows, 30"),
        (sums(20), {"held_out": 5}, "judge little (5 of 'a', 5 of 'b')"),
    ],
)  # fmt: skip
def test_what_is_left_out_or_little_is_said(models, tmp_path, rows, parameters, words):
    _, said = read(models, tmp_path, rows, **parameters)
    assert any(words in line and "'a'" in line for line in said), said


def test_enough_whole_rows_of_their_own_say_nothing(models, tmp_path):
    _, said = read(models, tmp_path, sums(40, 5), sums(20, 6), along="changes", held_out=8)
    assert not [line for line in said if "'a'" in line]


def test_held_out_documents_are_not_among_the_learned(models, tmp_path):
    (domain, _), said = read(models, tmp_path, sums(30, 5), [*sums(12, 6), *sums(30, 5)[:18], *sums(3, 6)])
    judged = documents(domain.judged)
    assert len(judged) == len(set(judged)) and not set(judged) & set(documents(domain.learned))
    assert any(
        "held-out documents occur among those that are learned from, or twice: left out" in line for line in said
    )
    with pytest.raises(UserError, match="all held-out documents occur among"):
        read(models, tmp_path, sums(30, 5), sums(30, 5)[:2], held_out=20)


def test_held_out_data_changes_the_judge_alone(models, tmp_path):
    (without, _), _ = read(models, tmp_path, sums(60, 5))
    (with_it, _), _ = read(models, tmp_path, sums(60, 5), sums(20, 6), judged=7)
    assert documents(with_it.learned) == documents(without.learned)
    assert len(documents(with_it.judged)) == 7 and not set(documents(with_it.judged)) & set(documents(without.judged))
    # Few rows are all learned from.
    (few, _), _ = read(models, tmp_path, sums(5, 5), sums(20, 6), held_out=8)
    assert len(documents(few.learned)) == 5


@pytest.mark.parametrize(
    ("rows", "parameters", "words"),
    [
        (sums(4), {}, "4 rows, 4 of them to be held out"),
        ([*sums(4), *[NO_ANSWER] * 9], {}, "4 of 13 rows can be used, 4 of them to be held out"),
        ([NO_ANSWER] * 9, {}, "no target token"),
        ([LONG_PROMPT] * 9, {}, "all 9 rows are over seq_len"),
        (sums(20), {"seq_len": 2}, "over seq_len 2"),
        (sums(20), {"documents": 4}, "documents: 4, 4 of them to be held out"),
    ],
)
@pytest.mark.parametrize("place", ["only", "later"])
def test_too_few_rows_are_refused_before_the_first_step(models, tmp_path, monkeypatch, rows, parameters, words, place):
    monkeypatch.setattr(steps.files, "merge", lambda *arguments, **options: pytest.fail("a step was made"))
    monkeypatch.setattr(steps, "merge_step", lambda *arguments, **options: pytest.fail("a step was made"))
    merge = recipe(models, "regmean", **{"steps": 0} | parameters)
    merge["models"][0]["data"] = str(write_rows(tmp_path / "rows.jsonl", rows))
    if place == "later":
        first = {"name": "first", "merge_method": "linear", "models": ["a", "b"]}
        merge = {"sources": merge.pop("sources"), "steps": [first, merge | {"base_model": "first"}]}
    for run in (lambda r: list(dispatch.check(r, tmp_path / "out")), lambda r: dispatch.merge(r, tmp_path / "out")):
        with pytest.raises(UserError) as caught:
            run(read_recipe(merge))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_check_says_what_the_merge_says(models, tmp_path):
    said: list[str] = []
    lines = list(dispatch.check(read_recipe(recipe(models, "regmean", steps=0)), tmp_path / "out"))
    dispatch.merge(recipe(models, "regmean", steps=0), tmp_path / "out", log=said.append)
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    assert notes and notes == [line for line in said if line in notes]


def test_errors_name_models_without_aliases_as_the_recipe_does(models, tmp_path):
    merge = recipe(models)
    sources = merge.pop("sources")
    merge |= {
        "base_model": sources["base"],
        "models": [{"model": sources["a"], "data": str(write_rows(tmp_path / "a.jsonl", sums(2)))}],
    }
    with pytest.raises(UserError, match=rf"^model '{sources['a']}': data: 2 rows"):
        dispatch.merge(merge, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held_out_data": "a.jsonl"}, "'held_out_data' judges what is learned of 'data', which is missing"),
        ({"data": ["b.jsonl", "a.jsonl"], "held_out_data": "a.jsonl"}, "'a.jsonl' is both"),
        ({"data": "a.jsonl", "held_out_dato": "b"}, "did you mean 'held_out_data'"),
        ({"data": "a.jsonl", "held_out_data": "bad://x"}, "held_out_data"),
    ],
)
def test_held_out_data_is_checked_as_data_is(models, change, words):
    merge = recipe(models)
    merge["models"][0] = {"model": "a", **change}
    with pytest.raises(UserError, match=words):
        read_recipe(merge)


def test_a_missing_file_of_held_out_data_is_named(models, tmp_path):
    merge = recipe(models)
    merge["models"][1]["held_out_data"] = str(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match=r"no\.jsonl"):
        list(dispatch.check(read_recipe(merge), tmp_path / "out"))
    assert json.loads(json.dumps(read_recipe(merge).text))["steps"][0]["models"][1]["held_out_data"]
