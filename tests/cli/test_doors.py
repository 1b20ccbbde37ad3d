"""Everything that can be run has a door: versions, benchmarks, references, hub ids that are told from folders."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from calling import called
from PIL import Image
from tiny_hub import offline

from fewstep.cli import app
from fewstep.cli.app import method_names, recipe_names
from fewstep.cli.measure import bench_names
from fewstep.commands import bench
from fewstep.commands.request import Request
from fewstep.files import commit

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    return partial(called, capfd)


def test_versions(call: Call):
    code, out, _ = call("--version")
    assert code == 0
    assert out.splitlines()[0].endswith(f"(commit {commit()[:12]})")
    assert f"torch {version('torch')}" in out.splitlines()
    assert f"diffusers {version('diffusers')}" in out.splitlines()


def test_commands_stand_in_groups():
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    groups = {name: c.rich_help_panel for name, c in commands.items()}
    assert set(groups.values()) == {"Train", "Look", "Measure", "Ship", "Data"}
    assert {"gallery", "train-retrieval", "make-reference", "bench"} <= set(groups)


def test_every_argument_and_option_has_help():
    def walk(command: Any, path: str) -> None:
        for parameter in command.params:
            assert parameter.help, f"{path} {parameter.name}"
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}")

    walk(typer.main.get_command(app), "fewstep")


def test_options_of_eval_stand_in_panels(call: Call):
    _, out, _ = call("eval", "--help")
    assert all(panel in out for panel in set(Request.PANELS.values()))


def test_names_are_completed():
    assert "digits-dmd2" in recipe_names("digits-")
    assert all(n.startswith("toy/d") for n in recipe_names("toy/d"))
    assert {"dmd", "dmd2"} <= set(method_names("dm"))
    assert "lcm" in method_names("lc")
    assert bench_names("tr") == ["trainer"]


def test_a_bench_runs_in_a_process_of_its_own(call: Call, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        seen.append(command[1:])
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert call("bench")[1].split() == bench.benches()
    assert call("bench", "trainer", "--", "--help", "x")[0] == 5
    assert seen == [["-m", "fewstep.bench.trainer", "--help", "x"]]
    code, _, err = call("bench", "trainers")
    assert code == 2
    assert err.startswith("error: bench 'trainers': unknown; did you mean 'trainer'?")


def test_a_reference_is_made_by_a_command(call: Call, tmp_path: Path):
    (tmp_path / "real").mkdir()
    for i in range(5):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntitle: mine\nnumber: 5\nsize: 8\nchannels: 1\nconditions: {kind: none}\nquantiser: round\n"
        "chain: []\nextractor: random-conv-0\nmetrics: [fd]\nreference: {kind: file, name: mine.npz, images: 5, file: "
        "{name: mine.npz, licence: mine, source: mine}}\n"
    )
    preset, out = tmp_path / "mine.yaml", tmp_path / "mine.npz"
    code, told, err = call("make-reference", tmp_path / "real", "--preset", preset, "--out", out)
    assert (code, told) == (0, f"{out}: statistics of 5 images\n"), err
    code, _, err = call("make-reference", tmp_path / "none", "--preset", preset)
    assert code == 2
    assert err.startswith("error: ")


@pytest.mark.parametrize("setting", ["teacher.path", "data.vae", "data.encoder.path"])
def test_an_id_of_a_hub_is_told_with_the_download(
    call: Call, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    offline(monkeypatch, tmp_path)
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    code, _, err = call("recipes", "check", "paper/dmd2-sdxl-4step-lora", f"{setting}={name}")
    assert code == 2
    assert err.startswith(
        f"error: {setting} {name}: no such folder, and not in the Hugging Face cache at revision main; "
    )
    assert f"`hf download {name} --revision main`" in err
    assert err.count("\n") == 1
    assert "digits" not in err
