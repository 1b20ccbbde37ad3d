"""Full-budget training of the toy recipes.

    python -m fewstep.bench.conformance [NAMES] [--steps N] [--seed S] [--out FILE]

Prints the energy distance x1000 to the ring at each recipe's own sampler, beside that of the student at the start
of the method and that of two exact sets, and puts one JSON object per recipe into FILE.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.algebra.draws import Draws, fold
from fewstep.bench.boards import is_guided
from fewstep.config import UserError
from fewstep.eval import energy_distance
from fewstep.files import atomic_path, commit
from fewstep.recipe.schema import Recipe
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.product import product_of
from fewstep.train.trainer import Hooks, Trainer

SAMPLES = 4000


@dataclass(frozen=True)
class Outcome:
    """One trained recipe. Energies are x1000 over SAMPLES samples; seconds are wall time of the whole run."""

    recipe: str
    method: str
    calls: int
    updates: int
    seed: int
    energy: float
    initial: float
    floor: float
    seconds: float
    commit: str
    guided: bool = False
    """The recipe aims at a guided distribution or a reward, which is not the ring's: its energy is no verdict."""
    before: str = ""
    """Commit since which the method's loss or the recipe is another than it was for this number."""
    alarms: tuple[str, ...] | None = None
    """The guard's alarms in the order they came, as "update: name"; None in rows from before they were kept."""

    @property
    def verdict(self) -> str:
        """Whether training helped; a method that ends worse than it began is a failure."""
        if self.guided:
            return "aims elsewhere"
        return "better than its start" if self.energy < self.initial else "WORSE THAN ITS START"


def reference(data: Any) -> tuple[torch.Tensor, float]:
    """SAMPLES exact samples (n, d) float64 and the energy distance x1000 between two such sets."""
    real, _ = data.all()
    fresh, _ = data.batch(Draws(fold("conformance floor"), torch.arange(SAMPLES)))
    real = real[:SAMPLES].double()
    return real, 1000 * energy_distance(fresh.double(), real)


def measure(trainer: Trainer, recipe: Recipe, real: torch.Tensor, net: Any = None) -> float:
    """Energy distance x1000 of a student under its recipe's sampler."""
    product = product_of(recipe, net or trainer.product, trainer.data, "student")
    labels = None
    if product.classes:
        # Modes have unequal weights: labels must come as the data's do, not in turn.
        _, labels = trainer.data.batch(Draws(fold("conformance labels"), torch.arange(SAMPLES)))
    return 1000 * energy_distance(product.draw(SAMPLES, 1000, labels).double(), real)


def train(name: str, steps: int, seed: int) -> Outcome:
    """Train one recipe with `steps` student updates in its last stage."""
    recipe = load(name, [f"train.steps={steps}", f"train.seed={seed}"])
    if recipe.evaluate is None or recipe.evaluate.metric != "energy":
        raise UserError(f"{name}: is not measured by energy distance; conformance takes toy recipes")
    started = time.perf_counter()
    initial = float("nan")
    alarms: list[str] = []

    def told(line: str) -> None:
        if "ALARM " in line:
            alarms.append(f"{trainer.progress.done}: {line.partition('ALARM ')[2].partition(':')[0]}")

    def on_step(t: Trainer) -> None:
        nonlocal initial
        if t.progress.stage == len(recipe.before) and t.progress.step == 0:
            initial = measure(t, recipe, real, t.roles.student)

    trainer = Trainer(recipe, None, hooks=Hooks(on_step=on_step, on_guard=told), cpu=True)
    real, floor = reference(trainer.data)
    if not recipe.before:
        initial = measure(trainer, recipe, real, trainer.roles.student)
    trainer.fit()
    energy = measure(trainer, recipe, real)
    seconds = time.perf_counter() - started
    calls = recipe.sampler().network_calls()
    method = recipe.method.name  # type: ignore[attr-defined]
    guided = is_guided(recipe) or "reward" in recipe.roles
    at = commit()[:7]
    return Outcome(
        name, method, calls, steps, seed, energy, initial, floor, round(seconds, 1), at, guided, alarms=tuple(alarms)
    )


def record(path: Path, row: Mapping[str, Any]) -> None:
    """Put a recipe's row into a file of JSON lines, in place of its earlier one."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["recipe"] != row["recipe"]]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*kept, json.dumps(row)]) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.conformance", description=__doc__)
    parser.add_argument("names", nargs="*", help="toy recipes, such as toy/dmd2; all of them when left out")
    parser.add_argument("--steps", type=int, default=1500, help="student updates of the last stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("conformance.jsonl"))
    given = parser.parse_args(argv)
    names = given.names or [n for n in shipped() if n.startswith("toy/")]
    print(f"{'recipe':28}{'calls':>6}{'energy':>10}{'start':>10}{'floor':>8}{'seconds':>9}")
    for name in names:
        o = train(name, given.steps, given.seed)
        record(given.out, {k: v for k, v in asdict(o).items() if k != "before" or v})
        print(
            f"{o.recipe:28}{o.calls:>6}{o.energy:>10.3f}{o.initial:>10.3f}{o.floor:>8.3f}{o.seconds:>9.0f}  {o.verdict}",
            flush=True,
        )


if __name__ == "__main__":
    main()
