"""The stream of batches: each document once an epoch, a function of (seed, step), packed and read ahead."""

import json
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest

from bmjax.branch import loader as module
from bmjax.branch.examples import Dataset, Encoding, Example, build_dataset
from bmjax.branch.loader import Loader, load_batch, read_ahead
from bmjax.chat.template import chat_template
from bmjax.model import qwen2
from bmjax.parallel.mesh import make_mesh
from tests.conftest import SHARED
from tests.model.reference import build


def dataset(count: int = 37, seed: int = 0, top: int = 40, vocab: int = 97) -> Dataset:
    """Documents whose first two tokens are their own mark, so that a row can be read back."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        length = int(rng.integers(4, top))
        tokens = rng.integers(2, vocab, length).astype(np.int32)
        tokens[:2] = number // 10 + 2, number % 10 + 2
        mask = (np.arange(length) >= length // 2).astype(np.uint8)
        examples.append(Example(tokens, mask))
    return Dataset(tuple(examples), 0, 0, "digest", sum(len(e.tokens) for e in examples), vocab - 1)


def documents(batch) -> list[tuple[int, list[int], list[int]]]:
    """(document number, its tokens, its mask) of every segment of a batch."""
    contents = []
    for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            mine = tokens[at].tolist()
            assert np.ptp(np.flatnonzero(at)) == at.sum() - 1  # in one piece
            contents.append(((mine[0] - 2) * 10 + mine[1] - 2, mine, mask[at].tolist()))
        assert not tokens[segments == 0].any() and not mask[segments == 0].any()
    return contents


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_document_is_seen_whole_and_once_an_epoch(packing, shuffle):
    data = dataset()
    loader = Loader(data, 64, 4, packing, shuffle, seed=3)
    for epoch in range(2):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        seen = [document for step in steps for document in documents(loader.at(step))]
        assert Counter(number for number, _, _ in seen) == Counter(range(37))
        for number, tokens, mask in seen:
            assert tokens == data.examples[number].tokens.tolist()
            assert mask == data.examples[number].loss_mask.tolist()
    shapes = {loader.at(step).tokens.shape for step in range(loader.steps_per_epoch)}
    assert shapes == {(4, 64)}
    assert sum(loader.at(step).real_tokens for step in range(loader.steps_per_epoch)) == data.tokens
    rows = len(loader.rows)
    assert loader.fill == pytest.approx(data.tokens / (rows * 64))


def test_rows_of_gsm8k_are_98_percent_full(qwen2_tokenizer):
    """The training set as chat conversations, in rows of 2,048 tokens."""
    file = SHARED / "data" / "gsm8k" / "train.jsonl"
    problems = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    turns = [("", {"prompt": problem["question"], "response": problem["answer"]}) for problem in problems]
    data = build_dataset(turns, Encoding(qwen2_tokenizer, chat_template(qwen2_tokenizer, "chatml"), 2048, "error"))
    loader = Loader(data, 2048, 8, packing=True, shuffle=True, seed=0)
    assert len(data.examples) == 7473 and sum(len(row) for row in loader.rows) == 7473
    assert loader.fill >= 0.98
    assert data.tokens / (len(loader.rows) * 2048) == loader.fill


def test_some_rows_of_a_batch_are_those_of_the_whole():
    loader = Loader(dataset(), 64, 4, True, True, seed=3)
    last = loader.steps_per_epoch - 1
    assert len(loader.rows) % 4  # so that the last batch has an empty row
    for step in (0, last):
        whole, part = loader.at(step), loader.at(step, range(2, 4))
        for name in ("tokens", "segment_ids", "loss_mask"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[2:4])
        assert loader.real_tokens(step) == whole.real_tokens


def test_without_shuffling_and_packing_the_files_order_is_kept():
    loader = Loader(dataset(), 64, 4, packing=False, shuffle=False, seed=3)
    order = [number for step in range(loader.steps_per_epoch) for number, _, _ in documents(loader.at(step))]
    assert order == list(range(37))


def test_a_batch_is_a_function_of_seed_and_step():
    steps = list(range(25))
    first = Loader(dataset(), 64, 4, True, True, seed=3)
    straight = [first.at(step) for step in steps]
    other = Loader(dataset(), 64, 4, True, True, seed=3)
    backwards = {step: other.at(step) for step in reversed(steps)}
    for step in steps:
        for name in ("tokens", "segment_ids", "loss_mask"):
            np.testing.assert_array_equal(getattr(straight[step], name), getattr(backwards[step], name))
    reseeded = Loader(dataset(), 64, 4, True, True, seed=4)
    assert any((reseeded.at(step).tokens != straight[step].tokens).any() for step in range(3))
    unpacked = Loader(dataset(), 64, 4, False, True, seed=3)
    epochs = [[documents(unpacked.at(step))[0][0] for step in range(s, s + 10)] for s in (0, 10)]
    assert epochs[0] != epochs[1]


def test_unpacked_rows_are_as_long_as_the_longest_document():
    assert Loader(dataset(top=40), 512, 4, False, False, 0).length == 64
    assert Loader(dataset(top=100), 512, 4, False, False, 0).length == 128
    assert Loader(dataset(top=40), 50, 4, False, False, 0).length == 50


def test_loss_of_packed_rows_is_the_sum_over_documents():
    _, config, params = build("window_some")
    data = dataset(12)
    loss = jax.jit(lambda batch: qwen2.loss_sum(qwen2.Qwen2(config), params, batch))

    def total(packing: bool) -> tuple[float, float]:
        loader = Loader(data, 64, 4, packing, False, 0)
        sums = [loss(loader.at(step)) for step in range(loader.steps_per_epoch)]
        return sum(float(nats) for nats, _ in sums), sum(float(count) for _, count in sums)

    packed, unpacked = total(True), total(False)
    assert packed[1] == unpacked[1] == sum(int(e.loss_mask.sum()) for e in data.examples)
    assert packed[0] == pytest.approx(unpacked[0], rel=1e-6)


FIELDS = ("tokens", "segment_ids", "loss_mask")


def same(left, right) -> bool:
    return all(np.array_equal(getattr(left, field), getattr(right, field)) for field in FIELDS)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def wait_until(condition) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "context": 4}])
def test_a_stream_has_the_batches_of_its_steps_in_order(sizes):
    loader, mesh = Loader(dataset(), 64, 4, True, True, seed=3), make_mesh(sizes)
    with read_ahead(mesh, loader, 0, 12) as batches:
        for step in range(12):
            batch = next(batches)
            assert same(batch, loader.at(step)) and batch.tokens.sharding.mesh == mesh
        assert next(batches, None) is None


def test_a_resumed_stream_equals_the_undisturbed_one():
    def stream(first: int, sizes: dict) -> list:
        loader = Loader(dataset(), 64, 4, True, True, seed=3)
        with read_ahead(make_mesh(sizes), loader, first, 25) as batches:
            return list(batches)

    undisturbed = stream(0, {"data": 2})
    for first, sizes in ((7, {"data": 2}), (11, {"fsdp": 4, "context": 2}), (24, {}), (25, {})):
        resumed = stream(first, sizes)
        assert len(resumed) == 25 - first and all(map(same, resumed, undisturbed[first:]))


def test_batches_are_laid_out_ahead_while_the_first_is_used(monkeypatch):
    loader, laid_out = Loader(dataset(), 64, 4, True, True, seed=3), []
    original = Loader.at
    monkeypatch.setattr(Loader, "at", lambda self, step, *rows: laid_out.append(step) or original(self, step, *rows))
    with read_ahead(make_mesh({}), loader, 5, 100) as batches:
        next(batches)
        ahead = module.READ_AHEAD.prefetch_buffer_size
        wait_until(lambda: len(laid_out) == 1 + ahead)  # by other threads: this one only waits
        time.sleep(0.05)
        assert sorted(laid_out) == list(range(5, 6 + ahead))  # and no further: memory stays bounded


@pytest.mark.parametrize("error", [None, ValueError, SystemExit])
def test_reading_threads_end_with_the_block(error):
    loader = Loader(dataset(), 64, 4, True, True, seed=3)
    wait_until(lambda: not reading_threads())  # those of the test before
    before = 0
    try:
        with read_ahead(make_mesh({}), loader, 0, 100) as batches:
            next(batches)
            assert len(reading_threads()) > before
            if error:
                raise error
    except (ValueError, SystemExit):
        pass
    wait_until(lambda: len(reading_threads()) == before)


def test_an_error_of_a_reading_thread_reaches_the_caller(monkeypatch):
    loader, original = Loader(dataset(), 64, 4, True, True, seed=3), Loader.at

    def broken(self, step, *rows):
        if step == 2:
            raise OSError("the disk is gone")
        return original(self, step, *rows)

    monkeypatch.setattr(Loader, "at", broken)
    with pytest.raises(OSError, match="the disk is gone"), read_ahead(make_mesh({}), loader, 0, 9) as batches:
        assert len([next(batches), next(batches)]) == 2
        next(batches)


def test_only_the_rows_of_ones_own_devices_are_laid_out(monkeypatch):
    loader, asked = Loader(dataset(), 64, 4, True, True, seed=3), []
    original = Loader.at
    monkeypatch.setattr(Loader, "at", lambda self, step, rows=None: asked.append(rows) or original(self, step, rows))
    batch = load_batch(make_mesh({"data": 2, "context": 4}), loader, 1)
    assert sorted(asked, key=lambda rows: rows.start) == [range(2), range(2, 4)]
    assert {shard.data.shape for shard in batch.loss_mask.addressable_shards} == {(2, 16)}
