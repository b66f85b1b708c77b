"""Has the system read the inputs of a merge ahead of the work on them, so that reading and computing overlap.

stream.py starts it. What is read lies in the page cache, not in this process. It reads nothing itself and changes no
result.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence

from bmjax.config import UserError
from bmjax.io.safetensors import Reader, TensorInfo

AHEAD = 2**28  # bytes in front of the work
BLOCK = 2**23


class ReadAhead:
    """A thread that goes through tensors in the order of the work. Stop it with `close`."""

    def __init__(self, files: Reader, inputs: Mapping[str, Sequence[TensorInfo]], ahead: int = AHEAD) -> None:
        """inputs: what each tensor of the result is made of, in the order in which they are worked on."""
        self._files, self._inputs, self._ahead = files, inputs, ahead
        self._done = dict.fromkeys(inputs, 0)
        self._total, self._asked, self._closed = 0, 0, False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="merge-read-ahead", daemon=True)
        self._thread.start()

    def add(self, tensor: str, nbytes: int) -> None:
        """Count bytes of a tensor's inputs that were read."""
        with self._moved:
            self._done[tensor] += nbytes
            self._total += nbytes
            if self._may_ask():  # else the thread would wake for nothing, at three of four chunks
                self._moved.notify()

    def finish(self, tensor: str) -> None:
        """Count all of a tensor's inputs as read."""
        self.add(tensor, sum(info.nbytes for info in self._inputs[tensor]) - self._done[tensor])

    def close(self) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify()
        self._thread.join()

    def _may_ask(self) -> bool:
        return self._asked < self._total + self._ahead

    def _run(self) -> None:
        # A file that is gone or broken is an error of whoever reads it.
        with contextlib.suppress(OSError, UserError):
            self._ask()

    def _ask(self) -> None:
        for infos in self._inputs.values():
            # Of all models in turn, as the chunks are read.
            for start in range(0, max((info.nbytes for info in infos), default=0), BLOCK):
                for info in infos:
                    count = min(BLOCK, info.nbytes - start)
                    if count <= 0:
                        continue
                    with self._moved:
                        self._moved.wait_for(lambda: self._closed or self._may_ask())
                        if self._closed:
                            return
                    self._files.advise(info, start, count)
                    self._asked += count
