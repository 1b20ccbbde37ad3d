"""Teachers that are trained for hours, by leg: train on from what is committed, measure, ship (assets/relay.md).

python -m fewstep.bench.relay train fashion-teacher RUN
python -m fewstep.bench.relay look RUN [--samples 1000] [--steps 8] [--average ema_0.9997]
python -m fewstep.bench.relay ship fashion-teacher RUN [--samples 10000] [--steps 8] [--into assets]

`train` goes on in RUN, or begins there from the weights of the assets with fresh moments, 500 updates of warm-up and the
next seed; stop it by Ctrl-C or SIGTERM. `look` measures an average and keeps the number beside RUN. `ship` writes the
average as assets/NAME with a card and relay.json, after the legs that are there. RUN.jsonl, beside RUN, holds legs,
processor time and what was looked at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fewstep.commands.judge import judge_of
from fewstep.commands.measure import measure, teacher_product
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import distance_of
from fewstep.export.choose import export
from fewstep.files import commit, expanded, parse_json, read_json
from fewstep.files.folders import MARK
from fewstep.networks.diffusers import load_denoiser
from fewstep.recipe.schema import Recipe
from fewstep.recipe.store import load, load_run
from fewstep.train.product import Product, open_product
from fewstep.train.state import load_into, load_tensors
from fewstep.train.trainer import Hooks, Trainer

WARM_UP = 500
"""Updates over which the rate of a leg with fresh moments rises."""
EVERY = 25
"""Updates between two notes of the processor time."""
SHOWN = ("class accuracy", "diversity", "recall", "precision", "retrieval")
"""What is kept of an evaluation beside the distance."""


def notes(run: Path) -> Path:
    """The file beside a run directory, in which only what fewstep's trainer writes may lie."""
    return run.with_name(f"{run.name}.jsonl")


def rows(run: Path) -> list[dict[str, Any]]:
    file = notes(run)
    return [parse_json(line, file) for line in file.read_text().splitlines()] if file.is_file() else []


def note(run: Path, **row: Any) -> None:
    with notes(run).open("a") as f:
        f.write(json.dumps(row) + "\n")


def committed(name: str) -> dict[str, Any]:
    """relay.json of a teacher in the assets; empty where there is none."""
    file = expanded(f"assets:{name}") / "relay.json"
    return read_json(file) if file.is_file() else {}


def of_leg(name: str, run: Path) -> Recipe:
    """The recipe of a run: its own, the teacher's, or that of a start from committed weights, kept beside it."""
    if (run / "recipe.yaml").is_file():
        return load_run(run)
    relay = committed(name)
    if not relay:
        return load(f"{name}-long")
    kept = run.with_name(f"{run.name}-begun").absolute()
    shutil.copytree(expanded(f"assets:{name}"), kept, dirs_exist_ok=True)
    fresh = sum(leg["moments"] == "fresh" for leg in relay["legs"])
    settings = [f"teacher={{name: diffusers, path: '{kept}'}}", "student={name: copy, of: teacher}"]
    return load(f"{name}-long", [*settings, f"optim.student.warmup={WARM_UP}", f"train.seed={fresh}"])


def train(name: str, run: Path) -> None:
    """A leg, until it is stopped."""
    recipe, known, relay = of_leg(name, run), rows(run), committed(name)
    first = (
        known[0]
        if known
        else {"updates": relay.get("updates", 0), "core_s": relay.get("core_seconds", {}).get("training", 0)}
    )
    if not known:
        note(run, **first)
    spent = max((r["spent"] for r in known if "spent" in r), default=0.0)
    started = time.process_time()

    def on_step(t: Trainer) -> None:
        if t.progress.done % EVERY == 0 or t._stop:
            note(run, done=t.progress.done, spent=round(spent + time.process_time() - started, 1))

    trainer = Trainer(recipe, run, hooks=Hooks(on_step=on_step), cpu=True)
    kept = trainer.resume()
    started = time.process_time()  # opening data is no training
    now = datetime.now().isoformat(" ", "seconds")
    moments = "kept" if kept else "fresh"
    note(run, leg=trainer.progress.done, started=now, commit=commit()[:7], moments=moments, seed=recipe.train.seed)
    with suppress(KeyboardInterrupt):
        trainer.fit()


def average(run: Path, name: str) -> Product:
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
    """Processor seconds of training up to so many updates of a run, earlier runs' too."""
    known = rows(run)
    return known[0]["core_s"] + max(
        (r["spent"] for r in known if r.get("done", done + 1) <= done and "spent" in r), default=0.0
    )


def evaluation(product: Product, steps: int, samples: int, preset: str | None) -> dict[str, Any]:
    """A teacher's samples by `steps` Heun steps as a row of relay.json; preset: None for the recipe's."""
    recipe = product.recipe
    assert recipe is not None
    assert recipe.evaluate is not None
    began = time.process_time()
    judged = teacher_product(product, product.net, steps)
    spec = replace(recipe.evaluate, samples=samples, metric=preset or recipe.evaluate.metric)
    found = measure(judged, judge_of(judged, spec))[0]
    return {
        "metric": distance_of(found),
        "value": found.distance.value,
        "error": found.distance.standard_error,
        "heun_steps": steps,
        "guidance": 1.0,
        "samples": samples,
        "seed": recipe.evaluate.seed,
        "core_s": round(time.process_time() - began, 1),
        "reference": found.reference,
        **{k: v for k in SHOWN if (v := found.value(k)) is not None},
    }


def look(run: Path, name: str, steps: int, samples: int, preset: str | None = None) -> dict[str, Any]:
    """Measure an average and keep the number beside the run."""
    product = average(run, name)
    row = {"done": product.done, "average": name, **evaluation(product, steps, samples, preset)}
    note(run, look=row)
    return row


def legs(run: Path, done: int) -> list[dict[str, Any]]:
    """The legs of a run, their updates counted on from those before it."""
    base = rows(run)[0]["updates"]
    found = [r for r in rows(run) if "leg" in r and r["leg"] < done]
    ends = [*(r["leg"] for r in found[1:]), done]
    keys = ("started", "commit", "moments", "seed")
    return [
        {"from": base + r["leg"], **{k: r[k] for k in keys}, "to": base + e} for r, e in zip(found, ends, strict=True)
    ]


def ship(
    name: str, run: Path, into: Path, chosen: str, steps: Sequence[int], samples: int, preset: str | None = None
) -> Path:
    """Write the folder of the assets; what is there goes when the new one is whole."""
    product, base = average(run, chosen), rows(run)[0]
    done, recipe = product.done, load(f"{name}-long")
    product = replace(product, recipe=recipe, done=base["updates"] + done, title=name)
    with tempfile.TemporaryDirectory(dir=into) as aside:
        folder = Path(aside) / name
        export(product, folder)
        net: Any = load_denoiser(str(folder), classes=product.classes or None, size=product.shape[1:])  # type: ignore[arg-type]
        half = replace(product, net=net.eval())
        what = {"average": chosen, "of": "the exported fp16 weights"}
        measured = [{**what, **evaluation(half, n, samples, preset)} for n in steps]
        told = history(name, run, done) | {"average": chosen, "measured": measured, "batch": recipe.train.batch}
        told["core_seconds"]["evaluation"] += round(sum(row["core_s"] for row in measured))
        shutil.rmtree(folder)
        export(product, folder, results=card(name, told))
        (folder / "relay.json").write_text(json.dumps(told, indent=1) + "\n")
        (folder / MARK).unlink(missing_ok=True)
        shutil.rmtree(into / name, ignore_errors=True)
        folder.rename(into / name)
    return into / name


def history(name: str, run: Path, done: int) -> dict[str, Any]:
    """Updates, legs and evaluations of the committed teacher that the run began from, and of the run."""
    base, relay = rows(run)[0], committed(name)
    begun = base["updates"]
    every = [leg for leg in relay.get("legs", []) if leg["to"] <= begun] + legs(run, done)
    looks = [row["look"] for row in rows(run) if "look" in row]
    here = [{**row, "done": begun + row["done"], "train_core_s": round(spent(run, row["done"]), 1)} for row in looks]
    shipped = [{"updates": relay["updates"], **row} for row in relay.get("measured", [])]
    return {
        "updates": begun + done,
        "core_seconds": {
            "training": round(spent(run, done)),
            "evaluation": round(base.get("evaluated_s", 0) + sum(row["core_s"] for row in looks)),
        },
        "seed": every[-1]["seed"],
        "commit": every[-1]["commit"],
        "legs": every,
        "shipped_before": [*relay.get("shipped_before", []), *shipped],
        "evaluations": [*(row for row in relay.get("evaluations", []) if row["done"] <= begun), *here],
    }


def card(name: str, told: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the card."""
    fresh = sum(leg["moments"] == "fresh" for leg in told["legs"])
    out = [
        ("command", f"`python -m fewstep.bench.relay train {name} RUN`, stopped at the updates of `relay.json`"),
        ("commit", told["commit"]),
        ("updates, batch, seed", f"{told['updates']}, {told['batch']}, {told['seed']}"),
        ("core-hours of training", f"{told['core_seconds']['training'] / 3600:.2f} on one core"),
        ("legs", f"{len(told['legs'])}, of which {fresh} with fresh moments"),
        ("weights", told["average"]),
    ]
    for row in told["measured"]:
        how = f"{row['heun_steps']} Heun steps, guidance {row['guidance']:g}, N = {row['samples']}"
        error = f" ± {row['error']:.2f}" if row["error"] is not None else ""
        out.append((f"{row['metric']}, {how}", f"{row['value']:.2f}{error}"))
        out += [(f"{k} of the same samples", f"{row[k]:.3f}") for k in SHOWN if k in row]
    return [*out, ("curve", "`relay.json`")]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.relay", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("train", "look", "ship"):
        sub = kinds.add_parser(kind)
        if kind != "look":
            sub.add_argument("name", help="a teacher of the assets, such as fashion-teacher")
        sub.add_argument("run", type=Path, help="its run directory")
        if kind != "train":
            sub.add_argument("--average", default="ema_0.9997")
            sub.add_argument("--samples", type=int, default=1000 if kind == "look" else 10_000)
            sub.add_argument("--steps", type=int, nargs="+", default=[8], help="Heun steps")
            sub.add_argument("--preset", help="a protocol; left out: the recipe's")
        if kind == "ship":
            sub.add_argument("--into", type=Path, default=Path("assets"))
    given = parser.parse_args(argv)
    if given.kind == "train":
        train(given.name, given.run)
    elif given.kind == "look":
        for n in given.steps:
            print(look(given.run, given.average, n, given.samples, given.preset), flush=True)
    else:
        print(ship(given.name, given.run, given.into, given.average, given.steps, given.samples, given.preset))


if __name__ == "__main__":
    main()
