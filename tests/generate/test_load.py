"""What serve and chat ask of the engine: the settings reach it, and it can say what it falls back to."""

from bmjax.generate import load
from bmjax.generate.settings import ServeSettings


def test_settings_and_log_reach_the_engine(student, monkeypatch):
    made = []
    monkeypatch.setattr(load, "Engine", lambda *arguments, **options: made.append(options))
    settings = ServeSettings.read({"model": str(student), "quantized_cache": True, "context": 64})
    lines: list[str] = []
    load.load_engine(load.open_model(str(student), None), settings, 3, lines.append)
    (options,) = made
    assert (options["quantized_cache"], options["context"], options["slots"]) == (True, 64, 3)
    options["log"]("generation: attention in plain XLA: no kernel")
    assert lines[-1] == "generation: attention in plain XLA: no kernel"
