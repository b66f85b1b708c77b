"""What a step that looks at data needs, known before a tensor is read: rows, memory, space on the disk."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from bmjax.merge.plan.output import size_text
from bmjax.merge.recipe.step import Step
from bmjax.model import spec
from bmjax.model.config import ModelConfig


@dataclass(frozen=True)
class Needs:
    """Estimates for one step. Bytes are upper bounds but for what libraries and programs take, about 1 GB."""

    tokens: int  # that models are run on to measure or to learn, over all domains and steps
    held_out_rows: int  # documents, over all domains
    memory: int  # bytes
    disk: int  # bytes beside the result, while the step runs

    def lines(self, step: Step) -> Iterator[str]:
        """Yield it for people."""
        p = step.calibration
        assert p is not None
        yield (
            f"step '{step.name}': runs models on at most {self.tokens:,} tokens, and on {self.held_out_rows} held-out "
            f"documents of at most {p.seq_len} tokens"
        )
        whole = ", then the whole result and its moments" if p.polish or p.distill else ""
        teachers = ", and the models' heads and last hidden states" if p.distill else ""
        yield f"memory: about {size_text(self.memory)}, one layer of every model at a time{whole}{teachers}"
        yield f"disk: at most {size_text(self.disk)} beside the result, until the step is done"


def needs_of(step: Step, config: ModelConfig, itemsize: int) -> Needs:
    """Return what a step needs. itemsize: bytes of an entry in the models' files."""
    p = step.calibration
    assert p is not None
    branches, computed = len(step.branches), 2 if p.compute_dtype == "bfloat16" else 4
    rows = spec.table(config)
    layer = sum(math.prod(row.shape) // config.num_layers for row in rows if row.stacked)
    outside = max(math.prod(row.shape) for row in rows if not row.stacked)
    # Tokens.
    measured = branches * p.rows * p.seq_len
    joint = branches * p.batch * p.seq_len
    layerwise = step.method.name == "layerwise"
    joint_steps = (0 if layerwise else p.steps) + p.polish + 2 * p.distill  # distilling runs the branches, too
    tokens = measured * ((p.along != "changes") + layerwise) + joint * joint_steps
    # Memory of a layer: the models' as stored, the merged one, it once more to compute with; 20 bytes for gradients.
    # A coefficient for each entry comes with two moments and a gradient, in `learned` all the time.
    coefficients = 16 * branches if p.per == "entry" and p.steps else 0
    explicit = 4 * branches if p.along != "changes" else 0
    of_layer = itemsize * (branches + 1) + 4 + computed + explicit + 20 * bool(p.steps) + coefficients * layerwise
    # Embedding or head: of one model as stored, with a copy, two to compute with, and the loss gathers it on every
    # device of the mesh: on a CPU, which multiplies bfloat16 as float32, there is one a core, at most 8.
    sizes = p.mesh.values()
    devices = 1 << (min(os.cpu_count() or 1, 8).bit_length() - 1) if -1 in sizes else math.prod(sizes)
    gathered = devices * (4 + 2 * (computed == 2))
    of_outside = 2 * itemsize + 2 * computed + gathered
    learns = p.steps > 0 and not layerwise
    if learns or p.along == "fisher":
        # The gradient of one model's head: summed in float32 on every device, its part of the sum, the result twice.
        of_gradient = computed + gathered + 4 * devices + 4 + 2 * computed
        of_outside = max(of_outside, of_gradient + 8 * (p.along == "fisher"))
    of_system = 0
    if p.along == "regmean":
        widths = (config.hidden_size, config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
        grams = sum(4 * branches * (n * n if 2 * measured >= n else measured // branches * n) for n in widths)
        widest = config.intermediate_size
        # The factored sum, and a matrix six times in float64.
        of_system = grams + 8 * (widest**2 if 2 * measured >= widest else 0) + 48 * widest * config.hidden_size
    memory = max(layer * of_layer + of_system, outside * of_outside) + coefficients * learns * spec.count(config)
    states = p.batch * p.seq_len * config.hidden_size * 4
    memory += 16 * states + 4 * p.batch * p.seq_len * 4 * config.intermediate_size
    if p.polish or p.distill:
        # Two models, gradients and two moments; for each branch its head, and its states on the rows of all steps.
        teachers = branches * computed * config.hidden_size * (p.distill * p.batch * p.seq_len + config.vocab_size)
        memory = max(memory, 4 * 5 * spec.count(config) + teachers * bool(p.distill))
    judged = sum(p.judged if rows else p.held_out for rows in step.held_out_data)
    # Disk: the states of rows between layers, and what is kept of the contributions.
    width = p.seq_len * config.hidden_size * computed
    streams = (p.along == "regmean") + 2 * layerwise + (p.along == "fisher")
    disk = 2 * branches * p.rows * width * streams + 2 * 3 * judged * width
    everything = spec.count(config)
    if p.along == "fisher":
        disk += branches * p.rows * width * (config.num_layers + 2) + 4 * branches * everything
    if p.along == "regmean" and p.steps:
        disk += 4 * branches * layer * config.num_layers
    if learns:
        disk += branches * p.batch * width * (config.num_layers + 2)
    if p.polish or p.distill:
        disk += 4 * everything
    return Needs(tokens, judged, memory, disk)
