"""One server for the tests of a module, and OpenAI's client of it."""

import pytest

from tests.generate.server.scripted import ScriptedEngine, Serving, echo, make_client


@pytest.fixture(scope="module")
def serving():
    with Serving(ScriptedEngine(echo, slots=8), queue=64) as serving:
        yield serving


@pytest.fixture(scope="module")
def client(serving):
    return make_client(serving)
