"""The settings of `bmjax demo` that `bmjax run` has not: which problems there are, how often the teacher fails."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bmjax.config import Settings

Domain = Literal["math", "code", "science"]
Level = Literal[1, 2, 3]


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


class ProblemSettings(Settings):
    """How many problems of a domain there are, and how hard."""

    count: int = Field(3600, ge=1, description="problems that the teacher answers for the branch")
    levels: list[Level] = Field([1, 2, 3], min_length=1, description="difficulties of those and of the held-out ones")
    backbone_count: int = Field(1200, ge=1, description="solved problems that the backbone is trained on")
    backbone_levels: list[Level] = Field([1, 2, 3], min_length=1, description="difficulties of those")
    validation: int = Field(300, ge=1, description="held-out problems that choose the merge")
    test: int = Field(600, ge=1, description="held-out problems of the report")


class DemoSettings(Settings):
    """The keys of `bmjax demo` beside those of `bmjax run`."""

    problems: dict[Domain, ProblemSettings] = Field(description="NAME: a domain's problems")
    mistakes: Mistakes = Field(Mistakes(), description="of the teacher")
    vocab_size: int = Field(512, ge=270, description="of the tokenizer, which is trained on the backbone's rows")
