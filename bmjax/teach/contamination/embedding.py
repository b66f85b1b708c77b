"""Finds questions in other words: an embedding model compares prompts with the questions of benchmarks. An extra."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bmjax.config import UserError, first_line
from bmjax.errors import install


class Similarity:
    """The questions as vectors of an embedding model, of length 1."""

    def __init__(self, model: str, questions: Sequence[str], least: float) -> None:
        """Load the model and embed the questions.

        Arguments:
            model: what sentence-transformers loads: a directory or a hub id.
            questions: their texts.
            least: the cosine from which on a prompt asks a question in other words.

        Raises:
            UserError: when sentence-transformers is not installed, or the model cannot be had.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError(f"embedding: needs sentence-transformers; {install('embedding')}") from None
        try:
            self._model: Any = SentenceTransformer(model)
        except Exception as error:  # of its own and of the hub's kinds
            raise UserError(f"embedding: {model}: cannot be loaded: {first_line(error)}") from None
        self._questions, self._least = self._embed(questions), least

    def hits(self, prompts: Sequence[str]) -> dict[int, tuple[int, float]]:
        """Return {number of a prompt: (number of the nearest question, cosine)} of those that are near enough."""
        cosines = self._embed(prompts) @ self._questions.T
        nearest = cosines.argmax(axis=1)
        best = cosines[np.arange(len(prompts)), nearest]
        return {n: (int(nearest[n]), float(best[n])) for n in np.flatnonzero(best >= self._least).tolist()}

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))
