"""A reward of latents is that of the pictures that the VAE makes, with no gradient through it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pipelines import vae

from fewstep.config import RecipeError, UserError
from fewstep.data.decoded import DecodedSpec
from fewstep.data.latents import decoder
from fewstep.networks.parts import Site
from fewstep.networks.rewards import InkSpec, check_reward


def test_it_judges_the_decoded_pictures(tmp_path: Path):
    torch.manual_seed(0)
    vae(5, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    folder = str(tmp_path / "vae")
    spec = DecodedSpec(of=InkSpec(), vae=folder)
    reward = spec.build(Site((5, 4, 6), 0, {}, 0))
    assert list(reward.parameters()) == []
    z = torch.randn(11, 5, 4, 6)
    pictures = decoder(folder)(z)
    assert pictures.shape[2:] == (8, 12)
    torch.testing.assert_close(reward(z, None), ((pictures + 1) / 2).flatten(1).mean(1))
    check_reward(reward, z, None, gradient=False)
    with pytest.raises(UserError, match="its gradient with respect to the samples is nothing"):
        check_reward(reward, z, None, gradient=True)
    assert not spec.differentiable
    assert all(p.is_file() for p in spec.files())

    with pytest.raises(RecipeError, match="decoded is for latents of pictures"):
        spec.build(Site((2,), 0, {}, 0))
