"""The Python contract: load, logits, loss, save, generate, train, merge."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import bmjax
from bmjax import UserError
from bmjax.demo.problems import make_problems
from bmjax.demo.teacher import DemoTeacher
from bmjax.parallel.mesh import make_mesh
from tests.conftest import sums, write_rows, write_student

TRAINING = {"student": "Qwen/Qwen2.5-0.5B", "data": "d", "output": "o", "steps": 1}
TEXTS = ["What is 3 + 4?", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "2"]


@pytest.fixture(scope="module")
def hf(student):
    return transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def model(student):
    return bmjax.load(student)


def documents(seed=0, lengths=(13, 20, 7)):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, n) for n in lengths]


def packed():
    """(tokens, segment ids, mask, documents): three documents and padding a row, row 2 in another order."""
    docs = documents()
    rows = [docs, docs[::-1]]
    tokens, segments = np.zeros((2, 48), int), np.zeros((2, 48), int)
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, 1):
            tokens[b, start : start + len(document)], segments[b, start : start + len(document)] = document, number
            start += len(document)
    mask = (np.random.default_rng(1).random((2, 48)) < 0.5) & (segments > 0)
    return tokens, segments, mask.astype(int), rows


def test_load_gives_config_params_and_tokenizer(model, student):
    assert model.config.hidden_size == 32 and model.directory == student
    assert model.params["layers"]["attention"]["q"]["kernel"].shape == (2, 32, 32)
    assert model.params["embed"]["embedding"].dtype == np.float32
    assert model.tokenizer("a")["input_ids"]


def test_logits_equal_those_of_transformers(model, hf):
    tokens, segments, _, rows = packed()
    with torch.no_grad():
        plain = hf(torch.tensor(tokens)).logits.numpy()
    got = model.logits(tokens)
    assert got.dtype == np.float32 and got.shape == (2, 48, 300)
    np.testing.assert_allclose(got, plain, atol=2e-4)
    np.testing.assert_allclose(model.logits(tokens.tolist()), got)

    got = np.asarray(model.logits(tokens, segment_ids=segments))
    positions = np.zeros_like(tokens)
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            with torch.no_grad():
                alone = hf(torch.tensor(document)[None]).logits[0].numpy()
            np.testing.assert_allclose(got[b, start : start + len(document)], alone, atol=2e-4)
            positions[b, start : start + len(document)] = np.arange(len(document))
            start += len(document)
    explicit = np.asarray(model.logits(tokens, segment_ids=segments, positions=positions))
    np.testing.assert_allclose(explicit[segments > 0], got[segments > 0], atol=1e-5)
    shifted = np.asarray(model.logits(tokens, positions=np.arange(48)[None] + 5))
    with torch.no_grad():
        want = hf(torch.tensor(tokens), position_ids=torch.arange(48)[None] + 5).logits.numpy()
    np.testing.assert_allclose(shifted, want, atol=2e-4)


def test_loss_equals_that_of_transformers(model, hf):
    tokens, segments, mask, rows = packed()
    total, count = 0.0, 0
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            targets = mask[b, start : start + len(document)].astype(bool)
            n = int(targets[1:].sum())
            if n:
                labels = torch.tensor(np.where(targets, document, -100))[None]
                with torch.no_grad():
                    total += float(hf(torch.tensor(document)[None], labels=labels).loss) * n
                count += n
            start += len(document)
    nats, number = model.loss(tokens, mask, segment_ids=segments)
    assert (type(nats), type(number)) == (float, int)
    assert number == count and nats / number == pytest.approx(total / count, abs=1e-5)

    with torch.no_grad():
        plain = float(hf(torch.tensor(tokens), labels=torch.tensor(np.where(mask, tokens, -100))).loss)
    nats, number = model.loss(tokens, mask)
    assert number == mask[:, 1:].sum() and nats / number == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}])
def test_mesh_gives_the_same_numbers(model, student, sizes):
    tokens, segments, mask, _ = packed()
    meshed = bmjax.load(str(student), mesh=sizes)
    kernel = meshed.params["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32 // 4, 64 // 2)}
    np.testing.assert_allclose(meshed.logits(tokens, segments), model.logits(tokens, segments), atol=1e-5)
    (nats, count), (want, number) = meshed.loss(tokens, mask, segments), model.loss(tokens, mask, segments)
    assert count == number and nats == pytest.approx(want, rel=1e-5)
    assert bmjax.generate(meshed, TEXTS, max_new_tokens=8) == bmjax.generate(model, TEXTS, max_new_tokens=8)


def test_generate_equals_greedy_text_of_transformers(model, hf):
    tokenizer = model.tokenizer
    texts = bmjax.generate(model, TEXTS, max_new_tokens=10)
    for prompt, text in zip(TEXTS, texts, strict=True):
        ids = torch.tensor(tokenizer(prompt)["input_ids"])[None]
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    lists = [tokenizer(prompt)["input_ids"] for prompt in TEXTS]
    assert bmjax.generate(model, lists, max_new_tokens=10) == texts
    sampled = [bmjax.generate(model, TEXTS, max_new_tokens=10, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert bmjax.generate(model, []) == []


def test_generate_takes_stop_strings_and_filters(model):
    greedy = bmjax.generate(model, TEXTS, max_new_tokens=10)
    assert bmjax.generate(model, TEXTS, max_new_tokens=10, temperature=1.0, top_k=1) == greedy
    assert bmjax.generate(model, TEXTS, max_new_tokens=10, temperature=1.0, min_p=1.0) == greedy
    number = max(range(len(greedy)), key=lambda n: len(greedy[n]))
    stop = greedy[number][2:4]
    stopped = bmjax.generate(model, TEXTS, max_new_tokens=10, stop=stop)
    assert len(stop) == 2 and stopped == [text.split(stop)[0] for text in greedy] != greedy
    with pytest.raises(UserError, match="stop: expected strings that are not empty"):
        bmjax.generate(model, TEXTS, stop=["a", ""])
    with pytest.raises(UserError, match=r"min_p is 2; expected in \[0, 1\]"):
        bmjax.generate(model, TEXTS, min_p=2)


def test_functions_win_over_folders_of_their_names(model):
    from bmjax.calibrate import dispatch
    from bmjax.generate import prompts

    assert bmjax.generate(model, [[5]], max_new_tokens=1)
    once, again = (inspect.signature(f).parameters for f in (bmjax.api.merge, dispatch.merge))
    named = [name for name, parameter in once.items() if parameter.kind is not parameter.VAR_KEYWORD]
    assert named == list(again)[: len(named)]  # by position or by keyword, it is the same call
    for _ in range(2):
        with pytest.raises(UserError, match="no such file"):
            bmjax.merge("nowhere.yaml", output="OUT", overwrite=True)
    assert prompts.generate is not bmjax.generate


def test_transformers_loads_a_saved_model(model, hf, tmp_path):
    assert bmjax.save(model, tmp_path / "out") == tmp_path / "out"
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.tensor(packed()[0])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, hf(tokens).logits, atol=0, rtol=0)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == model.tokenizer.chat_template
    before, after = (safetensors.numpy.load_file(d / "model.safetensors") for d in (model.directory, tmp_path / "out"))
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


@pytest.mark.parametrize("dtype, kept, stored", [("bfloat16", "bfloat16", "BF16"), (None, "float16", "F16")])
def test_dtype_is_computed_with_and_stored(tmp_path, dtype, kept, stored):
    directory = write_student(tmp_path / "half", dtype="float16")
    model = bmjax.load(directory, dtype=dtype)
    assert model.params["embed"]["embedding"].dtype == kept == model.dtype
    logits = model.logits([[5, 6, 7]])
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    bmjax.save(model, tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["model.embed_tokens.weight"]["dtype"] == stored


def test_model_without_tokenizer_takes_token_ids(student, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((student / name).read_bytes())
    silent = bmjax.load(bare)
    assert silent.tokenizer is None
    prompts = [[5, 6, 7], [8]]
    tokens = bmjax.generate(silent, prompts, max_new_tokens=6)
    assert all(isinstance(token, int) for row in tokens for token in row)
    assert [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens] == bmjax.generate(
        model, prompts, max_new_tokens=6
    )
    with pytest.raises(UserError, match="no tokenizer, so prompts must be lists of token ids"):
        bmjax.generate(silent, ["text"])


@pytest.mark.parametrize("call, problem", [
    (lambda m: m.logits([1, 2]), "tokens: 1 dimensions, expected 2"),
    (lambda m: m.logits([[1, 300]]), r"tokens: ids must lie in 0\.\.299, found 300"),
    (lambda m: m.logits([[-1, 3]]), r"tokens: ids must lie in 0\.\.299, found -1"),
    (lambda m: m.logits(np.zeros((1, 257), int)), "tokens: 257 tokens, the model's context holds 256"),
    (lambda m: m.logits([[1.5, 2]]), "tokens: expected whole numbers, found float64"),
    (lambda m: m.logits([[1, 2]], segment_ids=[[1]]), r"segment_ids: shape \(1, 1\), expected that of the tokens"),
    (lambda m: m.logits([[1, 2]], positions=[[1, 2, 3]]), r"positions: shape \(1, 3\), expected that of the tokens"),
    (lambda m: m.loss([[1, 2]], [[1]]), r"loss_mask: shape \(1, 1\), expected that of the tokens, \(1, 2\)"),
    (lambda m: m.logits([[1, 2, 3], [4, 5]]), r"tokens: rows of different lengths \(2, 3\); pad them to one length"),
    (lambda m: m.loss([[1, 2]], [[1], [1, 0]]), r"loss_mask: rows of different lengths \(1, 2\)"),
    (lambda m: m.logits([[1, 2]], positions=3), "positions: 0 dimensions, expected 2"),
    (lambda m: bmjax.generate("DIR", ["a"]), "model: expected a loaded model, found a name 'DIR'; load it first"),
    (lambda m: bmjax.generate(None, ["a"]), "model: expected a loaded model, found NoneType; load it first"),
    (lambda m: bmjax.save("DIR", "OUT"), "model: expected a loaded model, found a name 'DIR'"),
    (lambda m: bmjax.generate(m, [1, 2]), "prompts: expected a list of prompts, found one list of token ids"),
    (lambda m: bmjax.generate(m, [{"role": "user", "content": "a"}]), "prompts: expected a list of prompts, found one"),
    (lambda m: bmjax.generate(m, ["a", [1, "b"]]), "prompt 1: expected a text, a list of token ids or a list of chat"),
    (lambda m: bmjax.generate(m, ["a", [1.5]]), "prompt 1: expected a text, a list of token ids or a list of chat"),
    (lambda m: bmjax.generate(m, ["a", None]), "prompt 1: expected a text, a list of token ids or a list of chat"),
    (lambda m: bmjax.generate(m, [[{"role": "user"}]]), "prompt 0: messages, turn 1: no content"),
    (lambda m: bmjax.generate(m, [[{"role": "robot", "content": "a"}]]), "prompt 0: messages, turn 1: the role"),
    (lambda m: bmjax.generate(m, "text"), "prompts: expected a list of texts or of token lists, found one text"),
    (lambda m: bmjax.generate(m, [""]), "prompt 0: empty"),
    (lambda m: bmjax.generate(m, ["a " * 300]), r"prompt 0: \d+ tokens, the model's context holds 256"),
    (lambda m: bmjax.load(m.directory, dtype="float23"), "dtype: 'float23' is not one of .*; did you mean 'float32'"),
    (lambda m: bmjax.load(m.directory.parent / "studnet"), r"no such model directory; did you mean .*student"),
    (lambda m: bmjax.train({"student": "s"}), "key 'data' is missing"),
    (lambda m: bmjax.train("nowhere.yaml"), "nowhere.yaml: no such file"),
    (lambda m: bmjax.run({"domans": {}}), "unknown key 'domans'; did you mean 'domains'"),
    (lambda m: bmjax.collect({"problms": "p"}), "unknown key 'problms'; did you mean 'problems'"),
    (lambda m: bmjax.select({"traces": "nowhere.jsonl", "output": "o"}), "nowhere.jsonl: no such file"),
    (lambda m: bmjax.evaluate({"model": "m"}, "tsks={}"), "unknown key 'tsks'; did you mean 'tasks'"),
    (lambda m: bmjax.convert(m.directory, m.directory, to="orbax"), "exists already; choose a new directory"),
    (lambda m: bmjax.convert(m.directory, "OUT", to="gguf"), "to: expected hf or orbax, found 'gguf'"),
    (lambda m: bmjax.plan(TRAINING, topology="64"), "'64' is not like v5p:4x4x4"),
    (lambda m: bmjax.merge({"merge_method": "learned", "base_model": "a", "models": [{"model": "b", "data": "c"}]},
                           "OUT", memory=1), "memory: learned holds one layer of every model at a time; leave it out"),
])  # fmt: skip
def test_mistakes_are_one_line(model, call, problem):
    with pytest.raises(UserError, match=problem) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_repr_of_a_model_is_one_line(model, student):
    assert repr(model) == f"<bmjax.Model: Qwen2, 0.04 M parameters, float32, one device, {student}>"
    meshed = dataclasses.replace(model, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    assert "float32, fsdp 4 x tensor 2, " in repr(meshed)


def test_help_shows_signatures_and_docstrings():
    for name in set(bmjax.__all__) - {"Model", "UserError", "__version__"}:
        function = getattr(bmjax, name)
        assert inspect.isfunction(function) and function.__module__.startswith("bmjax."), name
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name
        assert "Raises:" in inspect.getdoc(function), name
    assert list(inspect.signature(bmjax.merge).parameters)[:3] == ["recipe", "output", "overwrite"]


def test_chat_turns_are_rendered_with_the_template(model):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.count("<|im_start|>") == 3
    chat, plain, tokens = [bmjax.generate(model, [prompt], max_new_tokens=8) for prompt in (
        turns, text, model.tokenizer(text)["input_ids"])]  # fmt: skip
    assert chat == plain == tokens
    named = bmjax.generate(model, [turns], max_new_tokens=8, template="deepseek-r1")
    assert isinstance(named[0], str)


def test_evaluate_select_and_convert_from_python(student, tmp_path):
    traces = write_rows(tmp_path / "held_out.jsonl", sums(3, seed=4))
    keys = {"model": str(student), "output": str(tmp_path / "scores"), "tasks": {"sums": {"traces": str(traces)}}}
    scores = bmjax.evaluate(keys, "seq_len=128")
    assert scores == json.loads((tmp_path / "scores" / "scores.json").read_text()) and scores["sums"]["loss"] > 0
    assert bmjax.convert(student, tmp_path / "orbax", to="orbax") == tmp_path / "orbax"
    bmjax.convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    before, after = (safetensors.numpy.load_file(d / "model.safetensors") for d in (student, tmp_path / "hf"))
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_collect_and_select_from_python(tmp_path):
    problems = make_problems("math", 20)
    file = write_rows(tmp_path / "problems.jsonl", [{"question": p.prompt, "answer": p.reference} for p in problems])
    with DemoTeacher() as teacher:
        endpoint = {"base_url": teacher.base_url, "model": "demo", "temperature": 0.0}
        counts = bmjax.collect(
            {"problems": str(file), "domain": "math", "output": str(tmp_path / "traces"), "teacher": endpoint}
        )
    assert counts["collected"] == 20
    table = bmjax.select({"traces": str(tmp_path / "traces"), "output": str(tmp_path / "rows")}, "per_prompt=1")
    assert 0 < table["math"]["kept"] <= 20 and (tmp_path / "rows" / "math.jsonl").exists()


def test_train_and_merge_from_python(student, train_file, tmp_path):
    keys = {
        "student": str(student), "data": str(train_file), "steps": 1, "batch": 4, "seq_len": 128, "mesh": {},
        "warmup": 0, "learning_rate": 1e-3,
        "compute_dtype": "float32",
    }  # fmt: skip
    summary = bmjax.train(keys | {"output": str(tmp_path / "run")}, "log_every=10")
    assert summary["steps"] == 1 and summary["loss"] > 0
    recipe = {"merge_method": "linear", "models": [str(student), summary["hf"]], "parameters": {"weight": 0.5}}
    bmjax.merge(recipe, tmp_path / "merged")
    a, b, c = (
        safetensors.numpy.load_file(d / "model.safetensors")
        for d in (student, tmp_path / "run" / "hf", tmp_path / "merged")
    )
    for key in a:
        np.testing.assert_allclose(c[key], (a[key].astype(np.float64) + b[key]) / 2, atol=1e-6)
