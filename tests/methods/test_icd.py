"""iCD: where each of the two students is sent."""

from __future__ import annotations

import torch
from listening import F64, Listening, batch_of

from fewstep.algebra.process import Flow
from fewstep.methods.icd import ICD
from fewstep.networks.roles import Roles

FLOW = Flow()


def test_the_decoder_goes_to_its_segments_lower_edge_and_the_encoder_to_the_upper_one():
    roles = Roles(
        teacher=Listening(FLOW, 0.5, 0.2),
        student=Listening(FLOW, 0.3, -0.1, takes_s=True),
        forward=Listening(FLOW, 0.4, 0.1, takes_s=True),
    )
    method = ICD(knots=8, count=4, preserve_forward=0.0, preserve_reverse=0.0)
    list(method.losses(roles, batch_of(300)))
    knot = batch_of(300).draws.integers(8)
    assert set(knot.tolist()) == set(range(8))
    lower = (knot // 2).to(F64) / 4
    (below, above), (end, again) = roles.student.times, roles.student.ends
    # The target goes on from the knot below, the answer starts at the knot above; both to the edge.
    torch.testing.assert_close(above, (knot + 1).to(F64) / 8, rtol=0, atol=1e-12)
    torch.testing.assert_close(below, knot.to(F64) / 8, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, lower, rtol=0, atol=1e-12)
    torch.testing.assert_close(again, lower, rtol=0, atol=1e-12)
    (there, here), (end, again) = roles.forward.times, roles.forward.ends
    torch.testing.assert_close(there, above, rtol=0, atol=1e-12)
    torch.testing.assert_close(here, below.clamp_min(method.start), rtol=0, atol=1e-12)
    torch.testing.assert_close(end, lower + 0.25, rtol=0, atol=1e-12)
    torch.testing.assert_close(again, lower + 0.25, rtol=0, atol=1e-12)
