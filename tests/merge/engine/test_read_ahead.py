import threading
import time
from pathlib import Path

from bmjax.io.safetensors import TensorInfo
from bmjax.merge.engine.read_ahead import BLOCK, ReadAhead

SIZES = {"embedding": 3 * BLOCK + 100, "norm": 10, "head": 2 * BLOCK}
INPUTS = {
    tensor: [TensorInfo(tensor, Path(model), "U8", (size,), 0, size) for model in ("base", "branch")]
    for tensor, size in SIZES.items()
}


class Files:
    """Records what is asked for."""

    def __init__(self):
        self.asked, self.blocks, self._more = 0, [], threading.Condition()

    def advise(self, info, start, nbytes):
        with self._more:
            self.asked += nbytes
            self.blocks.append((info.name, str(info.file), start, nbytes))
            self._more.notify()

    def wait(self, nbytes):
        with self._more:
            assert self._more.wait_for(lambda: self.asked >= nbytes, timeout=60)


def test_every_byte_is_asked_for_once_and_no_more_than_the_limit_ahead():
    files = Files()
    ahead = ReadAhead(files, INPUTS, ahead=2 * BLOCK)
    files.wait(2 * BLOCK)
    time.sleep(0.05)
    assert files.blocks == [("embedding", model, 0, BLOCK) for model in ("base", "branch")]
    ahead.add("embedding", BLOCK)
    files.wait(3 * BLOCK)
    time.sleep(0.05)
    assert files.asked == 3 * BLOCK
    for tensor in INPUTS:
        ahead.finish(tensor)
    files.wait(2 * sum(SIZES.values()))
    ahead.close()
    parts = {}
    for tensor, model, start, nbytes in files.blocks:
        assert start == parts.get((tensor, model), 0)
        parts[tensor, model] = start + nbytes
    assert parts == {(tensor, model): size for tensor, size in SIZES.items() for model in ("base", "branch")}


def test_closing_ends_a_thread_that_waits():
    files = Files()
    ahead = ReadAhead(files, INPUTS, ahead=1)
    files.wait(BLOCK)
    ahead.close()
    assert files.asked == BLOCK
