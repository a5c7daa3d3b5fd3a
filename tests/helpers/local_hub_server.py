"""HTTP routes of the local Hub in local_hub.py.

A route is a method, a pattern and a function of a request that returns a Response. Invalid requests
raise `ErrorResponse`, whose headers contain the reason, as on the real Hub.
"""

import base64
import hashlib
import json
import re
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import yaml
from werkzeug import Request as PlainRequest
from werkzeug import Response
from werkzeug.exceptions import HTTPException


if TYPE_CHECKING:
    from helpers.local_hub import Files, LocalHub, Repository, Token


class Request(PlainRequest):
    """A request of a client to a Hub."""

    hub: "LocalHub"
    names: dict[str, str]  # Parts of the path, by the names in the pattern of the route
    token: "Token | None"  # None if the request has no token

    def get_readable(self) -> "Repository":
        """Return the repository, which the token must be able to read.

        Repositories that it cannot read are reported as missing.
        """
        repo_id = self.names["repo"]
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (
            repository.private and not (self.token and self.token.can_read(repo_id))
        ):
            if self.token is None:
                raise ErrorResponse(401, "Invalid username or password.", "RepoNotFound")
            raise ErrorResponse(404, "Repository not found", "RepoNotFound")
        return repository

    def get_writable(self) -> "Repository":
        """Return the repository, to which the token must be able to write.

        A pull request requires only a token that can read the repository.
        """
        repository = self.get_readable()
        if self.token and self.args.get("create_pr") == "1":
            return repository
        if not (self.token and self.token.can_write(self.names["repo"])):
            raise ErrorResponse(
                403, "Forbidden: you must use a write token to upload to a repository."
            )
        return repository


def respond(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response in JSON."""
    return Response(json.dumps(content), status, headers, content_type="application/json")


class ErrorResponse(HTTPException):
    """An error response."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        error = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        super().__init__(response=respond({"error": message}, status, error | (headers or {})))


# as in a new repository's .gitattributes
LFS_NAMES = re.compile(r".*\.(safetensors|bin|pt|pth|pkl|onnx|parquet|npz)")
# Prefix of repository ids per kind, in URLs and in `LocalHub.repositories`.
PREFIXES = {"model": "", "space": "spaces/"}


# Revisions ---------------------------------------------------------------------------------------


def get_commit(repository: "Repository", revision: str) -> tuple[str, "Files"]:
    """Return the hash and the files of a revision."""
    name = repository.resolve(revision)
    if name is None:
        raise ErrorResponse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return name, repository.commits[name]


# Repositories ------------------------------------------------------------------------------------


def check_write_access(request: Request) -> Response:
    """Return an empty response if the token may write to the repository."""
    request.get_writable()
    return respond({})


def create_repository(request: Request) -> Response:
    """Create a repository with an initial commit; status 409 if the repository exists."""
    requested = request.json
    if request.token is None:
        raise ErrorResponse(401, "Invalid username or password.")
    kind = requested.get("type", "model")
    namespace = requested.get("organization") or request.token.user
    repo_id = f"{PREFIXES[kind]}{namespace}/{requested['name']}"
    if not request.token.can_write(repo_id):
        raise ErrorResponse(
            403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
        )
    url = f"{request.hub.url}/{repo_id}"
    if repo_id in request.hub.repositories:
        return respond({"error": f"You already created this {kind} repo", "url": url}, 409)
    default = "private" if namespace in request.hub.private_by_default else "public"
    visibility = {True: "private", False: "public", None: requested.get("visibility", default)}
    request.hub.create(repo_id, private=visibility[requested.get("private")] == "private")
    return respond({"url": url})


def validate_card(request: Request) -> Response:
    """Return whether the YAML header of a README.md is valid."""
    content = request.json["content"]
    header = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    try:
        yaml.safe_load(header[1] if header else "")
    except yaml.YAMLError as error:
        return respond({"errors": [{"message": f"bad YAML: {error}"}], "warnings": []}, 400)
    return respond({"errors": [], "warnings": []})


def create_branch(request: Request) -> Response:
    """Create a branch from `main` or the requested starting point."""
    repository = request.get_writable()
    branch = request.names["name"]
    if branch.startswith("refs/"):
        raise ErrorResponse(400, f"Invalid branch name: {branch}")
    if branch in repository.branches:
        raise ErrorResponse(409, f"Reference already exists: refs/heads/{branch}")
    repository.branches[branch], _ = get_commit(
        repository, request.json.get("startingPoint", "main")
    )
    return Response()


def create_tag(request: Request) -> Response:
    """Name a revision; status 409 if the tag exists."""
    repository = request.get_writable()
    tag = request.json["tag"]
    if tag in repository.branches:
        raise ErrorResponse(409, f"Reference already exists: refs/tags/{tag}")
    repository.branches[tag], _ = get_commit(repository, request.names["revision"])
    return Response()


# Reading ------------------------------------------------------------------------------------------


def list_models(request: Request) -> Response:
    """Return the public models of an account."""
    start = f"{request.args['author']}/"
    return respond([{"id": name} for name in request.hub.repositories if name.startswith(start)])


def repository_info(request: Request) -> Response:
    """Return information about a revision."""
    repository = request.get_readable()
    name, files = get_commit(repository, request.names["revision"] or "main")
    repo_id = "/".join(request.names["repo"].split("/")[-2:])
    return respond(
        {
            "id": repo_id,
            "sha": name,
            "private": repository.private,
            "gated": "auto" if request.names["repo"] in request.hub.gated else False,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
    )


def tree(request: Request) -> Response:
    """Return all files below a folder, with their hashes."""
    _, files = get_commit(request.get_readable(), request.names["revision"])
    folder = request.names["folder"]
    start = folder and f"{folder}/"
    entries = []
    for path, file in sorted(files.items()):
        entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
        if path.startswith(start):
            entries.append(entry)
    if start and not entries:
        raise ErrorResponse(404, "not found", "EntryNotFound")
    return respond(entries)


def resolve(request: Request) -> Response:
    """Return the content of a file, or the address of an LFS file in the storage."""
    name, files = get_commit(request.get_readable(), request.names["revision"])
    if request.names["repo"] in request.hub.gated:
        raise ErrorResponse(
            403, f"Access to model {request.names['repo']} is restricted", "GatedRepo"
        )
    file = files.get(request.names["file"])
    if file is None:
        raise ErrorResponse(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": name})
    headers = {"X-Repo-Commit": name, "ETag": f'"{file.oid}"'}
    if file.is_lfs:
        location = f"{request.hub.storage_url}/objects/{file.sha256}"
        linked = {
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(file.size),
            "Location": location,
        }
        return Response(b"", 302, headers | linked)
    return Response(request.hub.contents[file.sha256], 200, headers)


def stored_object(request: Request) -> Response:
    """Return an LFS file from the storage."""
    sha256 = request.names["sha256"]
    return Response(request.hub.contents[sha256], 200, {"ETag": f'"{sha256}"'})


# Writing ------------------------------------------------------------------------------------------


def preupload(request: Request) -> Response:
    """Return for each file whether it is an LFS file, and the hash of the file in the branch."""
    _, files = get_commit(request.get_writable(), request.names["revision"])
    entries = []
    for path in (file["path"] for file in request.json["files"]):
        there = files.get(path)
        entries.append(
            {
                "path": path,
                "uploadMode": "lfs" if is_lfs(path) else "regular",
                "shouldIgnore": False,
                "oid": None if there is None else there.sha256 if there.is_lfs else there.oid,
            }
        )
    return respond({"files": entries})


def is_lfs(path: str) -> bool:
    """Return whether a file is stored with LFS."""
    return LFS_NAMES.fullmatch(path) is not None


def lfs_batch(request: Request) -> Response:
    """Return upload addresses of LFS files. Files that are already stored need no upload."""
    request.get_readable()  # The commit requires the right to write
    objects = []
    for requested in request.json["objects"]:
        response = {"oid": requested["oid"], "size": requested["size"]}
        if requested["oid"] not in request.hub.contents:
            response["actions"] = {
                "upload": {"href": f"{request.hub.storage_url}/objects/{requested['oid']}"},
            }
        objects.append(response)
    return respond({"transfer": "basic", "objects": objects})


def store_object(request: Request) -> Response:
    """Store an LFS file; its hash must match the address."""
    if hashlib.sha256(request.data).hexdigest() != request.names["sha256"]:
        raise ErrorResponse(400, "XAmzContentSHA256Mismatch")
    request.hub.contents[request.names["sha256"]] = request.data
    return Response()


def make_commit(request: Request) -> Response:
    """Apply all changes as one commit on a branch, or none of them."""
    repository = request.get_writable()
    branch = request.names["revision"]
    changes = [json.loads(line) for line in request.data.splitlines()]
    parent, before = get_commit(repository, branch)
    files = dict(before)
    for change in changes:
        value = change["value"]
        match change["key"]:
            case "header":
                if value.get("parentCommit", parent) != parent:
                    raise ErrorResponse(
                        412, "A commit has happened since. Please refresh and try again."
                    )
            case "file":
                files[value["path"]] = request.hub.store(
                    value["path"], base64.b64decode(value["content"])
                )
            case "lfsFile":
                files[value["path"]] = request.hub.store(
                    value["path"], request.hub.contents[value["oid"]]
                )
            case "deletedFile":
                del files[value["path"]]
    is_pr = request.args.get("create_pr") == "1"
    number = 1 + sum(each.startswith("refs/pr/") for each in repository.branches)
    name = repository.commit(f"refs/pr/{number}" if is_pr else branch, files)
    page = f"{request.hub.url}/{request.names['repo']}"
    request_url = {"pullRequestUrl": f"{page}/discussions/{number}"} if is_pr else {}
    return respond(
        {"success": True, "commitOid": name, "commitUrl": f"{page}/commit/{name}", **request_url}
    )


# HTTP ---------------------------------------------------------------------------------------------


REPO = r"(?P<repo>(spaces/|datasets/)?[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ANY_REPO = f"/api/(models/|(?=spaces/|datasets/)){REPO}"
ROUTES = [
    ("POST", r"/api/repos/create", create_repository),
    ("POST", r"/api/validate-yaml", validate_card),
    ("GET", f"{ANY_REPO}/auth-check/write", check_write_access),
    ("POST", f"{ANY_REPO}/branch/(?P<name>[^/]+)", create_branch),
    ("POST", f"{ANY_REPO}/tag/{REVISION}", create_tag),
    ("GET", r"/api/models", list_models),
    ("GET", f"{ANY_REPO}(/revision/{REVISION})?", repository_info),
    ("GET", f"{ANY_REPO}/tree/{REVISION}(/(?P<folder>.+))?", tree),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<file>.+)", resolve),
    ("POST", f"{ANY_REPO}/preupload/{REVISION}", preupload),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", lfs_batch),
    ("POST", f"{ANY_REPO}/commit/{REVISION}", make_commit),
    ("GET", r"/objects/(?P<sha256>\w+)", stored_object),
    ("PUT", r"/objects/(?P<sha256>\w+)", store_object),
]


def build_app(hub: "LocalHub") -> Any:
    """Return a WSGI application of a Hub and its storage."""

    @Request.application
    def answer(request: Request) -> Response:
        path = request.environ["RAW_URI"]
        match hub.next_fault(request.method, path):
            case "drop":
                request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return Response()
            case "corrupt":
                request.data = request.data[:-1] + bytes([request.data[-1] ^ 1])
            case "hang":
                hub.is_stopped.wait()
                return Response()
            case int(status):  # as of an overloaded server or proxy
                return Response("<html><h1>not now</h1></html>", status, mimetype="text/html")
        sent = request.authorization and request.authorization.token
        if sent and sent not in hub.tokens:
            raise ErrorResponse(401, "Invalid credentials in Authorization header")
        request.hub, request.token = hub, hub.tokens.get(sent)
        method = request.method.replace("HEAD", "GET")
        for route_method, pattern, handle in ROUTES:
            if route_method == method and (found := re.fullmatch(pattern, urlsplit(path).path)):
                request.names = {
                    name: unquote(part or "") for name, part in found.groupdict().items()
                }
                return handle(request)
        raise ErrorResponse(404, f"no such route: {method} {path}")

    return answer
