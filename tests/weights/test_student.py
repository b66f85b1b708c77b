"""A student opened by name: its template, its end tokens, and what is missing."""

import json
import shutil
from pathlib import Path

import pytest

from bmjax.chat.template import TEMPLATES
from bmjax.config import UserError
from bmjax.weights import student as students
from tests.conftest import byte_tokenizer

CHATML = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8").rstrip("\n")


@pytest.fixture
def directory(student: Path, tmp_path: Path) -> Path:
    """A copy of the small student that a test may change."""
    return Path(shutil.copytree(student, tmp_path / "student"))


def without_tokenizer(directory: Path) -> Path:
    for path in directory.glob("*token*"):
        path.unlink()
    return directory


def test_config_and_tokenizer_of_a_directory(student: Path) -> None:
    opened = students.open(student)
    assert opened.directory == student and opened.config.hidden_size == 32
    assert opened.hf_config["model_type"] == "qwen2"
    assert opened.tokenizer("1+1")["input_ids"]
    assert opened.template is None, "no purpose, no template"
    assert opened.end_tokens == opened.stored_end_tokens == (2,)


def test_null_is_the_tokenizers_own_template(student: Path) -> None:
    assert students.open(student, purpose="training").template == CHATML


def test_a_template_by_name(student: Path) -> None:
    opened = students.open(student, template="deepseek-r1", purpose="training")
    assert opened.template == (TEMPLATES / "deepseek-r1.jinja").read_text(encoding="utf-8").rstrip("\n")


def test_a_template_by_file(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}")
    opened = students.open(student, template=str(path), purpose="training")
    assert opened.template == path.read_text()
    assert opened.stored_end_tokens == (2,) and opened.end_tokens == (2, 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [("chatlm", "template: 'chatlm' is not one of .*chatml"), ("no.jinja", "no.jinja: ")],
)
def test_a_template_that_is_not_there(student: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        students.open(student, template=template, purpose="training")


def test_a_tokenizer_without_a_template(directory: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    with pytest.raises(UserError, match="the student's tokenizer has no chat template; set template: alpaca, chatml"):
        students.open(directory, purpose="training")
    assert students.open(directory, template="chatml", purpose="training").template == CHATML


def test_without_a_tokenizer(directory: Path) -> None:
    without_tokenizer(directory)
    assert students.open(directory).tokenizer is None
    with pytest.raises(UserError, match=r"student: no tokenizer files .*; training needs a tokenizer$"):
        students.open(directory, purpose="training")


def test_chatml_ends_turns_of_a_tokenizer_with_another_eos(directory: Path) -> None:
    """Its files stop at <|endoftext|>, the template's turns end with <|im_end|>: both end a generation."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(directory)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(values | {"eos_token_id": 0}))
    opened = students.open(directory, template="chatml", purpose="training")
    assert opened.stored_end_tokens == (0,) and opened.end_tokens == (0, 2)


def test_an_absent_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        students.open(tmp_path / "absent")
