"""A base's adapter on its student: what scale 0 and 1 are, that order does not matter, and the ratio of the gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calling import called
from tiny_teacher import make_run, make_teacher
from torch import nn

from fewstep.commands import evaluate
from fewstep.commands.claim import prepare
from fewstep.commands.evaluate import run
from fewstep.commands.request import Request
from fewstep.commands.transfer import add_ratios, marked, with_update
from fewstep.config import UserError
from fewstep.eval.protocol.evaluation import Evaluation
from fewstep.networks.adapters import Adapted, plain_copy
from fewstep.networks.lora_file import NAME, save_lora, with_lora
from fewstep.networks.parts import Site
from fewstep.networks.specs import UNet2DSpec
from fewstep.recipe.store import load
from fewstep.train.product import open_product
from fewstep.train.trainer import Trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student's run, and one that trained an adapter on its teacher."""
    folder = tmp_path_factory.mktemp("transfer")
    teacher = make_teacher(folder / "teacher")
    student = make_run(folder / "student", teacher)
    settings = [f"teacher.path={teacher}", "student.rank=2", "train.steps=1", "train.batch=4", "train.sample_every=0"]
    recipe = load("digits-bold-lora", settings)
    prepare(recipe, folder / "bold", resume=False, force=False)
    trainer = Trainer(recipe, folder / "bold", cpu=True)
    for p in trainer.roles.student.parameters():
        nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(p)))
    trainer.session.ema[0].reset(trainer.roles.student)
    trainer.save(0)
    return student, folder / "bold"


def states_differ(a: nn.Module, b: nn.Module) -> float:
    one, other = a.state_dict(), b.state_dict()
    assert set(one) == set(other)
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


def test_scale_zero_is_the_network_and_one_is_the_merge(runs: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = open_product(runs[1]).net
    assert isinstance(adapter, Adapted)
    base = plain_copy(adapter.base)
    assert states_differ(with_lora(base, adapter, 0.0), base) == 0
    merged = plain_copy(adapter)
    assert states_differ(with_lora(base, adapter), merged) < 1e-6
    assert states_differ(merged, base) > 1e-3
    there = with_lora(with_lora(base, adapter, 0.7), adapter, -0.7)
    assert states_differ(there, base) < 1e-6
    file = save_lora(adapter, tmp_path / NAME)
    assert states_differ(with_update(base, file, 0.5), with_update(base, runs[1], 0.5)) == 0


def test_the_same_update_reaches_a_student_with_other_weights(runs: tuple[Path, Path]) -> None:
    """read_lora refuses another base than the adapter's own; here that is the point."""
    adapter, student = open_product(runs[1]).net, open_product(runs[0]).net
    assert isinstance(adapter, Adapted)
    base = plain_copy(adapter.base)
    deltas = [
        {k: after[k] - before[k] for k in before}
        for before, after in (
            (net.state_dict(), with_lora(net, adapter, 1.5).state_dict()) for net in (base, plain_copy(student))
        )
    ]
    assert max((deltas[0][k] - deltas[1][k]).abs().max().item() for k in deltas[0]) < 1e-6


def test_the_command_measures_both_and_says_the_ratio(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(runs[0].parent / "cache"))
    student, bold = runs
    found = run(Request(path=student, samples=20, adapter=bold, adapter_scale=0.5, attribute="ink", teacher="2"))
    rows = {e.name: e for e in found}
    assert len(rows) == 4
    name = found[0].name
    changed = rows[marked(name, bold, 0.5)]
    gain = changed.metrics["reward (ink)"]["value"] - rows[name].metrics["reward (ink)"]["value"]
    assert changed.metrics["gain of ink"]["value"] == pytest.approx(gain)
    assert all(e.distance.value >= 0 for e in found)
    assert "gain of ink" in rows[marked("teacher, 2 steps", bold, 0.5)].metrics


def row(name: str, group: str, ink: float, error: float = 0.01) -> Evaluation:
    metrics = {"reward (ink)": {"value": ink, "standard_error": error}}
    return Evaluation(
        name=name, preset="p", preset_hash="h", extractor="e", number=9, metrics=metrics, group=group, steps=1
    )


def test_the_ratio_is_of_gains_and_left_out_where_the_base_gains_nothing() -> None:
    file = Path("bold.safetensors")
    for base, expected in ((0.5, 0.75), (0.31, None)):
        found = [row("s", "s", 0.3), row(marked("s", file, 1), "s", 0.45)]
        found += [row("t", "teacher", 0.3), row(marked("t", file, 1), "teacher", base)]
        add_ratios(found, file, 1, "ink")
        entry = found[1].metrics.get("transfer ratio (ink)")
        if expected is None:
            assert entry is None
        else:
            assert entry is not None
            assert entry["value"] == pytest.approx(expected)
            error = 0.01 * 2**0.5
            assert entry["standard_error"] == pytest.approx(error * (1 + 0.75**2) ** 0.5 / 0.2)
        assert found[1].metrics["gain of ink"]["value"] == pytest.approx(0.15)
        assert "transfer ratio (ink)" not in found[3].metrics


def test_a_name_that_is_no_attribute_is_told_before_a_reference_is_computed(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "open_judge", lambda *_, **__: pytest.fail("the judge was opened first"))
    with pytest.raises(UserError, match="'beauty': is not one of"):
        run(Request(path=runs[0], samples=20, attribute="beauty"))


def test_what_does_not_fit_is_refused(runs: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    student, bold = runs
    for arguments, told in (
        (["--adapter", str(student)], "its student is no adapter"),
        (["--adapter", str(tmp_path / "none.safetensors")], "cannot be read as a LoRA file"),
        (["--adapter", str(bold), "--attribute", "beauty"], "'beauty': is not one of ink, house-classifier"),
        (["--adapter-scale", "0.5"], "--adapter-scale 0.5: is a number, of the adapter"),
    ):
        code, _, error = called(capfd, "eval", student, "--samples", "20", *arguments)
        assert (code, told in " ".join(error.split())) == (2, True), error
    for option, value in (("--adapter", str(bold)), ("--attribute", "ink")):
        code, _, error = called(capfd, "eval", "--images", tmp_path, "--preset", "fd-house-digits", option, value)
        assert (code, "the samples are there already" in " ".join(error.split())) == (2, True), error
        told = ["--preset", "geneval", "--out", str(tmp_path / "out"), option, value]
        code, _, error = called(capfd, "eval", student.parent / "teacher", *told)
        assert (code, f"{option}: preset geneval measures nothing" in " ".join(error.split())) == (2, True), error
    other = UNet2DSpec(channels=(16, 32)).build(Site((1, 8, 8), 10, {}, 0))
    with pytest.raises(UserError, match="it is of another model"):
        with_update(other, bold, 1.0)
