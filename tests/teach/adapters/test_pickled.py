"""The reader of pickles: plain values of every protocol, and nothing else, from whoever wrote them."""

import base64
import json
import os
import pickle
import random
import zlib
from collections import OrderedDict
from datetime import date
from decimal import Decimal

import pytest

from bmjax.config import UserError
from bmjax.teach.adapters import livecodebench
from bmjax.teach.adapters.livecodebench import unpacked
from bmjax.teach.adapters.pickled import NotPlain, read_plain_pickle

TESTS = [
    {"input": "1\n", "output": "2\n", "testtype": "stdin"},
    {"input": "é\n" * 300, "output": "", "testtype": "stdin"},
]


class Caller:
    """Runs a function when it is unpickled by Python's own reader."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [
    "text", "é" * 70_000, "", 0, -1, 10**80, -(2**31), 1.5, True, [], {}, TESTS, {"a": [1, {"b": "c"}], 2: False},
    [["x"] * 3] * 1, json.dumps(TESTS), float("inf"),
])  # fmt: skip
def test_plain_values_of_every_protocol(value, protocol):
    result = read_plain_pickle(pickle.dumps(value, protocol))
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [
    Caller(os.system, "exit 3"), Caller(eval, "1"), Caller(exec, "import os"), Caller(getattr, "a", "upper"),
    Caller(__import__, "os"), os.path.join, print, int, object(), None, (1, 2), {1, 2}, frozenset(), b"bytes",
    bytearray(b"x"), 1j, range(3), OrderedDict(a=1), date(2024, 1, 1), Decimal(1), [Caller(os.getcwd)],
    {"a": Caller(os.getcwd)}, [None],
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_all_else_is_refused_and_nothing_is_called(value, protocol, monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    with pytest.raises(NotPlain):
        read_plain_pickle(pickle.dumps(value, protocol))
    assert not called


@pytest.mark.parametrize("data", [
    b"", b".", b"N.", b"cos\nsystem\n(S'echo'\ntR.", b"]", b"(", b"(.", b"a.", b"e.", b"u.", b"s.", b"d.",
    b"]]a", b"(K\x01d.", b"](K\x01u.", b"}(K\x01u.", b"}]K\x01s.", b"K\x01K\x02a.", b"K\x01K\x02.", b"h\x05.", b"g9\n.",
    b"X\xff\xff\xff\x7fabc.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffa.", b"X\x02\x00\x00\x00\xff\xfe.",
    b"I" + b"9" * 5000 + b"\n.", b"L1x\n.", b"Fx\n.", b"\x8b\xff\xff\xff\xff.", b"\x80\x04\x95\xff\xff\xff\xff.",
    b"Pid\n.", b"K\x01Q.", b"\x82\x01.", b"\x97.", b"ios\nsystem\n.", b"(ios\nsystem\n.",
    b"(cos\nsystem\no.", b"\x8c\x02os\x8c\x06system\x93.", b"]0.", b"]2.", b"p0\n.", b"q\x00.", b"\x94.",
], ids=repr)  # fmt: skip
def test_broken_and_hand_written_streams_are_refused(data):
    with pytest.raises(NotPlain):
        read_plain_pickle(data)


def test_a_list_cannot_be_its_own_part_or_many():
    cycle: list = []
    cycle.append(cycle)
    laughs: list = ["ha"]
    for _ in range(64):
        laughs = [laughs, laughs]
    for value in (cycle, laughs, [shared := [], shared], {"a": shared, "b": shared}):
        with pytest.raises(NotPlain, match="twice"):
            read_plain_pickle(pickle.dumps(value))
    # Text may be referred to again.
    assert read_plain_pickle(pickle.dumps([text := "long text", text])) == [text, text]


def test_changed_bytes_never_call_anything(monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    source = random.Random(0)
    originals = [pickle.dumps(value, p) for value in (TESTS, Caller(os.system, "x")) for p in (0, 2, 4)]
    for _ in range(3000):
        data = bytearray(source.choice(originals))
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        try:
            value = read_plain_pickle(bytes(data))
        except NotPlain:
            continue
        assert isinstance(value, (str, int, float, list, dict))
    assert not called


def packed(value, protocol=4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


def reference(private: str, public: str = "[]", name=None) -> dict:
    return {"livecodebench": {"public": public, "private": private, "fn_name": name}}


def test_tests_of_livecodebench_are_unpacked_as_its_own_code_does():
    public = json.dumps(TESTS[:1])
    expected = [{"input": t["input"], "output": t["output"]} for t in [*TESTS[:1], *TESTS]]
    assert unpacked(reference(packed(json.dumps(TESTS)), public)) == {"tests": expected}
    assert unpacked(reference(json.dumps(TESTS), public)) == {"tests": expected}  # the full release is not packed
    calls = unpacked(reference(packed(json.dumps(TESTS)), name="f"))["tests"]
    assert calls == {"inputs": [t["input"] for t in TESTS], "outputs": [t["output"] for t in TESTS], "fn_name": "f"}
    assert unpacked({"tests": ["assert True"]}) == {"tests": ["assert True"]} and unpacked("7") == "7"


@pytest.mark.parametrize("private, problem", [
    (packed(Caller(os.system, "x")), "opcode"),
    (packed([1]), "holds list, expected JSON text"),
    (packed("[1"), "cannot be read"),
    (packed("{}"), "no list of"),
    (packed('[{"input": 1, "output": "2"}]'), "no list of"),
    (packed("[" * 100_000), "cannot be read"),
    ("%%%", "cannot be read"),
    (base64.b64encode(b"not compressed").decode(), "cannot be read"),
    (base64.b64encode(zlib.compress(b"x" * 5000)[:-8]).decode(), "end too early"),
    ("", "no tests"),
])  # fmt: skip
def test_what_cannot_be_unpacked_is_one_line(private, problem, monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    with pytest.raises(UserError, match=problem) as error:
        unpacked(reference(private))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and not called


def test_a_bomb_of_zeros_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(livecodebench, "MOST_BYTES", 10_000)
    with pytest.raises(UserError, match="more than 10000 bytes"):
        unpacked(reference(packed("0" * 20_000)))
