"""Tells paths of buckets, such as gs://bucket/x, from paths of this machine. Settings and bmjax/io call it."""

import importlib.util
import re
from pathlib import Path

from bmjax.errors import install, nearest

_URL = re.compile(r"([A-Za-z][A-Za-z0-9.-]+):/+(.*)", re.DOTALL)  # pathlib leaves a single slash of two
_CUT = re.compile(r"(gs|gcs|s3|s3a|abfss?|az|hdfs|https?):(?!/)", re.IGNORECASE)  # no local folder `gs:` is meant
_LOCAL = ("file", "local")
_NO_BUCKETS = ("ftp", "sftp", "ssh", "smb", "git", "github")  # fsspec knows them, by more than a URL tells
_EXAMPLES = ["gs", "s3", "abfs", "az", "hdfs", "http", "https", "hf", "memory"]


def url_of(path: str | Path) -> str | None:
    """Return `scheme://bucket/key` of a path that has a scheme, without a slash at its end; None for other paths."""
    match = _URL.fullmatch(str(path))
    return f"{match[1].lower()}://{match[2].rstrip('/')}" if match else None


def url_problem(path: str | Path) -> str | None:
    """Return why a path with a scheme cannot be used on this machine, and what to do; None where it can."""
    url = url_of(path)
    if url is None:
        cut = _CUT.match(str(path))
        return f"names no bucket; expected {cut[1].lower()}://BUCKET/PATH" if cut else None
    from fsspec.registry import available_protocols, known_implementations

    scheme, _, rest = url.partition("://")
    if scheme in _LOCAL:
        return f"remove '{scheme}://' and give the path itself"
    if scheme in _NO_BUCKETS:
        return f"'{scheme}://' is no bucket; copy the files here, or to gs:// or s3://"
    if scheme not in available_protocols():
        hint = nearest(scheme, _EXAMPLES)
        return f"no file system has the scheme '{scheme}'{hint}; a path of this machine has no '://'"
    if not rest.strip("/"):
        return f"names no bucket; expected {scheme}://BUCKET/PATH"
    package = known_implementations.get(scheme, {}).get("class", "fsspec").partition(".")[0]
    if importlib.util.find_spec(package) is None:
        how = install("buckets") if package in ("gcsfs", "s3fs") else f"pip install {package}"
        return f"{scheme}:// needs the package {package}; {how}"
    return None
