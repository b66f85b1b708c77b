"""RegMean (arXiv 2212.09849), applied to changes, layer by layer: min over W of sum_b |X_b (W - change_b)|^2.

Model b's part of the solution is (sum_j G_j)^-1 G_b change_b with G_b = X_b^T X_b / t_b, for every matrix of a layer.
X_b are the inputs of that matrix as model b itself computes them on t_b tokens of its own domain. Where these are few
beside the width of the input, the inverse is taken of a t x t matrix (Woodbury's identity); no n x n matrix is made.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # type: ignore[import-untyped]

from bmjax.calibrate.data import Calibration
from bmjax.calibrate.hidden import Hidden
from bmjax.calibrate.models import Models, Tree
from bmjax.calibrate.programs import Shares, advance, cast
from bmjax.config import UserError
from bmjax.merge.recipe.calibration import CalibrationSettings
from bmjax.model import parts
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig
from bmjax.model.spec import get
from bmjax.parallel import turns

# Linear layers that read the same input: it is looked at once.
SAME_INPUT = {"k": "q", "v": "q", "up": "gate"}


@dataclass
class Inputs:
    """The inputs of a linear layer at `count` tokens: as rows, or the sum of x x^T."""

    count: int
    rows_TD: np.ndarray | None = None  # float32
    gram_DD: np.ndarray | None = None  # float32

    def is_finite(self) -> bool:
        """Return whether all of it, and its squares, are numbers."""
        return all(np.isfinite(x).all() for x in (self.diagonal(), self.gram_DD) if x is not None)

    def diagonal(self) -> np.ndarray:
        """Return the mean square of every entry, float64."""
        if self.rows_TD is not None:
            return np.einsum("td,td->d", self.rows_TD, self.rows_TD, dtype=np.float64) / self.count
        assert self.gram_DD is not None
        return np.diag(self.gram_DD).astype(np.float64) / self.count

    def times(self, matrix: np.ndarray, off_diagonal: float) -> np.ndarray:
        """Return the mean of x x^T, its other entries times `off_diagonal`, times a matrix; float64."""
        if self.rows_TD is not None:
            product = self.rows_TD.T.astype(np.float64) @ (self.rows_TD.astype(np.float64) @ matrix)
        else:
            assert self.gram_DD is not None
            product = np.empty(matrix.shape)
            for start in range(0, len(matrix), 1024):  # a second matrix in float64 would be the largest thing in memory
                product[start : start + 1024] = self.gram_DD[start : start + 1024].astype(np.float64) @ matrix
        product *= off_diagonal / self.count
        product += (1 - off_diagonal) * self.diagonal()[:, None] * matrix
        return product


class System:
    """The factored sum of the models' scaled Gram matrices, with a ridge."""

    def __init__(self, inputs: Sequence[Inputs], off_diagonal: float, ridge: float, name: str) -> None:
        """name: of the linear layer, for the UserError where the sum cannot be inverted."""
        self._name = name
        diagonal = np.sum([x.diagonal() for x in inputs], axis=0)
        added = ridge * diagonal.mean() or 1e-30
        alone = (1 - off_diagonal) * diagonal + added  # what is not of low rank
        self._rows: np.ndarray | None = None
        if off_diagonal == 0:
            self._diagonal = alone
            return
        if all(x.rows_TD is not None for x in inputs) and alone.min() > 1e-12 * diagonal.max():
            # (D + Z^T Z)^-1 = D^-1 - D^-1 Z^T (1 + Z D^-1 Z^T)^-1 Z D^-1
            scaled = [np.sqrt(off_diagonal / x.count) * x.rows_TD.astype(np.float64) for x in inputs]  # type: ignore[union-attr]
            self._rows, self._diagonal = np.concatenate(scaled), alone
            inner = np.eye(len(self._rows)) + (self._rows / alone) @ self._rows.T
            self._invert = self._inverse(inner, True)
            return
        total = np.zeros((len(diagonal), len(diagonal)))
        for x in inputs:
            gram = x.gram_DD if x.rows_TD is None else x.rows_TD.T @ x.rows_TD
            assert gram is not None
            for start in range(0, len(total), 1024):
                total[start : start + 1024] += gram[start : start + 1024] * np.float64(off_diagonal / x.count)
        total[np.diag_indices_from(total)] += alone
        self._diagonal = None
        self._invert = self._inverse(total, ridge > 0)

    def _inverse(self, matrix: np.ndarray, positive: bool) -> Callable[[np.ndarray], Any]:
        """Return a function that multiplies by the matrix's inverse; it keeps the factors, in the matrix's memory."""
        # Cholesky's half of the work and memory where a ridge makes the matrix positive.
        try:
            if positive:
                triangle = scipy.linalg.cho_factor(matrix.T, lower=True, overwrite_a=True, check_finite=False)
                return lambda right: scipy.linalg.cho_solve(triangle, right, check_finite=False)
            with warnings.catch_warnings():  # a singular matrix is said once, in words
                warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
                factors = scipy.linalg.lu_factor(matrix.T, overwrite_a=True, check_finite=False)
            return lambda right: scipy.linalg.lu_solve(factors, right, check_finite=False)
        except scipy.linalg.LinAlgError:
            raise self._singular() from None

    def _singular(self) -> UserError:
        return UserError(f"regmean: the inputs of {self._name} do not fix its weights; raise ridge")

    def _solve(self, right: np.ndarray) -> np.ndarray:
        solution = np.asarray(self._invert(right))
        if not np.isfinite(solution).all():
            raise self._singular()
        return solution

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Return the inverse times `right`, float64."""
        if self._diagonal is None:
            return self._solve(right)
        scaled = right / self._diagonal[:, None]
        if self._rows is not None:
            scaled -= self._rows.T @ self._solve(self._rows @ scaled) / self._diagonal[:, None]
        return scaled


class RegMean:
    """The contributions to the matrices of one layer after another, from the embedding on."""

    def __init__(self, models: Models, calibration: Calibration, p: CalibrationSettings, folder: Path) -> None:
        self._models, self._p = models, p
        config = models.config
        self._streams, tokens = [], 0
        for i in range(len(models.branches)):
            batches = list(calibration.rows(i, p.rows, "grams"))
            tokens += sum(int(np.count_nonzero(np.asarray(batch.segment_ids))) for batch in batches)
            self._streams.append(
                Hidden(folder, f"regmean-{i}", batches, config.hidden_size, jnp.dtype(p.compute_dtype), models.mesh)
            )
        self._as_rows = {size for size in (config.hidden_size, config.num_heads * config.head_dim,
                                           config.intermediate_size) if 2 * tokens < size}  # fmt: skip

    def shares(self, part: int, models: Sequence[Tree]) -> Shares:
        """Return the contributions to a layer's matrices, float32. Parts are asked for in their order, each once."""
        config, p = self._models.config, self._p
        base, *branches = models
        measured = []
        for model, stream, branch in zip(self._models.branches, self._streams, branches, strict=True):
            params = cast(p.compute_dtype, branch) if part <= config.num_layers else {}
            if not 1 <= part <= config.num_layers:
                if part == 0:
                    advance(config, part, params, stream, jnp.dtype(p.compute_dtype))
                continue
            measured.append(self._inputs(part, params, stream))
            for name, inputs in measured[-1].items():
                if not inputs.is_finite():
                    key = next(row.hf_key for row in parts.rows(config, part) if row.path[-2:] == (name, "kernel"))
                    raise UserError(
                        f"regmean: model '{model}': the inputs of tensor '{key}' on the rows of its domain, or their "
                        "squares, are NaN or infinite; its weights are too large to be merged by them"
                    )
            del params
        shares: dict[tuple[str, ...], list[jax.Array]] = {}
        for name in measured[0] if measured else ():
            system = System([of_model[name] for of_model in measured], p.off_diagonal, p.ridge, f"layer {part - 1} {name}")  # fmt: skip # noqa: E501
            for row in parts.rows(config, part):
                if row.path[-1] != "kernel" or SAME_INPUT.get(row.path[-2], row.path[-2]) != name:
                    continue
                start, shares[row.path] = _float64(get(base, row.path)), []
                for branch, of_model in zip(branches, measured, strict=True):
                    leaf = get(branch, row.path)
                    change = _float64(leaf) - start
                    solution = system.solve(of_model[name].times(change, p.off_diagonal)).astype(np.float32)
                    shares[row.path].append(jax.device_put(solution, leaf.sharding))
        return shares

    def flush(self, position: int) -> None:
        """Put the states that part `position` reads on disk."""
        for stream in self._streams:
            stream.flush(position)

    def _inputs(self, part: int, params: Tree, stream: Hidden) -> dict[str, Inputs]:
        """Take a model's states through a layer; returns the inputs of its linear layers by name."""
        config, window = self._models.config, parts.window(self._models.config, part)
        grams: dict[str, jax.Array] | None = None
        rows: dict[str, list[np.ndarray]] = {}
        count = 0
        for i, batch in enumerate(stream.batches):
            out, inputs, grams = _layer_and_inputs(
                config, frozenset(self._as_rows), params, stream.read(part, i), batch, window, grams
            )
            stream.write(part + 1, i, out)
            real = np.asarray(batch.segment_ids) > 0
            count += int(np.count_nonzero(real))
            for name, x in inputs.items():
                rows.setdefault(name, []).append(np.asarray(x)[real])
        assert grams is not None  # a loader has a row at least
        measured = {name: Inputs(count, rows_TD=np.concatenate(arrays)) for name, arrays in rows.items()}
        return measured | {name: Inputs(count, gram_DD=np.asarray(gram)) for name, gram in grams.items()}


def _float64(leaf: jax.Array) -> np.ndarray:
    # Of a new array: reading one that lies on several devices leaves a copy on it.
    return np.asarray(cast(np.dtype(np.float32), leaf), np.float64)


@functools.partial(turns.jit, static_argnums=(0, 1), donate_argnums=6)
def _layer_and_inputs(
    config: ModelConfig, as_rows: frozenset[int], params: Tree, x_BTD: jax.Array, batch: Batch[jax.Array], window: Any,
    grams: dict[str, jax.Array] | None,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:  # fmt: skip
    """Return a layer's output, the inputs of matrices whose width is in `as_rows`, the others' sums of x x^T."""
    inputs: dict[str, jax.Array] = {}
    out = parts.layer(config, params, x_BTD, batch.segment_ids, window, inputs)
    real = (batch.segment_ids > 0).astype(jnp.float32)[..., None]
    rows, sums = {}, {}
    for name, x in inputs.items():
        if name in SAME_INPUT:
            continue
        x = x.astype(jnp.float32) * real
        if x.shape[-1] in as_rows:
            rows[name] = x
            continue
        gram = jnp.einsum("bti,btj->ij", x, x, preferred_element_type=jnp.float32)
        sums[name] = gram if grams is None else grams[name] + gram
    return out, rows, sums
