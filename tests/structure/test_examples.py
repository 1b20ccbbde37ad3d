"""The Python way: every public name has an example that runs, and so do the scripts beside the recipes."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from python_runs import make_runs

import fewstep
from fewstep.config import REGISTRY, parts

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in fewstep.__all__ if name != "__version__"]


def examples(name: str) -> list[doctest.DocTest]:
    """The examples of a public name, and of its methods."""
    value: Any = getattr(fewstep, name)
    globs = {"fewstep": fewstep, "torch": torch, "__name__": "__main__"}
    found = doctest.DocTestFinder(exclude_empty=True).find(value, name, globs=globs)
    return [test for test in found if test.examples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: runs/ring and runs/digits are runs of one update."""
    return make_runs(tmp_path_factory.mktemp("python"))


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That folder; parts that an example registers go with it."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEWSTEP_CACHE", str(folder / "cache"))
    before = {kind: set(named) for kind, named in REGISTRY.items()}
    yield folder
    for kind, named in REGISTRY.items():
        if new := set(named) - before.get(kind, set()):
            for name in new:
                del named[name]
            parts._take_in(kind)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_in_its_own_docstring(name: str):
    value = getattr(fewstep, name)
    assert ">>> " in (value.__doc__ or ""), f"fewstep.{name}: its docstring has no example; add one"
    assert f"fewstep.{name}" in value.__doc__ or inspect.isclass(value), f"fewstep.{name}: its example does not call it"


@pytest.mark.parametrize("name", NAMES)
def test_an_example_needs_no_other_import(name: str):
    """What it takes of `fewstep` is public: a module would be there only because a test imported it before."""
    code = "".join(example.source for test in examples(name) for example in test.examples)
    assert set(re.findall(r"\bfewstep\.(\w+)", code)) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_does_what_it_shows(name: str, here: Path):
    for test in examples(name):
        told: list[str] = []
        with torch.random.fork_rng(devices=[]):
            doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
        assert not told, f"{test.name}\n{''.join(told)}"


SCRIPTS = {
    "train_in_python": lambda found: found["student"].done == 100 and (found["trainer"].run / "recipe.yaml").is_file(),
    "dmd_gradient_in_your_loop": lambda found: len(found["norms"]) == 3 and min(found["norms"]) > 0,
    "your_own_method": lambda found: 0 < found["trainer"].last_record["regress"] < 1,
    "your_own_teacher": lambda found: found["student"].draw(3).isfinite().all(),
}


def test_every_script_is_run_and_shown():
    names = {p.stem for p in (ROOT / "recipes" / "python").glob("*.py")} - {"__init__"}
    assert names == set(SCRIPTS)
    shown = (ROOT / "recipes" / "README.md").read_text()
    assert [name for name in names if f"python/{name}.py" not in shown] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_it_stands(name: str, here: Path):
    path = ROOT / "recipes" / "python" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 40
    with torch.random.fork_rng(devices=[]):
        assert SCRIPTS[name](runpy.run_path(str(path), run_name="__main__"))


def test_the_front_page_runs(here: Path):
    """Its Python lines, with a recipe of one update in place of theirs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [b for b in blocks if "import fewstep" in b]
    tiny = 'fewstep.load("toy/dmd2", before=[], copy={}, train={"steps": 1, "batch": 8})'
    code, changed = re.subn(r"fewstep\.load\(.*\)", tiny, code)
    assert changed == 1
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "README.md", "exec"), {})
