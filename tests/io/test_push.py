"""What is put on the hub, what is refused before, and what is said when the hub says no."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from safetensors.numpy import save_file

from bmjax.cli.main import main
from bmjax.config import UserError
from bmjax.io.push import prepare, push

CARD = "---\nlicense: mit\ntags: [bmjax]\n---\n# A model\n"
TOKEN = "hf_" + "s" * 34


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({f"w{i}": np.zeros(3, np.float32)}, folder / name)
    index = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- {config_name: math, data_files: math.jsonl}\n---\n")
    (folder / "math.jsonl").write_text('{"prompt": "1", "response": "2"}\n')
    return folder


class FakeHub:
    """Stands in for HfApi, keeps what it is asked, and raises what it is told to."""

    calls: list
    error: Exception | None = None

    def __init__(self, **options):
        assert "token" not in options

    def create_repo(self, repo_id, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", repo_id, options))
        return f"https://hub.example/{repo_id}"

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options.pop("repo_id"), options))


@pytest.fixture
def hub(monkeypatch):
    fake = type("Hub", (FakeHub,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return fake


def test_a_model_goes_up_in_one_commit(model, hub, capfd):
    (model / "checkpoints").mkdir()
    (model / "checkpoints" / "1").write_text("x")
    assert main(["push", str(model), "me/tiny", "--private", "--revision", "v2"]) == 0
    (create, branch, upload) = hub.calls
    assert create == ("create_repo", "me/tiny", {"repo_type": "model", "private": True, "exist_ok": True})
    assert branch[2]["branch"] == "v2" and upload[2]["revision"] == "v2"
    assert upload[2]["folder_path"] == model and "checkpoints/**" in upload[2]["ignore_patterns"]
    out, err = capfd.readouterr()
    assert out == "https://hub.example/me/tiny\n" and "left out: checkpoints/1" in err and TOKEN not in out + err


def test_check_sends_nothing_and_says_what_would_be(model, rows, hub, capfd):
    (model / "recipe.yaml").write_text(f"models: ['{model}']\n")
    assert main(["push", str(model), "me/tiny", "--check"]) == 0
    out = capfd.readouterr().out
    assert "a model, complete" in out and "6 files" in out and "note: recipe.yaml names directories" in out
    assert main(["push", str(rows), "me/rows", "--check"]) == 0
    assert "a data set, complete" in capfd.readouterr().out
    assert not hub.calls


def test_a_data_set_is_told_from_a_model(rows, hub):
    push(prepare(rows, "me/rows"))
    assert [call[2]["repo_type"] for call in hub.calls] == ["dataset", "dataset"]
    assert hub.calls[0][2]["private"] is None and hub.calls[1][2]["revision"] is None


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("README.md"), "README.md: is missing"),
        (remove("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors"),
        (remove("config.json"), "weights without config.json"),
        (write("config.json", "{"), "config.json: is not JSON"),
        (write("README.md", "# A model\n"), "README.md: has no head"),
        (write("README.md", "---\nlicense: [a\n---\n"), "README.md"),
        (write("README.md", "---\n- a\n---\n"), "README.md: the head is no list of fields"),
        (write("README.md", "---\nmodel-index: 3\n---\n"), "README.md: huggingface_hub cannot read its head"),
    ],
)
def test_an_incomplete_model_is_refused(model, hub, change, message):
    change(model)
    with pytest.raises(UserError, match=message) as error:
        prepare(model, "me/tiny")
    assert "\n" not in str(error.value)


def test_other_things_are_refused(model, tmp_path):
    for repository in ("tiny", "me/", "a/b/c", "me/ti ny"):
        with pytest.raises(UserError, match="OWNER/NAME"):
            prepare(model, repository)
    with pytest.raises(UserError, match="no such file or directory"):
        prepare(tmp_path / "gone", "me/tiny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a model"):
        prepare(tmp_path / "empty", "me/tiny")
    (tmp_path / "run").mkdir()
    model.rename(tmp_path / "run" / "hf")
    with pytest.raises(UserError, match=r"its model is .*run/hf: push that"):
        prepare(tmp_path / "run", "me/tiny")


def refused(status):
    request = httpx.Request("POST", "https://hub.example")
    return errors.HfHubHTTPError("no", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.LocalTokenNotFoundError("Token is required"), "run `hf auth login`"),
        (refused(401), "run `hf auth login`"),
        (refused(403), "may not write there"),
        (refused(404), "hf auth whoami"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "cannot be reached"),
        (ValueError(f"bad {TOKEN}"), "bad hf_..."),
    ],
)
def test_what_the_hub_refuses_is_one_line(model, hub, capfd, error, said):
    hub.error = error
    assert main(["push", str(model), "me/tiny"]) == 2
    err = capfd.readouterr().err
    assert said in err and TOKEN not in err and len(err.strip().splitlines()) == 1


def test_offline_is_one_line(model, hub, monkeypatch, capfd):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.error = errors.OfflineModeIsEnabled("Cannot reach")
    assert main(["push", str(model), "me/tiny"]) == 2
    assert "HF_HUB_OFFLINE is set" in capfd.readouterr().err


@pytest.fixture
def endpoint(monkeypatch):
    """A hub of this machine that refuses every token; huggingface_hub's own client talks to it."""

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.headers.get("authorization")))
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    seen: list = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()  # one that was made offline
    yield seen
    server.shutdown()
    huggingface_hub.close_session()


def test_the_real_client_sends_the_login_and_its_refusal_is_one_line(model, endpoint, capfd):
    assert main(["push", str(model), "me/tiny"]) == 2
    err = capfd.readouterr().err
    assert "run `hf auth login`" in err and TOKEN not in err and len(err.strip().splitlines()) == 1
    assert endpoint == [("/api/repos/create", f"Bearer {TOKEN}")]


def test_a_hub_that_cannot_be_reached_is_one_line(model, endpoint, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(model), "me/tiny"]) == 2
    err = capfd.readouterr().err
    assert "the hub cannot be reached" in err and len(err.strip().splitlines()) == 1
