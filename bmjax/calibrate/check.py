"""What can be known of the steps that look at data before the first one takes its time.

Called by dispatch.py, and by the pipeline before it trains the branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bmjax.calibrate.fit import check_models, notes_of_templates
from bmjax.calibrate.needs import Needs, needs_of
from bmjax.calibrate.rows import Domain, notes_of_judge, notes_of_rows, read_domains
from bmjax.chat.forms import UNSUPPORTED
from bmjax.chat.template import chat_template
from bmjax.config import UserError
from bmjax.io import hub
from bmjax.io.rows import mapped, read_rows
from bmjax.merge.plan.nodes import MergePlan
from bmjax.merge.recipe.recipe import Recipe, Step
from bmjax.model.config import ModelConfig
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import student as students


@dataclass(frozen=True)
class CheckedStep:
    """A step that looks at data, as far as it is known before the first step."""

    step: Step
    needs: Needs
    domains: Sequence[Domain] | None  # its rows; None where the tokenizer that they need is not made yet
    notes: Sequence[str]


def check_steps(plan: MergePlan) -> list[CheckedStep]:
    """Return what each step that looks at data needs and reads; UserError for what one would refuse."""
    checked = []
    for step in plan.recipe.steps:
        if step.calibration is None:
            continue
        # The base's directory, or that of the model that its config comes from.
        directory = plan.models[plan.recipe.donor_of(step.donor)].directory
        config = ModelConfig.from_dir(directory)
        _check_sizes(step, config)
        check_models(plan, step, config)
        domains, notes = None, [*notes_of_judge(step)]
        if plan.recipe.tokenizer is None:
            domains, template = _read_rows(step, plan.recipe.seed, directory)
            notes += [*notes_of_rows(step, domains), *notes_of_templates(plan, step, template)]
        else:  # rows are tokenized when the result's tokenizer is there
            if step.calibration.template is not None:
                chat_template(None, step.calibration.template)
            for name, *sources, columns in zip(step.branches, step.data, step.held_out_data, step.columns, strict=True):
                for key, rows in zip(("data", "held_out_data"), sources, strict=True):
                    if rows is not None:
                        next(mapped(read_rows(rows, f"model '{name}': {key}"), columns, UNSUPPORTED))
        read = [plan.models[name] for name in step.reads if name in plan.models]
        stored = [info for model in read for info in model.tensors.values()]
        itemsize = max((info.numpy_dtype.itemsize for info in stored), default=4)  # steps are stored in float32
        needs = needs_of(step, config, itemsize if len(read) == len(step.reads) else 4)
        checked.append(CheckedStep(step, needs, domains, notes))
    return checked


def check_rows(recipe: Recipe, model: str | Path) -> list[str]:
    """Return what a recipe whose models are not there yet has to say of its rows, in lines.

    model: with the config and the tokenizer that they will have. Raises UserError for rows that a merge would refuse.
    """
    lines: list[str] = []
    for step in recipe.steps:
        if step.calibration is None:
            continue
        directory = hub.model_directory(model)
        _check_sizes(step, ModelConfig.from_dir(directory))
        lines += [*notes_of_judge(step), *notes_of_rows(step, _read_rows(step, recipe.seed, directory)[0])]
    return lines


def _check_sizes(step: Step, config: ModelConfig) -> None:
    """Raise UserError for rows longer than the model's context, and for a mesh that is none."""
    p = step.calibration
    assert p is not None
    if p.seq_len > config.max_length:
        raise UserError(
            f"step '{step.name}': seq_len: {p.seq_len} is more than the base's context of {config.max_length} tokens; "
            "lower it"
        )
    make_mesh(p.mesh)


def _read_rows(step: Step, seed: int, directory: Path) -> tuple[list[Domain], str]:
    """Return a step's rows, and the chat template that they are written in. directory: of the base."""
    assert step.calibration is not None
    student = students.open(directory, template=step.calibration.template, purpose="calibration")
    assert student.template is not None
    return read_domains(step, seed, student), student.template
