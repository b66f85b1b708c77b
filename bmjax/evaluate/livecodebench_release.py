"""LiveCodeBench's releases by their names, and the files of its data set that each consists of.

A release adds one file to those before it: release_v3 is the first three, v3 the third alone, v2_v4 the second to the
fourth. release_latest is release_v6. So says the hub data set's code_generation_lite.py, which bmjax does not run.
"""

import re
from pathlib import Path
from typing import Any

from bmjax.config import UserError
from bmjax.io import bucket

FILES = ("test.jsonl", *(f"test{number}.jsonl" for number in range(2, 7)))
_NAME = re.compile(r"release_v([1-6])|v([1-6])(?:_v([1-6]))?")


def files_of(release: str) -> tuple[str, ...]:
    """Return the names of a release's files. ValueError for a name that no release has."""
    match = _NAME.fullmatch(f"release_v{len(FILES)}" if release == "release_latest" else release)
    first, last = (1, 0) if match is None else (int(match[2] or 1), int(match[1] or match[3] or match[2]))
    if last < first:
        raise ValueError(
            f"found '{release}', expected release_v1 to release_v{len(FILES)}, release_latest, v1 to v{len(FILES)} "
            "(what one release added) or a span of those such as v4_v6"
        )
    return FILES[first - 1 : last]


def questions_of(folder: Any, release: str, key: str) -> list[str]:
    """Return the paths of a release's files in a folder of this machine or a bucket.

    Arguments:
        folder: what the task's key `questions` holds.
        release: a name that `files_of` takes.
        key: of the release, for errors.

    Raises:
        UserError: where it is no folder, and naming the first file that is not in it.
    """
    if not isinstance(folder, str) or not bucket.is_folder(folder):
        raise UserError(
            f"{key}: it chooses files of the folder that `questions` names, found {folder!r}, which is none; name the "
            "folder, or remove the key"
        )
    files = [
        bucket.join(folder if "://" in folder else str(Path(folder).expanduser()), name) for name in files_of(release)
    ]
    for file in files:
        if not bucket.exists(file):
            raise UserError(
                f"{key}: {release} needs {file}, which is not there; fetch it from livecodebench/code_generation_lite"
            )
    return files
