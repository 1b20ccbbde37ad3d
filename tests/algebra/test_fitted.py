"""The weights of history against closed forms, golden numbers and diffusers' own DPM-Solver++."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fitted_cases import MIXTURE, M, S, quantiles
from torch import Tensor

from fewstep.algebra.fitted import fit_history, multistep, nodes
from fewstep.algebra.prediction import from_x0
from fewstep.algebra.process import EDM, DiscreteVP, Flow
from fewstep.algebra.sampling import Sampler, sample
from fewstep.networks.analytic import Mixture, flow_map, gaussian

F64 = torch.float64
Z = torch.tensor([[-1.3], [-0.2], [0.4], [1.7]], dtype=F64)
FOUR = (1.0, 0.75, 0.5, 0.25)


def exact(x: Tensor, t: Tensor, s: Tensor | None) -> Tensor:
    s = torch.zeros_like(t) if s is None else s
    return flow_map(Flow(), M, S, x, t.expand(len(x)), s.expand(len(x)))


def ddim(levels: tuple[float, ...], history: tuple[float, ...], net: Any, z: Tensor) -> Tensor:
    return sample(Sampler(kind="map", steps=levels, history=history), net, z)


@pytest.mark.parametrize(
    ("levels", "want"),
    [
        ((1.0, 0.5), (0, 1.9)),
        ((1.0, 0.5, 0.25), (0, 1.0374310150, 0.5474307341)),
        (FOUR, (0, 1.2050685208, 0.9770961636, 0.5840747123)),
    ],
)
def test_a_gaussians_weights_make_the_sampler_its_flow_map(levels: tuple[float, ...], want: tuple[float, ...]):
    net = gaussian(Flow(), M, S)
    history = fit_history(net, Z, None, levels, finer=exact)
    assert history == pytest.approx(want, abs=1e-9)
    out = ddim(levels, history, net, Z)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.18, 0.62, 0.86, 1.38], dtype=F64), rtol=0, atol=1e-12)


def test_plain_ddim_loses_spread():
    out = ddim(FOUR, (), gaussian(Flow(), M, S), Z)
    want = [0.3623153, 0.6480485, 0.8039030, 1.1415877]
    assert out.flatten().tolist() == pytest.approx(want, abs=1e-7)
    assert float(out[1] - out[0]) / 1.1 == pytest.approx(0.2597574, abs=1e-7)


def test_the_papers_lambda_is_the_weight_times_what_a_step_moves():
    history = fit_history(gaussian(Flow(), M, S), Z, None, FOUR, finer=exact)
    factors = [(1 - s) - s * (1 - t) / t for t, s in zip(FOUR, (*FOUR[1:], 0.0), strict=True)]
    got = [w * c for w, c in zip(history, factors, strict=True)]
    assert got == pytest.approx([0, 0.4016895069, 0.4885480818, 0.5840747123], abs=1e-9)


def test_substeps_on_the_teachers_own_path_and_on_the_students():
    net = gaussian(Flow(), M, S)
    own = fit_history(net, Z, None, FOUR)
    assert own == pytest.approx([0, 1.079112674, 0.876488661, 0.5301987282], abs=1e-9)
    other = fit_history(net, Z, None, FOUR, own="student")
    assert other == pytest.approx([0, 0.8372130508, 0.8803225679, 0.5301987282], abs=1e-9)
    true = torch.tensor([[0.18], [0.62], [0.86], [1.38]], dtype=F64)
    errors = [float((ddim(FOUR, h, net, Z) - true).square().mean()) for h in (own, other)]
    assert errors[0] < errors[1]


def test_fitted_on_a_mixture():
    net, z = Mixture(Flow(), *MIXTURE), quantiles(400)
    fine = ddim(tuple(1 - i / 400 for i in range(400)), (), net, z)
    rms = [
        float((ddim(FOUR, h, net, z) - fine).square().mean().sqrt())
        for h in ((), fit_history(net, z, None, FOUR), fit_history(net, z, None, FOUR, own="student"))
    ]
    assert rms == pytest.approx([0.24512, 0.07321, 0.11811], abs=1e-5)


def test_one_substep_leaves_every_weight_zero():
    assert fit_history(Mixture(Flow(), *MIXTURE), quantiles(30), None, FOUR, substeps=1) == (0.0,) * 4


def test_no_history_and_zero_history_are_the_sampler_itself():
    net = gaussian(EDM(), M, S)
    for kind in ("map", "ode"):
        plain = sample(Sampler(kind=kind, steps=FOUR), net, Z)  # type: ignore[arg-type]
        again = sample(Sampler(kind=kind, steps=FOUR, history=(0.0,) * 4), net, Z)  # type: ignore[arg-type]
        assert torch.equal(plain, again)


@torch.no_grad()
def test_the_residual_is_orthogonal_to_the_step_and_a_gaussians_weights_to_the_batch():
    net, levels, z = Mixture(Flow(), *MIXTURE), (1.0, 0.6), quantiles(50)
    _, weight = fit_history(net, z, None, levels)
    t, s = (torch.full((50,), u, dtype=F64) for u in levels)
    first = net(z, t)
    x, y = first.at(s), z
    for a, b in zip(torch.linspace(1, 0.6, 11)[:-1].double(), torch.linspace(1, 0.6, 11)[1:].double(), strict=True):
        y = net(y, a.expand(50)).at(b.expand(50))
    for a, b in zip(torch.linspace(0.6, 0, 11)[:-1].double(), torch.linspace(0.6, 0, 11)[1:].double(), strict=True):
        y = net(y, a.expand(50)).at(b.expand(50))
    here = net(x, s).x0
    push = here - first.x0
    assert float((push * (y - here - weight * push)).sum()) == pytest.approx(0, abs=1e-6)
    one = fit_history(gaussian(Flow(), M, S), Z[:1], None, FOUR)
    assert one == pytest.approx(fit_history(gaussian(Flow(), M, S), 3 * Z, None, FOUR), abs=1e-9)


def test_where_a_step_says_nothing_new_there_is_no_weight():
    """The same x0 twice: 0 / 0 is answered with 0."""

    class Fixed(torch.nn.Module):
        process = Flow()

        def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
            return from_x0(self.process, x, t, torch.ones_like(x))

    assert fit_history(Fixed(), Z, None, FOUR) == (0.0,) * 4


def test_multistep_weights_are_diffusers_dpm_solver():
    from diffusers import DPMSolverMultistepScheduler

    process = DiscreteVP()
    levels = (1.0, 0.75, 0.5, 0.25)
    history = multistep(process, levels)
    assert history == pytest.approx([0, 0.3655907062, 0.3955551122, 0], abs=1e-9)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        prediction_type="sample", lower_order_final=False, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    net, x = gaussian(process, M, S), Z.float()
    for t in scheduler.timesteps:
        x0 = net(x.double(), (t + 1).double().expand(4)).x0.float()
        x = scheduler.step(x0, t, x).prev_sample
    out = sample(Sampler(kind="map", steps=levels, history=history), net, Z)
    assert float((out - x).abs().max()) < 1e-6


def test_a_process_without_signal_at_its_start_keeps_the_second_step_of_first_order():
    assert multistep(Flow(), FOUR)[:2] == (0, 0)
    assert multistep(Flow(), FOUR)[2] > 0
    assert multistep(Flow(), (1.0,)) == (0.0,)


def test_nodes_stand_on_the_rows_of_a_table():
    rows = [u * 1000 for u in nodes(DiscreteVP(), 32)]
    assert rows == pytest.approx([round(r) for r in rows], abs=1e-9)
    assert nodes(EDM(), 4) == FOUR
    with pytest.raises(ValueError, match="points must be at most 20, the rows of the table, not 21"):
        nodes(DiscreteVP(steps=20), 21)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "renoise", "history": (0.0, 1.0)}, "is for kind map, or .* ddim, not for kind renoise"),
        ({"kind": "ode", "solver": "heun", "history": (0.0, 1.0)}, "not for kind ode"),
        ({"kind": "map", "history": (0.0,)}, "has 1 weights for 2 steps"),
        ({"kind": "map", "history": (0.5, 1.0)}, "begins with 0.5; the first step has nothing before it"),
    ],
)
def test_a_history_that_fits_no_sampler_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Sampler(steps=(1.0, 0.5), **changes)
