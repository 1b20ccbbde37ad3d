"""Imagine Flash: what its reconstruction does to a sample, where it looks, and that no data enters its path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectory_helpers import F64, MEAN, STD, Batch64, draws

from fewstep.algebra.prediction import Prediction, from_x0
from fewstep.algebra.process import Flow
from fewstep.methods import imagine_flash
from fewstep.methods.imagine_flash import ImagineFlash
from fewstep.networks.analytic import gaussian
from fewstep.networks.roles import Roles


class Watched(nn.Module):
    """The exact denoiser of N(MEAN, STD^2), which notes what it is asked and whether that is differentiated."""

    takes_s, inputs = False, ()

    def __init__(self) -> None:
        super().__init__()
        self.process, self.inner = Flow(), gaussian(Flow(), MEAN, STD)
        self.one = nn.Parameter(torch.ones((), dtype=F64))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        self.seen.append((x.detach(), t, torch.is_grad_enabled()))
        return from_x0(self.process, x, t, self.one * self.inner(x, t).x0)


class Rows(nn.Module):
    """A one-step student: any input gets these answers, the two halves of a batch the same ones."""

    takes_s, inputs = False, ()

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.process, self.x0 = Flow(), nn.Parameter(draws(count, "rows").normal(dim, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return from_x0(self.process, x, t, torch.cat((self.x0, self.x0)))


class Judge(nn.Module):
    """Logits (b, 2) that depend on x."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return torch.stack((x.mean(1), x[:, 0]), 1)


class Opposite(Batch64):
    """Noise whose second half is the negative of the first, so that an affine answer is averaged exactly."""

    def noise(self) -> Tensor:
        half = super().noise()[: len(self) // 2]
        return torch.cat((half, -half))


def roles(student: nn.Module) -> Roles:
    return Roles(
        teacher=Watched().requires_grad_(False),
        student=student,
        critic=gaussian(Flow(), MEAN, STD),
        discriminator=Judge(),
    )


def only(losses: Iterator[Any]) -> dict[str, Tensor]:
    (one,) = list(losses)
    return one


@pytest.mark.parametrize(("gamma", "printed"), [(0.6, 0.066), (0.02, 0.997)])
def test_reconstruction_alone_contracts_a_sample_towards_the_mean(gamma: float, printed: float) -> None:
    b, d = 14, 3
    student = Rows(b // 2, d)
    method = ImagineFlash(steps=(1.0,), gamma=(gamma, gamma))
    losses = only(method.losses(roles(student), Opposite.of(b, d)))
    (gradient,) = torch.autograd.grad(losses["reconstruct"], student.x0)
    # E_n[D(alpha x0 + sigma n)] = m + alpha^2 s^2 / rho^2 (x0 - m), and the gradient is 2 (x0 - that) / numel.
    target = student.x0.detach() - gradient * (b // 2) * d / 2
    factor = (1 - gamma) ** 2 * STD**2 / ((1 - gamma) ** 2 * STD**2 + gamma**2)
    assert torch.allclose(target - MEAN, factor * (student.x0.detach() - MEAN), rtol=0, atol=1e-12)
    assert abs(factor - printed) < 5e-4
    if gamma == 0.6:
        # The variance contracts by the square of it.
        ratio = float(target.var() / student.x0.detach().var())
        assert abs(ratio - factor**2) < 1e-10
        assert abs(ratio - 0.0044) < 5e-5


def test_gamma_grows_with_the_level_the_student_stopped_at() -> None:
    method, found = ImagineFlash(steps=(1.0, 0.67, 0.33), gamma=(0.02, 0.7)), {}
    for k in range(24):
        who = roles(Watched())
        _, level = method.backward(who, Batch64.of(4, 3, k))
        only(method.losses(who, Batch64.of(4, 3, k)))
        ((_, looked, _),) = who.teacher.seen
        assert bool((looked == looked[0]).all())
        found[level] = float(looked[0])
    want = {1.0: 0.7, 0.67: 0.4756, 0.33: 0.2444}
    assert found.keys() == want.keys()
    assert all(abs(found[level] - want[level]) < 1e-12 for level in want)
    assert (method.level(0.0), method.level(1.0)) == (0.02, 0.7)
    with pytest.raises(ValueError, match="low <= high"):
        ImagineFlash(gamma=(0.7, 0.02))


def test_the_path_starts_from_noise_keeps_it_once_and_only_its_end_is_differentiated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imagine_flash, "exit_step", lambda draws, count: 2)
    # Below the full level the predicted noise is not the start noise, so that keeping it shows.
    method, who = ImagineFlash(steps=(0.875, 0.5, 0.25)), roles(Watched())
    x0, level = method.backward(who, Batch64.of(5, 3))
    z = Batch64.of(5, 3).noise()
    inputs = [x for x, _, _ in who.student.seen]
    plain = gaussian(Flow(), MEAN, STD)

    def at(value: float) -> Tensor:
        return torch.full((5,), value, dtype=F64)

    first = plain(z, at(0.875))
    second = 0.5 * first.x0 + 0.5 * z
    answer = plain(second, at(0.5)).x0
    third = 0.75 * answer + 0.25 * (second - 0.5 * answer) / 0.5
    assert [float(t[0]) for _, t, _ in who.student.seen] == [0.875, 0.5, 0.25]
    for got, want in zip(inputs, (z, second, third), strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-12)
    assert float((second - first.at(at(0.5))).abs().min()) > 1e-4
    assert [grad for _, _, grad in who.student.seen] == [False, False, True]
    assert level == 0.25
    assert torch.allclose(x0, plain(third, at(0.25)).x0, atol=1e-12)


def test_no_data_enters_the_students_turn() -> None:
    method = ImagineFlash()
    for k in range(6):
        seen, losses, critics = [], [], []
        for shift in (None, 0.0, 40.0):
            batch = Batch64.of(4, 3, k)
            batch.x0 = None if shift is None else batch.data() + shift
            who = roles(Watched())
            losses.append(only(method.losses(who, batch)))
            seen.append([x for x, _, _ in who.student.seen + who.teacher.seen])
            if shift is not None:
                batch = Batch64.of(4, 3, k)
                batch.x0 = batch.data() + shift
                critics.append(only(method.critic_losses(who, batch)))
        for other in (1, 2):
            assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[other], strict=True))
            assert all(torch.equal(losses[0][name], losses[other][name]) for name in ("reconstruct", "gan"))
        # The discriminator alone sees data.
        assert torch.equal(critics[0]["denoise"], critics[1]["denoise"])
        assert float((critics[0]["discriminator"] - critics[1]["discriminator"]).detach().abs()) > 1e-4
