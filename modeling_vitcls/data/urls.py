"""Images at URLs in a table or a list: what is fetched, from where, and for how long.

    https://HOST/photo.jpg              with `allow_urls`; never from this machine or a private network
    hf://datasets/ORG/NAME@REV/a.jpg    a file in a repository on the Hub
    anything else                       refused: file://, ftp://, simplecache::http://...

Whatever reads addresses from a file (tables, streams, lists, `EmbedImages`) calls `check_urls`, and
all images come through `fetch_if_url`. Every redirect is checked like the first address. A host that
does not answer is asked once. With `HF_HUB_OFFLINE=1`, nothing is fetched.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, http_backoff

from ..runtime.errors import format_error


# Wait before the first retry of a download in seconds; doubled before each further retry.
SECONDS_BEFORE_RETRY = 1.0
TIMEOUTS = (
    10.0,
    60.0,
    60.0,
    10.0,
)  # to connect, read, write, and wait for a connection; in seconds
MAX_REDIRECTS = 5
WEB_PREFIXES = ("http://", "https://")
HUB_FILE = re.compile(
    r"hf://(?:(datasets|spaces)/)?([^/@]+(?:/[^/@]+)?)(?:@(refs/\w+/[^/]+|[^/]+))?/(.+)"
)

# hosts that have not answered this process
SILENT_HOSTS: set[str] = set()


class FetchError(OSError):
    """Raised if a file cannot be fetched.

    A prediction stops instead of recording the image as unreadable, because the image itself may be
    readable.
    """


def is_url(path: str) -> bool:
    """Return whether a path is a URL, or a data URI, which contains the image."""
    return "://" in path or path.startswith("data:")


def check_urls(paths: Iterable[Any], allow_urls: bool, name: str) -> None:
    """Raise ValueError if images are at web addresses, without `allow_urls`.

    Args:
        paths: paths and URLs; anything else is not fetched.
        allow_urls: whether web addresses are allowed.
        name: name of the table or list.
    """
    if allow_urls:
        return
    number = sum(isinstance(path, str) and path.lower().startswith(WEB_PREFIXES) for path in paths)
    if number:
        raise ValueError(
            f"{name}: {number:,} of the images are at web addresses. Set `allow_urls=True` to "
            f"fetch them from your network, if you trust {name}, or download the images"
        )


def fetch_if_url(path: str, is_by_hand: bool = False) -> str | bytes:
    """Return the content of a URL, or of a chain of URLs; other paths are returned unchanged."""
    is_chain = "::" in path and not os.path.exists(path)  # noqa: PTH110  # False for long names
    return fetch(path, is_by_hand) if "://" in path or is_chain else path


def fetch(url: str, is_by_hand: bool = False) -> bytes:
    """Return the contents of a URL.

    Network errors and temporary errors of a server are retried for about 15 seconds. Raise
    ValueError if the URL is refused or the server has no such file, and FetchError otherwise.

    Args:
        url: the URL.
        is_by_hand: whether a person gave the address, which may then be one of this machine or of a
            private network.
    """
    host = urlsplit(url).netloc
    headers = None
    if url.startswith("hf://") and "::" not in url:
        match = HUB_FILE.fullmatch(url)
        if match is None:
            raise ValueError(f"{url} does not name a file on the Hub")
        kind, repo, revision, file = match.groups()
        headers = build_hf_headers()
        host = "the Hub"
        url = hf_hub_url(
            repo,
            file,
            repo_type=kind.removesuffix("s") if kind else None,
            revision=unquote(revision) if revision else None,
        )
    elif not url.lower().startswith(WEB_PREFIXES):
        raise ValueError(f"{url} is not fetched: only http, https and hf addresses are")
    if constants.is_offline_mode():
        raise FetchError(f"cannot fetch {url}, because HF_HUB_OFFLINE is set. Unset it")
    if host in SILENT_HOSTS:
        raise FetchError(f"cannot fetch {url}, because {host} has not answered before")

    try:
        for _ in range(MAX_REDIRECTS + 1):
            if not is_by_hand and headers is None:
                check_public(url)
            response: Any = http_backoff(
                "GET",
                url,
                max_retries=4,
                base_wait_time=SECONDS_BEFORE_RETRY,
                headers=headers,
                follow_redirects=headers is not None,  # the Hub redirects to its own servers
                timeout=TIMEOUTS,
            )
            if not 300 <= response.status_code < 400 or "location" not in response.headers:
                response.raise_for_status()
                return bytes(response.content)
            url = urljoin(url, response.headers["location"])
            if not url.lower().startswith(WEB_PREFIXES):
                raise ValueError(f"the server redirects to {url}, which is not fetched")
        raise ValueError(f"the server redirects more than {MAX_REDIRECTS} times")
    except ValueError:
        raise
    except Exception as error:  # the types depend on the version of huggingface_hub
        if type(error).__name__ == "InvalidURL":
            raise ValueError(f"{url!r} is not a valid address: {format_error(error)}") from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise ValueError(
                f"cannot fetch the image: the server returned status {status}"
            ) from error
        if status is None:
            SILENT_HOSTS.add(host)
        reason = f"{type(error).__name__}: {format_error(error)}"
        raise FetchError(
            f"cannot fetch {url} ({reason}). Repeat the command to continue, or remove the URL"
        ) from error


def check_public(url: str) -> None:
    """Raise ValueError if a host is this machine, or in a private or link-local network."""
    host = urlsplit(url).hostname or ""
    for *_, address in socket.getaddrinfo(host, None):
        ip: Any = ipaddress.ip_address(str(address[0]).partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if not ip.is_global or ip.is_multicast:
            raise ValueError(
                f"{url} is not fetched: {host} is an address of this machine or of a private network"
            )
