"""A perfect network behind any wrapper gives the true x0, and folders mean what their schedulers say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    UNet2DModel,
)
from helpers_core import F64, PROCESSES, Recorder, col, inner_times, kinds, native

from fewstep.algebra.guidance import Guided
from fewstep.algebra.jump import solver_step
from fewstep.algebra.prediction import from_raw
from fewstep.algebra.process import EDM, DiscreteVP, Flow, Process, Trig
from fewstep.algebra.rollout import renoise
from fewstep.networks.analytic import Mixture, gaussian
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.networks.diffusers import load_denoiser, read_scheduler
from fewstep.networks.unet2d import UNet2D
from fewstep.networks.wrappers import PixArt

B, C, H, W = 2, 3, 8, 16


def truth(p: Process, t: torch.Tensor, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(len(t), C, H, W, generator=g, dtype=F64) for _ in range(2))
    a, s = (f(t)[:, None, None, None] for f in (p.alpha, p.sigma))
    return x0.to(dtype), eps.to(dtype), (a * x0 + s * eps).to(dtype)


def oracle(p: Process, kind: str, t: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    a, s, da, ds = (f(t)[:, None, None, None] for f in (p.alpha, p.sigma, p.dalpha, p.dsigma))
    return native(kind, a, s, da, ds, x0, eps)


TIME = {
    "t": lambda p, t: t,
    "1000t": lambda p, t: 1000 * t,
    "index": lambda p, t: t - 1,
    "angle": lambda p, t: torch.atan2(p.sigma(t), p.alpha(t)),
    "log_sigma/4": lambda p, t: torch.log(p.sigma(t)) / 4,
    "250log_sigma": lambda p, t: 250 * torch.log(p.sigma(t)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_oracle_through_the_denoiser(name: str) -> None:
    p = PROCESSES[name]
    t = inner_times(p, B, 0.3, 0.7)
    x0, eps, x = truth(p, t)
    for kind in kinds(p):
        raw = oracle(p, kind, t, x0, eps)
        for time_input, value in TIME.items():
            net = Recorder(lambda x, time, cond, raw=raw: raw)
            q = Denoiser(net, p, kind, time_input)(x, t, "cond")  # type: ignore[arg-type]
            assert torch.allclose(q.x0, x0, rtol=0, atol=1e-10 * float(1 + (p.sigma(t) / p.alpha(t)).max()))
            seen, time, cond = net.seen[0]
            c_in = 1 / torch.sqrt(t**2 + 0.25) if kind in ("edm", "cm") else torch.ones_like(t)
            assert torch.allclose(seen, c_in[:, None, None, None] * x, rtol=1e-14)
            assert torch.allclose(time.double(), value(p, t), rtol=1e-6)
            assert cond == "cond"


FOLDERS: list[tuple[Any, str, Process]] = [
    (DDPMScheduler(prediction_type="epsilon"), "eps", DiscreteVP()),
    (DDPMScheduler(prediction_type="v_prediction"), "v", DiscreteVP()),
    (DDIMScheduler(prediction_type="sample"), "x0", DiscreteVP()),
    (
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=500),
        "eps",
        DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps=500),
    ),
    (EDMEulerScheduler(sigma_data=0.4, sigma_max=30.0), "edm", EDM(sigma_data=0.4, sigma_max=30.0)),
    (CMStochasticIterativeScheduler(), "cm", EDM()),
    (FlowMatchEulerDiscreteScheduler(), "velocity", Flow()),
]


def tiny_unet(classes: int | None = None, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=(H, W),
        in_channels=C,
        out_channels=C,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=classes,
    )


@pytest.mark.parametrize(("scheduler", "kind", "process"), FOLDERS)
def test_oracle_through_a_diffusers_folder(
    tmp_path: Path, scheduler: Any, kind: str, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_unet(4).save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    denoiser = load_denoiser(str(tmp_path), classes=3)
    assert denoiser.process == process
    t = inner_times(process, B, 0.3, 0.7)
    if isinstance(process, DiscreteVP):
        t = t.round()
    labels = torch.tensor([0, 3])
    x0, eps, x = truth(process, t, torch.float32)
    # First the true network: what it sees and what is made of its answer.
    net: Any = denoiser.net
    seen: list[Any] = []
    forward = net.model.forward

    def watch(sample: torch.Tensor, timestep: torch.Tensor, **call: Any) -> Any:
        seen.append((sample, timestep, call["class_labels"]))
        return forward(sample, timestep, **call)

    monkeypatch.setattr(net.model, "forward", watch)
    with torch.no_grad():
        q = denoiser(x, t, labels)
        sample, timestep, cond = seen[0]
        raw = forward(sample, timestep, class_labels=cond, return_dict=False)[0]
    assert torch.equal(cond, labels)
    again = from_raw(process, kind, x, t, raw)
    assert torch.equal(q.x0, again.x0)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        bar = table[(t - 1).long()].double()[:, None, None, None]
        assert torch.equal(timestep, (t - 1).float())
        a, s = bar.sqrt(), (1 - bar).sqrt()
        want = {"eps": (x - s * raw) / a, "v": a * x - s * raw, "x0": raw}[kind]
        assert torch.allclose(q.x0.double(), want.double(), rtol=1e-4, atol=2e-5)
    elif kind in ("edm", "cm"):
        sd = process.sigma_data  # type: ignore[attr-defined]
        assert torch.allclose(sample.double(), x / torch.sqrt(t**2 + sd**2)[:, None, None, None], rtol=1e-5)
        factor = {"edm": 0.25, "cm": 250.0}[kind]
        assert torch.allclose(timestep.double(), factor * torch.log(t), rtol=1e-6)
    # Then an oracle in the network's place.
    at = process.sigma_data if isinstance(process, EDM) else 0.5  # type: ignore[attr-defined]
    a, s = (f(t)[:, None, None, None] for f in (process.alpha, process.sigma))
    if kind == "edm":
        target = (x0 - at**2 / (s**2 + at**2) * x) * torch.sqrt(s**2 + at**2) / (s * at)
    else:
        target = oracle(process, kind, t, x0, eps)
    monkeypatch.setattr(net.model, "forward", lambda *args, **call: (target.float(),))
    assert torch.allclose(denoiser(x, t, labels).x0, x0, rtol=0, atol=2e-4)


def test_features_are_those_of_the_full_pass_and_stop_early() -> None:
    net = UNet2D(tiny_unet(4), 3).double().eval()
    denoiser = Denoiser(net, DiscreteVP(), "eps", "index")
    t, labels = col(100.0, 700.0), torch.tensor([2, 0])
    _, _, x = truth(DiscreteVP(), t)
    taps = ("down0", "mid")
    with torch.no_grad():
        whole = denoiser(x, t, labels, taps=taps)
        alone = denoiser.features(x, t, labels, taps)
        assert torch.equal(whole.x0, denoiser(x, t, labels).x0)
    assert set(alone) == set(taps)
    for tap in taps:
        assert torch.equal(alone[tap], whole.features[tap])
    with pytest.raises(ValueError, match="tap 'middle'"):
        denoiser.features(x, t, labels, ("middle",))
    assert not any(m._forward_hooks for m in net.modules())


PAIRS = [(a, b) for a in PROCESSES for b in PROCESSES]


@pytest.mark.parametrize(("base", "other"), PAIRS)
def test_rescheduled_is_the_same_model(base: str, other: str) -> None:
    # D depends on x / alpha and sigma / alpha alone; here inside the range of both processes.
    p, q = PROCESSES[base], PROCESSES[other]
    t = q.t_of_angle(torch.atan(col(0.05, 0.7, 9.0)))
    x = torch.hypot(q.alpha(t), q.sigma(t))[:, None] * torch.tensor([[0.2], [-1.1], [0.8]], dtype=F64)
    args = ([0.3, 0.7], [[-1.2], [0.8]], [0.25, 0.35])
    got = Rescheduled(Mixture(p, *args), q)(x, t)
    want = Mixture(q, *args)(x, t)
    assert torch.allclose(got.x0, want.x0, rtol=1e-8, atol=1e-10)
    assert torch.allclose(got.eps, want.eps, rtol=1e-7, atol=1e-8)
    assert got.process is q


def test_rescheduled_beyond_the_base_and_at_pure_noise() -> None:
    # At alpha = 0 the ratio sigma / alpha is infinite; the base answers as at its noisiest level.
    base = EDM()
    x = torch.tensor([[0.9]], dtype=F64)
    for process in (Flow(), Trig()):
        q = Rescheduled(gaussian(base, 0.7, 0.4), process)(x, process.grid(col(1.0)))
        want = gaussian(base, 0.7, 0.4)(math.hypot(1, 80) * x, col(80.0)).x0
        assert torch.allclose(q.x0, want, rtol=1e-12)
        assert torch.allclose(q.eps, x, rtol=0, atol=1e-14)
    near = Rescheduled(gaussian(base, 0.7, 0.4), Flow())(x, col(0.999))
    scale = math.hypot(1, 80) / math.hypot(0.001, 0.999)
    assert torch.allclose(near.x0, gaussian(base, 0.7, 0.4)(scale * x, col(80.0)).x0, rtol=1e-12)
    # A clean input is answered at the base's cleanest level.
    clean = Rescheduled(gaussian(base, 0.7, 0.4), Flow())(x, col(0.0))
    assert float(clean.x0) == pytest.approx(float(gaussian(base, 0.7, 0.4)(x, col(0.002)).x0), abs=1e-5)
    assert torch.equal(clean.at(col(0.0)), x)


def test_oracle_through_guided_and_rescheduled_together() -> None:
    p, q = DiscreteVP(), Flow()
    t = q.t_of_angle(torch.atan(col(0.2, 3.0)))
    x0, eps, x = truth(q, t)

    def answer(seen: torch.Tensor, time: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        rows = len(seen) // B
        true = torch.cat([eps] * rows)
        return true * cond[:, None, None, None]

    # Conditional eps is the truth; the null answer is 0, so scale w gives w eps.
    net = Rescheduled(Denoiser(Recorder(answer), p, "eps", "index"), q)
    guided = Guided(net, 1.5, torch.zeros_like)
    one = guided(x, t, torch.ones(B))
    assert torch.allclose(one.eps, 1.5 * eps, rtol=1e-7, atol=1e-8)
    assert torch.allclose(net(x, t, torch.ones(B)).x0, x0, rtol=0, atol=1e-7)
    assert guided.process is q


def test_ddim_step_equals_the_diffusers_scheduler() -> None:
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    p = DiscreteVP()
    eps = torch.randn(B, C, H, W)
    net = Denoiser(Recorder(lambda x, t, c: eps.double()), p, "eps", "index")
    for k in (980, 500, 0):
        x = torch.randn(B, C, H, W)
        theirs = scheduler.step(eps, k, x).prev_sample
        t = col(k + 1.0).expand(B)
        s = (t - 20).clamp_min(0)
        ours = solver_step(net, x.double(), t, s)
        assert torch.allclose(ours, theirs.double(), rtol=1e-4, atol=1e-5)


def test_flow_and_edm_steps_equal_the_diffusers_schedulers() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    v, x = torch.randn(B, C, H, W), torch.randn(B, C, H, W)
    net = Denoiser(Recorder(lambda x, t, c: v.double()), Flow(), "velocity", "1000t")
    t, s = (flow.sigmas[i].double().expand(B) for i in (0, 1))
    theirs = flow.step(v, flow.timesteps[0], x).prev_sample
    assert torch.allclose(solver_step(net, x.double(), t, s, solver="euler"), theirs.double(), atol=1e-6)
    edm = EDMEulerScheduler()
    edm.set_timesteps(6)
    grid = EDM().grid(torch.linspace(1, 0, 6, dtype=F64))
    assert torch.allclose(edm.sigmas[:6].double(), grid, rtol=2e-6)
    x = torch.randn(B, C, H, W) * 80
    net = Denoiser(Recorder(lambda x, t, c: v.double()), EDM(), "edm", "log_sigma/4")
    edm.scale_model_input(x, edm.timesteps[0])
    theirs = edm.step(v, edm.timesteps[0], x).prev_sample
    ours = solver_step(net, x.double(), grid[0].expand(B), grid[1].expand(B), solver="euler")
    assert torch.allclose(ours, theirs.double(), rtol=1e-4, atol=1e-4)


def test_consistency_step_equals_the_diffusers_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(timesteps=[39, 22])
    raw = torch.randn(B, C, H, W)
    noise = torch.randn(B, C, H, W)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise)
    first, second = (float(s) for s in scheduler.sigmas[:2])
    x = torch.randn(B, C, H, W) * first
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    # Their code clips the denoised sample to [-1, 1] unless told not to.
    scheduler.register_to_config(clip_denoised=False)
    theirs = scheduler.step(raw, scheduler.timesteps[0], x).prev_sample
    net = Denoiser(Recorder(lambda x, t, c: raw.double()), EDM(), "cm", "250log_sigma")
    x0 = net(x.double(), col(first).expand(B)).x0
    ours = renoise(EDM(), x0, noise.double(), col(second).expand(B))
    assert torch.allclose(ours, theirs.double(), rtol=1e-4, atol=1e-4)


def test_scheduler_configs_that_cannot_be_read_are_refused() -> None:
    good = dict(DDPMScheduler().config) | {"_class_name": "DDPMScheduler"}
    read_scheduler(good, "x")
    for change, match in (
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler"),
    ):
        with pytest.raises(RuntimeError, match=match):
            read_scheduler(good | change, "x")
    del good["prediction_type"]
    with pytest.raises(RuntimeError, match="prediction_type is missing"):
        read_scheduler(good, "x")


@pytest.mark.parametrize("told", [False, True], ids=["left out", "given"])
def test_pixart_is_told_size_and_aspect_as_height_over_width(told: bool) -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=8,
        cross_attention_dim=24, caption_channels=12, sample_size=8, patch_size=2, use_additional_conditions=True,
    )  # fmt: skip
    seen: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda _m, _a, named: seen.append(named["added_cond_kwargs"]), with_kwargs=True)
    wrapper = PixArt(model, pixels=16)
    cond = wrapper.example(3)
    if told:
        cond |= {"aspect": torch.full((3, 1), 0.6), "resolution": torch.full((3, 2), 99.0)}
    with torch.no_grad():
        wrapper(torch.randn(3, 4, 8, 12), torch.full((3,), 7.0), cond)
    assert seen[0]["aspect_ratio"].tolist() == [[pytest.approx(0.6 if told else 8 / 12)]] * 3
    assert seen[0]["resolution"].tolist() == [[99.0, 99.0] if told else [128.0, 192.0]] * 3
