"""A stand-in for the Hugging Face Hub: repositories in memory behind the routes that real clients call.

Uploads (`create_repo`, `upload_file`, `upload_folder`), listings, downloads and `load_dataset`, streaming or not, work
against it. The libraries read `HF_ENDPOINT` when they are imported, so a client is a process of its own:

    with local_hub() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.environment(tmp_path), check=True)
        card = hub.files("user/name", "dataset")["README.md"]

Left out: branches, pull requests, access rights, pages of long listings, and large-file storage, without which
`Dataset.push_to_hub` does not work.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from types import SimpleNamespace as Request
from urllib.parse import parse_qs, unquote, urlsplit


USER = "user"  # owner of repositories that are created without one
REPO_API = r"/api/(?P<kind>datasets|models)/(?P<repo_id>[^/]+/[^/]+)"
RESOLVE = r"/((?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES = [  # method, address, method of LocalHub; the named parts of the address become attributes of its request
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("POST", "/api/repos/create", "create"),
    ("GET", REPO_API + "(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", REPO_API + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", REPO_API + "/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", REPO_API + "/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", REPO_API + "/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", RESOLVE, "download"),
]
Files = dict[str, bytes]  # path in the repository -> content
Commits = dict[str, Files]  # name of the commit -> all its files; the last one is the head of the main branch


@dataclass
class Reply:
    """Content other than bytes is sent as JSON."""

    content: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer with an error status; clients choose their exception by `code`."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.reply = Reply({"error": message}, status, {"X-Error-Code": code})


def blob_id(content: bytes) -> str:
    """What git calls this content; clients compare it with what they compute from local files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing(files: Files) -> dict[str, dict]:
    """Every file and folder, by path, as the Hub describes it."""
    entries = {}
    for path, content in files.items():
        for folder in map(str, PurePosixPath(path).parents[:-1]):
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        entries[path] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    return dict(sorted(entries.items()))


def apply_operation(files: Files, key: str, value: dict) -> Files:
    path = value["path"]
    if key == "file":
        return {**files, path: base64.b64decode(value["content"])}
    if key == "deletedFile":
        return {name: content for name, content in files.items() if name != path}
    if key == "deletedFolder":
        return {name: content for name, content in files.items() if not name.startswith(path.rstrip("/") + "/")}
    raise Refusal(400, "BadRequest", f"this hub cannot commit {key}")


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end for `bytes=4-7` or `bytes=4-`, the forms that clients send; None where all is asked for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    if match is None:
        return None
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size


class LocalHub:
    """The repositories, one method per route; `unknown` lists the requests that no route took."""

    def __init__(self, url: str):
        self.url = url
        self.unknown: list[str] = []
        self._repositories: dict[tuple[str, str], Commits] = {}
        self._lock = threading.Lock()  # every request runs in its own thread

    def files(self, repo_id: str, repo_type: str = "model") -> Files:
        """Path and content of every file on the main branch."""
        return dict(self._find(f"{repo_type}s", repo_id, None)[1])

    def environment(self, folder) -> dict[str, str]:
        """Variables with which a new process works on this hub and caches in `folder`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        switches |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_OFFLINE": "0", "no_proxy": "*"}
        return {**inherited, **switches, "HF_ENDPOINT": self.url, "HF_TOKEN": "hf_test", "HF_HOME": str(folder)}

    def answer(self, method: str, target: str, wanted_range: str | None, body: bytes) -> Reply:
        address = urlsplit(target)
        for route_method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, address.path)
            if match and route_method == method.replace("HEAD", "GET"):
                # unquoted only now: a quoted slash belongs to a revision or to a path
                parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                request = Request(query=parse_qs(address.query), range=wanted_range, body=body, **parts)
                with self._lock:
                    try:
                        return getattr(self, name)(request)
                    except Refusal as refusal:
                        return refusal.reply
        self.unknown.append(f"{method} {target}")
        return Reply({"error": f"no route for {method} {target}"}, 404)

    def _find(self, kind: str | None, repo_id: str, revision: str | None) -> tuple[str, Files]:
        commits = self._repositories.get((kind or "models", repo_id))
        if commits is None:
            raise Refusal(404, "RepoNotFound", f"no repository {repo_id}")
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return commit, commits[commit]

    def _page(self, kind: str, repo_id: str) -> str:
        return f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"

    def whoami(self, request: Request) -> Reply:
        return Reply({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def validate_card(self, request: Request) -> Reply:
        return Reply({"errors": [], "warnings": []})

    def create(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        kind, repo_id = f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or USER}/{wanted['name']}"
        reply = Reply({"url": self._page(kind, repo_id), "name": repo_id})
        if (kind, repo_id) in self._repositories:
            reply.status = 409  # what `exist_ok` forgives
        else:
            self._repositories[kind, repo_id] = {hashlib.sha1(f"{kind}/{repo_id}".encode()).hexdigest(): {}}
        return reply

    def info(self, request: Request) -> Reply:
        commit, files = self._find(request.kind, request.repo_id, request.revision)
        siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
        about = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        return Reply({"id": request.repo_id, "sha": commit, "siblings": siblings, **about})

    def tree(self, request: Request) -> Reply:
        files = self._find(request.kind, request.repo_id, request.revision)[1]
        prefix = f"{request.path}/" if request.path else ""
        recursive = request.query.get("recursive", [""])[0].lower() in ("true", "1")
        inside = {path: entry for path, entry in listing(files).items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound", f"no folder {request.path}")
        return Reply([entry for path, entry in inside.items() if recursive or "/" not in path[len(prefix) :]])

    def paths_info(self, request: Request) -> Reply:
        files = self._find(request.kind, request.repo_id, request.revision)[1]
        entries, asked = listing(files), parse_qs(request.body.decode()).get("paths", [])
        return Reply([entries[path] for path in asked if path in entries])

    def preupload(self, request: Request) -> Reply:
        files = self._find(request.kind, request.repo_id, request.revision)[1]
        entries, plans = listing(files), []
        for path in [file["path"] for file in json.loads(request.body)["files"]]:
            oid = entries[path]["oid"] if path in entries else None  # lets clients leave out unchanged files
            # "regular" contents travel inside the commit request
            plans.append({"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid})
        return Reply({"files": plans})

    def commit(self, request: Request) -> Reply:
        parent, files = self._find(request.kind, request.repo_id, request.revision)
        if request.revision != "main" or "create_pr" in request.query:
            raise Refusal(400, "BadRequest", "this hub commits to main only")
        for line in request.body.splitlines()[1:]:  # the first line is the message
            files = apply_operation(files, **json.loads(line))
        commit = hashlib.sha1(parent.encode() + request.body).hexdigest()
        self._repositories[request.kind, request.repo_id][commit] = files
        url = f"{self._page(request.kind, request.repo_id)}/commit/{commit}"
        return Reply({"success": True, "commitOid": commit, "commitUrl": url})

    def download(self, request: Request) -> Reply:
        commit, files = self._find(request.kind, request.repo_id, request.revision)
        if request.path not in files:
            raise Refusal(404, "EntryNotFound", f"no file {request.path}")
        content = files[request.path]
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = byte_range(request.range, len(content))
        if wanted is None:
            return Reply(content, 200, headers)
        start, end = wanted
        if start >= end:
            return Reply(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
        return Reply(content[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # clients reuse connections
    disable_nagle_algorithm = True  # head and content are two writes; the second must not wait for the first's receipt

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.server.hub.answer(self.command, self.path, self.headers.get("Range"), body)
        content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        kind = "application/octet-stream" if isinstance(reply.content, bytes) else "application/json"
        with contextlib.suppress(ConnectionError):  # streaming clients hang up when they have read enough
            self.send_response(reply.status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *args) -> None:
        """Quiet: tests print what they need."""


@contextlib.contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running hub on a free port of this computer; nothing is left of it afterwards."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub = LocalHub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server.hub
        finally:
            server.shutdown()
