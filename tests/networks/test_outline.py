"""The outline of a UNet2DModel has the layers and the config of the real one; what it does not know it leaves to that."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from diffusers import UNet2DModel
from tiny_teacher import tiny_unet

from fewstep.networks.outline import DEFAULTS, outline
from fewstep.networks.parts import Site
from fewstep.networks.specs import UNet2DSpec
from fewstep.networks.unet2d import UNet2D

LAYERS = ("conv_in", "time_embedding", "class_embedding")


def test_defaults_are_those_of_the_class():
    own = inspect.signature(UNet2DModel.__init__).parameters
    assert {k: p.default for k, p in own.items() if k != "self"} == DEFAULTS


@pytest.mark.parametrize(
    "config",
    [
        dict(tiny_unet(10, 0).config),
        dict(tiny_unet(0, 0, time_embedding_dim=20).config),
        UNet2DSpec(attention=True, head_dim=7).settings(Site((3, 8, 16), 4, {}, 0)),
        {"block_out_channels": [32, 32, 32, 64], "sample_size": 16},
    ],
)
def test_layers_and_config_are_those_of_the_model(config: dict[str, Any]):
    real, ours = UNet2DModel.from_config(config), outline(config)
    assert ours is not None
    for layer in LAYERS:
        a, b = getattr(ours, layer), getattr(real, layer)
        assert (a is None) == (b is None), layer
        if b is not None:
            assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    shown = vars(ours.config)
    assert {k: real.config[k] for k in DEFAULTS} == {k: shown[k] for k in DEFAULTS}
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    assert ours.device.type == "meta"
    wrapped, whole = UNet2D(ours), UNet2D(real)
    assert (wrapped.width, wrapped.channels(), wrapped.sample_size()) == (
        whole.width,
        whole.channels(),
        whole.sample_size(),
    )
    ours.register_to_config(num_class_embeds=3)
    assert ours.config.num_class_embeds == 3


@pytest.mark.parametrize(
    "change",
    [
        {"time_embedding_type": "fourier"},
        {"class_embed_type": "timestep"},
        {"down_block_types": ["DownBlock2D", "KDownBlock2D"]},
        {"up_block_types": ["UpBlock2D"]},
        {"block_out_channels": [8, 17]},
        {"block_out_channels": 8},
        {"norm_num_groups": 0},
        {"num_class_embeds": "ten"},
        {"a_new_key": 1},
    ],
)
def test_what_only_the_class_knows_has_no_outline(change: dict[str, Any]):
    config = dict(tiny_unet(10, 0).config)
    assert outline(config) is not None
    assert outline(config | change) is None
