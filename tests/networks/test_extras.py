"""Further inputs as angles: saved students were trained on these numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.algebra.process import EDM, Flow
from fewstep.networks.extras import ANGLE, values_of

F64 = torch.float64


def test_every_input_is_an_angle_between_0_and_a_right_one():
    values = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
    assert ANGLE["w"](Flow(), values).tolist() == pytest.approx([0, math.pi / 4, math.atan(3)])
    assert ANGLE["mirror"](Flow(), values[:2]).tolist() == pytest.approx([0, math.pi / 2])
    # atan(sigma / alpha).
    assert ANGLE["s"](EDM(), values).tolist() == pytest.approx([0, math.pi / 4, math.atan(3)])
    assert ANGLE["length"](EDM(), values).tolist() == values.tolist()


def test_a_length_is_the_difference_of_the_angles_and_left_out_inputs_change_nothing():
    t, s = torch.tensor([1.0], dtype=F64), torch.tensor([0.5], dtype=F64)
    found = values_of(EDM(), ("s", "length", "w", "mirror"), t, s, None, None)
    assert float(found["s"]) == 0.5
    assert float(found["length"]) == pytest.approx(math.pi / 4 - math.atan(0.5))
    assert (float(found["w"]), float(found["mirror"])) == (1.0, 0.0)
    assert float(values_of(EDM(), ("length",), t, None, None, None)["length"]) == 0.0
