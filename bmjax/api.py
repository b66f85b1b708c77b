"""The Python interface: what `import bmjax` offers. Every function hands its arguments to the phase that does the work.

All raise UserError, one line, for what a user can mend.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bmjax.branch.examples import tokenize
from bmjax.calibrate.dispatch import merge
from bmjax.chat.forms import read_conversation
from bmjax.chat.marks import end_of_turn
from bmjax.chat.template import chat_template, render_prompt
from bmjax.config import UserError, nearest
from bmjax.generate import prompts as generation
from bmjax.generate.requests import Sampling
from bmjax.generate.text import TextStream
from bmjax.io.card import code, public_name
from bmjax.model import qwen2, spec
from bmjax.model.batch import Batch
from bmjax.model.config import ModelConfig, read_hf_config
from bmjax.parallel.mesh import make_mesh, sharding
from bmjax.weights import hf
from bmjax.weights import student as students
from bmjax.weights.card import write_copy_card
from bmjax.weights.tokenizer import end_tokens

__all__ = [
    "Model", "collect", "convert", "evaluate", "generate", "load", "merge", "plan", "rejudge", "run", "save",
    "select", "tokenize", "train",
]  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")

Source = str | Path | Mapping[str, Any]  # the path of a YAML file, or its keys


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded model, as `load` returns it.

    Attributes:
        config: the sizes of the architecture.
        params: the parameters, a nested dictionary of jax.Array.
        tokenizer: transformers' fast tokenizer; None where the directory has none.
        directory: where its files are.
        mesh: the devices that it is on and computes on.
        dtype: of the computation: 'float32', 'bfloat16' or 'float16'.
    """

    config: ModelConfig
    params: qwen2.Params
    tokenizer: Any
    directory: Path
    mesh: Mesh
    dtype: str

    def __repr__(self) -> str:
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        millions = spec.count(self.config) / 1e6
        return f"<bmjax.Model: Qwen2, {millions:,.2f} M parameters, {self.dtype}, {axes}, {self.directory}>"

    def logits(self, tokens_BT: Any, segment_ids: Any = None, positions: Any = None) -> jax.Array:
        """Compute the logits of the next token after every token.

        Arguments:
            tokens_BT: token ids, whole numbers [B, T]: an array, or lists of equal length.
            segment_ids: [B, T], 1.. for each document of a packed row, 0 for padding. Default: one document a row.
            positions: [B, T] or [1, T], of each token in its document. Default: counted from 0 in every document.

        Returns: float32 [B, T, V].
        Raises: UserError for shapes or types that do not fit, ids beyond the vocabulary, rows longer than the context.
        """
        arrays = self._arrays(tokens_BT, segment_ids, positions)
        with jax.set_mesh(self.mesh):
            return _compiled(qwen2.logits, self.config, self.dtype)(self.params, *arrays)

    def loss(
        self, tokens_BT: Any, loss_mask_BT: Any, segment_ids: Any = None, positions: Any = None
    ) -> tuple[float, int]:
        """Compute the next-token loss of the tokens that the mask makes targets.

        Arguments:
            tokens_BT: token ids, whole numbers [B, T].
            loss_mask_BT: [B, T]; 1 makes tokens[b, t] a target, predicted from the tokens before it. The first token
                of a document has nothing before it and is never counted.
            segment_ids: as for `logits`.
            positions: as for `logits`.

        Returns: (nats, count): the loss summed over the targets, and how many those are.
        Raises: UserError as `logits`.
        """
        tokens, segments, numbered = self._arrays(tokens_BT, segment_ids, positions)
        batch = Batch(tokens, segments, self._on_mesh(loss_mask_BT, "loss_mask", tokens.shape))
        with jax.set_mesh(self.mesh):
            nats, count = _compiled(qwen2.loss_sum, self.config, self.dtype)(self.params, batch, numbered)
        return float(nats), int(count)

    def _arrays(self, tokens: Any, segments: Any, positions: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return tokens, segment ids and positions, checked and on the mesh: int32 [B, T] each."""
        tokens = self._on_mesh(tokens, "tokens")
        length, limit = tokens.shape[1], self.config.max_length
        if length > limit:
            raise UserError(f"tokens: {length} tokens, the model's context holds {limit}; shorten it")
        low, high = (int(jnp.min(tokens)), int(jnp.max(tokens))) if tokens.size else (0, 0)
        if low < 0 or high >= self.config.vocab_size:
            wrong_id = low if low < 0 else high
            raise UserError(f"tokens: ids must lie in 0..{self.config.vocab_size - 1}, found {wrong_id}")
        segments = jnp.ones_like(tokens) if segments is None else self._on_mesh(segments, "segment_ids", tokens.shape)
        if positions is None:
            return tokens, segments, qwen2.default_positions(segments)
        return tokens, segments, self._on_mesh(positions, "positions", tokens.shape)

    def _on_mesh(self, rows: Any, name: str, shape: tuple[int, ...] | None = None) -> jax.Array:
        """Return `rows` as int32 [B, T] on the mesh; UserError unless they are whole numbers of `shape`."""
        try:
            array = np.asarray(rows)
        except ValueError:
            lengths = sorted({len(row) for row in rows if hasattr(row, "__len__")})
            raise UserError(
                f"{name}: rows of different lengths ({', '.join(map(str, lengths[:5]))}); pad them to one length, "
                "with segment_ids 0 for padding"
            ) from None
        if array.ndim != 2:
            raise UserError(f"{name}: {array.ndim} dimensions, expected 2: [rows, tokens]")
        if array.dtype.kind not in "iub":
            raise UserError(f"{name}: expected whole numbers, found {array.dtype}")
        if shape is not None and name == "positions" and len(array) == 1:  # the same for every row
            array = np.broadcast_to(array, (shape[0], array.shape[1]))
        if shape is not None and array.shape != shape:
            raise UserError(f"{name}: shape {array.shape}, expected that of the tokens, {shape}")
        return jax.device_put(array.astype(np.int32), sharding(self.mesh, ("batch", "length"), array.shape))


@lru_cache(maxsize=32)
def _compiled(function: Callable[..., Any], config: ModelConfig, dtype: str) -> Any:
    """Return a function of qwen2 compiled for a model's sizes; it computes in `dtype`, the parameters too."""

    def compute(params: qwen2.Params, *arrays: jax.Array) -> Any:
        cast = jax.tree.map(lambda a: a.astype(dtype), params)
        return function(qwen2.Qwen2(config, jnp.dtype(dtype)), cast, *arrays)

    return jax.jit(compute)


def load(source: str | Path, dtype: str | None = "float32", mesh: Mapping[str, int] | Mesh | None = None) -> Model:
    """Load a Hugging Face model (Qwen2, Qwen2.5, R1-Distill-Qwen).

    Arguments:
        source: a directory or a hub id, org/name or org/name@revision.
        dtype: of the parameters and of the computation: 'float32', 'bfloat16' or 'float16'; None: as stored.
        mesh: devices along data, fsdp, context and tensor, for instance {"fsdp": 4, "tensor": 2}; None: one device.

    Raises: UserError for anything wrong with the directory, the dtype or the mesh.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: '{dtype}' is not one of {', '.join(DTYPES)}{nearest(str(dtype), DTYPES)}")
    student = students.open(source)
    devices = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
    stored_dtype = None if dtype is None else np.dtype(jnp.dtype(dtype))
    params = hf.load_params(student.directory, student.config, devices, dtype=stored_dtype)
    compute_dtype = dtype or str(params["embed"]["embedding"].dtype)
    return Model(student.config, params, student.tokenizer, student.directory, devices, compute_dtype)


def save(model: Model, output: str | Path) -> Path:
    """Write a model as a Hugging Face directory, with the config and tokenizer of the one it was loaded from.

    Arguments:
        model: what `load` returned, perhaps with other parameters (`dataclasses.replace(model, params=...)`).
        output: the directory; it is replaced only once everything is written. It is returned as a Path.

    Raises: UserError when it cannot be written.
    """
    _check_loaded(model)
    source = str(model.directory)
    about = f"Saved by bmjax, with the config and the tokenizer of {code(public_name(source))}."
    hf.save_hf(
        Path(output), model.params, read_hf_config(model.directory), side_files=model.directory,
        card=lambda folder: write_copy_card(folder, source, model.directory, about),
    )  # fmt: skip
    return Path(output)


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int] | Sequence[Mapping[str, str]]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    top_p: float = 1.0,
    batch: int = 64,
    template: str | None = None,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
) -> list[str] | list[list[int]]:
    """Continue every prompt.

    Arguments:
        model: what `load` returned.
        prompts: each a text (tokenized as it stands), a list of token ids, or a chat: a list of turns
            {"role": "system" | "user" | "assistant", "content": TEXT}, rendered with the chat template.
        max_new_tokens: the most tokens of a continuation.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        seed: of the sampling. A prompt's tokens depend on the seed and its number only.
        top_p: sample from the least set of tokens that has this probability.
        batch: the most prompts that are computed at once.
        template: of chats: None for the tokenizer's own, a name of bmjax/chat/templates, or FILE.jinja.
        top_k: sample from so many of the likeliest tokens; 0: all.
        min_p: sample from the tokens that have at least this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that are in the prompt or the continuation less likely.
        stop: strings that end a continuation; its text ends before them.

    Returns: the continuations in order, without prompt and end token: texts, or lists of token ids where the model has
    no tokenizer. Texts are those of transformers with skip_special_tokens: a special token has none, and a <think> that
    is one leaves none either.
    Raises: UserError for a prompt that is empty, of another kind, or longer than the context, and for settings of the
    sampling that mean nothing.
    """
    _check_loaded(model)
    ends = list(end_tokens(model.directory, model.config.eos_token_ids, model.tokenizer))
    if isinstance(prompts, str):
        raise UserError("prompts: expected a list of texts or of token lists, found one text")
    if len(prompts) and isinstance(prompts[0], (int, np.integer, Mapping)):
        kind = "one chat" if isinstance(prompts[0], Mapping) else "one list of token ids"
        raise UserError(f"prompts: expected a list of prompts, found {kind}; put it in a list")
    encoded: list[Sequence[int]] = []
    for number, prompt in enumerate(prompts):
        # Arrays of token ids are taken as lists.
        tokens: Any = prompt.tolist() if isinstance(prompt, (np.ndarray, jax.Array)) else prompt
        is_chat = isinstance(tokens, Sequence) and len(tokens) and all(isinstance(turn, Mapping) for turn in tokens)
        if (is_chat or isinstance(tokens, str)) and model.tokenizer is None:
            wanted = "prompts must be lists of token ids"
            raise UserError(f"{model.directory}: no tokenizer, so {wanted}; prompt {number} is not")
        if is_chat:
            text = chat_template(model.tokenizer, template)
            messages = read_conversation({"messages": list(tokens)}, f"prompt {number}").messages
            tokens = render_prompt(model.tokenizer, messages, text, f"prompt {number}")
            # A turn of the template may end otherwise than the model's texts.
            end = end_of_turn(model.tokenizer, text)
            ends += [] if end is None or end in ends else [end]
        if isinstance(tokens, str):
            tokens = model.tokenizer(tokens, add_special_tokens=False)["input_ids"]
        if not isinstance(tokens, Sequence) or not all(type(t) is int or isinstance(t, np.integer) for t in tokens):
            raise UserError(f"prompt {number}: expected a text, a list of token ids or a list of chat turns")
        encoded.append(tokens)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
    texts = []
    if stop:
        if model.tokenizer is None:
            raise UserError(f"{model.directory}: no tokenizer, so there is no text to look for stop strings in")
        texts = [TextStream(model.tokenizer, stop) for _ in encoded]

    def is_over(number: int, tokens: Sequence[int]) -> bool:
        texts[number].push(tokens)
        return texts[number].stopped is not None

    dtype = jnp.dtype(model.dtype)
    with jax.set_mesh(model.mesh):
        outs = generation.generate(
            model.config, model.params, encoded, sampling, ends, batch, dtype, is_over if stop else None
        )
    if model.tokenizer is None:
        return [list(out.tokens) for out in outs]
    for stream in texts:
        stream.finish()
    return [stream.text for stream in texts] or model.tokenizer.batch_decode(
        [out.tokens for out in outs], skip_special_tokens=True
    )


def _check_loaded(model: Any) -> None:
    if not isinstance(model, Model):
        kind = f"a name '{model}'" if isinstance(model, (str, Path)) else type(model).__name__
        raise UserError(f"model: expected a loaded model, found {kind}; load it first: m = bmjax.load(DIR)")


def collect(settings: Source, *overrides: str) -> dict[str, int]:
    """Ask a teacher for traces; `bmjax collect`. Traces that are there already are not asked for again.

    Arguments:
        settings: the keys of `bmjax collect`, or the path of a YAML file.
        overrides: `key.sub=value` changes to them.

    Returns: how many traces were wanted, present, collected, failed, right, wrong, unjudged, disputed (a second judge
    says otherwise), truncated and refused, and "ended by NAME" for each finish reason of answers that are not whole.
    Raises: UserError for bad settings or problems, and an endpoint that cannot be reached or refuses the key.
    KeyboardInterrupt after an interrupt, once the answers in flight are kept; a second one does not wait for them.
    """
    from bmjax.teach.collect import collect as collect_traces
    from bmjax.teach.settings import CollectSettings

    return collect_traces(CollectSettings.read(settings, overrides))


def rejudge(settings: Source, *overrides: str) -> dict[str, Any]:
    """Judge existing traces anew, with new references where there are problems; `bmjax judge`. No teacher is asked.

    Arguments:
        settings: the keys of `bmjax judge`, or the path of a YAML file.
        overrides: `key.sub=value` changes to them.

    Returns: traces, before and after (the number of each verdict), changed (of each change, as "wrong -> right"),
    references (how many are new), kept (verdicts that could not be made anew, by reason), no_problem and output.
    Raises: UserError for bad settings, traces or problems, and a reference that no judge can read.
    """
    from bmjax.teach.rejudge import rejudge as judge_traces
    from bmjax.teach.settings import JudgeSettings

    return judge_traces(JudgeSettings.read(settings, overrides))


def select(settings: Source, *overrides: str) -> dict[str, dict[str, int]]:
    """Select the traces worth training on; `bmjax select`. Writes one dataset per domain.

    Arguments:
        settings: the keys of `bmjax select`, or the path of a YAML file.
        overrides: `key.sub=value` changes to them.

    Returns: {domain: {"kept": count, reason: count of the traces dropped for it, ...}}.
    Raises: UserError for bad settings or traces, and for a domain of which nothing is left.
    """
    from bmjax.teach.select import select as select_traces
    from bmjax.teach.settings import SelectSettings

    return select_traces(SelectSettings.read(settings, overrides))


def train(settings: Source, *overrides: str) -> dict[str, Any]:
    """Train a student on a dataset, or resume a training; `bmjax train`.

    Arguments:
        settings: the keys of `bmjax train`, or the path of a YAML file.
        overrides: `key.sub=value` changes to them.

    Returns: hf (path of the trained model), steps, tokens (those seen, without padding), loss (nats a token, of the
    last step), and more.
    Raises: UserError for settings and data that cannot be trained with.
    """
    from bmjax.branch.settings import TrainSettings
    from bmjax.branch.train import train as run_training

    return run_training(TrainSettings.read(settings, overrides))


def evaluate(settings: Source, *overrides: str) -> dict[str, dict[str, Any]]:
    """Score a model, here or behind an endpoint, on tasks; `bmjax eval`. Writes scores.json and every sample.

    Arguments:
        settings: the keys of `bmjax eval`, or the path of a YAML file.
        overrides: `key.sub=value` changes to them.

    Returns: {task: scores}: accuracy with its 95 % interval and what belongs to it, and held-out loss in nats a token,
    as far as the task has questions and traces.
    Raises: UserError for bad settings, tasks or models.
    """
    from bmjax.evaluate.run import evaluate as run_evaluation
    from bmjax.evaluate.settings import EvalSettings

    return run_evaluation(EvalSettings.read(settings, overrides))


def plan(settings: Source, *overrides: str, topology: str, search: bool = False) -> dict[str, Any]:
    """Compile the training step for TPU chips that you don't have; `bmjax plan`. It can take minutes.

    Arguments:
        settings: of the training, as for `train`.
        topology: CHIP:SHAPE, for instance "v5p:4x4x4".
        search: try meshes, microbatches and remat, and return the best that fits; `overrides` are its changes.

    Returns: fits, chips, hbm_gib, gib_per_chip, flops_per_step, step_seconds_bound, tokens_per_second_bound,
    collective_bytes (of a chip a step, by mesh axis), compile_seconds and more.
    Raises: UserError for an unknown topology and settings that cannot be trained with.
    """
    from bmjax.branch.settings import TrainSettings
    from bmjax.plan.plan import plan_training

    return plan_training(TrainSettings.read(settings, overrides), topology, search)


def convert(source: str | Path, destination: str | Path, to: str) -> Path:
    """Convert a Hugging Face directory to an Orbax checkpoint of its parameters, or back; `bmjax convert`.

    Arguments:
        source: for to="orbax" a Hugging Face directory or hub id; for to="hf" what to="orbax" has written, a checkpoint
            of a training (RUN/checkpoints/STEP), or its output RUN for the newest.
        destination: a directory that does not exist. It is returned as a Path.
        to: "hf" or "orbax". Tensors keep their dtype.

    Raises: UserError for a wrong source, an existing destination, another `to`.
    """
    from bmjax.branch.export import checkpoint_of, export_checkpoint
    from bmjax.weights.convert import convert as convert_files

    if to == "hf" and (checkpoint := checkpoint_of(str(source))) is not None:
        export_checkpoint(checkpoint, destination)
    else:
        convert_files(str(source), str(destination), to)
    return Path(destination)


def run(config: Source, output: str | Path | None = None, *overrides: str) -> dict[str, Any]:
    """Run, or continue, the whole experiment; `bmjax run`.

    Arguments:
        config: the path of a YAML file, or its keys.
        output: directory of the run; None: the config's `output`.
        overrides: `key.sub=value` changes to the config.

    Returns: what output/report.json holds: models with their scores, stages, versions, config.
    Raises: UserError for settings, data and models that do not fit.
    """
    from bmjax.pipeline import phases, settings

    return phases.run(settings.RunSettings.read(config, overrides), output)
