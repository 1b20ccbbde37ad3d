"""Adapters on one base give the gradients of separate networks, also checkpointed and in one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from helpers_core import F64, col
from torch import Tensor, nn

from fewstep.algebra.process import DiscreteVP, Flow
from fewstep.networks.adapters import Adapted, checkpoint_function, enable_checkpointing, frozen, lora_layers
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.networks.unet2d import UNet2D

B, C, H, W = 2, 3, 8, 16
RANK, ALPHA = 3, 5.0


def unet() -> Denoiser:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=(H, W),
        in_channels=C,
        out_channels=C,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return frozen(Denoiser(UNet2D(model, 0), DiscreteVP(), "v", "index").double())  # type: ignore[return-value]


def mlp() -> Denoiser:
    torch.manual_seed(0)
    return frozen(Denoiser(MLP(3, 6, 3), Flow(), "velocity", "angle").double())  # type: ignore[return-value]


def attach(base: nn.Module, name: str, seed: int) -> Adapted:
    """An adapter with random weights on both sides, the same for the same seed."""
    adapted = Adapted(base, name, rank=RANK, alpha=ALPHA)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.own.values():
            p.data = 0.3 * torch.randn(p.shape, generator=g, dtype=F64)
    return adapted


Loss = Callable[[nn.Module, nn.Module, nn.Module, Tensor, Tensor], Tensor]


def dmd_pattern(student: nn.Module, critic: nn.Module, teacher: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    out = student(x, t).x0
    with torch.no_grad():
        g = critic(out, 0.5 * t).x0 - teacher(out, 0.5 * t).x0
    return 0.5 * ((out - (out - g).detach()) ** 2).mean()


def sid_pattern(student: nn.Module, critic: nn.Module, teacher: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Gradients cross the student, the critic and the bare base, in one graph."""
    out = student(x, t).x0
    real, fake = teacher(out, 0.5 * t).x0, critic(out, 0.5 * t).x0
    return ((real - fake) * (real - out - 1.2 * (real - fake))).mean()


def gradients(loss: Tensor, *roles: Adapted) -> list[Tensor]:
    parameters = [p for role in roles for p in role.own.values()]
    out = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, out, strict=True)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("pattern", [dmd_pattern, sid_pattern])
def test_gradients_equal_those_of_separate_unets(pattern: Loss, checkpointed: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x, t = torch.randn(B, C, H, W, generator=g, dtype=F64), col(900.0, 500.0)
    base = unet()
    separate = (
        attach(copy.deepcopy(base), "one", 1),
        attach(copy.deepcopy(base), "two", 2),
        copy.deepcopy(base),
    )
    want_loss = pattern(*separate, x, t)
    want = gradients(want_loss, separate[0], separate[1])
    shared = (attach(base, "one", 1), attach(base, "two", 2), Adapted(base, None))
    if checkpointed:
        assert enable_checkpointing(base) == 1
        calls = []
        inner = checkpoint_function(base.net)
        base.net.model.enable_gradient_checkpointing(lambda *a: (calls.append(1), inner(*a))[1])  # type: ignore[operator,union-attr]
    loss = pattern(*shared, x, t)
    got = gradients(loss, shared[0], shared[1])
    if checkpointed:
        assert calls
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-12)
    scale = max(float(w.abs().max()) for w in want)
    assert scale > 0
    if pattern is sid_pattern:
        assert max(float(w.abs().max()) for w in want[len(want) // 2 :]) > 0
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11 * scale)


def test_an_adapted_call_is_the_merged_network() -> None:
    base, x, t = mlp(), torch.randn(4, 3, dtype=F64), col(0.2, 0.5, 0.9, 1.0)
    plain = copy.deepcopy(base)
    one, two = attach(base, "one", 1), attach(base, "two", 2)
    bare = plain(x, t).x0
    for adapted in (one, two):
        merged = copy.deepcopy(plain)
        modules = dict(merged.net.named_modules())
        for name, p in adapted.own.items():
            if "lora_A" in name:
                layer = modules[name.split("/lora_A")[0].replace("/", ".")]
                b = adapted.own[name.replace("lora_A", "lora_B")]
                layer.weight.data += ALPHA / RANK * b.data @ p.data  # type: ignore[union-attr,operator]
        assert torch.allclose(adapted(x, t).x0, merged(x, t).x0, rtol=1e-12, atol=1e-13)
        assert not torch.allclose(adapted(x, t).x0, bare, atol=1e-3)
        assert torch.allclose(
            adapted.features(x, t, None, ("mid",))["mid"],
            merged.features(x, t, None, ("mid",))["mid"],
            rtol=1e-12,
        )
    assert torch.equal(Adapted(base, None)(x, t).x0, bare)


def test_a_fresh_adapter_changes_nothing_and_keeps_flags() -> None:
    base, x, t = mlp(), torch.randn(2, 3, dtype=F64), col(0.3, 0.8)
    bare = base(x, t).x0
    adapted = Adapted(base, "new", rank=2)
    assert torch.equal(adapted(x, t).x0, bare)
    assert all(p.requires_grad for p in adapted.parameters())
    own = {id(p) for p in adapted.parameters()}
    assert not any(p.requires_grad for p in base.parameters() if id(p) not in own)
    Adapted(base, "newer", rank=2)
    assert all(p.requires_grad for p in adapted.parameters())


def test_the_choice_is_restored_after_a_call_that_fails() -> None:
    base = mlp()
    one = attach(base, "one", 1)
    before = [(list(m._active_adapter), m._disable_adapters) for m in lora_layers(base)]
    with pytest.raises(ValueError, match="taps"):
        one(torch.randn(1, 3, dtype=F64), col(0.5), taps=("nothing",))
    assert [(list(m._active_adapter), m._disable_adapters) for m in lora_layers(base)] == before


def test_roles_of_adapters_on_one_base() -> None:
    # peft hangs the adapters' weights into the base; each still belongs to its own role alone.
    base = mlp()
    count = len(list(base.parameters()))
    one, two = attach(base, "one", 1), attach(base, "two", 2)
    roles = Roles(teacher=base, student=one, critic=two)
    assert len(roles.parameters("teacher")) == count
    mine = [{id(p) for p in roles.parameters(n)} for n in ("teacher", "student", "critic")]
    assert not (mine[0] & mine[1])
    assert not (mine[0] & mine[2])
    assert not (mine[1] & mine[2])
    for turn in (("student",), ("critic",), ("student", "critic"), ("teacher",), ()):
        roles.train_only(*turn)
        for name in roles:
            assert all(p.requires_grad is (name in turn) for p in roles.parameters(name))
    with pytest.raises(KeyError, match="it has teacher, student, critic"):
        roles.parameters("discriminator")


def test_a_parameter_in_two_roles_is_refused() -> None:
    base = mlp()
    with pytest.raises(ValueError, match="own the same parameter"):
        Roles(teacher=base, student=base)
    one = attach(base, "one", 1)
    with pytest.raises(ValueError, match="own the same parameter"):
        Roles(student=one, critic=one)


@pytest.mark.parametrize("factor", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_calls_factor_scales_the_update_in_that_call_alone(factor: float, checkpointed: bool) -> None:
    """Against an adapter whose B is multiplied; the recompute of a checkpoint has the factor of its forward."""
    g = torch.Generator().manual_seed(3)
    x, t = torch.randn(B, C, H, W, generator=g, dtype=F64), col(900.0, 500.0)
    base = unet()
    one = attach(base, "one", 1)
    other = attach(copy.deepcopy(base), "one", 1)
    with torch.no_grad():
        for name, p in other.own.items():
            if "lora_B" in name:
                p.mul_(factor)
    if checkpointed:
        assert enable_checkpointing(base) == 1
        base.train()
    scaled = one(x, t, adapter_scale=factor).x0
    torch.testing.assert_close(scaled, other(x, t).x0, rtol=1e-9, atol=1e-12)
    if factor == 0:
        assert torch.equal(scaled, base(x, t).x0)
    # A second call with the whole update, and one without any, are in the same graph.
    both = (scaled * one(x, t).x0 * base(x, t).x0).mean()
    found = gradients(both, one)
    whole = attach(copy.deepcopy(unet()), "one", 1)
    plain = (other(x, t).x0.detach() * whole(x, t).x0 * base(x, t).x0.detach()).mean()
    through = (other(x, t).x0 * whole(x, t).x0.detach() * base(x, t).x0.detach()).mean()
    for name, a, b, c in zip(one.own, found, gradients(plain, whole), gradients(through, other), strict=True):
        chain = factor if "lora_B" in name else 1.0
        torch.testing.assert_close(a, b + chain * c, rtol=1e-7, atol=1e-10)
    assert all(v == ALPHA / RANK for layer in one.layers for v in layer.scaling.values())
