"""Verdicts on labelled answers, and which answers are the same one."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from bmjax.evaluate import judging
from bmjax.evaluate.judging import OVER_CONTEXT, judge_answer, judged_by, votes
from bmjax.evaluate.local import LocalAnswerer
from bmjax.evaluate.questions import Asked, Question
from bmjax.evaluate.settings import EvalSettings
from tests.conftest import byte_tokenizer
from tests.evaluate.labelled import LABELLED


def settings(**changes) -> EvalSettings:
    values = {"model": "m", "output": "o", "tasks": {"t": {"questions": "f"}}, "run_programs": True}
    return EvalSettings.read(values | changes)


def asked(judge: str, reference, order=()) -> Asked:
    question = Question("p", 0, "Q", reference, judge, "row 1", (), "", {})
    return Asked("0" * 64, question, 0, "Q", reference, order)


def test_labelled_answers_are_judged_as_their_labels_say():
    assert len(LABELLED) >= 60
    wrong = []
    for judge, reference, finish_reason, answer, label in LABELLED:
        fields = judge_answer(asked(judge, reference), answer, finish_reason, settings(), lcb_compat=False)
        if fields["verdict"] != label:
            wrong.append((judge, answer, label, fields))
    assert not wrong


def test_a_prompt_over_the_context_is_wrong_and_a_judge_that_breaks_leaves_unjudged(monkeypatch):
    fields = judge_answer(asked("math", "1"), "", OVER_CONTEXT, settings(), lcb_compat=False)
    assert fields["verdict"] == "wrong" and "context" in fields["reason"]

    def broken(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(judging, "judge", broken)
    fields = judge_answer(asked("math", "1"), "1", "stop", settings(), lcb_compat=False)
    assert fields["verdict"] == "unjudged" and "RuntimeError: no memory" in fields["reason"]


def test_verdicts_are_known_by_all_that_decides_them():
    keys = {
        judged_by(asked("math", "1"), settings(), False), judged_by(asked("math", "2"), settings(), False),
        judged_by(asked("text", "1"), settings(), False), judged_by(asked("tests", "1"), settings(), False),
        judged_by(asked("tests", "1"), settings(), True),
        judged_by(asked("tests", "1"), settings(program_seconds=2), False),
    }  # fmt: skip
    assert len(keys) == 6
    # What does not decide a verdict on mathematics is no reason to judge anew.
    assert judged_by(asked("math", "1"), settings(), False) in keys
    assert judged_by(asked("math", "1"), settings(program_seconds=2), False) in keys


@pytest.mark.parametrize("judge, reference, texts, expected", [
    ("math", "1/2", [r"\boxed{0.5}", r"\boxed{\frac12}", "So it is 3.", r"<think>never", r"\boxed{3.0}"],
     [0, 0, 1, None, 1]),
    ("math", "x^2 - 1", [r"\boxed{(x-1)(x+1)}", r"\boxed{x^2-1}", r"\boxed{x^2+1}"], [0, 0, 1]),
    ("text", "Paris", ["The answer is Paris.", "The answer is **paris**", "The answer is Lyon.", ""], [0, 0, 1, None]),
    ("tests", {"tests": ["assert f()"]}, ["```python\na\n```", "```python\nb\n```", "```python\na\n```"], [0, 1, 0]),
])  # fmt: skip
def test_equal_answers_have_one_vote(judge, reference, texts, expected):
    samples = [asked(judge, reference) for _ in texts]
    assert votes(samples, [(text, "stop") for text in texts]) == expected


def test_letters_stand_for_options_in_every_order():
    # The same option stands first, second and third.
    orders = [(0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 0, 1), (1, 2, 3, 0)]
    texts = ["A", "Answer: B", r"\boxed{C}", "I cannot tell."]
    samples = [asked("choice", "ABCD"[order.index(0)], order) for order in orders]
    assert votes(samples, [(text, "stop") for text in texts]) == [0, 0, 0, None]


def with_tags(kind: str):
    """A tokenizer whose thinking tags are special tokens, tokens of text, or pieces of text."""
    tokenizer = byte_tokenizer()
    if kind == "special":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    values = json.loads(backend.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if "think" not in token["content"]]
    values["model"]["vocab"] = {
        token.replace("think", "thought"): index for token, index in values["model"]["vocab"].items()
    }
    backend = backend.from_str(json.dumps(values))
    if kind == "text":
        backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.mark.parametrize("kind", ["special", "text", "pieces"])
def test_an_answer_is_judged_by_what_follows_its_thought(kind):
    answerer, tokenizer = object.__new__(LocalAnswerer), with_tags(kind)
    answerer.student = SimpleNamespace(tokenizer=tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(encode("<think>")) == (7 if kind == "pieces" else 1)
    prompts = [encode(f"<|im_start|>assistant\n{opening}") for opening in ("<think>\n\n", "")]
    for text, verdicts in (
        (r"so \boxed{12} it", ["wrong", "right"]), (r"hm</think>\boxed{12}", ["right", "right"]),
        (r"\boxed{5}</think>\boxed{12}", ["right", "right"]),
        (r"<think>\boxed{5}</think>\boxed{12}", ["right", "right"]),
        (r"<think>so \boxed{12}", ["wrong", "wrong"]),
    ):  # fmt: skip
        answers = [answerer._generated(prompt, encode(text), "stop", 0) for prompt in prompts]
        assert [answer.text.count("<think>") for answer in answers] == [1, text.count("<think>")]
        judged = [judge_answer(asked("math", "12"), a.text, a.finish_reason, settings(), False) for a in answers]
        assert [fields["verdict"] for fields in judged] == verdicts, text
