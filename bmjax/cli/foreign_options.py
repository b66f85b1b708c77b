"""Options of other tools' commands that people type after `bmjax merge`, and what to do in their place."""

from collections.abc import Mapping, Sequence

_NOT_NEEDED = "leave it out"
_AS_IT_IS = f"{_NOT_NEEDED}, tensors are read from the files piece by piece, in little memory (--memory SIZE bounds it)"
_CACHE = "set HF_HOME to where downloads are kept"
# Those of mergekit-yaml, without the form `--no-...`.
MERGEKIT = {
    "--allow-crimes": f"{_NOT_NEEDED}, what counts is that names and shapes of tensors agree",
    "--unsafe-truncate-embeddings": f"{_NOT_NEEDED}, rows of tokens follow the base, or tokenizer_source",
    "--trust-remote-code": f"{_NOT_NEEDED}, no code of a model is run, it is copied",
    "--transformers-cache": _CACHE,
    "--lora-merge-cache": f"{_NOT_NEEDED}, MODEL+ADAPTER is merged as it is read",
    "--lora-merge-dtype": f"{_NOT_NEEDED}, MODEL+ADAPTER is merged in float32",
    "--random-seed": "write --seed N",
    "-v": _NOT_NEEDED,
    "--verbose": _NOT_NEEDED,
    "--cuda": "write --device gpu",
    "--low-cpu-memory": _AS_IT_IS,
    "--lazy-unpickle": f"{_NOT_NEEDED}, weights are safetensors, read piece by piece",
    "--lazy-loader": f"{_NOT_NEEDED}, weights are safetensors, read piece by piece",
    "--read-to-gpu": "write --device gpu",
    "--multi-gpu": "write --device gpu, one device computes",
    "--gpu-rich": "write --device gpu",
    "-j": f"{_NOT_NEEDED}, all cores are used",
    "--num-threads": f"{_NOT_NEEDED}, all cores are used",
    "--async-write": f"{_NOT_NEEDED}, files are written while it computes",
    "--write-threads": f"{_NOT_NEEDED}, files are written while it computes",
    "--out-shard-size": "write --shard-size SIZE, in bytes: 5GB",
    "--copy-tokenizer": f"{_NOT_NEEDED}, the tokenizer is always copied (tokenizer_source in the recipe makes another)",
    "--clone-tensors": f"{_NOT_NEEDED}, layers may stand twice",
    "--write-model-card": f"{_NOT_NEEDED}, README.md is always written",
    "--safe-serialization": f"{_NOT_NEEDED}, safetensors are always written",
}


def in_place_of(flags: Sequence[str], known: Mapping[str, str]) -> str | None:
    """Return what to do in place of options, those that other tools have; None where there are none of them."""
    advice = {
        flag: known[plain] for flag in flags if (plain := flag.replace("--no-", "--", 1).replace("_", "-")) in known
    }
    return "; ".join(f"{flag}: {text}" for flag, text in advice.items()) or None
