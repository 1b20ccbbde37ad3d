"""IDA: before its turn a critic goes a share of the way to the student's weights, in every method, adapters too."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from turning import turned

import fewstep.methods  # noqa: F401  registers the methods
from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.process import Flow
from fewstep.commands.check_recipe import check
from fewstep.config import REGISTRY, RecipeError, UserError
from fewstep.methods.critic import Critic
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.factorised import Factorised
from fewstep.methods.track import Track
from fewstep.methods.turns import Anyone
from fewstep.networks.adapters import Adapted
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.mlp import MLP
from fewstep.networks.roles import Roles
from fewstep.recipe.cards import card, cite
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer

APART = {"track", "factorised"}  # they have a critic that follows no student, and refuse
WITH_CRITIC = [n for n, m in REGISTRY["method"].items() if "critic" in {f.name for f in fields(m)} and n not in APART]


class Weight(Anyone):
    """A role of one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        nn.init.constant_(self.weight, value)


def net(seed: int, width: int = 12) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(2, width, 3), Flow(), "velocity", "angle")


def batch(key: int) -> Batch:
    return Batch(Draws(fold("aligned", key), torch.arange(9)), (2,))


def updated(method: Any, roles: Roles) -> dict[str, Tensor]:
    """All weights after two steps of a method."""
    return turned(method, roles, 2, lambda step, number, repeat: batch(100 * step + 10 * number + repeat))[1]


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_every_method_with_a_critic_aligns_it_once_a_step(name: str) -> None:
    base = REGISTRY["method"][name]()
    for share in (0.0, 0.25):
        method: Any = replace(base, critic=replace(base.critic, alignment=share))
        names = {*method.needs().roles} | ({"state"} if method.needs().state else set())
        roles = Roles(**{n: Weight({"student": 3.0, "critic": 1.0}.get(n, 7.0)) for n in names})
        list(method.turns(roles, 0))
        assert float(roles.critic.weight.detach()) == 1.0 + share * 2.0
        assert float(roles.student.weight.detach()) == 3.0


def test_the_critic_follows_the_updated_student_before_it_trains() -> None:
    roles = Roles(teacher=net(1), student=net(2), critic=net(3))
    turns = DMD2(gan=None, critic=Critic(alignment=0.1)).turns(roles, 0)
    next(turns)
    before = [p.detach().clone() for p in roles.critic.parameters()]
    for p in roles.student.parameters():
        p.data.add_(0.5)
    next(turns)
    for was, mine, theirs in zip(before, roles.critic.parameters(), roles.student.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), 0.9 * was + 0.1 * theirs.detach(), rtol=1e-5, atol=1e-6)


def test_no_alignment_is_bit_for_bit_what_it_was_and_some_is_not() -> None:
    def made() -> Roles:
        return Roles(teacher=net(1), student=net(2), critic=net(3))

    plain, none, some = (updated(DMD2(gan=None, critic=c), made()) for c in (
        Critic(steps=2), Critic(steps=2, alignment=0.0), Critic(steps=2, alignment=0.03)))  # fmt: skip
    assert all(torch.equal(v, none[k]) for k, v in plain.items())
    assert any(not torch.equal(v, some[k]) for k, v in plain.items() if k.startswith("critic."))
    assert any(not torch.equal(v, some[k]) for k, v in plain.items() if k.startswith("student."))


def test_adapters_on_one_base_align_their_own_sets_and_the_base_stays() -> None:
    base = net(1)
    student, critic = (Adapted(base, name, rank=2) for name in ("student", "critic"))
    torch.manual_seed(5)
    for role in (student, critic):
        for p in role.own.values():
            nn.init.normal_(p)
    held = {k: v.clone() for k, v in base.state_dict().items() if "lora_" not in k}
    was = {k: v.detach().clone() for k, v in critic.own.items()}
    Critic(alignment=0.25).align(Roles(teacher=base, student=student, critic=critic))
    for key, value in critic.own.items():
        torch.testing.assert_close(value.detach(), 0.75 * was[key] + 0.25 * student.own[key].detach())
        assert not torch.equal(value, was[key])
    assert all(torch.equal(v, held[k]) for k, v in base.state_dict().items() if k in held)


def test_other_shapes_are_refused_by_name_and_by_line() -> None:
    told = "critic.alignment: 0.03 needs a critic of the student's shape"
    for student, critic in ((net(2), net(3, 16)), (Adapted(base := net(1), "one", rank=2), base)):
        roles = Roles(teacher=net(1), student=student, critic=critic)
        with pytest.raises(UserError, match=told):
            Critic(alignment=0.03).align(roles)
        Critic().align(roles)
    wide = ("critic={name: mlp, width: 64}", "copy={}")
    with pytest.raises(
        RecipeError, match=r"^ida\.yaml:3: method\.critic\.alignment: critic\.alignment needs a critic of"
    ):
        check("toy/ida", wide)
    with pytest.raises(UserError, match=told):
        Trainer(load("toy/ida", [*wide, "before=[]", "train.steps=1", "train.batch=8"]), cpu=True).fit()
    with pytest.raises(ValueError, match="the student stands still here"):
        Track(critic=Critic(alignment=0.1))
    with pytest.raises(ValueError, match="less than 1"):
        Critic(alignment=1.0)


def test_the_paper_is_cited_where_it_is_used() -> None:
    assert "2506.00523" in cite("toy/ida")
    assert cite("toy/isg").count("2506.00523") == 2
    assert "2506.00523" not in cite("toy/dmd2")


def test_the_card_names_the_methods_that_have_it() -> None:
    told = card("ida").code.partition("(critic.alignment) of ")[2].partition(";")[0].replace(" (regularizer dm)", "")
    assert re.split(r", | and ", told) == sorted(WITH_CRITIC)
    with pytest.raises(ValueError, match="critics follow what a view shows"):
        Factorised(critic=Critic(alignment=0.1))


@pytest.mark.parametrize("regularizer", ["moments", "gan"])
def test_it_is_refused_where_no_critic_is_trained(regularizer: str) -> None:
    aligned = Critic(alignment=0.1)
    assert DecoupledDMD(critic=aligned).needs().trained == {"student", "critic"}
    with pytest.raises(ValueError, match=f"critic.alignment: regularizer {regularizer} has no critic"):
        DecoupledDMD(critic=aligned, regularizer=regularizer)
