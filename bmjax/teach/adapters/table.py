"""The table of adapters: what each data set is called, how its rows are recognised, and how they become problems.

`adapter: auto` takes the first that reads a row, so the more particular forms stand first.
"""

from typing import Any

from bmjax.teach.adapters import choice, livecodebench, mathematics, programs
from bmjax.teach.adapters.adapter import Adapter, Row, text_of

AUTO = "auto"


def _is_code(row: Row) -> bool:
    return text_of(row, "domain") == "code"


def _openthoughts_prompt(row: Row) -> str:
    return programs.contest_prompt(row) if _is_code(row) else mathematics.problem(row)


def _openthoughts_reference(row: Row) -> Any:
    """Return the tests, or the final answer of the solution that OpenThoughts compares with."""
    if _is_code(row):
        return programs.contest_reference(row)
    return mathematics.answer({"solution": row.get("ground_truth_solution")})


def _is_small_number(row: Row) -> bool:
    """Return whether the answer is an integer from 0 to 999, as AIME's are."""
    answer = text_of(row, "answer", "Answer")
    return answer.isdecimal() and int(answer) <= 999


_ADAPTERS = (
    Adapter(
        "bmjax", (), (("prompt", "reference"),), "",
        lambda row: str(row["prompt"]), lambda row: row["reference"], lambda row: "",
        lambda row: text_of(row, "judge") or None,
    ),
    Adapter(
        "openthoughts", ("open-thoughts/OpenThoughts-114k:metadata",),
        (("problem", "deepseek_solution", "ground_truth_solution", "domain"),), "",
        _openthoughts_prompt, _openthoughts_reference,
        lambda row: programs.contest_instruction(row) if _is_code(row) else mathematics.BOXED,
        lambda row: "tests" if _is_code(row) else None,
    ),
    Adapter(
        "openr1_math", ("open-r1/OpenR1-Math-220k",), (("problem", "generations"),), "math",
        mathematics.competition_problem, mathematics.answer, mathematics.instruction, mathematics.competition_judge,
    ),
    Adapter(
        "gpqa", ("Idavidrein/gpqa:gpqa_diamond",), (("Question", "Correct Answer", "Incorrect Answer 1"),), "science",
        choice.prompt, choice.reference, choice.instruction, choice.as_choice, ("Subdomain", "High-level domain"),
    ),
    Adapter(
        "agieval", ("dmayhem93/agieval-gaokao-physics",),
        (("passage", "question", "options", "label"), ("query", "choices", "gold")), "science",
        choice.prompt, choice.reference, choice.instruction, choice.agieval_judge,
    ),
    Adapter(
        "arc", ("allenai/ai2_arc:ARC-Challenge", "allenai/openbookqa", "tau/commonsense_qa"),
        (("question", "choices", "answerKey"), ("question_stem", "choices", "answerKey")), "science",
        choice.prompt, choice.reference, choice.instruction, choice.as_choice,
    ),
    Adapter(
        "mmlu_pro", ("TIGER-Lab/MMLU-Pro",), (("question", "options", "answer", "answer_index"),), "science",
        choice.prompt, choice.reference, choice.instruction, choice.as_choice, ("category", "src"),
    ),
    Adapter(
        "mmlu", ("cais/mmlu:all",), (("question", "choices", "answer"), ("question", "options", "answer")), "science",
        choice.prompt, choice.reference, choice.instruction, choice.as_choice, ("subject",),
    ),
    Adapter(
        "humaneval", ("openai/openai_humaneval", "evalplus/humanevalplus"), (("prompt", "test", "entry_point"),),
        "code",
        programs.humaneval_prompt, programs.humaneval_reference, programs.function_instruction, programs.as_tests, (),
    ),
    Adapter(
        "mbpp", ("google-research-datasets/mbpp:full", "google-research-datasets/mbpp:sanitized"),
        (("text", "test_list"), ("prompt", "test_list")), "code",
        programs.mbpp_prompt, programs.mbpp_reference, programs.function_instruction, programs.as_tests,
        ("source_file",),
    ),
    Adapter(
        "livecodebench", ("livecodebench/code_generation_lite::test",),
        (("question_content", "public_test_cases", "private_test_cases"),), "code",
        livecodebench.prompt, livecodebench.reference, livecodebench.instruction, programs.as_tests, ("platform",),
    ),
    Adapter(
        "taco", ("BAAI/TACO",), (("question", "input_output", "raw_tags"),), "code",
        programs.contest_prompt, programs.contest_reference, programs.contest_instruction, programs.as_tests,
    ),
    Adapter(
        "apps", ("codeparrot/apps",), (("question", "input_output"),), "code",
        programs.contest_prompt, programs.contest_reference, programs.contest_instruction, programs.as_tests, ("url",),
    ),
    Adapter(
        "code_contests", ("deepmind/code_contests", "agentica-org/DeepCoder-Preview-Dataset"),
        (("description", "public_tests"), ("problem", "tests")), "code",
        programs.contest_prompt, programs.contest_reference, programs.contest_instruction, programs.as_tests,
    ),
    Adapter(
        "codeforces", ("open-r1/codeforces",), (("description", "official_tests"), ("problem", "tests")), "code",
        programs.contest_prompt, programs.contest_reference, programs.contest_instruction, programs.as_tests,
        ("contest_name",),
    ),
    Adapter(
        "verl", ("BytedTsinghua-SIA/DAPO-Math-17k",), (("prompt", "reward_model"),), "math",
        mathematics.verl_prompt, mathematics.verl_reference, mathematics.instruction, source=("data_source",),
    ),
    Adapter(
        "s1k", ("simplescaling/s1K", "simplescaling/s1K-1.1", "simplescaling/data_ablation_full59K"),
        (("question", "solution", "cot_type", "source_type"),), "",
        mathematics.problem, mathematics.answer, mathematics.instruction, source=("source_type",),
    ),
    Adapter(
        "limo", ("GAIR/LIMO",), (("question", "solution", "answer"),), "math",
        mathematics.problem, mathematics.answer, mathematics.instruction, mathematics.as_mathematics,
    ),
    Adapter(
        "gsm8k", ("openai/gsm8k:main",), (("question", "answer"),), "math",
        mathematics.problem, mathematics.gsm8k_reference, mathematics.instruction, mathematics.as_mathematics,
        fits=lambda row: "####" in text_of(row, "answer"),
    ),
    Adapter(
        "numina_math", ("AI-MO/NuminaMath-CoT", "AI-MO/NuminaMath-1.5"), (("problem", "solution", "source"),), "math",
        mathematics.competition_problem, mathematics.answer, mathematics.instruction,
        mathematics.competition_judge,
    ),
    Adapter(
        "aime", ("Maxwell-Jia/AIME_2024",), (("prompt", "answer"), ("Problem", "Answer")), "math",
        mathematics.problem, mathematics.answer, mathematics.instruction, mathematics.as_mathematics, ("ID",),
        fits=_is_small_number,
    ),
    Adapter(
        "math", ("HuggingFaceH4/MATH-500", "EleutherAI/hendrycks_math", "agentica-org/DeepScaleR-Preview-Dataset"),
        (("problem", "answer"), ("problem", "solution")), "math",
        mathematics.problem, mathematics.answer, mathematics.instruction, mathematics.as_mathematics,
        ("subject", "type"),
    ),
)  # fmt: skip
ADAPTERS = {adapter.name: adapter for adapter in _ADAPTERS}
