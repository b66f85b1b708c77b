"""An answer's pieces without a server: what tokens, stop strings and ends make of them."""

import pytest

from bmjax.chat.openai import ServedChat, ServedCompletion, read_request
from bmjax.generate.requests import Token
from bmjax.generate.server.asking import Answer, Prompt, Served
from tests.generate.test_decoding import KINDS

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Q"}]}
TEXT = {"model": "m", "prompt": "Q"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("kind", "body"), [(ServedChat, CHAT), (ServedCompletion, TEXT)])
def test_a_stop_string_in_the_last_text_is_why_an_answer_ends(kind, body, stream):
    # The text of <0x41> comes with the token after it, or at the end.
    tokenizer = KINDS["pieces with bytes"]()
    served = Served("m", frozenset({"m"}), tokenizer, None, 256, len(tokenizer))
    tokens = [Token(tokenizer.convert_tokens_to_ids(name)) for name in ("▁the", "<0x41>")]
    for stop, text, reason in (("A", "the", "stop"), ("B", "theA", "length")):
        answer = Answer(served, read_request(kind, body | {"stop": stop, "stream": stream}), Prompt("Q", (1,)))
        pieces = [answer.add(tokens[:1], None), answer.add(tokens[1:], "length")]
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.finish_reason for piece in pieces] == [None, reason] and answer.is_ended
