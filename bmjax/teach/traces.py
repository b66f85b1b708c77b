"""Traces that exist, of data sets and chats, read as if they had been collected: rows in, records out.

`select`, `judge` and the pipeline read traces through here. A row is a record of `collect`, or of one of FORMS; a row
with several answers gives several records. What makes no record is counted by reason and said in one line.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bmjax.chat.forms import ANSWERS, CHATS, REASONING, REASONING_SWITCHES, SYSTEM, read_conversation
from bmjax.chat.reasoning import has_tags, split_marked
from bmjax.config import UserError, first_line
from bmjax.io.rows import Row, read_source
from bmjax.log import Log, write_line
from bmjax.teach.adapters import mathematics, programs
from bmjax.teach.adapters.adapter import UNREADABLE, LeftOut, text_of
from bmjax.teach.adapters.reading import matching
from bmjax.teach.record import Record, record_id

R1 = "deepseek-ai/DeepSeek-R1"
# Teachers of data sets whose rows do not name one.
TEACHERS = {
    "open-thoughts/openthoughts-114k": R1, "bespokelabs/bespoke-stratos-17k": R1, "open-r1/mixture-of-thoughts": R1,
    "a-m-team/am-deepseek-r1-distilled-1.4m": R1, "open-thoughts/openthoughts2-1m": R1,
    "congliu/chinese-deepseek-r1-distill-data-110k": R1, "novasky-ai/sky-t1_data_17k": "Qwen/QwQ-32B-Preview",
    "open-thoughts/openthoughts3-1.2m": "Qwen/QwQ-32B",
}  # fmt: skip

_COLLECTED = ("id", "domain", "prompt", "response")
_QUESTIONS = ("prompt", "question", "problem", "instruction", "query")
_REFERENCES = ("reference", "ground_truth", "expected_answer", "reference_answer", "gold_answer")
_MODELS = ("teacher", "model", "model_name", "generator")
_ASKERS = ("user", "human", "prompter")
_LONGEST_REFERENCE = 200  # characters of a column `answer` that is a reference, and no answer in full

Answer = dict[str, Any]  # fields of a record: prompt, text or reasoning and response, and what else a row tells


@dataclass(frozen=True)
class Form:
    """A form of rows with answers.

    Attributes:
        name: in lines of the log and in the documentation.
        hub: data sets of this form, as the hub calls them.
        columns: alternatives; a row is of this form when it has all columns of one of them.
        answers: returns the answers of a row. Raises LeftOut, and UserError for a chat that cannot be read.
        domain: of its traces, where the rows do not name one.
        teacher: of its traces, where the rows do not name one.
    """

    name: str
    hub: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    answers: Callable[[Mapping[str, Any], str], list[Answer]]
    domain: str = ""
    teacher: str = ""

    def reads(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has the columns of this form."""
        return any(all(row.get(column) is not None for column in columns) for columns in self.columns)


def read_traces(
    sources: Iterable[str],
    key: str = "traces",
    domain: str | None = None,
    only: Mapping[str, Any] | None = None,
    log: Log = write_line,
) -> Iterator[Record]:
    """Yield the records of files or hub data sets; arguments as of `trace_rows`."""
    return (record for _, _, record in trace_rows(sources, key, domain, only, log))


def trace_rows(
    sources: Iterable[str],
    key: str = "traces",
    domain: str | None = None,
    only: Mapping[str, Any] | None = None,
    log: Log = write_line,
) -> Iterator[tuple[str, Mapping[str, Any], Record]]:
    """Yield (location, row, record) of every answer in files or hub data sets, in their order.

    Arguments:
        sources: names of rows. A torn last line, which a killed collector left, is skipped.
        key: the setting that named them, for errors and lines of the log.
        domain: of rows that name none and whose form has none.
        only: keep rows whose field is one of these values.
        log: takes a line for every form that is not `collect`'s own, and one for what was left out.

    Raises:
        UserError: names the row of a form that is not known, of a chat that cannot be read, and without a domain.
    """
    left_out: Counter[str] = Counter()
    said: set[str] = set()
    systems = 0
    try:
        for source in sources:
            rows: Iterator[Row] = read_source(str(source), key, log, growing=True)
            if only:
                rows = matching(rows, only, key, log)
            for location, row in rows:
                if is_record(row):
                    try:
                        yield location, row, Record.from_json(row)
                    except ValueError as error:
                        raise UserError(f"{location}: not a record: {error}") from None
                    continue
                form = form_of(row, location)
                if form.name not in said:
                    said.add(form.name)
                    log(f"{location}: traces of the form {form.name}")
                try:
                    answers = form.answers(row, location)
                except LeftOut as reason:
                    left_out[str(reason)] += 1
                    continue
                except UNREADABLE as error:
                    raise UserError(f"{location}: not a trace of the form {form.name}: {first_line(error)}") from None
                for sample, answer in enumerate(answers):
                    systems += "system" in answer
                    yield location, row, _record(form, row, location, answer, sample, domain, str(source))
    finally:
        if left_out:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in left_out.most_common())
            log(f"{key}: {left_out.total():,} rows make no trace: {reasons}")
        if systems:
            log(f"{key}: {systems:,} traces had a system turn, kept in `teacher` and not in the prompt")


def is_record(row: Mapping[str, Any]) -> bool:
    """Return whether a row has what makes a record of `collect`."""
    return all(row.get(column) is not None for column in _COLLECTED)


def form_of(row: Mapping[str, Any], location: str) -> Form:
    """Return the first form that reads a row. UserError for a row of none, which lists them."""
    form = next((form for form in FORMS if form.reads(row)), None)
    if form is None:
        columns = sorted(f"{name} (null)" if value is None else str(name) for name, value in row.items())
        names = ", ".join(columns[:8]) or "nothing"
        known = "; ".join(f"{form.name}: {', '.join(form.columns[0])}" for form in FORMS)
        raise UserError(
            f"{location}: no form of traces has columns {names}; expected those of `bmjax collect` "
            f"({', '.join(_COLLECTED)}), or {known}"
        )
    return form


def _record(
    form: Form, row: Mapping[str, Any], location: str, answer: Answer, sample: int, domain: str | None, source: str
) -> Record:
    """Return the record of an answer. Its id is made of all that it holds, so that copies have the same."""
    name = text_of(row, "domain") or answer.get("domain") or form.domain or domain
    if not name:
        raise UserError(f"{location}: the row names no domain; give key 'domain'")
    hub_id = source.partition(":")[0].partition("@")[0].lower()
    model = answer.get("model") or text_of(row, *_MODELS) or form.teacher or TEACHERS.get(hub_id, "")
    teacher = {"model": model} if model else {}
    if "text" in answer:
        reasoning, response, is_whole = split_marked(answer["text"])
    else:
        reasoning, response, is_whole = answer["reasoning"].strip(), answer["response"].strip(), True
    ending = "stop" if is_whole else "length"
    text = hashlib.sha256(f"{reasoning}\0{response}".encode("utf-8", "surrogatepass")).hexdigest()
    return Record(
        id=record_id(name, answer["prompt"], model, {"text": text}, sample),
        domain=name,
        prompt=answer["prompt"],
        response=response,
        reasoning=reasoning,
        reference=answer.get("reference"),
        source=answer.get("source") or text_of(row, "source", "source_type", "data_source") or source,
        finish_reason=answer.get("finish_reason") or text_of(row, "finish_reason") or ending,
        teacher=teacher | ({"system": answer["system"]} if "system" in answer else {}),
        usage=answer.get("usage", {}),
        verdict=answer.get("verdict", "unjudged"),
        verdict_by=answer.get("verdict_by", "none"),
    )


def _openr1(row: Mapping[str, Any], location: str) -> list[Answer]:
    """Read every generation, with what OpenR1 found out about it."""
    question = text_of(row, "problem")
    if not question:
        raise LeftOut("no question")
    answers = []
    for number, text in enumerate(row["generations"]):
        if not isinstance(text, str):
            continue
        answer: Answer = {"prompt": question, "text": text, "reference": _answer_of(row)}
        finish_reason, is_complete = (_item(row, name, number) for name in ("finish_reasons", "is_reasoning_complete"))
        if finish_reason or is_complete is False:
            answer["finish_reason"] = finish_reason or "length"
        checks = {name: _item(row, name, number) for name in ("correctness_math_verify", "correctness_llama")}
        stated = [(name, value) for name, value in checks.items() if isinstance(value, bool)]
        if stated:
            # Llama was asked where math-verify said no.
            name, right = next(((name, value) for name, value in stated if value), stated[-1])
            answer |= {"verdict": "right" if right else "wrong", "verdict_by": name}
        answers.append(answer)
    if not answers:
        raise LeftOut("no answer")
    return answers


def _openthoughts(row: Mapping[str, Any], location: str) -> list[Answer]:
    """Read the subset `metadata`: the answer in two columns, and tests or a solution."""
    question = text_of(row, "problem")
    if not question:
        raise LeftOut("no question")
    if starter := text_of(row, "starter_code"):
        question = f"{question}\n\n{starter}"
    answer: Answer = {"prompt": question, "reasoning": text_of(row, "deepseek_reasoning"),
              "response": text_of(row, "deepseek_solution")}  # fmt: skip
    try:
        if text_of(row, "domain") == "code":
            answer["reference"] = programs.contest_reference(row)
        else:
            answer["reference"] = mathematics.answer({"solution": row.get("ground_truth_solution")})
    except LeftOut:
        pass  # an answer without a reference is still a trace
    return [answer]


def _openthoughts_math(row: Mapping[str, Any], location: str) -> list[Answer]:
    """Read open-r1's checked part: R1's chat beside NuminaMath's solution."""
    answer = _chat({name: row.get(name) for name in ("conversations", "system")}, location)[0]
    count = row.get("generated_token_count")
    answer |= {"reference": _answer_of(row), "usage": {"completion_tokens": count} if isinstance(count, int) else {}}
    return [answer | _stated(row)]


def _s1k(row: Mapping[str, Any], location: str) -> list[Answer]:
    """Read the trajectories of s1K (Gemini's) and of s1K-1.1 (DeepSeek-R1's and Gemini's)."""
    question, domain = text_of(row, "question"), text_of(row, "cot_type")
    if not question:
        raise LeftOut("no question")
    gemini = "gemini-2.0-flash-thinking-exp"
    trajectories = row.get("thinking_trajectories") or []
    columns = [("deepseek_thinking_trajectory", "deepseek_attempt", "deepseek_grade", R1),
               ("gemini_thinking_trajectory", "gemini_attempt", "gemini_grade", gemini)]  # fmt: skip
    answers = [
        {"reasoning": text_of(row, thought), "response": text_of(row, attempt), "model": model}
        | ({"verdict": "right" if grade == "yes" else "wrong", "verdict_by": name} if grade in ("yes", "no") else {})
        for thought, attempt, name, model in columns
        if text_of(row, thought, attempt)
        for grade in [text_of(row, name).lower()]
    ]
    if not answers and trajectories:
        answers = [{"reasoning": str(trajectories[0]), "response": text_of(row, "attempt"), "model": gemini}]
    if not answers:
        raise LeftOut("no answer")
    shared = {"prompt": question, "reference": _answer_of(row)} | ({"domain": domain} if domain else {})
    return [shared | answer for answer in answers]


def _columns(row: Mapping[str, Any], location: str) -> list[Answer]:
    """Read a question and its answer, or answers, in columns of their own."""
    asked = row.get(next((name for name in _QUESTIONS if row.get(name) is not None), "input"))
    if isinstance(asked, list):  # a chat that another column answers
        shared = _messages({"messages": asked, "response": ""}, location)
        del shared["text"]
    else:
        parts = [asked, row.get("input")] if row.get("instruction") is asked else [asked]
        shared = {"prompt": "\n".join(str(part).strip() for part in parts if part)}
    if not shared["prompt"]:
        raise LeftOut("no question")
    shared |= _reference(row) | _stated(row)
    answer = next(row[name] for name in (*ANSWERS, "generations", "generation", "content") if row.get(name) is not None)
    if isinstance(answer, list):
        texts = [(number, text) for number, text in enumerate(answer) if isinstance(text, str)]
        if not texts:
            raise LeftOut("no answer")
        return [shared | {"text": text, "finish_reason": _item(row, "finish_reasons", n)} for n, text in texts]
    reasoning = text_of(row, *REASONING)
    if reasoning and reasoning.lower() not in REASONING_SWITCHES and not has_tags(str(answer)):
        return [shared | {"reasoning": reasoning, "response": str(answer)}]
    return [shared | {"text": str(answer)}]


def _chat(row: Mapping[str, Any], location: str) -> list[Answer]:
    """Read a chat of one question and one answer, in any form that training reads."""
    name = next((name for name in CHATS if row.get(name)), None)
    if name is None:
        raise LeftOut("no question")
    kept = {column: row[column] for column in (name, *REASONING, *SYSTEM, "tools") if row.get(column) is not None}
    # Dolphin-R1's chats end with the question, and have the answer in another column.
    last = row[name][-1] if isinstance(row[name], list) and isinstance(row[name][-1], Mapping) else {}
    apart = text_of(row, "answer", *ANSWERS) if str(last.get("role", last.get("from"))).lower() in _ASKERS else ""
    if apart:
        kept["response"], row = apart, {**row, "answer": None}
    return [_messages(kept, location) | _reference(row) | _stated(row) | _info(row[name])]


def _messages(row: Mapping[str, Any], location: str) -> Answer:
    """Return prompt, text and system turn of a chat. LeftOut for what is not one question and one answer."""
    conversation = read_conversation(row, location)
    roles = [message["role"] for message in conversation.messages]
    if conversation.tools or "tool" in roles or any("tool_calls" in message for message in conversation.messages):
        raise LeftOut("tools")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[-1:] != ["assistant"]:
        raise LeftOut("no answer")
    if turns != ["user", "assistant"]:
        raise LeftOut("several turns")
    *_, question, answer = (message["content"] for message in conversation.messages)
    if not question.strip():
        raise LeftOut("no question")
    system = conversation.messages[0]["content"].strip() if len(roles) > len(turns) else ""
    return {"prompt": question.strip(), "text": answer} | ({"system": system} if system else {})


def _info(turns: Any) -> Answer:
    """Return source and reference that AM-DeepSeek-R1-Distilled keeps in a question's `info`."""
    infos = [turn["info"] for turn in turns if isinstance(turn, Mapping) and isinstance(turn.get("info"), Mapping)]
    if not infos:
        return {}
    source = text_of(infos[0], "source")
    return ({"source": source} if source else {}) | _reference(infos[0])


def _reference(row: Mapping[str, Any]) -> Answer:
    """Return the reference that a row names, empty where it names none: tests, or a short answer."""
    for column in _REFERENCES:
        value = row.get(column)
        if value not in (None, "", [], {}):
            return {"reference": value}
    if any(row.get(column) for column in ("test_cases", "test_case", "input_output")):
        try:
            return {"reference": programs.contest_reference(row)}
        except LeftOut:
            return {}
    answer = text_of(row, "answer")
    return {"reference": answer} if answer and len(answer) <= _LONGEST_REFERENCE else {}


def _stated(row: Mapping[str, Any]) -> Answer:
    """Return the verdict that a row states, empty where it states none."""
    if row.get("verdict") in ("right", "wrong", "unjudged"):
        return {"verdict": row["verdict"], "verdict_by": text_of(row, "verdict_by") or "verdict"}
    column = next((name for name in ("correct", "is_correct") if isinstance(row.get(name), bool)), None)
    return {} if column is None else {"verdict": "right" if row[column] else "wrong", "verdict_by": column}


def _answer_of(row: Mapping[str, Any]) -> str | None:
    """Return the final answer of a row of mathematics, None where it has none that an answer can be compared with."""
    try:
        return mathematics.answer(row)
    except LeftOut:
        return None


def _item(row: Mapping[str, Any], column: str, number: int) -> Any:
    values = row.get(column)
    return values[number] if isinstance(values, list) and number < len(values) else None


FORMS = (
    Form(
        "openr1_math", ("open-r1/OpenR1-Math-220k",),
        (("problem", "generations", "correctness_math_verify"), ("problem", "generations", "is_reasoning_complete")),
        _openr1, "math", R1,
    ),
    Form(
        "openthoughts", ("open-thoughts/OpenThoughts-114k:metadata",),
        (("problem", "deepseek_reasoning", "deepseek_solution"),), _openthoughts, "", R1,
    ),
    Form(
        "openthoughts_math", ("open-r1/OpenThoughts-114k-math",),
        (("conversations", "problem", "solution", "correct"),), _openthoughts_math, "math", R1,
    ),
    Form(
        "s1k", ("simplescaling/s1K-1.1", "simplescaling/s1K"),
        (("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
         ("question", "thinking_trajectories", "attempt")),
        _s1k,
    ),
    Form(
        "chat", ("open-thoughts/OpenThoughts-114k", "bespokelabs/Bespoke-Stratos-17k", "open-r1/Mixture-of-Thoughts",
                 "cognitivecomputations/dolphin-r1:reasoning-deepseek", "a-m-team/AM-DeepSeek-R1-Distilled-1.4M"),
        tuple((name,) for name in CHATS), _chat,
    ),
    Form(
        "columns", ("Congliu/Chinese-DeepSeek-R1-Distill-data-110k",),
        (*((question, answer) for question in _QUESTIONS for answer in (*ANSWERS, "generations", "generation")),
         ("input", "reasoning_content", "content")),
        _columns,
    ),
)  # fmt: skip
