"""`fewstep push`: the folder of an export as a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import yaml

from fewstep import __version__
from fewstep.config import UserError
from fewstep.export.base import KIND
from fewstep.files import MARK, read_mark, strangers, text_of
from fewstep.networks import hub
from fewstep.networks.weights import check_whole

CARD = "README.md"
STUDENT = ("pipeline_tag", "license", "base_model")
"""Keys of a card of which a student of a published pipeline has all: one that has some of them is such a student's."""


def push(
    folder: Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Iterator[str]:
    """Upload an export; the files with their sizes, then the address, a line each.

    Args:
        folder: what `fewstep export` wrote, its card as it is now.
        name: org/name; it is made where it is not there.
        private: of a repository that is made; a public one is then refused.
        revision: branch, made where it is not there; main when left out.
        message: of the commit.
        dry_run: list, and upload nothing.

    UserError, before anything is sent, for what is no export of fewstep, for a card that lacks licence or base model and
    for a missing token; with the reason for what the hub refuses.
    """
    repo = hub.parsed(name)
    if repo is None or repo.revision is not None:
        raise UserError(f"{name}: expected org/name, the repository's name on the hub; a branch goes into --revision")
    files = exported(folder)
    check_card(folder / CARD)
    token = None if dry_run else token_of()
    sizes = [(folder / file).stat().st_size for file in files]
    width = max(map(len, files))
    yield from (f"{file:{width}}  {in_words(size)}" for file, size in zip(files, sizes, strict=True))
    yield from (f"left here: {file}, which fewstep did not write" for file in strangers(folder))
    to = f"{name}, branch {revision or hub.MAIN}"
    yield f"{len(files)} files, {in_words(sum(sizes))}, from {folder} to {to}"
    if dry_run:
        yield "nothing was uploaded (--dry-run)"
        return
    yield f"uploaded: {_upload(folder, name, files, private, revision, message, token)}"


def exported(folder: Path) -> list[str]:
    """The files that fewstep wrote into an export, relative to it. UserError for another folder, or one in pieces."""
    held = read_mark(folder)
    kind = (held or {}).get("kind")
    if held is None or kind != KIND:
        what = f"is a {kind} that fewstep made and no export" if kind else "is no export of fewstep"
        own = folder / "export"
        there = (read_mark(own) or {}).get("kind") == KIND
        fix = f"push {own}" if there else "write one with `fewstep export RUN --out FOLDER`, and push that folder"
        raise UserError(f"{folder}: {what}; {fix}")
    files = [file for file in held["files"] if Path(file).name != MARK]
    for file in files:
        path = folder / file
        if path.is_symlink() or not path.is_file() or ".." in Path(file).parts:
            raise UserError(f"{folder}: {file} is missing or a link, and the export had it; export it again")
    for sub in sorted({(folder / file).parent for file in files if file.endswith(".safetensors")}):
        check_whole(sub, str(folder))
    return sorted(files)


def check_card(card: Path) -> None:
    """UserError for a card that is not there, whose front matter is no YAML, or that lacks licence or base model."""
    try:
        text = text_of(card.read_bytes(), card)
    except (OSError, ValueError) as error:
        raise UserError(f"{card}: the card cannot be read: {error}") from None
    lines = text.split("\n")
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if lines[0].rstrip() != "---" or end is None:
        raise UserError(f"{card}: has no front matter, which an export's card begins with; export again")
    try:
        front: Any = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise UserError(f"{card}: its front matter is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(front, dict):
        raise UserError(f"{card}: its front matter is {front!r}, not keys and values; export again")
    lacks = [key for key in STUDENT[1:] if not front.get(key)]
    if lacks and any(front.get(key) for key in STUDENT):
        say = {"license": "license: apache-2.0, or what the teacher's allows", "base_model": "base_model: org/name"}
        wanted = "; ".join(say[key] for key in lacks)
        raise UserError(
            f"{card}: its front matter lacks {' and '.join(lacks)}, which the teacher's folder did not say; write "
            f"between the lines --- at its top: {wanted}"
        )


def token_of() -> str:
    """The token that huggingface_hub finds. UserError where there is none."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("push: HF_HUB_OFFLINE is set; unset it, or list the files with --dry-run")
    found = get_token()
    if not found:
        raise UserError(f"push: there is no token: {hub.LOGIN}, to one that may write (--dry-run needs none)")
    return found


def _upload(
    folder: Path,
    name: str,
    files: Sequence[str],
    private: bool,
    revision: str | None,
    message: str | None,
    token: str | None,
) -> str:
    """Make repository and branch where they are not there, commit the files; the address of that branch."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    api = HfApi(token=token, library_name="fewstep", library_version=__version__)
    branch = None if revision == hub.MAIN else revision
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise UserError(f"{name}: is there and public, which --private does not change; choose another name")
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=branch,
            commit_message=message or f"Upload of fewstep {__version__}",
            allow_patterns=[escape(file) for file in files],
        )
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError) as error:
        raise UserError(f"{name}: not uploaded: {hub.reason(error, name)}") from None
    return f"{api.endpoint}/{name}" + (f"/tree/{branch}" if branch else "")


def in_words(size: int) -> str:
    """Bytes as a hub shows them, in powers of 1000."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
