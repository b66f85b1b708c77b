"""Statistics of every step on every tensor, and merge_report.json made of them.

Both engines and bmjax/calibrate/ report through here, so that all merges tell the same in the same keys.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from bmjax.config import UserError
from bmjax.io.safetensors import Checkpoint
from bmjax.merge.methods import METHODS
from bmjax.merge.plan.tensor_names import layer
from bmjax.merge.recipe.step import Step


@dataclass(frozen=True)
class Stats:
    """One step on one tensor."""

    size: int  # entries
    branches: tuple[str, ...]  # the models whose changes are measured
    products: np.ndarray  # of the models' changes with each other, float64 [branches, branches]
    reference: float  # squared norm of the base
    moved: float  # squared norm of the result's change from the base
    conflicts: float  # entries that one model raised and another lowered
    kept: np.ndarray  # entries that each model's change went into, [branches]
    # Of a sample of an arcee fusion's mask, see `arcee_fusion.agreement`, for float32 and bfloat16.
    agreement: tuple[tuple[int, int], ...] = ()
    # Of methods that look at data, the squared norm of what each model gave to the result, and the sum over entries of
    # its coefficients, both [branches].
    weighted: tuple[np.ndarray, np.ndarray] | None = None
    zero: tuple[str, ...] = ()  # models that have nothing but zeros, where others have not
    vanished: tuple[int, int] = (0, 0)  # values that became 0 in a type too narrow for them, and others, if counted

    @classmethod
    def of(cls, size: int, branches: Sequence[str], sums: np.ndarray) -> "Stats":
        """Return the statistics for the totals of what `passes.statistics` sums."""
        count = len(branches)
        upper = np.triu_indices(count)
        products = np.zeros((count, count))
        products[upper] = products.T[upper] = sums[: len(upper[0])]
        reference, moved, conflicts, *kept = (float(x) for x in sums[len(upper[0]) :])
        kept_entries = np.array(kept or [float(size)] * count)
        return cls(size, tuple(branches), products, reference, moved, conflicts, kept_entries)

    def plain(self) -> dict[str, Any]:
        """Return it as the journal of a merge holds it."""
        weighted = None if self.weighted is None else [array.tolist() for array in self.weighted]
        return {**asdict(self), "products": self.products.tolist(), "kept": self.kept.tolist(), "weighted": weighted}

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> "Stats":
        """Return the statistics that `plain` wrote."""
        arrays: dict[str, Any] = {key: np.array(plain[key], np.float64) for key in ("products", "kept")}
        agreement = tuple((int(both), int(either)) for both, either in plain["agreement"])
        if plain["weighted"] is not None:
            squares, shares = (np.array(values, np.float64) for values in plain["weighted"])
            arrays["weighted"] = squares, shares
        lists = {key: tuple(plain[key]) for key in ("branches", "zero", "vanished")}
        return cls(**{**plain, **arrays, **lists, "agreement": agreement})


TensorStats = Mapping[str, Stats]


def check_overflow(tensor: str, stats: Stats, dtype: Any) -> None:
    """Raise a UserError where a merged tensor has values that its type cannot hold."""
    if not np.isfinite(stats.moved):
        raise UserError(
            f"tensor '{tensor}': the merged values overflow {np.dtype(dtype).name}; "
            "write another out_dtype, or lower the weights"
        )


def merge_report(
    recipe: Mapping[str, Any],
    seed: int,
    sources: Mapping[str, Mapping[str, Any]],
    checksums: Mapping[str, str],
    dtypes: Sequence[str],
    statistics: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of merge_report.json.

    recipe: as plain values. sources: a `source_entry` of each input. checksums: of the result's tensors. dtypes: the
    types that were written. statistics: what `report` returned.
    """
    return {
        "recipe": dict(recipe),
        "seed": seed,
        "sources": dict(sources),
        "dtypes": sorted(dtypes),
        "checksums": dict(checksums),
        "versions": {package: version(package) for package in ("jax", "numpy")},
        **statistics,
    }


def source_entry(directory: str, model: Checkpoint, checksum: str) -> dict[str, Any]:
    """Return what the report says of an input. checksum: of all its tensors that were read."""
    infos = model.tensors.values()
    return {
        "directory": directory,
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": sorted({info.numpy_dtype.name for info in infos}),
        "checksum": checksum,
    }


def report(steps: Sequence[Step], tensors: Mapping[str, TensorStats]) -> dict[str, Any]:
    """Return the statistics of a merge by tensor, by layer and in all, from those of each step on each tensor.

    `tensors`, `layers` and `total`, each {step: {reference_norm, moved_norm, sign_conflicts, cosines: {"a, b": x},
    models: {name: {kept, delta_norm}}}}. `kept` and `sign_conflicts` are shares of entries, norms and cosines are of
    the models' changes. An arcee fusion has mask_jaccard_of_textbook, too: how much the masks of the textbook's formula
    in float32 and bfloat16 agree with the exact one, on a sample. A model that a method weighted by data has its mean
    coefficient and contribution_norm, the norm of what it gave to the result.
    """
    layers: dict[str, list[TensorStats]] = {}
    for name, stats in tensors.items():
        # What lies in no layer goes by the part that names it: embed_tokens, norm, lm_head.
        part = layer(name)
        key = name.split(".")[-2:][0] if part is None else str(part.number)
        layers.setdefault(key, []).append(stats)
    return {
        "tensors": {name: _summary(steps, [stats]) for name, stats in tensors.items()},
        "layers": {key: _summary(steps, group) for key, group in layers.items()},
        "total": _summary(steps, list(tensors.values())),
    }


def methods_by_step(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the method of every step that merge_report.json has statistics of, in order."""
    steps = report["recipe"]["steps"]
    return {step["name"]: step["merge_method"] for step in steps if step["name"] in report["total"]}


def reference_of(report: Mapping[str, Any], name: str) -> str | None:
    """Return the model by whose norm a step's move is told: its base, or the first of its models; None for slices."""
    step = next(step for step in report["recipe"]["steps"] if step["name"] == name)
    method = METHODS.get(step["merge_method"])
    if "slices" in step:
        return None
    base = None if method is not None and method.base == "unused" else step.get("base_model")
    return base or next(iter(report["total"][name]["models"]), None)


def summary_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield for the person who ran a merge how far each step moved, and what it took of each model."""
    for step, method in methods_by_step(report).items():
        total = report["total"][step]
        moved = total["moved_norm"] / max(total["reference_norm"], 1e-30)
        kept = ", ".join(f"{name} {model['kept']:.1%}" for name, model in total["models"].items())
        reference = reference_of(report, step) or "its base"
        yield f"{step}: {method}, moved {moved:.2%} of the norm of {reference}, entries taken: {kept}"
        for name, model in total["models"].items():
            if "coefficient" in model:
                yield f"mean coefficient of {name}: {model['coefficient']:.2f}"
    for stage, losses in report.get("held_out_loss", {}).items():
        by_domain = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        yield f"held-out loss, {stage}{' (kept)' if stage == report['kept'] else ''}: {by_domain}"
    if "tokens" in report:
        yield "tokens: " + ", ".join(f"{purpose} {count:,}" for purpose, count in report["tokens"].items())


def _summary(steps: Sequence[Step], tensors: Sequence[TensorStats]) -> dict[str, Any]:
    summary: dict[str, Any] = {"size": sum(t[steps[-1].name].size for t in tensors)}
    for step in steps:
        stats = [t[step.name] for t in tensors if step.name in t]
        size = max(1, sum(s.size for s in stats))
        summary[step.name] = {
            "reference_norm": float(np.sqrt(sum(s.reference for s in stats))),
            "moved_norm": float(np.sqrt(sum(s.moved for s in stats))),
            "sign_conflicts": sum(s.conflicts for s in stats) / size,
            "cosines": {f"{a}, {b}": _cosine(stats, a, b) for a, b in itertools.combinations(step.branches, 2)},
            **_agreement(stats),
            "models": {name: _model_summary(stats, name, size) for name in step.branches},
        }
    return summary


def _model_summary(stats: Sequence[Stats], name: str, size: int) -> dict[str, float]:
    summary = {
        "kept": sum(float(s.kept[s.branches.index(name)]) for s in stats if name in s.branches) / size,
        "delta_norm": float(np.sqrt(_product(stats, name, name))),
    }
    weighted = [[array[s.branches.index(name)] for array in s.weighted] for s in stats if s.weighted is not None]
    if weighted:
        contribution, coefficient = (float(total) for total in np.sum(weighted, axis=0))
        summary |= {"contribution_norm": contribution**0.5, "coefficient": coefficient / size}
    return summary


def _agreement(stats: Sequence[Stats]) -> dict[str, Any]:
    samples = [s.agreement for s in stats if s.agreement]
    if not samples:
        return {}
    totals = np.sum(samples, axis=0).tolist()  # of each type, entries in both masks and in either
    float32, bfloat16 = (both / max(1, either) for both, either in totals)
    return {"mask_jaccard_of_textbook": {"float32": float32, "bfloat16": bfloat16}, "sampled": len(samples)}


def _cosine(stats: Sequence[Stats], a: str, b: str) -> float:
    """Return the cosine between two models' changes, over all tensors together; 0 where one has none."""
    norms = float(np.sqrt(_product(stats, a, a) * _product(stats, b, b)))
    return _product(stats, a, b) / norms if norms > 0 else 0.0


def _product(stats: Sequence[Stats], a: str, b: str) -> float:
    both = [s for s in stats if a in s.branches and b in s.branches]
    return sum(float(s.products[s.branches.index(a), s.branches.index(b)]) for s in both)
