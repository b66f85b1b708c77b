"""Tokenized data on disk: the same documents as in memory, made once, dead ones named and cleared."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bmjax.branch import cache
from bmjax.branch.examples import Encoding
from bmjax.branch.loader import Loader
from bmjax.chat.template import chat_template
from bmjax.cli.main import main
from bmjax.config import UserError
from tests.branch.multiprocess import free_port
from tests.conftest import sums, write_rows


@pytest.fixture
def caches_here(tmp_path, monkeypatch):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setattr(cache, "_BATCH_TOKENS", 300)  # several record batches
    return tmp_path / "cache" / "tokens"


def load(path, tokenizer, seq_len=128, **changes):
    said = []
    encoding = Encoding(tokenizer, chat_template(tokenizer, None), seq_len, **changes)
    return cache.load(str(path), {}, encoding, said.append), said


def test_a_cache_has_the_documents_that_memory_would_have(tmp_path, tokenizer, caches_here, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", sums(40))
    mapped, said = load(file, tokenizer, 60)
    assert "tokenizing into" in said[0] and sorted(path.suffix for path in caches_here.iterdir()) == [
        ".arrow",
        ".json",
        ".lock",
    ]
    monkeypatch.setattr(cache, "SMALL", 2**24)
    in_memory, _ = load(file, tokenizer, 60)
    assert len(mapped.examples) == len(in_memory.examples) == 40 and mapped.truncated > 0
    for left, right in zip(mapped.examples, in_memory.examples, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.loss_mask, right.loss_mask)
    assert len(mapped.examples[3:9]) == 6 and mapped.examples[0].tokens.dtype == np.int32
    for name in ("digest", "truncated", "dropped", "tokens", "top_token", "remarks"):
        assert getattr(mapped, name) == getattr(in_memory, name)
    batches = [Loader(data, 60, 4, True, True, seed=1).at(3) for data in (mapped, in_memory)]
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
    with pytest.raises(IndexError):
        mapped.examples[40]


def test_a_cache_is_made_once_for_each_encoding(tmp_path, tokenizer, caches_here):
    file = write_rows(tmp_path / "rows.jsonl", sums(10))
    load(file, tokenizer)
    _, said = load(file, tokenizer)
    assert [line.partition(":")[0] for line in said] == ["tokenized before"]
    for changes in ({"seq_len": 64}, {"turns": "last"}, {"ignore": ["reference"]}, {"overlong": "drop"}):
        assert "tokenizing into" in load(file, tokenizer, **changes)[1][0]


def test_caches_of_changed_data_are_named_and_cleared(tmp_path, tokenizer, caches_here, capsys):
    file = write_rows(tmp_path / "rows.jsonl", sums(10))
    load(file, tokenizer)
    write_rows(file, sums(12))
    data, said = load(file, tokenizer)
    assert len(data.examples) == 12 and "1 caches of these data before they changed" in said[0]
    main(["cache"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and sum("its data changed or are gone" in line for line in lines) == 1
    main(["cache", "--clear"])
    main(["cache"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("in use")
    file.unlink()
    main(["cache", "--clear"])
    main(["cache"])
    assert "nothing is cached" in capsys.readouterr().out and not list(caches_here.iterdir())


def test_rows_that_are_refused_leave_no_cache(tmp_path, tokenizer, caches_here):
    file = write_rows(tmp_path / "rows.jsonl", [*sums(10), {"question": "?"}])
    with pytest.raises(UserError, match="row 11: expected messages"):
        load(file, tokenizer)
    assert [path.suffix for path in caches_here.iterdir()] == [".lock"]


def test_check_says_what_a_training_would_do(tmp_path, student, train_file, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps({"student": str(student), "data": str(train_file), "output": str(tmp_path / "run")}))
    main(["train", str(config), "seq_len=128", "batch=8", "epochs=2", "--check"])
    out = capsys.readouterr().out
    assert "run: 20 documents, 1,044 tokens in" in out and "an answer ends with <|im_end|>" in out
    assert "2.00 epochs, about 2,088 tokens, on fsdp 8" in out
    assert not (tmp_path / "run").exists()


# Loads data in a process of several, and says what it tokenized and what it mapped; "slow": a row takes half a second.
SHARER = """
import json, sys, time
from bmjax.branch import cache, examples
from bmjax.branch.examples import Encoding
from bmjax.chat.template import chat_template
from bmjax.parallel import processes
from bmjax.weights.tokenizer import load_tokenizer

data, tokenizer, address, count, number, slow = sys.argv[1:]
cache.SMALL, said = 0, []
if slow == "slow":
    documents = cache.documents
    def slowly(*arguments):
        for document in documents(*arguments):
            print("working", flush=True)
            time.sleep(0.5)
            yield document
    cache.documents = slowly
tokenizer = load_tokenizer(tokenizer)
encoding = Encoding(tokenizer, chat_template(tokenizer, None), 128)
with processes.together(address if count != "1" else None, int(count), int(number) if count != "1" else None, 20):
    loaded = cache.load(data, {}, encoding, said.append)
    print(json.dumps([said[0].partition(" ")[0], len(loaded.examples), loaded.digest]), flush=True)
"""


def sharer(file, student, folder, address="-", count=1, number=0, speed="fast"):
    arguments = [str(file), str(student), address, str(count), str(number), speed]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-c", SHARER, *arguments], env=environment | {"BMJAX_CACHE": str(folder)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def last_json(text: str) -> list:
    """The line that a sharer prints; the runtime writes lines among it."""
    return json.loads([line for line in text.splitlines() if line.startswith("[") and "Gloo" not in line][-1])


@pytest.mark.slow
def test_processes_share_a_cache_on_one_disk_and_make_their_own_on_two(tmp_path, student):
    file = write_rows(tmp_path / "rows.jsonl", sums(40))
    for name, folders, second in (("one", ("a", "a"), "tokenized"), ("two", ("b", "c"), "tokenizing")):
        address = f"localhost:{free_port()}"
        started = [sharer(file, student, tmp_path / folder, address, 2, i) for i, folder in enumerate(folders)]
        ended = [process.communicate(timeout=300)[0] for process in started]
        said = [last_json(text) for text in ended]
        assert [line[0] for line in said] == ["tokenizing", second], name
        assert said[0][1:] == said[1][1:] and said[0][1] == 40


@pytest.mark.slow
def test_a_killed_maker_of_a_cache_lets_the_next_one_make_it(tmp_path, student):
    file = write_rows(tmp_path / "rows.jsonl", sums(40))
    first = sharer(file, student, tmp_path / "cache", speed="slow")
    assert first.stdout.readline() == "working\n"
    second = sharer(file, student, tmp_path / "cache")
    time.sleep(2)
    first.send_signal(signal.SIGKILL)
    assert last_json(second.communicate(timeout=300)[0])[:2] == ["tokenizing", 40]
    first.communicate()
