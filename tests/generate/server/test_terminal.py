"""`bmjax chat`: a conversation of a terminal, lines of a file, a model of this process and one behind an endpoint."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bmjax
from bmjax.config import UserError
from bmjax.generate import load, terminal
from bmjax.generate.settings import ChatSettings
from tests.generate.server.scripted import TOKENIZER, ScriptedEngine, Serving, echo, encode, wait_until


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def settings(serving, **changes) -> ChatSettings:
    return ChatSettings.read({"base_url": f"{serving.url}/v1"} | changes)


def test_lines_of_a_file_are_answered_one_by_one(serving):
    target = io.StringIO()
    terminal.chat(settings(serving), io.StringIO("one two\n\n[think]hm[/think]\n4\x1b[2J\ntwo[/think]4"), target)
    assert target.getvalue() == "one two\n\n4<2J\n4\n"


@pytest.fixture
def typed(monkeypatch):
    """Have `input` return these lines; an exception is raised, and the end is that of Ctrl-D."""
    lines: list = []

    def next_line(prompt: str) -> str:
        line = lines.pop(0) if lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", next_line)
    return lines


def test_a_conversation_keeps_its_turns_dims_thinking_and_begins_anew(serving, typed, monkeypatch, capsys):
    seen = []

    def answer(request):
        seen.append(TOKENIZER.decode(request.tokens))
        return echo(request)

    monkeypatch.setattr(serving.engine, "answer", answer)
    typed += ["[think]deep[/think]ok", "again", "/reset", "late[/think]anew", "more", "/what"]
    typed += [KeyboardInterrupt(), "   "]
    target = Terminal()
    terminal.chat(settings(serving, system="Be brief."), Terminal(), target)
    assert target.getvalue() == "\x1b[2mdeep\x1b[0m\n\nok\nagain\nlate</think>anew\nmore\n\n\n"
    assert "Be brief." in seen[0] and "[think]deep" in seen[1] and "ok" in seen[1] and "again" in seen[1]
    assert "again" not in seen[2] and "Be brief." in seen[2]
    assert "<|im_start|>assistant\nanew<|im_end|>" in seen[3]  # a thought is no part of the turn
    said = capsys.readouterr().err
    assert "Ctrl-D ends" in said and "a new conversation" in said and "/what: no such command" in said


def test_ctrl_c_stops_an_answer_and_frees_its_slot(typed, capsys):
    class Interrupted(Terminal):
        def write(self, text: str) -> int:
            size = super().write(text)
            if self.getvalue() == "on":
                raise KeyboardInterrupt
            return size

    engine = ScriptedEngine(lambda request: echo(request) * 1000, seconds=0.01)
    with Serving(engine, context=100_000) as serving:
        typed += ["on and on"]
        target = Interrupted()
        terminal.chat(settings(serving), Terminal(), target)
        assert target.getvalue() == "on\n\n" and "(stopped)" in capsys.readouterr().err
        wait_until(lambda: serving.worker.active == 0, 10)


def test_an_error_is_said_and_the_conversation_goes_on(serving, typed, capsys):
    typed += ["x" * 300, "short"]
    target = Terminal()
    terminal.chat(settings(serving), Terminal(), target)
    assert target.getvalue() == "\nshort\n\n" and "bmjax: error: http" in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="is the server running"):
        terminal.chat(ChatSettings.read({"base_url": "http://127.0.0.1:9/v1"}), io.StringIO("a\n"), io.StringIO())


def test_a_model_of_this_process_answers_as_generate_does(student):
    model = bmjax.load(student)
    chats = [[{"role": "user", "content": text}] for text in ("1 + 2?", "and 3?")]
    expected = bmjax.generate(model, chats, max_new_tokens=10)
    target = io.StringIO()
    values = {"model": str(student), "temperature": 0, "max_tokens": 10}
    terminal.chat(ChatSettings.read(values), io.StringIO("1 + 2?\nand 3?\n"), target)
    assert target.getvalue() == "".join(" ".join(terminal.printable(text).split()) + "\n" for text in expected)


def test_thinking_tags_that_are_special_tokens_are_known(monkeypatch):
    engine = ScriptedEngine(lambda request: encode("<think>two</think>4"))
    engine.context = 256
    student = SimpleNamespace(tokenizer=TOKENIZER, template=TOKENIZER.chat_template)
    monkeypatch.setattr(load, "open_model", lambda *_: student)
    monkeypatch.setattr(load, "load_engine", lambda *_: engine)
    target = io.StringIO()
    terminal.chat(ChatSettings.read({"model": "m"}), io.StringIO("?\n"), target)
    assert target.getvalue() == "4\n"


def test_the_command_reads_lines_and_answers_lines(serving):
    command = [sys.executable, "-m", "bmjax", "chat", f"{serving.url}/v1", "max_tokens=3"]
    done = subprocess.run(command, input="abcdef\nghi\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "abc\nghi\n", f"{terminal.CUT}\n" * 2)
