import os
from types import SimpleNamespace

import pytest

from bmjax.calibrate.dispatch import check, merge
from bmjax.config import UserError
from bmjax.merge.plan import output as places
from bmjax.merge.plan.output import check_space, check_target, parse_size, size_text
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import soup, tensors


@pytest.mark.parametrize(
    "text, size",
    [("512MiB", 512 * 2**20), ("2GiB", 2**31), ("1.5GiB", 3 * 2**29), ("5GB", 5 * 10**9), ("1 KB", 1000), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize(
    "text", ["", "2", "2G", "2gib", "-1GiB", "2 GiB ", "1e9B", "2PiB", "0MiB", "iB", "٢GiB", "2iB"]
)
def test_bad_sizes(text):
    with pytest.raises(UserError) as error:
        parse_size(text, "--memory")
    assert str(error.value) == f"--memory: expected a size such as 512MiB, 2GiB or 5GB, found '{text}'"


def test_sizes_in_words():
    assert [size_text(n) for n in (0, 999, 1000, 988_100_000, 5 * 10**9, 65 * 10**12)] == [
        "0 B", "999 B", "1.0 KB", "988.1 MB", "5.0 GB", "65.0 TB",
    ]  # fmt: skip


def test_the_target_is_empty_and_no_input(tmp_path):
    model, full, other = tmp_path / "runs" / "model", tmp_path / "full", tmp_path / "other"
    for folder, file in ((model, "config.json"), (full, "model.safetensors"), (other, "thesis.tex")):
        folder.mkdir(parents=True)
        (folder / file).write_text("x")
    os.symlink(model, tmp_path / "link")
    check_target(tmp_path / "new" / "out", [model], overwrite=False)
    assert check_target(full, [model], overwrite=True) == {"model.safetensors"}
    for target, overwrite, message in (
        (model, True, "contains"),
        (model / "merged", True, "inside the input"),
        (model / "deep" / "merged", False, "inside the input"),
        (other / "thesis.tex" / "out", False, "Not a directory; choose another output directory"),
        (tmp_path / "o\udcff", False, "no Unicode text"),
        (tmp_path / "runs", True, "contains"),
        (tmp_path / "link", True, "contains"),
        (full, False, "exists and is not empty; choose another output directory, or add --overwrite"),
        (other, True, "is not a model directory, so it is never overwritten"),
        (other, False, "is not a model directory, so it is never overwritten"),
        (other / "thesis.tex", True, "exists and is not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            check_target(target, [model], overwrite)


def test_what_a_user_has_added_to_a_result_is_named_before_it_goes(save):
    folder = save("a", tensors()).directory
    (folder / "preprocessor_config.json").write_text("{}")
    recipe = soup("a")
    merge(recipe, "out")
    lines = []
    merge(recipe, "out", overwrite=True, log=lines.append)
    assert not any("overwriting" in line for line in lines)
    os.makedirs("out/extra"), os.makedirs("out/.git")
    for name in ("notes.txt", "old.jsonl"):
        with open(f"out/{name}", "w") as file:
            file.write("mine")
    said = "out: overwriting it removes .git, extra, notes.txt, old.jsonl, which this merge does not write; move what"
    assert any(said in line for line in check(read_recipe(recipe), "out", overwrite=True))
    merge(recipe, "out", overwrite=True, log=lines.append)
    assert said in lines[-1] and not os.path.exists("out/notes.txt")


def test_space(tmp_path, monkeypatch):
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    assert check_space(tmp_path / "a" / "out", 5000) == 5000
    with pytest.raises(UserError, match=r"out: the result takes 6\.0 KB, 5\.0 KB are free there"):
        check_space(tmp_path / "a" / "out", 6000)


@pytest.mark.parametrize("place", ["closed/out", "closed/deep/out", "full", "left"])
def test_a_place_that_may_not_be_written_is_refused_before_the_merge(save, tmp_path, monkeypatch, place):
    """Whoever runs this may do all, so the rights that a directory's mode gives its owner are imitated."""
    plain = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: plain(path, mode) and os.stat(path).st_mode & 0o200 > 0)
    save("a", tensors())
    (tmp_path / "closed").mkdir(mode=0o500)
    for name in ("full", "left", ".left.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name).chmod(0o700 if name == "left" else 0o500)
    named = {"full": "full may not be removed", "left": r"still in .*\.left\.replaced"}.get(place, "closed may not be")
    for run in (lambda: list(check(read_recipe(soup("a")), place, True)), lambda: merge(soup("a"), place, True)):
        with pytest.raises(UserError, match=f"{place}: cannot .*{named}.* choose another place"):
            run()
    list(check(read_recipe(soup("a")), "open", True))
