"""A model's engine, from its name: what `bmjax serve`, `bmjax chat` and lm-eval's model class begin with."""

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.config import UserError
from bmjax.generate.cache import FEW
from bmjax.generate.engine import Engine
from bmjax.generate.settings import EngineSettings
from bmjax.log import Log, silent, stage
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf
from bmjax.weights import student as students
from bmjax.weights.student import Student


def open_model(model: str, template: str | None) -> Student:
    """Open a model with its tokenizer, and with its chat template where it has one or one is asked for.

    Raises UserError for a model without a tokenizer, and for a template that cannot be had.
    """
    student = students.open(model)
    if student.tokenizer is None:
        raise UserError(f"{student.directory}: no tokenizer files; text can only be generated with a tokenizer")
    if template is None and not student.tokenizer.chat_template:
        return student
    return students.open(model, template=template, purpose="generation")


def load_engine(student: Student, settings: EngineSettings, slots: int, log: Log = silent) -> Engine:
    """Load a model's weights into an engine.

    Arguments:
        student: the model, opened.
        settings: its context, type and mesh.
        slots: answers that are generated at once.
        log: takes a line a stage.
    """
    mesh = make_mesh(settings.mesh)
    dtype = jnp.dtype(settings.compute_dtype)
    with stage(f"loading {student.directory}", log), jax.set_mesh(mesh):
        params = hf.load_params(student.directory, student.config, mesh, dtype=np.dtype(dtype))
        context = settings.context
        return Engine(
            student.config, params, student.end_tokens, dtype=dtype, slots=slots, context=context,
            quantized_cache=settings.quantized_cache, buckets=FEW, log=log,
        )  # fmt: skip
