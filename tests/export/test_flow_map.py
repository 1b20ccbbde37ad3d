"""Students that are told where their jumps end, as AnyFlow's pipeline: alike at every number of steps, else refused."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from snippets import check_call
from tiny_families import TODAY, make_today
from torch import Tensor

import fewstep
from fewstep.algebra.process import Flow, ShiftedFlow
from fewstep.algebra.sampling import Sampler, sample
from fewstep.commands import check_teacher as teachers
from fewstep.commands.check_student import check_student
from fewstep.commands.check_teacher import check_teacher
from fewstep.export import flow_map
from fewstep.export.base import PARITY, ExportRefused
from fewstep.export.choose import export, parts_of
from fewstep.export.flow_map import embedded, flow_map_model, flow_map_stock, jumps_of
from fewstep.export.forecast import weightless
from fewstep.export.latent import stock_of
from fewstep.export.stock import difference, open_stock, run_stock
from fewstep.networks.adapters import Adapted, frozen
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.mlp import MLP
from fewstep.recipe.store import load
from fewstep.train.product import Product

FOUR = (1.0, 0.75, 0.5, 0.25)
ANY = Sampler(kind="map", steps=FOUR, counts=(1, 2, 4, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_today(tmp_path_factory.mktemp("wan") / "wan", "wan")


def told(folder: Path, sampler: Sampler, *inputs: str) -> Product:
    """A student of Wan, not its teacher, with these inputs, which move its answer."""
    family = TODAY["wan"]
    net: Any = load_denoiser(str(folder), size=family.shape[1:])
    net.add_inputs(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        for p in net.parameters():
            p.data.add_(0.03 * torch.randn_like(p))
        for name in inputs:
            net.net.extras[name].linear.weight.data.normal_(0, 0.3)
    recipe = load("digits-dmd2", [f"teacher.path={folder}", f"method.steps={list(sampler.steps)}"])
    return Product(net, sampler, family.shape, 0, "student", sampler.counts or (len(sampler.steps),), recipe, 7)


def drawn(folder: Path, product: Product, steps: int) -> tuple[Tensor, Tensor]:
    """(fewstep's, the folder's pipeline's) latents at a number of even steps."""
    net: Any = product.net
    generator = torch.Generator().manual_seed(4)
    start, cond = torch.randn(2, *product.shape, generator=generator), net.net.example(2, generator)
    theirs = run_stock(open_stock(folder), net.net, start, cond, {"num_inference_steps": steps})
    even = replace(product.sampler, steps=tuple(1 - i / steps for i in range(steps)))
    with torch.no_grad():
        return sample(even, net, start, cond), theirs


@pytest.mark.parametrize("inputs", [("s",), ("s", "w")])
def test_a_student_told_its_destination_is_drawn_alike_at_all_its_numbers_of_steps(
    folder: Path, tmp_path: Path, inputs: tuple[str, ...]
):
    product = told(folder, replace(ANY, guidance=2.5 if "w" in inputs else None), *inputs)
    done = export(product, tmp_path / "out")
    assert 0 < done.parity <= PARITY
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "AnyFlowPipeline"
    assert index["transformer"] == ["diffusers", "AnyFlowTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    assert "transformer_2" not in index
    assert json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 3.0
    check_call(done.usage)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "numbers of even steps whose ends it knows | 1, 2, 4, 8 |" in card
    for steps in (1, 2, 4, 8):
        ours, theirs = drawn(tmp_path / "out", product, steps)
        assert difference(ours, theirs) <= PARITY, steps
    # At other numbers of steps its destinations lie between the known ones.
    ours, theirs = drawn(tmp_path / "out", product, 3)
    assert difference(ours, theirs) > PARITY
    # The destination matters, and by more than what is allowed: without it the answers are others.
    net: Any = copy.deepcopy(product.net)
    net.net.extras["s"].linear.weight.data.zero_()
    ours, _ = drawn(tmp_path / "out", replace(product, net=net), 4)
    assert difference(ours, drawn(tmp_path / "out", product, 4)[0]) > 1e-3
    report = check_student(str(tmp_path / "out"))
    assert report.ok, report.text()
    assert report.pipeline == "AnyFlowPipeline"


def test_uneven_levels_and_the_length_of_a_jump_are_known_where_the_student_was_trained(folder: Path, tmp_path: Path):
    uneven = Sampler(kind="map", steps=(1.0, 0.7, 0.312), counts=(1, 2, 3, 4))
    for inputs in (("s",), ("length",)):
        product = told(folder, uneven, *inputs)
        done = export(product, tmp_path / inputs[0])
        assert done.parity <= PARITY
        assert "sigmas=[1.0, 0.875, 0.57" in done.usage
        assert "| steps whose ends it knows | its own 3 levels alone |" in (done.folder / "README.md").read_text()
        assert jumps_of(product.net, uneven, 12)[0] == (3,)  # type: ignore[arg-type]
    net: Any = told(folder, uneven, "length").net
    counts, t, s = jumps_of(net, uneven, 12)
    assert counts == (3,)
    assert net.process.level(t).tolist() == pytest.approx([1.0, 0.7, 0.312])
    assert net.process.level(s).tolist() == pytest.approx([0.7, 0.312, 0.0])


def test_the_embedding_of_r_is_the_students_own_of_s_at_its_ends_with_small_weights(folder: Path):
    net: Any = told(folder, ANY, "s").net
    model: Any = flow_map_model(net, ANY)
    counts, t, s = jumps_of(net, ANY, 12)
    assert counts == (1, 2, 4, 8)
    assert sorted(net.process.level(s).tolist()) == pytest.approx([i / 8 for i in range(8)])
    part = model.condition_embedder
    with torch.no_grad():
        found = part.delta_embedder(part.timesteps_proj(1000 * s))
        torch.testing.assert_close(0.5 * found.double(), embedded(net, t, s, None), rtol=0, atol=1e-5)
        # Twice Wan's embedding of t, of which the class takes half.
        at = part.timesteps_proj(1000 * t)
        torch.testing.assert_close(
            0.5 * part.time_embedder(at), net.net.model.condition_embedder.time_embedder(at), rtol=1e-6, atol=1e-7
        )
    # Large weights that cancel would not survive half precision.
    assert float(part.delta_embedder.linear_2.weight.detach().abs().max()) < 10
    few, *_ = jumps_of(net, replace(ANY, counts=(1, 2, 4, 8, 50)), 12)
    assert few == (1, 2, 4, 8)


def test_what_hands_on_no_destination_is_refused_with_the_loop(folder: Path, tmp_path: Path):
    product = told(folder, ANY, "s")
    assert parts_of(replace(product, net=weightless(product.net))).scheduler == "FlowMapEulerDiscreteScheduler"
    # At one step the destination is a constant, which folds into Wan's own class.
    one = replace(product, net=weightless(product.net), sampler=Sampler(kind="map", steps=(1.0,), counts=(1, 2)))
    assert parts_of(one).scheduler == "FlowMatchEulerDiscreteScheduler"
    length = told(folder, replace(ANY, kind="renoise"), "length")
    with pytest.raises(ExportRefused, match=r"without fresh noise, this student takes renoise steps; .*docs/export\.md"):
        export(length, tmp_path / "renoise")
    with pytest.raises(ExportRefused, match="--dtype bf16: a student that is told where its steps end is written in"):
        export(product, tmp_path / "half", dtype="bf16")
    base = frozen(product.net)
    adapter = Adapted(base, "student", rank=2, targets=["to_q"])
    # A LoRA file beside the teacher's own class has nothing to hand it on.
    with pytest.raises(
        ExportRefused, match=r"no stock pipeline of its class hands on a destination time.*docs/export\.md"
    ):
        stock_of(replace(product, net=adapter))
    assert list(tmp_path.iterdir()) == []


def test_an_older_diffusers_is_named_with_the_version_that_is_needed(monkeypatch: pytest.MonkeyPatch):
    flow_map_stock(Flow(), ANY)
    monkeypatch.setattr(flow_map, "version", lambda name: "0.38.0")
    old = SimpleNamespace(FlowMapEulerDiscreteScheduler=None)
    monkeypatch.setitem(sys.modules, "diffusers", old)  # type: ignore[arg-type]
    with pytest.raises(ExportRefused, match=r"diffusers 0\.38\.0 has no AnyFlowPipeline, .*install 0\.39\.0 or newer"):
        flow_map_stock(Flow(), ANY)


def test_an_export_opens_as_a_teacher_whose_velocity_is_that_of_no_jump(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(teachers, "denoising", lambda net, x: ("not tried", None))  # untrained under every reading
    product = told(folder, replace(ANY, counts=(1, 2, 4)), "s")
    export(product, tmp_path / "out")
    report = check_teacher(str(tmp_path / "out"), size=product.shape[1:])
    assert report.ok, report.text()
    net: Any = load_denoiser(str(tmp_path / "out"), size=product.shape[1:])
    assert net.process.shift == 3.0
    x, t = torch.randn(2, *product.shape), net.process.grid(torch.tensor([0.5, 0.25], dtype=torch.float64))
    cond = net.net.example(2)
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, cond).x0, product.net(x, t, cond).x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs", [("s",), ("s", "w")])
def test_the_loop_of_the_documentation_is_the_sampler(monkeypatch: pytest.MonkeyPatch, inputs: tuple[str, ...]):
    (code,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "export.md").read_text(), re.DOTALL
    )
    classes = 4 * ("w" in inputs)
    net = Denoiser(MLP(2, 12, 3, classes, inputs), ShiftedFlow(shift=3.0), "velocity", "angle")
    for name in inputs:
        net.net.extras[name].linear.weight.data.normal_(0, 0.3)
    sampler = Sampler(kind="map", steps=FOUR, guidance=1.5 if classes else None)
    labels = torch.arange(16) % 4 if classes else None
    opened = SimpleNamespace(net=net, sampler=sampler, shape=(2,), labels=lambda count: labels)
    monkeypatch.setattr(fewstep, "open_product", lambda path: opened)
    found: dict[str, Any] = {}
    torch.manual_seed(3)
    exec(code, found)
    torch.manual_seed(3)
    with torch.no_grad():
        wanted = sample(opened.sampler, net, torch.randn(16, 2), labels)
    torch.testing.assert_close(found["x"], wanted, rtol=1e-5, atol=1e-6)
