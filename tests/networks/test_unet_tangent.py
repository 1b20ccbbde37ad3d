"""Tangents through diffusers' UNet2DModel with attention: right, unchanged by checkpointing, probed by the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import EDM
from fewstep.config import UserError
from fewstep.methods.scm import SCM
from fewstep.networks.adapters import enable_checkpointing
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.extras import Extras, Fourier
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.networks.unet2d import UNet2D
from fewstep.objectives.trajectory import tangent
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer


def unet() -> UNet2D:
    """Convolutions, self-attention on two levels and in the middle, class labels."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=6,
            resnet_time_scale_shift="scale_shift",
        )
        return UNet2D(model, 5)


def test_a_unet_with_attention_has_the_tangent_of_finite_differences() -> None:
    net = unet().double().eval()
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    t, dt = torch.tensor([0.7, 2.3], dtype=torch.float64), torch.tensor([1.3, -0.4], dtype=torch.float64)
    labels = torch.tensor([1, 4])

    def raw(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return net(x, t, labels)[0]

    forward = tangent(raw, (x, t, t), (dx, dt, None), "jvp")
    central = tangent(raw, (x, t, t), (dx, dt, None), "central", 1e-3)
    # diffusers embeds times in float32: the difference quotient is good to 1e-7 / 1e-3.
    assert float((forward - central).norm() / central.norm()) < 1e-3
    assert float(tangent(raw, (x, t, t), (0 * dx, dt, None), "jvp").norm()) > 1e-3


def step(checkpointing: bool) -> tuple[Tensor, list[Tensor], int]:
    """Loss and gradients of one sCM update, and how many blocks were recomputed in its backward pass."""
    student = Denoiser(unet(), EDM(), "cm", "250log_sigma")
    teacher = Denoiser(unet(), EDM(), "cm", "250log_sigma").requires_grad_(False)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.1)
    if checkpointing:
        assert enable_checkpointing(student) == 1
    runs = []
    block: Any = student.net.model.down_blocks[0].resnets[0]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    draws = Draws(fold("unet tangent"), torch.arange(2))
    x0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = Batch(draws, (3, 8, 8), x0, torch.tensor([0, 3]), torch.tensor([5, 5]))
    (losses,) = list(SCM(warmup=1, weighting="one").losses(Roles(teacher=teacher, student=student), batch, 5))
    before = len(runs)
    losses.total().backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return losses.total().detach(), grads, len(runs) - before


def test_checkpointing_changes_neither_tangent_nor_gradient() -> None:
    """The tangent runs without a graph, one block at a time; the primal's blocks are recomputed in its backward."""
    plain, saved = step(False), step(True)
    assert (plain[2], saved[2]) == (0, 1)
    torch.testing.assert_close(saved[0], plain[0], rtol=1e-5, atol=0)
    assert len(plain[1]) == len(saved[1]) > 50
    for a, b in zip(plain[1], saved[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Lost(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return lost(x)


@torch.library.custom_op("fewstep_tests::lost", mutates_args=())
def lost(x: Tensor) -> Tensor:
    return torch.tanh(x)


@lost.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


lost.register_autograd(lambda ctx, g: g, setup_context=lambda ctx, inputs, output: None)


def tiny(*settings: str) -> Trainer:
    small = ["student.width=16", "student.depth=3", "train.batch=8", "train.steps=2", "before.0.steps=1"]
    return Trainer(load("toy/scd", [*small, "train.sample_every=0", *settings]), cpu=True)


def test_the_trainer_refuses_a_network_whose_tangent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    original = MLP.__init__

    def broken(self: MLP, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.act = Lost()

    tiny().fit()  # as it is, the probe passes
    monkeypatch.setattr(MLP, "__init__", broken)
    with pytest.raises(UserError, match=r"tangent: central"):
        tiny().fit()
    trainer = tiny("method.tangent=central")
    trainer.fit()
    assert trainer.progress.done == 3


def test_half_a_forward_mode_is_enough_where_only_the_time_has_no_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """semi takes the times by differences, so a time embedding without a forward rule is not refused."""
    original = Fourier.forward

    def broken(self: Fourier, angle: torch.Tensor) -> torch.Tensor:
        return lost(original(self, angle))

    monkeypatch.setattr(Fourier, "forward", broken)
    with pytest.raises(UserError, match="disagree"):
        tiny().fit()
    trainer = tiny("method.tangent=semi")
    trainer.fit()
    assert trainer.progress.done == 3


def test_the_trainer_looks_along_s_where_the_method_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """FreeFlow's only tangent is along s, through an input that starts at zero."""

    def free() -> Trainer:
        small = ["student.width=16", "student.depth=3", "critic.width=16", "critic.depth=3", "train.batch=8"]
        rest = ["train.steps=1", "before.0.steps=1", "train.sample_every=0"]
        return Trainer(load("toy/freeflow", [*small, *rest]), cpu=True)

    free().fit()
    original = Extras.embed

    def broken(self: Extras, angles: Any) -> Any:
        out = original(self, angles)
        return lost(out) if isinstance(out, torch.Tensor) else out

    monkeypatch.setattr(Extras, "embed", broken)
    with pytest.raises(UserError, match="disagree by 100%"):
        free().fit()
