"""Images at URLs in a table: what is fetched, from where, and for how long.

    https://HOST/photo.jpg              with `allow_urls`; never from this machine or a private network
    hf://datasets/ORG/NAME@REV/a.jpg    a file in a repository on the Hub
    anything else                       refused: file://, ftp://, simplecache::http://...

Every redirect is checked like the first address. A host that does not answer is asked once. With
`HF_HUB_OFFLINE=1`, nothing is fetched.
"""

import ipaddress
import re
import socket
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
    """Return whether a path is a URL, or a chain of URLs."""
    return "://" in path or "::" in path


def check_urls(dataset: Any, column: str, allow_urls: bool, name: str) -> None:
    """Raise ValueError if images of a table `name` are at web addresses, without `allow_urls`.

    The rows of a stream are checked when they are read.
    """
    import datasets
    import pyarrow.compute

    if allow_urls or isinstance(dataset, datasets.IterableDataset):
        return
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if pyarrow.types.is_struct(values.type):
        values = pyarrow.compute.struct_field(values, "path")
    if not pyarrow.types.is_string(values.type):
        return
    is_web = pyarrow.compute.match_substring_regex(values, "^https?://", ignore_case=True)
    number = pyarrow.compute.sum(is_web).as_py()
    if number:
        raise_not_allowed(name, f"{number:,} of the images are at web addresses")


def raise_not_allowed(name: str, problem: str) -> None:
    """Raise the error about web addresses in a table."""
    raise ValueError(
        f"{name}: {problem}. Set `allow_urls=True` to fetch them from your network, if you trust "
        "the table, or download the images"
    )


def fetch(url: str, is_from_table: bool = True) -> bytes:
    """Return the contents of a URL.

    Network errors and temporary errors of a server are retried for about 15 seconds. Raise
    ValueError if the URL is refused or the server has no such file, and FetchError otherwise.

    Args:
        url: the URL.
        is_from_table: whether it must not be an address of this machine or of a private network. A
            person may give such an address.
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
            if is_from_table and headers is None:
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
