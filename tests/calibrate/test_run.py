"""Merges by data: Gram matrices, squares and gradients against NumPy and torch, the guard, what a user gets wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import bmjax
from bmjax.branch.loader import Loader
from bmjax.calibrate import contributions, data, learn, run
from bmjax.calibrate.settings import CalibratedRecipe, is_calibrated
from bmjax.config import UserError
from bmjax.merge.__main__ import main
from bmjax.model import spec
from bmjax.model.spec import Qwen2Config, get
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf
from tests.conftest import sums, write_rows, write_student

SMALL = {"rows": 4, "held_out": 4, "seq_len": 128, "steps": 3, "remat": "none", "mesh": {}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, two branches near it, and a file of rows for each."""
    folder = tmp_path_factory.mktemp("calibrated")
    base = write_student(folder / "base")
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    for seed, name in enumerate(("a", "b"), 1):
        rng = np.random.default_rng(seed)
        branch = write_student(folder / name)
        moved = {key: value if "embed" in key else value + rng.normal(0, 0.02, value.shape).astype(np.float32)
                 for key, value in tensors.items()}  # fmt: skip
        safetensors.numpy.save_file(moved, branch / "model.safetensors", {"format": "pt"})
        write_rows(folder / f"{name}.jsonl", sums(40, seed))
    return folder


def recipe(folder, method="learned", **parameters):
    return {
        "merge_method": method,
        "base_model": "base",
        "sources": {name: str(folder / name) for name in ("base", "a", "b")},
        "models": [{"model": name, "data": str(folder / f"{name}.jsonl")} for name in ("a", "b")],
        "parameters": SMALL | parameters,
    }


def tensors(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def batches(folder, name, count=4):
    """(calibration, that domain's batches) as the merge reads them."""
    checked = CalibratedRecipe.read(recipe(folder))
    base, mesh = folder / "base", make_mesh({})
    own = data.read(checked, hf.load_tokenizer(base), 300, base, mesh)
    return own, [tuple(np.asarray(a) for a in batch) for batch in own.rows("ab".index(name), count, "grams")]


def documents(batch):
    """Every packed document by itself, with its mask."""
    for tokens, segments, mask in zip(*batch, strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment], mask[segments == segment]


def inputs(directory, batch):
    """Inputs of every linear layer by torch, document by document: {module name: [tokens, in]}."""
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0][0].detach()))
    for tokens, _ in documents(batch):
        network(torch.tensor(tokens[None]).long())
    return {name: torch.cat(own).double().numpy() for name, own in seen.items()}


def regmean(changes, grams, off_diagonal, ridge):
    """The closed form of arXiv 2212.09849 for matrices [out, in], float64."""
    scaled = [off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    total = sum(scaled) + ridge * np.trace(sum(scaled)) / len(scaled[0]) * np.eye(len(scaled[0]))
    return (np.linalg.inv(total) @ sum(g @ c.T for g, c in zip(scaled, changes, strict=True))).T


def test_regmean_is_the_closed_form_over_torchs_activations(models, tmp_path):
    report = run.merge(recipe(models, "regmean", ridge=0.01, steps=0), tmp_path / "out")
    base, found = tensors(models / "base"), tensors(tmp_path / "out")
    branches = {name: tensors(models / name) for name in ("a", "b")}
    read = {name: [np.concatenate(c) for c in zip(*batches(models, name)[1], strict=True)] for name in branches}
    seen = {name: inputs(models / name, read[name]) for name in branches}
    for key, start in base.items():
        changes = [branches[name][key].astype(np.float64) - start for name in branches]
        module = key.removesuffix(".weight")
        if key.startswith("model.layers") and module in seen["a"]:
            grams = [seen[name][module].T @ seen[name][module] / len(seen[name][module]) for name in branches]
            expected = start + regmean(changes, grams, 0.9, 0.01)
        else:
            expected = start + sum(changes) / 2
        # Two float32 passes through the model stand between the activations.
        assert np.abs(found[key] - expected).max() <= 2e-5, key
    assert report["kept"] == "start" and set(report["tokens"]) == {"grams", "held_out"}
    assert report["tokens"]["grams"] == sum(int((r[1] > 0).sum()) for r in read.values())


def test_squares_are_torchs_squared_gradients(models):
    config = Qwen2Config.from_dir(models / "a")
    _, read = batches(models, "a", 2)
    params = hf.load_params(models / "a", config, dtype=np.float32)
    found = contributions.squares(config, params, iter(read), np.float32, "none")
    network = transformers.AutoModelForCausalLM.from_pretrained(models / "a", dtype=torch.float32)
    expected = {name: np.zeros(tuple(p.shape)) for name, p in network.named_parameters()}
    rows = [[a[i : i + 1] for a in batch] for batch in read for i in range(len(batch[0]))]
    for row in rows:
        network.zero_grad()
        for tokens, mask in documents(row):
            ids = torch.tensor(tokens[None]).long()
            scores = network(ids).logits[0, :-1].log_softmax(-1)
            picked = scores.gather(1, ids[0, 1:, None])[:, 0]
            (-(picked * torch.tensor(mask[1:])).sum()).backward()
        for name, p in network.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad.double().numpy() ** 2
    for row in spec.table(config):
        for layer, key in enumerate(row.hf_keys()):
            own = np.asarray(get(found, row.path))[layer] if row.stacked else np.asarray(get(found, row.path))
            own = own.T if row.transposed else own
            np.testing.assert_allclose(own, expected[key], rtol=2e-3, atol=1e-5 * expected[key].max(), err_msg=key)


def test_fisher_shares_are_a_weighted_mean():
    rng = np.random.default_rng(0)
    plain = [rng.normal(size=(2, 3, 4)) for _ in range(3)]
    own = [rng.random((2, 3, 4)) for _ in range(3)]
    own[0][:, 0] = own[1][:, 0] = own[2][:, 0] = 0
    found = contributions._weighted([jnp.asarray(p) for p in plain], [jnp.asarray(f) for f in own], (1, 2))
    shares = [f / f.mean((1, 2), keepdims=True) for f in own]
    total = sum(shares)
    expected = np.where(total > 0, sum(s * 3 * p for s, p in zip(shares, plain, strict=True)) / np.where(total > 0, total, 1), sum(plain))  # fmt: skip # noqa: E501
    np.testing.assert_allclose(sum(found), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_a_coefficients_gradient_is_the_difference_quotient_of_the_loss(models, per):
    config = Qwen2Config.from_dir(models / "base")
    load = lambda name: hf.load_params(models / name, config, dtype=np.float32)  # noqa: E731
    base = load("base")
    parts = [contributions._plain(load("base"), load(name), 2) for name in ("a", "b")]
    calibration, _ = batches(models, "a")
    batch = calibration.joint(0, "learning")
    factors = [learn.coefficients(config, 1.0, per) for _ in parts]
    nats = lambda own: learn._nats(config, learn.merged(base, parts, own), batch, 2, "float32", "none")  # noqa: E731
    gradient = jax.grad(nats)(factors)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda k: jnp.asarray(rng.normal(size=k.shape), jnp.float32), factors)
    up, down = (float(nats(jax.tree.map(lambda k, d, s=s: k + s * d, factors, direction))) for s in (0.05, -0.05))
    expected = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert abs(expected) > 1e-4
    assert (up - down) / 0.1 == pytest.approx(expected, rel=0.02, abs=2e-5)
    # A row is an output: the last axis of a kernel here, the first of a tensor in a file.
    kernel = factors[0]["layers"]["mlp"]["down"]["kernel"]
    assert kernel.shape == ((2, 1, 32) if per == "row" else (2, 1, 1))


def test_learning_lowers_the_loss_and_polishing_leaves_what_no_branch_changed(models, tmp_path):
    report = run.merge(recipe(models, steps=12, polish=4, polish_rate=1e-3, learning_rate=0.5), tmp_path / "out")
    mean = {stage: np.mean(list(own.values())) for stage, own in report["held_out_loss"].items()}
    assert mean["learned"] < mean["start"] and mean["polished"] < mean["learned"] and report["kept"] == "polished"
    base, found = tensors(models / "base"), tensors(tmp_path / "out")
    assert np.array_equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not np.array_equal(found["lm_head.weight"], base["lm_head.weight"])
    # The held-out loss is the model's own, as written.
    m = bmjax.load(tmp_path / "out")
    calibration, _ = batches(models, "a")
    tokens, segments, mask = calibration.judged()[0]
    nats, count = m.loss(tokens, mask, segment_ids=segments)
    assert float(nats / count) == pytest.approx(report["held_out_loss"]["polished"]["a"], rel=1e-5)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == json.loads(json.dumps(report))


def test_what_does_not_help_on_held_out_rows_is_not_kept(models, tmp_path):
    said = []
    report = run.merge(recipe(models, steps=3, learning_rate=300.0), tmp_path / "far", log=said.append)
    run.merge(recipe(models, steps=0), tmp_path / "start")
    assert report["kept"] == "start" and "not kept" in said[0]
    far, start = tensors(tmp_path / "far"), tensors(tmp_path / "start")
    assert far.keys() == start.keys() and all(np.array_equal(far[key], start[key]) for key in far)


def test_on_a_mesh_it_is_the_same(models, tmp_path):
    for name, mesh in (("one", {}), ("mesh", {"fsdp": 4, "tensor": 2})):
        run.merge(recipe(models, mesh=mesh, batch=2), tmp_path / name)
    one, mesh = tensors(tmp_path / "one"), tensors(tmp_path / "mesh")
    assert max(float(np.abs(one[key] - mesh[key]).max()) for key in one) < 2e-4


def test_held_out_documents_are_never_learned_from(models):
    calibration, _ = batches(models, "a")
    for loader, held in zip(calibration.loaders, calibration.held_out, strict=True):
        assert isinstance(loader, Loader)
        seen = {tuple(e.tokens) for e in loader.dataset.examples}
        judged = [tuple(t) for t, _ in documents((held.tokens, held.segment_ids, held.loss_mask))]
        assert len(judged) == 4 and not seen & set(judged)


def test_the_commands_are_the_same(models, tmp_path, capsys):
    bmjax.merge(recipe(models), tmp_path / "a")
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe(models)))
    assert main([str(file), str(tmp_path / "b"), "--check"]) == 0
    assert not (tmp_path / "b").exists()
    assert main([str(file), str(tmp_path / "b")]) == 0
    assert "held-out loss, start" in capsys.readouterr().out
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert not is_calibrated({"merge_method": "linear"}) and not is_calibrated(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [{"model": "a"}]}, "models.0.data"),
        ({"parameters": {"stepps": 3}}, "did you mean 'steps'"),
        ({"models": [{"model": "base", "data": "x"}]}, "is the base_model"),
        ({"parameters": SMALL | {"held_out": 40}}, "40 rows, 40 of them to be held out"),
        ({"parameters": SMALL | {"seq_len": 512}}, "context of 256"),
        ({"base_model": "nowhere"}, "nowhere"),
        ({"models": [{"model": "a", "data": "nothing.jsonl"}]}, "nothing.jsonl"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        run.merge(recipe(models) | change, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_shape_or_with_nan_is_named(models, tmp_path):
    other = write_student(tmp_path / "other", intermediate_size=48)
    with pytest.raises(UserError, match=r"model 'a': layers/mlp/gate/kernel has shape"):
        run.merge(recipe(models) | {"sources": {"base": str(models / "base"), "a": str(other), "b": str(models / "b")}}, tmp_path / "out")  # fmt: skip # noqa: E501
    broken = write_student(tmp_path / "broken")
    own = tensors(broken)
    own["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(own, broken / "model.safetensors", {"format": "pt"})
    sources = {"base": str(models / "base"), "a": str(broken), "b": str(models / "b")}
    with pytest.raises(UserError, match=r"model 'a': final_norm/scale holds NaN"):
        run.merge(recipe(models) | {"sources": sources}, tmp_path / "out")
