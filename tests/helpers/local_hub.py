"""A local Hub for the real huggingface_hub client: repositories, tokens and faults.

    with running_hub() as hub:         # an empty Hub that accepts pushes
        hub.tokens["hf_ann"] = Token("ann")
        hub.create("ann/model", files={"config.json": b"{}"})
        hub.fail("POST", "/commit/", "drop")
        ...                            # HF_ENDPOINT=hub.url HF_TOKEN=hf_ann HF_HUB_DISABLE_XET=1

This file contains the repositories and permissions, local_hub_server.py the HTTP routes. All
commits are kept.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from werkzeug.serving import WSGIRequestHandler, make_server

from helpers import local_hub_server as server


GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Token:
    """The user of a token, and where it may write."""

    user: str
    organizations: tuple[str, ...] = ()  # whose member the user is
    writable: tuple[str, ...] | None = None  # namespaces and repositories; None: the user's own

    def can_read(self, repo_id: str) -> bool:
        """Return whether the token can read private repositories of this name."""
        return get_namespace(repo_id) in (self.user, *self.organizations)

    def can_write(self, repo_id: str) -> bool:
        """Return whether the token can commit to a repository of this name."""
        writable = (self.user,) if self.writable is None else self.writable
        return get_namespace(repo_id) in writable or repo_id.removeprefix("spaces/") in writable


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, for `LocalHub.create`."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def get_namespace(repo_id: str) -> str:
    """Return the namespace of `namespace/name` or `spaces/namespace/name`."""
    return repo_id.split("/")[-2]


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit. Its content is in `LocalHub.contents`, by SHA-256."""

    sha256: str
    size: int
    oid: str  # git's hash of the content; for LFS files, the hash of the pointer file
    is_lfs: bool


Files = dict[str, StoredFile]  # Of a commit, by path


@dataclass
class Repository:
    """The files of all commits, by hash, and the branches."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Return the commit hash of a branch or hash; None if it does not exist."""
        revisions = self.branches | {commit: commit for commit in self.commits}
        return revisions.get(revision)

    def commit(self, branch: str, files: Files) -> str:
        """Add a commit to a branch and return its hash."""
        content = repr((self.branches.get(branch), len(self.commits), sorted(files.items())))
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


@dataclass
class Fault:
    """A fault of the next `times` requests with this method and a matching path.

    Kinds: "drop" closes the connection before the request is handled.
    "corrupt" changes the last byte of the request. "hang" sends no response. A number is
    the status of the response.
    """

    method: str
    path: re.Pattern[str]
    kind: str | int
    times: int


class LocalHub:
    """The contents of the Hub.

    Tests access it directly; requests are handled by local_hub_server.py.
    """

    def __init__(self) -> None:
        self.url = ""
        self.storage_url = ""
        self.tokens: dict[str, Token] = {}
        # organizations whose new repositories are private
        self.private_by_default: set[str] = set()
        self.gated: set[str] = set()  # repositories whose files cannot be read
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.is_stopped = threading.Event()

    # Methods for tests ----------------------------------------------------------------------------

    def fail(self, method: str, path: str, kind: str | int, times: int = 1) -> None:
        """Add a fault for requests.

        `path` is a regular expression (re.search); see `Fault` for `kind`.
        """
        self.faults.append(Fault(method, re.compile(path), kind, times))

    def corrupt(self, repo_id: str, file: str) -> None:
        """Change the last byte of a stored file, but not the hash and size that the Hub reports."""
        sha256 = self.files(repo_id)[file].sha256
        content = self.contents[sha256]
        self.contents[sha256] = content[:-1] + bytes([content[-1] ^ 1])

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """Return the files of a commit."""
        repository = self.repositories[repo_id]
        commit = repository.resolve(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return repository.commits[commit]

    def read(self, repo_id: str, file: str, revision: str = "main") -> bytes:
        """Return the content of a file."""
        return self.contents[self.files(repo_id, revision)[file].sha256]

    def count_requests(self, method: str, path: str) -> int:
        """Return the number of requests with this method whose path contains `path`."""
        return sum(each == method and path in requested for each, requested in self.requests)

    # Methods for requests -------------------------------------------------------------------------

    def next_fault(self, method: str, path: str) -> str | int | None:
        """Return the kind of the fault of this request, or None."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault.kind
        return None

    def create(
        self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None
    ) -> Repository:
        """Create a repository with one commit."""
        repository = Repository(private)
        files = {".gitattributes": GIT_ATTRIBUTES} if files is None else files
        repository.commit("main", {path: self.store(path, data) for path, data in files.items()})
        self.repositories[repo_id] = repository
        return repository

    def store(self, path: str, content: bytes) -> StoredFile:
        """Store the content of a file."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.contents[sha256] = content
        is_lfs = server.is_lfs(path)
        in_git = content
        if is_lfs:
            pointer = f"oid sha256:{sha256}\nsize {len(content)}\n"
            in_git = f"version https://git-lfs.github.com/spec/v1\n{pointer}".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()
        return StoredFile(sha256, len(content), oid, is_lfs)


class QuietHandler(WSGIRequestHandler):
    """A connection whose requests are not logged."""

    def log_request(self, *args: object) -> None:
        """Log nothing."""


@contextmanager
def running_hub() -> Iterator[LocalHub]:
    """Start a Hub and its storage.

    Their host names differ, as on the real Hub, because clients depend on it.
    """
    hub = LocalHub()
    listener = make_server(
        "127.0.0.1", 0, server.build_app(hub), threaded=True, request_handler=QuietHandler
    )
    listener.daemon_threads = True
    hub.url = f"http://127.0.0.1:{listener.server_port}"
    hub.storage_url = f"http://localhost:{listener.server_port}"
    serve = partial(listener.serve_forever, poll_interval=0.02)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.is_stopped.set()
        listener.shutdown()
        listener.server_close()
        thread.join()
