"""The calls of the Hub's protocol that local_hub.py answers: HTTP in, HTTP out.

A route is a method, a pattern and a function (hub, match of the pattern, request) -> Answer. What is asked for in vain
raises `Refusal`, whose headers tell the client why, as the Hub's do.
"""

import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


if TYPE_CHECKING:
    from local_hub import Commit, Fault, LocalHub, Repository, StoredFile, Token

SECONDS_OF_SILENCE = 30.0
SECONDS_HELD = 110.0  # clients that push lose their patience after 120


@dataclass(frozen=True)
class Request:
    """A request of a client."""

    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    token: "Token | None"  # None if the request has no token

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Answer:
    """What is sent back; `content` is bytes, or what becomes JSON."""

    content: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        error = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, error | (headers or {}))


# What comes before the name of a repository of each kind, in addresses, and in `LocalHub.repositories`.
PREFIXES = {"model": "", "space": "spaces/"}


# Who, and what ------------------------------------------------------------------------------------------------------


def readable(hub: "LocalHub", repo_id: str, request: Request) -> "Repository":
    """A repository that this token may see; others do not exist for it."""
    repository = hub.repository(repo_id)
    if repository is None or (repository.private and not (request.token and request.token.can_read(repo_id))):
        if request.token is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")
    return repository


def writable(hub: "LocalHub", repo_id: str, request: Request) -> "Repository":
    """A repository that this token may change."""
    repository = readable(hub, repo_id, request)
    if request.token is None:
        raise Refusal(401, "Invalid username or password.")
    if not request.token.can_write(repo_id):
        raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
    return repository


def commit_of(repository: "Repository", revision: str) -> tuple[str, "Commit"]:
    """The commit that a revision stands for."""
    name = repository.resolve(unquote(revision))
    if name is None:
        raise Refusal(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
    return name, repository.commits[name]


# Accounts and repositories -------------------------------------------------------------------------------------------


def who_am_i(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """The token's user, his organisations, and the token's rights."""
    if request.token is None:
        raise Refusal(401, "Invalid username or password.")
    token = request.token
    access: dict[str, Any] = {"displayName": "test", "role": token.role}
    if token.role == "fineGrained":
        scoped = [
            {"entity": {"_id": "0", "type": kind, "name": name}, "permissions": permissions}
            for (kind, name), permissions in token.scopes.items()
        ]
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    organisations = [{"type": "org", "name": name, "roleInOrg": role} for name, role in token.organisations.items()]
    return Answer(
        {
            "type": "user",
            "name": token.user,
            "orgs": organisations,
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


def create_repository(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """A new repository with its first commit; 409 if there is one."""
    asked = request.json()
    if request.token is None:
        raise Refusal(401, "Invalid username or password.")
    kind, namespace = asked.get("type", "model"), asked.get("organization") or request.token.user
    repo_id = f"{PREFIXES[kind]}{namespace}/{asked['name']}"
    if not request.token.can_write(repo_id):
        raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    if kind == "space" and not asked.get("sdk"):
        raise Refusal(400, "sdk is required for a Space")
    url = f"{hub.url}/{repo_id}"
    with hub.lock:
        if hub.repository(repo_id) is not None:
            return Answer({"error": f"You already created this {kind} repo", "url": url}, 409)
        default = "private" if namespace in hub.private_by_default else "public"
        visibility = {True: "private", False: "public", None: asked.get("visibility", default)}[asked.get("private")]
        hub.create(repo_id, private=visibility == "private")
    return Answer({"url": url})


def validate_card(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """Whether the header of a README.md is YAML."""
    content = request.json()["content"]
    header = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError as error:
        return Answer({"errors": [{"message": f"bad YAML: {error}"}], "warnings": []}, 400)
    if not isinstance(metadata, dict):
        return Answer({"errors": [{"message": "the metadata is no object"}], "warnings": []}, 400)
    if request.json().get("repoType") == "space" and len(metadata.get("short_description", "")) > 60:
        return Answer({"errors": [{"message": "short_description is longer than 60"}], "warnings": []}, 400)
    return Answer({"errors": [], "warnings": []})


def refs(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """Branches and tags."""
    repository = readable(hub, match["repo"], request)

    def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in names.items()]

    return Answer(
        {"branches": listed(repository.branches, "heads"), "tags": listed(repository.tags, "tags"), "converts": []}
    )


def create_branch(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """A branch from `main`, or from what is asked for."""
    repository = writable(hub, match["repo"], request)
    branch = unquote(match["name"])
    if branch in repository.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
    repository.branches[branch], _ = commit_of(repository, request.json().get("startingPoint", "main"))
    return Answer()


def create_tag(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """A tag on a revision."""
    repository = writable(hub, match["repo"], request)
    tag = request.json()["tag"]
    if tag in repository.tags:
        raise Refusal(409, f"Tag reference exists already: {tag}")
    repository.tags[tag], _ = commit_of(repository, match["name"])
    return Answer()


# Reading -------------------------------------------------------------------------------------------------------------


def repository_info(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """What there is at a revision."""
    repository = readable(hub, match["repo"], request)
    name, commit = commit_of(repository, match["revision"] or "main")
    repo_id = "/".join(match["repo"].split("/")[-2:])
    return Answer(
        {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.partition("/")[0],
            "sha": name,
            "private": repository.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
    )


def tree(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """Files, with their hashes, and folders."""
    _, commit = commit_of(readable(hub, match["repo"], request), match["revision"])
    start = f"{unquote(match['folder'])}/" if match["folder"] else ""
    found = {path: file for path, file in sorted(commit.files.items()) if path.startswith(start)}
    if start and not found:
        raise Refusal(404, "not found", "EntryNotFound")
    folders = {"/".join(path.split("/")[:depth]) for path in found for depth in range(1, path.count("/") + 1)}
    entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in sorted(folders)]
    entries += [file_entry(path, file) for path, file in found.items()]
    if request.query.get("recursive", ["false"])[0].lower() != "true":
        entries = [entry for entry in entries if "/" not in str(entry["path"]).removeprefix(start)]
    return Answer(entries)


def paths_info(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """The same for some files."""
    _, commit = commit_of(readable(hub, match["repo"], request), match["revision"])
    is_json = request.headers.get("content-type") == "application/json"
    asked = request.json() if is_json else parse_qs(request.body.decode())
    return Answer([file_entry(path, commit.files[path]) for path in asked["paths"] if path in commit.files])


def file_entry(path: str, file: "StoredFile") -> dict[str, Any]:
    """A file of a listing."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return entry


def resolve(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """A file's content, or where the storage has it."""
    name, commit = commit_of(readable(hub, match["repo"], request), match["revision"])
    file = commit.files.get(unquote(match["file"]))
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": name})
    headers = {"X-Repo-Commit": name, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    if file.is_lfs:
        location = f"{hub.storage_url}/objects/{file.sha256}"
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": location}
        return Answer(b"", 302, headers | linked)
    return part_of(hub.contents[file.sha256], request, headers)


def stored_object(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """A large file, from the storage."""
    if match["sha256"] not in hub.contents:
        raise Refusal(404, "NoSuchKey")
    return part_of(hub.contents[match["sha256"]], request, {"ETag": f'"{match["sha256"]}"'})


def part_of(content: bytes, request: Request, headers: dict[str, str]) -> Answer:
    """The bytes from the one that is asked for: an interrupted download goes on."""
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if asked is None:
        return Answer(content, 200, headers)
    start = int(asked[1])
    where = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
    return Answer(content[start:], 206, headers | where)


# Writing -------------------------------------------------------------------------------------------------------------


def preupload(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """For each file: is it a large one, and what has the branch under this path?"""
    _, commit = commit_of(writable(hub, match["repo"], request), match["revision"])
    answers = []
    for file in request.json()["files"]:
        is_lfs, there = hub.is_lfs(file["path"], file["size"]), commit.files.get(file["path"])
        answers.append(
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_lfs else "regular",
                "shouldIgnore": False,
                "oid": None if there is None else there.sha256 if there.is_lfs else there.oid,
            }
        )
    return Answer({"files": answers})


def lfs_batch(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """Where to send large files; nothing to do for those that are stored already."""
    writable(hub, match["repo"], request)
    objects = []
    for asked in request.json()["objects"]:
        answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.contents:
            answer["actions"] = {
                "upload": {"href": f"{hub.storage_url}/objects/{asked['oid']}"},
                "verify": {"href": f"{hub.url}/{match['repo']}.git/info/lfs/objects/verify"},
            }
        objects.append(answer)
    return Answer({"transfer": "basic", "objects": objects})


def store_object(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """Keep a large file; it must be what it was announced as."""
    if hashlib.sha256(request.body).hexdigest() != match["sha256"]:
        raise Refusal(400, "XAmzContentSHA256Mismatch")
    hub.contents[match["sha256"]] = request.body
    return Answer()


def lfs_verify(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """Whether a large file has arrived."""
    asked = request.json()
    if len(hub.contents.get(asked["oid"], b"")) != asked["size"]:
        raise Refusal(404, "the object is not there")
    return Answer({})


def make_commit(hub: "LocalHub", match: re.Match[str], request: Request) -> Answer:
    """All changes, or none, as one commit on a branch."""
    from local_hub import lfs_file

    repository = writable(hub, match["repo"], request)
    branch = unquote(match["revision"])
    changes = [json.loads(line) for line in request.body.splitlines()]
    with hub.lock:
        parent, commit = commit_of(repository, branch)
        if branch not in repository.branches:
            raise Refusal(404, f"{branch} is no branch", "RevisionNotFound")
        files = dict(commit.files)
        header: dict[str, Any] = {}
        for change in changes:
            value = change["value"]
            match change["key"]:
                case "header":
                    header = value
                    if value.get("parentCommit", parent) != parent:
                        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[value["path"]] = hub.store(value["path"], base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in hub.contents:
                        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    files[value["path"]] = lfs_file(value["oid"], len(hub.contents[value["oid"]]))
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                case other:
                    raise Refusal(400, f"unknown change {other}")
        name = repository.commit(branch, header["summary"], files)
    return Answer({"success": True, "commitOid": name, "commitUrl": f"{hub.url}/{match['repo']}/commit/{name}"})


# HTTP ----------------------------------------------------------------------------------------------------------------

Routes = list[tuple[str, re.Pattern[str], Callable[["LocalHub", re.Match[str], Request], Answer]]]

REPO = r"(?P<repo>(spaces/|datasets/)?[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ANY_REPO = f"/api/(models/|(?=spaces/|datasets/)){REPO}"
HUB_ROUTES: Routes = [
    ("GET", re.compile(r"/api/whoami-v2"), who_am_i),
    ("POST", re.compile(r"/api/repos/create"), create_repository),
    ("POST", re.compile(r"/api/validate-yaml"), validate_card),
    ("GET", re.compile(f"{ANY_REPO}/refs"), refs),
    ("POST", re.compile(f"{ANY_REPO}/branch/(?P<name>[^/]+)"), create_branch),
    ("POST", re.compile(f"{ANY_REPO}/tag/(?P<name>[^/]+)"), create_tag),
    ("GET", re.compile(f"{ANY_REPO}(/revision/{REVISION})?"), repository_info),
    ("GET", re.compile(f"{ANY_REPO}/tree/{REVISION}(/(?P<folder>.+))?"), tree),
    ("POST", re.compile(f"{ANY_REPO}/paths-info/{REVISION}"), paths_info),
    ("GET", re.compile(f"/{REPO}/resolve/{REVISION}/(?P<file>.+)"), resolve),
    ("POST", re.compile(f"{ANY_REPO}/preupload/{REVISION}"), preupload),
    ("POST", re.compile(f"/{REPO}[.]git/info/lfs/objects/batch"), lfs_batch),
    ("POST", re.compile(f"/{REPO}[.]git/info/lfs/objects/verify"), lfs_verify),
    ("POST", re.compile(f"{ANY_REPO}/commit/{REVISION}"), make_commit),
]
STORAGE_ROUTES: Routes = [
    ("GET", re.compile(r"/objects/(?P<sha256>\w+)"), stored_object),
    ("PUT", re.compile(r"/objects/(?P<sha256>\w+)"), store_object),
]


def handler_for(hub: "LocalHub", routes: Routes) -> type[BaseHTTPRequestHandler]:
    """Answers requests by these routes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            fault = hub.next_fault(self.command, self.path)
            if fault is not None and fault.kind in ("drop", "wait"):
                if fault.kind == "wait":
                    time.sleep(SECONDS_OF_SILENCE)
                self.hang_up()
                return
            body = self.read_body()
            if fault is not None and fault.kind == "hold":
                hub.released.wait(SECONDS_HELD)
            if fault is not None and isinstance(fault.kind, int):
                self.send(failure(fault))
                return
            answer = self.answer(body)
            if fault is not None and fault.kind == "lose":
                self.hang_up()
                return
            self.send(answer, is_cut=fault is not None and fault.kind == "cut")

        do_HEAD = do_POST = do_PUT = do_GET

        def answer(self, body: bytes) -> Answer:
            """What the routes make of the request."""
            where = urlsplit(self.path)
            method = "GET" if self.command == "HEAD" else self.command
            try:
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(parse_qs(where.query), headers, body, self.token())
                for route_method, pattern, act in routes:
                    if route_method == method and (match := pattern.fullmatch(where.path)):
                        return act(hub, match, request)
                raise Refusal(404, f"no such route: {method} {where.path}")
            except Refusal as refusal:
                return refusal.answer

        def token(self) -> "Token | None":
            """Whose token was sent; a wrong one is refused, whatever was asked for."""
            sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if sent and sent not in hub.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            return hub.tokens.get(sent)

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def send(self, answer: Answer, is_cut: bool = False) -> None:
            content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
            kind = "application/octet-stream" if isinstance(answer.content, bytes) else "application/json"
            self.send_response(answer.status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content)), **answer.headers}
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if is_cut else content)
            if is_cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args: object) -> None:
            """Stay silent."""

    return Handler


def failure(fault: "Fault") -> Answer:
    """The answer of a server, or of the proxy before it, that is overloaded: a page for people."""
    headers = {"Content-Type": "text/html"}
    if fault.retry_after is not None:
        headers["Retry-After"] = str(fault.retry_after)
    return Answer(b"<html><h1>not now</h1></html>", int(fault.kind), headers)
