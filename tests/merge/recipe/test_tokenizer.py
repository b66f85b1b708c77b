import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from bmjax.chat.template import TEMPLATE_NAMES
from bmjax.config import UserError
from bmjax.merge.recipe.tokenizer import chat_template, write_chat_template

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]
# The formats as their models document them.
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    "qwen": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    "deepseek-r1": "<s>S<｜User｜>A<｜Assistant｜>B<｜end▁of▁sentence｜><｜User｜>C<｜Assistant｜>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "A<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nC"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nA [/INST] B</s>[INST] C [/INST]",
    "alpaca": "S\n\n### Instruction:\nA\n\n### Response:\nB</s>\n\n### Instruction:\nC\n\n### Response:\n",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]A\n[|assistant|]B[|endofturn|]\n[|user|]C\n[|assistant|]",
}


@pytest.mark.parametrize("name", RENDERED)
def test_named_templates(name):
    marks = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    [text], _ = render_jinja_template([MESSAGES], chat_template=chat_template(name), **marks)
    assert text == RENDERED[name]


def test_every_named_template_is_tested():
    assert set(RENDERED) == set(TEMPLATE_NAMES)


def test_the_template_replaces_what_the_tokenizer_has(tmp_path):
    (tmp_path / "chat_template.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "eos_token": "é"}))
    write_chat_template(tmp_path, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat_template.jinja", "tokenizer_config.json"]
    assert (tmp_path / "chat_template.jinja").read_text() == "new"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "é"}
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="expected a JSON object"):
        write_chat_template(tmp_path, "new")
