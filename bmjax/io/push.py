"""Puts a model's or a data set's directory on the Hugging Face Hub, in one commit, once it is known to be complete.

`bmjax push` calls it. Who may write is huggingface_hub's affair: its login or HF_TOKEN, which nothing here reads.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from bmjax.config import UserError, first_line, parse_yaml_documents, read_text, shortened
from bmjax.io.card import NAME as CARD
from bmjax.io.hub import is_data_file
from bmjax.io.safetensors import INDEX, open_checkpoint
from bmjax.log import Log, silent
from bmjax.safe_yaml import read_object

# What a directory may hold that no reader of a hub wants, as patterns of huggingface_hub.
LEFT_OUT = (
    ".*", "**/.*", "*.started", "stages/**", "checkpoints/**", "exports/**", "tensorboard/**", "profile/**", "wandb/**",
    "parts/**", "*.lock", "*.tmp", "failures.jsonl",
)  # fmt: skip
_REPOSITORY = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"


@dataclass(frozen=True)
class Upload:
    """A directory that is ready to be put on the hub. kind: model or dataset."""

    directory: Path
    repository: str
    kind: str
    files: tuple[str, ...]
    size: int  # bytes of all files
    notes: tuple[str, ...]

    def lines(self, private: bool | None, revision: str | None) -> list[str]:
        """Say what would be put where."""
        seen = "public or private as your account says" if private is None else "private"
        where = f"{self.repository}{f'@{revision}' if revision else ''}"
        shown = shortened(self.files, 12)
        return [
            f"{self.directory}: a {'data set' if self.kind == 'dataset' else 'model'}, complete",
            f"{where} ({seen} if it is new): {len(self.files)} files, {self.size / 1e9:.3g} GB: {shown}",
            *self.notes,
        ]


def prepare(directory: str | Path, repository: str) -> Upload:
    """Look whether a directory can be put on the hub; nothing is sent.

    Raises UserError, naming the file, where it lacks a card, a config, or a file of its weights.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        problem = "is a file;" if folder.exists() else "no such file or directory;"
        raise UserError(f"{folder}: {problem} expected a model's or a data set's, such as runs/demo/merged/hf")
    if not re.fullmatch(_REPOSITORY, repository):
        raise UserError(f"'{repository}': expected the repository as OWNER/NAME, such as my-name/math-7b")
    if (folder / "hf" / "config.json").is_file() and not (folder / "config.json").exists():
        raise UserError(f"{folder}: the output of a training; its model is {folder / 'hf'}: push that")
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = tuple(filter_repo_objects(names, ignore_patterns=list(LEFT_OUT)))
    rows = [name for name in files if is_data_file(Path(name)) and not name.endswith(".json")]
    if (folder / "config.json").is_file():
        kind = "model"
        read_object(folder / "config.json")
        checkpoint = open_checkpoint(folder)  # every shard of the index, with every tensor that it names
        if not checkpoint.tensors:
            raise UserError(f"{folder}: the weights hold no tensor")
    elif (folder / INDEX).exists() or any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder}: weights without config.json; no library could load it from the hub")
    elif rows:
        kind = "dataset"
        if empty := next((name for name in rows if not (folder / name).stat().st_size), None):
            raise UserError(f"{folder / empty}: is empty")
    else:
        raise UserError(f"{folder}: neither a model (config.json, safetensors) nor a data set (.jsonl, .parquet, ...)")
    _check_card(folder / CARD, kind)
    notes = [
        f"note: {name} names directories of this machine; look whether that may be public"
        for name in files
        if name.endswith((".json", ".yaml", ".yml")) and _names_directories(folder / name)
    ]
    left_out = [name for name in names if name not in files]
    if left_out:
        notes.append(f"note: left out: {', '.join(left_out[:5])}{' ...' if left_out[5:] else ''}")
    size = sum((folder / name).stat().st_size for name in files)
    return Upload(folder, repository, kind, files, size, tuple(notes))


def _check_card(path: Path, kind: str) -> None:
    """Raise UserError for a card that is missing, or whose head huggingface_hub does not read."""
    if not path.is_file():
        raise UserError(f"{path}: is missing; a hub shows it as the {kind}'s page: bmjax writes one with every export")
    from huggingface_hub import DatasetCard, ModelCard

    text = read_text(path)
    match = re.match(r"\s*---\n(.*?)\n---\s*\n", text, re.DOTALL)
    if match is None:
        raise UserError(f"{path}: has no head; it begins with a line ---, fields such as license, and a line ---")
    documents = parse_yaml_documents(match[1], str(path))
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise UserError(f"{path}: the head is no list of fields, expected lines such as `license: apache-2.0`")
    try:
        (ModelCard if kind == "model" else DatasetCard)(text)
    except Exception as error:  # whatever its parser raises is the card's mistake
        raise UserError(f"{path}: huggingface_hub cannot read its head: {first_line(error)}") from None


def _names_directories(path: Path) -> bool:
    if path.stat().st_size > 2**24:
        return False
    words = re.findall(r"[\"' ]((?:/|~/)[^\"'\s]+)", path.read_text(encoding="utf-8", errors="replace"))
    paths = (Path(word).expanduser() for word in words if word.count("/") > 1)
    return any(path.parent.exists() for path in paths)


def push(upload: Upload, private: bool | None = None, revision: str | None = None, log: Log = silent) -> str:
    """Put a directory on the hub in one commit, and return its address. The repository is made where it is missing.

    Arguments:
        private: whether a new repository is private; None: as the account's settings say. An old one stays as it is.
        revision: the branch, made where it is missing; None: main.

    Raises UserError, one line: not logged in, no right to write, the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="bmjax")
    try:
        url = api.create_repo(upload.repository, repo_type=upload.kind, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(upload.repository, branch=revision, repo_type=upload.kind, exist_ok=True)
        log(f"{upload.directory}: {len(upload.files)} files, {upload.size / 1e9:.3g} GB to {url} ...")
        api.upload_folder(
            repo_id=upload.repository, folder_path=upload.directory, repo_type=upload.kind, revision=revision,
            ignore_patterns=list(LEFT_OUT), commit_message="Upload by bmjax",
        )  # fmt: skip
    except Exception as error:  # huggingface_hub's own errors and its HTTP library's
        raise UserError(f"{upload.repository}: {_reason(error)}; nothing of {upload.directory} was changed") from None
    return str(url)


def _reason(error: Exception) -> str:
    """Return in a few words why the hub did not take a directory, and what helps."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "not logged in; run `hf auth login` with a token that may write"
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set; unset it to push"
    if status == 403:
        return "the hub refuses: your token may not write there; run `hf auth login` with one that may"
    if status == 404:
        return "the hub has no such repository for you; look at the owner's name, and at `hf auth whoami`"
    # huggingface_hub's HTTP library has changed more than once: requests, httpx, httpx2.
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, OSError) and error.filename:
        return first_line(error)  # a file here, not the hub
    if status is None and names & {"OSError", "RequestException", "TransportError"}:
        return f"the hub cannot be reached ({_without_secrets(first_line(error))}); the same command tries again"
    return _without_secrets(first_line(error))


def _without_secrets(text: str) -> str:
    return re.sub(r"hf_\w{8,}", "hf_...", text)
