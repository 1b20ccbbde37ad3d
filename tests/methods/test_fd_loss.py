"""FD-loss: its gradient against autograd of the closed distance, its populations, its witness, files that are missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from listening import F64
from processes import two_processes
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import Flow
from fewstep.commands.check_recipe import check
from fewstep.config import Absent, UserError
from fewstep.data.toy import Ring
from fewstep.methods.fd_loss import FDLoss
from fewstep.methods.population import Population, Populations
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.representation import Representation
from fewstep.networks.roles import Roles
from fewstep.objectives.frechet import gaussian_frechet, root
from fewstep.recipe.store import load
from fewstep.train.trainer import Hooks, Trainer

WAVES = (Representation(of="waves-0"),)


def normal(rows: int, dim: int, key: int) -> Tensor:
    return Draws(fold("frechet", key), torch.arange(rows)).normal(dim, dtype=F64)


def covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def closed(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> Tensor:
    """The distance by the eigenvalues of the plain product S S', as a textbook has it."""
    values = torch.linalg.eigvals(cov @ other_cov).real
    return ((mean - other_mean) ** 2).sum() + cov.trace() + other_cov.trace() - 2 * values.clamp_min(0).sqrt().sum()


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_value_and_gradient_are_those_of_the_closed_distance(dim: int) -> None:
    mixing = normal(dim, dim, 3)
    theirs = normal(400, dim, 1) @ mixing + 0.3
    features = normal(30, dim, 2).requires_grad_()
    mean, cov = theirs.mean(0), covariance(theirs)
    ours = gaussian_frechet(features.mean(0), covariance(features), mean, root(cov))
    wanted = closed(features.mean(0), covariance(features), mean, cov)
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    a, b = (torch.autograd.grad(v, features, retain_graph=True)[0] for v in (ours, wanted))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert float(a.abs().max()) > 1e-3


def test_diagonal_gaussians_have_their_textbook_distance_and_equal_ones_none() -> None:
    s, r = torch.tensor([0.5, 2.0, 1.0], dtype=F64).requires_grad_(), torch.tensor([1.0, 0.25, 1.0], dtype=F64)
    m = torch.tensor([0.1, -0.2, 0.0], dtype=F64)
    value = gaussian_frechet(m, torch.diag(s**2), torch.zeros(3, dtype=F64), torch.diag(r))
    assert float(value.detach()) == pytest.approx(float((m**2).sum() + ((s.detach() - r) ** 2).sum()), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], 2 * (s.detach() - r))
    # Equal eigenvalues and directions without variance leave the gradient finite.
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64)).requires_grad_()
    none = gaussian_frechet(m * 0, flat, m * 0, root(flat.detach()))
    assert abs(float(none.detach())) < 1e-12
    assert bool(torch.isfinite(torch.autograd.grad(none, flat)[0]).all())


@pytest.mark.parametrize("decay", [0.75, None])
def test_the_populations_gradient_is_the_batchs_share_divided_by_the_share(decay: float | None) -> None:
    held = Population(3, decay, 40)
    held.set_real(normal(300, 3, 5) * 1.3 + 0.2)
    past = normal(40, 3, 6) * 0.7
    held.start(past)
    features = normal(10, 3, 7).requires_grad_()
    if decay is None:  # the batch takes the place of the ten oldest, which are no longer the first rows
        held.add(past[:7] + 1)
        every = torch.cat((past[:7] + 1, past[17:], features))
    value = held.distance(features, features.detach())
    if decay is None:
        mean, second, share = every.mean(0), every.T @ every / 40, 0.25
    else:
        share = 1 - decay
        mean = decay * past.mean(0) + share * features.mean(0)
        second = decay * past.T @ past / 40 + share * features.T @ features / 10
    wanted = gaussian_frechet(mean, second - torch.outer(mean, mean), held.real_mean, held.real_root)
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    a, b = (torch.autograd.grad(v, features)[0] for v in (value, wanted))
    torch.testing.assert_close(a, b / share, rtol=1e-9, atol=1e-12)


def test_a_queue_forgets_its_oldest_and_an_average_follows() -> None:
    queue, average = Population(1, None, 5), Population(1, 0.9, 5)
    for population in (queue, average):
        population.start(torch.zeros(5, 1, dtype=F64))
    for k in (1.0, 2.0, 3.0):
        for population in (queue, average):
            population.add(torch.full((2, 1), k, dtype=F64))
    assert sorted(queue.rows[:, 0].tolist()) == [1.0, 2.0, 2.0, 3.0, 3.0]
    assert float(average.mean) == pytest.approx(0.1 * (0.81 + 1.8 + 3.0))
    for population in (queue, average):
        before = {k: v.clone() for k, v in population.state_dict().items()}
        population.add(torch.full((2, 1), float("nan"), dtype=F64))
        assert all(torch.equal(v, before[k]) for k, v in population.state_dict().items())
    queue.add(torch.arange(9.0, dtype=F64)[:, None])  # longer than the queue
    assert sorted(queue.rows[:, 0].tolist()) == [0.0, 1.0, 2.0, 3.0, 4.0]


def cast(method: FDLoss) -> Roles:
    torch.manual_seed(2)
    student = Denoiser(MLP(2, 12, 3), Flow(), "velocity", "angle")
    return Roles(student=student).with_state(method.made(Ring().open()))


def batch(key: int = 1, first: int = 0, last: int = 32) -> Batch:
    return Batch(Draws(fold("fd", key), torch.arange(first, last)), (2,))


def updated(population: Any, *batches: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's mean gradient over micro-batches of one update, and the populations after it."""
    method = FDLoss(representations=WAVES, beside=Representation(of="waves-1"), population=population, size=50, real=90)
    roles = cast(replace(method, decay=0.9))
    for turn in replace(method, decay=0.9).turns(roles, 0):
        for micro in batches:
            (losses,) = turn.losses(micro)
            (losses.total() / len(batches)).backward()
    grads = [p.grad.flatten() for p in roles.student.parameters() if p.grad is not None]
    return torch.cat(grads), {k: v.clone() for k, v in roles.state.state_dict().items()}


def half(folder: Path | str) -> None:
    """What each of two processes runs: an update on its half of the batch."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    first = 16 * dist.get_rank()
    for population in ("average", "queue"):
        found = updated(population, batch(1, first, first + 16))
        torch.save(found, Path(folder) / f"{population}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_two_processes_share_one_population_and_do_what_one_does(tmp_path: Path) -> None:
    two_processes(half, tmp_path)
    for population in ("average", "queue"):
        gradient, state = updated(population, batch())
        shares = [torch.load(tmp_path / f"{population}-{rank}.pt") for rank in (0, 1)]
        torch.testing.assert_close((shares[0][0] + shares[1][0]) / 2, gradient, rtol=1e-4, atol=1e-7)
        for _, own in shares:
            for name, value in state.items():
                torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("population", ["average", "queue"])
def test_micro_batches_are_one_update_of_the_population(population: Any) -> None:
    """Not two, after which an average of .9 would be one of .81."""
    whole = updated(population, batch())[1]
    parts = updated(population, batch(1, 0, 16), batch(1, 16, 32))[1]
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-7)


def test_samples_that_are_no_numbers_are_a_loss_that_is_none() -> None:
    """LAPACK raises on a NaN of 40 x 40, not of 2 x 2: the loop refuses the update, the training goes on."""
    method = FDLoss(representations=WAVES, beside=Representation(of="pixels"), size=50, real=90)
    roles = cast(method)
    (turn,) = method.turns(roles, 0)
    with torch.no_grad():
        next(iter(roles.student.parameters())).fill_(float("nan"))
    (losses,) = turn.losses(batch())
    losses.total().backward()
    assert not bool(torch.isfinite(losses["frechet/waves-0"].detach()))
    assert not all(bool(torch.isfinite(p.grad).all()) for p in roles.student.parameters() if p.grad is not None)
    endless = torch.full((40, 40), torch.inf, dtype=F64)
    assert bool(gaussian_frechet(endless[0], endless, torch.zeros(40, dtype=F64), torch.eye(40, dtype=F64)).isnan())


def test_a_covariance_that_fits_no_memory_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    told = r"representation pixels: has 196,608 features of samples of shape \[3, 256, 256\].*4,096 at most; take waves-"
    with pytest.raises(UserError, match=told):
        Representation(of="pixels").open((3, 256, 256))
    assert Representation(of="pixels").open((4, 32, 32)).dim == 4096
    assert FDLoss().beside.open((3, 256, 256)).dim == 64
    monkeypatch.setattr("fewstep.networks.representation.WIDEST", 63)
    with pytest.raises(UserError, match="representation house-digits: has 64 features"):
        Representation(of="house-digits").open((1, 8, 8))


@pytest.mark.parametrize("name", ["waves-0", "house-digits"])
def test_features_are_those_of_full_precision_within_autocast(name: str) -> None:
    """The data's moments are taken outside of it, so that rounding would be a distance from them."""
    features = Representation(of=name).open((1, 8, 8))
    x = Draws(fold("autocast"), torch.arange(16)).normal(1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        within = features(x)
    assert torch.equal(within, features(x))


@pytest.mark.parametrize("population", ["average", "queue"])
def test_the_witness_is_read_and_moves_no_weight(population: Any) -> None:
    def grads(beside: str) -> tuple[Tensor, dict[str, Tensor]]:
        method = FDLoss(
            representations=WAVES, beside=Representation(of=beside), population=population, size=100, real=500, decay=0.9
        )
        roles = cast(method)
        (turn,) = method.turns(roles, 0)
        (losses,) = turn.losses(batch())
        losses.total().backward()
        assert set(losses) == {"frechet/waves-0"}
        assert set(losses.log) == {"fd/waves-0", f"fd/{beside}"}
        assert all(float(v) > 0 for v in losses.log.values())
        return torch.cat([p.grad.flatten() for p in roles.student.parameters() if p.grad is not None]), losses.log

    one, other = grads("pixels"), grads("waves-1")
    assert torch.equal(one[0], other[0])
    assert one[1]["fd/waves-0"] == other[1]["fd/waves-0"]
    assert float(one[0].abs().max()) > 1e-6


def test_each_loss_is_divided_by_its_own_value_and_weighed() -> None:
    both = (*WAVES, Representation(of="pixels"))
    method = FDLoss(representations=both, weights=(2.0, 0.5), beside=Representation(of="waves-1"), size=64, real=300)
    roles = cast(method)
    (turn,) = method.turns(roles, 0)
    (losses,) = turn.losses(batch())
    for name, weight in (("waves-0", 2.0), ("pixels", 0.5)):
        distance = float(losses.log[f"fd/{name}"])
        assert float(losses[f"frechet/{name}"].detach()) == pytest.approx(weight * distance / (distance + 0.01), rel=1e-5)


def test_training_lowers_the_distance_and_a_checkpoint_holds_the_population(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = ["before=[]", "train.batch=64", "student.width=16", "train.log_every=1", "method.size=256", "method.real=2000"]
    cut += ["train.steps=30", "train.checkpoint_every=15", "optim.student.lr=1e-2", "method.decay=0.5"]
    cut += ["method.representations=[{of: pixels}]"]
    recipe = load("toy/fd-loss", cut)

    def moved(run: Path | None, hooks: Hooks | None = None) -> Trainer:
        trainer = Trainer(recipe, run, hooks=hooks, cpu=True)
        with torch.no_grad():
            trainer.roles.student.net.last.bias += 2.0  # far from the ring, so that every representation must see it
        return trainer

    whole = moved(None, Hooks(on_step=lambda t: told.append(dict(t.last_record))))
    told: list[dict[str, Any]] = []
    whole.fit()
    assert told[-1]["fd/pixels"] < 0.1 * told[0]["fd/pixels"]
    # The witness sees it too, which nothing made it do.
    assert told[-1]["fd/waves-1"] < 0.6 * told[0]["fd/waves-1"]
    halted = moved(tmp_path / "run", Hooks(on_step=lambda t: setattr(t, "_stop", t.progress.done == 15)))
    with pytest.raises(KeyboardInterrupt):
        halted.fit()
    again = Trainer(recipe, tmp_path / "run", cpu=True)
    with monkeypatch.context() as patch:  # nothing is drawn anew, neither 2,000 samples of the data nor the student's
        patch.setattr(Populations, "_rows", lambda *_: pytest.fail("filled before the checkpoint was read"))
        assert again.resume()
    again.fit()
    assert not [k for k in again.roles.state.state_dict() if "features" in k]
    for role in ("student", "state"):
        mine, theirs = again.roles[role].state_dict(), whole.roles[role].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items()), role


def test_what_cannot_be_opened_is_named_before_training(tmp_path: Path) -> None:
    gone = f"{{of: dinov2, path: {tmp_path / 'gone.pth'}}}"
    for setting in (f"method.representations=[{gone}]", f"method.beside={gone}"):
        with pytest.raises(Absent, match=r"representation dinov2: .*gone\.pth"):
            Trainer(load("toy/fd-loss", [setting]), tmp_path / "run", cpu=True)
        assert not (tmp_path / "run").exists()
        missing = check("toy/fd-loss", [setting])[1]
        assert len([line for line in missing if "representation dinov2" in line and "gone.pth" in line]) == 1
    picture = Representation(of="house-digits")
    with pytest.raises(UserError, match=r"representation house-digits: samples of shape \[2\] do not fit"):
        picture.open((2,))
    with pytest.raises(UserError, match="representation house-digts: extractor: unknown"):
        Representation(of="house-digts").open((1, 8, 8))
    with pytest.raises(UserError, match="representation vectors: is no network of pictures"):
        Representation(of="vectors").open((2,))
    assert picture.open((1, 8, 8)).dim == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representations": ()}, "representations is empty"),
        ({"representations": WAVES, "weights": (1.0, 2.0)}, "weights: 2 for 1 representations"),
        ({"representations": WAVES, "beside": WAVES[0]}, "beside: waves-0 is trained on"),
        ({"representations": WAVES * 2}, "representations: waves-0 stands there twice"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FDLoss(**settings)


def test_a_picture_beyond_the_range_is_shown_at_the_border_and_keeps_its_gradient() -> None:
    x = torch.full((1, 1, 8, 8), 1.5, requires_grad=True)
    features = Representation(of="house-digits").open((1, 8, 8))
    assert torch.equal(features(x), features(torch.ones(1, 1, 8, 8)))
    (grad,) = torch.autograd.grad(features(x).sum(), x)
    assert float(grad.abs().sum()) > 0
