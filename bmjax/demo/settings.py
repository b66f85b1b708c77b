"""The settings of `bmjax demo` that `bmjax run` has not: which problems there are, how often the teacher fails."""

from typing import Self

from pydantic import Field, model_validator

from bmjax.config import Settings


class Mistakes(Settings):
    """How often the demo's teacher fails, as shares of its answers."""

    wrong: float = Field(0.06, ge=0, le=1, description="a slip in one step, carried to the answer")
    truncated: float = Field(0.04, ge=0, le=1, description="cut in mid-reasoning, finish_reason length")
    malformed: float = Field(0.04, ge=0, le=1, description="no closing </think>, two think blocks or no answer")
    flaky: float = Field(0.01, ge=0, le=1, description="requests whose first attempt gets HTTP 429 or 500")

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        if self.wrong + self.truncated + self.malformed > 1:
            raise ValueError("wrong + truncated + malformed: expected at most 1")
        return self
