"""critic.reset_every: every so many student updates the critic is the teacher again, with a fresh optimiser."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep.methods  # noqa: F401  registers the methods
from fewstep.algebra.process import Flow
from fewstep.commands.check_recipe import check
from fewstep.config import REGISTRY, RecipeError, UserError
from fewstep.methods.critic import Critic
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.factorised import Factorised
from fewstep.methods.gan import Gan
from fewstep.methods.track import Track
from fewstep.methods.turns import Anyone
from fewstep.networks.adapters import Adapted
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.recipe.cards import cite
from fewstep.recipe.store import load
from fewstep.train.trainer import Hooks, Trainer

APART = {"track", "factorised"}  # their critics follow no student, and refuse
WITH_CRITIC = [n for n, m in REGISTRY["method"].items() if "critic" in {f.name for f in fields(m)} and n not in APART]
SMALL = ("before=[]", "copy={}", "student.width=12", "student.depth=3", "train.batch=8")
SAME = (
    "teacher={name: network, of: {name: mlp, width: 12, depth: 3}}",
    "critic={name: mlp, width: 12, depth: 3}",
    "data.modes=4",
    "train.guard=off",
)


class Weight(Anyone):
    """A role of one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        nn.init.constant_(self.weight, value)


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_every_method_with_a_critic_resets_it_when_it_is_due(name: str) -> None:
    base = REGISTRY["method"][name]()
    method: Any = replace(base, critic=replace(base.critic, reset_every=3))
    names = {*method.needs().roles, "teacher"} | ({"state"} if method.needs().state else set())
    for step in (0, 1, 3, 4, 6):
        roles = Roles(**{n: Weight({"teacher": 7.0, "critic": 1.0}.get(n, 3.0)) for n in names})
        turns = [t for t in method.turns(roles, step) if "critic" in t.updates]
        due = step in (3, 6)
        assert float(roles.critic.weight.detach()) == (7.0 if due else 1.0)
        assert [t.life for t in turns] == [3] * len(turns)
        assert turns
    plain = [t for t in base.turns(roles, 3) if "critic" in t.updates]
    assert [t.life for t in plain] == [None] * len(plain)


def trainer_of(*settings: str, run: Path | None = None, hooks: Hooks | None = None) -> Trainer:
    return Trainer(load("toy/dmd2", [*SMALL, *SAME, *settings]), run, hooks=hooks, cpu=True)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {f"{r}.{k}": v.clone() for r in ("student", "critic") for k, v in trainer.roles[r].state_dict().items()}


def test_off_is_bit_for_bit_what_it_was() -> None:
    made = []
    for extra in ((), ("method.critic.reset_every=0",), ("method.critic.reset_every=99",)):
        trainer = trainer_of("train.steps=4", "optim.critic={lr: 1e-3}", *extra)
        trainer.fit()
        made.append(weights(trainer))
    for other in made[1:]:
        assert all(torch.equal(v, other[k]) for k, v in made[0].items())


def test_the_optimiser_is_fresh_and_its_rate_begins_anew() -> None:
    rates: list[float] = []
    counts: list[int] = []

    def watch(t: Trainer) -> None:
        held = t.loop.optim["critic"]
        rates.append(held.rate(held.specs[0]))
        counts.append(held.updates)

    cosine = "optim.critic={lr: 1e-3, decay: linear}"
    trainer = trainer_of("train.steps=5", "method.critic={reset_every: 2, steps: 2}", cosine, hooks=Hooks(on_step=watch))
    trainer.fit()
    assert counts == [2, 4, 2, 4, 2]
    assert rates == pytest.approx([5e-4, 0, 5e-4, 0, 5e-4])
    assert trainer.loop.optim["student"].updates == 5


def test_a_run_that_is_continued_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    settings = ("train.steps=6", "method.critic.reset_every=2", "train.checkpoint_every=1", "train.keep=9")
    whole = trainer_of(*settings, run=tmp_path / "whole")
    whole.fit()
    for stop in (3, 4):  # within a life, and where one ends

        def leave(t: Trainer, stop: int = stop) -> None:
            t._stop = t.progress.done == stop

        part = trainer_of(*settings, run=tmp_path / f"part{stop}", hooks=Hooks(on_step=leave))
        with pytest.raises(KeyboardInterrupt):
            part.fit()
        again = trainer_of(*settings, run=tmp_path / f"part{stop}")
        assert again.resume()
        assert again.progress.done == stop
        again.fit()
        assert all(torch.equal(v, weights(again)[k]) for k, v in weights(whole).items())


def test_heads_on_the_critic_have_the_fresh_optimiser_too() -> None:
    roles = Roles(**{n: Weight(1.0) for n in ("teacher", "student", "critic", "discriminator")})
    turns = DMD2(gan=Gan(), critic=Critic(reset_every=2)).turns(roles, 2)
    assert [t.updates for t in turns if t.life] == [("critic", "discriminator")]


def test_a_joint_method_has_one_life_of_its_critic() -> None:
    def joint(*every: int) -> Any:
        critics = [{"reset_every": k, "steps": 2} for k in every]
        shares = [{"method": {"name": "dmd2", "gan": None, "critic": critic}} for critic in critics]
        return load("toy/dmd2", [*SMALL, *SAME], {"method": {"name": "joint", "methods": shares}})

    for unequal in ((0, 3), (3, 2)):
        with pytest.raises(RecipeError, match="critic.reset_every must be equal, not dmd2 {}, dmd2 {}".format(*unequal)):
            joint(*unequal)
    recipe = joint(3, 3)
    roles = Roles(**{n: Weight(1.0) for n in ("teacher", "student", "critic")})
    assert [t.life for t in recipe.method.turns(roles, 3)] == [None, 3]


def net(width: int) -> Denoiser:
    return Denoiser(MLP(2, width, 3), Flow(), "velocity", "angle")


def test_other_shapes_are_refused_by_name_and_by_line() -> None:
    told = "critic.reset_every: 4 needs a critic of the teacher's shape"
    base = net(12)
    for critic in (net(16), Adapted(base, "one", rank=2)):
        with pytest.raises(UserError, match=told):
            Critic(reset_every=4).reset(Roles(teacher=base, student=net(12), critic=critic))
    wide = [*SMALL, *SAME, "method.critic.reset_every=4", "critic={name: mlp, width: 16, depth: 3}"]
    with pytest.raises(
        RecipeError, match=r"method\.critic\.reset_every: critic\.reset_every needs a critic of the teacher"
    ):
        check("toy/dmd2", wide)
    for refused in (Track, Factorised):
        with pytest.raises(ValueError, match=r"critic\.reset_every: the"):
            refused(critic=Critic(reset_every=4))
    with pytest.raises(ValueError, match=r"critic\.reset_every: regularizer moments has no critic"):
        DecoupledDMD(critic=Critic(reset_every=4), regularizer="moments")
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Critic(reset_every=-1)


def test_the_paper_is_cited_where_it_is_used() -> None:
    assert Critic(reset_every=4, alignment=0.1).cites == ("2506.00523", "2510.03095")
    assert "2510.03095" in cite("helices-sid")
    assert "2510.03095" not in cite("toy/dmd2")
