"""Comparisons of two evaluations: paired differences by hand, flips, and what is refused."""

import json

import pytest

from bmjax.cli.main import main
from bmjax.config import UserError
from bmjax.evaluate.compare import compare, lines
from bmjax.evaluate.score import bootstrap, wilson
from tests.conftest import write_rows


def write(folder, task, verdicts, prompt="Q {}?"):
    """An evaluation's samples: verdicts[problem][sample], as letters r, w and u."""
    names = {"r": "right", "w": "wrong", "u": "unjudged"}
    rows = [
        {"id": f"{task}{p}{s}", "task": task, "problem": p, "sample": s, "prompt": prompt.format(p), "answer": "x",
         "verdict": names[letter]}
        for p, letters in verdicts.items() for s, letter in enumerate(letters)
    ]  # fmt: skip
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "samples" / f"{task}.jsonl", rows)
    file = folder / "scores.json"
    scores = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(scores | {task: {"accuracy": 0.5}}))
    return str(folder)


BEFORE = {"a": "rrww", "b": "wwww", "c": "rrrr", "d": "rrrw", "e": "uuuu", "f": "rrrr"}
AFTER = {"a": "rrrr", "b": "rrru", "c": "rrrr", "d": "wwwr", "e": "rrrr", "g": "wwww"}


def test_differences_are_paired_by_problem(tmp_path):
    first, second = write(tmp_path / "x", "t", BEFORE), write(tmp_path / "y", "t", AFTER)
    task = compare(first, second)["tasks"]["t"]
    # a: 1/2 -> 1, b: 0 -> 1 of three judged, c: 1 -> 1, d: 3/4 -> 1/4.
    differences = [0.5, 1.0, 0.0, -0.5]
    assert task["difference"] == pytest.approx(sum(differences) / 4)
    assert task["before"] == pytest.approx(2.25 / 4) and task["after"] == pytest.approx(3.25 / 4)
    assert tuple(task["ci95"]) == bootstrap(differences) and task["ci95_by"] == "bootstrap"
    assert (task["problems"], task["better"], task["worse"], task["samples"]) == (4, 2, 1, [16, 15])
    assert (task["wrong_to_right"], task["right_to_wrong"]) == (["b"], ["d"])
    assert (task["only_first"], task["only_second"]) == (1, 2)  # f; e, g
    # The other way round everything has the other sign; scores.json stands for its directory.
    back = compare(f"{second}/scores.json", f"{first}/samples")["tasks"]["t"]
    assert back["difference"] == pytest.approx(-task["difference"]) and back["right_to_wrong"] == ["b"]


def test_the_same_answers_differ_by_nothing_within_wilsons_interval(tmp_path):
    first, second = write(tmp_path / "x", "t", AFTER), write(tmp_path / "y", "t", AFTER)
    task = compare(first, second)["tasks"]["t"]
    assert task["difference"] == 0 and task["ci95_by"] == "wilson" and not task["wrong_to_right"]
    assert task["ci95"] == pytest.approx([-wilson(0.0, 6)[1], wilson(0.0, 6)[1]])


def test_text_and_json_say_the_same(tmp_path, capsys):
    first, second = write(tmp_path / "x", "t", BEFORE), write(tmp_path / "y", "t", AFTER)
    write(tmp_path / "x", "other", {"a": "r"})
    assert main(["eval", "--compare", first, second, "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert comparison == compare(first, second) and comparison["only_first"] == ["other"]
    assert main(["eval", "--compare", first, second]) == 0
    printed = capsys.readouterr().out
    assert printed == "\n".join(lines(comparison)) + "\n"
    assert "t: 56.2 % -> 81.2 %, difference +25.0 points, 95 % interval [" in printed
    assert "not told from no difference; 4 problems (2 better, 1 worse), 16 and 15 samples" in printed
    assert "right -> wrong (1): d" in printed and "wrong -> right (1): b" in printed
    assert "only in the first: other" in printed


def test_tasks_that_a_later_run_dropped_are_left_out(tmp_path):
    for name in ("x", "y"):
        folder = tmp_path / name
        write(folder, "dropped", {"a": "r"})
        (folder / "scores.json").unlink()
        write(folder, "t", BEFORE)
        (folder / "samples" / "t.former.jsonl").write_text((folder / "samples" / "dropped.jsonl").read_text())
    for ending in ("", "/scores.json", "/samples"):
        comparison = compare(f"{tmp_path}/x{ending}", f"{tmp_path}/y{ending}")
        assert list(comparison["tasks"]) == ["t"] and not comparison["only_first"] + comparison["only_second"]
    # A file of samples is what was asked for.
    file = tmp_path / "x" / "samples" / "dropped.jsonl"
    assert list(compare(str(file), str(file))["tasks"]) == ["dropped"]


def test_long_lists_of_flips_are_cut_in_text_alone(tmp_path, capsys):
    names = [f"problem-{n}" for n in range(38)] + ["x" * 200]
    first = write(tmp_path / "x", "t", dict.fromkeys(names, "r"))
    second = write(tmp_path / "y", "t", dict.fromkeys(names, "w"))
    assert main(["eval", "--compare", first, second]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "right -> wrong" in line]
    assert line == f"  right -> wrong (39): {', '.join(names[:10])} and 29 more (--json lists all)"
    assert main(["eval", "--compare", first, second, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["t"]["right_to_wrong"] == names
    # One that is longer than the rest by one name is whole, and a very long name is cut.
    few = compare(write(tmp_path / "v", "t", dict.fromkeys(names[-11:], "r")), write(tmp_path / "w", "t", dict.fromkeys(
        names[-11:], "w")))  # fmt: skip
    assert f"  right -> wrong (11): {', '.join(names[-11:-1])}, {'x' * 40}..." in lines(few)


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys):
    first = write(tmp_path / "x", "t", BEFORE)
    for name, second, problem in (
        ("task", write(tmp_path / "task", "u", AFTER), r"has samples of t, .* of u: no task is in both"),
        ("prompt", write(tmp_path / "prompt", "t", AFTER, "{}: Q?"), r"t: problem a, sample 0 was asked with another"),
        ("problems", write(tmp_path / "problems", "t", {"z": "r"}), r"t: no problem was judged in both"),
        ("unjudged", write(tmp_path / "unjudged", "t", {"a": "u"}), r"t: no problem was judged in both"),
        ("nothing", str(tmp_path), r"no samples; expected a directory that `bmjax eval` wrote"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            compare(first, second)
        assert "\n" not in str(error.value), name
    (tmp_path / "prompt" / "scores.json").unlink()
    with pytest.raises(UserError, match=r"no scores.json; the evaluation is not complete"):
        compare(first, str(tmp_path / "prompt"))
    scores = tmp_path / "problems" / "scores.json"
    for text in ("[1]", "{", '{"t": 1}'):
        scores.write_text(text)
        with pytest.raises(UserError, match=r"scores.json: no scores of `bmjax eval`"):
            compare(first, str(scores.parent))
    scores.write_text('{"gone": {"accuracy": 1}}')
    with pytest.raises(UserError, match=r"gone.jsonl: missing, though .*scores.json has its score"):
        compare(first, str(scores.parent))
    write_rows(tmp_path / "x" / "samples" / "t.jsonl", [{"id": "1", "answer": "x"}])
    assert main(["eval", "--compare", first, first]) == 2
    assert "no sample of `bmjax eval`; evaluate again" in capsys.readouterr().err
    for words, problem in (
        (["--compare", first], "2 values must follow"),
        (["--compare", "a", "b", "c"], "no other words"),
    ):
        assert main(["eval", *words]) == 2
        assert problem in capsys.readouterr().err
    assert main(["eval"]) == 2
    assert "CONFIG is missing" in capsys.readouterr().err
