"""The documentation: built with warnings as errors, and its commands run on tiny folders of the classes that it names."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_new import make_pictures, stand_in_for_text
from tiny_pipelines import FAMILIES, make_pipeline

from fewstep.cli import main
from fewstep.commands.new_pipeline import look

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TINY = ("train.steps=1", "train.batch=2", "train.accumulate=1", "train.precision=fp32")


def commands(page: str) -> list[list[str]]:
    """The `fewstep` lines of a page's blocks for the shell, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["fewstep"]]


def test_the_site_is_built_without_a_warning(tmp_path: Path):
    """In a process of its own: hooks register parts, and warnings of other tests would count."""
    links = tmp_path / "links" / "fewstep"
    links.mkdir(parents=True)
    for path in [*(ROOT / "fewstep").iterdir(), *(ROOT / name for name in ("kernels", "eval", "recipes", "assets"))]:
        (links / path.name).symlink_to(path)
    settings = (ROOT / "mkdocs.yml").read_text().replace("paths: [.typing]", f"paths: [{tmp_path / 'links'}]")
    settings = settings.replace("docs_dir: docs", f"docs_dir: {DOCS}").replace("hooks: [docs/", f"hooks: [{DOCS}/")
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    site = tmp_path / "site"
    for page, words in {
        "reference/recipe": "ema_warmup",
        "reference/methods": "phased_dmd",
        "reference/commands": "fewstep check-teacher",
        "reference/python": "fewstep.open_product",
        "evaluate": "The error bar",
        "method": "Its card",
    }.items():
        assert words in (site / page / "index.html").read_text(), page
    pages = list(site.rglob("*.html"))
    outside = [u for p in pages for u in re.findall(r'(?:src|href)="(https?://[^"]+)"', p.read_text()) if is_loaded(u)]
    assert outside == []


def test_memory_is_known_of_every_family_that_the_page_names():
    rows = json.loads((DOCS / "plans.json").read_text())["rows"]
    title = (DOCS / "pipelines.md").read_text().partition("\n")[0].removeprefix("# Distil ")
    assert {r["family"].partition(" ")[0] for r in rows} == set(title.split(", ")) - {"Flux"}  # the page says so
    assert all(r["gib"] > 1 for r in rows)


def is_loaded(url: str) -> bool:
    """Whether a page would fetch it, which links to papers and tools do not."""
    return url.endswith((".css", ".js", ".woff2", ".png", ".svg"))


@pytest.mark.parametrize(
    "name", ["sd15", *(pytest.param(name, marks=pytest.mark.long) for name in ("sdxl", "sd3", "flux"))]
)
def test_the_way_through_a_pipeline_is_walked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every command of docs/pipelines.md, in order, on a tiny folder of that family; sizes and lengths are made small."""
    folder = make_pipeline(tmp_path / "TEACHER", name)
    stand_in_for_text(monkeypatch, look(str(folder)).wrapper)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    Path("prompts.txt").write_text("a red fox in the snow\ntwo green dots\n")
    shape = f"data.shape={list(FAMILIES[name].shape)}"
    more = {"run": [shape, *TINY], "recipes": [shape], "plan": [shape, *TINY], "check-teacher": ["--size", "8x8"]}
    walked = commands("pipelines.md")
    assert [words[0] for words in walked] == [
        "check-teacher", "new", "recipes", "plan", "cache-text", "run", "report", "sample", "export",
    ]  # fmt: skip
    for words in walked:
        with pytest.raises(SystemExit) as caught:
            main([*words, *more.get(words[0], [])])
        assert not caught.value.code, words
    assert Path("runs/mine/export/model_index.json").is_file()
    assert Path("runs/mine/report/run.html").is_file()
    assert Path("grid.png").is_file()


def test_commands_of_the_first_page_stand_in_the_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each is parsed with its options; tests/commands/test_first_job.py walks them."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "photos", 4)
    walked = commands("index.md")
    assert [words[0] for words in walked][:4] == ["new", "run", "run", "eval"]
    with pytest.raises(SystemExit) as caught:
        main(walked[0])
    assert not caught.value.code
    assert {p.name for p in tmp_path.glob("*.yaml")} == {"mine.yaml", "mine-teacher.yaml"}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_every_command_that_a_page_shows_exists(page: Path):
    import typer

    from fewstep.cli.app import app

    known = typer.main.get_command(app)
    for words in commands(page.name):
        command, rest = known, words
        while hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in rest if w.startswith("--")} <= options, words
