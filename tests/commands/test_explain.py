"""`fewstep explain`, `schema`, `methods show`, `recipes show --explain` and `recipes cp`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter

from fewstep.cli import main
from fewstep.commands.explain import explain
from fewstep.commands.methods import show_method
from fewstep.commands.write_recipe import LINE, SCHEMA, own_copy, write
from fewstep.config import REGISTRY, UserError, parse
from fewstep.recipe.fields import find, keys_of, recipe_parts
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import find as file_of


def paths() -> list[str]:
    """Every key by its kind and part, such as times.uniform.low, and those of the recipe's own mappings."""
    named = [f"{kind}.{name}" for kind, parts in REGISTRY.items() for name in parts]
    keys = [f"{path}.{key.name}" for path in named for key in keys_of(REGISTRY[path.split(".")[0]][path.split(".")[1]])]
    top = [key.name for key in keys_of(Recipe)]
    inside = [f"{at}.{key.name}" for at in ("train", "evaluate", "optim.default", "discriminator", "results")
              for key in keys_of(next(p for p in recipe_parts() if p.__name__ == NAMES[at]))]  # fmt: skip
    return [*top, *named, *keys, *inside]


NAMES = {
    "train": "Train", "evaluate": "Evaluate", "optim.default": "AdamW", "discriminator": "DiscriminatorSpec",
    "results": "Result",
}  # fmt: skip


def test_every_key_is_explained_with_an_example_that_is_one():
    """The example is YAML, it leads to the key, and what stands there is of the key's type."""
    for path in paths():
        found = find(path)
        said = explain(path)
        line = said.rpartition("\nexample  ")[2]
        assert said.startswith(f"{path}: ")
        node: Any = parse(line, path).data
        named = False
        for word in path.split("."):
            node = node[0] if isinstance(node, list) else node
            named = not named and node.get("name") == word
            node = node if named else node[word]
        if found.part:
            assert node["name"] == found.part.name  # type: ignore[attr-defined]
        elif isinstance(node, (int, float, str, bool, list)):
            TypeAdapter(found.keys[0][1].hint).validate_json(json.dumps(node))


def test_what_is_said_of_a_number_a_choice_a_part_and_a_kind():
    assert explain("train.ema_warmup", 200).splitlines() == [
        "train.ema_warmup: a number; default 10.0",
        "  w of min(decay, (1 + n) / (w + n)) after n updates; 3 and a decay near 1 average the last n / 2 of them.",
        "",
        "example  train: {ema_warmup: 3.5}  # digits-dmd2",
    ]
    assert explain("train.parallel").startswith("train.parallel: ddp or fsdp; default ddp\n")
    lognormal = explain("times.lognormal")
    assert "keys\n  mean  a number; default -1.2\n        Mean of ln(sigma / alpha).\n" in lognormal
    data = explain("data", 200)
    for name, part in REGISTRY["data"].items():
        assert f"  {name:13}  {part.__doc__.splitlines()[0]}\n" in data
    assert "method.guidance of boot, ctm, emd" in explain("method.guidance")
    assert all(
        len(line) <= 70 for line in explain("method.dmd2", 70).splitlines() if not line.startswith(("method", "example"))
    )
    top = explain(None)
    assert all(f"\n  {key.name} " in top for key in keys_of(Recipe))


def test_methods_show_lists_the_keys():
    text = show_method("lcm")
    assert text.index("our numbers") < text.index("\n  keys\n")
    for key in keys_of(REGISTRY["method"]["consistency"]):
        assert f"\n    {key.name} " in text
    assert "\n  keys\n" not in show_method("multi_student")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_a_copied_recipe_names_a_schema_that_is_there_and_fits_it(command: Any, tmp_path: Path):
    assert command("recipes", "cp", "digits-cd", "mine.yaml")[0] == 0
    text = (tmp_path / "mine.yaml").read_text()
    assert text == LINE + own_copy(file_of("digits-cd").read_text(), sources=False)
    named = text.splitlines()[0].rpartition("$schema=")[2]
    whole = json.loads((tmp_path / named).read_text())
    jsonschema.Draft202012Validator(whole).validate(parse(text, "mine.yaml").data)
    (tmp_path / SCHEMA).write_text("mine")
    assert command("recipes", "cp", "mine.yaml", "again.yaml")[0] == 0
    assert (tmp_path / "again.yaml").read_text() == text
    assert (tmp_path / SCHEMA).read_text() == "mine"


def test_commands(command: Any, tmp_path: Path):
    code, out, _ = command("explain")
    assert (code, out.splitlines()[0][:16]) == (0, "keys of a recipe")
    code, _, err = command("explain", "train.stpes")
    assert (code, err) == (2, "error: explain train.stpes: train has no 'stpes'; did you mean 'steps'?\n")
    assert command("schema", "--out", "s.json")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["title"] == "fewstep recipe"
    assert command("schema", "--out", "s.json")[2] == "error: s.json: exists; overwrite it with --force\n"
    assert command("schema", "--out", "no/s.json")[2] == "error: no: no such folder\n"
    code, out, _ = command("recipes", "show", "toy/dmd2", "--explain")
    assert code == 0
    assert "  # " in out
    with pytest.raises(UserError, match="is a folder; name a file"):
        write({tmp_path: ""})
