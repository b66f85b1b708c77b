"""The calibration set: packed rows of every domain to learn from, and documents held out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.branch import examples
from bmjax.branch.loader import Loader
from bmjax.calibrate.recipe import CalibratedRecipe
from bmjax.chat.template import chat_template
from bmjax.config import UserError
from bmjax.io.rows import read_rows
from bmjax.model.batch import Batch, place_batch


@dataclass
class Calibration:
    """loaders: one a domain, in the models' order. held_out: one batch of each domain. tokens: real tokens that went
    through a model so far, by purpose."""

    mesh: Mesh
    loaders: list[Loader]
    held_out: list[Batch[np.ndarray]]
    tokens: dict[str, int]

    def rows(self, domain: int, count: int, purpose: str) -> Iterator[Batch[jax.Array]]:
        """Batches of one domain until `count` rows are given, counted."""
        loader = self.loaders[domain]
        for start in range(0, min(count, len(loader.rows)), loader.batch):
            batch = loader.at(start // loader.batch)
            left = min(count, len(loader.rows)) - start
            if left < loader.batch:
                kept = np.arange(loader.batch)[:, None] < left
                batch = jax.tree.map(lambda array, kept=kept: np.where(kept, array, 0).astype(array.dtype), batch)
            yield self._place(purpose, [batch])

    def joint(self, step: int, purpose: str) -> Batch[jax.Array]:
        """The batch of a step: as many rows of each domain, one domain after another, counted."""
        return self._place(purpose, [loader.at(step) for loader in self.loaders])

    def judged(self) -> list[Batch[jax.Array]]:
        """The held-out batches, counted."""
        return [self._place("held_out", [batch]) for batch in self.held_out]

    def _place(self, purpose: str, batches: Sequence[Batch[np.ndarray]]) -> Batch[jax.Array]:
        self.tokens[purpose] = self.tokens.get(purpose, 0) + sum(batch.real_tokens for batch in batches)
        return place_batch(self.mesh, jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches))


def read(recipe: CalibratedRecipe, tokenizer: Any, vocab_size: int, base: Path, mesh: Mesh) -> Calibration:
    """The calibration set of a recipe. Raises UserError for rows that cannot be read, or too few of them."""
    p = recipe.parameters
    template = chat_template(tokenizer, p.template)
    loaders, held_out = [], []
    for entry in recipe.models:
        rows = list(read_rows(entry.data))
        if len(rows) <= p.held_out:
            raise UserError(
                f"models.{entry.model}: data: {len(rows)} rows, {p.held_out} of them to be held out (held_out); "
                "give more rows or lower it"
            )
        order = np.random.default_rng([recipe.seed, 2]).permutation(len(rows))[: max(p.documents, p.held_out + 1)]
        dataset = examples.build_dataset([rows[i] for i in order], tokenizer, template, p.seq_len, "truncate")
        examples.check_vocabulary(dataset, vocab_size, base)
        judged, learned = dataset.examples[: p.held_out], dataset.examples[p.held_out :]
        every = Loader(replace(dataset, examples=judged), p.seq_len, 1, True, False, recipe.seed)
        whole = Loader(every.dataset, p.seq_len, len(every.rows), True, False, recipe.seed)
        held_out.append(whole.at(0))
        loaders.append(Loader(replace(dataset, examples=learned), p.seq_len, p.batch, True, True, recipe.seed))
    return Calibration(mesh, loaders, held_out, {})
