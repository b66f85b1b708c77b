"""The table of benchmarks: by name, the hub data set, and the template of its questions.

Decontamination looks there for what must not be trained on, evaluation for what is asked. Nothing heavy is imported.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Source(NamedTuple):
    """A hub data set, and the template of its questions."""

    data: str
    prompt: str


BENCHMARKS: Mapping[str, Source] = {
    "aime24": Source("HuggingFaceH4/aime_2024", "{problem}"),
    "aime25": Source("yentinglin/aime_2025", "{problem}"),
    "amc23": Source("math-ai/amc23::test", "{question}"),
    "arc_challenge": Source("allenai/ai2_arc:ARC-Challenge:test", "{question}"),
    "gpqa_diamond": Source("Idavidrein/gpqa:gpqa_diamond", "{Question}"),
    "gsm8k": Source("openai/gsm8k:main:test", "{question}"),
    "humaneval": Source("openai/openai_humaneval::test", "{prompt}"),
    "ifeval": Source("google/IFEval", "{prompt}"),
    "livecodebench": Source("livecodebench/code_generation_lite::test", "{question_content}"),
    "math500": Source("HuggingFaceH4/MATH-500::test", "{problem}"),
    "mbpp": Source("google-research-datasets/mbpp:full:test", "{text}"),
    "mmlu": Source("cais/mmlu:all:test", "{question}"),
    "mmlu_pro": Source("TIGER-Lab/MMLU-Pro::test", "{question}"),
    "olympiadbench": Source("Hothan/OlympiadBench:OE_TO_maths_en_COMP", "{question}"),
}


def benchmark_name(name: str) -> str:
    """Return a benchmark's name as the table spells it: AIME2024 is aime24, gpqa-diamond gpqa_diamond."""
    folded = name.lower().replace("-", "").replace("_", "").replace("aime20", "aime")
    return next((known for known in BENCHMARKS if known.replace("_", "") == folded), name)
