"""What each switch of a recipe changes: peak of tensors and seconds of a step, against the recipe without it.

python -m fewstep.bench.switches [RECIPE] [KEY=VALUE ...]

Every setting runs in a process of its own, and the recipe as it is anew before each; the first row, without a change,
shows what the scatter is. The table is Markdown; a setting that this machine cannot run says why.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from fewstep.bench.adapters import place
from fewstep.bench.methods import prepare
from fewstep.bench.timing import seconds_of
from fewstep.commands.plan import MIB, measured
from fewstep.config import UserError
from fewstep.recipe.store import load

LORA = "{name: lora, of: teacher, rank: 16}"
SWITCHES: tuple[tuple[str, ...], ...] = (
    (),
    ("train.checkpointing=true",),
    ("train.accumulate=4",),
    ("train.precision=bf16",),
    ("train.offload=true",),
    ("optim.student.bits=8", "optim.critic.bits=8"),
    ("train.ema=[]",),
    (f"student={LORA}", f"critic={LORA}"),
    ("train.channels_last=true",),
    ("train.attention=sdpa",),
    ("train.attention=xformers",),
    ("method.share_rollout=false",),
    ("train.compile=[student, teacher, critic]",),
)
"""Of a DMD2 recipe that shares its rollout. The first, without a change, is what the others are compared with."""


def one(recipe: str, settings: Sequence[str], steps: int = 5) -> dict[str, float]:
    """MiB at the worst moment of a step, and the least seconds of `steps` after the first."""
    peak = measured(load(recipe, settings)) / MIB
    _, step = prepare(recipe, settings)
    step()
    return {"peak": peak, "seconds": min(seconds_of(step) for _ in range(steps))}


def apart(recipe: str, settings: Sequence[str]) -> dict[str, float] | str:
    """`one` in a process of its own; the reason as a line where it failed."""
    command = [sys.executable, "-m", "fewstep.bench.switches", "--one", recipe, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return f"said no figures but {done.stdout[-80:]!r}"


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--one"]:
        try:
            print(json.dumps(one(argv[1], argv[2:])))
        except UserError as error:
            raise SystemExit(f"{error}") from None
        return
    recipe, settings = (argv[0], argv[1:]) if argv else ("digits-dmd2", ["train.batch=256"])
    base = apart(recipe, settings)
    if isinstance(base, str):
        raise SystemExit(base)
    print(f"{recipe} {' '.join(settings)}, {place()}: {base['peak']:.1f} MiB, {base['seconds']:.2f} s a step\n")
    print("| setting | peak | step |\n|---|---|---|", flush=True)
    for switch in SWITCHES:
        base, found = apart(recipe, settings), apart(recipe, [*settings, *switch])
        shown = " ".join(f"`{s}`" for s in switch) or "(again)"
        if isinstance(found, str) or isinstance(base, str):
            print(f"| {shown} | {found if isinstance(found, str) else base} | |", flush=True)
            continue
        ratios = (f"{found[k] / base[k]:.2f}x" for k in ("peak", "seconds"))
        print(f"| {shown} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
