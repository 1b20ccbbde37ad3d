"""Every kind of sampler finds the stock scheduler that draws the same, or a refusal that says why."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import apart
from snippets import run_snippet
from tiny_runs import names
from tiny_teacher import make_run, make_teacher, tiny_unet
from torch import Tensor

from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, Trig
from fewstep.algebra.sampling import Sampler, sample
from fewstep.export import base as checked
from fewstep.export.base import PARITY, ExportRefused
from fewstep.export.choose import export
from fewstep.export.fold import fold, level_of
from fewstep.export.routes import unet_stock
from fewstep.export.stock import difference
from fewstep.export.unet import both
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.networks.routed import ByClass, ByTime, Routed
from fewstep.networks.unet2d import UNet2D
from fewstep.train.product import Product, open_product

FOUR = (1.0, 0.75, 0.5, 0.25)
SD = DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def unet(classes: int, seed: int = 11) -> UNet2D:
    """A small UNet2DModel with weights large enough that its answer depends on everything."""
    return UNet2D(tiny_unet(classes, seed).eval(), classes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Product:
    folder = tmp_path_factory.mktemp("routes")
    return open_product(make_run(folder / "run", make_teacher(folder / "teacher")))


def student(base: Product, net: Any, sampler: Sampler, classes: int = 10) -> Product:
    return replace(base, net=net.eval(), sampler=sampler, classes=classes)


CASES: dict[str, tuple[Process, str, str, int, Sampler, str]] = {
    "cm, one step of a map": (EDM(), "cm", "250log_sigma", 10, Sampler(kind="map"), "CMStochasticIterativeScheduler"),
    "cm, gamma of eta 1": (
        EDM(), "cm", "250log_sigma", 10, Sampler(kind="gamma", eta=1.0, steps=FOUR), "CMStochasticIterativeScheduler",
    ),
    "edm, one step": (EDM(sigma_max=40.0), "edm", "log_sigma/4", 10, Sampler(), "EDMEulerScheduler"),
    "edm, map": (EDM(), "edm", "log_sigma/4", 0, Sampler(kind="map", steps=(1.0, 0.7, 0.4)), "EDMEulerScheduler"),
    "eps, re-noise": (
        DiscreteVP(), "eps", "index", 10, Sampler(steps=(0.6, 0.4, 0.333, 0.1)), "LCMScheduler",
    ),
    "v, re-noise": (
        SD, "v", "index", 0, Sampler(steps=FOUR), "LCMScheduler",
    ),
    "x0, one step": (DiscreteVP(), "x0", "index", 10, Sampler(), "DDIMScheduler"),
    "v, map": (DiscreteVP(), "v", "index", 10, Sampler(kind="map", steps=FOUR), "DDIMScheduler"),
    "v, uneven map": (
        DiscreteVP(), "v", "index", 10, Sampler(kind="map", steps=(1.0, 0.61, 0.3)), "EulerDiscreteScheduler",
    ),
    "v, TCD": (
        SD, "v", "index", 10,
        Sampler(kind="gamma", steps=(1.0, 0.733, 0.5, 0.25)), "TCDScheduler",
    ),
    "flow, map": (Flow(), "velocity", "1000t", 0, Sampler(kind="map", steps=FOUR), "FlowMatchEulerDiscreteScheduler"),
    "flow, two levels": (
        Flow(), "velocity", "1000t", 0, Sampler(kind="gamma", eta=0.0, steps=(1.0, 0.37)),
        "FlowMatchEulerDiscreteScheduler",
    ),
    "flow, re-noise": (Flow(), "velocity", "1000t", 0, Sampler(steps=FOUR), "FlowMatchLCMScheduler"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_pipeline_of_the_stock_scheduler_draws_the_same(base: Product, tmp_path: Path, name: str) -> None:
    process, prediction, time_input, classes, sampler, scheduler = CASES[name]
    net = Denoiser(unet(classes), process, prediction, time_input)  # type: ignore[arg-type]
    one = student(base, net, sampler, classes)
    done = export(one, tmp_path / "out")
    assert done.parity <= PARITY
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == scheduler
    run_snippet(done.usage, tmp_path / "reader")
    # The number is a comparison of images that are not all saturated, and that the noise decides.
    x = one.draw(20, seed=3).clamp(-1, 1)
    assert float((x.abs() < 0.999).float().mean()) > 0.1
    # The folder opens again here with the sampler it was written for, and draws the same.
    again = open_product(tmp_path / "out")
    assert again.trained == (len(sampler.steps),)
    assert float((again.draw(8, seed=3, labels=one.labels(8)).clamp(-1, 1) - x[:8]).abs().max()) <= 2 * PARITY


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_printed_code_fits_any_number_of_classes(base: Product, tmp_path: Path, classes: int) -> None:
    net = Denoiser(unet(classes), EDM(), "cm", "250log_sigma")
    run_snippet(export(student(base, net, Sampler(), classes), tmp_path / "one").usage, tmp_path / "reader")
    members = [Denoiser(unet(classes, seed), EDM(), "cm", "250log_sigma") for seed in (1, 2)]
    two = student(base, Routed(members, ByTime(EDM(), (0.5,))), Sampler(kind="map", steps=(1.0, 0.5)), classes)
    run_snippet(export(two, tmp_path / "two").usage, tmp_path / "experts")


def moving(net: UNet2D, names: tuple[str, ...]) -> UNet2D:
    """Further inputs with an effect."""
    net.extras.add(names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for n in names:
            torch.nn.init.normal_(net.extras[n].linear.weight, std=0.3)  # type: ignore[union-attr]
    return net


@pytest.mark.parametrize("end", ["s", "length"])
@pytest.mark.parametrize("process", [EDM(), Flow(), Trig()], ids=lambda p: type(p).__name__)
def test_inputs_of_a_one_step_student_fold_into_its_weights(
    base: Product, tmp_path: Path, process: Process, end: str
) -> None:
    inner = Denoiser(moving(unet(10), (end, "w", "mirror")), EDM(), "cm", "250log_sigma")
    net = inner if isinstance(process, EDM) else Rescheduled(inner, process)
    one = student(base, net, Sampler(kind="map", guidance=2.5))
    done = export(one, tmp_path / "out")
    assert done.parity <= PARITY
    plain = Denoiser(unet(10), EDM(), "cm", "250log_sigma")
    without = student(base, plain if isinstance(process, EDM) else Rescheduled(plain, process), Sampler(kind="map"))
    # Without the fold the images would be others: the inputs have an effect.
    assert difference(*both(without, tmp_path / "out", {"num_inference_steps": 1})) > 100 * PARITY


def test_guidance_folds_for_any_number_of_re_noised_steps(base: Product, tmp_path: Path) -> None:
    net = Denoiser(moving(unet(10), ("w",)), EDM(), "cm", "250log_sigma")
    assert export(student(base, net, Sampler(steps=FOUR, guidance=3.0)), tmp_path / "out").parity <= PARITY


def test_the_input_scale_at_a_flows_prior_is_folded(base: Product) -> None:
    """Undoing Rescheduled at t = 1 leaves the factor sqrt(1 + 1 / sigma_max^2) on the input, not 1."""
    inner = Denoiser(unet(0), EDM(sigma_max=5.0), "cm", "250log_sigma")
    net = Rescheduled(inner, Flow())
    plain, sampler = fold(net, Sampler(kind="map"))
    ratio = plain.net.model.conv_in.weight / inner.net.model.conv_in.weight
    assert torch.allclose(ratio, torch.full_like(ratio, (1 + 1 / 25) ** 0.5), rtol=1e-6)
    assert sampler.steps == (1.0,)
    t = torch.tensor([0.4], dtype=torch.float64)
    assert level_of(EDM(), EDM().grid(t)) == pytest.approx(0.4, abs=1e-12)
    assert level_of(DiscreteVP(), DiscreteVP().grid(t)) == pytest.approx(0.4, abs=1e-12)


def refusal(product: Product, folder: Path) -> str:
    with pytest.raises(ExportRefused) as caught:
        export(product, folder / "out")
    assert names(folder) == []
    return str(caught.value)


def test_refusals_say_why_and_what_to_do(base: Product, tmp_path: Path) -> None:
    cm = Denoiser(unet(10), EDM(), "cm", "250log_sigma")
    told = Denoiser(moving(unet(10), ("s",)), EDM(), "cm", "250log_sigma")
    measured = Denoiser(moving(unet(10), ("length",)), EDM(), "cm", "250log_sigma")
    vp = Denoiser(unet(10), DiscreteVP(), "eps", "index")
    flow = Denoiser(unet(10), Flow(), "velocity", "1000t")
    bare = Denoiser(unet(0), Flow(), "velocity", "1000t")
    trig = Denoiser(unet(0), Trig(), "trig", "angle")
    cases: list[tuple[Any, Sampler, str, str]] = [
        (cm, Sampler(kind="map", steps=FOUR), "only re-noises", "EDMEulerScheduler"),
        (told, Sampler(kind="map", steps=FOUR), "hands a UNet2DModel a destination time", "with one step it folds"),
        (told, Sampler(kind="map", steps=FOUR, counts=(1, 2, 4)), "destination time", "trained for 1 step as well"),
        (measured, Sampler(steps=FOUR), "destination time", "with one step it folds"),
        (Rescheduled(cm, Flow()), Sampler(steps=FOUR), "trained in Flow on a network of EDM", "own process"),
        (vp, Sampler(kind="gamma", eta=0.2, steps=FOUR), "default eta 0.3", "set the method's eta"),
        (vp, Sampler(kind="map", steps=(0.9, 0.5)), "do not begin at the prior", "begin at 1.0"),
        (vp, Sampler(steps=(1.0, 0.1235)), "between the 1000 indices", "multiples of 1/1000"),
        (flow, Sampler(kind="map", steps=FOUR), "class-conditional UNet2DModel", "fewstep sample"),
        (bare, Sampler(kind="map", steps=(1.0, 0.7, 0.3)), "are not 1 - i/3", "fewstep sample"),
        (bare, Sampler(kind="gamma", eta=0.5, steps=FOUR), "eta 0.5", "set it to 0 or 1"),
        (trig, Sampler(), "SanaSprintPipeline alone", "own process"),
        (vp, Sampler(kind="map", steps=(0.9, 0.3), keep_noise=True), "noise correction", "fewstep sample"),
        (Denoiser(unet(0), Trig(), "x0", "angle"), Sampler(), "reads prediction 'x0'", "diffusers format"),
    ]  # fmt: skip
    for net, sampler, why, instead in cases:
        said = refusal(student(base, net, sampler, int(net.net.classes) if isinstance(net, Denoiser) else 10), tmp_path)
        assert why in said, said
        assert instead in said, said


def test_scm_takes_the_levels_of_a_trig_student() -> None:
    """Driven by hand, as SanaSprintPipeline does: the scheduler route itself is exact."""
    net = Denoiser(unet(0), Trig(), "trig", "angle").eval()
    sampler = Sampler(steps=(0.999, 0.7))
    stock = unet_stock(net, sampler)
    stock.scheduler.set_timesteps(**stock.call)
    noise = [torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    generator = torch.Generator().manual_seed(1)
    x = noise[0]
    with torch.no_grad():
        for t in stock.scheduler.timesteps[:-1]:
            raw = net.net(x, t.expand(3), None)[0]
            x = stock.scheduler.step(raw, t, x, generator=generator, return_dict=False)[0]
        ours = sample(sampler, net, noise[0], None, lambda _: noise[1])
    assert float((ours - x).abs().max()) <= 1e-5


def test_table_with_a_clean_first_index_keeps_every_other_level() -> None:
    for process in (DiscreteVP(), SD):
        beta = torch.tensor(process.clean_first_betas(), dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, 0)
        t = torch.arange(1, 1001, dtype=torch.float64)
        assert float(alpha_bar[0]) == 1.0
        torch.testing.assert_close(alpha_bar[1:], process.alpha(t)[1:] ** 2, rtol=1e-10, atol=0)


class Blocked:
    """Finds no fewstep."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "fewstep":
            raise ImportError(name)


def run_card(folder: Path | str, to: Path | str) -> None:
    """Run the card's text where fewstep cannot be imported, and save what it draws."""
    for name in [m for m in sys.modules if m.partition(".")[0] == "fewstep"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Blocked())
    with pytest.raises(ImportError):
        import fewstep  # noqa: F401
    torch.manual_seed(4)
    told: dict[str, Any] = {}
    exec(Path(folder, "README.md").read_text().split("```python\n")[1].split("```")[0], told)
    noise = torch.randn(5, 1, 8, 8)
    torch.save({"noise": noise, "images": told["draw"](noise, torch.arange(5))}, to)


def experts(kind: type = EDM) -> Routed:
    members = [Denoiser(unet(10, seed), kind(), "cm", "250log_sigma") for seed in (1, 2)]
    return Routed(members, ByTime(members[0].process, (0.5,)))


@pytest.mark.parametrize("sampler", [Sampler(kind="gamma", eta=0.0, steps=FOUR), Sampler(kind="map", steps=(1.0, 0.5))])
def test_experts_run_from_the_text_of_their_card(base: Product, tmp_path: Path, sampler: Sampler) -> None:
    net = experts().eval()
    one = student(base, net, sampler)
    done = export(one, tmp_path / "out")
    assert done.parity <= PARITY
    assert names(tmp_path / "out") == [".fewstep", "README.md", "expert-0", "expert-1", "steps.json"]
    told = json.loads((tmp_path / "out" / "steps.json").read_text())
    wanted = [0, 0, 1, 1] if len(sampler.steps) == 4 else [0, 1]
    assert [row["expert"] for row in told["steps"]] == wanted
    assert "no stock pipeline switches between two UNets" in (tmp_path / "out" / "README.md").read_text()
    assert run_snippet(done.usage, tmp_path / "reader")["images"].shape == (4, 1, 8, 8)
    apart(run_card, tmp_path / "out", tmp_path / "drawn.pt")
    drawn = torch.load(tmp_path / "drawn.pt")
    with torch.no_grad():
        ours = sample(sampler, net, drawn["noise"], torch.arange(5), lambda _: drawn["noise"])
    assert float((ours.clamp(-1, 1) - drawn["images"]).abs().max()) <= PARITY
    export(one, tmp_path / "out")  # an earlier export is replaced


@pytest.mark.parametrize("gap", [1.0, float("nan")])
def test_experts_whose_loader_differs_leave_nothing(
    base: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: float
) -> None:
    monkeypatch.setattr(checked, "difference", lambda *_: gap)
    one = student(base, experts(), Sampler(kind="map", steps=(1.0, 0.5)))
    with pytest.raises(ExportRefused, match=r"^the loader differs from fewstep's sampler by (1\.00e\+00|nan) > 1e-04$"):
        export(one, tmp_path / "out")
    assert names(tmp_path) == []


def test_students_by_class_are_a_pipeline_each(base: Product, tmp_path: Path) -> None:
    members = [Denoiser(unet(10, seed), EDM(), "cm", "250log_sigma") for seed in (1, 2, 3)]
    one = student(base, Routed(members, ByClass(10, 3)), Sampler())
    done = export(one, tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert groups == {"student-0": [0, 1, 2, 3], "student-1": [4, 5, 6], "student-2": [7, 8, 9]}
    assert done.parity <= PARITY
    run_snippet(done.usage, tmp_path / "reader")
    for name, group in groups.items():  # each shows a class of its own
        assert f"class_labels=[{group[0]}]" in (tmp_path / "out" / name / "README.md").read_text()
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(10)
    with torch.no_grad():
        whole = sample(one.sampler, one.net, noise, labels)
        for name, group in groups.items():
            part: Tensor = sample(one.sampler, open_product(tmp_path / "out" / name).net, noise[group], labels[group])
            assert float((part - whole[group]).abs().max()) <= 1e-5
    members[2].net.model.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ExportRefused, match=r"^the pipeline differs from fewstep's sampler by nan > "):
        export(one, tmp_path / "broken")
    assert names(tmp_path) == ["out", "reader"]
