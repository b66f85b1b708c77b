"""What the keys of `bmjax run` mean together."""

import pytest

from bmjax.config import UserError
from bmjax.pipeline.settings import RunSettings


def settings(**changes) -> RunSettings:
    rows = {"train": {"data": "rows.jsonl"}, "test_share": 0.1}
    values = {
        "student": "DIR", "domains": {"math": rows, "code": rows}, "branch": {"steps": 7, "batch": 2},
        "merges": {"linear": {"merge_method": "linear", "models": ["math", "code"]}},
    }  # fmt: skip
    return RunSettings.read(values | changes)


@pytest.mark.parametrize(
    ("mixture", "length"), [({}, (14, None)), ({"steps": 3}, (3, None)), ({"epochs": 2}, (None, 2.0))]
)
def test_mixture_takes_the_branches_steps_or_its_own(mixture, length):
    training = settings(mixture=mixture).mixture_training(14)
    assert (training.steps, training.epochs) == length


@pytest.mark.parametrize("name", ["-x", ".x", "a/b", ""])
def test_names_of_domains_are_names_of_folders(name):
    rows = {"train": {"data": "rows.jsonl"}, "test_share": 0.1}
    with pytest.raises(UserError, match="is used as a directory name"):
        settings(domains={name: rows, "code": rows})
