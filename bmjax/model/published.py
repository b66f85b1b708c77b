"""The sizes of published Qwen2 models, as their config.json has them, so that `bmjax plan` needs no file of theirs."""

import re

from bmjax.model.config import ModelConfig, Rope

# Billions of parameters -> vocabulary, hidden, intermediate, layers, heads, key/value heads, head size.
_SIZES = {
    "0.5": (151_936, 896, 4864, 24, 14, 2, 64),
    "1.5": (151_936, 1536, 8960, 28, 12, 2, 128),
    "3": (151_936, 2048, 11_008, 36, 16, 2, 128),
    "7": (152_064, 3584, 18_944, 28, 28, 4, 128),
    "14": (152_064, 5120, 13_824, 48, 40, 8, 128),
    "32": (152_064, 5120, 27_648, 64, 40, 8, 128),
    "72": (152_064, 8192, 29_568, 80, 64, 8, 128),
}
_TIED = ("0.5", "1.5", "3")  # but not the distilled 1.5B, which was made from Qwen2.5-Math
_SHORT = ("0.5", "3")  # context of 32,768 tokens, as of all -Instruct; the other bases have 131,072
_DISTILLED = ("1.5", "7", "14", "32")
_NAME = re.compile(r"(?:(?:deepseek-ai/)?(DeepSeek-R1-Distill-Qwen)-|(?:Qwen/)?Qwen2\.5-)([\d.]+)B(-Instruct)?")


def known(name: str) -> ModelConfig | None:
    """Return the config of DeepSeek-R1-Distill-Qwen-*B or Qwen2.5-*B(-Instruct) by hub id; None for other names."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in (_DISTILLED if match[1] else _SIZES):
        return None
    size, distilled = match[2], bool(match[1])
    return ModelConfig(
        *_SIZES[size],
        max_length=32_768 if match[3] or size in _SHORT else 131_072,
        tied=size in _TIED and not distilled,
        rope=Rope(theta=10_000.0 if distilled and size in ("1.5", "7") else 1_000_000.0),
    )
