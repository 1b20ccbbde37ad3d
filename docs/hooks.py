"""mkdocs hooks: pages made of the READMEs, of the cards and of the code's own docstrings, so that no text stands twice.

A line `<!-- include: PATH -->` in a page is that file without its first heading, `<!-- include: PATH # HEADING -->` one
section of it. Links in it lead to the page that holds their target; files without a page become their path.
"""

from __future__ import annotations

import ast
import inspect
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "fewstep/networks/README.md": "networks.md",
    "fewstep/data/README.md": "data.md",
    "fewstep/methods/README.md": "methods.md",
    "fewstep/export/README.md": "export.md",
    "fewstep/README.md": "house.md",
    "kernels/README.md": "kernels.md",
    "eval/README.md": "evaluate.md",
    "assets/README.md": "numbers.md",
    "CONTRIBUTING.md": "method.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""The page that holds a file of the repository; those in docs are pages themselves."""
PICTURES = tuple(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "assets").glob("*.png")))
TABLE = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: (\S+?)(?: # (.+))? -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add what is generated, and the pictures that pages show."""
    made = {
        "reference/recipe.md": recipe_reference,
        "reference/methods.md": method_reference,
        "reference/commands.md": command_reference,
        "reference/python.md": python_reference,
    }
    for name, write in made.items():
        files.append(File.generated(config, name, content=write()))
    for name in PICTURES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put included files and generated tables where a page asks for them."""
    text = INCLUDE.sub(lambda m: included(m[1], m[2], page.file.src_uri), markdown)
    return TABLE.sub(lambda m: TABLES[m[1]](), text)


def included(name: str, heading: str | None, into: str) -> str:
    """The text of a file of the repository for the page `into`, its links led to pages."""
    path = ROOT / name
    if not path.is_file():
        raise PluginError(f"{into}: includes {name}, which is not there")
    text = path.read_text(encoding="utf-8")
    text = section(text, heading, f"{into}: {name}") if heading else text.partition("\n")[2]

    def lead(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        file, _, anchor = target.partition("#")
        held = posixpath.normpath(posixpath.join(posixpath.dirname(name), file))
        if not (ROOT / held).exists():
            raise PluginError(f"{into}: {name} links to {target}, which is not there")
        own = held.removeprefix("docs/") if re.fullmatch(r"docs/[\w-]+\.md", held) else None
        to = PAGES.get(held, held if held in PICTURES else own)
        if to is None:
            return f"{words} (`{held}`)" if words.strip("`") != held else f"`{held}`"
        way = posixpath.relpath(to, posixpath.dirname(into) or ".")
        return f"{mark}[{words}]({way}{'#' + anchor if anchor else ''})"

    return re.sub(r"<!-- [\w-]+:(begin|end) -->\n?", "", LINK.sub(lead, text)).strip()


def section(text: str, heading: str, where: str) -> str:
    """What stands under a heading, up to the next of its level."""
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines) if re.fullmatch(rf"#+ {re.escape(heading)}", line)]
    if len(starts) != 1:
        raise PluginError(f"{where} has {len(starts)} headings {heading!r}, not one")
    level = len(lines[starts[0]].partition(" ")[0])
    rest = lines[starts[0] + 1 :]
    end = next((n for n, line in enumerate(rest) if re.match(rf"#{{1,{level}}} ", line)), len(rest))
    return "\n".join(rest[:end])


def recipe_reference() -> str:
    """Every key of a recipe and of every part: type, default, meaning, from the docstrings of the fields."""
    from fewstep.config import REGISTRY
    from fewstep.recipe.fields import extends, keys_of, recipe_parts
    from fewstep.recipe.schema import Recipe

    out = ["# Recipe keys", "", "`fewstep explain KEY` says the same on a terminal. Parts are chosen by `name`.", ""]
    out += ["## A recipe", "", *_keys((*keys_of(Recipe), extends()))]
    known = set(recipe_parts())
    for part in sorted((p for p in known if p is not Recipe and not hasattr(p, "name")), key=lambda p: p.__name__):
        out += [f"## {part.__name__}", "", *_about(part), *_keys(keys_of(part))]
    for kind, parts in sorted(REGISTRY.items()):
        held = {name: part for name, part in sorted(parts.items()) if part in known}
        if held and kind != "method":
            out += [f"## {kind}", ""]
            for name, part in held.items():
                out += [f"### {kind}: {name}", "", *_about(part), *_keys(keys_of(part))]
    return "\n".join(out) + "\n"


def method_reference() -> str:
    """The card of every method, and its keys."""
    import fewstep.methods  # noqa: F401  (registers the methods)
    from fewstep.config import REGISTRY
    from fewstep.recipe.cards import cards, show
    from fewstep.recipe.fields import keys_of

    out = ["# Method cards", "", "`fewstep methods show NAME` prints one.", ""]
    for name, card in cards().items():
        told = show(name).partition("\n")[2]
        out += [f"## {name}", "", card.title, "", "```text", inspect.cleandoc(told), "```", ""]
        if part := REGISTRY["method"].get(name):
            out += _keys(keys_of(part))
    return "\n".join(out) + "\n"


def command_reference() -> str:
    """What `--help` says of every command."""
    import typer

    import fewstep.cli  # noqa: F401  (declares the commands)
    from fewstep.cli.app import app

    root: Any = typer.main.get_command(app)
    out = ["# Commands", ""]

    def walk(command: Any, path: str) -> None:
        inner = getattr(command, "commands", {})
        if not inner:
            out.extend([f"## {path}", "", (command.help or "").strip(), ""])
            _usage(command, path, out)
        for name, below in sorted(inner.items()):
            walk(below, f"{path} {name}")

    walk(root, "fewstep")
    return "\n".join(out) + "\n"


def _usage(command: Any, path: str, out: list[str]) -> None:
    rows = []
    for p in command.params:
        if p.name == "help":
            continue
        option = p.param_type_name == "option"
        name = ", ".join(f"`{o}`" for o in p.opts) if option else f"`{(p.name or '').upper()}`"
        rows.append(f"| {name} | {_cell((getattr(p, 'help', '') or '').strip())} |")
    if rows:
        out += ["| argument | |", "|---|---|", *rows, ""]
    if command.epilog:
        out += [command.epilog, ""]


def python_reference() -> str:
    """Every public name with its docstring and example."""
    import fewstep

    out = ["# Python", "", "Every example runs in the suite; they assume `import fewstep, torch`.", ""]
    rooms = {
        "commands.load": "Recipes, training, products",
        "networks.diffusers": "Networks and roles",
        "methods.method": "Writing a method",
        "algebra.batch": "Processes, samplers, guidance",
        "objectives.adversarial": "Losses",
    }
    for module, names in fewstep._NAMES.items():
        if module in rooms:
            out += [f"## {rooms[module]}", ""]
        out += [f"::: fewstep.{name}\n" for name in names.split()]
    return "\n".join(out) + "\n"


def choose_table() -> str:
    """What every method needs, from the cards."""
    from fewstep.recipe.cards import cards

    lines = ["| method | what | needs | holds |", "|---|---|---|---|"]
    for name, c in cards().items():
        told = " | ".join(_cell(text) for text in (c.title, c.needs, c.memory))
        lines.append(f"| [`{name}`](reference/methods.md#{name}) | {told} |")
    return "\n".join(lines)


def demo_table() -> str:
    """The numbers of the main job."""
    from fewstep.bench.readme import demo_table as table

    return table()


def gpu_table() -> str:
    """What `make gpu` found."""
    from fewstep.bench.gpu import shown

    return shown(ROOT / "assets" / "gpu.md")


FAMILIES = ("sd15", "sdxl", "sana", "dit", "flow", "sd3", "flux")


def schedules_table() -> str:
    """What the shipped recipes for pipelines train with; `paper/` those of a publication, `models/` ours."""
    from fewstep.recipe.source import shipped
    from fewstep.recipe.store import load

    lines = ["| recipe | what | levels | guidance | critic updates | student's rate | batch |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in shipped():
        if not name.startswith(("paper/", "models/")) or not any(f in name for f in FAMILIES):
            continue
        recipe = load(name)
        method: Any = recipe.method
        steps = ", ".join(f"{u:g}" for u in recipe.sampler().steps)
        critic = getattr(getattr(method, "critic", None), "steps", "")
        rate = recipe.optim.get("student") or recipe.optim["default"]
        guidance = getattr(method, "guidance", "")
        cells = [f"`{name}`", _cell(recipe.about), steps, str(guidance), str(critic), f"{rate.lr:g}"]
        cells.append(str(recipe.train.batch))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table() -> str:
    """`fewstep plan` of recipes on folders of the real sizes, as docs/plans.py found them."""
    lines = ["| family | four-step DMD2 by `fewstep new`, 32 prompts a step, one a time | estimate |", "|---|---|---|"]
    for row in json.loads((ROOT / "docs" / "plans.json").read_text())["rows"]:
        lines.append(f"| {row['family']} | {row['settings']} | {row['gib']:.1f} GiB |")
    return "\n".join(lines)


def configs_table() -> str:
    """`fewstep plan --weights none` of the shipped configs, as docs/plans.py found it."""
    lines = ["| configs | x | frozen weights in bf16 | estimate | of 24 GiB |", "|---|---|---|---|---|"]
    for row in json.loads((ROOT / "docs" / "plans.json").read_text())["configs"]:
        fits = "fits" if row["gib"] <= 0.9 * 24 else "does not fit"
        sizes = f"{row['weights_gib']:.1f} GiB | {row['gib']:.1f} GiB"
        lines.append(f"| `assets:configs/{row['configs']}` | {row['shape']} | {sizes} | {fits} |")
    return "\n".join(lines)


def scripts_table() -> str:
    """The scripts beside the recipes, by their first line."""
    rows = []
    for path in sorted((ROOT / "recipes" / "python").glob("[a-z]*.py")):
        about = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
        rows.append(f"- `recipes/python/{path.name}`: {about}")
    return "\n".join(rows)


TABLES = {
    "choose": choose_table,
    "demo": demo_table,
    "gpu": gpu_table,
    "schedules": schedules_table,
    "memory": memory_table,
    "configs": configs_table,
    "scripts": scripts_table,
}


def _about(part: type) -> list[str]:
    return [(inspect.getdoc(part) or "").strip(), ""]


def _keys(keys: Any) -> list[str]:
    from fewstep.recipe.fields import REQUIRED, brief, shown, type_of

    if not keys:
        return ["It has no keys.", ""]
    out = ["| key | type | default | |", "|---|---|---|---|"]
    for k in keys:
        default = "required" if k.default is REQUIRED else f"`{shown(brief(k.default))}`"
        out.append(f"| `{k.name}` | {_cell(type_of(k.hint, k.above))} | {_cell(default)} | {_cell(k.doc)} |")
    return [*out, ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
