"""The methods that look at data, `learned`, `layerwise` and `regmean`: their settings in a recipe.

A recipe's reader builds their steps as it builds all others. bmjax/calibrate/ carries them out.
"""

from typing import Any, Literal, NoReturn

from pydantic import Field

from bmjax.config import Settings, UserError
from bmjax.merge.methods.method import Method, Tensor


class CalibrationSettings(Settings):
    """The `parameters:` of a step that looks at data."""

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
    per: Literal["entry", "row", "tensor"] = Field(
        "row",
        description="one coefficient for each model and output row of a matrix (one a vector), each tensor, or each "
        "entry (memory for the coefficients and their moments: 12 bytes an entry and model)",
    )
    steps: int = Field(
        32, ge=0, description="of Adam on the coefficients (layerwise: in each layer); 0: they stay as they start"
    )
    batch: int = Field(2, ge=1, description="packed rows of each domain a step")
    learning_rate: float = Field(0.1, ge=0, description="of the coefficients, falling to 0 along a straight line")
    polish: int = Field(
        0,
        ge=0,
        description="steps of Adam on all weights that the models changed, after the merge; the model "
        "and its moments are whole in memory, float32",
    )
    polish_rate: float = Field(2e-4, ge=0, description="learning rate of those, falling to 0 along a straight line")
    distill: int = Field(
        0, ge=0, description="steps of Adam after all others, towards the models' own distributions on their rows (KL)"
    )
    distill_rate: float = Field(
        2e-4,
        ge=0,
        description="peak learning rate of those: up over the first quarter, then down along a straight line",
    )
    distill_temperature: float = Field(1.0, gt=0, description="both distributions' logits are divided by it")
    documents: int = Field(2000, ge=2, description="at most so many documents of each model's data, drawn by the seed")
    held_out: int = Field(
        64,
        ge=1,
        description="documents of each model's data that are not learned from, and judge where there is no "
        "held_out_data: what does not lower their loss by more than noise is not kept. Of rows that a model was "
        "trained on its loss is too low",
    )
    judged: int = Field(
        64,
        ge=1,
        description="at most so many documents of each model's held_out_data judge instead, drawn by the seed: rows "
        "that no model was trained on",
    )
    seq_len: int = Field(1024, ge=2, description="tokens a packed row")
    template: str | None = Field(
        None, description="chat template: null for the base's own, a name that bmjax train lists, or FILE.jinja"
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field("float32", description="of activations and products")
    remat: Literal["full", "none"] = Field(
        "full", description="polish: recompute each layer in the backward pass, or not"
    )
    mesh: dict[str, int] = Field({"fsdp": -1}, description="devices along data, fsdp, context, tensor; -1: the rest")


def _calibrated(name: str, summary: str) -> Method:
    def passes(tensor: Tensor) -> NoReturn:
        raise UserError(f"{name} looks at data: it merges model directories, not arrays")

    return Method(name, passes, "required", (1, None), parameters={}, summary=summary, check=None, by_row=False)


CALIBRATED = {
    "learned": _calibrated("learned", "Coefficients of the changes, learned on rows of each model's domain."),
    "layerwise": _calibrated(
        "layerwise", "Coefficients learned layer by layer, so that its output is each model's own: arXiv 2502.12706."
    ),
    "regmean": _calibrated("regmean", "RegMean, arXiv 2212.09849: learned without a step, from the mean itself."),
}
# Where a method's defaults are not those of CalibrationSettings.
DEFAULTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "layerwise": {"along": "changes", "start": 1.0, "steps": 100},
    "regmean": {"start": 1.0, "off_diagonal": 0.9, "steps": 0},
}
