"""Recipes that nobody means well with: one message each, in little time, and never a traceback."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from fewstep.config import RecipeError, UserError
from fewstep.config.source import NODES
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load

BASES = ("toy/dmd2", "digits-dmd2", "toy/tcm", "toy/joint", "paper/dmd2-sdxl-4step", "emoji-teacher", "digits-phased-dmd")


def refused(tmp_path: Path, text: str | bytes, *arguments: str) -> str:
    """The message of a recipe file that is refused."""
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        load(str(path), arguments)
    return str(caught.value).replace(str(path), "a.yaml")


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: &a {name: ring, x: *a}", "a.yaml:1: aliases (*a) are not read; write the value out"),
        ("copy: &a [*a]", "aliases (*a) are not read"),
        (bomb(9), "a.yaml:2: aliases (*a0) are not read"),
        ("roles: " + "{a: " * 500 + "1" + "}" * 500, "is nested more than 40 deep"),
        ("[" * 100_000, "is nested more than 40 deep"),
        ("x: [" + "1," * NODES + "]", f"has more than {NODES} keys and values"),
        ("extends: toy/dmd2\ntrain: {name: {a: 1}}", "a.yaml:2: train.name: unknown key"),
        ("extends: toy/dmd2\ntrain: {name: [a]}", "a.yaml:2: train.name: unknown key"),
        ("extends: toy/dmd2\noptim: {default: {name: {a: 1}}}", "a.yaml:2: optim.default"),
        ("extends: toy/dmd2\nmethod: {name: {a: 1}}", "a.yaml:2: method.name"),
        ("batch: !!int abc", "a.yaml:1: batch: 'abc' is not what its tag int says"),
        ("batch: !!float xyz", "batch: 'xyz' is not what its tag float says"),
        ("batch: !!bool maybe", "batch: 'maybe' is not what its tag bool says"),
        ("batch: " + "9" * 5000, "has more than 40 digits"),
        ("batch: 1" + "0" * 30, "does not fit into 64 bits"),
        ("std: 1e300", "cannot be told from infinity in float32"),
        ("std: 1e-320", "cannot be told from 0 in float32"),
        ("a: {<<: {b: 1}}", "a.yaml:1: a: merge keys (<<) are not read; write the keys out, or use `extends`"),
        ("b: 1\na: !!binary aGVsbG8=", "a.yaml:2: a: 'aGVsbG8=': values of type bytes are not read"),
        ("a: !!timestamp 2001-01-01", "values of type date are not read"),
        ("a: !!python/object/apply:os.system [ls]", "a.yaml:1"),
        ("? [a, b]\n: 1", "a key must be a word"),
        ("extends: ''", "a.yaml:1: extends: expected the name or file of a recipe, got ''"),
        ("about: x\nextends: [toy/dmd2]", "a.yaml:2: extends: expected the name or file"),
        ("about: x\nextends: toy/dmd3", "a.yaml:2: extends: recipe 'toy/dmd3' is not shipped; did you mean 'toy/dmd'?"),
        ("extends: nowhere.yaml", "a.yaml:1: extends: nowhere.yaml: no such recipe file"),
        (b"about: caf\xe9", "a.yaml: cannot be read"),
        ('about: x\ntrain: {steps: "\\ud800"}', "a.yaml:2: train.steps: '\\ud800': holds half of a surrogate pair"),
        ('about: x\n"\\ud800": 1', "a.yaml:2: '\\ud800': holds half of a surrogate pair"),
        ("", "a.yaml:1: a recipe is a mapping of keys to values"),
        ("\0", "a.yaml"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_with_its_line(tmp_path: Path, text: str | bytes, words: str):
    assert words in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.²=1", "train.²"),
        ("train.steps=1\ndata: 3", "has more than one line; give each setting by itself"),
        ("train.steps=" + "9" * 5000, "has more than 40 digits"),
        ("train.steps=*a", "not a YAML value"),
        ("before.99999999999999999999=1", "before"),
        ("=1", "expected key=value"),
        ("about=\udcff", "argument 'about=\\udcff': holds a byte that is no UTF-8"),
        ("\udcff=1", "argument '\\udcff=1': holds a byte that is no UTF-8"),
        (".=1", "."),
        ("train.=1", "train"),
        ("train..steps=1", "train"),
    ],
)
def test_hostile_settings_are_refused_by_name(argument: str, words: str):
    with pytest.raises(RecipeError) as caught:
        load("toy/dmd2", [argument])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "\0",
        "a\0b.yaml",
        "x" * 5000,
        "/dev/null.yaml",
        "..",
        "recipes/",
        "~nobody/a.yaml",
        "~no-such-user/a.yaml",
        "\udcff.yaml",
    ],
)
def test_hostile_names_are_refused(name: str):
    with pytest.raises(RecipeError):
        load(name)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values of parsed YAML, mappings and lists too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for k, v in items for p in leaves(v, (*path, k)))]


TREES = {name: yaml.safe_load(shipped()[name].read_text()) for name in BASES}
WORDS = st.sampled_from(
    ["", "a", "ring", "student", "../x", "name", "no", "1e-4", "ß", "\u2028", "x" * 200, "fd", "dmd2"]
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 10**18, -(10**30), 1e300, 5e-324, True, None]))
VALUES = st.recursive(
    st.one_of(NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)


def mutated(tree: Any, draw: random.Random, value: Any) -> Any:
    """The tree with one place replaced, dropped, added to, or put in another's place."""
    places = [p for p in leaves(tree) if p]
    path = draw.choice(places)
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    kind = draw.randrange(5)
    if kind == 0:
        del inside[path[-1]]
    elif kind == 1 and isinstance(inside[path[-1]], dict):
        inside[path[-1]][draw.choice(["name", "steps", "of", "unknown", "weight"])] = value
    elif kind == 2:
        source: Any = tree
        for key in draw.choice(places):
            if isinstance(source, (dict, list)):
                try:
                    source = source[key]
                except (KeyError, IndexError, TypeError):
                    break
        inside[path[-1]] = yaml.safe_load(yaml.safe_dump(source))
    else:
        inside[path[-1]] = value
    return tree


def check_one(folder: Path, base: str, seed: int, value: Any) -> None:
    draw = random.Random(seed)
    tree = mutated(yaml.safe_load(yaml.safe_dump(TREES[base])), draw, value)
    path = folder / "mutant.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    with suppress(RecipeError, UserError):
        load(str(path))


FUZZ = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants")


@settings(max_examples=500, **FUZZ)
@given(base=st.sampled_from(BASES), seed=st.integers(0, 2**32), value=VALUES)
def test_a_mutated_recipe_is_read_or_refused(folder: Path, base: str, seed: int, value: Any):
    check_one(folder, base, seed, value)


@pytest.mark.long
@settings(max_examples=5000, **FUZZ)
@given(base=st.sampled_from(sorted(shipped())), seed=st.integers(0, 2**32), value=VALUES)
def test_many_mutated_recipes_are_read_or_refused(folder: Path, base: str, seed: int, value: Any):
    TREES.setdefault(base, yaml.safe_load(shipped()[base].read_text()))
    check_one(folder, base, seed, value)


@settings(max_examples=200, **FUZZ)
@given(text=st.text(max_size=200), argument=st.text(max_size=40))
def test_any_text_is_read_or_refused(folder: Path, text: str, argument: str):
    path = folder / "text.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for name, settings_ in ((str(path), []), ("toy/dmd2", [argument])):
        with suppress(RecipeError, UserError):
            load(name, settings_)
