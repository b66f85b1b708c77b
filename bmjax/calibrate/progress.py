"""The journal of a step that looks at data: what is finished, so that a killed merge goes on from there."""

import json
import os
from pathlib import Path
from typing import Any


class Progress:
    """Values by key in a file of lines, each on disk before `put` returns. What belongs to it is on disk before."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, Any] = {}
        lines = []
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                key, value = json.loads(line)
            except ValueError:
                break  # the line that a kill cut off
            self._values[key] = value
            lines.append(line)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        self._file = path.open("ab")

    def get(self, key: str) -> Any:
        """Return the value of a key; None where it was not put."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Add a value, which JSON can hold and which is not None."""
        self._values[key] = value
        self._file.write(json.dumps([key, value]).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
