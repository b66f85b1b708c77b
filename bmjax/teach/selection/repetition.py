"""Measures loops: the share of a text's stretches of 64 characters that stood in it before."""

import functools

import numpy as np
from numpy.typing import NDArray

STRETCH = 64  # characters
_SAMPLED = 4096  # stretches from which on one in 16 is looked at
_SHORTEST = 4 * STRETCH


def repetition(text: str) -> float:
    """Return 0 for a text that never repeats itself, nearly 1 for one that turns in a circle.

    Of a long text the stretches whose hash ends in four zero bits are looked at, which are the same ones wherever they
    stand. Texts of less than 256 characters have no loops.
    """
    if len(text) < _SHORTEST:
        return 0.0
    if text.isascii():
        characters = np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    else:
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    # Sums of powers modulo 2**32, of which the hash of any stretch is a difference.
    powers, inverses = _powers(1 << len(characters).bit_length())
    sums = np.zeros(len(characters) + 1, np.uint32)
    np.cumsum(characters * powers[: len(characters)], out=sums[1:])
    stretches = (sums[STRETCH:] - sums[:-STRETCH]) * inverses[: len(sums) - STRETCH]
    stretches ^= stretches >> np.uint32(15)
    stretches *= np.uint32(0x2C1B3C6D)
    stretches ^= stretches >> np.uint32(12)
    if len(stretches) > _SAMPLED:
        sample = stretches[stretches < 2**28]
        # In a short circle it may happen that none is sampled.
        if len(sample) > len(stretches) // 64:
            stretches = sample
    stretches = np.sort(stretches)
    return float(np.count_nonzero(stretches[1:] == stretches[:-1]) / len(stretches))


@functools.lru_cache(maxsize=4)
def _powers(size: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return powers of an odd number modulo 2**32, and their inverses."""
    base = 0x9E3779B1
    tables = []
    for factor in (base, pow(base, -1, 2**32)):
        factors = np.full(size, factor, np.uint32)
        factors[0] = 1
        tables.append(np.multiply.accumulate(factors, dtype=np.uint32))
    return tables[0], tables[1]
