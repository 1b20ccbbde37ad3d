"""All that wants a GPU in one go, within nine minutes on a bare machine: one CSV and one Markdown page.

python -m fewstep.bench.gpu [--minutes 9] [--out gpu] [--data FOLDER] [--rehearse]

First a student of Fashion-MNIST (`--data`: its four files), then memory and time of a DMD2 step on an SDXL of random
weights under the settings of 24 GB beside the estimate, the table of the attention kernels, what bf16 and compilation
change, and the tests marked gpu. Each part is a process group of its own, which ends at its limit; its rows stand in a
file of OUT from the moment they are known, so that one that fails or is ended keeps what it had, and the others go on.

Of 540 s the student has 420: 300 s of training, which nothing before it can shorten, and SPARE around them. The others
have at least 45, 25, 20 and 15 s, and each also what those before it left; 15 s are this process's own. With fewer
minutes the training is shorter. `--rehearse` does the same on a CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.bench.adapters import place
from fewstep.commands.compare import curve
from fewstep.commands.compare.kept import left_by
from fewstep.commands.plan import MIB, measured
from fewstep.config import UserError, plain
from fewstep.files import atomic_path, commit
from fewstep.kernels.bench import record

TRAINING = 300.0
"""Seconds of the student's training."""
SPARE = 120.0
"""Seconds around it: three processes that start with CUDA and see 60,000 images, the teacher at one number of steps, the
probe, three points of the curve, the last evaluation."""
SHARES = {"student": TRAINING + SPARE, "sdxl": 45.0, "kernels": 25.0, "switches": 20.0, "tests": 15.0}
"""Seconds that each part has whatever the others take, in this order."""
OWN = 15.0
"""Seconds for the start of this process and its pages."""
TINY = {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [2, 4, 4],
    "transformer_layers_per_block": [1, 1, 1],
    "sample_size": 8,
}
"""What a rehearsal changes of SDXL's config."""
PLAIN = "digits-dmd2 as it is"
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


def parts(out: Path, rehearse: bool, seconds: float) -> Iterator[tuple[str, list[str], float]]:
    """Name, command and limit of each part, asked as it begins: what is left of `seconds` without later ones' shares."""
    started = time.monotonic()
    later = dict(SHARES)
    for name in SHARES:
        del later[name]
        limit = max(10.0, seconds - (time.monotonic() - started) - sum(later.values()) - OWN)
        yield name, command(name, out, rehearse, limit), limit


def command(name: str, out: Path, rehearse: bool, limit: float) -> list[str]:
    """What runs a part."""
    python = [sys.executable, "-m"]
    if name == "student":
        budget = f"seconds={3 if rehearse else min(TRAINING, max(5.0, limit - SPARE)):.0f}"
        recipe = ["toy/dmd2"]
        if not rehearse:
            recipe = ["fashion-dmd2", "--set", "teacher.path=assets:fashion-teacher", "--samples", "2000"]
            recipe += ["--set", "evaluate.teacher_steps=[18]"]
        more = ["--budget", budget, "--seeds", "1", "--curve", "4", "--out", str(out / "student")]
        return [*python, "fewstep", "compare", *recipe, *more]
    if name == "kernels":
        table = str(out / "kernels.csv")
        return [*python, "fewstep.kernels.bench.attention", "--quick", "--device", "cuda", "--out", table]
    if name == "tests":
        tests = Path(__file__).parents[2] / "tests"  # in a checkout; the whole suite takes longer to collect than these
        marked = [str(p) for p in sorted(tests.rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text()]
        return [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *marked]
    return [*python, "fewstep.bench.gpu", *(["--rehearse"] if rehearse else []), "--part", name, "--out", str(out)]


def sdxl(rehearse: bool) -> Iterator[Row]:
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
        worst = "worst moment of a DMD2 step, LoRA sets on a bf16 base, one sample"
        yield Row("sdxl", worst, f"{took:.0f}", "MiB", f"{said:.0f}")
        _, step = prepare(str(file), settings)
        step()
        yield Row("sdxl", "a step", f"{min(seconds_of(step) for _ in range(2 if rehearse else 3)):.2f}", "s")


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


def switches(rehearse: bool) -> Iterator[Row]:
    """Peak and seconds of a step of digits-dmd2, with bf16 and with compiled networks, and these over the plain ones."""
    from fewstep.bench.switches import apart

    batch = [f"train.batch={8 if rehearse else 1024}"]
    base: dict[str, float] = {}
    for switch in SWITCHES[: 2 if rehearse else 3]:
        found = apart("digits-dmd2", [*batch, *switch])
        name = " ".join(switch) or PLAIN
        if isinstance(found, str):
            yield Row("switches", name, found)
            continue
        base = base if switch else found
        yield Row("switches", f"{name}: peak", f"{found['peak']:.1f}", "MiB")
        yield Row("switches", f"{name}: step", f"{found['seconds']:.4f}", "s")
        for key, what in (("peak", "peak"), ("seconds", "step")) if switch and base else ():
            yield Row("switches", f"{name}: {what}", f"{found[key] / base[key]:.2f}", f"of {PLAIN}")


def student_rows(folder: Path) -> list[Row]:
    """FD of teacher and student and what the training took; of one that was ended, its curve's last point."""
    rows = []
    for file in sorted(folder.glob("teachers/*/result.json")):
        rows += [distance_row(row["name"], row) for row in (left_by(file) or {"rows": []})["rows"]]
    asked = (left_by(folder / "compare.json") or {}).get("evaluation", {})
    for run in sorted(folder.glob("*/seed-*")):
        name, points = run.parent.name, curve.read(run / "curve.jsonl")
        result, where = left_by(run / "result.json"), ""
        if result is not None:
            rows += [distance_row(name, row) for row in result["rows"]]
        elif points:
            result, where = points[-1], " at the curve's last point"
            told = {"metrics": {str(asked.get("metric")): result}, "number": asked.get("samples")}
            rows.append(distance_row(name, told, where))
        if result is not None:
            rows.append(Row("student", f"{name}: updates{where}", f"{result['updates']:.0f}"))
            rows.append(Row("student", f"{name}: training{where}", f"{result['seconds']:.0f}", "s"))
    for file in sorted(folder.rglob("failure.json")):
        told = (left_by(file) or {}).get("message", "left no message")
        rows.append(Row("student", f"{file.parent.relative_to(folder)}: failed", str(told)))
    return rows


def distance_row(name: str, row: Mapping[str, Any], where: str = "") -> Row:
    """The first metric of an evaluation."""
    metric = next(iter(row["metrics"]))
    return Row("student", f"{name}: {metric}, N={row['number']}{where}", f"{row['metrics'][metric]['value']:.2f}")


def known(name: str, out: Path) -> list[Row]:
    """The rows that a part has left in OUT by now."""
    if name == "student":
        return student_rows(out / "student")
    if name == "kernels":
        found = record.read(out / "kernels.csv")
        return [Row(name, f"{r.case}: {r.metric}{r.at_least and f' (goal {r.at_least})'}", r.value) for r in found]
    file = out / f"{name}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]  # a kill may have cut the last one


def run(
    name: str, command: Sequence[str], limit: float, out: Path, environment: Mapping[str, str] | None = None
) -> list[Row]:
    """One part, with every process it starts, within its limit; what it prints is kept in OUT/NAME.log.

    Whatever ends it, rows come back: those it has left, and how it ended.
    """
    started = time.monotonic()
    code = None
    with (out / f"{name}.log").open("w") as log:
        part = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )
        with part:
            try:
                code = part.wait(limit)
            except subprocess.TimeoutExpired:
                pass
            finally:  # Ctrl-C too does not reach it: it has a session of its own
                with suppress(ProcessLookupError):
                    os.killpg(part.pid, signal.SIGKILL)
    lines = (out / f"{name}.log").read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    try:
        rows = known(name, out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        rows = [Row(name, "left what cannot be read", f"{type(error).__name__}: {error}")]
    if code is None:
        return [*rows, Row(name, "ended at its limit", f"{limit:.0f}", "s"), Row(name, "said last", last)]
    took = Row(name, "took", f"{time.monotonic() - started:.0f}", "s")
    # Exit code 5 of pytest: no test is for this machine.
    if code and not (name == "tests" and code == 5):
        return [*rows, Row(name, f"failed with exit code {code}", last), took]
    return [*rows, *([] if rows else [Row(name, "said", last)]), took]


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


def shown(file: Path) -> str:
    """What the documentation shows of a kept OUT/gpu.md: device, commit, figures beside their estimates."""
    if not file.exists():
        return "Not run: no GPU was at hand so far."
    title, _, rest = file.read_text().partition("\n\n")
    return f"{title.removeprefix('# ')}. {rest.strip()}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fewstep.bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="new folder, or an empty one")
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--part", choices=("sdxl", "switches"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.part:
        for row in {"sdxl": sdxl, "switches": switches}[given.part](given.rehearse):
            with (given.out / f"{given.part}.jsonl").open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        return
    if not given.rehearse and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device is here; --rehearse does the same on a CPU at toy sizes")
    given.out.mkdir(parents=True, exist_ok=True)
    if any(given.out.iterdir()):
        raise SystemExit(f"error: {given.out} is not empty; delete it, or choose another --out")
    # The measure reads the images too, so the recipe's data.path would not do.
    environment = {} if given.data is None else {"FEWSTEP_FASHION_MNIST": str(given.data.resolve())}
    rows: list[Row] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part's processes are ended too
    try:
        for name, words, limit in parts(given.out, given.rehearse, 60 * given.minutes):
            print(f"{name}: at most {limit:.0f} s", flush=True)
            rows += run(name, words, limit, given.out, environment)
            write(rows, given.out)  # after each part: what there is stays
    finally:
        signal.signal(signal.SIGTERM, before)
    print((given.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
