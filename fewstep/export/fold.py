"""What a student has beyond a stock UNet2DModel, folded into its weights where it is constant; else a refusal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algebra.jump import clean, times_of
from fewstep.algebra.process import EDM, Process
from fewstep.algebra.sampling import Sampler
from fewstep.export.base import ExportRefused
from fewstep.export.flow_map import LOOP
from fewstep.export.routes import INSTEAD
from fewstep.networks.adapters import plain_copy
from fewstep.networks.denoiser import Denoiser, Rescheduled
from fewstep.networks.extras import ANGLE, values_of
from fewstep.networks.unet2d import UNet2D


def fold(net: nn.Module, sampler: Sampler) -> tuple[Denoiser, Sampler]:
    """(copy on the CPU without further inputs, the sampler in its process): what a stock UNet2DModel can be.

    Folds an adapter, guidance, a constant destination time and a process that was changed by `Rescheduled` into the
    weights, and leaves out the null class. A destination time is constant where every call aims at the clean end: one
    step, or re-noising. A changed process is undone for one step only: with several, levels and noise would not be
    the stock scheduler's.
    """
    net = plain_copy(net)  # an adapter is merged, adapters of other roles are left out
    inner = net.denoiser if isinstance(net, Rescheduled) else net
    if not (isinstance(inner, Denoiser) and isinstance(inner.net, UNet2D)):
        raise ExportRefused(f"no stock diffusers pipeline runs a {type(getattr(inner, 'net', inner)).__name__} student")
    if inner.net.image_channels:
        raise ExportRefused(
            "ConsistencyModelPipeline hands no picture to a UNet2DModel; train the network as `unet-text`, whose "
            f"students IFSuperResolutionPipeline runs; {INSTEAD}"
        )
    unet: Any = inner.net.model.eval()
    if unet.device.type != "meta":  # `forecast` asks with shapes alone
        unet.cpu()
    several = len(sampler.steps) > 1
    if moving(inner, sampler):
        counts = sampler.counts or ()
        one = "; it was trained for 1 step as well, which exports (method.steps)" if 1 in counts else ""
        raise ExportRefused(
            f"this student is told where each of its {len(sampler.steps)} steps ends, and no stock pipeline "
            f"hands a UNet2DModel a destination time{one}; with one step it folds into the weights; {LOOP}"
        )
    if inner.inputs:
        add_to_embedding(unet, constant_inputs(net, inner, sampler))
    if isinstance(net, Rescheduled):
        if several:
            raise ExportRefused(
                f"a student of {len(sampler.steps)} steps that was trained in {type(net.process).__name__} "
                f"on a network of {type(inner.process).__name__} has no stock scheduler; with one step it has, or "
                f"train it in its teacher's own process; {INSTEAD}"
            )
        sampler = undo(net, inner.process, unet, sampler)
    if inner.net.classes:
        # The null class is for training; a pipeline that draws classes at random must not draw it.
        table = unet.class_embedding.weight[: inner.net.classes].detach().clone()
        unet.class_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        unet.register_to_config(num_class_embeds=inner.net.classes)
    plain = Denoiser(UNet2D(unet, inner.net.classes), inner.process, inner.prediction, inner.time_input)
    return plain, sampler


def moving(inner: Any, sampler: Sampler) -> bool:
    """Whether the input that says where a jump ends, or how long it is, changes from call to call."""
    return len(sampler.steps) > 1 and ("length" in inner.inputs or (inner.takes_s and sampler.kind != "renoise"))


@torch.no_grad()
def constant_inputs(net: Any, inner: Denoiser, sampler: Sampler) -> Tensor:
    """The sum of the input embeddings (width,) at the values that every call of the sampler has."""
    t = times_of(sampler.steps[:1], net.process)
    s = clean(net.process, t)
    if isinstance(net, Rescheduled):
        t, s = net._time(t), net._time(s)
    w = None if sampler.guidance is None else torch.full_like(t, sampler.guidance)
    extras: Any = inner.net.extras
    angles = {
        n: ANGLE[n](inner.process, v).to(extras[n].frequency.device, torch.float32)
        for n, v in values_of(inner.process, inner.inputs, t, s, w, None).items()
    }
    return extras.embed(angles)[0].float()


def add_to_embedding(unet: Any, constant: Tensor) -> None:
    """Add a constant (width,) to the output of the time embedding."""
    if getattr(unet.time_embedding, "post_act", None) is not None:
        raise ExportRefused("this UNet has an activation behind its time embedding, so inputs do not fold")
    with torch.no_grad():
        bias = unet.time_embedding.linear_2.bias
        bias += constant.to(bias)


@torch.no_grad()
def undo(net: Rescheduled, base: Process, unet: Any, sampler: Sampler) -> Sampler:
    """The one-step sampler of the base process; what is left of the input's scale goes into conv_in.

    At the prior of a flow the base stands at its noisiest level with an input of size |(alpha, sigma)|, which
    for EDM is sqrt(1 + 1 / sigma_max^2) times the noise that a scheduler starts from.
    """
    t = net.process.grid(torch.tensor([sampler.steps[0]], dtype=torch.float64))
    noise = torch.ones(1, 1, dtype=torch.float64)
    x, time = net._match(net.process.prior(noise, t), t)
    unet.conv_in.weight *= float(x / base.prior(noise, time))
    return Sampler(kind="renoise", steps=(level_of(base, time),))


def level_of(process: Any, t: Tensor) -> float:
    """The level u of one process time: the inverse of `grid`."""
    if isinstance(process, EDM):
        low, high = process.sigma_min ** (1 / process.rho), process.sigma_max ** (1 / process.rho)
        return min(1.0, (float(t) ** (1 / process.rho) - low) / (high - low))
    return float(t) / process.t_max
