import json

import pytest

from bmjax.io.safetensors import SharedWriter, open_checkpoint


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Writes a model directory in the current directory; returns its checkpoint."""
    monkeypatch.chdir(tmp_path)

    def write(name, values, **config):
        folder = tmp_path / name
        folder.mkdir()
        with SharedWriter(folder, [(key, value.dtype, value.shape) for key, value in values.items()]) as writer:
            for key, value in values.items():
                writer.write(key, 0, value)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        return open_checkpoint(folder)

    return write
