"""Pipelines by their name on the hub, out of a filled cache folder; nothing here may reach a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_hub import A, B, cache as cache, fill, served
from tiny_teacher import make_teacher

from fewstep.config import Absent, UserError
from fewstep.networks import hub
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.folder import read_folder, resolve
from fewstep.networks.teachers import DiffusersTeacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def test_names(cache: Path):
    assert hub.repository("org/name") == hub.Repository("org/name")
    assert hub.repository("org/name@v1.0") == hub.Repository("org/name", "v1.0")
    assert hub.repository("org/name@refs/pr/1") == hub.Repository("org/name", "refs/pr/1")
    others = ("name", "a/b/c", "assets:x/y", "./x/y", "~/x", "../x", "org/na..me", "org/a--b", "org/n@../../x", "org/n@")
    for path in others:
        assert hub.repository(path) is None
    assert hub.repository("org/" + "n" * 300) is None
    Path("org/name").mkdir(parents=True)
    assert hub.repository("org/name") is None
    assert resolve("org/name") == Path("org/name")


def test_a_revision_is_looked_up_in_the_cache(cache: Path, teacher: Path):
    first, second = fill(cache, "org/tiny", teacher, A, "v1"), fill(cache, "org/tiny", teacher, B)
    for path, found in (("", second), ("@main", second), ("@v1", first), (f"@{A}", first)):
        assert resolve(f"org/tiny{path}") == found
    assert hub.pinned("org/tiny@v1") == f"org/tiny@{A}"
    assert hub.pinned("org/tiny@v2") == "org/tiny@v2"
    assert hub.cached(hub.Repository("org/tiny", "v2")) is None
    (cache / "models--org--tiny" / "refs" / "main").write_text("")  # a writer that was killed
    assert hub.cached(hub.Repository("org/tiny")) is None


def test_its_network_is_that_of_the_folder(cache: Path, teacher: Path):
    fill(cache, "org/tiny", teacher)
    ours, theirs = load_denoiser("org/tiny"), load_denoiser(str(teacher))
    x, t, label = torch.ones(2, 1, 8, 8), torch.ones(2), torch.tensor([1, 7])
    assert torch.equal(ours(x, t, label).x0, theirs(x, t, label).x0)
    part = DiffusersTeacher(path="org/tiny", revision=A)
    assert {f.name for f in part.files()} == {f.name for f in DiffusersTeacher(path=str(teacher)).files()}


def test_what_is_not_there_is_told_with_the_download(cache: Path, teacher: Path):
    with pytest.raises(Absent) as caught:
        read_folder("org/tiny")
    assert str(caught.value) == (
        "teacher org/tiny: no such folder, and not in the Hugging Face cache at revision main; if that is a hub's name, "
        "fetch it with `hf download org/tiny --revision main`, or add --download to `fewstep run`, `plan` or "
        "`recipes check`"
    )
    with pytest.raises(Absent, match="`hf download org/tiny --revision v2`"):
        load_denoiser(DiffusersTeacher(path="org/tiny", revision="v2").folder)
    Path("org").mkdir()  # a folder's name that was mistyped
    with pytest.raises(Absent, match="no such folder; give the path"):
        read_folder("org/tiny")


@pytest.mark.parametrize("lacking", ["unet/*.safetensors", "scheduler/*", "unet/config.json"])
def test_a_repository_that_is_there_in_part_is_told_with_the_download(cache: Path, teacher: Path, lacking: str):
    for link in fill(cache, "org/tiny", teacher).glob(lacking):
        link.unlink()
    with pytest.raises(UserError, match=f"; fetch the rest with `hf download org/tiny --revision {A}`$"):
        load_denoiser("org/tiny")


@pytest.mark.parametrize(
    ("path", "revision", "told"),
    [
        ("runs/a/export", "v1", "is of a hub's repository"),
        ("assets:digits-teacher", "v1", "is of a hub's repository"),
        ("org/name@v1", "v2", "expected one branch, tag or commit"),
        ("org/name", "a b", "expected one branch, tag or commit"),
    ],
)
def test_a_revision_is_of_a_repository(path: str, revision: str, told: str):
    with pytest.raises(ValueError, match=told):
        DiffusersTeacher(path=path, revision=revision)


def test_what_is_read_is_fetched_and_no_more(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    files = {p.relative_to(teacher).as_posix(): p.read_bytes() for p in teacher.rglob("*") if p.is_file()}
    more = dict.fromkeys(["unet/model.bin", "unet/model.fp16.safetensors", "whole.safetensors", "unet/model.onnx"], b"no")
    with served(monkeypatch, tmp_path / "cache") as there:
        there.files["org/tiny"] = files | more
        made = hub.fetch(hub.Repository("org/tiny"), configs=True)
        assert made.name == B
        assert not list(made.rglob("*.safetensors"))
        there.asked.clear()
        with pytest.raises(UserError, match=r"has no \.safetensors file; fetch the rest"):
            load_denoiser("org/tiny")
        assert there.asked == []
        assert hub.fetch(hub.Repository("org/tiny")) == made
        read = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
        assert read == {k: v for k, v in files.items() if not k.startswith(".")}
        there.asked.clear()
        assert load_denoiser("org/tiny").net.classes == 11
        assert there.asked == []
        there.deny = 503  # what is there serves where the hub does not
        assert hub.fetch(hub.Repository("org/tiny")) == made


@pytest.mark.parametrize(
    ("deny", "told"),
    [
        (0, "the hub has no repository of this name, or a private one: check the name, then log in with `hf auth login`"),
        (403, "the hub answered with 403: log in with `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_a_refusal_is_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deny: int, told: str):
    monkeypatch.chdir(tmp_path)
    with served(monkeypatch, tmp_path / "cache") as there:
        there.deny = deny
        with pytest.raises(UserError) as caught:
            hub.fetch(hub.Repository("org/tiny"))
    assert str(caught.value).startswith(f"org/tiny: cannot be fetched: {told}")
    assert str(caught.value).endswith("; once it can be: `hf download org/tiny --revision main`")
    assert "\n" not in str(caught.value)


def test_without_a_network_it_says_so(cache: Path):
    with pytest.raises(UserError, match=r"org/tiny@v1: cannot be fetched: HF_HUB_OFFLINE is set; .* --revision v1`$"):
        hub.fetch(hub.Repository("org/tiny", "v1"))
