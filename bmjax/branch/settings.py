"""Settings of a branch: one supervised fine-tuning of a student on one dataset.

`bmjax train` reads TrainSettings; `bmjax run` holds a Training for every model that it trains. No JAX is imported here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from bmjax.chat.columns import check_columns, columns_of
from bmjax.chat.forms import Turns
from bmjax.chat.template import TEMPLATE_NAMES
from bmjax.config import Settings
from bmjax.model.attention.options import Backend, Exchange, Remat

MeshSizes = dict[str, int]
MarkRule = Literal["add", "refuse"]
Dtype = Literal["bfloat16", "float32"]
T = TypeVar("T")

# What a key is to the trained weights, as a mark on its type. A key without a mark decides them.
SAME_RESULT = "same result"  # changes nothing but rounding: where things are, how they are split and shown
MAY_CHANGE = "may change"  # changes the weights a little, or what is exported: a resumed training may differ in it
SameResult = Annotated[T, SAME_RESULT]
MayChange = Annotated[T, MAY_CHANGE]


class Training(Settings):
    """How a student is trained, whatever the student and the data."""

    seed: int = Field(0, description="order of the rows")
    seq_len: int | None = Field(None, ge=2, description="tokens a row; null: the longest document, where that fits")
    batch: int | None = Field(
        None, ge=1, description="rows a step, over all devices; null: up to 32 documents, in 100 steps or more"
    )
    accumulate: SameResult[int | None] = Field(
        None, ge=1, description="microbatches; divides batch; exact, weighted by tokens; null: as memory asks for"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; or give steps; 5 where neither is")
    learning_rate: float | None = Field(None, ge=0, description="peak; null: by the number of parameters")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="after the warm-up; cosine and linear end at 0"
    )
    warmup: float | None = Field(
        None, ge=0, description="below 1: share of the steps; from 1 on: steps; null: a tenth, at most 100 steps"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW")
    eps: float = Field(1e-8, gt=0, description="AdamW")
    weight_decay: float = Field(0.01, ge=0, description="on matrices only, not on biases and norms")
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    packing: bool = Field(True, description="several documents a row, none sees another; false: one a row, padded")
    shuffle: bool = Field(True, description="new order of rows every epoch; false: the file's order")
    overlong: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="rows over seq_len tokens; counted in the log"
    )
    template: str | None = Field(
        None, description=f"chat template: null for the student's own, {', '.join(TEMPLATE_NAMES)}, or FILE.jinja"
    )
    marks: MarkRule = Field(
        "add",
        description="marks of the template that are no tokens of the student: add: in free rows of its vocabulary, "
        "exported with the model; refuse: say which templates fit",
    )
    turns: Turns = Field("all", description="answers of a conversation that are learned: all, or the last one")
    ignore: list[str] = Field([], description="keys of rows and turns to read as if they were absent")
    compute_dtype: MayChange[Dtype | None] = Field(
        None, description="of activations and products; weights stay float32; null: bfloat16, on a CPU float32"
    )
    remat: SameResult[Remat] = Field(
        "full",
        description="kept for the backward pass besides each layer's input: full: nothing; save_attention: what "
        "attention gave (not tokamax's); minimal: every product, too; offload: as full, inputs in the "
        "host's memory; none: everything",
    )
    attention: SameResult[Backend] = Field(
        "auto",
        description="splash: Pallas kernels of TPUs; cudnn: of Hopper and Blackwell GPUs, in bfloat16; tokamax: of "
        "GPUs (extra cuda); xla: any device; auto: splash on a TPU and cudnn on a GPU where they can, else xla",
    )
    context_parallel: SameResult[Exchange] = Field(
        "auto",
        description="rows split over mesh context: ulysses exchanges heads for tokens, gather keys and values, ring "
        "passes them on; auto: ulysses where heads suffice, else ring",
    )
    moments_dtype: MayChange[Dtype] = Field(
        "float32", description="of Adam's two moments between steps; bfloat16 takes half, and needs beta2 <= 0.99"
    )
    freeze: list[str] = Field(
        [], description="parameters that stay as they are, e.g. [embed/*]; shell patterns on names like layers/mlp/*"
    )
    track_move: bool = Field(True, description="log |delta|/|backbone|; costs one more sharded copy of the weights")
    mesh: SameResult[MeshSizes] = Field({"fsdp": -1}, description="devices along data, fsdp, context, tensor; -1: rest")
    save_every: SameResult[int] = Field(200, ge=1, description="steps between checkpoints")
    keep: SameResult[int] = Field(3, ge=1, description="newest checkpoints kept")
    keep_every: SameResult[int | None] = Field(None, ge=1, description="also keep checkpoints at multiples of this")
    export_every: SameResult[int | None] = Field(
        None, ge=1, description="steps between models written on the way, to DIR/exports/STEP"
    )
    export_dtype: MayChange[Literal["bfloat16", "float16", "float32"] | None] = Field(
        None, description="of hf/; null: as the student was stored"
    )
    importances: MayChange[bool] = Field(
        False, description="also write DIR/importances: what the fisher merge weighs this branch's parameters by"
    )
    log_every: SameResult[int] = Field(1, ge=1, description="steps between lines in the log; metrics.jsonl has all")
    profile_steps: SameResult[tuple[int, int] | None] = Field(
        None, description="[first, last] step, counted from 1, of an XProf trace in DIR/profile, e.g. [10, 13]"
    )
    wandb: SameResult[str | None] = Field(
        None, description="project name: also log to Weights & Biases (needs the wandb extra)"
    )
    mlflow: SameResult[str | None] = Field(
        None, description="experiment name: also log to MLflow, at MLFLOW_TRACKING_URI (needs the mlflow extra)"
    )

    @classmethod
    def keys_without(cls, *marks: str) -> set[str]:
        """Return the keys whose type carries none of `marks`."""
        return {name for name, field in cls.model_fields.items() if not any(mark in field.metadata for mark in marks)}

    @model_validator(mode="before")
    @classmethod
    def _five_epochs(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "epochs": 5.0}
        return values

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.batch is not None and self.accumulate is not None and self.batch % self.accumulate:
            raise ValueError(
                f"batch {self.batch} is not a multiple of accumulate {self.accumulate}; change one of them"
            )
        if self.moments_dtype == "bfloat16" and self.beta2 > 0.99:
            raise ValueError(
                f"beta2 {self.beta2}: bfloat16 moments lose changes that small; at most 0.99, or moments_dtype float32"
            )
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps {list(self.profile_steps)}: expected [first, last], first from 1 on")
        return self


class TrainSettings(Training):
    """`bmjax train CONFIG`: fine-tune a student on a dataset."""

    student: SameResult[str] = Field(description="Hugging Face directory or hub id of the model to start from")
    data: SameResult[str | list[str]] = Field(
        description="file(s), folders or patterns of rows (JSON Lines, JSON, CSV, Parquet, Arrow; gzip, zstd), or a "
        "hub dataset (org/name:subset:split); rows with messages, conversations, prompt and response, ..."
    )
    prompt: SameResult[str | None] = Field(
        None, description="for rows of other columns: what is asked, e.g. '{question}'"
    )
    response: SameResult[str | None] = Field(None, description="the answer, with `prompt`, e.g. '{answer}'")
    system: SameResult[str | None] = Field(None, description="the system prompt, with `prompt`: a text or '{COLUMN}'")
    reasoning: SameResult[str | None] = Field(
        None, description="the answer's reasoning, with `prompt`, e.g. '{thoughts}'"
    )
    tools: SameResult[str | None] = Field(
        None,
        description="descriptions of functions, with `prompt`: '{COLUMN}'; only rows of turns can hold calls",
    )
    output: SameResult[str] = Field(description="of checkpoints/, hf/, metrics.jsonl; all processes see the same")
    until: SameResult[float | None] = Field(
        None, gt=0, description="end after this part of the steps, below 1: share, from 1 on: steps; the schedule is "
        "that of all steps, and the same command with a later end goes on; null: all",
    )  # fmt: skip
    continue_from: SameResult[str | None] = Field(
        None, description="output, or checkpoint, of a training that this one goes on from: with its moments, step and "
        "place in the data, but with the weights of `student`, such as a merge of several branches",
    )  # fmt: skip
    coordinator: SameResult[str | None] = Field(
        None, description="several processes: host:port of process 0; null: as the launcher says (TPU slice, SLURM, "
        "Open MPI, Kubernetes), else one process",
    )  # fmt: skip
    num_processes: SameResult[int | None] = Field(None, ge=1, description="how many processes; 1: ask no launcher")
    process_id: SameResult[int | None] = Field(None, ge=0, description="several processes: which one this is, from 0")
    stop_code: SameResult[int] = Field(
        0, ge=0, le=125, description="exit code after SIGTERM; not 0 for schedulers that start again what failed"
    )
    peer_timeout: SameResult[int] = Field(
        120, ge=5, description="seconds until a process that is not heard of is taken for dead, and all others stop"
    )

    @model_validator(mode="after")
    def _mapping(self) -> Self:
        check_columns(self)
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The templates that make a row of other columns a prompt and its response; empty: rows are as they are."""
        return columns_of(self)


class ChosenTraining(TrainSettings):
    """A training of whose keys nothing is left to choose; choose.py makes it."""

    seq_len: int = Field(ge=2)
    batch: int = Field(ge=1)
    accumulate: SameResult[int] = Field(1, ge=1)
    learning_rate: float = Field(ge=0)
    warmup: float = Field(ge=0)
    compute_dtype: MayChange[Dtype] = Field()
