"""The page of a run: one file that needs no other, true to the log, written also of what is damaged or hostile."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from fewstep.cli.app import app
from fewstep.commands.claim import write_origin
from fewstep.commands.run_page import GRIDS, SIDE, follow, write_page
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.files import locked
from fewstep.recipe.store import dump, load

SETTINGS = ["train.steps=300", "before.0.steps=100"]
HOSTILE = '<script>alert(1)</script> & "<img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def records(count: int, **series: Any) -> list[dict[str, Any]]:
    made = {"dsm": lambda p: 0.5 - 0.1 * p, "lr/student": lambda p: 1e-3, "grad_norm/student": lambda p: 1.0, **series}
    return [
        {"done": 10 * i, "stage": 1, "skips": 0, **{k: f(i / count) for k, f in made.items()}}
        for i in range(1, count + 1)
    ]


def evaluation(name: str, value: float) -> dict[str, Any]:
    return Evaluation(
        name=name,
        preset="energy",
        preset_hash="0" * 12,
        extractor="none",
        number=64,
        metrics={"energy distance": {"value": value, "standard_error": 0.1}},
        reference="8 gaussians",
    ).as_json()


def a_run(folder: Path, log: list[dict[str, Any]], about: str = "a run") -> Path:
    """A run directory as `fewstep run toy/dmd2` leaves it, with this log."""
    run = folder / "run"
    (run / "samples").mkdir(parents=True)
    (run / "report").mkdir()
    (run / "recipe.yaml").write_text(dump(load("toy/dmd2", [*SETTINGS, f"about={json.dumps(about)}"])))
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    for step in range(10, 10 * (GRIDS + 9), 10):
        Image.new("RGB", (40, 30), (step % 256, 0, 0)).save(run / "samples" / f"step-{step:06d}.png")
    Image.new("L", (3000, 600)).save(run / "report" / "side-by-side.png")
    rows = [evaluation("student, 1 step", 0.25), evaluation("teacher, 1 step", 0.5)]
    (run / "report" / "results.json").write_text(json.dumps({"rows": rows}))
    write_origin(run, {"recipe": "toy/dmd2", "settings": SETTINGS, "environment": {"torch": "9.9"}})
    return run


def read(run: Path) -> Page:
    return Page((run / "report" / "run.html").read_text())


def pictures(page: Page) -> list[Image.Image]:
    found = []
    for tag, attributes in page.tags:
        if tag == "img":
            head, _, data = str(attributes["src"]).partition("base64,")
            assert head.startswith("data:image/")
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            image.load()
            found.append(image)
    return found


def test_a_page_is_one_file_and_tells_what_the_run_directory_holds(tmp_path: Path):
    log = records(40, **{"health/contrast": lambda p: 1 + 0.6 * p})
    log[10]["evaluation"] = log[30]["evaluation"] = {"energy distance": {"value": 0.75, "standard_error": 0.1}}
    log.append({"done": 400, "note": "the data are others"})
    run = a_run(tmp_path, log)
    assert write_page(run) == (run / "report" / "run.html", False)
    page = read(run)
    assert page.open == []
    outside = [a for tag, a in page.tags if tag in ("script", "link", "iframe", "object") or "href" in a]
    assert outside == []
    assert not [a for _, a in page.tags if not str(a.get("src", "data:")).startswith("data:")]
    shown = pictures(page)
    grids = [i for i in shown if i.size == (40, 30)]
    assert len(grids) == GRIDS
    assert [i.getpixel((0, 0))[0] for i in (grids[0], grids[-1])] == [10, 10 * (GRIDS + 8) % 256]  # first and last
    assert max(i.width for i in shown if i.format == "JPEG") == 2 * SIDE
    text = page.text
    assert "trained: step 400 of 400" in text
    assert "ALARM oversaturated" in text
    assert "since step 260" in text  # records 22 to 26 are the last fifth there: 1 + .6 * 24 / 40 > 1.35
    assert "lower method.guidance" in text
    assert "0.25 ± 0.1" in text
    assert text.count("0.75 ± 0.1") == 2
    assert "step 400: the data are others" in text
    assert "differs from it in 3 keys" in text  # SETTINGS and about
    assert "-> 300" in text
    assert "torch 9.9" in text
    assert "--resume" not in text


def test_a_page_follows_a_run_while_it_trains(tmp_path: Path):
    run = a_run(tmp_path, records(4))
    said: list[str] = []
    with locked(run, "is being trained in"):
        assert write_page(run, 30)[1]
        page = read(run)
        assert ("meta", {"http-equiv": "refresh", "content": "30"}) in page.tags
        assert "training: step 40 of 400" in page.text
        assert "Nothing is judged yet" in page.text
    follow(run, 1, said.append)
    assert "is not being trained" in said[0]
    page = read(run)
    assert not [a for tag, a in page.tags if a.get("http-equiv")]
    assert "stopped: step 40 of 400" in page.text
    assert f"fewstep run toy/dmd2 train.steps=300 before.0.steps=100 --out {run} --resume" in page.text


def test_a_page_is_written_of_a_run_that_has_only_begun(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump(load("toy/dmd2")))
    write_page(run)
    text = read(run).text
    assert "stopped: step 0 of" in text
    assert "No record yet" in text
    assert "is not recorded" in text


def test_what_is_damaged_or_hostile_is_said_and_not_run(tmp_path: Path):
    log = records(12, **{HOSTILE: lambda p: 1.0})
    log += [{"done": 120, "note": HOSTILE}, {"done": 120, "evaluation": {HOSTILE: "?"}}]
    run = a_run(tmp_path, log, about=HOSTILE)
    first, second = run / "samples" / "step-000010.png", run / "report" / "results.json"
    first.write_bytes(first.read_bytes()[:40])
    second.write_text("[1")
    write_origin(run, {"recipe": f"{HOSTILE}.yaml", "environment": "x"})
    write_page(run)
    page = read(run)
    assert not [tag for tag, a in page.tags if tag == "script" or "onerror" in a]
    assert page.text.count("alert(1)") > 4
    assert "step-000010.png: cannot be shown" in page.text
    assert "results.json" in page.text
    assert "cannot be read now" in page.text
    assert len(pictures(page)) > GRIDS
    (run / "origin.json").write_text("{")
    write_page(run)
    assert "is not recorded" in read(run).text


def test_the_command_writes_it_and_refuses_what_is_no_run(tmp_path: Path):
    run = a_run(tmp_path, records(12))
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0
    assert str(run / "report" / "run.html") in done.output.replace("\n", "")
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        write_page(tmp_path)


def test_a_browser_shows_it(tmp_path: Path):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to look with: none of {', '.join(names)} is installed")
    run, shot = a_run(tmp_path, records(40)), tmp_path / "page.png"
    write_page(run)
    page = (run / "report" / "run.html").as_uri()
    head = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000"]
    subprocess.run([*head, f"--screenshot={shot}", page], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        assert len(image.convert("L").getcolors(256) or []) > 20
