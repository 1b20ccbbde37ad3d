"""Teachers that are trained for hours, by leg: train on from what is committed, measure, ship (assets/relay.md).

python -m fewstep.bench.relay train fashion-teacher RUN
python -m fewstep.bench.relay look RUN [--samples 1000] [--steps 8] [--guidance 1] [--average ema_0.9997]
python -m fewstep.bench.relay ship fashion-teacher RUN [--steps 8] [--guidance 1] [--into assets]

`train` goes on in RUN, or begins there from the weights of the assets with fresh moments, 500 updates of warm-up and the
next seed; stop it by Ctrl-C or SIGTERM. `look` measures an average and keeps the number beside RUN. `ship` writes the
average as assets/NAME with a card and relay.json, after the legs that are there. RUN.jsonl, beside RUN, holds legs,
processor time and what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.commands.judge import judge_of
from fewstep.commands.measure import measure, teacher_product
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import distance_of
from fewstep.export.choose import export
from fewstep.files import commit, expanded, parse_json, read_json
from fewstep.files.folders import MARK
from fewstep.files.write import aside_name
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load, load_run
from fewstep.train.product import Product, guided_product, open_product
from fewstep.train.state import load_into, load_tensors
from fewstep.train.trainer import Hooks, Trainer

WARM_UP = 500
"""Updates over which the rate of a leg with fresh moments rises."""
EVERY = 25
"""Updates between two notes of the processor time."""
LARGEST = 5 * 2**20
"""Bytes of a teacher that ships."""
PROGRESS = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
"""Not standard output, which has the rows."""
SHOWN = {
    "accuracy": "class accuracy",
    "diversity": "within-class diversity",
    "recall": "recall",
    "precision": "precision",
    "retrieval": "caption found",
}
"""Keys of relay.json and how a metric's name begins: what is kept of an evaluation beside the distance."""


@dataclass(frozen=True)
class How:
    """How a teacher is measured."""

    average: str = "ema_0.9997"
    steps: Sequence[int] = (8,)
    """Heun steps; each is measured at each guidance scale."""
    guidance: Sequence[float] = (1.0,)
    samples: int | None = None
    """None: the recipe's."""
    preset: str | None = None
    """None: the recipe's."""


def beside(run: Path, ending: str) -> Path:
    """What lies beside a run directory, in which only what fewstep's trainer writes may lie."""
    run = run.absolute()
    return run.with_name(f"{run.name}{ending}")


def notes(run: Path) -> Path:
    return beside(run, ".jsonl")


def rows(run: Path) -> list[dict[str, Any]]:
    """What is noted of a run since it last began from committed weights, or from nothing; that comes first.

    Raises:
        UserError: `train` did not make this run.
    """
    found: list[dict[str, Any]] = []
    if notes(run).is_file():
        for line in notes(run).read_text().splitlines():
            with suppress(UserError):  # a line that a kill has cut
                row = parse_json(line, notes(run))
                found = [row] if "updates" in row else [*found, row]
    if not found or "updates" not in found[0]:
        raise UserError(f"{notes(run)}: does not tell what {run} began from; `relay train NAME {run}` makes both")
    return found


def note(run: Path, **row: Any) -> None:
    notes(run).parent.mkdir(parents=True, exist_ok=True)
    text = notes(run).read_text() if notes(run).is_file() else ""
    cut = "\n" * (bool(text) and not text.endswith("\n"))  # by a kill
    with notes(run).open("a") as f:
        f.write(f"{cut}{json.dumps(row)}\n")


def committed(folder: Path) -> dict[str, Any]:
    """relay.json of a teacher's folder; empty where there is none."""
    file = folder / "relay.json"
    return read_json(file) if file.is_file() else {}


def begun(name: str, run: Path) -> Path:
    """The folder that a run began from: its own copy, beside it, or before there is one the assets'."""
    kept = beside(run, "-begun")
    return kept if kept.is_dir() else expanded(f"assets:{name}")


def of_leg(name: str, run: Path) -> Recipe:
    """The recipe of a run: its own, the teacher's, or that of a start from committed weights, kept beside it."""
    if (run / "recipe.yaml").is_file():
        return load_run(run)
    relay = committed(expanded(f"assets:{name}"))
    if not relay:
        return load(f"{name}-long")
    kept = beside(run, "-begun")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(expanded(f"assets:{name}"), kept)
    fresh = sum(leg["moments"] == "fresh" for leg in relay["legs"])
    settings = [f"teacher={{name: diffusers, path: '{kept}'}}", "student={name: copy, of: teacher}"]
    return load(f"{name}-long", [*settings, f"optim.student.warmup={WARM_UP}", f"train.seed={fresh}"])


def train(name: str, run: Path) -> None:
    """A leg, until it is stopped."""
    recipe = of_leg(name, run)
    if recipe.about != load(f"{name}-long").about:
        raise UserError(f"{run}: is a run of another recipe than {name}-long: {recipe.about}")
    earlier, started = 0.0, time.process_time()

    def on_step(t: Trainer) -> None:
        if t.progress.done % EVERY == 0 or t._stop:
            note(run, done=t.progress.done, spent=round(earlier + time.process_time() - started, 1))

    trainer = Trainer(recipe, run, hooks=Hooks(on_step=on_step), cpu=True)
    kept = trainer.resume()
    if kept:
        earlier = max((r["spent"] for r in rows(run) if "spent" in r), default=0.0)
    else:
        relay = committed(begun(name, run))
        core = relay.get("core_seconds", {"training": 0, "evaluation": 0})
        base = {"updates": relay.get("updates", 0), "legs": len(relay.get("legs", []))}
        note(run, **base, core_s=core["training"], evaluated_s=core["evaluation"])
    started = time.process_time()  # opening data is no training
    now, moments = datetime.now().isoformat(" ", "seconds"), "kept" if kept else "fresh"
    note(run, leg=trainer.progress.done, started=now, commit=commit()[:7], moments=moments, seed=recipe.train.seed)
    with suppress(KeyboardInterrupt):
        trainer.fit()


def averaged(run: Path, name: str) -> Product:
    """The product of the newest checkpoint with the weights of one of its averages."""
    product = open_product(run)
    assert product.checkpoint is not None
    file = product.checkpoint / f"{name}.safetensors"
    if not file.is_file():
        found = ", ".join(sorted(p.stem for p in product.checkpoint.glob("ema_*.safetensors")))
        raise UserError(f"--average {name}: {product.checkpoint} has {found}")
    load_into(product.net, load_tensors(file), file)
    return product


def spent(run: Path, done: int) -> float:
    """Processor seconds of training up to so many updates of a run, and of what it began from."""
    known = rows(run)
    here = (r["spent"] for r in known if "spent" in r and r["done"] <= done)
    return float(known[0]["core_s"] + max(here, default=0.0))


def evaluations(product: Product, how: How) -> Iterator[dict[str, Any]]:
    """A teacher's samples as rows of relay.json."""
    recipe = product.recipe
    assert recipe is not None
    assert recipe.evaluate is not None
    spec = recipe.evaluate
    spec = replace(spec, samples=how.samples or spec.samples, metric=how.preset or spec.metric)
    for steps in how.steps:
        for scale in how.guidance:
            began = time.process_time()
            judged = guided_product(teacher_product(product, product.net, steps), scale)
            found = measure(judged, judge_of(judged, spec), timed=False, say=PROGRESS.print, console=PROGRESS)[0]
            yield {
                "average": how.average,
                "heun_steps": steps,
                "guidance": scale,
                "samples": found.number,
                "seed": spec.seed,
                "reference": found.reference,
                "core_s": round(time.process_time() - began, 1),
                "metric": distance_of(found),
                "value": found.distance.value,
                "error": found.distance.standard_error,
                **{k: v for k, start in SHOWN.items() if (v := found.value(start)) is not None},
            }


def look(run: Path, how: How) -> list[dict[str, Any]]:
    """Measure an average and keep the numbers beside the run."""
    product, known = averaged(run, how.average), rows(run)
    out = []
    for row in evaluations(product, how):
        told = {
            "done": known[0]["updates"] + product.done,
            "train_core_s": round(spent(run, product.done), 1),
            "leg": known[0].get("legs", 0) + len(legs(run, product.done)),
        }
        out.append(told | row)
        note(run, look=out[-1])
    return out


def legs(run: Path, done: int) -> list[dict[str, Any]]:
    """The legs of a run, their updates counted on from those before it; one that a kill left without any is none."""
    base, *known = rows(run)
    found: list[dict[str, Any]] = []
    for row in (r for r in known if "leg" in r and r["leg"] < done):
        found = [*(r for r in found if r["leg"] < row["leg"]), row]
    ends = [*(r["leg"] for r in found[1:]), done]
    first, keys = base["updates"], ("started", "commit", "moments", "seed")
    each = zip(found, ends, strict=True)
    return [{"from": first + r["leg"], **{k: r[k] for k in keys}, "to": first + end} for r, end in each]


def ship(name: str, run: Path, into: Path, how: How) -> Path:
    """Write `into`/`name`, a teacher of the assets; what is there goes when the new one is in place.

    Raises:
        UserError: what is there is no such teacher; the weights are too large to ship.
    """
    target = into / name
    there = committed(target)
    if target.is_symlink() or (target.exists() and not there):
        raise UserError(f"{target}: is not a teacher with a relay.json; choose another folder (--into)")
    product, base = averaged(run, how.average), rows(run)[0]
    done, recipe = product.done, load(f"{name}-long")
    product = replace(product, recipe=recipe, done=base["updates"] + done, title=name)
    folder, old = into / aside_name(name), into / aside_name(f"{name}-old")
    try:
        export(product, folder)
        if (size := sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())) > LARGEST:
            raise UserError(f"{name}: has {size / 2**20:.1f} MiB, {LARGEST / 2**20:.0f} may ship")
        net: Any = load_denoiser(str(folder), classes=product.classes or None, size=product.shape[1:])  # type: ignore[arg-type]
        measured = []
        for row in evaluations(replace(product, net=net.eval()), how):
            measured.append({**row, "of": "the exported fp16 weights"})
            note(run, shipped=measured[-1])
        known = history(there or committed(begun(name, run)), run, done)
        told = {"batch": recipe.train.batch, **known, "average": how.average, "measured": measured}
        shutil.rmtree(folder)
        export(product, folder, results=card(name, told))
        (folder / "relay.json").write_text(json.dumps(told, indent=1) + "\n")
        (folder / MARK).unlink(missing_ok=True)
        if target.exists():
            target.rename(old)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    return target


def history(relay: dict[str, Any], run: Path, done: int) -> dict[str, Any]:
    """Updates, legs and evaluations of a run and, from `relay`, of the teacher that it began from."""
    base, *known = rows(run)
    first = base["updates"]
    every = [leg for leg in relay.get("legs", []) if leg["to"] <= first] + legs(run, done)
    looks = [row["look"] for row in known if "look" in row]
    measured = [row[kind] for row in known for kind in ("look", "shipped") if kind in row]
    return {
        "updates": first + done,
        "core_seconds": {
            "training": round(spent(run, done)),
            "evaluation": round(base.get("evaluated_s", 0) + sum(row["core_s"] for row in measured)),
        },
        "seed": every[-1]["seed"],
        "commit": every[-1]["commit"],
        "legs": every,
        "shipped_before": [
            *relay.get("shipped_before", []),
            *({"updates": relay["updates"], **row} for row in relay.get("measured", [])),
        ],
        "evaluations": [*(row for row in relay.get("evaluations", []) if row["done"] <= first), *looks],
    }


def card(name: str, told: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the card."""
    others = {e["average"] for e in told["evaluations"] if e["done"] == told["updates"]} - {told["average"]}
    beside = f"also measured: {', '.join(sorted(others))} (relay.json)" if others else "no other average was measured"
    again = sum(leg["moments"] == "fresh" and leg["from"] > 0 for leg in told["legs"])
    out = [
        ("command", f"python -m fewstep.bench.relay train {name} RUN, stopped at the updates of relay.json"),
        ("commit", told["commit"]),
        ("updates, batch, seed", f"{told['updates']}, {told['batch']}, {told['seed']}"),
        ("core-hours of training", f"{told['core_seconds']['training'] / 3600:.2f} on one core"),
        ("legs", f"{len(told['legs'])}, of which {again} began from the weights that had shipped"),
        ("weights", f"{told['average']}; {beside}"),
    ]
    for row in told["measured"]:
        how = f"{row['heun_steps']} Heun steps, guidance {row['guidance']:g}, N = {row['samples']}"
        error = f" ± {row['error']:.2f}" if row["error"] is not None else ""
        out.append((f"{row['metric']} against {row['reference']}, {how}", f"{row['value']:.2f}{error}"))
        out += [(f"{start} of the same samples", f"{row[k]:.3f}") for k, start in SHOWN.items() if k in row]
    return [*out, ("curve", "relay.json")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.relay", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("train", "look", "ship"):
        sub = kinds.add_parser(kind)
        if kind != "look":
            sub.add_argument("name", help="a teacher of the assets, such as fashion-teacher")
        sub.add_argument("run", type=Path, help="its run directory")
        if kind != "train":
            sub.add_argument("--average", default=How.average)
            sub.add_argument("--samples", type=int, help="left out: the recipe's")
            sub.add_argument("--steps", type=int, nargs="+", default=list(How.steps), help="Heun steps")
            sub.add_argument("--guidance", type=float, nargs="+", default=list(How.guidance))
            sub.add_argument("--preset", help="a protocol; left out: the recipe's")
        if kind == "ship":
            sub.add_argument("--into", type=Path, default=Path("assets"))
    given = parser.parse_args(argv)
    if given.kind == "train":
        return train(given.name, given.run)
    how = How(given.average, given.steps, given.guidance, given.samples, given.preset)
    if given.kind == "ship":
        print(ship(given.name, given.run, given.into, how))
        return None
    for row in look(given.run, how):
        print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
