"""A Hugging Face directory <-> an Orbax checkpoint of the parameters in their stored dtypes, and what lies beside."""

import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp

from bmjax.config import UserError
from bmjax.io import bucket, hub
from bmjax.io.atomic import replacing
from bmjax.io.card import NAME as CARD
from bmjax.io.card import code, public_name
from bmjax.model import spec
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.parallel.mesh import make_mesh, sharding
from bmjax.weights import hf
from bmjax.weights.card import write_copy_card
from bmjax.weights.checkpoint import DiskCheckpoints
from bmjax.weights.tokenizer import TOKENIZER_FILES

PARAMS = "params"  # DST/params/0: an Orbax checkpoint whose only step is 0


def convert(source: str, destination: str, to: str) -> None:
    """Convert a model directory (for Orbax also a hub id) to the form `to`, 'hf' or 'orbax'."""
    if to not in ("hf", "orbax"):
        raise UserError(f"to: expected hf or orbax, found '{to}'")
    if bucket.exists(destination) and not bucket.is_unfinished(destination):
        raise UserError(f"{destination}: exists already; choose a new directory")
    if to == "orbax":
        directory = hub.model_directory(source)
        config = ModelConfig.from_dir(directory)
        params = hf.load_params(directory, config, make_mesh())
        with replacing(destination) as temporary:
            for file in directory.iterdir():
                if file.name in (*TOKENIZER_FILES, "config.json", "generation_config.json", CARD):
                    shutil.copyfile(file, temporary / file.name)
            dtypes = {row.name: str(spec.get(params, row.path).dtype) for row in spec.table(config)}
            with closing(DiskCheckpoints(temporary / PARAMS, keep=1)) as checkpoints:
                checkpoints.save(0, params, {"dtypes": dtypes})
        return

    directory = bucket.local(source)
    if not (directory / PARAMS).is_dir():
        ready = directory / "hf"
        hint = f"; {ready} is a Hugging Face directory already" if (ready / "config.json").is_file() else ""
        raise UserError(f"{directory}: not what `bmjax convert --to orbax` writes (no {PARAMS}/ in it){hint}")
    config, mesh = ModelConfig.from_dir(directory), make_mesh()
    with closing(DiskCheckpoints(directory / PARAMS, keep=1)) as checkpoints:
        dtypes = checkpoints.meta()["dtypes"]
        rows = [(row, jnp.dtype(dtypes[row.name]), sharding(mesh, row.axes, row.shape)) for row in spec.table(config)]
        shapes = [(row.path, jax.ShapeDtypeStruct(row.shape, dtype, sharding=layout)) for row, dtype, layout in rows]
        params = checkpoints.restore(spec.unflatten(shapes))[0]

    def card(folder: Path) -> None:
        if (directory / CARD).is_file():  # of the model that the checkpoint was made from
            shutil.copyfile(directory / CARD, folder / CARD)
        else:
            about = f"Converted by bmjax from {code(public_name(source))}, its tensors as they were."
            write_copy_card(folder, source, directory, about)

    hf.save_hf(destination, params, read_hf_config(directory), side_files=directory, card=card)
