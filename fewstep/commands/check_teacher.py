"""`fewstep check-teacher`: is this pipeline folder read right? Every convention is tried, the verdict is in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.condition import nulled
from fewstep.algebra.guidance import guided
from fewstep.algebra.prediction import Prediction, from_raw
from fewstep.algebra.process import DiscreteVP, Flow, bc
from fewstep.algebra.rollout import renoise
from fewstep.commands.denoising import denoising
from fewstep.commands.hushed import hushed
from fewstep.commands.own_grid import OFFERED, grid_said
from fewstep.commands.schedulers import first_order, scheduler_of, times_set
from fewstep.config import UserError
from fewstep.export.stock import difference, fresh_noise, open_stock, run_stock
from fewstep.networks.components import examine
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.diffusers import load_denoiser
from fewstep.networks.folder import Folder, part_of, read_folder
from fewstep.networks.scheduler import DDPM_FAMILY, read_scheduler
from fewstep.networks.weights import NotFinite
from fewstep.objectives.trajectory import probe

B = 3
SAMPLES = 1e-3
"""Largest difference from the pipeline's own samples, in units of their size (float32 through several calls)."""


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, what came out, and whether that is right; None: it could not be tried."""

    name: str
    said: str
    ok: bool | None = True
    fatal: bool = True


@dataclass
class Report:
    """All findings about a folder."""

    path: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(f.ok is not False for f in self.findings if f.fatal)

    def verdict(self) -> str:
        """One or two sentences."""
        wrong = [f.name for f in self.findings if f.fatal and f.ok is False]
        if wrong == ["weights"]:
            return f"{self.path} cannot be distilled: {self.findings[-1].said}"
        if wrong:
            return (
                f"{self.path} is not read right: {', '.join(wrong)}. Do not train on it; compare the configs of "
                "scheduler, network and VAE with those it was trained with."
            )
        limits = [f.name for f in self.findings if not f.fatal and f.ok is False]
        if limits:
            return (
                f"{self.path} can be distilled by methods without tangents; sCM, MeanFlow and their kin need "
                "`tangent: central` here."
            )
        elsewhere = any(f.name == "own grid" and OFFERED in f.said for f in self.findings)
        grid = " Its own scheduler samples on another grid than a student's." if elsewhere else ""
        return f"{self.path} can be distilled: every convention was read from its own files and holds.{grid}"

    def text(self) -> str:
        """The lines that the command prints."""
        mark = {True: "ok  ", False: "WRONG", None: "-   "}
        lines = [f"{mark[f.ok]:6}{f.name:22} {f.said}" for f in self.findings]
        return "\n".join([*lines, "", self.verdict()])


@hushed()
def check_teacher(path: str, **options: Any) -> Report:
    """Open a pipeline folder and try every convention on it; `options` go to `load_denoiser`.

    Raises UserError for a folder that cannot be opened at all (see `fewstep.networks.diffusers`).
    """
    folder = read_folder(path)
    folder.require_components()
    report = Report(path)
    try:
        net = load_denoiser(path, **options)
    except NotFinite as error:
        report.findings.append(Finding("weights", str(error), False))
        return report
    folder.require_agreement()
    try:
        report.findings += _others(folder)
    except UserError as error:
        report.findings.append(Finding("weights", str(error), False))
        return report
    wrapper: Any = net.net
    size = options.get("size") or wrapper.small_size()
    if size != (options.get("size") or wrapper.sample_size()):
        told = {k: v for k, v in {"prediction_type": options.get("prediction")}.items() if v}
        tokens = wrapper.tokens(size)
        net.process = read_scheduler({**folder.scheduler, **told}, str(folder.scheduler_file), tokens, wrapper.mu)[0]
    generator = torch.Generator().manual_seed(0)
    shape = (wrapper.channels(), *size)
    cond = wrapper.example(B, generator)
    x = torch.randn(B, *shape, generator=generator)
    t = net.process.grid(torch.linspace(0.25, 0.75, B, dtype=torch.float64))
    for find in (_read, _conversions, _oracle, _times, _grid, _guidance, _taps, _samples, _denoising, _tangent, _memory):
        report.findings += find(Case(folder, net, cond, x, t))
    return report


@dataclass(frozen=True)
class Case:
    """What every check is given: the folder, the denoiser, a condition, x (b, c, h, w) and times (b,)."""

    folder: Folder
    net: Denoiser
    cond: Any
    x: Tensor
    t: Tensor

    @property
    def wrapper(self) -> Any:
        return self.net.net


def _others(folder: Folder) -> Iterator[Finding]:
    """VAE and text encoders, which no check below opens."""
    parts = {name: entry[0] for name, entry in folder.index.items() if part_of(entry)}
    parts = {name: library for name, library in parts.items() if name.startswith(("vae", "text_encoder"))}
    held = {
        name: examine(folder.root / name, f"teacher {folder.shown}", library)
        for name, library in parts.items()
        if any((folder.root / name).glob("*.safetensors"))
    }
    if held:
        yield Finding("other parts", ", ".join(f"{name}: {n} finite tensors" for name, n in held.items()))


def _read(case: Case) -> Iterator[Finding]:
    net, folder = case.net, case.folder
    process = f"{type(net.process).__name__}({_fields(net.process)})"
    yield Finding("network", f"{folder.kind}, x of {list(case.x.shape[1:])}, prediction {net.prediction}")
    sized = ", its shift that of this size of x" if folder.scheduler.get("use_dynamic_shifting") else ""
    yield Finding("noise schedule", f"{process} of {folder.scheduler.get('_class_name')}, time {net.time_input}{sized}")
    lat = folder.latents
    yield Finding("latents", lat.said() if lat else "pixels, no VAE")


def _fields(process: Any) -> str:
    told = {k: v for k, v in vars(process).items() if k != "name"}
    if isinstance(process, DiscreteVP):
        plain = {"zero_snr": False, "snr_shift": 1.0, "betas": None}
        told = {k: v for k, v in told.items() if k not in plain or v != plain[k]}
        told |= {"betas": f"{process.steps} of its own"} if process.betas else {}
    return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items())


def _truth(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    p, t = case.net.process, case.t
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(case.x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, eps, bc(p.alpha(t), x0) * x0 + bc(p.sigma(t), x0) * eps


def _conversions(case: Case) -> Iterator[Finding]:
    x0, eps, x = _truth(case)
    p, kind = case.net.process, case.net.prediction
    raw = Prediction(x0, eps, x, case.t, p).raw(kind)
    back = from_raw(p, kind, x, case.t, raw)
    error = max(float((back.raw(kind) - raw).abs().max()), float((back.x0 - x0).abs().max()))
    yield Finding("conversions", f"{kind} -> (x0, eps) -> {kind} returns to {error:.1e}", error < 1e-8)


def _oracle(case: Case) -> Iterator[Finding]:
    """A perfect network in the model's place gives the true x0 through the wrapper."""
    x0, eps, x = _truth(case)
    raw = Prediction(x0, eps, x, case.t, case.net.process).raw(case.net.prediction)
    model = case.wrapper.model
    before = model.__dict__.get("forward")
    model.forward = lambda *_, **__: (case.wrapper.own(raw.float()),)
    try:
        with torch.no_grad():
            found = case.net(x.float(), case.t, case.cond).x0
    finally:
        del model.forward
        if before is not None:
            model.forward = before
    error = float((found - x0).abs().max())
    amplified = float((1 + case.net.process.sigma(case.t) / case.net.process.alpha(case.t)).max())
    yield Finding("oracle", f"a perfect network gives x0 to {error:.1e}", error < 1e-5 * amplified)


def _times(case: Case) -> Iterator[Finding]:
    """The number that stands for a noise level: the scheduler's timestep against what the model is handed."""
    try:
        scheduler = scheduler_of(case.folder, case.wrapper, tuple(case.x.shape[2:]), 4)
    except (AssertionError, AttributeError, IndexError, TypeError, ValueError) as error:
        yield Finding("time scaling", f"its scheduler sets no 4 timesteps: {error}", None)
        return
    p, stamps = case.net.process, scheduler.timesteps.double()
    if isinstance(p, DiscreteVP):
        stamps = stamps.round()  # Karras's levels and their like lie between the table's
        bar = scheduler.alphas_cumprod[stamps.long()].double()
        levels, t = (1 - bar).sqrt(), stamps + 1
    else:
        levels = t = times_set(scheduler, p)
        stamps = t if case.net.time_input == "t" else stamps
    seen: list[Tensor] = []
    call = case.wrapper.call

    def watch(x: Tensor, time: Tensor, cond: Any) -> Tensor:
        seen.append(time.double())
        return torch.zeros_like(x)

    case.wrapper.call = watch
    try:
        for value in t.unique():
            with torch.no_grad():
                case.net(case.x, value.expand(B), case.cond)
    finally:
        case.wrapper.__dict__.pop("call", None)
    assert call == case.wrapper.call
    handed = torch.stack([s[0] for s in seen])
    wanted = stamps.unique()
    # Multistep solvers round the timesteps of a flow to integers.
    slack = 0.0 if scheduler.timesteps.is_floating_point() or isinstance(p, DiscreteVP) else 1.0
    error = float((((handed - wanted).abs() - slack).clamp_min(0) / wanted.abs().clamp_min(1)).max())
    apart = float((p.sigma(t) - levels).abs().max() / levels.abs().max().clamp_min(1))
    said = f"timesteps of {type(scheduler).__name__} arrive to {error:.1e}, their noise levels agree to {apart:.1e}"
    yield Finding("time scaling", said, error < 1e-5 and apart < 1e-5)


def _grid(case: Case) -> Iterator[Finding]:
    """Where the folder's own pipeline asks the network in 4 steps, against a student's 1 - i / 4."""
    said, ok = grid_said(case.folder, case.net, tuple(case.x.shape[2:]))
    yield Finding("own grid", said, ok, fatal=False)


def null_of(wrapper: Any, cond: Any) -> Any:
    """A null condition to try guidance with: the null class, or other embeddings; None where there is none."""
    if isinstance(cond, Tensor):
        rows = wrapper.model.get_submodule("class_embedding").weight.shape[0] if wrapper.component == "unet" else None
        return None if rows == wrapper.classes else nulled(cond, wrapper.classes)
    if cond is None:
        return None
    other = wrapper.example(1, torch.Generator().manual_seed(7))
    return nulled(cond, {k: v for k, v in other.items() if k in ("text", "mask", "text2", "mask2", "pooled")})


@torch.no_grad()
def _guidance(case: Case) -> Iterator[Finding]:
    null = null_of(case.wrapper, case.cond)
    if null is None:
        yield Finding("guidance", "no condition with a null: nothing to guide", None)
        return
    with_cond, without = case.net(case.x, case.t, case.cond), case.net(case.x, case.t, null)
    kind, w = case.net.prediction, 3.7
    own, other = with_cond.raw(kind), without.raw(kind)
    combine = case.wrapper.combine
    by_hand = other + w * (own - other) if combine is None else combine(own, other, w)
    both = guided(case.net, case.x, case.t, case.cond, null, w).raw(kind)
    plain = guided(case.net, case.x, case.t, case.cond, null, 1.0).x0
    error = difference(both, by_hand)
    moved = float((with_cond.raw(kind) - without.raw(kind)).abs().max())
    ok = error < 1e-3 and torch.equal(plain, with_cond.x0) and moved > 0
    how = "uncond + w (cond - uncond)" if combine is None else f"as {case.wrapper.pipeline} has it,"
    said = f"{how} to {error:.1e}, w = 1 is none, the condition moves the output by {moved:.1e}"
    yield Finding("guidance", said, ok)


@torch.no_grad()
def _taps(case: Case) -> Iterator[Finding]:
    names = list(case.wrapper.blocks())
    whole = case.net(case.x, case.t, case.cond, taps=names).features
    alone = case.net.features(case.x, case.t, case.cond, names[:1])
    ok = all(bool(torch.isfinite(f).all()) and f.shape[0] == B for f in whole.values())
    ok = ok and torch.equal(alone[names[0]], whole[names[0]]) and set(whole) == set(names)
    shown = [f"{n} {list(whole[n].shape[1:])}" for n in (names[0], names[len(names) // 2], names[-1]) if n in whole]
    yield Finding("discriminator taps", f"{len(names)}: " + ", ".join(dict.fromkeys(shown)), ok)


def _samples(case: Case) -> Iterator[Finding]:
    for steps in (1, 4):
        try:
            ours, theirs, who = _both(case, steps)
        except (AttributeError, ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
            yield Finding("samples", f"the pipeline itself fails: {error}", False)
            return
        apart = difference(ours, theirs)
        word = "step" if steps == 1 else "steps"
        yield Finding(f"samples, {steps} {word}", f"{apart:.1e} from {who}", apart < SAMPLES)


@torch.no_grad()
def _both(case: Case, steps: int) -> tuple[Tensor, Tensor, str]:
    """(fewstep's samples, the folder's own, by whom) from the same noise, at the pipeline's own levels."""
    p, folder, wrapper = case.net.process, case.folder, case.wrapper
    scheduler, _ = first_order(case.folder, case.net, tuple(case.x.shape[2:]), steps)
    t = times_set(scheduler, p)
    stock = bool(wrapper.pipeline) and (folder.root / "model_index.json").is_file()
    # UNets' pipelines take a flow from a solver with use_flow_sigmas, and not from the scheduler that stands in for it.
    solver = isinstance(p, Flow) and folder.scheduler.get("_class_name") in DDPM_FAMILY
    if stock and not (solver and wrapper.component == "unet"):
        pipe = open_stock(folder.root, **{folder.component: wrapper.model, "scheduler": scheduler})
        levels: dict[str, Any] = {"num_inference_steps": steps}
        if wrapper.levels == "sigmas":
            levels["sigmas"] = [1 - i / steps for i in range(steps)]
        theirs = run_stock(pipe, wrapper, case.x, case.cond, levels)
        who = f"{type(pipe).__name__} with {type(scheduler).__name__}"
    else:
        theirs = _loop(case, scheduler)
        who = f"{type(scheduler).__name__} around the bare model"
    fresh = fresh_noise(wrapper, case.x)
    noisy = case.net.prediction == "cm" or type(scheduler).__name__ == "SCMScheduler"
    x = p.prior(case.x, t[0].expand(B))
    for now, after in pairwise([*t, None]):
        q = case.net(x, now.expand(B), case.cond)  # type: ignore[union-attr]
        if after is None:
            return q.x0, theirs, who
        s = after.expand(B)
        x = renoise(p, q.x0, fresh(0), s) if noisy else q.at(s)
    raise AssertionError


def _loop(case: Case, scheduler: Any) -> Tensor:
    """The scheduler's own loop around the bare model, for networks without a stock pipeline."""
    x = case.x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else case.x
    generator = torch.Generator().manual_seed(0)
    noisy = {"generator": generator} if case.net.prediction == "cm" else {}
    for stamp in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, stamp) if hasattr(scheduler, "scale_model_input") else x
        raw = case.wrapper(scaled.float(), stamp.expand(B).float(), case.cond)[0]
        x = scheduler.step(raw, stamp, x, return_dict=False, **noisy)[0]
    return x


def _denoising(case: Case) -> Iterator[Finding]:
    yield Finding("denoising", *denoising(case.net, case.x))


def _tangent(case: Case) -> Iterator[Finding]:
    p = case.net.process
    t = p.grid(torch.linspace(0.3, 0.8, B, dtype=torch.float64))
    try:
        gap = probe(case.net, case.x, t, t, case.cond)
    except UserError as error:
        yield Finding("tangent (JVP)", str(error), False, fatal=False)
        return
    yield Finding("tangent (JVP)", f"forward mode within {gap:.1%} of finite differences", fatal=False)


def _memory(case: Case) -> Iterator[Finding]:
    """Weights alone; activations depend on batch and checkpointing, which `fewstep plan` knows."""
    count = sum(q.numel() for q in case.wrapper.model.parameters())
    size = sum(q.numel() * q.element_size() for q in case.wrapper.model.parameters())
    trained = 4 * count * 4
    roles = (("teacher", size), ("student", trained + 4 * count), ("critic", trained))
    parts = ", ".join(f"{name} {_bytes(b)}" for name, b in roles)
    said = f"{count:,} weights; {parts} when trained in full in float32 (gradients, Adam, one average included)"
    yield Finding("memory per role", said)


def _bytes(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def parse_size(text: str) -> tuple[int, ...]:
    """'64x48' as height and width, '3x64x48' as those of three frames; UserError when it is neither."""
    sizes = text.lower().split("x")
    if len(sizes) not in (2, 3) or not all(n.isascii() and n.isdigit() and int(n) for n in sizes):
        raise UserError(f"--size {text!r}: expected HEIGHTxWIDTH such as 64x64, of a video FRAMESxHEIGHTxWIDTH")
    return tuple(map(int, sizes))


def main(path: str, *, size: str | None = None, **options: Any) -> int:
    """Print the report; the exit code: 0 when the folder is read right, 1 when it is not."""
    report = check_teacher(path, size=parse_size(size) if size else None, **options)
    print(report.text())
    return 0 if report.ok else 1
