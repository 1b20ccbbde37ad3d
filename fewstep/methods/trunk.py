"""Discriminators on a critic that denoises the student's samples, in methods that have it for its features alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep.algebra.batch import Batch
from fewstep.algebra.jump import ask, clean
from fewstep.methods.critic import Critic
from fewstep.methods.gan import Gan
from fewstep.methods.method import Losses
from fewstep.methods.terms import noised
from fewstep.networks.roles import Roles


def with_trunk(gan: Gan, roles: Roles, batch: Batch, x: Tensor) -> Losses:
    """The discriminator's losses, and its trunk goes on denoising the student's samples x (b, *d).

    So its features stay those of images, in methods that have the critic for its features alone.
    """
    critic = Critic() if gan.times is None else Critic(times=gan.times)
    if gan.shares_noise:
        return critic.losses(roles, batch, x, gan)
    losses = gan.discriminator(roles, batch, x)
    losses["denoise"] = critic.losses(roles, batch, x)["dsm"]
    return losses


def discriminate(gan: Gan | None, roles: Roles, batch: Batch, times: Any) -> Iterator[Losses]:
    """The critic turn of a trajectory method: its discriminator on the student's jumps from noised data to clean."""
    assert gan is not None
    process: Any = roles.student.process
    with torch.no_grad():
        noised_data, t = noised(times, roles, batch, batch.data())
        end = clean(process, t)
        x = ask(roles.student, noised_data, t, end, batch.cond).at(end)
    yield with_trunk(gan, roles, batch, x)
