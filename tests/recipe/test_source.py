"""Reading recipes: libyaml's loader and PyYAML's own give the same data, the same lines and the same complaints."""

from __future__ import annotations

import pytest
import yaml

from fewstep.config import FAST_LOADER, PLAIN_LOADER, RecipeError, Source, parse, source as yaml_source
from fewstep.recipe import cards
from fewstep.recipe.source import read, shipped


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch):
    """Calls with the loader in pure Python."""

    def call(job, *arguments):
        with monkeypatch.context() as m:
            m.setattr(yaml_source, "LOADER", PLAIN_LOADER)
            return job(*arguments)

    return call


def test_the_loader_is_libyamls_where_there_is_one():
    fast = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    assert issubclass(yaml_source.LOADER, fast)
    assert not issubclass(PLAIN_LOADER, fast) or fast is yaml.SafeLoader


def test_every_recipe_reads_alike(plainly):
    def typed(value):
        if isinstance(value, dict):
            return {k: typed(v) for k, v in value.items()}
        return [typed(v) for v in value] if isinstance(value, list) else (type(value), value)

    assert len(shipped()) > 100
    for name in shipped():
        fast, slow = read(name), plainly(read, name)
        assert typed(fast.data) == typed(slow.data), name
        assert fast.lines == slow.lines, name
        assert fast.problems == slow.problems == ()


def test_every_card_and_the_bibliography_read_alike():
    paths = [*(cards._folder() / "cards").glob("*.yaml"), cards._folder() / "bibliography.yaml"]
    assert len(paths) > 30
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert yaml.load(text, FAST_LOADER) == yaml.safe_load(text), path.name


@pytest.mark.parametrize(
    ("value", "means"),
    [
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2_000", -2000),
        ("1_0.5e+3", 10500.0),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("TRUE", "TRUE"),
        ("~", None),
        ("", None),
        (".inf", ".inf"),
        ("'1'", "1"),
        ("!!int '3'", 3),
        ("[1, {a: 1e3}]", [1, {"a": 1000.0}]),
        ("&x {a: 1}", {"a": 1}),
        ("\U0001f600 é", "\U0001f600 é"),
    ],
)
def test_scalars_mean_what_they_look_like(plainly, value: str, means: object):
    text = f"# a comment\n\nvalue: {value}\n"
    for source in (parse(text, "f"), plainly(parse, text, "f")):
        assert isinstance(source, Source)
        assert source.data == {"value": means}
        assert type(source.data["value"]) is type(means)
        assert source.lines[("value",)] == ("f", 3)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3),
        ("a: 1\n  b: 2\n", 2),
        ("a: {b: 1\n", 2),
        ("a: 1\n\tb: 2\n", 2),
        ("a: 'x\n", 2),
        ("a: *nothing\n", 1),
        ("a: 1\nb: !!python/object:os.system x\n", 2),
        ("a: \x07\n", 1),
        ("a: 1\n---\nb: 2\n", 2),
        ("- 1\n", 1),
        ("", 1),
    ],
)
def test_a_syntax_error_has_its_line(plainly, text: str, line: int):
    told = []
    for read_it in (parse, lambda *a: plainly(parse, *a)):
        with pytest.raises(RecipeError, match=rf"^f:{line}: (not valid YAML: .|a recipe is a mapping|aliases)") as caught:
            read_it(text, "f")
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_a_repeated_key_has_both_lines(plainly):
    text = "a: {b: 1}\nc: 2\na: {b: 3}\n"
    told = ("f:3: a: key stands twice (first in line 1)",)
    assert parse(text, "f").problems[:1] == plainly(parse, text, "f").problems[:1] == told
