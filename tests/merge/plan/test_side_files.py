"""Side files: every small file beside the weights comes along, but for what is named as left out."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from bmjax.calibrate.dispatch import merge
from bmjax.merge.plan import side_files
from tests.merge.plan_helpers import soup, tensors

SMALL = [
    "video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "spiece.model", "qwen.tiktoken", "LICENSE", "configuration_other.py", "modeling_other.py", "custom.yaml",
    "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json", "audio/mel/filters.json",
    "additional_chat_templates/tools.jinja", "tekken.json", "2_Normalize/README.md", "code/kernels/fast.py",
]  # fmt: skip
LEFT_OUT = [
    "pytorch_model.bin", "model.gguf", "onnx/config.json", "original/params.json", "trainer_state.json", "latest",
    "training_args.bin", "optimizer.pt", "rng_state_0.pth", "checkpoint-10/trainer_state.json", "runs/events",
    "README.md", "global_step7/mp_rank.json", "zero_to_fp32.py", "mergekit_config.yml", ".gitattributes",
    ".cache/x.json", "rows.jsonl", "__pycache__/modeling_other.pyc", "modeling_old.pyc", "tensorboard/scalars.json",
    "events.out.tfevents.1.host", "data/rows.parquet", "code/__pycache__/fast.pyc", "code/kernels/fast.pyc",
    "eval/rows/a.csv", "eval/all_results.json", "code/runs/x.json", "code/checkpoint-3/x.json", "code/host.tfevents.2",
]  # fmt: skip


def content(name):
    return json.dumps({"text": f"the donor's {name}"}) if name.endswith(".json") else f"the donor's {name}"


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content(name))


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_small_files_come_along_and_weights_and_state_do_not(save, tmp_path):
    donor, other = save("a", tensors()).directory, save("b", tensors(seed=1)).directory
    put(donor, *SMALL, *LEFT_OUT)
    put(other, "only_here.json")
    merge(soup("a", "b"), "out")
    written = files(tmp_path / "out")
    assert written >= {*SMALL, "config.json"} and not written & {*LEFT_OUT, "only_here.json"} - {"README.md"}
    for name in SMALL:
        assert (tmp_path / "out" / name).read_text() == content(name)
    assert "the donor's" not in (tmp_path / "out/README.md").read_text()


def test_links_of_a_cache_are_files_and_links_to_folders_are_not_followed(save, tmp_path):
    donor = save("a", tensors()).directory
    put(tmp_path / "blobs", "4f2a.json", "inside/x.json")
    os.symlink("../blobs/4f2a.json", donor / "processor_config.json")
    os.symlink("../blobs/inside", donor / "inside")
    os.symlink("nowhere", donor / "dangling.json")
    os.mkdir(donor / "loop")
    os.symlink("..", donor / "loop/up")
    merge(soup("a"), "out")
    assert not (tmp_path / "out/processor_config.json").is_symlink()
    assert (tmp_path / "out/processor_config.json").read_text() == content("4f2a.json")
    assert not {name for name in files(tmp_path / "out") if "inside" in name or "loop" in name or "dangling" in name}


def test_a_module_with_weights_is_copied_and_another_model_is_not(save, tmp_path):
    donor = save("a", tensors()).directory
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../b"}, {"path": "/etc"}, {}]
    (donor / "modules.json").write_text(json.dumps(modules))
    put(donor, "1_Pooling/config.json", "2_Dense/config.json", "draft/config.json")
    for folder in ("2_Dense", "draft"):
        save_file({"linear.weight": np.ones(3, np.float32)}, donor / folder / "model.safetensors")
    notes = []
    merge(soup("a"), "out", log=notes.append)
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == (
        donor / "2_Dense/model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "out/draft").exists()
    assert any("2_Dense/model.safetensors: weights of a module" in note for note in notes)
    assert any("not copied" in note and "draft/" in note for note in notes)


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_FILES"])
def test_what_is_too_large_is_said(save, tmp_path, monkeypatch, limit):
    donor = save("a", tensors()).directory
    (donor / "config.json").write_text("{}")
    put(donor, "big.json", "many/big.json", "many/deep/big.json")
    monkeypatch.setattr(side_files, limit, {"MAX_BYTES": 10, "MAX_FILES": 1}[limit])
    notes = []
    merge(soup("a"), "out", log=notes.append)
    left = {"MAX_BYTES": ["big.json", "many/big.json", "many/deep/big.json"], "MAX_FILES": ["many/"]}[limit]
    assert any("not copied" in note and note.endswith(": " + ", ".join(left)) for note in notes)
    assert not any((tmp_path / "out" / name).exists() for name in left)


def test_a_module_keeps_its_weights_and_leaves_a_trainers_state(save, tmp_path):
    donor = save("a", tensors()).directory
    (donor / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    put(donor, "2_Dense/pytorch_model.bin", "2_Dense/optimizer.pt", "2_Dense/rows.csv", "2_Dense/config.json")
    merge(soup("a"), "out")
    assert {name for name in files(tmp_path / "out") if "2_Dense" in name} == {
        "2_Dense/pytorch_model.bin", "2_Dense/config.json",
    }  # fmt: skip


def test_another_models_tokenizer_replaces_every_file_of_the_donors(save, tmp_path):
    from tokenizers import Tokenizer, models

    for name in "ab":
        folder = save(name, tensors(vocabulary=6)).directory
        Tokenizer(models.WordLevel({f"{name}{i}": i for i in range(6)}, unk_token=f"{name}0")).save(
            str(folder / "tokenizer.json")
        )
    old = {"spiece.model", "tokenizer_old.py", "tokenization_old.py", "tekken.json", "source.spm", "bpe.codes",
           "vocab-src.json"}  # fmt: skip
    put(tmp_path / "a", "processor_config.json", *old)
    put(tmp_path / "b", "other.tiktoken", "tokenization_new.py")
    merge(soup("a", "b", tokenizer_source="b"), "out")
    written = files(tmp_path / "out")
    assert {"other.tiktoken", "tokenization_new.py", "processor_config.json"} <= written and not old & written


@pytest.mark.parametrize("source", [{}, {"tokenizer_source": "a"}])
def test_files_that_begin_with_a_byte_order_mark(save, tmp_path, source):
    """As some editors on Windows save them: they are read, and written so that loaders read them."""
    from tokenizers import Tokenizer, models

    donor = save("a", tensors(vocabulary=6), torch_dtype="float32", vocab_size=6).directory
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(6)}, unk_token="t0")).save(str(donor / "tokenizer.json"))
    save("b", tensors(vocabulary=6, seed=1), torch_dtype="float32", vocab_size=6)
    (donor / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    (donor / "preprocessor_config.json").write_text("{}")
    marked = ["config.json", "tokenizer_config.json", "preprocessor_config.json"]
    for name in marked:
        (donor / name).write_bytes(b"\xef\xbb\xbf" + (donor / name).read_bytes())
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + json.dumps(soup("a", "b") | source).encode())
    merge(tmp_path / "recipe.yaml", "out")
    for name in marked:
        assert json.loads((tmp_path / "out" / name).read_text("utf-8")) == json.loads(
            (donor / name).read_text("utf-8-sig")
        )
