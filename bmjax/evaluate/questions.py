"""The questions of a task as they are asked: each sample's prompt, its reference, and the order of its options."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmjax.config import UserError
from bmjax.evaluate import livecodebench_release
from bmjax.evaluate.livecodebench_form import has_its_tests, is_iso_date
from bmjax.evaluate.settings import EvalSettings
from bmjax.log import Log
from bmjax.teach.adapters import choice
from bmjax.teach.adapters.adapter import UNREADABLE, LeftOut
from bmjax.teach.adapters.livecodebench import unpacked
from bmjax.teach.judges.choice import LETTERS
from bmjax.teach.judges.judge import choose, judge
from bmjax.teach.problems import Problem, read_unchecked
from bmjax.teach.record import RecordIds, normalise_prompt

# Columns that name a row, the first that is there.
_NAMES = ("question_id", "unique_id", "task_id", "Record ID", "ID", "id", "name")


@dataclass(frozen=True)
class Question:
    """A problem of a task.

    Attributes:
        problem: what it is called in samples: the row's own name, else a hash of its prompt.
        number: its place in the task.
        prompt: with the options, where it has some, in the row's order.
        reference: as the judge takes it; tests of LiveCodeBench stay packed.
        judge: the name of the judge.
        location: the row, for errors.
        options: the texts of the options; empty where they are not known.
        letters: the right ones.
        row: the row.
    """

    problem: str
    number: int
    prompt: str
    reference: Any
    judge: str
    location: str
    options: tuple[str, ...]
    letters: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """One sample of a question: what the model is asked, and with what its answer is compared.

    id: 64 hex digits of what was asked. order: of the options, as their numbers in the row; empty: the row's order.
    """

    id: str
    question: Question
    sample: int
    prompt: str
    reference: Any
    order: tuple[int, ...] = ()


def read_questions(settings: EvalSettings, name: str, log: Log) -> list[Question]:
    """Read the questions of a task and check that their answers can be judged.

    Raises:
        UserError: naming the row that makes no question, and where not a single answer could be judged.
    """
    task = settings.tasks[name]
    if task.questions is None:
        return []
    data, key = task.questions, f"tasks.{name}.questions"
    if task.release is not None:
        data = livecodebench_release.questions_of(data, task.release, f"tasks.{name}.release")
    problems = list(read_unchecked(data, key, task, log))
    names = _names(problems)
    questions, reasons = [], Counter[str]()
    for number, (problem, called) in enumerate(zip(problems, names, strict=True)):
        try:
            options, letters = _options(problem)
            reference = _with_options(problem.reference, options, letters)
            # The verdict on an empty answer shows whether any can be judged.
            whole = unpacked(reference)
            judge_name = task.judge or problem.judge or choose(whole)
            verdict = judge(whole, "", judge_name, settings.run_programs, None, settings.program_seconds)
        except UserError as error:
            raise UserError(f"{problem.location}: {error}") from None
        if verdict.verdict == "unjudged":
            reasons[verdict.reason] += 1
        if task.lcb_compat and not has_its_tests(whole):
            raise UserError(
                f"{problem.location}: lcb_compat: its tests are no inputs with outputs, as LiveCodeBench's are"
            )
        if task.lcb_compat and not is_iso_date(day := problem.row.get("contest_date")):
            raise UserError(
                f"{problem.location}: lcb_compat: contest_date is {day!r}; LiveCodeBench's tools read a date there, "
                "such as 2024-08-31"
            )
        if task.shuffle_options and not options:
            raise UserError(
                f"{problem.location}: shuffle_options: its options are not known; use an adapter of choices"
            )
        questions.append(
            Question(
                called, number, problem.prompt, reference, judge_name, problem.location, options, letters, problem.row
            )
        )
    if reasons.total() == len(questions):
        raise UserError(
            f"tasks.{name}: none of {len(questions)} answers can be judged: {reasons.most_common(1)[0][0]}; "
            "check keys 'reference' and 'judge' of the task, and 'run_programs'"
        )
    return questions


def samples_of(
    settings: EvalSettings, name: str, questions: Sequence[Question], model: str, sampling: Mapping[str, Any]
) -> list[Asked]:
    """Return every sample of a task, a question's one after the other.

    model, sampling: what decides an answer besides the prompt and the sample's number; part of the ids.
    """
    ids = RecordIds(name, model, sampling)
    seed, count = settings.of_task(name, "seed") or 0, settings.of_task(name, "samples")
    is_shuffled = settings.tasks[name].shuffle_options
    prompts = Counter[str]()
    asked = []
    for question in questions:
        prompts[normalise_prompt(question.prompt)] += 1
        again = prompts[normalise_prompt(question.prompt)]  # a question that stands in the data twice counts twice
        of_again = ids if again == 1 else RecordIds(name, model, {**sampling, "again": again})
        for sample in range(count):
            order: tuple[int, ...] = ()
            prompt, reference = question.prompt, question.reference
            if is_shuffled:
                order = _order(len(question.options), seed, question.problem, sample)
                prompt, reference = _reordered(question, order)
            identity = of_again.of(prompt, [sample])[0].hex()
            asked.append(Asked(identity, question, sample, prompt, reference, order))
    return asked


def _names(problems: Sequence[Problem]) -> list[str]:
    """Return a name of each problem: that of its row where the rows have different ones, else a hash of its prompt."""
    for column in _NAMES:
        names = [str(problem.row.get(column, "")) for problem in problems]
        if all(names) and len(set(names)) == len(names):
            return names
    seen, names = Counter[str](), []
    for problem in problems:
        name = hashlib.sha256(normalise_prompt(problem.prompt).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names


def _options(problem: Problem) -> tuple[tuple[str, ...], str]:
    """Return the options that a problem's row lists and the right letters; nothing of other problems."""
    if problem.judge != "choice" or not problem.question:
        return (), ""
    try:
        options, letters = choice.options(problem.row), choice.reference(problem.row)
    except (LeftOut, *UNREADABLE):
        return (), ""
    block = "\n".join(choice.listed(options))
    return (tuple(options), letters) if problem.prompt.count(block) == 1 else ((), "")


def _with_options(reference: Any, options: Sequence[str], letters: str) -> Any:
    """Return a reference that holds the options, too, so that an answer in an option's words counts.

    Options that are letters themselves could be taken for the letters of others.
    """
    if not 2 <= len(options) <= len(LETTERS) or any(len(text.strip(" .()$")) < 2 for text in options):
        return reference
    return {"answer": letters, "options": list(options)}


def _order(count: int, seed: int, problem: str, sample: int) -> tuple[int, ...]:
    """Return an order of options that seed, problem and sample decide, the same on every machine."""
    start = f"{seed}\0{problem}\0{sample}\0".encode("utf-8", "surrogatepass")
    return tuple(sorted(range(count), key=lambda at: hashlib.sha256(start + str(at).encode()).digest()))


def _reordered(question: Question, order: Sequence[int]) -> tuple[str, Any]:
    """Return prompt and reference of a question with its options in another order."""
    options = [question.options[at] for at in order]
    letters = "".join(sorted(LETTERS[order.index(LETTERS.index(letter))] for letter in question.letters))
    before, after = ("\n".join(choice.listed(texts)) for texts in (question.options, options))
    return question.prompt.replace(before, after), _with_options(letters, options, letters)
