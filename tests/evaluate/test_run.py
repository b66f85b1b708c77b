"""Scores of a model: what is generated, judged, counted and written; the loss is transformers'."""

import json
import math
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers

from bmjax.chat.reasoning import join_think
from bmjax.config import UserError
from bmjax.evaluate import local as module
from bmjax.evaluate.run import evaluate, summary
from bmjax.evaluate.samples import Samples
from bmjax.evaluate.score import accuracy
from bmjax.evaluate.settings import EvalSettings
from bmjax.generate.requests import Token
from bmjax.teach.judges import symbolic
from bmjax.teach.judges.verdict import JudgeError
from tests.conftest import sums, write_rows, write_student


@pytest.fixture(scope="module")
def hf(student):
    return transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="eager")


def settings(student, output, tasks, **changes) -> EvalSettings:
    values = {
        "model": str(student),
        "output": str(output),
        "tasks": tasks,
        "seq_len": 128,
        "max_new_tokens": 12,
        "mesh": {},
    }
    return EvalSettings.read(values | changes)


def plain(count, seed=2):
    """Records without reasoning, one with text outside ASCII."""
    rows = [{k: v for k, v in row.items() if k != "reasoning"} for row in sums(count, seed)]
    rows[1]["response"] = "été → 3 €"
    return rows


def test_held_out_loss_equals_transformers(student, hf, tokenizer, tmp_path):
    rows = plain(9) + sums(4, seed=3)  # half of the last think; their tags are special tokens
    file = write_rows(tmp_path / "traces.jsonl", rows)
    scores = evaluate(settings(student, tmp_path / "out", {"math": {"traces": str(file)}}, batch=4))
    answers = [join_think(row.get("reasoning", ""), row["response"]) for row in rows]
    nats, count = 0.0, 0
    for row, answer in zip(rows, answers, strict=True):
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt + answer + "<|im_end|>")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        labels = torch.tensor([-100] * start + ids[start:])[None]
        with torch.no_grad():
            nats += float(hf(torch.tensor(ids)[None], labels=labels).loss) * (len(ids) - start)
        count += len(ids) - start
    score = scores["math"]
    assert score["loss_tokens"] == count
    assert score["loss"] == pytest.approx(nats / count, abs=1e-5)
    size = sum(len(answer.encode()) for answer in answers)
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores
    assert not (tmp_path / "out" / "samples").exists()
    assert summary(score) == f"loss {score['loss']:.4f} nats/token, {score['bits_per_byte']:.4f} bits/byte"

    # Neither the batch nor the mesh is part of the score.
    task = {"math": {"traces": str(file)}}
    for changes in ({"batch": 64}, {"mesh": {"data": -1}}, {"mesh": {"fsdp": 2, "tensor": 2}}):
        other = evaluate(settings(student, tmp_path / "other", task, **changes))["math"]
        assert other["loss"] == pytest.approx(score["loss"], abs=1e-5) and other["loss_tokens"] == count
    half = evaluate(settings(student, tmp_path / "half", task, compute_dtype="bfloat16"))["math"]
    assert half["loss"] == pytest.approx(score["loss"], rel=0.01) and half["loss"] != score["loss"]


def test_answers_equal_transformers_and_are_written(student, hf, tokenizer, tmp_path):
    rows = plain(5)
    file = write_rows(
        tmp_path / "questions.jsonl", [{"prompt": r["prompt"], "reference": r["reference"]} for r in rows]
    )
    task = {"math": {"questions": str(file), "limit": 4}}
    scores = evaluate(settings(student, tmp_path / "out", task, system="Be brief."))
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "math.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for row, sample in zip(rows, samples, strict=False):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(tokenizer(text)["input_ids"])[None]
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert sample["answer"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert (sample["prompt"], sample["reference"]) == (row["prompt"], row["reference"])
    score = scores["math"]
    assert score["n"] == 4 and score["k"] == 1
    assert score["accuracy"] == np.mean([sample["verdict"] == "right" for sample in samples])
    assert score["truncated"] == np.mean([sample["finish_reason"] == "length" for sample in samples])


def test_accuracy_is_the_mean_over_samples(student, tokenizer, tmp_path, monkeypatch):
    answers = [
        ["<think>9</think> 5", "It is 5.", "6"],  # 2 of 3 right
        ["7", "8", "cut in the midd"],  # none, one cut
    ]
    engine = planned(monkeypatch, tokenizer, *answers[0], *answers[1])
    file = write_rows(
        tmp_path / "q.jsonl", [{"prompt": "2 + 3?", "reference": "5"}, {"prompt": "2 + 7?", "reference": 9}]
    )
    traces = write_rows(tmp_path / "t.jsonl", plain(3))
    task = {"sums": {"questions": str(file), "traces": str(traces), "kind": "math"}}
    lines = []
    score = evaluate(
        settings(student, tmp_path / "out", task, samples=3, temperature=0.6, top_p=0.9, seed=3), lines.append
    )["sums"]
    requests = engine.requests
    assert len(requests) == 6 and requests[0].tokens == requests[2].tokens != requests[3].tokens
    assert [request.sample for request in requests] == [0, 1, 2, 0, 1, 2]
    assert {(r.sampling.temperature, r.sampling.top_p, r.sampling.max_new_tokens) for r in requests} == {(0.6, 0.9, 12)}
    # The samples of a problem share a seed, the problems do not.
    assert requests[0].sampling.seed == requests[2].sampling.seed != requests[3].sampling.seed
    assert score["accuracy"] == pytest.approx(1 / 3) and (score["n"], score["k"]) == (2, 3)
    assert score["ci95"] == accuracy([[True, True, False], [False] * 3])["ci95"]
    assert score["truncated"] == pytest.approx(1 / 6)
    assert {"loss", "bits_per_byte", "loss_tokens"} <= score.keys()
    assert lines[-1] == f"{student} sums: {summary(score)}"
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "sums.jsonl").read_text().splitlines()]
    assert [sample["verdict"] for sample in samples] == ["right", "right", "wrong", "wrong", "wrong", "wrong"]
    assert "mean of 3 samples" in summary(score) and "16.7% truncated" in summary(score)


def planned(monkeypatch, tokenizer, *answers):
    """The model's answers to all samples in turn; one with "cut" in it ends at max_new_tokens."""

    class Engine:
        requests: ClassVar[list] = []

        def __init__(self, config, params, end_ids, **keywords):
            assert 2 in end_ids and keywords["slots"] == 64
            self.waiting = []

        def submit(self, request, on_tokens):
            self.requests.append(request)
            self.waiting.append(on_tokens)

        def run(self):
            for on_tokens, text in zip(self.waiting, answers, strict=True):
                ids = tokenizer(text)["input_ids"]
                on_tokens([Token(i) for i in ids[:2]], None)
                on_tokens([Token(i) for i in ids[2:]], "length" if "cut" in text else "stop")

    monkeypatch.setattr(module, "Engine", Engine)
    return Engine


def test_what_cannot_be_judged_is_counted_apart(student, tokenizer, tmp_path, monkeypatch):
    planned(monkeypatch, tokenizer, "It is 5.", "5", "6", "7", "1", "1", "8", "8")
    rows = [
        {"prompt": f"{n}?", "reference": reference}
        for n, reference in enumerate(["5", "7", None, {"tests": ["assert True"]}])
    ]
    file = write_rows(tmp_path / "q.jsonl", rows)
    score = evaluate(settings(student, tmp_path / "out", {"mixed": {"questions": str(file)}}, samples=2))["mixed"]
    assert (score["accuracy"], score["n"], score["k"], score["unjudged"]) == (0.75, 2, 2, 4)
    assert score["ci95"] == accuracy([[True, True], [False, True]])["ci95"]
    assert "accuracy 0.750" in summary(score) and "4 samples could not be judged" in summary(score)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "mixed.jsonl").read_text().splitlines()]
    assert [s["verdict"] for s in samples] == ["right", "right", "wrong", "right", *["unjudged"] * 4]
    assert samples[4]["reason"] == "there is no reference" and "run_programs" in samples[6]["reason"]


def test_programs_are_run_when_asked(student, tokenizer, tmp_path, monkeypatch):
    good = "```python\nprint(int(input()) * 2)\n```"
    planned(monkeypatch, tokenizer, good, good.replace("2", "3"))
    rows = [{"prompt": "Double it.", "reference": {"tests": [{"input": "4", "output": "8"}]}}] * 2
    tasks = {"code": {"questions": str(write_rows(tmp_path / "q.jsonl", rows))}}
    with pytest.raises(UserError, match=r"tasks.code: none of 2 answers can be judged: programs run only with run_pro"):
        evaluate(settings(student, tmp_path / "out", tasks))
    assert not (tmp_path / "out").exists()
    score = evaluate(settings(student, tmp_path / "out", tasks, run_programs=True))["code"]
    assert (score["accuracy"], score["n"], score["unjudged"]) == (0.5, 2, 0)


def test_a_judge_that_fails_on_all_answers_is_an_error(student, tokenizer, tmp_path, monkeypatch):
    def equal(reference, answer):
        raise JudgeError("out of time")

    monkeypatch.setattr(symbolic, "equal", equal)
    planned(monkeypatch, tokenizer, "x + 1")
    file = write_rows(tmp_path / "q.jsonl", [{"prompt": "Integrate", "reference": r"\int 2x\,dx"}])
    with pytest.raises(UserError, match=r"tasks.math: none of 1 answers can be judged: out of time"):
        evaluate(settings(student, tmp_path / "out", {"math": {"questions": str(file)}}))


def test_rows_are_read_by_templates(student, tokenizer, tmp_path, monkeypatch):
    planned(monkeypatch, tokenizer, "A", "B")
    rows = [{"q": "First?", "a": "A", "text": "Because A"}, {"q": "Second?", "a": "A", "text": "Because B"}]
    task = {"questions": str(write_rows(tmp_path / "q.jsonl", rows)), "prompt": "Answer: {q}", "reference": "{a}"}
    task |= {"traces": task["questions"], "response": "{text}", "kind": "exact"}
    score = evaluate(settings(student, tmp_path / "out", {"t": task}))["t"]
    assert (score["accuracy"], score["n"]) == (0.5, 2)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "t.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == ["Answer: First?", "Answer: Second?"]
    assert {sample["verdict_by"] for sample in samples} == {"exact"}
    plain_rows = [{"prompt": f"Answer: {row['q']}", "response": row["text"]} for row in rows]
    plain_task = {"traces": str(write_rows(tmp_path / "t.jsonl", plain_rows))}
    assert evaluate(settings(student, tmp_path / "o2", {"t": plain_task}))["t"]["loss"] == score["loss"]


@pytest.mark.parametrize("task, rows, problem", [
    ({"questions": "F"}, [{"prompt": "Q"}], r"rows.jsonl, row 1: reference asks for field 'reference', .*lacks"),
    ({"questions": "F"}, [{"prompt": " ", "reference": "1"}], r"rows.jsonl, row 1: the prompt is empty"),
    ({"questions": "F"}, [{"prompt": "Q", "reference": ["1"]}], r"row 1: reference: found a list"),
    ({"questions": "F"}, [], "no rows; expected at least one"),
    ({"traces": "F"}, [{"prompt": "Q"}], r"row 1: expected messages"),
    ({}, [], r"tasks.math: give questions \(for accuracy\), traces"),
])  # fmt: skip
def test_mistakes_are_one_line_that_names_the_row(student, tmp_path, task, rows, problem):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    tasks = {"math": {key: str(file) for key in task}}
    with pytest.raises(UserError, match=problem) as error:
        evaluate(settings(student, tmp_path / "out", tasks))
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "scores.json").exists()


def test_tasks_are_named_and_there_is_one(student, tmp_path):
    with pytest.raises(UserError, match="tasks: empty"):
        evaluate(settings(student, tmp_path / "out", {}))
    with pytest.raises(UserError, match=r"tasks: '../math' is used as a file name"):
        evaluate(settings(student, tmp_path / "out", {"../math": {"traces": "rows.jsonl"}}))


def test_models_that_cannot_be_scored_are_named(student, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", plain(3))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((student / name).read_bytes())
    with pytest.raises(UserError, match=r"bare: no tokenizer files"):
        evaluate(settings(bare, tmp_path / "out", {"math": {"traces": str(file)}}))
    small = write_student(tmp_path / "small", vocab_size=270)
    with pytest.raises(UserError, match=r"small: the tokenizer gives token id \d+, the model's vocabulary has 270"):
        evaluate(settings(small, tmp_path / "out", {"math": {"traces": str(file)}}))


def test_a_stopped_run_continues_with_the_same_answers(student, tmp_path, monkeypatch):
    file = write_rows(
        tmp_path / "q.jsonl",
        [{"prompt": f"{n}?", "reference": "5"} for n in range(3)] + [{"prompt": "Q " * 300, "reference": "5"}],
    )
    task = {"t": {"questions": str(file), "k": 2, "temperature": 1.0, "seed": 5}}

    def samples(name):
        return [json.loads(line) for line in (tmp_path / name / "samples" / "t.jsonl").read_text().splitlines()]

    whole = evaluate(settings(student, tmp_path / "whole", task))["t"]
    # The last question fills the context: nobody answers it.
    assert (whole["over_context"], whole["n"], whole["tokens"]["answers"]) == (2, 4, 6)
    assert [sample["finish_reason"] for sample in samples("whole")[6:]] == ["over_context"] * 2
    # Every sample of every problem draws numbers of its own.
    assert len({sample["answer"] for sample in samples("whole")[:6]}) == 6

    append, answers = Samples.append, []

    def stop_at_the_fourth(self, identity, fields):
        if "answer" in fields:
            answers.append(identity)
            if len(answers) == 6:
                raise KeyboardInterrupt
        append(self, identity, fields)

    monkeypatch.setattr(Samples, "append", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(student, tmp_path / "stopped", task))
    monkeypatch.setattr(Samples, "append", append)
    assert not (tmp_path / "stopped" / "scores.json").exists()
    lines = []
    assert evaluate(settings(student, tmp_path / "stopped", task), lines.append)["t"] == whole
    assert samples("stopped") == samples("whole")
    assert lines[0].startswith("eval t: 8 samples wanted, 5 already there")

    # Other weights under the same name are another model, which answers anew.
    copy, task = tmp_path / "model", {"t": task["t"] | {"limit": 1}}
    shutil.copytree(student, copy)
    evaluate(settings(copy, tmp_path / "copy", task))
    shutil.copyfile(write_student(tmp_path / "other", seed=1) / "model.safetensors", copy / "model.safetensors")
    evaluate(settings(copy, tmp_path / "copy", task))
    assert [a["answer"] for a in samples("copy")] != [a["answer"] for a in samples("whole")[:2]]
    assert len((tmp_path / "copy" / "samples" / "t.former.jsonl").read_text().splitlines()) == 2
