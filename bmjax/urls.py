"""Addresses: paths of buckets, such as gs://bucket/x, apart from paths of this machine, and those of endpoints."""

import importlib.util
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from bmjax.errors import UserError, first_line, install, nearest

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


@dataclass(frozen=True)
class Address:
    """An endpoint's address. url: of chat completions. label: what errors show, without passwords and parameters."""

    url: str
    label: str
    scheme: str
    host: str

    @classmethod
    def parse(cls, base_url: str) -> "Address":
        """Read `base_url`, which ends before /chat/completions. UserError when it is no http(s) URL."""
        safe = re.sub(r"//[^/@]*@", "//***@", base_url)
        try:
            parts = urlsplit(base_url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as error:  # a port that is no number, an IPv6 address without brackets
            raise UserError(
                f"base_url: '{safe}' is no address: {first_line(error)}; expected http://HOST:PORT/v1, an IPv6 "
                "address in brackets: http://[::1]:8000/v1"
            ) from None
        if parts.scheme not in ("http", "https") or not host:
            raise UserError(f"base_url: found '{safe}', expected http://HOST:PORT/v1 or https://HOST/v1")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        shown = f"[{host}]" if ":" in host else host
        location = shown if port is None else f"{shown}:{port}"
        url = urlunsplit(parts._replace(path=f"{path}/chat/completions", fragment=""))
        return cls(url, f"{parts.scheme}://{location}{path}", parts.scheme, host)

    @property
    def models_url(self) -> str:
        """The address that lists the models."""
        return self.url.replace("/chat/completions", "/models", 1)

    @property
    def is_local(self) -> bool:
        """Whether it is this machine, which no proxy leads to."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")
