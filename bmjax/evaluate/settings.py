"""The settings of `bmjax eval`."""

from typing import Literal

from pydantic import Field

from bmjax.config import Settings
from bmjax.teach.settings import ProblemSettings


class TaskSettings(ProblemSettings):
    """One task: questions with references, and, for the held-out loss, whole traces of the same kind."""

    questions: str | list[str] | None = Field(
        None, description="accuracy: file(s) or hub data set(s), by the names that `data` of training takes"
    )
    traces: str | list[str] | None = Field(None, description="held-out loss: the same, with whole answers")
    response: str = Field("{response}", description="the answer in a row of traces")


class EvalSettings(Settings):
    """`bmjax eval CONFIG`: score a model on tasks."""

    model: str = Field(description="Hugging Face directory or hub id")
    tasks: dict[str, TaskSettings] = Field(description="name: {questions, traces, judge}")
    output: str = Field(description="directory for scores.json and samples/TASK.jsonl")
    template: str | None = Field(
        None, description="chat template: null for the model's own, chatml, deepseek-r1, or FILE.jinja"
    )
    system: str | None = Field(None, description="a system turn before every question")
    seq_len: int = Field(4096, ge=2, description="tokens a row when measuring the loss")
    max_new_tokens: int = Field(2048, ge=1, description="longest answer, reasoning included")
    temperature: float = Field(0.0, ge=0, description="0 is greedy; reasoning models are usually scored at 0.6")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 0.95 with temperature 0.6")
    samples: int = Field(1, ge=1, description="answers a question; accuracy is their mean (avg@k)")
    seed: int = Field(0, description="of the sampling")
    run_programs: bool = Field(False, description="run answers that are programs against their tests (not a sandbox)")
    batch: int = Field(64, ge=1, description="rows generated or scored at once")
    compute_dtype: Literal["bfloat16", "float32"] = Field("float32", description="of weights and activations")
    mesh: dict[str, int] = Field({"data": -1}, description="devices along data, fsdp, context, tensor; -1: the rest")
