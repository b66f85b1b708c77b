"""A plan says what the compiled step says; its messages say what to change. TPU plans need libtpu."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from bmjax.branch import prepare
from bmjax.branch.choose import without_data
from bmjax.branch.export import open_student
from bmjax.branch.settings import TrainSettings
from bmjax.branch.step import init_state, make_step
from bmjax.cli import main as cli
from bmjax.config import UserError
from bmjax.model import qwen2, spec
from bmjax.model.batch import Batch
from bmjax.model.config import known
from bmjax.parallel.chips import CHIPS, Chip, topology_devices
from bmjax.parallel.mesh import sharding
from bmjax.plan import plan
from bmjax.plan.hlo import Program
from bmjax.weights import student as students
from tests.model.reference import build

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CPU = Chip(hbm_gib=1.0, flops=1e11, hbm_bandwidth=1e10, link_bandwidth=1e9, slice_bandwidth=1e8, price=0.0)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def settings(**changes):
    values = {
        "student": "x", "data": "x", "output": "x", "seq_len": 64, "batch": 8, "steps": 1, "compute_dtype": "float32",
        "mesh": {"fsdp": 4, "tensor": 2},
    }  # fmt: skip
    return without_data(TrainSettings.model_validate(values | changes), "a plan")


def test_steps_of_a_plan_are_those_of_the_training(student, train_file, monkeypatch):
    one_step = settings(student=str(student), data=str(train_file), seq_len=128)
    steps, line = plan.steps_and_data(one_step)
    assert steps == 1 and "documents" in line and "rows of 128 (" in line and "% filled)" in line
    epochs = one_step.model_copy(update={"steps": None, "epochs": 2.5, "batch": 2})
    loader = prepare.load_data(epochs, open_student(epochs))
    steps, _ = plan.steps_and_data(epochs)
    assert steps == math.ceil(2.5 * math.ceil(len(loader.rows) / 2))
    monkeypatch.setenv("HOME", str(train_file.parent))
    assert plan.steps_and_data(epochs.model_copy(update={"data": f"~/{train_file.name}"}))[0] == steps
    for absent in ({"data": "not/here.jsonl"}, {"student": "not/here"}):
        assert plan.steps_and_data(epochs.model_copy(update=absent)) == (None, None)
        assert plan.steps_and_data(one_step.model_copy(update=absent)) == (1, None)


def test_steps_of_a_plan_open_the_tokenizer_once(student, train_file, monkeypatch):
    opened, load = [], students.load_tokenizer
    monkeypatch.setattr(students, "load_tokenizer", lambda directory: opened.append(directory) or load(directory))
    chosen = settings(student=str(student), data=str(train_file), seq_len=128, steps=None, epochs=1)
    assert plan.steps_and_data(chosen)[0] and len(opened) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"accumulate": 2, "mesh": {"fsdp": 2, "context": 2, "tensor": 2}, "remat": "none"}, marks=pytest.mark.slow
        ),
    ],
)
def test_memory_is_the_programs_own(changes):
    """What a real training state takes, and what the compiled step reports, on eight CPU devices."""
    _, config, _ = build("gqa_untied")
    pod_plan = plan.plan(settings(**changes), config, "cpu:8", CPU, jax.devices())
    mesh = prepare.check(settings(**changes), config)
    step_plan = dataclasses.replace(prepare.step_plan(settings(**changes), config, mesh), unroll=1)
    with jax.set_mesh(mesh):
        state = init_state(step_plan, qwen2.init(config, 0, mesh))
        here = jax.devices()[0]
        held = {
            kind: sum(
                s.data.nbytes
                for leaf in jax.tree.leaves(state[kind])
                for s in leaf.addressable_shards
                if s.device == here
            )
            for kind in ("params", "moments", "start")
        }
        batch = Batch(*(np.zeros((8, 64), dtype) for dtype in (np.int32, np.int32, np.uint8)))
        batch = jax.device_put(batch, sharding(mesh, ("batch", "length"), (8, 64)))
        memory = make_step(step_plan).lower(state, batch, np.float32(0)).compile().memory_analysis()
    parts = pod_plan["gib_per_chip"]
    assert parts["parameters"] * 2**30 == pytest.approx(held["params"] + held["start"], rel=0.05, abs=2**20)
    assert parts["optimizer"] * 2**30 == pytest.approx(held["moments"], rel=0.05, abs=2**20)
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    assert parts["total"] * 2**30 == pytest.approx(total, rel=0.05, abs=2**20)
    assert pod_plan["fits"] and pod_plan["chips"] == 8
    assert sum(parts[kind] for kind in plan.KINDS) == pytest.approx(parts["total"], abs=0.01)


def test_arithmetic_and_collectives():
    _, config, _ = build("gqa_untied")
    pod_plan = plan.plan(settings(), config, "cpu:8", CPU, jax.devices())
    sizes = {row.name: int(np.prod(row.shape)) for row in spec.table(config) if row.is_matrix}
    layers = sum(size for name, size in sizes.items() if name.startswith("layers/"))
    # 6 a parameter and token, 2 more where layers are recomputed, but for the last matrix; nine products of attention.
    products = 8 * layers - 2 * sizes["layers/mlp/down/kernel"] + 6 * sizes["lm_head/kernel"]
    attention = 9 * 2 * 64 * config.num_layers * config.num_heads * config.head_dim
    assert pod_plan["flops_per_step"] == pytest.approx(8 * 64 * (products + attention), rel=0.02)
    assert {"fsdp", "tensor"} <= set(pod_plan["collective_bytes"])
    assert pod_plan["tokens_per_second_bound"] == pytest.approx(8 * 64 / pod_plan["step_seconds_bound"])
    assert pod_plan["bound_by"] in ("arithmetic", "memory", "communication")


@pytest.mark.slow
def test_what_does_not_fit_says_what_to_change():
    _, config, _ = build("gqa_untied")
    small = dataclasses.replace(CPU, hbm_gib=1e-4)
    for changes, advice in [
        ({"mesh": {"data": 2, "fsdp": 4}}, "mesh: data 2"), ({"remat": "none"}, "remat: full"),
        ({"batch": 64, "seq_len": 128, "track_move": False}, "accumulate: 2"),
        ({"track_move": True}, "track_move: false"),
        ({"track_move": False}, "the number of chips"),
    ]:  # fmt: skip
        pod_plan = plan.plan(settings(**changes), config, "cpu:8", small, jax.devices())
        assert not pod_plan["fits"] and pod_plan["change"].startswith(advice), (changes, pod_plan["change"])
        assert any("DOES NOT FIT" in line for line in plan.lines(pod_plan, settings(**changes)))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--topology", "v5q:4x4x4"], "unknown chip 'v5q', did you mean 'v5e'|unknown chip 'v5q'"),
    (["--topology", "64"], "'64' is not like v5p:4x4x4"),
    ([], "--topology is missing"),
    (["--topology", "v5p:4x4x4", "--serach"], "unknown option '--serach'"),
])  # fmt: skip
def test_wrong_arguments(arguments, message, tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text("{student: Qwen/Qwen2.5-0.5B, data: x, output: y}")
    assert cli.main(["plan", str(config), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_plan_refuses_what_the_training_refuses():
    config, chosen = build("gqa_untied")[1], settings(attention="splash")
    with pytest.raises(UserError, match="attention: splash runs on TPUs") as planned:
        plan.plan(chosen, config, "cpu:8", CPU, jax.devices())
    with pytest.raises(UserError) as trained:
        prepare.check(chosen, config)
    assert str(planned.value) == str(trained.value)


def test_chips_left_over_are_an_error():
    _, config, _ = build("gqa_untied")
    with pytest.raises(UserError, match="uses 2 of 8 devices"):
        plan.plan(settings(mesh={"fsdp": 2}), config, "cpu:8", CPU, jax.devices())


@pytest.mark.parametrize(("name", "billions"), [
    ("Qwen/Qwen2.5-0.5B", 0.494), ("Qwen/Qwen2.5-1.5B-Instruct", 1.544), ("Qwen/Qwen2.5-3B", 3.086),
    ("Qwen/Qwen2.5-7B", 7.616), ("Qwen/Qwen2.5-14B", 14.77), ("Qwen/Qwen2.5-72B", 72.71),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", 32.76), ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.777),
])  # fmt: skip
def test_published_students_have_their_published_size(name, billions):
    """Parameters as their model cards count them."""
    assert spec.count(known(name)) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_other_names_are_not_guessed():
    assert known("Qwen/Qwen3-32B") is None and known("deepseek-ai/DeepSeek-R1-Distill-Qwen-3B") is None


@needs_libtpu
@pytest.mark.slow
def test_a_small_slice(capsys, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("{student: Qwen/Qwen2.5-0.5B, data: x, output: y, seq_len: 2048, batch: 4, mesh: {fsdp: -1}}")
    assert cli.main(["plan", str(config), "--topology", "v5e:2x2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] and printed["chips"] == 4 and printed["hbm_gib"] == CHIPS["v5e"].hbm_gib
    assert set(printed["gib_per_chip"]) == {"parameters", "optimizer", "gradients", "temporaries", "total"}


@needs_libtpu
@pytest.mark.slow
def test_two_slices_send_each_other_gradients_once():
    """Between slices goes a chip's share of the gradients there and back, not the weights of every layer."""
    config = plan.student_config("Qwen/Qwen2.5-0.5B")
    chosen = settings(seq_len=512, mesh={"data": 2, "fsdp": -1}, compute_dtype="bfloat16")
    pod_plan = plan.plan(chosen, config, "2xv5e:2x2", *topology_devices("2xv5e:2x2"))
    assert pod_plan["fits"] and pod_plan["chips"] == 8
    between = pod_plan["collective_bytes"]["slices"]
    gradients = 4 * spec.count(config) / 4  # float32, a slice has four chips; half of them goes there, half back
    tied = config.vocab_size * config.hidden_size  # summed twice: as the head, and as the table of the lookup
    assert gradients <= between <= gradients + 1.5 * tied, (between, gradients)
    assert not any("data" in axes for axes in pod_plan["collective_bytes"])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "seq_len"), [("v5p:4x4x4", 16_384), ("v6e:16x16", 32_768)])
def test_the_32b_step(topology, seq_len, capfd):
    """The paper's mathematics branch as its config stands: fits, and the compiled program moves what it should."""
    chosen = without_data(TrainSettings.read(CONFIGS / "tinyr1_32b_math.yaml", [f"seq_len={seq_len}"]), "a plan")
    config = plan.student_config(chosen.student)
    chip, devices = topology_devices(topology)
    step_plan, _, lowered = plan.lower_step(chosen, config, devices)
    compiled = lowered.compile()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes <= chip.hbm_gib * 2**30
    text = compiled.as_text()
    assert "splash" in text
    weights = {tuple(sorted(row.shape[-2:])) for row in spec.table(config) if row.is_matrix}
    tensor = step_plan.mesh.shape["tensor"]
    for collective in Program(text).collectives(step_plan.mesh):
        # The head alone, never logits: one side of the vocabulary's size, the other of the width or a part of it.
        if config.vocab_size // tensor in collective.shape or config.vocab_size in collective.shape:
            assert set(collective.shape) <= {
                1,
                config.vocab_size // tensor,
                config.vocab_size,
                config.hidden_size,
                config.hidden_size // step_plan.mesh.shape["fsdp"],
            }, collective
        if collective.kind == "all-gather" and collective.dtype == "f32":
            assert tuple(sorted(collective.shape[-2:])) not in weights and collective.nbytes < 2**22, collective


@needs_libtpu
@pytest.mark.slow
def test_weak_scaling():
    """From 16 to 256 chips with as many more rows: a chip computes the same, and sends little more."""
    plans = []
    for topology, chips in (("v5p:2x2x4", 16), ("v5p:4x8x8", 256)):
        mesh = {"data": -1, "fsdp": 16}
        chosen = settings(
            student="Qwen/Qwen2.5-7B", batch=chips, seq_len=4096, compute_dtype="bfloat16", mesh=mesh, remat="full"
        )
        plans.append(plan.plan(chosen, known(chosen.student), topology, *topology_devices(topology)))
    small, large = (pod_plan["flops_per_step"] / pod_plan["chips"] for pod_plan in plans)
    assert large == pytest.approx(small, rel=0.02)
    sent = [sum(pod_plan["collective_bytes"].values()) for pod_plan in plans]
    assert sent[1] / sent[0] < 1.1


def test_the_memory_of_students_in_the_docs_is_that_of_their_parameters():
    page = Path(__file__).resolve().parents[2] / "docs" / "gpus.md"
    table = page.read_text(encoding="utf-8").split("<!-- memory of students", 1)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[3:]]
    assert len(rows) == 4
    for name, parameters, state, *_ in rows:
        count = spec.count(known(f"Qwen/{name}"))
        assert parameters == f"{count / 1e9:.2f} B"
        assert state == ", ".join(f"{count * size / 2**30:.1f}" for size in (20, 16, 12))
