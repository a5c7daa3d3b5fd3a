"""A read-only Hub on this machine: what huggingface_hub asks for when it downloads a model, and nothing else.

with local_hub(folder) as url:   # folder/ORGANISATION/NAME holds the files of the repository ORGANISATION/NAME
    ...                          # run a process with HF_ENDPOINT=url
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE_ROUTE = re.compile(r"/(?P<repo>[\w-]+/[\w-]+)/resolve/[^/]+/(?P<file>[^?]+)")
MODEL_ROUTE = re.compile(r"/api/models/(?P<repo>[\w-]+/[\w-]+)(/revision/[^/?]+|(?P<tree>/tree/[^?]+))?(\?.*)?")


@contextmanager
def local_hub(folder: Path) -> Iterator[str]:
    """Serve the repositories below `folder` on a free port; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def handler_for(folder: Path) -> type[BaseHTTPRequestHandler]:
    """A request handler for the repositories below `folder`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if route := FILE_ROUTE.fullmatch(self.path):
                self.send_file(folder / route["repo"] / route["file"])
            elif route := MODEL_ROUTE.fullmatch(self.path):
                self.send_listing(folder / route["repo"], route["repo"], is_tree=bool(route["tree"]))
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def send_file(self, file: Path) -> None:
            if not file.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            content = file.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def send_listing(self, repository: Path, name: str, is_tree: bool) -> None:
            if not repository.is_dir():
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            files = sorted(path for path in repository.iterdir() if path.is_file())
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]
            siblings = [{"rfilename": f.name} for f in files]
            model = {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
            self.send(200, json.dumps(tree if is_tree else model).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Stay silent."""

    return Handler
