"""Pipelines by their name on the Hugging Face hub, out of its own cache on disk; `fetch` alone uses the network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fewstep.config import UserError
from fewstep.files import expanded

_WORD = r"[A-Za-z0-9][\w.-]*"
NAME = re.compile(rf"({_WORD}/{_WORD})(?:@(\w[\w./-]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST = 200
"""Of a name and its revision; the hub's names have at most 96."""
MAIN = "main"
"""The branch that a hub means where no revision is named."""
CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
"""Configs, tokenizers, and the card with its licence."""
READ = (*CONFIGS, "*/*.safetensors")
"""What is read of a pipeline's repository, where the same weights may stand as pickles, as ONNX and in a single file."""
UNREAD = ("*.fp16*", "*.bf16*", "*.fp8*", "*.non_ema*")
"""Weights beside the plain ones."""


@dataclass(frozen=True)
class Repository:
    """A repository by name, at a branch, tag or commit; None: its main branch."""

    name: str
    revision: str | None = None

    @property
    def path(self) -> str:
        """As a recipe names it, `org/name` or `org/name@revision`."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def command(self) -> str:
        """The command line that fetches it into the hub's cache."""
        return f"hf download {self.name} --revision {self.revision or MAIN}"


def parsed(path: str) -> Repository | None:
    """What `org/name` or `org/name@revision` reads as; None for other paths."""
    found = NAME.fullmatch(path)
    if found is None or ".." in path or "--" in found[1] or len(path) > LONGEST:
        return None
    return Repository(found[1], found[2])


def repository(path: str) -> Repository | None:
    """What `org/name` or `org/name@revision` names; None for what is here, as a file or a folder, and for other paths."""
    repo = parsed(path)
    return None if repo is None or expanded(path).exists() else repo


def cached(repo: Repository) -> Path | None:
    """The folder of a repository in the hub's cache, by its commit; None where that revision is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # The index alone: which parts have to be there is for whoever reads them to say.
        found = Path(
            snapshot_download(
                repo.name, revision=repo.revision, local_files_only=True, allow_patterns=["model_index.json"]
            )
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return found if COMMIT.fullmatch(found.name) else None  # a damaged refs/main names no commit


def pinned(path: str) -> str:
    """The path with the commit that it stands for in the hub's cache; other paths, and what is not there, as they are."""
    repo = repository(path)
    found = cached(repo) if repo else None
    return path if repo is None or found is None else Repository(repo.name, found.name).path


def hint(path: str) -> str:
    """What to do about a path that is nowhere here but reads as a repository of a hub; "" for others."""
    repo = repository(path)
    if repo is None or (repo.revision is None and Path(path).parent.exists()):
        return ""
    return (
        f", and not in the Hugging Face cache at revision {repo.revision or MAIN}; if that is a hub's name, fetch it "
        f"with `{repo.command}`, or add --download to `fewstep run`, `plan` or `recipes check`"
    )


def mend(path: Path) -> str:
    """How to fetch the rest of a repository in the hub's cache that a folder or file is of; "" for other paths."""
    for folder in (path, *path.parents):
        found = re.fullmatch(r"models--(.+)--(.+)", folder.parent.parent.name)
        if found and folder.parent.name == "snapshots":
            return f"; fetch the rest with `{Repository(f'{found[1]}/{found[2]}', folder.name).command}`"
    return ""


def fetch(repo: Repository, *, configs: bool = False) -> Path:
    """Fetch what is read of a repository and not in the hub's cache yet; its folder there.

    configs: no weights. Where the hub is not reached, what is in the cache is taken. UserError, with the reason and the
    remedy, where nothing is.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    read = list(CONFIGS if configs else READ)
    try:
        made = snapshot_download(repo.name, revision=repo.revision, allow_patterns=read, ignore_patterns=list(UNREAD))
        return Path(made)
    except (HTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        if found := cached(repo):
            return found
        why = reason(error, repo.name)
        raise UserError(f"{repo.path}: cannot be fetched: {why}; once it can be: `{repo.command}`") from None


LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def reason(error: Exception, name: str) -> str:
    """Why the hub refused or was not reached, in a line with the remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return f"its owner asks for consent: accept the terms at {constants.ENDPOINT}/{name}, then {LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no repository of this name, or a private one: check the name, then {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch, tag or commit; choose another revision"
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        return f"the hub answered with {code}" + (f": {LOGIN}" if code in (401, 403) else "")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | HTTPError):
        # What such an error says may hold the headers of the request, and they the token.
        offline = constants.HF_HUB_OFFLINE
        return "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} was not reached ({type(error).__name__})"
    return " ".join(str(error).split())[:300] or type(error).__name__
