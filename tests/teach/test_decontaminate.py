from pathlib import Path

from bmjax.teach.decontaminate import HeldOut
from tests.conftest import write_rows


def test_prompts_are_compared_by_words_and_signs(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "test.jsonl", [{"q": "Compute (7 + 5) * 3."}, {"q": "one two three four"}])
    whole = HeldOut([str(held)], "{q}", ngram=0)
    assert whole.overlaps(" compute  (7 + 5) * 3 ")
    assert not whole.overlaps("Compute (7 - 5) * 3.")
    assert not whole.overlaps("zero one two three four")
    runs = HeldOut(str(held), "{q}", ngram=3)
    assert runs.overlaps("zero TWO, three; four!")
    assert not runs.overlaps("one two four three")


def test_nothing_is_held_out_without_data() -> None:
    assert not HeldOut([], "{prompt}", ngram=1).overlaps("anything")
