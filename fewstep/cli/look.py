"""Commands that show: samples, health, recipes, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.app import (
    AnySteps,
    Download,
    Force,
    Json,
    MethodName,
    RecipeName,
    Settings,
    Steps,
    Words,
    app,
    may_run_code,
    method_names,
    methods,
    recipe_names,
    recipes,
)


@app.command(
    rich_help_panel="Look",
    epilog="Examples:\n\n"
    "`fewstep sample runs/digits-dmd2 --classes 0-9 --out grid.png`\n\n"
    '`fewstep sample runs/sd --prompt "a red fox" --teacher 25`\n\n'
    "`fewstep sample runs/sd/export --prompts prompts.txt --seed 7`\n\n"
    "`fewstep sample runs/digits-lcm --steps 4 --assist diversity:substeps=5`\n\n"
    "`fewstep sample runs/digits-lcm --steps 4 --path`",
)
@may_run_code
def sample(
    path: Annotated[Path, typer.Argument(help="A run directory, an export or a diffusers folder.")],
    steps: Steps = None,
    classes: Annotated[str | None, typer.Option(help="Classes to draw in turn, such as 0-9 or 1,4,7.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, repeatable; a run's teacher beside it.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    teacher: Annotated[
        int | None,
        typer.Option(
            min=0, help="Heun steps of the teacher beside prompts or a path [default: as evaluated]; 0 is none."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale of that teacher, or of a pipeline's call [default: the recipe's]."),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(help="A negative prompt inside the student's attention, a further row; with --nasa."),
    ] = None,
    nasa: Annotated[float | None, typer.Option(help="Its weight, .1 to .5 (NASA, arXiv 2412.02687).")] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(help="Folder of the text encoder, for prompts that a run on embedded ones has not seen."),
    ] = None,
    assist: Annotated[
        str | None,
        typer.Option(help="A run's teacher helps: distillation_pp, diversity, adaptive; or NAME:key=value,..."),
    ] = None,
    show_path: Annotated[
        bool, typer.Option("--path", help="Show x0 at every step, of the teacher and of the student; 8 samples.")
    ] = False,
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of samples [default: 100; of --path 8]; with prompts one each.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; each sample has its own.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("grid.png"),
    any_steps: AnySteps = False,
) -> None:
    """Draw a grid of samples as a PNG, or a student beside its teacher for prompts."""
    from fewstep.commands.sample import draw, read_prompts_of

    told = read_prompts_of(prompt or [], prompts) if prompt or prompts else []
    number = count or (8 if show_path else 100)
    more = (assist, show_path, negative, nasa, encoder)
    draw(path, steps, classes, number, seed, out, any_steps, told, teacher, guidance, *more)


@app.command(
    rich_help_panel="Look",
    epilog='Example: `fewstep gallery runs/emoji-dmd2 runs/emoji-dmd2-4step --captions "red apple,pizza"`',
)
@may_run_code
def gallery(
    runs: Annotated[list[Path], typer.Argument(help="Run directories on one data set with captions.")],
    captions: Annotated[str, typer.Option(help="Captions of the data, separated by commas.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("gallery.png"),
    steps: Annotated[str, typer.Option(help="Heun steps of the teacher, a row for each, such as 1,12.")] = "12",
    guidance: Annotated[float, typer.Option(help="Guidance scale of the teacher; 1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    """Draw samples beside their captions: the data, the first run's teacher, each run, all from one noise."""
    from fewstep.commands.gallery import draw_gallery
    from fewstep.commands.options import parse_steps

    wanted = [c.strip() for c in captions.split(",") if c.strip()]
    rows = draw_gallery(runs, wanted, out, steps=parse_steps(steps), guidance=guidance, seed=seed)
    typer.echo(f"{out}: {len(rows)} rows of {len(wanted)}")
    strengths = [f"{name} {value:.3f}" for name, value in rows if value is not None]
    if strengths:
        typer.echo(f"saturation (largest minus smallest channel, mean): {'; '.join(strengths)}")


@app.command(
    "image-to-image",
    rich_help_panel="Look",
    epilog="Example: `fewstep image-to-image runs/digits-std-i2i --strengths .25,.5,.75 --source 3 --target 8`",
)
@may_run_code
def image_to_image(
    run: Annotated[Path, typer.Argument(help="A class-conditional run on digits or Fashion-MNIST.")],
    strengths: Annotated[str, typer.Option(help="Levels that pictures are noised to, in (0, 1].")] = ".25,.5,.75",
    source: Annotated[str | None, typer.Option(help="Classes of the pictures, such as 3 or 0-4 [default: all].")] = None,
    target: Annotated[str | None, typer.Option(help="Classes to make of them [default: each the next].")] = None,
    count: Annotated[int, typer.Option(min=2, max=100_000, help="Pictures.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder [default: RUN/image-to-image].")] = None,
) -> None:
    """Draw from pictures at several strengths, the teacher at as many calls beside: content against style."""
    from fewstep.commands.image_to_image import curve, parse_strengths

    curve(run, parse_strengths(strengths), source, target, count, seed, out)


@app.command(rich_help_panel="Look", epilog="Example: `fewstep health runs/digits-dmd2`")
def health(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Say in words whether a run is healthy, from its log, and which knob to turn; plot it into RUN/report."""
    from fewstep.commands.health import bands_of, report
    from fewstep.commands.health_plots import save
    from fewstep.train.bands import beginning
    from fewstep.train.log import read_log
    from fewstep.train.verdicts import last_stage

    typer.echo(report(run))
    picture, records = run / "report" / "health.png", read_log(run / "log.jsonl")
    if save(last_stage(records), picture, bands_of(run)[0], beginning(records)):
        typer.echo(f"readings {picture}")


@app.command(
    rich_help_panel="Look",
    epilog="Examples:\n\n`fewstep report runs/digits-dmd2`\n\n`fewstep report runs/digits-dmd2 --every 30 --open`",
)
def report(
    run: Annotated[Path, typer.Argument(help="A run directory, while it trains or after.")],
    every: Annotated[
        int | None, typer.Option(min=1, help="Write it again after so many seconds, as long as the run trains.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write one HTML page of a run, RUN/report/run.html: losses, verdicts, samples, numbers, recipe, environment."""
    from fewstep.commands.run_page import follow, write_page

    if every is None or show:
        made = write_page(run, every)
        typer.echo(f"page {made.path}")
        if show:
            typer.launch(str(made.path))
    if every is not None:
        follow(run, every, typer.echo)


@recipes.command("ls", epilog="Examples: `fewstep recipes ls sdxl`, `fewstep recipes ls --method dmd2 --json`")
def recipes_ls(
    words: Words = None,
    method: Annotated[
        str | None, typer.Option(help="Of this method, or of a paper's name for one.", autocompletion=method_names)
    ] = None,
    json: Json = False,
) -> None:
    """List shipped recipes, one a line."""
    from fewstep.commands.recipes import list_recipes

    list_recipes(words or [], method, json)


@recipes.command("show", epilog="Example: `fewstep recipes show toy/dmd2 method.steps=[1.0,0.5]`")
def recipes_show(
    name: RecipeName,
    settings: Settings = None,
    explain: Annotated[bool, typer.Option("--explain", help="With a comment on every key.")] = False,
) -> None:
    """Print a recipe with every default filled in."""
    from fewstep.recipe.annotate import annotated
    from fewstep.recipe.store import dump, load

    text = dump(load(name, settings or []))
    typer.echo(annotated(text) if explain else text, nl=False)


@recipes.command("diff", epilog="Example: `fewstep recipes diff digits-dmd2 --paper`")
def recipes_diff(
    a: RecipeName,
    b: Annotated[str | None, typer.Argument(help="Another one.", autocompletion=recipe_names)] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Against the published settings of its method.")] = False,
) -> None:
    """Print what differs between two recipes, every default filled in."""
    from fewstep.recipe.diff import diff

    typer.echo(diff(a, b, paper))


@recipes.command("cp", epilog="Example: `fewstep recipes cp digits-dmd2 mine.yaml`")
def recipes_cp(
    name: RecipeName,
    to: Annotated[Path, typer.Argument(help="File to write; the schema that editors check it with goes beside it.")],
    force: Force = False,
) -> None:
    """Copy a shipped recipe to a file of your own, without the results and remarks of its own runs."""
    from fewstep.commands.write_recipe import copy_recipe

    copy_recipe(name, to, force)
    typer.echo(f"{to}: run it with `fewstep run {to}`")


@recipes.command("expect", epilog="Example: `fewstep recipes expect runs/a runs/b --into mine.yaml`")
def recipes_expect(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of one recipe that went well.")],
    into: Annotated[Path | None, typer.Option(help="Recipe file to write the bands into; printed when left out.")] = None,
) -> None:
    """Make the bands of losses and readings that `fewstep health` compares later runs of the recipe with."""
    from fewstep.commands.expect import expect

    typer.echo(expect(runs, into), nl=False)


@recipes.command("check", epilog="Example: `fewstep recipes check mine.yaml`")
def recipes_check(name: RecipeName, settings: Settings = None, download: Download = False) -> None:
    """Check a recipe and print all its problems, or the stages it would run.

    Exit code 0; 2 for a recipe that cannot train, with file and line; 3 where a part of it could not be checked, because
    a folder that it names is not here or only its own code would tell, which is never run: that is named.
    """
    from fewstep.commands.check_recipe import check

    lines, missing = check(name, settings or [], download)
    for line in [*lines, *missing]:
        typer.echo(line)
    if missing:
        raise typer.Exit(3)


@methods.command("ls", epilog="Example: `fewstep methods ls consistency`")
def methods_ls(words: Words = None, json: Json = False) -> None:
    """List methods with what they need, one a line."""
    from fewstep.commands.methods import list_methods

    list_methods(words or [], json)


@methods.command("show", epilog="Example: `fewstep methods show phased_dmd`")
def methods_show(name: MethodName) -> None:
    """Print a method's card: equation, roles, deviations from its paper, numbers, known failures, its keys."""
    from fewstep.commands.explain import terminal_width
    from fewstep.commands.methods import show_method

    typer.echo(show_method(name, terminal_width()))


@methods.command("record", epilog="Example: `fewstep methods record runs/digits-dmd2 comparison.json`")
def methods_record(
    sources: Annotated[list[Path], typer.Argument(help="Run directories, or files by `fewstep compare`.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON lines to add to; the checkout's own assets when left out.")
    ] = None,
) -> None:
    """Put measured numbers of shipped recipes on the method cards (assets/results.jsonl)."""
    from fewstep.commands.record import FILE, record
    from fewstep.files import expanded

    for entry in record(sources, out or expanded(f"assets:{FILE}")):
        value = sum(entry.values) / len(entry.values)
        steps = f"{entry.steps} step{'s' * (entry.steps > 1)}"
        typer.echo(f"{entry.recipe}: {entry.metric} {value:.3g} at {steps}, {entry.updates} updates")


@app.command(rich_help_panel="Look", epilog="Example: `fewstep cite digits-dmd2`")
def cite(recipe: RecipeName) -> None:
    """Print BibTeX of the papers behind a recipe."""
    from fewstep.recipe.cards import cite as entries

    typer.echo(entries(recipe))


@app.command(rich_help_panel="Look", epilog="Example: `fewstep explain method.dmd2`")
def explain(
    key: Annotated[
        str | None,
        typer.Argument(help="A key, such as train.ema_warmup, data.images or times.lognormal; the top keys if left out."),
    ] = None,
) -> None:
    """Say what a key of a recipe means: type, default, choices, meaning and an example."""
    from fewstep.commands.explain import explain as tell, terminal_width

    typer.echo(tell(key, terminal_width()))


@app.command(rich_help_panel="Look", epilog="Example: `fewstep schema --out recipe.schema.json`")
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; printed when left out.")] = None,
    force: Force = False,
) -> None:
    """Write a JSON schema of recipes, by which editors complete, explain and check them."""
    from fewstep.commands.write_recipe import write
    from fewstep.recipe.json_schema import text

    if out is None:
        typer.echo(text(), nl=False)
    else:
        write({out: text()}, force)
        typer.echo(f"{out}: name it in a recipe's first line, `# yaml-language-server: $schema={out.name}`")
