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
    where = tmp_path_factory.mktemp("python")
    tiny: dict[str, Any] = {"steps": 1, "batch": 8, "ema": []}
    ring = fewstep.load("toy/dmd2", before=[], copy={}, train=tiny)
    no_gan = ["method.gan=null", "discriminator=null", "method.critic.steps=1", "optim={default: {lr: 1e-4}}"]
    digits = fewstep.load("digits-dmd2", no_gan, train=tiny)
    for name, recipe in (("ring", ring), ("digits", digits)):
        fewstep.Trainer(recipe, where / "runs" / name, cpu=True).fit()
    return where


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


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda: fewstep.load(3), TypeError, "name: expected a recipe's name or path, not a int"),
        (lambda: fewstep.load("toy/dmd2", "train.steps=3"), TypeError, "settings: expected a mapping or a list"),
        (lambda: fewstep.load("toy/dmd2", ["train"]), fewstep.RecipeError, "argument 'train': expected key=value"),
        (
            lambda: fewstep.load("toy/dmd2", {"train.steps": torch.ones(1)}),
            fewstep.RecipeError,
            "argument 'train.steps': a",
        ),
        (
            lambda: fewstep.load("toy/dmd2", train={"clip": float("nan")}),
            fewstep.RecipeError,
            "argument 'train': nan is no",
        ),
        (lambda: fewstep.load("toy/dmd2", {3: 1}), fewstep.RecipeError, "argument 3: expected a recipe's key"),
        (
            lambda: fewstep.load("toy/dmd2", {"train.steps.x": 1}),
            fewstep.RecipeError,
            "'train.steps.x': train.steps has no",
        ),
        (lambda: fewstep.load("toy/dmd2", {"before.7.steps": 1}), fewstep.RecipeError, "argument 'before.7.steps'"),
        (lambda: fewstep.Trainer("toy/dmd2"), TypeError, "recipe: expected a Recipe"),
        (lambda: fewstep.open_product(3), TypeError, "path: expected a run directory"),
        (lambda: fewstep.load_denoiser("assets:digits-teacher", dtype="half"), fewstep.UserError, "dtype 'half' is not"),
        (lambda: ring().draw(0), fewstep.UserError, "count must be at least 1, not 0"),
        (lambda: ring().draw(2, labels=1), fewstep.UserError, "labels: ring is of no classes"),
        (lambda: ring().draw(2, prompts=["a cat"]), fewstep.UserError, "prompts: ring was not trained on text"),
        (lambda: ring().with_steps(0), fewstep.UserError, "steps must be at least 1, not 0"),
        (lambda: ring().evaluate("pictures", metric="energy"), fewstep.UserError, "against: is of metric fd"),
        (lambda: ring().evaluate("pictures"), fewstep.UserError, "against: is for pictures; these samples are [2]"),
        (lambda: ring().evaluate(samples=1), fewstep.UserError, "samples"),
        (lambda: ring().evaluate(metric="fid"), fewstep.UserError, "metric 'fid' is no preset"),
        (lambda: ring().evaluate(features="vgg"), fewstep.UserError, "features 'vgg' is not one of"),
        (lambda: ring().export("out"), fewstep.UserError, "ring: not exported"),
        (lambda: teacher().evaluate("data"), fewstep.UserError, "against: only a run knows its own data"),
        (lambda: teacher().evaluate(), fewstep.UserError, "against: nothing says how to measure digits-teacher"),
        (lambda: teacher().draw(2, labels=[1, 2, 3]), fewstep.UserError, "labels: expected a class or 2 of them"),
        (lambda: teacher().draw(2, labels=0.5), fewstep.UserError, "labels: expected a class or 2 of them"),
        (lambda: teacher().export("out"), fewstep.UserError, "not exported: digits-teacher is not a run of fewstep"),
    ],
)
def test_a_mistake_is_told_by_its_argument(call: Any, kind: type[Exception], told: str, here: Path):
    with pytest.raises(kind) as caught:
        call()
    assert told in str(caught.value)


def ring() -> fewstep.Product:
    return fewstep.open_product("runs/ring")


def teacher() -> fewstep.Product:
    return fewstep.open_product("assets:digits-teacher")


def test_python_values_and_text_make_the_same_recipe():
    text = ["method.times={name: lognormal, mean: -1.0, std: 1.0}", "train.steps=3", "before.0.steps=7", "evaluate=null"]
    values: dict[str, Any] = {
        "method": {"times": {"name": "lognormal", "mean": -1.0, "std": 1.0}},
        "train": {"steps": 3},
        "before.0.steps": 7,
        "evaluate": None,
    }
    assert fewstep.load("toy/dmd2", values) == fewstep.load("toy/dmd2", text)
    part = fewstep.load("toy/dmd2", text).method.times
    assert fewstep.load("toy/dmd2", {**values, "method.times": part}) == fewstep.load("toy/dmd2", text)


def test_a_trainer_is_opened_as_it_stands(here: Path):
    trainer = fewstep.Trainer(fewstep.load("toy/dmd2", before=[], copy={}, train={"steps": 1, "batch": 8}), cpu=True)
    before = fewstep.open_product(trainer).draw(3)
    trainer.fit()
    assert not fewstep.open_product(trainer).draw(3).equal(before)
