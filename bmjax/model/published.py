"""The sizes of published Qwen2 students, so that a training can be planned without a file of theirs at hand."""

import re

from bmjax.model.config import ModelConfig, Rope

# hidden, intermediate, layers, heads, kv heads, vocabulary: from the models' config.json; heads are of 64 or 128.
_SIZES = {
    "0.5": (896, 4864, 24, 14, 2, 151_936),
    "1.5": (1536, 8960, 28, 12, 2, 151_936),
    "3": (2048, 11_008, 36, 16, 2, 151_936),
    "7": (3584, 18_944, 28, 28, 4, 152_064),
    "14": (5120, 13_824, 48, 40, 8, 152_064),
    "32": (5120, 27_648, 64, 40, 8, 152_064),
    "72": (8192, 29_568, 80, 64, 8, 152_064),
}
_TIED = ("0.5", "1.5", "3")  # the distilled 1.5B, made from Qwen2.5-Math, is not
_SHORT = ("0.5", "3")  # 32,768 tokens, as all -Instruct; others are bases of 131,072
_DISTILLED = ("1.5", "7", "14", "32")
_NAME = re.compile(r"(?:(?:deepseek-ai/)?(DeepSeek-R1-Distill-Qwen)-|(?:Qwen/)?Qwen2\.5-)([\d.]+)B(-Instruct)?")


def known(name: str) -> ModelConfig | None:
    """The architecture of DeepSeek-R1-Distill-Qwen-*B and Qwen2.5-*B(-Instruct) by hub id; None for others."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in (_DISTILLED if match[1] else _SIZES):
        return None
    size, distilled = match[2], bool(match[1])
    hidden, intermediate, layers, heads, kv_heads, vocab = _SIZES[size]
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=hidden // heads, max_length=32_768 if match[3] or size in _SHORT else 131_072,
        tied=size in _TIED and not distilled,
        rope=Rope(theta=10_000.0 if distilled and size in ("1.5", "7") else 1_000_000.0),
    )  # fmt: skip
