"""The memory estimate against what a real step takes, and what its rows count."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_condition import condition_unet
from tiny_teacher import make_teacher, student_settings
from tiny_text import text_pipeline

from fewstep.commands import plan as plan_module
from fewstep.commands.plan import Turns, _Tracer, plan
from fewstep.commands.plan_report import report
from fewstep.config import UserError
from fewstep.methods.pairs import Pairs
from fewstep.methods.population import Populations
from fewstep.recipe.store import load
from fewstep.train.live import Live
from fewstep.train.trainer import Trainer

SETTINGS = ("train.batch=24", "train.ema=[0.9, 0.99]")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "t")


def recipe_of(teacher: Path, *settings: str) -> Any:
    return load("digits-dmd2", [*student_settings(teacher), *SETTINGS, *settings])


def measured(recipe: Any) -> int:
    AcceleratorState._reset_state(True)  # a process has one precision otherwise
    try:
        return plan_module.measured(recipe, cpu=True)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("student={name: lora, rank: 2}", "critic={name: lora, rank: 2}"),
        ("train.checkpointing=true", "train.accumulate=2"),
        ("train.precision=bf16",),
    ],
    ids=["full", "adapters", "checkpointing", "bf16"],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(teacher: Path, settings: tuple[str, ...]):
    recipe = recipe_of(teacher, *settings)
    assert plan(recipe, ways=False).total == pytest.approx(measured(recipe), rel=0.15)


def test_rows_count_what_there_is(teacher: Path):
    recipe = recipe_of(teacher)
    trainer = Trainer(recipe, cpu=True)
    found = plan(recipe)
    size = {n: sum(p.numel() for p in trainer.roles.parameters(n)) for n in trainer.roles}
    for name, row in found.roles.items():
        trained = name != "teacher"
        buffers = sum(b.numel() * b.element_size() for b in trainer.roles[name].buffers())
        assert row.weights == 4 * size[name] + buffers
        assert row.gradients == 4 * size[name] * trained
        assert row.optimizer == 8 * size[name] * trained
        assert row.ema == (8 * size[name] if name == "student" else 0)
    settings = [s for s, _ in found.ways]
    assert "train.checkpointing=true" in settings
    assert "train.accumulate=2" in settings
    assert [b for _, b in found.ways] == sorted(b for _, b in found.ways)
    assert all(b < found.total for _, b in found.ways)
    ddp, fsdp = (plan(recipe_of(teacher, f"train.parallel={p}"), 2, ways=False) for p in ("ddp", "fsdp"))
    assert ddp.micro_batch == fsdp.micro_batch == 12
    assert fsdp.roles["student"].weights == ddp.roles["student"].weights // 2
    assert fsdp.roles["discriminator"] == ddp.roles["discriminator"]


def test_eight_bit_moments_take_a_quarter(teacher: Path):
    recipe = recipe_of(teacher)
    small = replace(recipe, optim={k: replace(o, bits=8) for k, o in recipe.optim.items()})
    full, less = (plan(r, ways=False).roles["student"].optimizer for r in (recipe, small))
    trainer = Trainer(recipe, cpu=True)
    large = sum(p.numel() for p in trainer.roles.parameters("student") if p.numel() >= 4096)
    assert full - less == pytest.approx(large * (8 - 2 * (1 + 4 / 256)), rel=1e-3)


def test_a_batch_that_cannot_be_split_is_refused(teacher: Path):
    with pytest.raises(UserError, match=r"batch 24 must be divisible by processes x train\.accumulate = 5 x 1"):
        plan(recipe_of(teacher), 5)


def test_methods_that_look_at_values_are_traced_with_real_tensors():
    recipe = load("toy/progressive", ["train.batch=64"])
    found = plan(recipe, ways=False)
    assert found.total == pytest.approx(measured(recipe), rel=0.15)


def turns_of(size: int) -> Turns:
    """Of the student alone, so many bytes at its worst moment."""
    updates = ("student",)
    return Turns({updates: size}, {updates: {"student"}}, [(updates, [size])])


def test_a_way_alone_whose_trace_fails_has_a_note_and_the_plan_has_none(monkeypatch: pytest.MonkeyPatch):
    def trace(self: _Tracer, stage: Any, micro: int, *_: Any) -> Turns:
        if micro == 32 and self.fake:
            raise RuntimeError("no such kernel")
        return turns_of(micro * 10**9)

    monkeypatch.setattr(_Tracer, "_trace", trace)
    found = plan(load("toy/dmd2", ["train.batch=64"]))
    why = "the trace failed with RuntimeError: no such kernel"
    assert found.note == f"train.accumulate=2: extrapolated from 1, 2 and 4 samples; {why}"


def test_checkpointing_of_one_total_is_off_in_the_next(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    """The roles are built anew where fakes do not do, in the middle of a trace."""
    states: list[bool] = []

    def trace(self: _Tracer, *_: Any) -> Turns:
        if self.fake:
            raise ValueError("not of fakes")
        states.append(any(getattr(m, "is_gradient_checkpointing", False) for m in self.roles["student"].modules()))
        return turns_of(0)

    monkeypatch.setattr(_Tracer, "_trace", trace)
    recipe = recipe_of(teacher)
    tracer, stage = _Tracer(recipe, 1), recipe.stages()[0]
    for saved in (True, False):
        found = tracer.trace(stage, replace(recipe, train=replace(recipe.train, checkpointing=saved)), 8)
        assert found.note == "extrapolated from 1, 2 and 4 samples; the trace failed with ValueError: not of fakes"
    assert states == [True] * 3 + [False] * 3


def test_live_counts_storages_once_and_lets_them_go():
    kept = torch.zeros(100)
    with Live([kept]) as live:
        kept.view(10, 10).t()
        a = torch.ones(50)
        b = a.view(5, 10)[1:]
        assert live.now == 200
        del a
        assert live.now == 200
        del b
        assert live.now == 0
    assert live.peak == 200


def test_the_command_measures_two_steps_and_says_how_far_the_estimate_is(capsys: pytest.CaptureFixture[str]):
    report("toy/dmd2", ["train.batch=64"], measure=True)
    told = capsys.readouterr().out
    found = re.search(r"measured here: ([\d.]+) MiB; the estimate is ([+-][\d.]+) % off", told)
    worst = re.search(r"worst moment: ([\d.]+) MiB", told)
    assert found is not None, told
    assert worst is not None, told
    assert float(worst[1]) / float(found[1]) - 1 == pytest.approx(float(found[2]) / 100, abs=0.05)
    assert abs(float(found[2])) < 15
    with pytest.raises(UserError, match="one process"):
        report("toy/dmd2", [], 2, measure=True)


TEXT = """about: text
data: {data}
teacher: {{name: diffusers, path: {root}/sd}}
student: {{name: copy, of: teacher}}
critic: {{name: copy, of: teacher}}
method: {{name: dmd2, gan: null, critic: {{weight: eps, steps: 1}}, guidance: 3.0, steps: [1.0, 0.5]}}
optim: {{default: {{lr: 1e-3}}}}
train: {{steps: 2, batch: 6, product: student, ema: [], sample_every: 0}}
evaluate: null
"""
PROMPTS = (
    "{{name: prompts, path: {root}/prompts.txt, shape: [4, 8, 8], encoder: {{name: pipeline, path: {root}/sd}}, "
    "text_cache: {root}/cache}}"
)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder of random weights, and prompts."""
    root, prompts = tmp_path_factory.mktemp("text"), ("a red square", "two green dots", "blue")
    text_pipeline(root / "sd", prompts, unet=condition_unet())
    (root / "prompts.txt").write_text("\n".join(prompts))
    return root


def test_text_recipes_are_traced_and_not_computed(text_folder: Path, tmp_path: Path):
    """Rows of conditions are read by number, which a fake number does not tell; the step itself is shapes alone."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(TEXT.format(root=text_folder, data=PROMPTS.format(root=text_folder)))
    recipe = load(str(mine))
    found = plan(recipe, ways=False)
    assert found.note == ""
    assert found.total == pytest.approx(measured(recipe), rel=0.15)


@pytest.mark.parametrize("name", ["toy/fd-loss", "toy/dmd"])
def test_what_is_drawn_once_at_the_start_is_not_drawn_for_a_plan(name: str, monkeypatch: pytest.MonkeyPatch):
    """10,000 samples of the data, or every pair of the teacher's: hours of a real run."""
    for kind, method in ((Populations, "_rows"), (Pairs, "_solve")):
        monkeypatch.setattr(kind, method, lambda *_: pytest.fail("drawn"))
    assert plan(load(name, ["train.batch=8"]), ways=False).activations[("student",)] > 0
