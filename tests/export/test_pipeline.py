"""An export runs in plain diffusers as fewstep's sampler does, carries the trained levels, or is not written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from snippets import run_snippet
from tiny_runs import names, python
from tiny_teacher import make_run, make_teacher
from torch import Tensor

from fewstep.algebra.sampling import Sampler, many_step
from fewstep.config import UserError
from fewstep.export import base, routes, unet
from fewstep.export.base import HALF_PARITY, PARITY, ExportRefused
from fewstep.export.choose import export
from fewstep.export.routes import schedule
from fewstep.networks.diffusers import load_denoiser
from fewstep.train.product import Product, open_product

STEPS = {"one": (1.0,), "four": (1.0, 0.75, 0.5, 0.25), "uneven": (1.0, 0.6, 0.35), "lower": (0.8, 0.3)}

ALONE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fewstep":
            raise ImportError("fewstep is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from diffusers import DiffusionPipeline

try:
    import fewstep
    raise SystemExit("fewstep could be imported")
except ImportError:
    pass
root, calls = sys.argv[1], json.loads(sys.argv[2])
for name, call in calls.items():
    pipe = DiffusionPipeline.from_pretrained(f"{root}/{name}")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(50 + i) for i in range(7)]
    images = pipe(batch_size=7, class_labels=[0, 9, 3, 1, 7, 7, 2], generator=generators, output_type="pt", **call).images
    torch.save({"images": images, "sigmas": pipe.scheduler.sigmas, "class": type(pipe).__name__}, f"{root}/{name}.pt")
assert not any(m.partition(".")[0] == "fewstep" for m in sys.modules)
"""

LABELS = torch.tensor([0, 9, 3, 1, 7, 7, 2])


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Product:
    folder = tmp_path_factory.mktemp("student")
    run = make_run(folder / "run", make_teacher(folder / "teacher"))
    opened = open_product(run)
    assert opened.done == 2
    assert opened.sampler.steps == (1.0,)
    return opened


def at(product: Product, steps: tuple[float, ...]) -> Product:
    return replace(product, sampler=Sampler(kind="renoise", steps=steps))


@pytest.fixture(scope="module")
def exports(product: Product, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The three exports, and what a process without fewstep drew from them."""
    root = tmp_path_factory.mktemp("exports")
    done = {name: export(at(product, steps), root / name) for name, steps in STEPS.items()}
    assert all(0 < d.parity <= PARITY for d in done.values())
    calls = {name: schedule(steps)[1] for name, steps in STEPS.items()}
    assert calls["one"] == {"num_inference_steps": 1}
    assert calls["uneven"] == {"num_inference_steps": None, "timesteps": [13, 8, 0]}
    # The call is the one that the usage lines print.
    assert "pipe(class_labels=[0], num_inference_steps=4)" in done["four"].usage
    assert "pipe(class_labels=[0], num_inference_steps=None, timesteps=[13, 8, 0])" in done["uneven"].usage
    for name, one in done.items():
        run_snippet(one.usage, root.parent / f"{root.name}-reader-{name}")
    python(ALONE, str(root), json.dumps(calls))
    drawn = {name: torch.load(root / f"{name}.pt", weights_only=True) for name in STEPS}
    return root, drawn


def noises(count: int) -> list[Tensor]:
    """Noise in the order in which a pipeline with one generator per image draws it."""
    generators = [torch.Generator().manual_seed(50 + i) for i in range(7)]
    return [torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators]) for _ in range(count)]


def by_hand(product: Product, steps: tuple[float, ...]) -> Tensor:
    """The consistency sampler (arXiv 2303.01469, alg. 1) written out on the bare UNet, in float64 but for the net."""
    unet: Any = product.net.net.model  # type: ignore[union-attr]
    low, high, rho, data = 0.002, 80.0, 7.0, 0.5
    eps = [n.double() for n in noises(len(steps))]
    x = torch.zeros(7, 1, 8, 8, dtype=torch.float64)
    for i, u in enumerate(steps):
        sigma = (low ** (1 / rho) + u * (high ** (1 / rho) - low ** (1 / rho))) ** rho
        x = sigma * eps[0] if i == 0 else x + (sigma**2 - low**2) ** 0.5 * eps[i]
        scaled = (x / (sigma**2 + data**2) ** 0.5).float()
        time = torch.full((7,), 250 * torch.log(torch.tensor(sigma + 1e-44)).item())
        with torch.no_grad():
            raw = unet(scaled, time, class_labels=LABELS).sample.double()
        skip = data**2 / ((sigma - low) ** 2 + data**2)
        out = (sigma - low) * data / (sigma**2 + data**2) ** 0.5
        x = skip * x + out * raw
    return x.clamp(-1, 1)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_reloaded_without_fewstep_it_draws_what_the_sampler_draws(product: Product, exports: Any, name: str):
    theirs = exports[1][name]["images"] * 2 - 1
    assert exports[1][name]["class"] == "ConsistencyModelPipeline"
    from fewstep.algebra.sampling import sample

    draws = iter(noises(4))
    with torch.no_grad():
        ours = sample(Sampler(steps=STEPS[name]), product.net, next(draws), LABELS, lambda _: next(draws))
    assert float((ours.clamp(-1, 1) - theirs).abs().max()) <= 1e-4
    assert float((by_hand(product, STEPS[name]) - theirs).abs().max()) <= 1e-4
    # The comparison has something to compare: images differ from each other and are not all saturated.
    assert float((theirs.abs() < 0.999).float().mean()) > 0.2
    assert float(theirs.flatten(1).std(0).mean()) > 0.05


@pytest.mark.parametrize("name", sorted(STEPS))
def test_the_scheduler_visits_the_trained_levels(product: Product, exports: Any, name: str):
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler.from_pretrained(exports[0] / name, subfolder="scheduler")
    count, call = schedule(STEPS[name])
    assert scheduler.config.num_train_timesteps == count
    assert scheduler.config.clip_denoised is False
    scheduler.set_timesteps(**call)
    process: Any = product.net.process
    wanted = process.grid(torch.tensor(STEPS[name], dtype=torch.float64))
    torch.testing.assert_close(scheduler.sigmas[: len(wanted)].double(), wanted, rtol=1e-6, atol=0)
    assert len(scheduler.timesteps) == len(wanted)


def test_a_default_call_never_draws_the_null_class(exports: Any):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(exports[0] / "one")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.num_class_embeds == 10
    assert pipe.unet.class_embedding.weight.shape[0] == 10
    seen: list[int] = []
    pipe.unet.class_embedding.register_forward_pre_hook(lambda _, args: seen.extend(args[0].tolist()))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        pipe(batch_size=120, class_labels=None, num_inference_steps=1, generator=generator, output_type="pt")
    assert set(seen) == set(range(10))


def test_what_lies_in_the_folder(exports: Any):
    root = exports[0]
    assert names(root / "four") == [".fewstep", "README.md", "fewstep.json", "model_index.json", "scheduler", "unet"]
    assert names(root / "four" / "unet") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert not [p for p in root.rglob("*") if p.suffix in (".bin", ".ckpt", ".pkl", ".pth")]
    told = json.loads((root / "four" / "model_index.json").read_text())
    assert told["_class_name"] == "ConsistencyModelPipeline"
    assert told["unet"] == ["diffusers", "UNet2DModel"]
    note = json.loads((root / "four" / "fewstep.json").read_text())
    # EDM's grid (arXiv 2206.00364, eq. 5) as sigma / (1 + sigma).
    sigma = [(u * 80 ** (1 / 7) + (1 - u) * 0.002 ** (1 / 7)) ** 7 for u in (1.0, 0.75, 0.5, 0.25)]
    assert note.pop("levels") == pytest.approx([s / (1 + s) for s in sigma], rel=1e-9)
    assert note == {
        "kind": "renoise",
        "steps": [1.0, 0.75, 0.5, 0.25],
        "eta": 0.3,
        "classes": 10,
        "call": {"num_inference_steps": 4},
        "settings": {},
    }


def test_the_card_states_levels_parity_usage_and_a_recipe_that_parses(product: Product, tmp_path: Path):
    done = export(at(product, STEPS["four"]), tmp_path / "four", results=[("FD, 1797 samples", "3.21")])
    text = (tmp_path / "four" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "diffusers"
    assert "A 4-call generator" in text
    sigmas = [(0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for u in STEPS["four"]]
    assert f"| noise levels (sigma / alpha), first to last | {', '.join(f'{s:.6g}' for s in sigmas)} |" in text
    assert f"| largest difference from fewstep's own sampler, same noise | {done.parity:.2e} |" in text
    assert "| FD, 1797 samples | 3.21 |" in text
    assert done.usage in text
    assert "| steps trained | 2 |" in text
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert recipe["method"]["name"] == "dmd2"


def test_an_exported_folder_is_opened_and_drawn_from(product: Product, exports: Any):
    again = open_product(exports[0] / "four")
    assert again.sampler == Sampler(kind="renoise", steps=STEPS["four"])
    assert (again.classes, again.shape, again.trained) == (10, (1, 8, 8), (4,))
    a, b = at(product, STEPS["four"]).draw(12, seed=5, batch=5), again.draw(12, seed=5)
    assert float((a - b).abs().max()) <= 1e-4
    with pytest.raises(UserError, match=r"^--steps 1: this student was trained for 4; add --any to try it anyway$"):
        again.with_steps(1)
    assert len(again.with_steps(2, any_steps=True).sampler.steps) == 2


@pytest.mark.parametrize("parity", [2e-4, float("nan")])
def test_a_parity_violation_leaves_nothing(
    product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: float
):
    monkeypatch.setattr(base, "difference", lambda *_: parity)
    with pytest.raises(ExportRefused, match=r"^the pipeline differs from fewstep's sampler by (2\.00e-04|nan) > 1e-04$"):
        export(product, tmp_path / "out")
    assert names(tmp_path) == []


def test_a_wrong_schedule_is_caught_by_the_real_comparison(
    product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export(product, tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(routes, "schedule", lambda _: (3, {"num_inference_steps": 2}))
    with pytest.raises(UserError, match=r"^schedule: evaluation and exported scheduler stand at different noise"):
        export(product, tmp_path / "out")
    monkeypatch.setattr(unet, "check_export", lambda *_: None)
    with pytest.raises(UserError, match=r"^schedule: evaluation and exported scheduler stand at different noise"):
        export(product, tmp_path / "out")  # the scheduler itself is asked before it is written
    monkeypatch.setattr(unet, "check_scheduler", lambda *_: None)
    with pytest.raises(UserError, match=r"call\.num_inference_steps is 2, but there are 1 steps"):
        export(product, tmp_path / "out")  # its own note is read back
    monkeypatch.setattr(base, "read_note", lambda *_: None)
    with pytest.raises(ExportRefused, match="differs from fewstep's sampler by"):
        export(product, tmp_path / "out")
    # The earlier export is still there, untouched.
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "README.md").read_text() == before


def test_weights_that_are_not_finite_are_not_exported(product: Product, tmp_path: Path):
    import copy

    broken = copy.deepcopy(product.net)
    broken.net.model.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ExportRefused, match="differs from fewstep's sampler by nan"):
        export(replace(product, net=broken), tmp_path / "out")
    assert names(tmp_path) == []


def test_a_full_disk_leaves_nothing(product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    from diffusers import ConsistencyModelPipeline
    from safetensors import SafetensorError

    failures = (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    )
    save = ConsistencyModelPipeline.save_pretrained
    for failure in failures:

        def full(self: Any, folder: Path, failure: Exception = failure, **options: Any) -> None:
            save(self, folder, **options)
            (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
            raise failure

        monkeypatch.setattr(ConsistencyModelPipeline, "save_pretrained", full)
        with pytest.raises(UserError, match=r"out: the export could not be written: .*No space left on device"):
            export(product, tmp_path / "out")
        assert names(tmp_path) == []


def test_a_folder_of_something_else_is_not_overwritten(product: Product, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(UserError, match="exists and is not an earlier export; choose another folder"):
        export(product, tmp_path)
    assert names(tmp_path) == ["thesis.txt"]


def test_students_without_a_stock_pipeline_are_refused(product: Product, tmp_path: Path):
    from fewstep.algebra.process import Flow
    from fewstep.networks.denoiser import Denoiser
    from fewstep.networks.mlp import MLP

    net: Any = product.net

    def refused(net: Any, sampler: Sampler | None = None) -> str:
        with pytest.raises(ExportRefused) as caught:
            export(replace(product, net=net, sampler=sampler or product.sampler), tmp_path / "out")
        assert names(tmp_path) == []
        return str(caught.value)

    assert refused(Denoiser(MLP(2, 8, 2), Flow(), "velocity", "angle")) == (
        "no stock diffusers pipeline runs a MLP student"
    )
    assert refused(Denoiser(net.net, net.process, "edm", "log_sigma/4"), Sampler(steps=(1.0, 0.5))).startswith(
        "EDMEulerScheduler has no noise to add between steps as this student needs it; train with prediction 'cm'"
    )
    with pytest.raises(ExportRefused, match=f"^{product.title} is not a run of fewstep$"):
        export(replace(product, recipe=None), tmp_path / "out")
    assert refused(net, Sampler(steps=(1.0, 0.123456789123))).startswith(
        "steps [1.0, 0.123456789123] lie on no grid of up to 10,000 points; round them"
    )


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ((1.0,), 2),
        ((1.0, 0.5), 3),
        ((1.0, 0.75, 0.5, 0.25), 5),
        ((1.0, 0.9), 11),
        ((1.0, 0.6, 0.35), 21),
        ((0.5,), 2),
        ((0.8, 0.3), 9),
    ],
)
def test_grids_of_step_lists(steps: tuple[float, ...], count: int):
    from diffusers import CMStochasticIterativeScheduler

    points, call = schedule(steps)
    assert points == count
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    first = (low + steps[0] * (high - low)) ** 7
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=points, sigma_max=first)
    scheduler.set_timesteps(**call)
    wanted = torch.tensor([(low + u * (high - low)) ** 7 for u in steps], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas[: len(steps)].double(), wanted, rtol=1e-6, atol=0)


def test_a_teacher_trained_here_comes_back_as_a_teacher(product: Product, tmp_path: Path):
    folder = tmp_path / "teacher"
    done = export(replace(product, sampler=many_step(4)), folder)
    assert done.usage == f"teacher: {{name: diffusers, path: {folder}}}"
    assert 0 < done.parity < HALF_PARITY / 3
    assert f"| {done.parity:.1e} |" in (folder / "README.md").read_text()
    assert names(folder) == [".fewstep", "README.md", "fewstep.json", "model_index.json", "scheduler", "unet"]
    net: Any = load_denoiser(str(folder), classes=10)
    assert net.net.classes == 10
    assert net.net.model.class_embedding.weight.shape[0] == 11  # guidance needs the null class
    assert net.process == product.net.process
    for key, value in product.net.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value.half().float(), rtol=0, atol=0)
    assert all(p.dtype == torch.float32 for p in product.net.parameters())
    shutil.rmtree(folder)


def test_a_teacher_that_half_precision_cannot_hold_is_not_written(
    product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import copy

    def refused(value: float, layer: str) -> str:
        net: Any = copy.deepcopy(product.net)
        with torch.no_grad():
            net.net.model.get_parameter(layer).view(-1)[3] = value
        with pytest.raises(ExportRefused) as caught:
            export(replace(product, net=net, sampler=many_step(4)), tmp_path / "out")
        assert names(tmp_path) == []
        return str(caught.value)

    assert refused(7e4, "conv_in.weight") == (
        "float16, in which teachers are written, cannot hold conv_in.weight (1 of 72 values): it ends at 65504; train "
        "with a lower rate"
    )
    told = refused(float("inf"), "conv_in.weight")
    assert told.startswith("the weights hold NaN or infinity in net.model.conv_in.weight (1 of 72 values); tr")
    monkeypatch.setattr("fewstep.export.teacher.HALF_PARITY", 1e-9)
    told = refused(0.1, "conv_out.weight")
    assert "the folder read as a teacher differs from the network in float32 by" in told
