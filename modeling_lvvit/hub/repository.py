"""Uploads to the Hub: permission is asked before the long work, files are checked, and what was broken off is repeated."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from .file_checks import CARD, PICKLE_ENDINGS, check_digests, matches, published_files
from .published_content import published_contents


logger = logging.get_logger(__name__)
MAIN = "main"
# status of the Hub's answer -> what it means for somebody who uploads
MEANINGS = {
    401: "the Hub does not know the token. Log in with `hf auth login`, or put a token with write permission into HF_TOKEN",
    403: "the token may not write there. Check the name of the owner, or use a token with write permission",
    404: "it is not there, or the token may not see it. Check name and owner",
    409: "the Hub refused it because something else was there first, for example another upload at the same time. Try again",
    412: "the repository was changed at the same time. Try again",
    413: "a file is too large for the Hub",
    429: "the Hub was asked too often. Wait and try again",
}
# the client raises a RuntimeError where the upload of one file fails, a UnicodeError for a token that fits into no header
CLIENT_ERRORS = (
    HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, HFValidationError, RuntimeError, UnicodeError,
)  # fmt: skip


@dataclass(kw_only=True)
class HubTargetArguments:
    """Options of what is uploaded, named as in `TrainingArguments`."""

    hub_model_id: str | None = HfArg(
        default=None, help="Repository of the Hub, OWNER/NAME; made if there is none.", aliases=["--repo_id"]
    )
    hub_private_repo: bool | None = HfArg(
        default=None, help="Whether a new repository is private; default: the owner's rule.", aliases=["--private"]
    )
    hub_revision: str | None = HfArg(
        default=None, help="Branch of it, made if there is none; default: main.", aliases=["--revision"]
    )


@dataclass(kw_only=True)
class HubUploadArguments(HubTargetArguments):
    """Options of a program that may upload what it makes."""

    push_to_hub: bool = HfArg(default=False, help="Upload what is finished to the Hub, to hub_model_id.")

    def check_upload(self) -> None:
        """Raises a `ValueError` if there is a repository without an upload, or the other way round."""
        if self.push_to_hub != (self.hub_model_id is not None):
            raise ValueError("`push_to_hub` and `hub_model_id` OWNER/NAME belong together.")


class HubError(OSError):
    """The Hub could not be reached, or refused; the message says what to do."""


@dataclass(frozen=True)
class HubTarget:
    """Where something is published.

    Args:
        repo_id: `owner/name`, owner a user or an organisation; `name` alone is one of the user.
        repo_type: `model` or `dataset`.
        private: Whether a new repository is private; default: the owner's rule. One that is there stays as it is.
        revision: Branch, made if there is none.
        token: Default: the one that was logged in with, or of `HF_TOKEN`.
    """

    repo_id: str
    repo_type: str = "model"
    private: bool | None = None
    revision: str | None = None
    token: str | None = None

    @property
    def _repository(self) -> dict[str, Any]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type, "revision": self.revision}

    def open(self) -> "HubTarget":
        """Makes repository and branch where they are missing, and asks whether they can be written; a `HubError` if not.

        Returns:
            The same with the full name.
        """
        with _explained(f"{self.repo_id} cannot be opened for an upload"):
            api = HfApi(token=self.token)
            repo = api.create_repo(self.repo_id, repo_type=self.repo_type, private=self.private, exist_ok=True)
            api.auth_check(repo.repo_id, repo_type=self.repo_type, write=True)
            if self.revision not in (None, MAIN):
                api.create_branch(repo.repo_id, repo_type=self.repo_type, branch=self.revision, exist_ok=True)
        return replace(self, repo_id=repo.repo_id)

    def upload(self, folder: Path, message: str, replaced: tuple[str, ...] = ()) -> str:
        """Uploads what may be published of a folder in one commit, without places of the disk and the name of the host (see
        `published_contents`); what the repository has already is not sent again. The example of the card there names the repository.

        Args:
            folder: Stays as it is, whatever happens.
            replaced: Patterns (see `matches`) of files that belong together: those that the folder does not have are deleted there, as
                weights in another number of files would otherwise stay next to the new ones.

        Returns:
            Address of the commit.

        Raises:
            ValueError: If a file is damaged, other than its digest says, or not what its name says; nothing is uploaded then.
            HubError: If the Hub cannot be reached or refuses; the message says how to repeat it. Large files that had arrived are
                not sent again then.
        """
        check_digests(folder)
        names, others = published_files(folder)
        if others:
            logger.warning("Not uploaded, as they belong to no model or label set: %s.", ", ".join(others))
        contents = published_contents(folder, names)
        if CARD in contents:
            contents[CARD] = self.named((folder / CARD).read_text(encoding="utf-8")).encode()
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        with _explained(f"The upload of {folder} to {self.repo_id} failed", self._advice(folder)):
            api = HfApi(token=self.token)
            others = set(api.list_repo_files(**self._repository)) - set(contents)
            stale = {name for name in others if matches(name, replaced)}
            operations += [CommitOperationDelete(name) for name in sorted(stale)]
            # not `upload_folder`: with hf_xet it makes several commits, so that an upload that breaks off leaves half a model there
            commit = api.create_commit(operations=operations, commit_message=message, **self._repository)
        if pickles := sorted(name for name in others - stale if name.endswith(PICKLE_ENDINGS)):
            logger.warning("%s also holds %s, which may be pickles.", self.repo_id, ", ".join(pickles))
        return commit.commit_url

    def files(self) -> list[str]:
        """Paths of the files that are there; a `HubError` if the Hub cannot be reached or refuses."""
        with _explained(f"The files of {self.repo_id} cannot be listed"):
            return HfApi(token=self.token).list_repo_files(**self._repository)

    def named(self, card: str) -> str:
        """A card whose example loads from this repository."""
        revision = "" if self.revision in (None, MAIN) else f', revision="{self.revision}"'
        card = re.sub(r'(pipeline\([^)]*model=)"[^"]*"(, revision="[^"]*")?', rf'\1"{self.repo_id}"{revision}', card)
        script_revision = revision and f', {{ revision: "{self.revision}" }}'
        call = r'(await (?:pipeline\("[^"]*", |\w+\.from_pretrained\())"[^"]*"(, \{ revision: "[^"]*" \})?'  # of JavaScript
        card = re.sub(call, rf'\1"{self.repo_id}"{script_revision}', card)
        card = re.sub(r'^(name = )"[^"]*"$', rf'\1"{self.repo_id}"', card, flags=re.MULTILINE)
        command = r"^((?:lvvit train|accelerate launch train_tl.py) .*--token_labels )\S+"
        return re.sub(command, rf"\1{self.repo_id}", card, flags=re.MULTILINE)

    def _advice(self, folder: Path) -> str:
        command = ["lvvit", "publish", str(folder.resolve()), self.repo_id]
        command += [] if self.revision is None else ["--hub_revision", self.revision]
        return f"{folder} is complete and stays as it is. Upload it again with: {shlex.join(command)}"


@contextmanager
def _explained(what: str, advice: str = "") -> Iterator[None]:
    """Turns the errors of the Hub's client into one whose message says what to do."""
    try:
        yield
    except (*CLIENT_ERRORS, KeyboardInterrupt) as error:
        raise HubError(f"{what}: {_reason(error)}." + (f"\n{advice}" if advice else "")) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError):
        return f"{error} {_reason(error.__cause__)}" if error.__cause__ is not None else str(error)
    if isinstance(error, (LocalTokenNotFoundError, UnicodeError)):
        return MEANINGS[401]
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, (OfflineModeIsEnabled, HFValidationError)):
        return str(error).rstrip(".")
    if not isinstance(error, HfHubHTTPError):
        return f"no connection, or it broke off ({type(error).__name__}: {error}). Try again"
    status, answer = error.response.status_code, f": {error.server_message}" if error.server_message else ""
    return f"{MEANINGS.get(status, 'the Hub refused it')} (status {status}{answer})"
