"""A merge that was killed goes on after its last finished layer, and gives the same bytes."""

import pytest

from bmjax.calibrate import dispatch
from bmjax.calibrate.progress import Progress
from tests.calibrate.tiny_models import recipe

PARAMETERS = {
    "regmean": {},
    "layerwise": {"steps": 2, "rows": 2},
    "learned": {"along": "fisher", "steps": 3, "rows": 2},
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", PARAMETERS)
def test_killed_and_resumed_is_the_same(models, tmp_path, monkeypatch, method):
    merge = recipe(models, method, **({"steps": 0} if method == "regmean" else {}) | PARAMETERS[method])
    puts, put = [], Progress.put

    def counted(self, key, value):
        # Killed before the line is written: what belongs to it is computed again.
        puts.append((key, value if isinstance(value, int) else None))
        if len(puts) == limit:
            raise Killed
        put(self, key, value)

    monkeypatch.setattr(Progress, "put", counted)
    limit = 0
    whole = dispatch.merge(merge, tmp_path / "whole")
    keys = list(puts)
    assert len(keys) == len(set(keys))
    out, finished = tmp_path / "out", []
    for limit in (len(keys) // 3, len(keys) // 3):  # noqa: B007 - `counted` reads it
        puts.clear()
        with pytest.raises(Killed):
            dispatch.merge(merge, out)
        assert not out.exists()
        finished += puts[:-1]
    puts.clear()
    limit = 0
    resumed = dispatch.merge(merge, out)
    # What was finished is not done again, and nothing is left out.
    assert finished + puts == keys and len(finished) > 1
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert resumed == whole and sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_another_recipe_does_not_go_on(models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("bmjax.calibrate.steps.walk", lambda *arguments, **options: (_ for _ in ()).throw(Killed))
        dispatch.merge(recipe(models, "regmean", steps=0), tmp_path / "out")
    assert (tmp_path / ".out.partial/.steps").is_dir()
    (tmp_path / ".out.partial/.steps/stray").touch()
    dispatch.merge(recipe(models, "regmean", steps=0, ridge=0.5), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    progress = Progress(tmp_path / "journal")
    progress.put("a", [1.5])
    progress.close()
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'["b", {"x"')
    again = Progress(tmp_path / "journal")
    assert again.get("a") == [1.5] and again.get("b") is None
    again.put("b", 2)
    again.close()
    assert Progress(tmp_path / "journal").get("b") == 2
