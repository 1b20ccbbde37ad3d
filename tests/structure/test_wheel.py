"""What a wheel holds, and that every module exists once, however it is reached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from tiny_runs import environment, python

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("kernels", "eval", "recipes", "assets")


def code_folders(root: Path) -> dict[str, Path]:
    """Package name -> folder, for every folder with an __init__.py."""
    found = {}
    for top in ("fewstep", *MAPPED):
        for init in (root / top).rglob("__init__.py"):
            parts = init.parent.relative_to(root).parts
            found[".".join(parts if top == "fewstep" else ("fewstep", *parts))] = init.parent
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the checkout stays clean; with compiled leftovers, as a used checkout has them."""
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    for name in ("fewstep", *MAPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        (source / name / "__pycache__").mkdir()
        (source / name / "__pycache__" / "left.cpython-311.pyc").write_bytes(b"left over")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = source.parent / "out"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", str(target), str(source)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_every_code_folder_is_listed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(code_folders(ROOT))
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {
        "fewstep": "fewstep",
        **{f"fewstep.{name}": name for name in MAPPED},
    }
    # A folder of modules without __init__.py would be left out in silence.
    for top in ("fewstep", *MAPPED):
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module.relative_to(ROOT)


def test_only_fewstep_lands_in_site_packages(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"fewstep", f"fewstep-{PROJECT['project']['version']}.dist-info"}


def test_the_wheel_holds_every_module_recipe_preset_and_asset_and_no_leftovers(wheel: zipfile.ZipFile):
    held = set(wheel.namelist())
    wanted = {"fewstep/py.typed"}
    for package, folder in code_folders(ROOT).items():
        wanted |= {f"{package.replace('.', '/')}/{p.name}" for p in folder.glob("*.py")}
    data = (("recipes", "*.yaml"), ("eval/presets", "*.yaml"), ("fewstep", "*.yaml"), ("assets", "*"))
    for folder, pattern in data:
        files = [p for p in (ROOT / folder).rglob(pattern) if p.is_file() and "__pycache__" not in p.parts]
        assert files or folder == "fewstep", folder
        wanted |= {f"fewstep/{p.relative_to(ROOT).as_posix()}".replace("fewstep/fewstep/", "fewstep/") for p in files}
    assert wanted - held == set()
    assert {"fewstep/recipes/toy/dmd2.yaml", "fewstep/assets/house-digits/model.safetensors"} <= held
    assert [name for name in held if "__pycache__" in name or name.endswith(".pyc")] == []
    assert [name for name in held if name.startswith("fewstep/tests")] == []


def test_the_unpacked_wheel_finds_its_own_recipes_and_assets(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import fewstep.recipe.store, fewstep.eval, fewstep.kernels\n"
        "from fewstep.networks.diffusers import resolve\n"
        "for m in (fewstep, fewstep.eval, fewstep.kernels):\n"
        "    assert m.__file__.startswith(sys.argv[1]), m.__file__\n"
        "names = fewstep.recipe.source.shipped()\n"
        "assert all(str(p).startswith(sys.argv[1]) for p in names.values())\n"
        "assert resolve('assets:house-digits').joinpath('model.safetensors').is_file()\n"
        "for name in names: fewstep.recipe.store.load(name)\n"
        "print(*names)"
    )
    shown = python(code, str(tmp_path), cwd=tmp_path).stdout.split()
    assert {"digits-dmd2", "digits-teacher", "toy/dmd2"} <= set(shown)


EVERYTHING = """
import importlib, os, pkgutil, sys
sys.path.insert(0, sys.argv[1])
optional, failed = {"xformers", "open_clip", "wandb", "tensorboard", "scipy", "webdataset"}, []
for package in sys.argv[2:]:
    module = importlib.import_module(package)
    for found in pkgutil.iter_modules(module.__path__):
        name = f"{package}.{found.name}"
        if name == "fewstep.__main__":
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in optional:
                failed.append(f"{name}: {error!r}")
assert not failed, failed
names = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    # torch.ops and torch.classes have a made-up relative __file__, which resolves to this folder
    # and .venv, where make test puts the dependencies, stands inside the checkout
    ours = file and os.path.isfile(file) and os.path.realpath(file).startswith(sys.argv[1] + os.sep)
    if ours and "site-packages" not in file:
        names.setdefault(os.path.realpath(file), []).append(name)
twice = {f: n for f, n in names.items() if len(n) > 1}
assert not twice, twice
assert len(names) > 60, len(names)
assert all(n[0].partition(".")[0] == "fewstep" for n in names.values()), names
print(len(names))
"""


def test_no_module_is_loaded_under_two_names():
    """From the checkout's root, where kernels/ and eval/ could be found a second time."""
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert int(python(EVERYTHING, str(ROOT), *packages, cwd=ROOT).stdout) > 60


@pytest.mark.parametrize(
    "statement",
    [
        "from kernels import attention",
        "import kernels; kernels.attention",
        "import eval",
        "from eval import frechet_distance",
    ],
)
def test_the_bare_folder_names_explain_themselves(statement: str):
    name = "kernels" if "kernels" in statement else "eval"
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1])\ntry:\n    {statement}\nexcept ImportError as error:\n"
        "    print(error)\nassert not [m for m in sys.modules if m.startswith(('kernels.', 'eval.', 'torch'))]"
    )
    told = python(code, str(ROOT), cwd=ROOT).stdout.strip()
    assert told == f"import fewstep.{name}, not {name}: this folder is mapped into the fewstep package"


def test_modules_of_the_bare_folders_cannot_be_reached():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in ('kernels.api', 'eval.features', 'eval.metrics.frechet'):\n"
        "    try:\n        __import__(name)\n    except ImportError:\n        print(name)"
    )
    assert python(code, str(ROOT), cwd=ROOT).stdout.split() == [
        "kernels.api",
        "eval.features",
        "eval.metrics.frechet",
    ]


def test_peft_and_diffusers_can_be_imported_from_the_checkouts_root():
    """transformers probes for a package called kernels; the folder of that name must not break it.

    In one process, which takes seconds: peft first, since diffusers imports it.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import peft.utils.constants\nprint('peft')\n"
        "from diffusers import UNet2DModel\nprint(UNet2DModel.__name__)"
    )
    assert python(code, str(ROOT), cwd=ROOT).stdout.split()[-2:] == ["peft", "UNet2DModel"]


def test_elsewhere_only_fewstep_can_be_imported(tmp_path: Path):
    code = (
        "import importlib.util as u\n"
        "for name in ('kernels', 'eval', 'recipes', 'assets', 'tests'):\n"
        "    spec = u.find_spec(name)\n"
        "    print(name, spec and (spec.origin or list(spec.submodule_search_locations)))"
    )
    env = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert str(ROOT) + os.sep not in done.stdout
