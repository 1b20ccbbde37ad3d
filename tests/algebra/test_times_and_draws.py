"""Noise level distributions and the random numbers under them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers_core import F64, PROCESSES, col
from scipy import stats

from fewstep.algebra import draws as rd, times as td
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import EDM, DiscreteVP, Flow, Trig

N = 40_000


def draws(key: int = 7, n: int = N) -> Draws:
    return Draws(key, torch.arange(n))


def ks(sample: torch.Tensor, cdf) -> float:
    return stats.kstest(sample.numpy(), cdf).pvalue


def test_uniform_covers_its_range_in_u() -> None:
    sigma = td.Uniform(low=0.02, high=0.98).sample(draws(), EDM())
    assert sigma.dtype is F64
    assert sigma.shape == (N,)
    u = (sigma ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert ks(u, stats.uniform(0.02, 0.96).cdf) > 1e-3
    t = td.Uniform(low=0.1, high=0.9, shift=3.0).sample(draws(), Flow())
    assert ks(t / (3 - 2 * t), stats.uniform(0.1, 0.8).cdf) > 1e-3
    half = td.Uniform(low=0.0, high=1.0).sample(draws(), DiscreteVP(), span=(0.5, 1.0))
    assert ks(half / 1000, stats.uniform(0.5, 0.5).cdf) > 1e-3


def test_index_hits_every_point_of_its_range_equally() -> None:
    t = td.Index(low=2, high=6, count=11).sample(draws(), Flow())
    values, counts = torch.unique((t * 10).round().long(), return_counts=True)
    assert values.tolist() == [2, 3, 4, 5, 6]
    assert torch.allclose(t * 10, (t * 10).round(), atol=1e-12)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_lognormal_is_normal_in_log_sigma() -> None:
    wide = EDM(sigma_min=1e-9, sigma_max=1e9)
    for mean, std in ((-1.2, 1.2), (-1.1, 2.0)):
        s = td.LogNormal(mean=mean, std=std).sample(draws(), wide)
        assert ks(torch.log(s), stats.norm(mean, std).cdf) > 1e-3
        # The same noise levels in every process.
        t = td.LogNormal(mean=mean, std=std).sample(draws(), Flow())
        assert torch.allclose(t / (1 - t), s, rtol=1e-7)
    inside = td.LogNormal(mean=3.0, std=2.0).sample(draws(), EDM())
    assert float(inside.max()) == pytest.approx(80.0)


def test_trig_lognormal_is_the_published_angle() -> None:
    for mean, std in ((-1.0, 1.4), (0.2, 1.6)):
        t = td.TrigLogNormal(mean=mean, std=std).sample(draws(), Trig())
        assert ks(torch.log(0.5 * torch.tan(t)), stats.norm(mean, std).cdf) > 1e-3
    with pytest.raises(ValueError, match="no span"):
        td.TrigLogNormal().sample(draws(n=2), Trig(), span=(0.0, 0.5))


def test_logit_normal() -> None:
    t = td.LogitNormal(mean=-0.4, std=1.0).sample(draws(), Flow())
    assert ks(torch.log(t / (1 - t)), stats.norm(-0.4, 1).cdf) > 1e-3


def test_sid_map_golden_range_and_median() -> None:
    sigma = td.SiDTimes().sample(draws(), EDM())
    top = (80 ** (1 / 7) + 0.2 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert round(top, 2) == 24.41
    assert float(sigma.max()) < top
    assert float(sigma.max()) > 0.999 * top
    assert 0.002 < float(sigma.min()) < 0.0021
    middle = float(EDM().grid(col(0.4)))
    assert round(middle, 3) == 0.965
    # The share below the analytic median, within five standard errors.
    assert abs(float((sigma < middle).double().mean()) - 0.5) < 2.5 / math.sqrt(N)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (3.0, 1.0), (1.0, 2.5)])
def test_beta(a: float, b: float) -> None:
    assert ks(td.Beta(a=a, b=b).sample(draws(), Flow()), stats.beta(a, b).cdf) > 1e-3


def test_levels_and_ddim_knots() -> None:
    t = td.Levels(at=(0.25, 0.5, 1.0)).sample(draws(), DiscreteVP())
    values, counts = torch.unique(t, return_counts=True)
    assert values.tolist() == [250.0, 500.0, 1000.0]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # Knots {20 i - 1}: table indices 19, 39, ..., 999 are times 20, 40, ..., 1000.
    knots = DiscreteVP().grid(torch.tensor(td.ddim_levels(50), dtype=F64)) - 1
    assert torch.allclose(knots, torch.arange(19, 1000, 20, dtype=F64), rtol=0, atol=1e-9)


def test_bad_parameters_are_refused() -> None:
    for wrong in (
        lambda: td.Uniform(low=0.5, high=0.5),
        lambda: td.Uniform(shift=0.0),
        lambda: td.Index(low=3, high=2),
        lambda: td.Beta(a=2.0, b=3.0),
        lambda: td.LogStudentT(low=0.0),
        lambda: td.LogStudentT(low=80.0),
        lambda: td.LogStudentT(std=0.0),
        lambda: td.LogStudentT(df=0.0),
        lambda: td.Levels(at=(1.5,)),
        lambda: td.check_steps(()),
        lambda: td.check_steps((0.5, 0.5)),
        lambda: td.check_steps((1.0, 0.0)),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("name", PROCESSES)
def test_every_sample_lies_in_the_process(name: str) -> None:
    p = PROCESSES[name]
    for dist in (
        td.Uniform(low=0.0, high=1.0),
        td.LogNormal(std=5.0),
        td.LogitNormal(),
        td.TrigLogNormal(std=4.0),
    ):
        t = dist.sample(draws(n=2000), p)
        assert torch.isfinite(t).all()
        assert float(t.min()) >= 0
        assert float(t.max()) <= p.t_max


def test_normal_moments_and_distribution() -> None:
    x = draws().normal(5, dtype=F64)
    flat = x.flatten()
    n = flat.numel()
    assert abs(float(flat.mean())) < 5 / math.sqrt(n)
    assert abs(float(flat.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((flat**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((flat**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert ks(flat, stats.norm.cdf) > 1e-3
    assert ks(draws().uniform(), stats.uniform.cdf) > 1e-3


def test_elements_rows_and_calls_are_uncorrelated() -> None:
    d = draws(3)
    x, y = d.normal(6, dtype=F64), d.normal(6, dtype=F64)
    z = draws(4).normal(6, dtype=F64)
    bound = 5.5 / math.sqrt(N)
    within = np.corrcoef(x.numpy().T) - np.eye(6)
    assert np.abs(within).max() < bound
    for other in (y, z, x.roll(1, 0)):
        assert np.abs((x.T @ other).numpy() / N).max() < bound
        # Squares would show a shared radius that products hide.
        assert np.abs(((x**2 - 1).T @ (other**2 - 1)).numpy() / N / 2).max() < bound


def test_batch_split_shape_and_restart_do_not_matter() -> None:
    def run(index: torch.Tensor) -> list[torch.Tensor]:
        d = Draws(fold(0, "train", 1), index)
        return [d.normal(2, 3, 5), d.uniform(), d.integers(10), d.normal(7, dtype=F64)]

    whole = run(torch.arange(12))
    for parts in ((5, 7), (1, 4, 7), (3, 3, 3, 3)):
        pieces = [run(i) for i in torch.arange(12).split(list(parts))]
        for k, value in enumerate(whole):
            assert torch.equal(torch.cat([piece[k] for piece in pieces]), value)
    assert torch.equal(run(torch.tensor([11, 2]))[0], whole[0][[11, 2]])
    shared = {Draws(5, torch.arange(a, b)).shared_integer(1000) for a, b in ((0, 12), (3, 4), (7, 12))}
    assert len(shared) == 1


def test_shared_and_own_integers_are_uniform() -> None:
    own = draws().integers(7)
    assert stats.chisquare(torch.bincount(own, minlength=7).numpy()).pvalue > 1e-3
    shared = [Draws(k, torch.arange(1)).shared_integer(4) for k in range(4000)]
    assert stats.chisquare(np.bincount(shared, minlength=4)).pvalue > 1e-3


def test_uniform_is_open_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # The extreme bit patterns must not round to 0 or 1, where the inverse normal is infinite.
    for bits in (0, -1):
        monkeypatch.setattr(Draws, "_bits", lambda self, n, bits=bits: torch.full((len(self), n), bits))
        u = draws(n=2).uniform()
        assert float(u.min()) > 0
        assert float(u.max()) < 1
        assert torch.isfinite(td.standard_normal(draws(n=2))).all()
        assert torch.isfinite(draws(n=2).normal(4, dtype=F64)).all()


def test_large_and_negative_keys_and_indices() -> None:
    index = torch.tensor([0, 1, 2**40, 2**62])
    for key in (0, 2**64 - 1, 2**63):
        x = Draws(key, index).normal(64, dtype=F64)
        assert torch.isfinite(x).all()
        assert len(torch.unique(x)) == x.numel()


def test_dtypes_do_not_depend_on_the_default() -> None:
    before = torch.get_default_dtype()
    values = []
    for default in (torch.float32, F64):
        torch.set_default_dtype(default)
        try:
            d = draws(n=50)
            values.append((d.uniform(2), d.normal(3), d.normal(3, dtype=F64)))
        finally:
            torch.set_default_dtype(before)
    for a, b in zip(*values, strict=True):
        assert torch.equal(a, b)
    assert [v.dtype for v in values[0]] == [F64, torch.float32, F64]
    # More than float32's 24 bits: float64 numbers that are no float32 numbers.
    for v in (values[0][0], values[0][2]):
        assert float((v == v.float().double()).double().mean()) < 0.01


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, fold("a", 3)])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 64, 257])
def test_numpy_and_torch_make_the_same_bits(key: int, count: int) -> None:
    rows = [
        torch.arange(0),
        torch.arange(1),
        torch.arange(37) + 123_456_789,
        torch.tensor([0, -1, 2**62, -(2**63), 2**63 - 1]),
        torch.arange(40)[::3],
    ]
    for index in rows:
        a, b = rd._bits_numpy(index, key, count), rd._bits_torch(index, key, count)
        assert a.dtype is torch.int64
        assert a.shape == (len(index), count)
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (2,), (3, 5, 7)])
def test_draws_are_alike_by_numpy_and_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        d = draws(fold(seed), n=19)
        return [d.normal(*shape, dtype=dtype), d.uniform(*shape), d.integers(11), d.normal(*shape)]

    fast = [drawn(seed) for seed in range(3)]
    monkeypatch.setattr(rd, "_bits_numpy", rd._bits_torch)
    for a, b in zip(fast, [drawn(seed) for seed in range(3)], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_dmdrs_curriculum_begins_noisy_and_ends_uniform() -> None:
    law = td.FadingBeta(start=(4.0, 1.5), over=100)
    for step, a, b in ((0, 4.0, 1.5), (50, 2.5, 1.25), (100, 1.0, 1.0), (700, 1.0, 1.0)):
        u = td.law_at(law, step).sample(draws(), Flow())
        assert ks(u, stats.beta(a, b).cdf) > 1e-3, step
        p = draws().uniform()
        torch.testing.assert_close(u, torch.from_numpy(stats.beta(a, b).ppf(p.numpy())), atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="fading_beta changes with the step"):
        law.sample(draws(), Flow())
    plain = td.Uniform()
    assert td.law_at(plain, 9) is plain


def test_a_fading_factor_is_half_a_cosine() -> None:
    fading = td.Fading(start=0.75, over=10)
    assert [fading.at(k) for k in (0, 5, 10, 30)] == pytest.approx([0.75, 0.375, 0.0, 0.0])
    assert fading.at(2) == pytest.approx(0.75 * 0.5 * (1 + math.cos(math.pi * 0.2)))
    for make in (lambda: td.Fading(over=0), lambda: td.FadingBeta(over=0)):
        with pytest.raises(ValueError, match="over must be at least 1"):
            make()
