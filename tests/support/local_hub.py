"""A stand-in for the Hugging Face Hub: repositories in memory behind the routes that real clients call.

Uploads (`create_repo`, `upload_file`, `upload_folder`, `push_to_hub`) of models, datasets and Spaces, branches,
listings, downloads and `load_dataset`, streaming or not, work against it. The libraries read `HF_ENDPOINT` when they
are imported, so a client is a process of its own:

    with local_hub() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.environment(tmp_path), check=True)
        card = hub.files("user/name", "dataset")["README.md"]

Large files are uploaded by themselves before the commit that names them, by these addresses, where `oid` is the SHA256
of the content; `Fault` makes these and other requests fail:

    POST /[datasets/|spaces/]{owner/name}.git/info/lfs/objects/batch    what is missing and where to send it
    PUT  /lfs/{models|datasets|spaces}/{owner/name}/{oid}[/{part}]      the content, or a part of it
    POST /lfs/{models|datasets|spaces}/{owner/name}/{oid}               all parts are there
    POST /[datasets/|spaces/]{owner/name}.git/info/lfs/objects/verify   is all of it there?

Left out: Xet storage, pull requests, tags, deleted repositories and branches, copies between repositories, settings,
gated repositories, `.gitattributes`, redirects to a store of contents, pages of long listings, and Spaces that run.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from types import SimpleNamespace as Request
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from support.local_hub_server import Fault, Handler, Reply, byte_range, refused
from support.local_hub_storage import Commit, Refusal, Repository


USER = "user"  # whose token it is, and owner of repositories that are created without one
ORGANIZATIONS = ("team",)  # where the user may write too
TOKEN = "hf_test"
# the Hub goes by .gitattributes, which every repository gets at its start; this is a part of them
LARGE_SUFFIXES = {".arrow", ".bin", ".ckpt", ".gz", ".h5", ".npy", ".npz", ".onnx", ".parquet", ".pkl", ".pt", ".pth"}
LARGE_SUFFIXES |= {".safetensors", ".tar", ".zip", ".gif", ".jpeg", ".jpg", ".png", ".webp", ".mp4", ".wav"}

REPO_API = r"/api/(?P<kind>datasets|models|spaces)/(?P<repo_id>[^/]+/[^/]+)"
REPO_PAGE = r"/((?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"
LARGE_FILE = r"/lfs/(?P<kind>datasets|models|spaces)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
# method, address, right that it takes, method of LocalHub; named parts of the address become attributes of its request
ROUTES = [
    ("GET", "/api/whoami-v2", "token", "whoami"),
    ("POST", "/api/validate-yaml", "none", "validate_card"),
    ("POST", "/api/repos/create", "token", "create"),
    ("GET", REPO_API + "(/revision/(?P<revision>[^/]+))?", "read", "info"),
    ("GET", REPO_API + "/auth-check", "read", "permit"),
    ("GET", REPO_API + "/auth-check/write", "write", "permit"),
    ("GET", REPO_API + "/refs", "read", "refs"),
    ("GET", REPO_API + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "read", "tree"),
    ("POST", REPO_API + "/paths-info/(?P<revision>[^/]+)", "read", "paths_info"),
    ("POST", REPO_API + "/branch/(?P<branch>[^/]+)", "write", "create_branch"),
    ("POST", REPO_API + "/preupload/(?P<revision>[^/]+)", "write", "preupload"),
    ("POST", REPO_API + "/commit/(?P<revision>[^/]+)", "write", "commit"),
    ("POST", REPO_PAGE + r"\.git/info/lfs/objects/batch", "write", "plan_large_files"),
    ("POST", REPO_PAGE + r"\.git/info/lfs/objects/verify", "write", "verify_large_file"),
    # as with the Hub's store, who knows the address may write: clients send no token there
    ("PUT", LARGE_FILE + r"(/(?P<part>\d+))?", "address", "receive_large_file"),
    ("POST", LARGE_FILE, "address", "complete_large_file"),
    ("GET", REPO_PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "read", "download"),
]


class Received(NamedTuple):
    """A content, or a part of one, that a PUT brought completely."""

    repo_id: str
    oid: str
    size: int


class LocalHub:
    """The repositories, one method per route.

    `unknown` lists the requests that no route took, `received` the contents that were sent by themselves: what was
    there already is not. Add to `faults` to let requests fail. Files are large by suffix (`large_suffixes`) or above
    `large_size` bytes, and are sent in parts above `part_size` bytes.
    """

    def __init__(self, url: str):
        self.url = url
        self.unknown: list[str] = []
        self.received: list[Received] = []
        self.faults: list[Fault] = []
        self.large_suffixes, self.large_size, self.part_size = LARGE_SUFFIXES, 10_000_000, 50_000_000
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._lock = threading.Lock()  # every request runs in its own thread

    def add(self, repo_id: str, repo_type: str = "model", private: bool = False, sdk: str | None = None) -> None:
        """Create an empty repository, whoever the owner is."""
        self._repositories[f"{repo_type}s", repo_id] = Repository(f"{repo_type}s/{repo_id}", private, sdk)

    def files(self, repo_id: str, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Path and content of every file."""
        files = self._repositories[f"{repo_type}s", repo_id].find(revision).files
        return {path: file.content for path, file in files.items()}

    def history(self, repo_id: str, repo_type: str = "model", branch: str = "main") -> list[Commit]:
        """Oldest first, starting with the empty one that creates the repository."""
        return list(self._repositories[f"{repo_type}s", repo_id].branches[branch])

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return self._repositories[f"{repo_type}s", repo_id].private

    def environment(self, folder) -> dict[str, str]:
        """Variables with which a new process works on this hub and caches in `folder`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        switches |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_OFFLINE": "0", "no_proxy": "*"}
        return {**inherited, **switches, "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder)}

    def fault(self, method: str, target: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self.faults if fault.strikes(method, urlsplit(target).path)), None)

    def answer(self, method: str, target: str, headers, body: bytes) -> Reply:
        address = urlsplit(target)
        for route_method, pattern, right, name in ROUTES:
            match = re.fullmatch(pattern, address.path)
            if match and route_method == method.replace("HEAD", "GET"):
                # unquoted only now: a quoted slash belongs to a revision or to a path
                parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                request = Request(query=parse_qs(address.query), headers=headers, body=body, **parts)
                with self._lock:
                    try:
                        self._admit(request, right)
                        return getattr(self, name)(request)
                    except Refusal as refusal:
                        return refused(refusal)
        self.unknown.append(f"{method} {target}")
        return Reply({"error": f"no route for {method} {target}"}, 404)

    def _admit(self, request: Request, right: str) -> None:
        """Refuse who may not do this; find the repository.

        To clients every 401 about a repository is RepoNotFound, but without this code only at https addresses.
        """
        token = request.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
        if right == "token" and token is None:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        if right in ("none", "token"):
            return
        request.kind = request.kind or "models"
        request.repository = self._repositories.get((request.kind, request.repo_id))
        allowed = right == "address" or (token and request.repo_id.split("/")[0] in (USER, *ORGANIZATIONS))
        if request.repository is None or (request.repository.private and not allowed):
            raise Refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if right == "write" and token is None:
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if right == "write" and not allowed:
            raise Refusal(403, "Forbidden", f"{USER} may not write to {request.repo_id}")

    def _page(self, kind: str, repo_id: str) -> str:
        return f"{self.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"

    def whoami(self, request: Request) -> Reply:
        organizations = [{"type": "org", "name": name, "fullname": name} for name in ORGANIZATIONS]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Reply({"type": "user", "name": USER, "fullname": USER, "orgs": organizations, "auth": token})

    def validate_card(self, request: Request) -> Reply:
        return Reply({"errors": [], "warnings": []})

    def create(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        repo_type, owner = wanted.get("type") or "model", wanted.get("organization") or USER
        kind, repo_id = f"{repo_type}s", f"{owner}/{wanted['name']}"
        if owner not in (USER, *ORGANIZATIONS):
            raise Refusal(403, "Forbidden", f"{USER} may not create a {repo_type} for {owner}")
        reply = Reply({"url": self._page(kind, repo_id), "name": repo_id})
        if (kind, repo_id) in self._repositories:
            reply.status = 409  # what `exist_ok` forgives
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # new clients, older ones
            self.add(repo_id, repo_type, private, wanted.get("sdk"))
        return reply

    def info(self, request: Request) -> Reply:
        repository, commit = request.repository, request.repository.find(request.revision)
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in sorted(commit.files.items())]
        about = {"private": repository.private, "gated": False, "disabled": False, "tags": [], "sdk": repository.sdk}
        return Reply({"id": request.repo_id, "sha": commit.name, "siblings": siblings, "downloads": 0, **about})

    def permit(self, request: Request) -> Reply:
        return Reply({"success": True})  # else the request would have been refused

    def refs(self, request: Request) -> Reply:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": history[-1].name}
            for name, history in request.repository.branches.items()
        ]
        return Reply({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def tree(self, request: Request) -> Reply:
        prefix = f"{request.path}/" if request.path else ""
        recursive = request.query.get("recursive", [""])[0].lower() in ("true", "1")
        entries = request.repository.find(request.revision).listing()
        inside = {path: entry for path, entry in entries.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound", f"no folder {request.path!a}")
        return Reply([entry for path, entry in inside.items() if recursive or "/" not in path[len(prefix) :]])

    def paths_info(self, request: Request) -> Reply:
        entries = request.repository.find(request.revision).listing()
        asked = parse_qs(request.body.decode()).get("paths", [])
        return Reply([entries[path] for path in asked if path in entries])

    def create_branch(self, request: Request) -> Reply:
        request.repository.add_branch(request.branch, json.loads(request.body).get("startingPoint"))
        return Reply(b"", 201)

    def preupload(self, request: Request) -> Reply:
        files, plans = request.repository.find(request.revision).files, []
        for wanted in json.loads(request.body)["files"]:
            path = wanted["path"]
            large = os.path.splitext(path)[1] in self.large_suffixes or wanted["size"] > self.large_size
            oid = files[path].etag if path in files else None  # lets clients leave out unchanged files
            # "regular" contents travel inside the commit request
            mode = "lfs" if large else "regular"
            plans.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": plans})

    def plan_large_files(self, request: Request) -> Reply:
        plans = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(request.body)["objects"]]
        for plan in plans:
            if plan["oid"] in request.repository.large:
                continue  # nothing to do for this one
            request.repository.parts.pop(plan["oid"], None)  # of an upload that was given up
            address = f"{self.url}/lfs/{request.kind}/{request.repo_id}/{plan['oid']}"
            upload = {"href": address}
            if plan["size"] > self.part_size:
                parts = range(1, -(-plan["size"] // self.part_size) + 1)
                upload["header"] = {"chunk_size": str(self.part_size), **{str(n): f"{address}/{n}" for n in parts}}
            verify = {"href": f"{self._page(request.kind, request.repo_id)}.git/info/lfs/objects/verify"}
            plan["actions"] = {"upload": upload, "verify": verify}
        return Reply({"transfer": "basic", "objects": plans})

    def receive_large_file(self, request: Request) -> Reply:
        if request.part:
            request.repository.parts.setdefault(request.oid, {})[int(request.part)] = request.body
        else:
            request.repository.store(request.oid, request.body)
        self.received.append(Received(request.repo_id, request.oid, len(request.body)))
        return Reply(b"", 200, {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def complete_large_file(self, request: Request) -> Reply:
        request.repository.join_parts(request.oid)
        return Reply({"success": True})

    def verify_large_file(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        content = request.repository.large.get(wanted["oid"])
        if content is None or len(content) != wanted["size"]:
            raise Refusal(404, "EntryNotFound", f"{wanted['oid']} has not arrived")
        return Reply({"success": True})

    def commit(self, request: Request) -> Reply:
        if "create_pr" in request.query:
            raise Refusal(400, "BadRequest", "this hub has no pull requests")
        commit = request.repository.commit(request.revision, request.body)
        url = f"{self._page(request.kind, request.repo_id)}/commit/{commit.name}"
        return Reply({"success": True, "commitOid": commit.name, "commitUrl": url, "hookOutput": ""})

    def download(self, request: Request) -> Reply:
        commit = request.repository.find(request.revision)
        if request.path not in commit.files:
            raise Refusal(404, "EntryNotFound", f"no file {request.path!a}")
        file = commit.files[request.path]
        content, headers = file.content, {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.name}
        headers["Accept-Ranges"] = "bytes"
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(content))}
        wanted = byte_range(request.headers.get("Range"), len(content))
        if wanted is None:
            return Reply(content, 200, headers)
        start, end = wanted
        if start >= end:
            return Reply(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
        return Reply(content[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})


@contextlib.contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running hub on a free port of this computer; nothing is left of it afterwards."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hub = LocalHub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server.hub
        finally:
            server.shutdown()
