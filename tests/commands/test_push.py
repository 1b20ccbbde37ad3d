"""An export goes to a hub: a server on the loopback address that answers as one. The real hub is never contacted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import called
from safetensors.torch import save_file
from tiny_hub import offline, served

from fewstep.commands import push
from fewstep.export.base import Parts, write_checked
from fewstep.files import write_mark

Call = Callable[..., tuple[int, str, str]]
TOKEN = "hf_neverShownAnywhere"
FRONT = "library_name: diffusers\ntags: [fewstep]\n"
STUDENT = f"{FRONT}pipeline_tag: text-to-image\nlicense: apache-2.0\nbase_model: org/base\n"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch, tmp_path / "cache")
    return partial(called, capfd)


def export(folder: Path, front: str = STUDENT) -> Path:
    """A folder by the way every export is written, with one tensor for weights."""

    def save(to: Path) -> None:
        (to / "unet").mkdir()
        save_file({"w": torch.ones(3)}, to / "unet" / "diffusion_pytorch_model.safetensors")
        (to / "model_index.json").write_text("{}")

    card: Any = lambda usage, parity, rows: f"---\n{front}---\n# Card\n"  # noqa: E731
    write_checked(Parts(usage=str, card=card, note=("fewstep.json", "{}"), save=save), folder)
    return folder


def test_what_fewstep_wrote_is_uploaded(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = export(tmp_path / "made")
    (made / "diary.txt").write_text("mine")
    (made / "README.md").write_text((made / "README.md").read_text() + "my words\n")
    weights = "unet/diffusion_pytorch_model.safetensors"
    files = ["README.md", "fewstep.json", "model_index.json", weights]
    with served(monkeypatch, tmp_path / "cache") as there:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        code, out, err = call("push", made, "org/mine")
        assert code == 0, err
        assert there.commits == [("org/mine", "main", "Upload of fewstep 0.1.0", files)]
        assert there.files["org/mine"] == {f: (made / f).read_bytes() for f in files}
        assert "visibility" not in there.made[0]
        lines = out.splitlines()
        assert lines[-1] == f"uploaded: {there.url}/org/mine"
        assert lines[-2].startswith(f"{len(files)} files, ")
        assert f"{weights}  {(made / weights).stat().st_size} B" in lines
        assert "left here: diary.txt, which fewstep did not write" in lines
        assert all(there.tokens[f"POST api/{path}"] == TOKEN for path in ("repos/create", "models/org/mine/commit/main"))
        assert TOKEN not in out + err


def test_a_private_branch_with_a_message(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = export(tmp_path / "made", FRONT)  # of a teacher of one's own
    with served(monkeypatch, tmp_path / "cache") as there:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        told = ("push", made, "org/mine", "--private", "--revision", "v1", "--message", "first")
        code, out, err = call(*told)
        assert code == 0, err
        assert there.made[0]["visibility"] == "private"
        assert there.branches == ["v1"]
        assert there.commits[0][:3] == ("org/mine", "v1", "first")
        assert out.splitlines()[-1] == f"uploaded: {there.url}/org/mine/tree/v1"
        there.public = True
        code, _, err = call(*told)
        assert code == 2
        assert err == "error: org/mine: is there and public, which --private does not change; choose another name\n"
        assert len(there.commits) == 1


def test_a_dry_run_sends_nothing_and_needs_no_token(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = export(tmp_path / "made")
    code, out, err = call("push", made, "org/mine", "--dry-run")
    assert code == 0, err
    assert out.splitlines()[-1] == "nothing was uploaded (--dry-run)"
    assert "README.md" in out
    with served(monkeypatch, tmp_path / "cache") as there:
        assert call("push", made, "org/mine", "--dry-run")[1] == out
        assert there.asked == []


@pytest.mark.parametrize(
    ("token", "deny", "told"),
    [
        (None, 0, "push: there is no token: log in with `hf auth login`, or set HF_TOKEN, to one that may write"),
        (TOKEN, 403, "org/mine: not uploaded: the hub answered with 403: log in with `hf auth login`, or set HF_TOKEN"),
        (TOKEN, 500, "org/mine: not uploaded: the hub answered with 500"),
        (TOKEN + "\x0bx", 0, "org/mine: not uploaded: "),  # no header may hold it, and the error does
    ],
)
def test_a_refusal_is_one_line_without_the_token(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, deny: int, told: str
):
    made = export(tmp_path / "made")
    with served(monkeypatch, tmp_path / "cache") as there:
        there.deny = deny
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        code, out, err = call("push", made, "org/mine")
    assert code == 2
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1
    assert TOKEN not in out + err
    assert there.commits == []


def test_offline_it_says_so(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "HF_HUB_OFFLINE is set" in call("push", export(tmp_path / "made"), "org/mine")[2]


@pytest.mark.parametrize("name", ["mine", "org/mine@v1", "a/b/c", "https://huggingface.co/org/mine", "org/a--b"])
def test_a_name_is_org_and_name(call: Call, tmp_path: Path, name: str):
    code, _, err = call("push", export(tmp_path / "made"), name)
    told = "expected org/name, the repository's name on the hub; a branch goes into --revision"
    assert (code, err) == (2, f"error: {name}: {told}\n")


def test_only_an_export_is_pushed(call: Call, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text(f"---\n{STUDENT}---\n")
    told = "write one with `fewstep export RUN --out FOLDER`, and push that folder\n"
    assert call("push", "mine", "org/mine")[2] == f"error: mine: is no export of fewstep; {told}"
    run = tmp_path / "run"
    run.mkdir()
    write_mark(run, "run directory")
    begin = "error: run: is a run directory that fewstep made and no export; "
    assert call("push", "run", "org/mine")[2] == begin + told
    export(run / "export")
    assert call("push", "run", "org/mine")[2] == begin + "push run/export\n"


def test_an_export_in_pieces_is_refused(call: Call, tmp_path: Path):
    made = export(tmp_path / "made")
    weights = made / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert "unet/diffusion_pytorch_model.safetensors is truncated" in call("push", made, "org/mine")[2]
    weights.unlink()
    assert "is missing or a link, and the export had it" in call("push", made, "org/mine")[2]
    (tmp_path / "elsewhere").write_bytes(whole)
    weights.symlink_to(tmp_path / "elsewhere")
    assert "is missing or a link, and the export had it" in call("push", made, "org/mine")[2]


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (f"---\n{FRONT}pipeline_tag: text-to-image\n---\n", "its front matter lacks license and base_model, which"),
        (f"---\n{FRONT}license: mit\n---\n", "its front matter lacks base_model, which"),
        (f"---\n{FRONT}base_model: org/base\nlicense:\n---\n", "its front matter lacks license, which"),
        ("# Card\n", "has no front matter"),
        ("---\nlicense: mit\n", "has no front matter"),
        ("---\n- a\n---\n", "not keys and values"),
        ("---\na: [\n---\n", "is no YAML"),
    ],
)
def test_a_card_names_licence_and_base(call: Call, tmp_path: Path, card: str, told: str):
    made = export(tmp_path / "made")
    (made / "README.md").write_text(card)
    code, _, err = call("push", made, "org/mine", "--dry-run")
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


def test_sizes():
    told = [push.in_words(n) for n in (0, 999, 1000, 12_345_678, 4 * 10**12)]
    assert told == ["0 B", "999 B", "1 kB", "12.3 MB", "4000 GB"]
