"""What a collecting run says of itself on the way and at its end."""

import pytest

from bmjax.teach import progress as module
from bmjax.teach.judges.verdict import Verdict
from bmjax.teach.progress import Progress
from bmjax.teach.settings import Price


def test_the_line_tells_rate_failures_cost_and_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    progress = Progress(110, 10, Price(input=1, output=2))
    for _ in range(18):
        progress.note_answer(Verdict("right", "", "number"), "stop", {"prompt_tokens": 1e6, "completion_tokens": 5e5})
    progress.counts["failed"] += 2
    now = 104.0
    # 20 of 100 done in 4 s; an answer costs 1 + 1.
    assert progress.line() == "20/100, 5.0/s, 2 failed, cost 36.00, about 160.00 to go, eta 16 s"


def test_answers_that_a_second_judge_sees_otherwise_are_counted() -> None:
    progress = Progress(2, 0, None)
    progress.note_answer(Verdict("wrong", "", "values", disagreement="math-verify"), "stop", {})
    progress.note_answer(Verdict("right", "", "values"), "length", {})
    assert progress.counts["disputed"] == 1
    assert progress.summary() == (
        "2 collected (1 right, 1 wrong, 0 unjudged, 1 truncated, 0 refused), 0 failed; "
        "a second judge says otherwise of 1; ended by length 1"
    )
