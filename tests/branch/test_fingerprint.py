"""A training's fingerprint: which settings decide the result, and which student it is."""

from bmjax.branch.fingerprint import fingerprint, student_digest
from bmjax.branch.settings import SAME_RESULT, Training, TrainSettings
from tests.conftest import write_student

# Every key that the weights depend on. A key that is new in the settings fails here until someone has decided.
DECISIVE = {
    "seed", "seq_len", "batch", "steps", "epochs", "learning_rate", "schedule", "warmup", "beta1", "beta2", "eps",
    "weight_decay", "clip", "packing", "shuffle", "overlong", "template", "marks", "turns", "ignore", "freeze",
    "track_move",
}  # fmt: skip
MAY_DIFFER = {"compute_dtype", "moments_dtype", "export_dtype", "importances"}
INCIDENTAL = {
    "output", "student", "data", "save_every", "keep", "keep_every", "log_every", "wandb", "mlflow", "profile_steps",
    "mesh", "accumulate", "remat", "attention", "context_parallel", "coordinator", "num_processes", "process_id",
    "peer_timeout", "stop_code", "export_every",
    "prompt", "response", "system", "reasoning", "tools",  # these five: by the data
    "until", "continue_from",  # which part of the training; what it goes on from counts by its identity
}  # fmt: skip


def test_every_key_says_whether_the_result_depends_on_it():
    assert TrainSettings.keys_without(SAME_RESULT) == DECISIVE | MAY_DIFFER
    assert Training.keys_without(SAME_RESULT) == DECISIVE | MAY_DIFFER
    assert set(TrainSettings.model_fields) == DECISIVE | MAY_DIFFER | INCIDENTAL


def test_a_fingerprint_holds_decisive_keys_data_and_student(tmp_path):
    student = write_student(tmp_path / "student")
    settings = TrainSettings(student=str(student), data="rows.jsonl", output="run", epochs=2)
    parts = fingerprint(settings, student, "digest of the rows", 7)
    assert set(parts) == DECISIVE | {"data", "student", "continue_from"}
    assert (parts["data"], parts["steps"], parts["epochs"]) == ("digest of the rows", "7", "2.0")
    assert fingerprint(settings, student, "digest of the rows", 7, "step 3 of abc")["continue_from"] == "step 3 of abc"
    changed = settings.model_copy(update={"output": "elsewhere", "mesh": {"data": 8}, "compute_dtype": "float32"})
    assert fingerprint(changed, student, "digest of the rows", 7) == parts


def test_students_that_differ_in_their_last_tensor_differ(tmp_path):
    base = tmp_path / "a" / "model.safetensors"
    for name, end in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (base.parents[1] / name / "model.safetensors").write_bytes(b"0" * (3 * 2**20) + end)
    marks = [student_digest(tmp_path / name) for name in ("a", "b")]
    assert marks[0] != marks[1]
    assert marks[0] == student_digest(tmp_path / "a")
