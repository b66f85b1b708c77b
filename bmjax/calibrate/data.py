"""The calibration set: packed rows of every domain to learn from, and documents held out of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bmjax.branch.loader import Loader
from bmjax.calibrate.rows import Domain, read_domains
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.merge.recipe.recipe import Step
from bmjax.model.batch import Batch
from bmjax.parallel.mesh import sharding
from bmjax.weights.student import Student


@dataclass
class Calibration:
    """The rows of all domains, in the order of the step's branches."""

    mesh: Mesh
    loaders: list[Loader]  # one a domain
    held_out: list[Batch[np.ndarray]]  # one batch of each domain
    tokens: dict[str, int]  # real tokens that went through a model so far, by purpose

    def rows(self, domain: int, count: int, purpose: str) -> Iterator[Batch[jax.Array]]:
        """Yield batches of one domain until `count` rows are given, counted."""
        loader = self.loaders[domain]
        for start in range(0, min(count, len(loader.rows)), loader.batch):
            batch = loader.at(start // loader.batch)
            kept = np.arange(loader.batch)[:, None] < min(count, len(loader.rows)) - start
            batch = jax.tree.map(lambda array, kept=kept: np.where(kept, array, 0).astype(array.dtype), batch)
            yield self._place(purpose, [batch])

    def joint(self, step: int, purpose: str) -> Batch[jax.Array]:
        """Return the batch of a step: as many rows of each domain, one domain after another, counted."""
        return self._place(purpose, [loader.at(step) for loader in self.loaders])

    def judged(self) -> list[Batch[jax.Array]]:
        """Return the held-out batches, counted."""
        return [self._place("held_out", [batch]) for batch in self.held_out]

    def judged_in_batches(self, count: int) -> list[list[Batch[jax.Array]]]:
        """Return each domain's held-out rows in batches of at most `count` rows, not counted."""
        domains = []
        for whole in self.held_out:
            rows = min(count, len(whole.tokens))
            batches = []
            for start in range(0, len(whole.tokens), rows):
                missing = max(0, start + rows - len(whole.tokens))  # the last one is filled up with empty rows
                arrays = (whole.tokens, whole.segment_ids, whole.loss_mask)
                padded = (np.pad(array[start : start + rows], [(0, missing), (0, 0)]) for array in arrays)
                batches.append(self._on_mesh(Batch(*padded)))
            domains.append(batches)
        return domains

    def count(self, purpose: str, batch: Batch[Any]) -> None:
        """Count the real tokens of a batch that goes through one more model."""
        self.tokens[purpose] = self.tokens.get(purpose, 0) + int(batch.real_tokens)

    def _place(self, purpose: str, batches: Sequence[Batch[np.ndarray]]) -> Batch[jax.Array]:
        for batch in batches:
            self.count(purpose, batch)
        return self._on_mesh(jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches))

    def _on_mesh(self, batch: Batch[np.ndarray]) -> Batch[jax.Array]:
        return jax.device_put(batch, sharding(self.mesh, ("batch", "length"), batch.tokens.shape))


def read(
    step: Step, p: CalibrationSettings, seed: int, student: Student, mesh: Mesh, domains: Sequence[Domain] | None = None
) -> Calibration:
    """Return the calibration set of a step with the settings `p`; UserError for rows that cannot be read, or too few.

    seed: which documents are drawn and held out, and their order. student: the base, opened with its template.
    domains: the step's, where they are read.
    """
    domains = read_domains(step, seed, student) if domains is None else domains
    # All held-out rows of a domain are one batch.
    held_out = [domain.judged.with_batch(len(domain.judged.rows)).at(0) for domain in domains]
    return Calibration(mesh, [domain.learned for domain in domains], held_out, {})
