"""A branch learns to stop: its template's marks are tokens, and every reader of the export ends where training ended.

The student has DeepSeek's marks and none of ChatML's, as R1-Distill-Qwen has. Its template is the paper's `qwen`.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import bmjax
from bmjax.branch.settings import TrainSettings
from bmjax.branch.train import train
from bmjax.chat.marks import fitting_templates, marks_of, missing
from bmjax.chat.template import named_template
from bmjax.config import UserError
from bmjax.weights import student as students
from tests.conftest import write_rows, write_student

DEEPSEEK = ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>"]
ROWS = [{"prompt": f"Say {letter}.", "response": letter * 3} for letter in "abcdefgh"]


def deepseek_tokenizer(**changes):
    """A byte-level tokenizer of 260 tokens with DeepSeek's marks, and its template."""
    vocab = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=DEEPSEEK[3], eos_token=DEEPSEEK[0], pad_token=DEEPSEEK[0],
        additional_special_tokens=DEEPSEEK[1:3],
    )  # fmt: skip
    tokenizer.chat_template = named_template("deepseek-r1")
    return tokenizer


@pytest.fixture(scope="module")
def deepseek_student(tmp_path_factory) -> Path:
    tokenizer = deepseek_tokenizer()
    directory = write_student(tmp_path_factory.mktemp("stopping") / "student", eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def branch(deepseek_student, tmp_path_factory) -> tuple[Path, list[str]]:
    """A branch of the student, trained with `qwen` until it knows its eight answers; and what was logged."""
    folder, said = tmp_path_factory.mktemp("branch"), []
    settings = TrainSettings(
        student=str(deepseek_student), data=str(write_rows(folder / "rows.jsonl", ROWS)), output=str(folder / "run"),
        template="qwen", steps=150, batch=8, seq_len=128, packing=False, learning_rate=1e-2, warmup=10,
        schedule="cosine", compute_dtype="float32", save_every=1000,
    )  # fmt: skip
    train(settings, said.append, progress=False)
    return folder / "run" / "hf", said


def test_new_marks_are_tokens_of_the_export(branch):
    directory, said = branch
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in ("<|im_start|>", "<|im_end|>")]
    assert ids == [[260], [261]]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == named_template("qwen")
    for name in ("config.json", "generation_config.json"):
        assert 261 in json.loads((directory / name).read_text())["eos_token_id"]
    line = next(line for line in said if line.startswith("an answer ends with <|im_end|>"))
    assert line.endswith("new tokens in free rows of the vocabulary: <|im_start|> (260), <|im_end|> (261)")


def test_transformers_answers_and_stops(branch):
    directory, _ = branch
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    for row in ROWS:
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(out) == row["response"] + "<|im_end|>"


def test_our_generation_answers_and_stops(branch):
    chats = [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
    texts = bmjax.generate(bmjax.load(branch[0]), chats, max_new_tokens=40)
    assert texts == [row["response"] for row in ROWS]


def test_marks_can_be_refused_with_the_templates_that_fit(deepseek_student):
    with pytest.raises(
        UserError, match=r"template: chatml: <\|im_start\|>, <\|im_end\|> are no tokens of the student"
    ) as e:
        students.open(deepseek_student, template="chatml", purpose="training", marks="refuse")
    assert "set template: alpaca or deepseek-r1 or mistral, or marks: add" in str(e.value)
    assert not students.open(deepseek_student, purpose="training", marks="refuse").added


def test_a_template_without_an_end_is_refused(deepseek_student, tmp_path):
    (tmp_path / "open.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    )
    for rule in ("add", "refuse"):
        with pytest.raises(UserError, match="nothing that ends a turn follows an answer"):
            students.open(deepseek_student, template=str(tmp_path / "open.jinja"), purpose="training", marks=rule)


def test_a_vocabulary_without_free_rows_is_refused(tmp_path):
    write_student(tmp_path / "full", vocab_size=261)
    deepseek_tokenizer().save_pretrained(tmp_path / "full")
    with pytest.raises(UserError, match="would be new tokens, and the model's vocabulary of 261 rows has 1 free ones"):
        students.open(tmp_path / "full", template="chatml", purpose="training", marks="add")


def test_marks_of_published_templates(qwen2_tokenizer):
    marks = marks_of(qwen2_tokenizer, qwen2_tokenizer.chat_template)
    assert marks.texts == ("<|im_start|>", "<|im_end|>") and marks.end == "<|im_end|>"
    assert not missing(qwen2_tokenizer, marks)
    assert fitting_templates(qwen2_tokenizer) == ["alpaca", "chatml", "mistral", "qwen"]
    assert missing(qwen2_tokenizer, marks_of(qwen2_tokenizer, named_template("llama3"))) == [
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    ]  # fmt: skip
