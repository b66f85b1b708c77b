"""What the steps of a recipe did to a tensor, and the report of it."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmjax.config import UserError
from bmjax.merge.recipe.recipe import Recipe, Step


@dataclass(frozen=True)
class Stats:
    """One step on one tensor of `size` entries and the models `branches`. products: of the models' changes with each
    other, float64 [branches, branches]. reference, moved: squared norms of the base and of the result's change from it.
    conflicts: entries that one model raised and another lowered. kept: entries that each model's change went into.
    agreement: of a sample of an arcee fusion's mask, see `arcee_fusion.agreement`, for float32 and bfloat16."""

    size: int
    branches: tuple[str, ...]
    products: np.ndarray
    reference: float
    moved: float
    conflicts: float
    kept: np.ndarray
    agreement: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, size: int, branches: Sequence[str], sums: np.ndarray) -> "Stats":
        """From the totals of what `passes.statistics` sums."""
        count = len(branches)
        upper = np.triu_indices(count)
        pairs = len(upper[0])
        products = np.zeros((count, count))
        products[upper] = products.T[upper] = sums[:pairs]
        reference, moved, conflicts, *kept = (float(x) for x in sums[pairs:])
        return cls(
            size, tuple(branches), products, reference, moved, conflicts, np.array(kept or [float(size)] * count)
        )

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "size": self.size, "branches": list(self.branches), "products": self.products.tolist(),
            "reference": self.reference, "moved": self.moved, "conflicts": self.conflicts, "kept": self.kept.tolist(),
            "agreement": self.agreement,
        }  # fmt: skip

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> "Stats":
        """The inverse of `plain`."""
        arrays = {key: np.array(plain[key], np.float64) for key in ("products", "kept")}
        return cls(
            **{
                **plain,
                **arrays,
                "branches": tuple(plain["branches"]),
                "agreement": tuple((int(both), int(either)) for both, either in plain["agreement"]),
            }
        )


TensorStats = Mapping[str, Stats]


def keys(recipe: Recipe, step: Step, tensor: str) -> np.ndarray:
    """For every branch of a step the key of its random numbers, uint32 [branches, 2]: a hash of seed, tensor, model."""
    texts = [f"{recipe.seed}\0{tensor}\0{name}" for name in step.branches]
    return np.array([np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u4") for text in texts], np.uint32)


def check_overflow(tensor: str, stats: Stats, dtype: Any) -> None:
    """UserError where a merged tensor has values that its type cannot hold."""
    if not np.isfinite(stats.moved):
        raise UserError(
            f"tensor '{tensor}': the merged values overflow {np.dtype(dtype).name}; "
            "write another out_dtype, or lower the weights"
        )


def report(recipe: Recipe, tensors: Mapping[str, TensorStats]) -> dict[str, Any]:
    """What a merge did: `tensors`, `layers` and `total`, each {step: {reference_norm, moved_norm, sign_conflicts,
    cosines: {"a, b": x}, models: {name: {kept, delta_norm}}}}. `kept` and `sign_conflicts` are shares of entries. An
    arcee fusion has mask_jaccard_of_textbook, too: how much the masks of the textbook's formula in float32 and bfloat16
    agree with the exact one, on a sample. tensors: by name, the statistics of each step."""
    groups: dict[str, list[TensorStats]] = {}
    for name, stats in tensors.items():
        groups.setdefault(layer_of(name), []).append(stats)
    return {
        "tensors": {name: _summary(recipe, [stats]) for name, stats in tensors.items()},
        "layers": {layer: _summary(recipe, group) for layer, group in groups.items()},
        "total": _summary(recipe, list(tensors.values())),
    }


def layer_of(name: str) -> str:
    """The layer number in a tensor's name as text, or the part that names it: embed_tokens, norm, lm_head."""
    number = re.search(r"\.(\d+)\.", name)
    if number:
        return number.group(1)
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name


def _summary(recipe: Recipe, tensors: Sequence[TensorStats]) -> dict[str, Any]:
    last = recipe.steps[-1].name
    summary: dict[str, Any] = {"size": sum(t[last].size for t in tensors)}
    for step in recipe.steps:
        stats = [t[step.name] for t in tensors if step.name in t]
        size = max(1, sum(s.size for s in stats))
        summary[step.name] = {
            "reference_norm": float(np.sqrt(sum(s.reference for s in stats))),
            "moved_norm": float(np.sqrt(sum(s.moved for s in stats))),
            "sign_conflicts": sum(s.conflicts for s in stats) / size,
            "cosines": {
                f"{a}, {b}": cosine(stats, a, b) for i, a in enumerate(step.branches) for b in step.branches[i + 1 :]
            },
            **_agreement(stats),
            "models": {
                name: {
                    "kept": sum(float(s.kept[s.branches.index(name)]) for s in stats if name in s.branches) / size,
                    "delta_norm": float(np.sqrt(_product(stats, name, name))),
                }
                for name in step.branches
            },
        }
    return summary


def _agreement(stats: Sequence[Stats]) -> dict[str, Any]:
    found = [s.agreement for s in stats if s.agreement]
    if not found:
        return {}
    shares = [sum(a[i][0] for a in found) / max(1, sum(a[i][1] for a in found)) for i in range(2)]
    return {"mask_jaccard_of_textbook": dict(zip(("float32", "bfloat16"), shares, strict=True)), "sampled": len(found)}


def cosine(stats: Sequence[Stats], a: str, b: str) -> float:
    """The cosine between two models' changes, over all tensors together; 0 where one is nothing."""
    norms = float(np.sqrt(_product(stats, a, a) * _product(stats, b, b)))
    return _product(stats, a, b) / norms if norms > 0 else 0.0


def _product(stats: Sequence[Stats], a: str, b: str) -> float:
    both = [s for s in stats if a in s.branches and b in s.branches]
    return sum(float(s.products[s.branches.index(a), s.branches.index(b)]) for s in both)


def summary_lines(recipe: Recipe, report: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line per step for the person who ran the merge: how far it moved, and what it took of each model.

    report: what merge_report.json holds.
    """
    for step in recipe.steps:
        total = report["total"][step.name]
        moved = total["moved_norm"] / max(total["reference_norm"], 1e-30)
        kept = ", ".join(f"{name} {model['kept']:.1%}" for name, model in total["models"].items())
        yield f"{step.name}: {step.method.name}, moved {moved:.2%} of its base's norm, entries taken: {kept}"
