"""Text in, text out: what `bmjax.generate(model, prompts)` calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bmjax.config import UserError
from bmjax.generate import sampler
from bmjax.model.config import ModelConfig
from bmjax.weights import hf


class Loaded(Protocol):
    """A loaded model, as `bmjax.load` returns it."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def directory(self) -> Path: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def dtype(self) -> str: ...


def generate(
    model: Loaded,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    top_p: float = 1.0,
    batch: int = 64,
) -> list[str] | list[list[int]]:
    """Continue every prompt.

    Arguments:
        prompts: texts (tokenized as they are, without a chat template) or lists of token ids.
        max_new_tokens: of a prompt.
        temperature: 0 is greedy.
        seed: of the random numbers.
        top_p: only the least set of tokens with this probability is sampled from.
        batch: rows at a time.

    Returns:
        The continuations, without the prompt and without the end token: texts where the model has a tokenizer, else
        token ids.

    Raises:
        UserError: for prompts that the model cannot continue.
    """
    if isinstance(prompts, str):
        raise UserError("prompts: expected a list of texts or of token lists, found one text")
    encoded: list[Sequence[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise UserError(f"{model.directory}: no tokenizer, so prompts must be lists of token ids")
            prompt = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        encoded.append(prompt)
    sampling = sampler.Sampling(max_new_tokens, temperature, top_p, seed)
    eos = hf.end_tokens(model.directory, model.config, model.tokenizer)
    with jax.set_mesh(model.mesh):
        outs = sampler.generate(model.config, model.params, encoded, sampling, eos, batch, jnp.dtype(model.dtype))
    if model.tokenizer is None:
        return [list(out.tokens) for out in outs]
    return [model.tokenizer.decode(out.tokens, skip_special_tokens=True) for out in outs]
