"""Side files that no loader would take: refused before a merge, by --check too, with the file and what to do."""

import json
import os
from pathlib import Path

import pytest

from bmjax.calibrate.dispatch import check, merge
from bmjax.config import UserError
from bmjax.merge.recipe.recipe import read_recipe
from tests.merge.plan_helpers import soup, tensors

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
POINTED = "a pointer of Git LFS, not the file itself; run `git lfs pull` in its directory"


def put(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tokenizer(folder, count=6, prefix="t"):
    from tokenizers import Tokenizer, models

    vocabulary = {f"{prefix}{i}": i for i in range(count)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=f"{prefix}0")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tokenizer.json", POINTER, POINTED),
        ("tokenizer.model", POINTER, POINTED),
        ("preprocessor_config.json", POINTER, POINTED),
        ("modeling_own.py", POINTER, POINTED),
        ("1_Pooling/config.json", POINTER, POINTED),
        ("tokenizer_config.json", "", "is empty; fetch it again"),
        ("generation_config.json", "", "is empty; fetch it again"),
        ("added_tokens.json", "", "is empty; fetch it again"),
        ("tokenizer.model", "", "is empty; fetch it again"),
        ("tokenizer.json", '{"model": {"vocab": {"a"', "not valid JSON, it was cut off or damaged: "),
        ("special_tokens_map.json", '{"eos_token": "</s', "not valid JSON, it was cut off or damaged: "),
        ("vocab.json", "[1, 2]", "expected a JSON object, found list; fetch it again"),
    ],
)
def test_a_damaged_file_of_the_donor_is_refused(save, tmp_path, name, text, message):
    put(save("a", tensors()).directory, name, text)
    save("b", tensors(seed=1))
    for run in (lambda: list(check(read_recipe(soup("a", "b")), "out")), lambda: merge(soup("a", "b"), "out")):
        with pytest.raises(UserError) as error:
            run()
        assert str(error.value).startswith(f"model 'a': a/{name}: {message}")
    assert not (tmp_path / "out").exists()


def test_what_no_loader_reads_is_copied_and_said(save, tmp_path):
    donor = save("a", tensors()).directory
    put(donor, "assets/logo.png", POINTER)
    put(donor, "results.json", "{")
    put(donor, "package/__init__.py", "")
    notes = []
    merge(soup("a"), "out", log=notes.append)
    assert (tmp_path / "out/assets/logo.png").read_text() == POINTER
    told = [note for note in notes if "copied as it is" in note]
    assert [note.partition(":")[2].split(":")[0].strip() for note in told] == ["a/assets/logo.png", "a/results.json"]


def test_a_link_that_leads_nowhere_is_no_tokenizer(save):
    donor = save("a", tensors()).directory
    os.symlink("../blobs/nowhere", donor / "tokenizer.json")
    with pytest.raises(UserError, match=r"a/tokenizer\.json: no file, only a link that leads nowhere; fetch it again"):
        merge(soup("a"), "out")


@pytest.mark.parametrize("name, is_loaded", [("tokenizer.json", True), ("notes.txt", False)])
def test_a_file_that_may_not_be_read_is_refused(save, monkeypatch, name, is_loaded):
    """Whoever runs this may read all files, so the system's refusal is imitated."""
    donor, plain = save("a", tensors()).directory, Path.open
    put(donor, name, "{}")

    def refusing(path, *arguments, **keywords):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return plain(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(UserError) as error:
        list(check(read_recipe(soup("a")), "out"))
    assert str(error.value) == (
        f"model 'a': a/{name}: cannot be read: Permission denied; get the right to read it, or move it out of "
        "the directory"
    )


@pytest.mark.parametrize("text", [POINTER, '{"model": {"vocab": {"a"'])
def test_a_damaged_tokenizer_of_another_model_is_not_another_tokenizer(save, text):
    tokenizer(save("a", tensors()).directory)
    put(save("b", tensors(seed=1)).directory, "tokenizer.json", text)
    notes = []
    merge(soup("a", "b"), "out", log=notes.append)
    assert not any("another tokenizer" in note for note in notes)
    assert any("model 'b'" in note and "b/tokenizer.json" in note and "cannot be told" in note for note in notes)
    with pytest.raises(UserError, match=r"b/tokenizer\.json: (a pointer of Git LFS|not valid JSON)"):
        merge(soup("a", "b", tokenizer_source="union"), "out2")


def test_damaged_files_of_another_models_tokenizer_are_refused(save):
    for name in "abc":
        tokenizer(save(name, tensors()).directory)
    Path("c/tokenizer_config.json").write_text("")
    with pytest.raises(UserError, match=r"model 'c': c/tokenizer_config\.json: is empty"):
        merge(soup("a", "b", tokenizer_source="c"), "out")


@pytest.mark.parametrize(
    "file, classes, missing",
    [
        ("config.json", {"AutoModelForCausalLM": "modeling_own.Own"}, "modeling_own.py"),
        ("config.json", {"AutoConfig": "configuration_own.C", "AutoModel": "modeling_own.M"}, "modeling_own.py"),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.T", None]}, "tokenization_own.py"),
        ("config.json", {"AutoConfig": "configuration_own.C"}, None),
        ("config.json", {"AutoModel": "org/model--modeling_own.M"}, None),
        ("config.json", [3, {"x": 1}], None),
    ],
)
def test_code_that_auto_map_names_and_the_donor_lacks(save, file, classes, missing):
    donor = save("a", tensors()).directory
    put(donor, "configuration_own.py", "")
    path = donor / file
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stored, "auto_map": classes}))
    notes = []
    merge(soup("a"), "out", log=notes.append)
    told = [note for note in notes if "auto_map" in note]
    assert len(told) == (missing is not None)
    assert missing is None or f"{file} names code in {missing} (auto_map)" in told[0]
