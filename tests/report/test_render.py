"""Numbers as the report writes them."""

import pytest

from bmjax.report.render import count


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (940, "940"), (12_345, "12.3k"), (1_234_567, "1.23M"), (4.56e9, "4.56B"), (None, "–")],
)
def test_token_counts_are_short(tokens, text):
    assert count(tokens) == text
