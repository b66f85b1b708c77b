"""What a training says before its first step: its data, the marks that end a turn, and why it may learn nothing."""

from pathlib import Path

from bmjax.branch import optimizer
from bmjax.branch.choose import FEW_STEPS, Fit
from bmjax.branch.loader import Loader
from bmjax.branch.settings import ChosenTraining
from bmjax.model import spec
from bmjax.weights.student import Student


def data_line(settings: ChosenTraining, loader: Loader, student: Student, steps: int) -> str:
    """Describe documents, tokens, rows and steps."""
    data = loader.dataset
    cut = f", {data.truncated} truncated, {data.dropped} dropped" if data.truncated + data.dropped else ""
    rows = f"{len(loader.rows)} rows of {loader.length} ({loader.fill:.1%} filled)"
    return (
        f"{Path(settings.output).name}: {len(data.examples)} documents, {data.tokens:,} tokens in {rows}{cut}; "
        f"{spec.count(student.config):,} parameters, {steps} steps"
    )


def marks_line(student: Student) -> str:
    """Say which tokens end a turn, and which were added."""
    assert student.marks is not None  # the student was opened for training
    names = student.tokenizer.convert_ids_to_tokens(list(student.end_tokens))
    line = f"an answer ends with {student.marks.end}; a generation ends at {', '.join(map(str, names))}"
    rows = ", ".join(f"{text} ({token})" for text, token in student.added.items())
    return f"{line}; new tokens in free rows of the vocabulary: {rows}" if rows else line


def warnings(settings: ChosenTraining, loader: Loader, steps: int, fit: Fit) -> list[str]:
    """Return a line for each reason why a training can learn little, wastes its work, or may run out of memory."""
    lines = []
    rows = len(loader.rows)
    if loader.batch > rows:
        lines.append(
            f"batch {loader.batch} is more than the {rows} rows there are: {loader.batch - rows} rows of every step "
            "are empty and computed all the same; lower batch"
        )
    if steps < FEW_STEPS:
        advice = "a smaller batch, or " if loader.batch > 1 and settings.epochs else ""
        length = f"epochs {settings.epochs:g}, {rows} rows, {loader.batch} a step" if settings.epochs else "as given"
        lines.append(
            f"{steps} steps only ({length}): a student learns little in fewer than {FEW_STEPS}; give {advice}more "
            f"{'epochs' if settings.epochs else 'steps'}"
        )
    if line := rate_line(settings, steps):
        lines.append(line)
    if not fit.fits:
        lines.append(
            f"{fit.text} and may run out of it; give shorter rows (seq_len), remat: full, moments_dtype: bfloat16, "
            "track_move: false, or more devices"
        )
    return lines


def rate_line(settings: ChosenTraining, steps: int) -> str | None:
    """Say where the learning rate stays zero, or never reaches its peak; None where it does."""
    peak = settings.learning_rate
    rates = (optimizer.learning_rate(s, steps, peak, settings.schedule, settings.warmup) for s in range(steps))
    highest = max(rates)
    if highest == 0:
        return (
            f"the learning rate is 0 in {'the only step' if steps == 1 else f'all {steps} steps'} (learning_rate "
            f"{peak:g}, warmup {settings.warmup:g}): nothing will be learned; give more steps, or warmup: 0"
        )
    if highest < 0.99 * peak:
        return (
            f"the learning rate reaches {highest:.3g} of {peak:g} in {steps} steps (warmup {settings.warmup:g}, "
            f"schedule {settings.schedule}); give more steps, or a shorter warmup"
        )
    return None
