"""How the mesh splits tokens and a matrix over the vocabulary: shared by the embedding's lookup and the loss."""

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec

from bmjax.parallel.mesh import fitting_spec, mesh_in_scope, split_axes


class Layout(NamedTuple):
    """Mesh axes that split tokens [B, T] and a matrix with the dimensions vocabulary and width."""

    tokens: PartitionSpec = PartitionSpec()
    matrix: PartitionSpec = PartitionSpec()
    vocab: str | None = None  # the axis that splits the vocabulary
    embed: tuple[str, ...] = ()  # the axes that split the width; some of them may split the tokens, too

    @property
    def token_axes(self) -> tuple[str, ...]:
        """All axes that split the tokens."""
        return split_axes(self.tokens)

    def token_dimension(self, axis: str) -> int | None:
        """Return which dimension of the tokens [B, T] a mesh axis splits, or None."""
        return next((i for i, part in enumerate(self.tokens) if axis in split_axes((part,))), None)


def layout(tokens_shape: Sequence[int], matrix_shape: Sequence[int], matrix_axes: Sequence[str]) -> Layout:
    """Return the layout on the mesh in scope; without a mesh nothing is split.

    matrix_axes: the matrix's logical axes, ("vocab", "embed") of an embedding or ("embed", "vocab") of a head.
    """
    mesh = mesh_in_scope()
    if mesh is None:
        return Layout()
    tokens = fitting_spec(mesh, ("batch", "length"), tokens_shape)
    matrix = fitting_spec(mesh, matrix_axes, matrix_shape)
    mesh_axes = dict(zip(matrix_axes, matrix, strict=True))
    return Layout(tokens, matrix, mesh_axes["vocab"], split_axes((mesh_axes["embed"],)))
