"""Answers samples with a model in this process: a directory or hub id, on the mesh of the settings."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.branch.step import size_text
from bmjax.chat.reasoning import opens_thought, with_opening
from bmjax.chat.template import render_prompt
from bmjax.evaluate.answering import Generated, Receive, turns
from bmjax.evaluate.judging import OVER_CONTEXT
from bmjax.evaluate.questions import Asked
from bmjax.evaluate.settings import EvalSettings
from bmjax.generate.answer import check_prompt
from bmjax.generate.cache import FEWEST, token_bytes
from bmjax.generate.engine import Engine
from bmjax.generate.requests import FinishReason, Request, Sampling, Token
from bmjax.generate.text import answer_text
from bmjax.log import Log
from bmjax.model import spec
from bmjax.parallel.mesh import make_mesh
from bmjax.weights import hf
from bmjax.weights import student as students


class LocalAnswerer:
    """The model of `settings`, opened at once; its weights are read when they are first needed."""

    def __init__(self, settings: EvalSettings, log: Log) -> None:
        self._settings, self._log = settings, log
        self.student = students.open(settings.model, template=settings.template, purpose="evaluation")
        self.mesh = make_mesh(settings.mesh)
        context, has_traces = self.student.config.max_length, any(task.traces for task in settings.tasks.values())
        if has_traces and "seq_len" in settings.model_fields_set and settings.seq_len > context:
            log(
                f"seq_len: {settings.seq_len} is more than the model's context: the loss is of rows of {context} tokens"
            )
        # Another model under the same name is another model: its files tell.
        files = sorted([*self.student.directory.glob("*.safetensors"), self.student.directory / "config.json"])
        states = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        quantized = ["int8 cache"] if settings.quantized_cache else []
        self.identity = "\n".join([str(settings.model), settings.compute_dtype, *quantized, *states])
        self._tokens: dict[tuple[str, str], list[int]] = {}  # of every task's prompts, as the chat template writes them
        self._context = 1

    @cached_property
    def params(self) -> Any:
        """The weights in the type of the computation, on the mesh in scope."""
        dtype = np.dtype(jnp.dtype(self._settings.compute_dtype))
        return hf.load_params(self.student.directory, self.student.config, self.mesh, dtype=dtype)

    def memory_line(self) -> str:
        """Say what weights and cache take on a device, by their shapes. After `check` of all tasks."""
        config, settings = self.student.config, self._settings
        ways = {axis: self.mesh.shape[axis] for axis in ("data", "fsdp", "context", "tensor")}
        dtype = jnp.dtype(settings.compute_dtype)
        held = ways["fsdp"] * ways["context"] * ways["tensor"]
        weights = spec.count(config) * dtype.itemsize / held
        rows = -(-settings.batch // (ways["data"] * ways["fsdp"]))
        cache = rows * self._context * token_bytes(config, dtype, settings.quantized_cache) / ways["tensor"]
        line = (
            f"weights of {spec.count(config):,} parameters in {settings.compute_dtype}: {size_text(weights)} a device"
        )
        if not self._tokens:  # nothing is generated
            return line
        return (
            f"{line}; a cache of {settings.batch} answers of at most {self._context:,} tokens, prompts included: "
            f"{size_text(cache)} (fewer at once where that does not fit)"
        )

    @contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Compute on the model's mesh while the block runs."""
        with jax.set_mesh(self.mesh):
            yield

    def check(self, name: str, asked: Sequence[Asked]) -> None:
        """See `Answerer`."""
        student, longest = self.student, self._settings.of_task(name, "max_new_tokens")
        assert student.template is not None  # it was opened for evaluation
        new: dict[str, Asked] = {}  # by prompt, the first sample of each
        for sample in asked:
            if (name, sample.prompt) not in self._tokens:
                new.setdefault(sample.prompt, sample)
        texts = []
        for prompt, sample in new.items():
            chat = turns(self._settings, name, prompt)
            texts.append(render_prompt(student.tokenizer, chat, student.template, sample.question.location))
        encoded = student.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for (prompt, sample), tokens in zip(new.items(), encoded, strict=True):
            self._tokens[name, prompt] = tokens
            if len(tokens) < student.config.max_length:
                check_prompt(student.config, tokens, sample.question.location)
                self._context = max(self._context, min(len(tokens) + longest, student.config.max_length))

    @cached_property
    def _engine(self) -> Engine:
        """The engine, with room for the longest prompt and answer of all tasks."""
        settings, student = self._settings, self.student
        return Engine(
            student.config, self.params, student.end_tokens, dtype=jnp.dtype(settings.compute_dtype),
            slots=settings.batch, context=self._context, quantized_cache=settings.quantized_cache, buckets=FEWEST,
            log=self._log,
        )  # fmt: skip

    def answer(self, name: str, asked: Sequence[Asked], receive: Receive) -> list[str]:
        """See `Answerer`."""
        settings, student = self._settings, self.student
        sampling = Sampling(
            max_new_tokens=settings.of_task(name, "max_new_tokens"),
            temperature=settings.of_task(name, "temperature") or 0.0,
            top_p=settings.of_task(name, "top_p") or 1.0,
        )
        with self.on_mesh():

            def submit(sample: Asked, prompt: Sequence[int]) -> None:
                drawn: list[int] = []
                # Every problem draws numbers of its own, or chance would favour all of a sample's answers alike.
                problem = sample.question.problem.encode("utf-8", "surrogatepass")
                seed = ((settings.of_task(name, "seed") or 0) + zlib.crc32(problem)) % 2**31

                def on_tokens(tokens: Sequence[Token], reason: FinishReason | None) -> None:
                    drawn.extend(token.id for token in tokens)
                    if reason is not None:
                        receive(sample, self._generated(prompt, drawn, reason, seed))

                self._engine.submit(Request(tuple(prompt), replace(sampling, seed=seed), sample.sample), on_tokens)

            waiting = False
            for sample in asked:
                prompt = self._tokens[name, sample.prompt]
                if len(prompt) < student.config.max_length:
                    submit(sample, prompt)
                    waiting = True
                else:
                    receive(sample, Generated("", OVER_CONTEXT, 0, len(prompt)))
            if waiting:
                self._engine.run()
        return []

    def _generated(self, prompt: Sequence[int], tokens: Sequence[int], finish_reason: str, seed: int) -> Generated:
        """Return an answer as text. Where the template opens the thought, a text without its end is all thought."""
        tokenizer = self.student.tokenizer
        is_open = opens_thought(tokenizer.decode(prompt[-32:]))  # a tag that is no token of its own is at most 7
        text = with_opening(answer_text(tokenizer, tokens), is_open)
        return Generated(text, finish_reason, len(tokens), len(prompt), seed)
