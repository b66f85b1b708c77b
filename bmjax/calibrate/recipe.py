"""The recipe of a merge that needs a small set of rows of each model's domain."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from bmjax.config import Settings, UserError, read_yaml

METHODS = ("learned", "regmean")


class CalibratedModel(Settings):
    """One entry of `models:`."""

    model: str = Field(min_length=1, description="a directory, hub id, or alias of `sources`")
    data: str | list[str] = Field(description="rows of its domain, in the formats that `bmjax train` reads")


class CalibrationSettings(Settings):
    """How the data is read, and what is made of it."""

    along: Literal["changes", "regmean", "fisher"] = Field(
        "regmean",
        description="what the coefficients multiply: each model's share of the plain mean of the changes, of the mean "
        "by its inputs' Gram matrices (arXiv 2212.09849), or by its squared gradients (arXiv 2111.09832)",
    )
    rows: int = Field(32, ge=1, description="packed rows of each domain for along: regmean or fisher")
    off_diagonal: float = Field(
        1.0, ge=0, le=1, description="along: regmean multiplies the Gram matrices' other entries by it; its paper: 0.9"
    )
    ridge: float = Field(
        1e-3, ge=0, description="along: regmean adds so many times the Gram matrices' mean diagonal to their diagonal"
    )
    start: float = Field(1.4, description="every coefficient before the first step; 1 is the mean itself")
    per: Literal["row", "tensor"] = Field(
        "row", description="one coefficient for each model and output row of a matrix (one a vector), or each tensor"
    )
    steps: int = Field(32, ge=0, description="of Adam on the coefficients; 0: they stay as they start")
    batch: int = Field(2, ge=1, description="packed rows of each domain a step")
    learning_rate: float = Field(0.1, ge=0, description="of the coefficients, falling to 0 along a straight line")
    polish: int = Field(0, ge=0, description="steps of Adam on all weights that the models changed, after the merge")
    polish_rate: float = Field(2e-4, ge=0, description="learning rate of those, falling to 0 along a straight line")
    documents: int = Field(2000, ge=2, description="at most so many documents of each domain, drawn by the seed")
    held_out: int = Field(
        64, ge=1, description="documents of each domain never trained on: what does not lower their loss is not kept"
    )
    seq_len: int = Field(1024, ge=2, description="tokens a packed row")
    template: str | None = Field(
        None, description="chat template: null for the base's own, chatml, deepseek-r1, or FILE.jinja"
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field("float32", description="of activations and products")
    remat: Literal["full", "none"] = Field("full", description="recompute each layer in the backward pass, or not")
    mesh: dict[str, int] = Field({"fsdp": -1}, description="devices along data, fsdp, context, tensor; -1: the rest")


class CalibratedRecipe(Settings):
    """A merge of `models` onto `base_model` by what rows of their domains say."""

    merge_method: Literal["learned", "regmean"] = Field(description="regmean: learned without a step, from start 1")
    base_model: str = Field(min_length=1, description="changes are measured against it; gives config and tokenizer")
    models: list[CalibratedModel] = Field(min_length=1, description="the branches")
    sources: dict[str, str] = Field({}, description="NAME: directory or hub id")
    parameters: CalibrationSettings = Field(CalibrationSettings(), description="of the method")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="written; null: as the base's")
    seed: int = Field(0, description="which documents are drawn and held out, and their order")

    @model_validator(mode="before")
    @classmethod
    def _regmean(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("merge_method") == "regmean":
            own = values.get("parameters") or {}
            if isinstance(own, Mapping):
                return {**values, "parameters": {"start": 1.0, "off_diagonal": 0.9, "steps": 0, **own}}
        return values

    @model_validator(mode="after")
    def _together(self) -> Self:
        names = self.names
        if len(set(names)) < len(names):
            raise ValueError(f"models: '{max(names, key=names.count)}' is listed twice; list it once")
        if self.base_model in names:
            raise ValueError(f"models: '{self.base_model}' is the base_model; list only what was trained from it")
        return self

    @property
    def names(self) -> list[str]:
        """The branches' names in order."""
        return [entry.model for entry in self.models]

    @property
    def inputs(self) -> tuple[str, ...]:
        """All models that are read, the base first."""
        return (self.base_model, *self.names)


def is_calibrated(source: Any, overrides: Sequence[str] = ()) -> bool:
    """Whether a recipe (YAML path or mapping) is one of these, by its method's name; False where it cannot be read."""
    text = next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith("merge_method=")), None)
    if text is not None:
        return text in METHODS
    if isinstance(source, (str, Path)):
        try:
            source = read_yaml(source)
        except UserError:
            return False  # the recipe's own reader says what is wrong
    return isinstance(source, Mapping) and source.get("merge_method") in METHODS
