"""How an endpoint is reached: its address, the API key, the proxy and the certificates that are trusted.

What the environment holds wrong is told by the name of the variable. A key is never part of a message.
"""

import contextlib
import ipaddress
import os
import re
import ssl
import unicodedata
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit

from bmjax.config import UserError
from bmjax.errors import install
from bmjax.urls import Address

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def api_key(variable: str | None) -> str | None:
    """Return the key in an environment variable, None when no variable is named.

    Raises:
        UserError: when the variable is not set or holds what no HTTP header can carry. It does not show the key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    # What is no usual name of a variable may be the key itself, written there by mistake.
    shown = variable if re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) else "that it names"
    if not key:
        hint = "" if shown == variable else "; it takes the name of a variable, such as API_KEY, never the key"
        raise UserError(f"api_key_env: the environment variable {shown} is not set; export it with the API key{hint}")
    name = f"api_key_env: the key in {variable}"
    if key[0] in "\"'" and key[-1] == key[0]:
        raise UserError(f"{name} stands in quotation marks; export it without them")
    for position, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            kinds = {" ": "a space", "\n": "a line break", "\r": "a line break", "\t": "a tab"}
            words = kinds.get(character) or unicodedata.name(character, f"the character U+{ord(character):04X}")
            raise UserError(
                f"{name} holds {words} at position {position} of {len(key)}, expected printable ASCII without spaces; "
                "copy the key again"
            )
    return key


def redact(text: str, key: str | None) -> str:
    """Return a text without the key, as it is or as it stands in an address."""
    for secret in (key, quote(key, safe="")) if key else ():
        text = text.replace(secret, "***")
    return text


def proxy_of(address: Address) -> tuple[str, str] | None:
    """Return (the proxy's URL, the variable that names it) for an address; None where it is reached directly.

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are read as curl reads them, in small letters first.

    Raises:
        UserError: for a proxy that is no URL of a known kind, and a SOCKS proxy without its package.
    """
    if address.is_local or _is_exempt(address.host):
        return None
    names = [f"{address.scheme}_proxy", "all_proxy"]
    variables = [form for name in names for form in (name, name.upper()) if os.environ.get(form, "").strip()]
    if not variables:
        return None
    variable = variables[0]
    url = os.environ[variable].strip()
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in _PROXY_SCHEMES and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise UserError(
            f"the environment variable {variable} names no proxy that can be used; expected http://HOST:PORT or "
            "socks5://HOST:PORT"
        )
    if parts.scheme.startswith("socks"):
        try:
            import socksio  # noqa: F401
        except ImportError:
            raise UserError(f"{variable} names a SOCKS proxy, which needs socksio; {install('socks')}") from None
    return url, variable


def _is_exempt(host: str) -> bool:
    """Whether NO_PROXY names a host: itself, the end of its name, or a network of its address."""
    if urllib.request.proxy_bypass_environment(host):  # type: ignore[attr-defined]
        return True
    networks = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    for network in networks:
        with contextlib.suppress(ValueError):  # a name, or an address that is none
            if ipaddress.ip_address(host) in ipaddress.ip_network(network.strip().strip("[]"), strict=False):
                return True
    return False


def trusted_certificates() -> ssl.SSLContext:
    """Return the TLS settings: certificates of SSL_CERT_FILE, SSL_CERT_DIR or their like, else the usual ones.

    Raises:
        UserError: naming the variable whose file or folder cannot be read or holds no certificate.
    """
    import certifi

    for variable in _CERTIFICATES:
        name = os.environ.get(variable, "").strip()
        if not name:
            continue
        path = Path(name).expanduser()
        try:
            if path.is_dir():
                return ssl.create_default_context(capath=str(path))
            return ssl.create_default_context(cafile=str(path))
        except OSError as error:  # ssl.SSLError is one
            problem = "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
            raise UserError(f"the environment variable {variable} names '{name}': {problem}") from None
    return ssl.create_default_context(cafile=certifi.where())
