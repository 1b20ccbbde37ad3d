"""The READMEs: short at the front, tables as their data say, links that lead somewhere, names that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fewstep.bench.readme import fill, tables

ROOT = Path(__file__).resolve().parents[2]
READMES = [p for top in ("fewstep", "kernels", "eval", "recipes", "assets") for p in (ROOT / top).rglob("README.md")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *READMES]


@pytest.mark.parametrize(("name", "blocks"), tables().items())
def test_generated_tables_are_what_the_data_say(name: str, blocks: dict[str, str]):
    text = (ROOT / name).read_text()
    for block, made in blocks.items():
        assert fill(text, block, made) == text, f"{name}: {block}; run python -m fewstep.bench.readme"


def test_the_front_page_is_two_screens_at_most():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_that_are_named_exist(page: Path):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:fewstep|eval|kernels|tests|recipes|assets)/[a-z0-9_/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`?python -m (fewstep[\w.]*)", text):
        path = module.removeprefix("fewstep").strip(".").replace(".", "/")
        homes = (ROOT / "fewstep" / path, ROOT / path)
        assert any(h.with_suffix(".py").is_file() or (h / "__main__.py").is_file() for h in homes), module


def test_every_room_stands_in_the_house_readme():
    text = (ROOT / "fewstep" / "README.md").read_text()
    for path in (ROOT / "fewstep").iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            assert re.search(rf"\b{path.name}\b", text.split("```")[1]), path.name
