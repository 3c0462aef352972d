"""What the stand-in for the Hugging Face Hub keeps of a repository: branches of commits and large files, in memory."""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath


class Refusal(Exception):
    """An answer with an error status; clients choose their exception by `code`."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def blob_id(content: bytes) -> str:
    """What git calls this content; clients compare it with what they compute from local files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large_id(content: bytes) -> str:
    """What large-file storage calls this content."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; git has only a pointer to a large one."""

    content: bytes
    large: bool = False

    @cached_property
    def etag(self) -> str:
        """Clients compare it with what they have in a folder or in the cache."""
        return large_id(self.content) if self.large else blob_id(self.content)

    def entry(self, path: str) -> dict:
        """The file as listings of the Hub describe it."""
        about = {"type": "file", "path": path, "size": len(self.content), "oid": self.etag}
        if self.large:
            lines = (
                "version https://git-lfs.github.com/spec/v1",
                f"oid sha256:{self.etag}",
                f"size {about['size']}\n",
            )
            pointer = "\n".join(lines).encode()
            about["oid"] = blob_id(pointer)
            about["lfs"] = {"oid": self.etag, "size": about["size"], "pointerSize": len(pointer)}
        return about


Files = dict[str, StoredFile]  # by path in the repository


@dataclass
class Commit:
    name: str
    message: str
    files: Files  # all of them, not only what the commit changed

    def listing(self) -> dict[str, dict]:
        """Every file and folder, by path, as the Hub describes it."""
        entries = {}
        for path, file in self.files.items():
            for folder in map(str, PurePosixPath(path).parents[:-1]):
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
            entries[path] = file.entry(path)
        return dict(sorted(entries.items()))


@dataclass
class Repository:
    """`large` has the contents that were uploaded by themselves, `parts` the pieces of those still on their way."""

    name: str
    private: bool = False
    sdk: str | None = None  # of a Space
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # oldest commit first
    large: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def __post_init__(self):
        self.branches["main"] = [Commit(hashlib.sha1(self.name.encode()).hexdigest(), "initial commit", {})]

    def find(self, revision: str | None) -> Commit:
        """The head of a branch, or a commit by its name."""
        if revision is None or revision in self.branches:
            return self.branches[revision or "main"][-1]
        for history in self.branches.values():
            for commit in history:
                if commit.name == revision:
                    return commit
        raise Refusal(404, "RevisionNotFound", f"no revision {revision!a}")

    def add_branch(self, name: str, start: str | None) -> None:
        if name in self.branches:
            raise Refusal(409, "Conflict", f"there is a branch {name!a}")  # what `exist_ok` forgives
        begin = self.find(start)
        history = next(history for history in self.branches.values() if begin in history)
        self.branches[name] = history[: history.index(begin) + 1]

    def store(self, oid: str, content: bytes) -> None:
        if large_id(content) != oid:
            raise Refusal(400, "BadRequest", f"this content is not {oid}")
        self.large[oid] = content

    def join_parts(self, oid: str) -> None:
        parts = self.parts.pop(oid, {})
        self.store(oid, b"".join(parts[number] for number in sorted(parts)))

    def commit(self, branch: str, body: bytes) -> Commit:
        """`body` has an operation per line; the first line is the message."""
        head = self.find(branch)
        if branch not in self.branches:
            raise Refusal(400, "BadRequest", "commits go to branches")
        header, *operations = map(json.loads, body.splitlines())
        if header["value"].get("parentCommit", head.name) != head.name:
            raise Refusal(412, "PreconditionFailed", f"there is a later commit on {branch!a}")
        files = head.files
        for operation in operations:
            files = self._apply(files, **operation)
        name = hashlib.sha1(head.name.encode() + body).hexdigest()
        commit = Commit(name, header["value"]["summary"], files)
        self.branches[branch].append(commit)
        return commit

    def _apply(self, files: Files, key: str, value: dict) -> Files:
        path = value["path"]
        if key == "file":
            return {**files, path: StoredFile(base64.b64decode(value["content"]))}
        if key == "lfsFile":
            if value["oid"] not in self.large:
                raise Refusal(400, "BadRequest", f"{path!a} was not uploaded before the commit")
            return {**files, path: StoredFile(self.large[value["oid"]], large=True)}
        if key == "deletedFile":
            return {name: file for name, file in files.items() if name != path}
        if key == "deletedFolder":
            return {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
        raise Refusal(400, "BadRequest", f"this hub cannot commit {key}")
