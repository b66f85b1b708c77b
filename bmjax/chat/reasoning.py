"""Reasoning in text: the only module that knows <think> and </think>.

A teacher's reply is split into reasoning and response, a training row joins them again, and a judge reads what follows
the reasoning.
"""

OPEN, CLOSE = "<think>", "</think>"


def split_think(content: str, reasoning: str | None = None) -> tuple[str, str]:
    """Split a reply into (reasoning, response).

    One leading <think>...</think> of the content is split off; the opening tag may be missing, as when the chat
    template gives it. An unclosed block is all reasoning. Anything else, two blocks for instance, stays whole in the
    response, tags included. Where the endpoint sends the reasoning apart, the content is the response.
    """
    if reasoning:
        return reasoning.strip(), content.strip()
    text = content.strip()
    opened, closed = text.count(OPEN), text.count(CLOSE)
    if opened <= 1 and closed == 1 and (opened == 0 or text.startswith(OPEN)):
        before, _, after = text.removeprefix(OPEN).partition(CLOSE)
        return before.strip(), after.strip()
    if opened == 1 and closed == 0 and text.startswith(OPEN):
        return text.removeprefix(OPEN).strip(), ""
    return "", text


def join_think(reasoning: str, response: str) -> str:
    """Write reasoning and response as the text of one assistant turn; without reasoning, the response alone."""
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n{response}" if reasoning else response


def has_tags(*texts: str) -> bool:
    """Return whether a tag of reasoning is in any of the texts."""
    return any(tag in text for tag in (OPEN, CLOSE) for text in texts)


def answer_of(text: str) -> str:
    """Return the text after the last </think>, stripped; all of it where there is none."""
    return text.rpartition(CLOSE)[2].strip()
