"""Chat templates by name, and the token that ends a turn."""

import pytest

from bmjax.chat.marks import end_of_turn
from bmjax.chat.template import chat_template
from bmjax.config import UserError


def test_a_template_by_name_file_or_tokenizer(tokenizer, tmp_path):
    assert chat_template(tokenizer, None) == tokenizer.chat_template == chat_template(tokenizer, "chatml")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert chat_template(tokenizer, str(file)) == "{{ messages }}"
    with pytest.raises(UserError, match="template: 'chatmal' is not one of alpaca, chatml, deepseek-r1"):
        chat_template(tokenizer, "chatmal")
    with pytest.raises(UserError, match=r"other.jinja: no such file"):
        chat_template(tokenizer, str(tmp_path / "other.jinja"))

    class Bare:
        chat_template = None

    with pytest.raises(UserError, match="no chat template; set template"):
        chat_template(Bare(), None)
    Bare.chat_template = {"default": "D", "tool_use": "T"}
    assert chat_template(Bare(), None) == "D"


def test_a_turn_ends_with_the_templates_token(tokenizer):
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    chatml = chat_template(other, "chatml")
    assert end_of_turn(other, chatml) == other.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(other, "{% for m in messages %}{{ m['content'] }}{% endfor %}") is None
    assert end_of_turn(other, "{{ raise_exception('no') }}") is None
