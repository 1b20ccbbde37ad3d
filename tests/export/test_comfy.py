"""Graphs for ComfyUI: whole, every link leads to a node, and the levels are the trained ones as it counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.algebra.process import EDM, DiscreteVP, ShiftedFlow
from fewstep.algebra.sampling import Sampler
from fewstep.config import UserError
from fewstep.export.comfy import FAMILIES, PURE, sampler_of, sigmas_of, workflow

STEPS = (1.0, 0.75, 0.5, 0.25)
RENOISE = Sampler(kind="renoise", steps=STEPS)


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_a_graph_is_whole(pipeline: str):
    process: Any = DiscreteVP() if pipeline.endswith(("DiffusionPipeline", "XLPipeline")) else ShiftedFlow(shift=3.0)
    graph = workflow(pipeline, process, RENOISE, (1024, 768), "lora.safetensors", 3.5)
    for node in graph.values():
        assert set(node) == {"class_type", "inputs", "_meta"}
        links = [v for v in node["inputs"].values() if isinstance(v, list)]
        assert all(a in graph and isinstance(i, int) for a, i in links)
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert kinds["LoraLoaderModelOnly"]["lora_name"] == "lora.safetensors"
    assert kinds["SamplerCustom"]["cfg"] == 1.0
    assert kinds["SamplerCustom"]["model"] == ["4", 0]
    assert kinds["KSamplerSelect"]["sampler_name"] == "lcm"
    assert (kinds[FAMILIES[pipeline].latents]["height"], kinds[FAMILIES[pipeline].latents]["width"]) == (1024, 768)
    assert ("FluxGuidance" in kinds) == FAMILIES[pipeline].guidance
    levels = [float(v) for v in kinds["ManualSigmas"]["sigmas"].split(",")]
    assert len(levels) == 5
    assert levels[-1] == 0


def test_levels_are_sigma_over_alpha_and_t_of_a_flow():
    process = DiscreteVP(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    sigmas = torch.tensor(sigmas_of(process, RENOISE)[:-1], dtype=torch.float64)
    table = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    bar = torch.cumprod(1 - table, 0)[[999, 749, 499, 249]]
    torch.testing.assert_close(sigmas, ((1 - bar) / bar).sqrt(), rtol=1e-5, atol=0)
    assert sigmas[0] == pytest.approx(14.615, abs=1e-3)  # what ComfyUI's own node names for SDXL
    assert sigmas_of(ShiftedFlow(shift=3.0), RENOISE) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


def test_samplers_have_its_names_or_none():
    flow = ShiftedFlow(shift=3.0)
    assert sampler_of(flow, Sampler(kind="map", steps=STEPS)) == "euler"
    assert sampler_of(flow, Sampler(kind="renoise", steps=(1.0,))) == "euler"
    with pytest.raises(UserError, match="no ComfyUI sampler is known"):
        sampler_of(DiscreteVP(), Sampler(kind="gamma", steps=STEPS, eta=0.3))
    with pytest.raises(UserError, match="no ComfyUI workflow is known for PixArtSigmaPipeline; those are of Stable"):
        workflow("PixArtSigmaPipeline", flow, RENOISE, (8, 8), "x")
    with pytest.raises(UserError, match=r"pure noise \(zero terminal SNR\), whose sigma over alpha is no number"):
        sigmas_of(DiscreteVP(zero_snr=True), RENOISE)
    assert max(sigmas_of(DiscreteVP(schedule="squaredcos_cap_v2"), RENOISE)) < PURE
    with pytest.raises(UserError, match="levels of EDM"):
        sigmas_of(EDM(), RENOISE)
