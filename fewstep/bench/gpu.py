"""All that wants a GPU in one go, within some minutes on a bare machine: one CSV and one Markdown page.

python -m fewstep.bench.gpu [--minutes 9] [--out gpu] [--data FOLDER] [--rehearse]

The tests marked gpu, the table of the attention kernels, memory and time of a DMD2 step on an SDXL of random
weights under the settings of 24 GB beside the estimate, what bf16 and compilation change, and in what is left of
the time a student of Fashion-MNIST (`--data`: its four files). Each part is a process of its own with a limit;
one that fails or ends at its limit has a row that says so, and the others go on. `--rehearse` does the same on a
CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.bench.adapters import place
from fewstep.commands.plan import MIB, measured
from fewstep.config import plain
from fewstep.files import atomic_path, commit

LIMITS = {"sdxl": 150.0, "switches": 80.0, "kernels": 70.0, "tests": 60.0}
"""Seconds at most of each part, in this order."""
SPARE = 40.0
"""Of the last part's time, for its evaluation and the page."""
TINY = {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [2, 4, 4],
    "transformer_layers_per_block": [1, 1, 1],
    "sample_size": 8,
}
"""What a rehearsal changes of SDXL's config."""
SWITCHES = ((), ("train.precision=bf16",), ("train.compile=[student, teacher, critic]",))


@dataclass(frozen=True)
class Row:
    """One figure; value is a number as text, or says why there is none."""

    part: str
    what: str
    value: str
    unit: str = ""
    estimate: str = ""
    """What was said without a GPU, in the same unit."""


def parts(out: Path, data: Path | None, rehearse: bool, seconds: float) -> Iterator[tuple[str, list[str], float]]:
    """Name, command and limit in seconds of each part; the last has what is left of `seconds`, asked as it begins."""
    started = time.monotonic()
    own = [sys.executable, "-m", "fewstep.bench.gpu", *(["--rehearse"] if rehearse else [])]
    kernels = [sys.executable, "-m", "fewstep.kernels.bench.attention", "--quick"]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    commands = {"sdxl": [*own, "--sdxl"], "switches": [*own, "--switches"], "tests": tests}
    if not rehearse:  # on a CPU it takes minutes, and the suite runs its pieces
        commands["kernels"] = kernels
    for name in LIMITS:
        if name in commands:
            yield name, commands[name], LIMITS[name]
    left = max(20.0, seconds - (time.monotonic() - started))
    budget = ["--budget", f"seconds={3 if rehearse else max(5.0, left - SPARE):.0f}", "--seeds", "1", "--curve", "4"]
    recipe = ["toy/dmd2"] if rehearse else ["fashion-dmd2", "--set", "teacher.path=assets:fashion-teacher"]
    files = [] if data is None or rehearse else ["--set", f"data.path={data}"]
    yield (
        "student",
        [sys.executable, "-m", "fewstep", "compare", *recipe, *files, *budget, "--out", str(out / "student")],
        left,
    )


def sdxl(rehearse: bool) -> list[Row]:
    """A DMD2 step of LoRA sets on an SDXL in bf16, as `fewstep new --memory 24G` makes the recipe, beside its plan."""
    from accelerate.state import AcceleratorState

    from fewstep.bench.methods import prepare
    from fewstep.bench.stand_ins import without_text_encoders
    from fewstep.bench.timing import seconds_of
    from fewstep.commands.new_lines import rendered
    from fewstep.commands.new_memory import SETS
    from fewstep.commands.new_pipeline import look, student
    from fewstep.commands.plan import plan
    from fewstep.recipe.store import load

    with tempfile.TemporaryDirectory() as inside:
        folder = random_weights(Path(inside) / "sdxl", TINY if rehearse else {})
        prompts, file = Path(inside) / "prompts.txt", Path(inside) / "mine.yaml"
        prompts.write_text("a prompt\nanother prompt\n")
        family = look(str(folder))
        file.write_text(rendered(student(family, "dmd2", 4, fit=SETS[-1], prompts=prompts, latents=None)))
        without_text_encoders(family.wrapper, "random")  # which are not part of a step
        settings = [f"data.text_cache={inside}/cache", "train.batch=1", "train.accumulate=1"]
        recipe = load(str(file), settings)
        said = plan(recipe, ways=False).total / MIB
        AcceleratorState._reset_state(True)  # a process has one precision otherwise, and a plan is made in float32
        took = measured(recipe, cpu=rehearse) / MIB
        _, step = prepare(str(file), settings)
        step()
        seconds = min(seconds_of(step) for _ in range(2 if rehearse else 3))
    return [
        Row(
            "sdxl",
            "worst moment of a DMD2 step, LoRA sets on a bf16 base, one sample",
            f"{took:.0f}",
            "MiB",
            f"{said:.0f}",
        ),
        Row("sdxl", "a step", f"{seconds:.2f}", "s"),
    ]


def random_weights(to: Path, changes: dict[str, Any]) -> Path:
    """A pipeline's folder of the shipped SDXL configs with drawn weights, made on the GPU where there is one."""
    from fewstep.bench.stand_ins import save_vae
    from fewstep.export.forecast import bare_model
    from fewstep.networks.folder import read_folder, resolve

    shutil.copytree(resolve("assets:configs/sdxl"), to)
    file = to / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = bare_model(read_folder(str(to))).to(torch.bfloat16).to_empty(device=device)
    for tensor in network.parameters():
        tensor.data.normal_(std=0.02)
    network.save_pretrained(to / "unet")
    save_vae(to / "vae", 4)
    return to


def switches(rehearse: bool) -> list[Row]:
    """Peak and seconds of a step of digits-dmd2 with bf16 and with compiled networks, over those without."""
    from fewstep.bench.switches import apart

    batch = [f"train.batch={8 if rehearse else 1024}"]
    base: Any = None
    rows = []
    for switch in SWITCHES[: 2 if rehearse else 3]:
        found = apart("digits-dmd2", [*batch, *switch])
        name = " ".join(switch) or "digits-dmd2 as it is"
        if isinstance(found, str):
            rows.append(Row("switches", name, found))
            continue
        base = base or found
        rows += [Row("switches", f"{name}: peak", f"{found['peak'] / base['peak']:.2f}", "of the first")]
        rows += [Row("switches", f"{name}: step", f"{found['seconds'] / base['seconds']:.2f}", "of the first")]
    return rows


def student_rows(out: Path) -> list[Row]:
    """The student's FD and what it took, by results.json of the comparison."""
    told = json.loads((out / "student" / "results.json").read_text())
    rows = []
    for row in [*told["rows"], *told["teachers"]]:
        metric = next(iter(row["metrics"]))
        rows.append(
            Row("student", f"{row['name']}: {metric}, N={row['number']}", f"{row['metrics'][metric]['value']:.2f}")
        )
    for row in told["rows"]:
        rows.append(Row("student", f"{row['name']}: updates", str(row["training"]["updates"])))
        rows.append(Row("student", f"{row['name']}: training", f"{row['training']['seconds']:.0f}", "s"))
    return rows


def run(name: str, command: Sequence[str], limit: float, out: Path) -> list[Row]:
    """One part within its limit; its output is kept in OUT/NAME.log."""
    started = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return [Row(name, "ended at its limit", f"{limit:.0f}", "s")]
    lines = (out / f"{name}.log").read_text().splitlines()
    last = lines[-1] if lines else ""
    took = Row(name, "took", f"{time.monotonic() - started:.0f}", "s")
    # Exit code 5 of pytest: no test is for this machine.
    if code and not (name == "tests" and code == 5):
        return [Row(name, f"failed with exit code {code}", last), took]
    if name == "student":
        return [*student_rows(out), took]
    if name in ("sdxl", "switches"):
        return [*(Row(**row) for row in json.loads(last)), took]
    return [Row(name, "said", last), took]


def write(rows: Sequence[Row], out: Path) -> None:
    """OUT/gpu.csv and OUT/gpu.md."""
    with atomic_path(out / "gpu.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [f"# On {place()}", "", f"Commit {commit()[:12]}, torch {torch.__version__}.", ""]
    lines += ["| part | what | value | unit | estimate |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(str(v).replace("|", "\\|") for v in plain(row).values()) + " |" for row in rows]
    with atomic_path(out / "gpu.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    for part in ("--sdxl", "--switches"):
        parser.add_argument(part, action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.sdxl or given.switches:
        print(json.dumps([asdict(row) for row in (sdxl if given.sdxl else switches)(given.rehearse)]))
        return
    if not given.rehearse and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device is here; --rehearse does the same on a CPU at toy sizes")
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name, command, limit in parts(given.out, given.data, given.rehearse, 60 * given.minutes):
        print(f"{name}: at most {limit:.0f} s", flush=True)
        rows += run(name, command, limit, given.out)
        write(rows, given.out)  # after each part: what there is stays
    print((given.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
