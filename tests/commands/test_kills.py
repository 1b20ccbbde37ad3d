"""Commands that write folders, killed at moments spread over their time: nothing half-written is taken for whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import apart
from python_runs import make_runs
from tiny_new import make_pictures
from tiny_pipelines import vae
from tiny_runs import in_child, killed

MOMENTS = 12


def struck(job: Callable[[], Any], check: Callable[[], None]) -> int:
    """Kill `job` at MOMENTS spread over the time that it takes, `check` after each; how many kills found it at work."""
    started = time.monotonic()
    assert in_child(job) == 0
    whole = time.monotonic() - started
    count = 0
    for k in range(MOMENTS):
        count += killed(in_child(job, lambda: True, whole * (k + 0.5) / MOMENTS))
        check()
    assert in_child(job) == 0
    check()
    return count


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of a card, which names its folder, what follows its last block."""
    held = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {n: b.rpartition(b"```")[2] if n == "README.md" else b for n, b in held.items()}


def drive_export(folder: str) -> None:
    from fewstep.commands.export import export_run
    from fewstep.export.choose import export
    from fewstep.train.product import open_product

    run = make_runs(Path(folder)) / "runs" / "digits"
    export(open_product(run), Path(folder) / "reference")
    reference = files(Path(folder) / "reference")

    def check() -> None:
        if (run / "export").exists():
            assert files(run / "export") == reference

    count = struck(lambda: export_run(run, None, False), check)
    left = [p.name for p in run.iterdir() if "tmp" in p.name]
    assert left == [], left
    print(count)


def drive_cache(folder: str) -> None:
    from fewstep.commands.cache_latents import cache_latents
    from fewstep.data.latents import Latents

    root = Path(folder)
    make_pictures(root / "photos", 24, (16, 16))
    vae(4, scaling_factor=0.18215).save_pretrained(root / "vae")
    (root / "mine.yaml").write_text(
        f"about: cache\ndata: {{name: images, path: {root / 'photos'}}}\nstudent: {{name: mlp}}\n"
        "method: {name: denoise}\noptim: {default: {lr: 1e-3}}\n"
    )

    def job(out: Path = root / "latents") -> None:
        cache_latents(str(root / "mine.yaml"), [], str(root / "vae"), out, batch=2, rows=4)

    job(root / "reference")
    reference = files(root / "reference")

    def check() -> None:
        held = files(root / "latents") if (root / "latents").exists() else {}
        shards = {n: b for n, b in held.items() if n.endswith(".safetensors") and "tmp" not in n}
        assert shards.items() <= reference.items()

    count = struck(job, check)
    assert {n: b for n, b in files(root / "latents").items() if "lock" not in n} == {
        n: b for n, b in reference.items() if "lock" not in n
    }
    assert len(Latents(path=str(root / "latents"), vae=str(root / "vae")).open()) == 24
    print(count)


@pytest.mark.long
def test_an_export_that_is_killed_is_whole_or_not_there(tmp_path: Path):
    assert int(apart(drive_export, str(tmp_path)).split()[-1]) >= MOMENTS // 2


@pytest.mark.long
def test_a_cache_of_latents_that_is_killed_goes_on(tmp_path: Path):
    assert int(apart(drive_cache, str(tmp_path)).split()[-1]) >= 2
