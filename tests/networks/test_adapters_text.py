"""A text teacher with two adapters, trained on prompts alone: conditions, guidance, the product and its LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_condition import condition_unet
from tiny_text import text_pipeline

from fewstep.export import base
from fewstep.export.base import ExportRefused
from fewstep.export.lora import export_lora
from fewstep.networks.adapters import own_state
from fewstep.recipe.store import load
from fewstep.train.product import product_of
from fewstep.train.trainer import Trainer

PROMPTS = ("a red square", "two green dots", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder of random weights, but for its VAE."""
    root = text_pipeline(tmp_path_factory.mktemp("text") / "sd", PROMPTS, unet=condition_unet())
    (root.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    (root.parent / "mine.yaml").write_text(
        f"""about: text
data:
  name: prompts
  path: {root.parent / "prompts.txt"}
  shape: [4, 8, 8]
  encoder: {{name: pipeline, path: {root}}}
  text_cache: {root.parent / "cache"}
  negative: two blue square
teacher: {{name: diffusers, path: {root}}}
student: {{name: lora, of: teacher, rank: 2, targets: [to_q, to_v, conv1]}}
critic: {{name: lora, of: teacher, rank: 3}}
method: {{name: dmd2, gan: null, critic: {{weight: eps, steps: 1}}, guidance: 3.0, steps: [1.0, 0.5]}}
optim: {{default: {{lr: 1e-3}}}}
train: {{steps: 2, batch: 4, accumulate: 2, checkpointing: true, product: student, ema: [], sample_every: 0}}
evaluate: null
"""
    )
    return root.parent


def test_two_adapters_train_on_prompts_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fewstep.data import encoders as module

    opened: list[Any] = []
    encode = module.PipelineEncoder.open
    monkeypatch.setattr(module.PipelineEncoder, "open", lambda self, device: (opened.append(1), encode(self, device))[1])
    trainer = Trainer(load(str(folder / "mine.yaml")), cpu=True)
    seen: list[Any] = []
    inner = trainer.roles.teacher.net.register_forward_pre_hook(lambda _m, args: seen.append(args[2]))
    before = {k: v.clone() for k, v in own_state(trainer.roles.teacher).items()}
    trainer.fit()
    inner.remove()
    # The guided call of the teacher: the prompts' rows above, the negative's below.
    guided = next(c for c in seen if len(c["text"]) == 4)
    negative = trainer.data.text.empty["text"]
    assert torch.equal(guided["text"][2:], negative.expand(2, -1, -1))
    assert not torch.equal(guided["text"][0], negative[0])
    for key, value in own_state(trainer.roles.teacher).items():
        assert torch.equal(value, before[key]), key
    for role in ("student", "critic"):
        factors = {k: v for k, v in own_state(trainer.roles[role]).items() if "lora_B" in k}
        assert all(torch.isfinite(v).all() for v in factors.values())
        assert sum(float(v.abs().max()) > 0 for v in factors.values()) > len(factors) / 2
    product = product_of(trainer.recipe, trainer.product.eval(), trainer.data, "x", 2)
    x = product.draw(5, seed=0, batch=2)
    assert x.shape == (5, 4, 8, 8)
    # x0 of an eps network at the prior is a difference of large numbers.
    torch.testing.assert_close(product.draw(5, seed=0, batch=5), x, rtol=0, atol=1e-5 * float(x.abs().max()))
    done = export_lora(product, tmp_path / "lora")
    assert done.parity <= 1e-6
    assert export_lora(product, tmp_path / "lora") == done  # an earlier export is replaced
    for gap in (1.0, float("nan")):
        with monkeypatch.context() as m:
            m.setattr(base, "difference", lambda *_, gap=gap: gap)
            with pytest.raises(
                ExportRefused, match=r"^weights into which diffusers fuses .* differ from those merged here"
            ):
                export_lora(product, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()
    again = Trainer(load(str(folder / "mine.yaml"), [f"student.file={tmp_path / 'lora'}"]), cpu=True)
    for key, value in own_state(trainer.roles.student).items():
        assert torch.equal(own_state(again.roles.student)[key], value), key
    assert len(opened) == 1  # the second trainer read the cache
