"""A whole run: the loss curve is HF Trainer's, a killed run continues bit for bit, mistakes are one line."""

import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import bmjax
from bmjax.branch import train as module
from bmjax.branch.loader import Loader
from bmjax.branch.settings import TrainSettings
from bmjax.branch.train import train
from bmjax.config import UserError
from bmjax.io.safetensors import open_checkpoint
from tests.conftest import sums, write_rows, write_student


def settings(student: Path, data: Path, output: Path, **changes) -> TrainSettings:
    values = {
        "student": str(student), "data": str(data), "output": str(output), "steps": 6, "seq_len": 128, "batch": 4,
        "accumulate": 2, "packing": False,
        "learning_rate": 3e-3, "schedule": "cosine", "warmup": 0.1, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0,
        "shuffle": False, "compute_dtype": "float32", "remat": "none", "mesh": {}, "save_every": 2, "keep": 5,
    }  # fmt: skip
    return TrainSettings.read(values | changes)


def run(*arguments, log=lambda line: None, **changes):
    return train(settings(*arguments, **changes), log)


def curve(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in curve(output)]


def weights(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def tokenized(student: Path, rows) -> list[dict[str, list[int]]]:
    """input_ids and labels by transformers alone: the whole conversation at once, the prompt masked by its length."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(student)
    documents = []
    for row in rows:
        think = f"<think>\n{row['reasoning']}\n</think>\n" if "reasoning" in row else ""
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": think + row["response"]}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n"))["input_ids"]
        text = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        prompt = len(tokenizer(text)["input_ids"])
        documents.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return documents


def collate(documents) -> dict[str, torch.Tensor]:
    def pad(key, fill):
        rows = [torch.tensor(document[key]) for document in documents]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(d["input_ids"])) for d in documents], batch_first=True)
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask.long()}


def reference_model(student: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def fifty(student, train_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("fifty") / "run"
    return output, run(student, train_file, output, steps=50, save_every=1000)


def test_loss_curve_of_50_steps_is_hf_trainers(student, fifty, tmp_path):
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=50,
        learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=5, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    model = reference_model(student)
    trainer = InOrder(model=model, args=arguments, train_dataset=tokenized(student, sums(20)), data_collator=collate)
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    ours = curve(fifty[0])
    assert len(theirs) == len(ours) == 50
    for want, got in zip(theirs, ours, strict=True):
        assert abs(got["loss"] - want["loss"]) <= 1e-3, got["step"]
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-2)
        assert got["learning_rate"] == pytest.approx(want["learning_rate"], rel=1e-6, abs=1e-12)
    assert ours[0]["loss"] - ours[-1]["loss"] > 1.0  # the curve goes somewhere
    after = weights(fifty[0] / "hf")
    for key, value in model.state_dict().items():
        np.testing.assert_allclose(after[key], value.numpy(), atol=2e-3, err_msg=key)


def test_loss_curve_of_packed_rows_is_torchs_of_documents(student, train_file, tmp_path):
    packed = {"packing": True, "shuffle": True, "batch": 4, "accumulate": 2, "steps": 100, "seed": 5}
    run(student, train_file, tmp_path / "run", save_every=1000, **packed)
    documents = tokenized(student, sums(20))
    model = reference_model(student)
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    groups = [
        {"params": [p for key, p in model.named_parameters() if (key in decayed) == kind], "weight_decay": decay}
        for kind, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 10, 100)
    recorded = []
    original = Loader.at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "at", lambda self, *which: recorded.append(self) or original(self, *which))
        run(student, train_file, tmp_path / "again", save_every=1000, **packed)
    loader = recorded[0]
    assert len(loader.rows) < 20 and max(len(row) for row in loader.rows) > 1
    for step, got in enumerate(losses(tmp_path / "run")):
        batch = collate([documents[document] for row in loader.rows_of(step) for document in loader.rows[row]])
        loss = model(**batch).loss
        assert abs(got - float(loss.detach())) <= 1e-3, step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_move_is_the_distance_between_the_two_directories(student, fifty):
    before, after = weights(student), weights(fifty[0] / "hf")
    assert before.keys() == after.keys()
    squared = lambda arrays: sum(float(np.sum(np.square(a.astype(np.float64)))) for a in arrays)  # noqa: E731
    move = math.sqrt(squared(after[k].astype(np.float64) - before[k] for k in before) / squared(before.values()))
    assert fifty[1]["move"] == pytest.approx(move, rel=1e-4)
    assert curve(fifty[0])[-1]["move"] == fifty[1]["move"]


def test_a_finished_run_returns_its_summary_at_once(student, train_file, fifty, monkeypatch):
    output, result = fifty
    assert result["steps"] == 50 and result["hf"] == str(output / "hf") and result["loss"] == losses(output)[-1]
    assert result["tokens"] == 10 * sum(len(d["input_ids"]) for d in tokenized(student, sums(20)))
    assert [line["epoch"] for line in curve(output)][4::5] == list(range(1, 11))
    monkeypatch.setattr(module.hf, "load_params", lambda *a, **k: pytest.fail("the model was loaded again"))
    lines: list[str] = []
    assert run(student, train_file, output, log=lines.append, steps=50, save_every=1000) == result
    assert lines == [f"{output}: already trained, 50 steps"]
    with pytest.raises(UserError, match=r"another run: learning_rate: it had 0.003, now 0.001"):
        run(student, train_file, output, steps=50, save_every=1000, learning_rate=1e-3)


def test_frozen_parameters_keep_their_bytes(train_file, tmp_path):
    student = write_student(tmp_path / "student", dtype="bfloat16", tie_word_embeddings=True)
    freeze = ["embed/*", "layers/attention/*"]
    result = run(student, train_file, tmp_path / "run", steps=2, freeze=freeze, warmup=0)

    def raw(directory):
        data = (directory / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        return {k: (v["dtype"], data[8 + size :][slice(*v["data_offsets"])]) for k, v in header.items()}

    before, after = raw(student), raw(Path(result["hf"]))
    assert before.keys() == after.keys()
    for key in before:
        assert after[key][0] == "BF16"
        frozen = "embed" in key or "self_attn" in key
        # Two steps are less than half a bf16 unit for a norm's scale of 1, more than one for matrices.
        if frozen or "proj" in key:
            assert (after[key] == before[key]) == frozen, key


def test_importances_are_mean_squared_gradients(student, train_file, tmp_path):
    """Over two steps at a rate of 0, where it is the same weights' gradients: transformers' and torch's."""
    output, freeze = tmp_path / "run", ["final_norm/*"]
    plain = {"steps": 2, "learning_rate": 0.0, "clip": 0.0, "freeze": freeze}
    run(student, train_file, output, **plain)
    assert not (output / "importances").exists()
    run(student, train_file, output, importances=True, **plain)  # a finished run only adds them
    model, squares = reference_model(student), []
    documents = tokenized(student, sums(8))
    for step in range(2):
        batch = collate(documents[4 * step : 4 * step + 4])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        squares.append({name: p.grad.numpy() ** 2 for name, p in model.named_parameters()})
    for name, importance in weights(output / "importances").items():
        mean = (0.95 * 0.05 * squares[0][name] + 0.05 * squares[1][name]) / (1 - 0.95**2)
        expected = 0.0 if name == "model.norm.weight" else mean
        np.testing.assert_allclose(importance, expected, rtol=1e-2, atol=1e-4 * np.max(mean), err_msg=name)


def test_bf16_compute_is_near_float32(student, train_file, fifty, tmp_path):
    run(student, train_file, tmp_path / "run", steps=50, compute_dtype="bfloat16", save_every=1000)
    ours, theirs = losses(tmp_path / "run"), losses(fifty[0])
    assert ours != theirs
    np.testing.assert_allclose(ours, theirs, rtol=0.03)


class Killed(Exception):
    """Stands for a kill: nothing below the run handles it."""


def bomb(step: int):
    """A log that raises at the line of `step`."""

    def log(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise Killed

    return log


@pytest.fixture(scope="module")
def undisturbed(student, train_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, run(student, train_file, output, shuffle=True)


def same_run(undisturbed, output, result):
    want, wanted = undisturbed
    assert {k: v for k, v in result.items() if k != "hf"} == {k: v for k, v in wanted.items() if k != "hf"}
    assert [line["step"] for line in curve(output)] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "move", "learning_rate", "tokens", "epoch"):
        assert [line[key] for line in curve(output)] == [line[key] for line in curve(want)], key
    assert (output / "hf" / "model.safetensors").read_bytes() == (want / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step, resumed", [(1, None), (3, 2), (5, 4)])
def test_a_killed_run_continues_bit_for_bit(student, train_file, undisturbed, tmp_path, step, resumed):
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(student, train_file, output, shuffle=True, log=bomb(step))
    assert not (output / "hf").exists() and not (output / "result.json").exists()
    wait_for_reading_threads_to_end()
    lines: list[str] = []
    result = run(student, train_file, output, shuffle=True, log=lines.append)
    assert [line for line in lines if "resuming" in line] == ([f"resuming at step {resumed}"] if resumed else [])
    same_run(undisturbed, output, result)


def test_a_run_killed_before_its_export_only_exports(student, train_file, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module.hf, "save_hf", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(student, train_file, output, shuffle=True)
    lines: list[str] = []
    result = run(student, train_file, output, shuffle=True, log=lines.append)
    assert lines[4:-1] == ["resuming at step 6"] and lines[-1].startswith(f"{output / 'hf'}: written")
    same_run(undisturbed, output, result)


def test_a_killed_run_may_continue_on_another_mesh(student, train_file, undisturbed, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(student, train_file, output, shuffle=True, log=bomb(3))
    result = run(student, train_file, output, shuffle=True, mesh={"fsdp": 2, "tensor": 2})
    assert result["loss"] == pytest.approx(undisturbed[1]["loss"], abs=1e-5)
    np.testing.assert_allclose(losses(output), losses(undisturbed[0]), atol=1e-5)


def test_a_run_may_go_on_with_bfloat16_moments(student, train_file, undisturbed, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(student, train_file, output, shuffle=True, log=bomb(3))
    changes = {"moments_dtype": "bfloat16", "accumulate": 1, "mesh": {"fsdp": 2}, "remat": "full"}
    run(student, train_file, output, shuffle=True, **changes)
    np.testing.assert_allclose(losses(output), losses(undisturbed[0]), atol=2e-3)
    assert losses(output) != losses(undisturbed[0])


def wait_for_reading_threads_to_end() -> None:
    until = time.monotonic() + 20
    while any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_sigterm_saves_and_the_run_goes_on_from_there(student, train_file, undisturbed, tmp_path):
    output, lines = tmp_path / "run", []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        run(student, train_file, output, shuffle=True, log=log, save_every=100)
    assert end.value.code == 0 and lines[-1] == "SIGTERM: saved after step 3 of 6; the same command goes on from there"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    wait_for_reading_threads_to_end()
    lines.clear()
    result = run(student, train_file, output, shuffle=True, log=lines.append, save_every=100)
    assert "resuming at step 3" in lines
    same_run(undisturbed, output, result)


def test_profile_and_the_memory_a_step_takes(student, train_file, tmp_path):
    lines: list[str] = []
    run(student, train_file, tmp_path / "run", profile_steps=[2, 3], steps=4, log=lines.append)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    waited = next(line for line in lines if line.startswith("waited for data: "))
    assert 0 <= float(re.findall(r"[\d.]+", waited)[0]) < 100
    said = next(line for line in lines if line.startswith("a step takes"))
    total, parameters, optimizer_state = (float(x) * 2**20 for x in re.findall(r"(\d+\.\d+) MiB", said)[:3])
    held = 4 * sum(a.size for a in weights(student).values())
    # Parameters, and the start that the move is measured from; two moments.
    assert parameters == pytest.approx(2 * held, rel=0.05) and optimizer_state == pytest.approx(2 * held, rel=0.05)
    assert total > parameters + optimizer_state + held


def test_another_runs_checkpoint_is_refused_by_its_key(student, train_file, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(student, train_file, output, log=bomb(3))
    other_data = write_rows(tmp_path / "other.jsonl", sums(20, seed=1))
    other_student = write_student(tmp_path / "other", seed=1)
    for key, arguments, changes in [
        ("learning_rate: it had 0.003, now 0.001", (student, train_file), {"learning_rate": 1e-3}),
        ("steps: it had 6, now 7", (student, train_file), {"steps": 7}),
        ("data: its contents differ", (student, other_data), {}),
        ("student: its contents differ", (other_student, train_file), {}),
    ]:
        with pytest.raises(UserError, match=f"another run: {key}.*; use another output") as error:
            run(*arguments, output, **changes)
        assert "\n" not in str(error.value)
    # What changes nothing but rounding may change.
    assert run(student, train_file, output, save_every=3, keep=2, log_every=3)["steps"] == 6


def test_nan_loss_stops_the_run_and_keeps_checkpoints(student, train_file, tmp_path, capsys):
    output = tmp_path / "run"
    blown = {"learning_rate": 1e38, "schedule": "constant", "warmup": 0, "clip": 0.0, "save_every": 1}
    with pytest.raises(
        UserError, match=r"^step 2: the (loss|grad_norm) is (nan|inf); stopped, the checkpoints before"
    ) as error:
        run(student, train_file, output, **blown)
    assert "\n" not in str(error.value)
    assert (output / "checkpoints" / "1").is_dir() and not (output / "checkpoints" / "2").exists()
    assert not (output / "hf").exists() and not (output / "result.json").exists()
    bmjax.convert(output / "checkpoints" / "1", tmp_path / "good", to="hf")  # the last good weights
    model = open_checkpoint(tmp_path / "good")
    assert all(np.isfinite(model.read(name).astype(np.float32)).all() for name in model.tensors)


@pytest.mark.parametrize("changes, problem", [
    ({"seq_len": 512}, "seq_len: 512 is more than the student's context of 256"),
    ({"mesh": {"fsdp": 8}}, "batch: 4 rows / accumulate 2 = 2 a microbatch, not a multiple of mesh data x fsdp = 8"),
    ({"mesh": {"fsdp": 16}}, "mesh: sizes .* need 16 devices, there are 8"),
    ({"packing": True, "seq_len": 127, "mesh": {"context": 2}}, "seq_len: 127 is not a multiple of mesh context = 2"),
    ({"moments_dtype": "bfloat16", "beta2": 0.999}, "beta2 0.999: bfloat16 moments lose"),
    ({"profile_steps": [3, 2]}, r"profile_steps \[3, 2\]: expected \[first, last\]"),
    ({"freeze": ["embedding"]}, "freeze: 'embedding' matches no parameter"),
    ({"template": "alpaka"}, "template: 'alpaka' is not one of alpaca, chatml, deepseek-r1"),
    ({"overlong": "error", "seq_len": 32}, "row 1: \\d+ tokens, seq_len is 32"),
])  # fmt: skip
def test_mistakes_are_one_line_and_leave_no_model(student, train_file, tmp_path, changes, problem):
    with pytest.raises(UserError, match=problem) as error:
        run(student, train_file, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "hf").exists()


def test_missing_inputs_are_named(student, train_file, tmp_path):
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean .*train.jsonl\?"):
        run(student, train_file.with_name("trian.jsonl"), tmp_path / "run")
    with pytest.raises(UserError, match=r"studnet'?: no such model directory; did you mean .*student'\?"):
        run(student.with_name("studnet"), train_file, tmp_path / "run")


def test_a_student_without_a_tokenizer_is_named(student, train_file, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((student / name).read_bytes())
    with pytest.raises(UserError, match=r"bare: no tokenizer files \(tokenizer.json or vocab.json\)"):
        run(bare, train_file, tmp_path / "run")


def test_a_tokenizer_larger_than_the_model_is_refused(train_file, tmp_path):
    small = write_student(tmp_path / "small", vocab_size=270)
    with pytest.raises(UserError, match=r"token id \d+, the model's vocabulary has 270"):
        run(small, train_file, tmp_path / "run")


def test_the_trained_template_goes_with_the_model(student, train_file, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
    )
    result = run(student, train_file, tmp_path / "run", steps=1, template=str(file))
    exported = transformers.PreTrainedTokenizerFast.from_pretrained(result["hf"])
    assert exported.chat_template == file.read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(result["hf"]).config.vocab_size == 300


def test_the_templates_end_of_turn_is_exported(train_file, tmp_path):
    base = write_student(tmp_path / "base", eos_token_id=0)
    values = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "<|endoftext|>"}))
    run(base, train_file, tmp_path / "out", template="chatml", steps=1)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / "hf" / name).read_text())["eos_token_id"] == [0, 2]
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert network.generation_config.eos_token_id == [0, 2]
