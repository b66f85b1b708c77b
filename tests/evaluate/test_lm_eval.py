"""lm-eval's own gsm8k and arc tasks, with rows from files: its hf model, bmjax's model class and the server agree.

lm-eval is no dependency of the tests: `pip install '.[lm-eval]'`, and `pytest -m slow`.
"""

import json
from pathlib import Path

import pytest
import safetensors.numpy

from bmjax.demo.tokenizer import train_tokenizer
from tests.conftest import sums, write_rows, write_student
from tests.generate.server.scripted import Serving

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")

DOCS = 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model with a tokenizer that splits as Qwen2's: transformers does so for every Qwen2 model."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([write_rows(folder / "rows.jsonl", sums(60))], 320)
    changes = {"vocab_size": 320, "max_position_embeddings": 1024}
    directory = write_student(folder / "student", scale=0.3, tokenizer=tokenizer, **changes)
    # It never writes single bytes of characters, nor the tags of reasoning, which the server takes off: logit 0.
    weights = safetensors.numpy.load_file(directory / "model.safetensors")
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    silent = [token for token in range(320) if token in tags or not tokenizer.decode([token]).isascii()]
    silent += range(len(tokenizer), 320)
    assert 100 < len(silent) < 250
    weights["lm_head.weight"][silent] = 0
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks as lm-eval has them but for where their rows are, and one that scores whole texts."""
    from lm_eval.tasks import TaskManager

    folder, theirs = tmp_path_factory.mktemp("tasks"), Path(lm_eval.__file__).parent / "tasks"
    rows = sums(3 * DOCS)
    word = [{"question": row["prompt"], "answer": f"{row['response']}\n#### {row['reference']}"} for row in rows]
    choice = [
        {"question": row["prompt"], "answerKey": "ABCD"[n % 4],
         "choices": {"label": list("ABCD"), "text": [str(int(row["reference"]) + i - n % 4) for i in range(4)]}}
        for n, row in enumerate(rows)
    ]  # fmt: skip
    texts = [{"page": " ".join(row["prompt"] + row["response"] for row in rows[n : n + 20])} for n in range(6)]
    for name, own, include in (("words", word, "gsm8k/gsm8k.yaml"), ("choices", choice, "arc/arc_easy.yaml")):
        files = {split: str(write_rows(folder / f"{name}_{split}.jsonl", part)) for split, part in
                 (("train", own[DOCS:]), ("validation", own[DOCS:]), ("test", own[:DOCS]))}  # fmt: skip
        lines = {"include": str(theirs / include), "task": f"local_{name}", "dataset_path": "json",
                 "dataset_name": None, "tag": "local", "dataset_kwargs": {"data_files": files}}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(lines))
    file = write_rows(folder / "texts.jsonl", texts)
    lines = {"task": "local_texts", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
             "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "",
             "doc_to_target": "{{page}}", "metric_list": [{"metric": "bits_per_byte"}]}  # fmt: skip
    (folder / "texts.yaml").write_text(json.dumps(lines))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks, model: str, arguments: dict, names, **options) -> dict[str, list]:
    """Each task's responses, by document."""
    results = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(names), task_manager=tasks, log_samples=True, bootstrap_iters=0,
        cache_requests=False, **options,
    )  # fmt: skip
    samples = {}
    for name, rows in results["samples"].items():
        responses = {row["doc_id"]: row["resps"] for row in rows}
        samples[name] = [responses[number] for number in sorted(responses)]
    return samples


ALL = ("local_words", "local_choices", "local_texts")


@pytest.fixture(scope="module")
def theirs(tasks, directory):
    arguments = {"pretrained": str(directory), "dtype": "float32"}
    return evaluate(tasks, "hf", arguments, ALL, batch_size=4, device="cpu")


def check(ours: dict[str, list], theirs: dict[str, list]) -> None:
    """Texts are equal to the last sample, log-likelihoods to float rounding, and so is what is greedy."""
    assert len(theirs["local_words"]) == DOCS and len(set(map(str, theirs["local_words"]))) > DOCS // 2
    assert ours["local_words"] == theirs["local_words"]
    for name in ("local_choices", "local_texts"):
        assert len(ours[name]) == len(theirs[name])
        for own, other in zip(ours[name], theirs[name], strict=True):
            flat, expected = flattened(own), flattened(other)
            assert flat == pytest.approx(expected, rel=2e-6, abs=2e-5), name


def flattened(value) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in flattened(part)]
    return [float(value == "True") if value in ("True", "False") else float(value)]


def test_the_model_class_agrees_with_hf(tasks, directory, theirs):
    from bmjax.evaluate import lm_eval_model  # noqa: F401 - registers the class

    check(evaluate(tasks, "bmjax", {"pretrained": str(directory)}, ALL, batch_size=8), theirs)


def test_loglikelihoods_of_the_model_class_add_up_to_evals_held_out_loss(directory, tmp_path):
    from bmjax.evaluate.lm_eval_model import BmjaxLM
    from bmjax.evaluate.run import evaluate as score_tasks
    from bmjax.evaluate.settings import EvalSettings

    rows = [{key: value for key, value in row.items() if key != "reasoning"} for row in sums(40, seed=3)]
    tasks = {"held_out_loss": {"traces": str(write_rows(tmp_path / "traces.jsonl", rows))}}
    values = {"model": str(directory), "output": str(tmp_path / "out"), "seq_len": 256, "mesh": {}, "tasks": tasks}
    score = score_tasks(EvalSettings.read(values))["held_out_loss"]
    model = BmjaxLM(str(directory), batch_size=8)
    asked = []
    for row in rows:
        before = model.apply_chat_template([{"role": "user", "content": row["prompt"]}])
        after = f"{row['response']}{model.tokenizer.eos_token}"
        asked.append(((before, after), model.tok_encode(before), model.tok_encode(after)))
    results = model._loglikelihood_tokens(asked)
    assert sum(len(after) for _, _, after in asked) == score["loss_tokens"]
    nats = -sum(logprob for logprob, _ in results)
    assert nats == pytest.approx(score["loss"] * score["loss_tokens"], rel=1e-6)


@pytest.fixture(scope="module")
def serving(directory):
    from bmjax.generate.load import load_engine, open_model
    from bmjax.generate.settings import EngineSettings

    student = open_model(str(directory), None)
    with Serving(load_engine(student, EngineSettings(), 8), context=1024, tokenizer=student.tokenizer) as serving:
        yield serving


@pytest.mark.parametrize("options", [{"num_concurrent": 8}, {"batch_size": 5}, {"tokenized_requests": False}])
def test_the_server_agrees_with_hf(tasks, directory, theirs, serving, options):
    arguments = {"model": "tiny", "base_url": f"{serving.url}/v1/completions", "tokenizer": str(directory),
                 "tokenizer_backend": "huggingface", "max_length": 1024} | options  # fmt: skip
    if options.get("tokenized_requests") is False:
        ours = evaluate(tasks, "local-completions", arguments, ["local_words"])
        assert ours["local_words"] == theirs["local_words"]
    else:
        check(evaluate(tasks, "local-completions", arguments, ALL), theirs)


def test_chats_of_the_server_agree_with_hf(tasks, directory, serving):
    chats = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    hf = {"pretrained": str(directory), "dtype": "float32"}
    expected = evaluate(tasks, "hf", hf, ["local_words"], batch_size=4, device="cpu", **chats)
    arguments = {"model": "tiny", "base_url": f"{serving.url}/v1/chat/completions", "num_concurrent": 4}
    assert evaluate(tasks, "local-chat-completions", arguments, ["local_words"], **chats) == expected
