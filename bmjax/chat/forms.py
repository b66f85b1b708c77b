"""A row of data as a conversation: the only module that knows the forms in which people keep chats.

A row's keys say which form it has; a key whose value is null counts as absent. All that a known key holds is carried
into the conversation, and what would be lost is refused by row and key. Training, evaluation, the pipeline and the
Python interface read rows through here; `bmjax.io.rows` reads the files.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bmjax.chat.reasoning import has_tags, join_think
from bmjax.config import UserError, nearest

Turns = Literal["all", "last"]
Message = dict[str, Any]  # role and content; tool_calls, tool_call_id and name where the row has them

CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction")
ANSWERS = ("response", "completion", "output")
REASONING = ("reasoning_content", "reasoning", "thinking")
SYSTEM = ("system", "system_prompt")
# Keys of a row that bmjax reads or has to refuse; all others describe the row (ids, sources, scores) and stay unread.
TEXT_KEYS = (*CHATS, *QUESTIONS, "input", "context", *ANSWERS, *SYSTEM, *REASONING)
UNSUPPORTED = {
    "images": "bmjax trains on text alone", "videos": "bmjax trains on text alone",
    "audios": "bmjax trains on text alone", "image": "bmjax trains on text alone",
    "video": "bmjax trains on text alone", "audio": "bmjax trains on text alone",
    "documents": "write them into the prompt", "chat_template_kwargs": "write the template's choice into FILE.jinja",
    "functions": "describe functions under 'tools'",
    "weight": "rows cannot be weighted, only turns, by 0 or 1", "train": "give it in the turns",
}  # fmt: skip

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "ai": "assistant",
    "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "assistant",
}  # fmt: skip
TURN_KEYS = ("role", "from", "content", "value", *REASONING, "tool_calls", "function_call", "tool_call_id", "name",
             "weight", "train")  # fmt: skip
# They describe a turn and say nothing of its text.
TURN_LABELS = ("id", "index", "timestamp", "created_at", "turn_identifier", "language", "toxic", "redacted", "country",
               "state", "hashed_ip", "header", "markdown", "info")  # fmt: skip
# Values of a column called `reasoning` that say whether the model thinks, not what.
REASONING_SWITCHES = ("on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high")

KNOWN_FORMS = (
    "messages, conversations or conversation (a list of turns), prompt with response or completion, or instruction "
    "with output"
)


@dataclass(frozen=True)
class Conversation:
    """Messages in the form of chat templates, and which of them are learned.

    Attributes:
        messages: each with `role` (system, user, assistant or tool) and `content`, a text. A turn's reasoning is in
            its content, between <think> and </think>.
        targets: for each message, whether it is learned; only the assistant's are.
        tools: descriptions of functions, for templates that show them; None where the row has none.
        remarks: what the reader decided about the row, one short text each.
    """

    messages: tuple[Message, ...]
    targets: tuple[bool, ...]
    tools: list[Any] | None = None
    remarks: tuple[str, ...] = ()


def read_conversation(
    row: Mapping[str, Any], location: str, turns: Turns = "all", ignore: Collection[str] = ()
) -> Conversation:
    """Read a row of any known form.

    Forms: a list of turns under `messages`, `conversations` or `conversation`, each turn with role/content or
    from/value; `prompt` with `response` or `completion`, texts or lists of messages; `instruction`, `input`, `output`.
    Beside them: `system`, `tools`, and the answer's `reasoning_content`, `reasoning` or `thinking`.

    Arguments:
        row, location: the row and where it stands, which begins every error.
        turns: learn all answers, or the last one only.
        ignore: keys of rows and turns to read as if they were absent.

    Raises:
        UserError: for a row of another form, and for whatever a known key holds that a conversation cannot carry.
    """
    return _Reader(location, frozenset(ignore)).read(row, turns)


@dataclass(frozen=True)
class _Turn:
    message: Message
    target: bool


@dataclass(frozen=True)
class _Reader:
    """Reads one row; holds what every step needs for its errors."""

    location: str
    ignore: frozenset[str]

    def read(self, row: Mapping[str, Any], turns: Turns) -> Conversation:
        fields = self._present(row)
        for key, advice in UNSUPPORTED.items():
            if fields.get(key) not in (None, [], 1, True):
                raise self._error(f"'{key}' would be lost; {advice}, or name the key in 'ignore'")
        if fields.get("label") is False:
            raise self._error("'label' is false: a rejected answer, which cannot be learned; remove such rows")
        for key in REASONING:
            if str(fields.get(key, "")).strip().lower() in REASONING_SWITCHES:
                del fields[key]

        # The turns, from the first form that the row has: a chat, or a question.
        chat = next((key for key in CHATS if fields.get(key)), None)
        fields = {key: value for key, value in fields.items() if value or key not in CHATS}
        question = next((key for key in QUESTIONS if key in fields), None)
        answer = next((key for key in ANSWERS if key in fields), None)
        if chat is not None:
            conversation = self._turns(fields[chat], chat)
            if answer is not None and not (conversation and conversation[-1].message["role"] == "assistant"):
                conversation += self._answer(fields, answer)  # the chat asks, another column answers
        elif question is not None and answer is not None:
            conversation = self._question(fields, question) + self._answer(fields, answer)
        else:
            names = ", ".join(sorted(map(str, row))[:8]) or "nothing"
            raise self._error(f"expected {KNOWN_FORMS}; found {names}; other columns need a mapping: "
                              "prompt: '{COLUMN}', response: '{COLUMN}'")  # fmt: skip
        conversation = self._add_system(fields, conversation)
        conversation = self._add_reasoning(fields, conversation)
        self._check_carried(fields, conversation)
        if fields.get("history") and (chat is not None or not isinstance(fields.get(question or "", ""), str)):
            raise self._error("'history' would be lost beside a list of turns; put it in, or name it in 'ignore'")

        # Which turns are learned.
        remarks = []
        roles = [turn.message["role"] for turn in conversation]
        asked = next((i for i, role in enumerate(roles) if role in ("user", "tool")), len(roles))
        if "assistant" in roles[:asked]:
            remarks.append("begins with the assistant's turn, which answers nothing: context, not learned")
        targets = [turn.target and index > asked for index, turn in enumerate(conversation)]
        if turns == "last":
            last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
            targets = [target and index == last for index, target in enumerate(targets)]
        if roles and roles[-1] != "assistant" and any(targets):
            remarks.append("ends with a turn that the assistant does not answer: left out")
        return Conversation(
            tuple(turn.message for turn in conversation), tuple(targets), self._tools(fields), tuple(remarks)
        )

    def _error(self, text: str) -> UserError:
        return UserError(f"{self.location}: {text}")

    def _present(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        # NaN is what pandas writes for a cell without a value.
        return {k: v for k, v in mapping.items() if v is not None and v == v and k not in self.ignore}

    def _question(self, fields: Mapping[str, Any], key: str) -> list[_Turn]:
        """Read what is asked: a text, TRL's list of messages, or an instruction with its input and history."""
        value = fields[key]
        if key == "prompt" and not isinstance(value, str):
            return [_Turn(turn.message, False) for turn in self._turns(value, key)]
        turns: list[_Turn] = []
        history = fields.get("history") or ()
        if isinstance(history, str):
            history = self._json(history, "history")
        if not isinstance(history, (list, tuple)) or not all(
            isinstance(p, (list, tuple)) and len(p) == 2 for p in history
        ):
            raise self._error("'history' must be a list of pairs, a question and an answer each")
        for asked, answered in history:
            turns += [_Turn(self._message("user", asked, "history"), False),
                      _Turn(self._message("assistant", answered, "history"), True)]  # fmt: skip
        parts = [self._text(fields[part], part) for part in (key, "input", "context") if fields.get(part, "") != ""]
        return [*turns, _Turn(self._message("user", "\n".join(parts), key), False)]

    def _answer(self, fields: Mapping[str, Any], key: str) -> list[_Turn]:
        value = fields[key]
        if (
            isinstance(value, list)
            and value
            and all(isinstance(turn, Mapping) and "type" not in turn for turn in value)
        ):
            return self._turns(value, key)
        return [_Turn(self._message("assistant", value, key), True)]

    def _message(self, role: str, content: Any, key: str) -> Message:
        return {"role": role, "content": self._text(content, key)}

    def _turns(self, value: Any, key: str) -> list[_Turn]:
        if isinstance(value, str) and value.lstrip().startswith("["):  # as a table of texts holds it
            value = self._json(value, key)
        if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
            raise self._error(f"'{key}' must be a list of turns, each with role and content, or from and value")
        return [self._turn(turn, f"{key}, turn {number}") for number, turn in enumerate(value, 1)]

    def _turn(self, raw: Mapping[str, Any], label: str) -> _Turn:
        """Read a turn. Its own keys decide, whatever the column is called."""
        turn = self._present(raw)
        unknown = [key for key in turn if key not in (*TURN_KEYS, *TURN_LABELS) and turn[key] not in ("", [], {})]
        if unknown:
            names = ", ".join(repr(key) for key in unknown)
            hint = nearest(unknown[0], TURN_KEYS) if len(unknown) == 1 else ""
            verb = "is" if len(unknown) == 1 else "are"
            raise self._error(f"{label}: {names} {verb} not known and would be lost{hint}; remove it, or read it as "
                              f"absent: ignore: [{', '.join(unknown)}]")  # fmt: skip
        name = self._either(turn, ("role", "from"), label)
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(dict.fromkeys(ROLES.values()))
            raise self._error(f"{label}: the role is {name!r}, expected one of {known}")
        content = self._either(turn, ("content", "value"), label)
        if name == "function_call":  # the whole turn is a call
            turn, content = {**turn, "function_call": content}, None
        is_data = isinstance(content, Mapping) or (isinstance(content, list) and not all(map(_is_part, content)))
        if role == "tool" and is_data:  # a result that is data goes on as JSON
            content = json.dumps(content, ensure_ascii=False)
        calls = self._calls(turn, label)
        if content is None and not calls:
            raise self._error(f"{label}: no content (nor value); expected the text of the turn")
        text, thoughts = self._content(content, label)
        reasoning = self._either(turn, REASONING, label)
        if thoughts and reasoning not in (None, "", thoughts):
            raise self._error(f"{label}: the content's reasoning and '{self._first(turn, REASONING)}' differ")
        if role != "assistant" and (reasoning or thoughts or calls):
            raise self._error(f"{label}: only the assistant's turns can have reasoning or tool calls")
        message: Message = {"role": role, "content": self._think(reasoning or thoughts, text, label)}
        if calls:
            message["tool_calls"] = calls
        message |= {key: turn[key] for key in ("tool_call_id", "name") if key in turn}
        return _Turn(message, self._is_target(turn, role, label))

    def _is_target(self, turn: Mapping[str, Any], role: str, label: str) -> bool:
        flags = {key: turn[key] for key in ("weight", "train") if key in turn}
        for key, flag in flags.items():
            if isinstance(flag, str):
                flag = flags[key] = {"0": 0, "1": 1, "false": 0, "true": 1}.get(flag.strip().lower(), flag)
            if flag not in (0, 1):
                raise self._error(f"{label}: {key}: {flag!r}; expected 0 or 1 (false or true)")
            if flag and role != "assistant":
                raise self._error(
                    f"{label}: {key}: {flag!r} for a turn of role {role}; only the assistant's are learned"
                )
        if len(set(map(bool, flags.values()))) > 1:
            raise self._error(f"{label}: weight {flags['weight']!r} and train {flags['train']!r} contradict each other")
        return role == "assistant" and all(flags.values())

    def _content(self, content: Any, label: str) -> tuple[str, str]:
        """Return (text, reasoning) of a content: a text, or a list of parts."""
        if content is None:
            return "", ""
        if isinstance(content, Mapping):
            content = [content]
        if not isinstance(content, list):
            return self._text(content, label), ""
        texts: dict[str, list[str]] = {"text": [], "thinking": []}
        for part in content:
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            fields = self._present(part) if isinstance(part, Mapping) else {}
            kind = str(fields.get("type", "text"))
            kind = {"output_text": "text", "input_text": "text", "reasoning": "thinking"}.get(kind, kind)
            text = next((fields[key] for key in ("text", "thinking", "reasoning") if key in fields), None)
            if kind not in texts or not isinstance(text, str):
                raise self._error(f"{label}: a part of the content is of type {kind!r}; expected parts of type text")
            texts[kind].append(text)
        return "".join(texts["text"]), "".join(texts["thinking"])

    def _text(self, value: Any, label: str) -> str:
        if isinstance(value, list):
            text, thoughts = self._content(value, label)
            return self._think(thoughts, text, label)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self._error(f"{label}: expected text, found {type(value).__name__}")
        return value

    def _think(self, reasoning: Any, text: str, label: str) -> str:
        """Put reasoning before the text, as the teacher wrote it."""
        if not reasoning:
            return text
        if not isinstance(reasoning, str):
            raise self._error(f"{label}: the reasoning must be text, found {type(reasoning).__name__}")
        if has_tags(text):
            if " ".join(reasoning.split()) in " ".join(text.split()):
                return text
            raise self._error(f"{label}: the text holds <think> itself, and other reasoning stands beside it")
        return join_think(reasoning, text)

    def _calls(self, turn: Mapping[str, Any], label: str) -> list[Message]:
        """Return the calls of tools in the form of chat templates, arguments as dictionaries."""
        calls: list[Any] = []
        for key in ("tool_calls", "function_call"):
            value = turn.get(key) or []
            value = self._json(value, f"{label}: {key}") if isinstance(value, str) else value
            calls += value if isinstance(value, list) else [value]
        tidy = []
        for call in calls:
            call = self._json(call, f"{label}: tool_calls") if isinstance(call, str) else call
            function = (call.get("function") or call) if isinstance(call, Mapping) else {}
            function = function if isinstance(function, Mapping) else {}
            arguments = function.get("arguments")
            arguments = {} if arguments is None else arguments
            if isinstance(arguments, str):
                arguments = self._json(arguments, f"{label}: arguments of a tool call") if arguments.strip() else {}
            if not isinstance(function.get("name"), str):
                raise self._error(f"{label}: a tool call needs a function's name and arguments")
            identity = {"id": call["id"]} if call.get("id") is not None else {}
            tidy.append(
                {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}
            )
        return tidy

    def _tools(self, fields: Mapping[str, Any]) -> list[Any] | None:
        tools = fields.get("tools")
        if isinstance(tools, str):
            tools = self._json(tools, "tools") if tools.strip() else []
        elif isinstance(tools, list):
            tools = [self._json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
            raise self._error("'tools' must be a list of descriptions of functions")
        return tools or None

    def _add_system(self, fields: Mapping[str, Any], conversation: list[_Turn]) -> list[_Turn]:
        key = self._first(fields, SYSTEM)
        text = self._either(fields, SYSTEM, "row")
        if text in (None, "", []):
            return conversation
        message = self._message("system", text, str(key))
        if conversation and conversation[0].message["role"] == "system":
            if not conversation[0].message["content"].strip():
                return [_Turn(message, False), *conversation[1:]]
            if conversation[0].message["content"].strip() != message["content"].strip():
                raise self._error(f"'{key}' and the system turn of the conversation differ; remove one of them")
            return conversation
        return [_Turn(message, False), *conversation]

    def _add_reasoning(self, fields: Mapping[str, Any], conversation: list[_Turn]) -> list[_Turn]:
        """Give the row's reasoning to its answer; where several turns answer, it must be in one of them already."""
        reasoning = self._either(fields, REASONING, "row")
        answers = [i for i, turn in enumerate(conversation) if turn.message["role"] == "assistant"]
        if not reasoning or len(answers) != 1:
            return conversation
        turn = conversation[answers[0]]
        content = self._think(reasoning, turn.message["content"], str(self._first(fields, REASONING)))
        return [_Turn({**t.message, "content": content}, t.target) if t is turn else t for t in conversation]

    def _check_carried(self, fields: Mapping[str, Any], conversation: Iterable[_Turn]) -> None:
        """Raise UserError for a known key whose text is nowhere in the conversation."""
        contents = [" ".join(turn.message["content"].split()) for turn in conversation]
        for key in TEXT_KEYS:
            if key not in fields:
                continue
            if key in CHATS or (isinstance(fields[key], list) and key in ("prompt", *ANSWERS)):
                texts = [turn.message["content"] for turn in self._turns(fields[key], key)]
            else:
                texts = [self._text(fields[key], key)]
            if not all(any(" ".join(text.split()) in content for content in contents) for text in texts):
                if key in REASONING and not any(turn.message["role"] == "assistant" for turn in conversation):
                    raise self._error(f"'{key}' belongs to an answer, and the row has none; known forms: {KNOWN_FORMS}")
                raise self._error(
                    f"'{key}' is not part of the conversation that the other keys make, and would be lost; "
                    "remove it, or name it in 'ignore'"
                )

    def _first(self, fields: Mapping[str, Any], keys: Iterable[str]) -> str | None:
        return next((key for key in keys if key in fields), None)

    def _either(self, fields: Mapping[str, Any], keys: Iterable[str], label: str) -> Any:
        """Return the value of the only key that is there; several have to agree."""
        present = [key for key in keys if key in fields]
        if any(fields[key] != fields[present[0]] for key in present[1:]):
            raise self._error(f"{label}: {' and '.join(repr(key) for key in present)} differ; remove one of them")
        return fields[present[0]] if present else None

    def _json(self, text: str, label: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(f"{label}: not valid JSON: {error}") from None


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and "type" in value)
