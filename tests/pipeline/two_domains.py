"""What tests of runs with two domains, `a` and `b`, share."""

from tests.conftest import sums, write_rows, write_student

REGMEAN = {
    "merge_method": "regmean", "base_model": "backbone", "models": ["a", "b"],
    "parameters": {"rows": 2, "held_out": 4, "seq_len": 128, "mesh": {"data": 1}},
}  # fmt: skip


def write_domains(folder, rows, **student):
    """Write a student and each domain's rows to train on and to test with. Returns the folder."""
    write_student(folder / "student", **student)
    for seed, name in enumerate(("a", "b")):
        write_rows(folder / f"{name}.jsonl", sums(rows, seed))
        write_rows(folder / f"{name}_test.jsonl", sums(6, 10 + seed))
    return folder
