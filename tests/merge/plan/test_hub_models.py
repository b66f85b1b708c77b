"""Hub models as inputs: one model by its id and by its directory, the commit that a recipe and a card keep."""

import json

import huggingface_hub
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from bmjax.calibrate.dispatch import merge
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from tests.merge.plan.test_adapters import UP, adapter, lora
from tests.merge.plan_helpers import EMBED, soup, tensors

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(save, tmp_path, monkeypatch):
    """A cache with org/a and org/b as the hub library lays it out; returns the directory of an id's copy."""

    def directory(name):
        return tmp_path / "cache" / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT

    def snapshot_download(name, revision=None, **options):
        if not directory(name).is_dir() or revision not in (None, "main", COMMIT):
            raise OSError("404")
        return str(directory(name))

    for i, name in enumerate(("org/a", "org/b")):
        folder = save(name.replace("/", "-"), tensors(seed=i)).directory
        directory(name).parent.mkdir(parents=True)
        folder.rename(directory(name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: [])
    return directory


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_an_id_and_its_directory_are_one_model(hub, method):
    models = ["org/a", str(hub("org/a"))] if method == "linear" else ["org/b", str(hub("org/a"))]
    models = models[1:] if method == "slerp" else models
    base = {} if method == "linear" else {"base_model": "org/a"}
    for other in (models[-1], "org/a@main"):
        with pytest.raises(UserError, match=rf"models 'org/a' and '{other}' are one directory.*list it once"):
            merge({"merge_method": method, "models": [*models[:-1], other], **base}, "out")


def test_slices_may_read_other_layers_of_it_by_another_name(hub):
    ranges = {"org/a": [0, 2], str(hub("org/a")): [2, 4]}
    for same in (False, True):
        sources = [{"model": m, "layer_range": [0, 2] if same else r} for m, r in ranges.items()]
        recipe = {"merge_method": "linear", "slices": [{"sources": sources}]}
        if same:
            with pytest.raises(UserError, match="are one directory"):
                merge(recipe, "twice")
        else:
            merge(recipe, "out")


def test_the_written_recipe_pins_the_commits_that_were_read(hub, tmp_path):
    values, product = lora(UP, 8, 4)
    hub("org/lora").mkdir(parents=True)
    adapter(tmp_path / "lora", values)
    for path in (tmp_path / "lora").iterdir():
        path.rename(hub("org/lora") / path.name)
    recipe = {"sources": {"b": "org/b@main"}, "merge_method": "dare_linear", "base_model": "org/a", "seed": 3,
              "models": ["b", "org/a+org/lora"], "parameters": {"density": 0.5}}  # fmt: skip
    notes = []
    merge(recipe, "out", log=notes.append)
    assert "model 'org/a+org/lora': its adapter was made for org/base, not for org/a" in notes
    written = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert written["sources"] == {
        "b": f"org/b@{COMMIT}", "org/a": f"org/a@{COMMIT}", "org/a+org/lora": f"org/a@{COMMIT}+org/lora@{COMMIT}",
    }  # fmt: skip
    merge(tmp_path / "out/recipe.yaml", "again")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["sources"]["b"]["directory"] == f"org/b@{COMMIT}"
    head = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert head["base_model"] == ["org/a", "org/b", "org/lora"]


def test_directories_are_written_as_they_were_given(hub, save, tmp_path):
    save("here", tensors())
    merge(soup("here"), "out")
    assert "sources" not in yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())


@pytest.mark.parametrize("scheme", ["memory"])
def test_a_model_and_its_adapter_in_a_bucket(save, tmp_path, buckets, scheme):
    from bmjax.io import bucket

    root, base = f"{scheme}://bucket/{tmp_path.name}", tensors()
    folder = save("base", base).directory
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    (folder / "modules.json").write_text('[{"path": "1_Pooling"}, {"path": "2_Dense"}]')
    (folder / "2_Dense").mkdir()
    save_file({"w": np.ones(3, np.float32)}, folder / "2_Dense/model.safetensors")
    values, product = lora(UP, 8, 4)
    adapter(tmp_path / "lora", values)
    bucket.send_folder(folder, f"{root}/base")
    bucket.send_folder(tmp_path / "lora", f"{root}/lora")
    for i, name in enumerate((f"{root}/base+{root}/lora", f"{root}/base+lora", f"base+{root}/lora", f"{root}/a+b")):
        if i == 3:
            bucket.send_folder(folder, f"{root}/a+b")
        merge(soup(name), f"{root}/out{i}")
        out = tmp_path / f"out{i}"
        names = set(bucket.names_in(f"{root}/out{i}"))
        assert {"1_Pooling/config.json", "2_Dense/model.safetensors"} <= names
        bucket.fetch(f"{root}/out{i}")
        read = open_checkpoint(bucket.mirror(f"{root}/out{i}")).read(f"{UP}.weight")
        expected = base[f"{UP}.weight"] + (0 if i == 3 else 3 * product)
        np.testing.assert_allclose(read, expected, atol=1e-5)
        assert not out.exists() and EMBED in open_checkpoint(bucket.mirror(f"{root}/out{i}")).tensors
