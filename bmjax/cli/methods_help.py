"""The last part of `bmjax merge --help`: the methods of merging and their parameters."""


def methods_text() -> str:
    """Return a few lines on every method."""
    from bmjax.config import describe
    from bmjax.merge.methods import METHODS
    from bmjax.merge.methods.method import WITHOUT_EFFECT
    from bmjax.merge.recipe.calibration import CALIBRATED, CalibrationSettings

    lines = ["methods and their parameters (a * marks those given per model, or once for all):"]
    lines += [f"  all accept {p.name}, which has no effect: {p.about.text}" for p in WITHOUT_EFFECT.values()]
    for method in METHODS.values():
        least, most = method.branches
        count = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
        base = "base_model and " if method.base == "required" else ""
        lines += ["", f"  {method.name}: {base}{count} model{'s' * (count != '1')}"]
        lines += [f"    {line}".rstrip() for line in method.summary.splitlines()]
        for p in method.parameters.values():
            default = p.default[0] if isinstance(p.default, tuple) else p.default  # one number for all models
            # A parameter that must be given has inspect's mark, a type.
            text = "(required)" if isinstance(default, type) else str(default).lower()
            title = f"{p.name}{'*' if p.about.per_model else ''}: {text}"
            lines.append(f"      {title:<18} {p.expected}. {p.about.text[:1].upper()}{p.about.text[1:]}.")
    lines += [
        "",
        f"  {', '.join(CALIBRATED)}: base_model and 1 or more models, each with `data:` (rows of its domain)",
        "    Merges that look at data: student = base + sum of coefficient * contribution, the coefficients learned",
        "    by gradient descent through the merge and the model, or (layerwise) in each layer on the distance of its",
        "    outputs from the models' own. regmean: not learned, all 1. In memory: one layer of every model, or the",
        "    embedding or head of one.",
        *(f"      {line}" for line in describe(CalibrationSettings)),
    ]
    return "\n".join(lines)
