"""`bmjax chat`: a conversation in the terminal, with a model computed here or behind an OpenAI-compatible endpoint.

Answers are shown as they come, thinking dimmed. Ctrl-C stops an answer, Ctrl-D ends, /reset begins anew. Where standard
input is no terminal, every line is asked on its own and answered by one line.
"""

import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TextIO

import httpx

from bmjax.chat.openai import ChatMessage, ChatRequest
from bmjax.chat.reasoning import THINKING_TAGS, ThinkSplitter, opens_thought, split_answer
from bmjax.chat.replies import Events, NoCompletion, ReplyError, read_error
from bmjax.chat.template import render_prompt
from bmjax.config import UserError, first_line
from bmjax.generate.settings import ChatSettings
from bmjax.log import write_line
from bmjax.urls import Address

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CUT = " (cut: the answer reached its longest)"
HELP = "Ctrl-C stops an answer, Ctrl-D ends; /reset begins a new conversation"

Turns = list[dict[str, str]]
Pieces = Generator[tuple[str, str], None, None]
Ask = Callable[[Turns], Pieces]  # from the turns so far to (reasoning, response), piece by piece


def chat(settings: ChatSettings, source: TextIO = sys.stdin, target: TextIO = sys.stdout) -> None:
    """Talk to a model until the end of `source`. UserError for one that cannot be loaded or reached."""
    with _endpoint(settings) if settings.base_url else _engine(settings) as ask:
        if source.isatty():
            _converse(ask, settings, target)
        else:
            _answer_lines(ask, settings, source, target)


def _converse(ask: Ask, settings: ChatSettings, target: TextIO) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() edits and remembers lines with it
    write_line(HELP)
    turns = _begin(settings)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            target.write("\n")
            return
        except KeyboardInterrupt:
            target.write("\n")
            continue
        if text == "/reset":
            turns = _begin(settings)
            write_line("a new conversation")
        elif text.startswith("/"):
            write_line(f"{text.split()[0]}: no such command. {HELP}")
        elif text:
            turns.append({"role": "user", "content": text})
            try:
                turns.append({"role": "assistant", "content": _show(ask, turns, target)})
            except UserError as error:  # the conversation goes on without the question
                turns.pop()
                write_line(f"bmjax: error: {error}")


def _show(ask: Ask, turns: Turns, target: TextIO) -> str:
    """Write an answer as it comes; return its response, or as much as came before it was stopped."""
    dim, plain = (DIM, PLAIN) if target.isatty() else ("", "")
    is_thinking = False
    pairs: list[tuple[str, str]] = []
    try:
        with contextlib.closing(ask(turns)) as pieces:  # closed, it is no longer generated
            for reasoning, response in pieces:
                pairs.append((reasoning, response))
                if reasoning:
                    target.write(printable(reasoning) if is_thinking else dim + printable(reasoning))
                    is_thinking = True
                if response:
                    target.write(f"{plain}\n\n" * is_thinking + printable(response))
                    is_thinking = False
                target.flush()
    except KeyboardInterrupt:
        write_line(" (stopped)")
    finally:
        target.write(plain * is_thinking + "\n")
        target.flush()
    return _response(pairs)


def _response(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the response in a stream's pairs; a thought whose beginning nothing told is only known at its end."""
    response = "".join(response for _, response in pairs)
    return response if any(reasoning for reasoning, _ in pairs) else split_answer(response)[1]


def _answer_lines(ask: Ask, settings: ChatSettings, source: TextIO, target: TextIO) -> None:
    for line in source:
        if line.strip():
            turns = [*_begin(settings), {"role": "user", "content": line.strip()}]
            target.write(" ".join(printable(_response(list(ask(turns)))).split()) + "\n")
            target.flush()


def _begin(settings: ChatSettings) -> Turns:
    return [{"role": "system", "content": settings.system}] if settings.system else []


def printable(text: str) -> str:
    """Return a model's text without the control characters by which it could rule the terminal."""
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character) != "Cc")


@contextlib.contextmanager
def _engine(settings: ChatSettings) -> Iterator[Ask]:
    """Yield what asks a model that is computed here."""
    from bmjax.generate.load import load_engine, open_model
    from bmjax.generate.requests import Request, Sampling, Token
    from bmjax.generate.text import TextStream

    assert settings.model is not None
    student = open_model(settings.model, settings.template)
    if student.template is None:
        raise UserError(
            f"{student.directory}: no chat template; set template: a name that bmjax train lists, or FILE.jinja"
        )
    engine = load_engine(student, settings, 1, write_line)
    tokenizer, template, asked = student.tokenizer, student.template, 0

    def ask(turns: Turns) -> Pieces:
        nonlocal asked
        prompt = render_prompt(tokenizer, turns, template, "conversation")
        tokens = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        sampling = Sampling(
            min(settings.max_tokens or engine.context, max(1, engine.context - len(tokens))),
            settings.temperature, settings.top_p, seed=settings.seed + asked,
        )  # fmt: skip
        asked += 1
        text, splitter = TextStream(tokenizer, keep=THINKING_TAGS), ThinkSplitter(opens_thought(prompt))
        new: list[Token] = []
        running = engine.submit(Request(tokens, sampling), lambda tokens, _: new.extend(tokens))
        try:
            while running.finish_reason is None:
                engine.step()
                yield splitter.feed(text.push([token.id for token in new]))
                new.clear()
            yield splitter.feed(text.finish(), is_last=True)
            if running.finish_reason == "length":
                write_line(CUT)
        finally:
            engine.cancel(running)
            engine.step()

    yield ask


@contextlib.contextmanager
def _endpoint(settings: ChatSettings) -> Iterator[Ask]:
    """Yield what asks an endpoint."""
    key = os.environ.get(settings.api_key_env or "", "").strip()
    if settings.api_key_env and not key:
        raise UserError(f"api_key_env: the environment variable {settings.api_key_env} is not set or empty")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = Address.parse(str(settings.base_url))
    timeout = httpx.Timeout(600.0, connect=30.0)
    with httpx.Client(headers=headers, timeout=timeout) as client:
        with _reported(address.label):
            model = settings.model or _only_model(client, address)
        asked = 0

        def ask(turns: Turns) -> Pieces:
            nonlocal asked
            request = ChatRequest(
                model=model, messages=[ChatMessage(**turn) for turn in turns], temperature=settings.temperature,
                top_p=settings.top_p, max_tokens=settings.max_tokens, seed=settings.seed + asked, stream=True,
            )  # fmt: skip
            asked += 1
            body = request.model_dump(exclude_none=True)
            with _reported(address.label), client.stream("POST", address.url, json=body) as reply:
                if reply.status_code != 200:
                    raise UserError(f"{address.label}: {_refusal(reply)}")
                yield from _deltas(reply)

        yield ask


def _only_model(client: httpx.Client, address: Address) -> str:
    reply = client.get(address.models_url)
    if reply.status_code != 200:
        raise UserError(f"{address.label}: {_refusal(reply)}; or name the model: model=NAME")
    try:
        names = [str(entry["id"]) for entry in reply.json()["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if len(names) != 1:
        raise UserError(
            f"{address.label}: {len(names)} models are served; name one: model={'|'.join(names[:5]) or 'NAME'}"
        )
    return names[0]


def _refusal(reply: httpx.Response) -> str:
    reply.read()
    try:
        return f"HTTP {reply.status_code}: {read_error(reply.json())[0]}"
    except (ValueError, AttributeError):
        return f"HTTP {reply.status_code}: {reply.text[:200]}"


def _deltas(reply: httpx.Response) -> Iterator[tuple[str, str]]:
    """Yield (reasoning, response) of a stream's chunks; <think> in the content is split off. Says when it was cut."""
    events, splitter, finish_reason = Events(), ThinkSplitter(is_open=False), None
    for line in reply.iter_lines():
        for chunk in events.read([line.encode()]):
            if chunk is None:
                break
            if chunk.get("error"):
                raise ReplyError(*read_error(chunk))
            choices: Sequence[Any] = chunk.get("choices") or [{}]
            delta = choices[0].get("delta") or {}
            finish_reason = choices[0].get("finish_reason") or finish_reason
            apart = delta.get("reasoning_content") or delta.get("reasoning") or ""
            reasoning, response = splitter.feed(str(delta.get("content") or ""))
            yield str(apart) + reasoning, response
    yield splitter.feed("", is_last=True)
    if finish_reason == "length":
        write_line(CUT)


@contextlib.contextmanager
def _reported(label: str) -> Iterator[None]:
    """Turn what an endpoint does wrong into a UserError."""
    try:
        yield
    except httpx.HTTPError as error:
        raise UserError(f"{label}: {first_line(error)}; is the server running?") from None
    except (ReplyError, NoCompletion, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{label}: {first_line(error)}") from None
