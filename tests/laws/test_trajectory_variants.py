"""Variants of methods behind a switch: clipping, heavy-tailed times, adversarial CTM, Align Your Flow, LPIPS, rCM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trajectory_helpers import F64, MEAN, STD, Batch64, ExactMap

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import EDM, Flow, Trig
from fewstep.algebra.sampling import Sampler, clipped, sample
from fewstep.algebra.times import LogStudentT
from fewstep.config import RecipeError, UserError
from fewstep.methods.consistency import Consistency
from fewstep.methods.ctm import CTM
from fewstep.methods.gan import Gan
from fewstep.methods.meanflow import MeanFlow
from fewstep.methods.tdd import TDD
from fewstep.networks.analytic import gaussian
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.heads import Discriminator
from fewstep.networks.mlp import MLP
from fewstep.networks.parts import Site
from fewstep.networks.perceptual import CHANNELS, LPIPSSpec, Perceptual
from fewstep.networks.roles import Roles
from fewstep.recipe.store import load
from fewstep.train.trainer import Trainer, gradients


def test_clipping_limits_x0_to_its_quantile_and_keeps_x() -> None:
    x0 = torch.tensor([[0.1, -0.2, 0.3, 9.0], [-5.0, 4.0, 3.0, 2.0]], dtype=F64)
    t = torch.tensor([0.6, 0.3], dtype=F64)
    eps = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    x = (1 - t)[:, None] * x0 + t[:, None] * eps
    got = clipped(Prediction(x0, eps, x, t, Flow()), 0.5)
    # The median size of the first row is below 1, so its limit is 1; that of the second is 3.5.
    torch.testing.assert_close(got.x0, torch.tensor([[0.1, -0.2, 0.3, 1.0], [-3.5, 3.5, 3.0, 2.0]], dtype=F64))
    torch.testing.assert_close((1 - t)[:, None] * got.x0 + t[:, None] * got.eps, x)
    same = clipped(Prediction(x0, eps, x, t, Flow()), 1.0)
    torch.testing.assert_close(same.x0, x0)
    torch.testing.assert_close(same.eps, eps)


def test_tdd_samples_with_its_clip_between_steps_only() -> None:
    net = gaussian(Flow(), 3.0, 2.0)
    noise = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    plain, tight = TDD(eta=0.0).sampler(), TDD(eta=0.0, clip=0.4).sampler()
    assert tight.clip == 0.4
    one = Sampler(kind="map", clip=0.4)
    assert torch.equal(sample(one, net, noise), sample(Sampler(kind="map"), net, noise))
    assert float((sample(tight, net, noise) - sample(plain, net, noise)).abs().max()) > 1e-2
    with pytest.raises(ValueError, match=r"clip must be a quantile in \(0, 1\], not 1\.5"):
        TDD(clip=1.5)


def test_log_student_t_is_the_truncated_law() -> None:
    from scipy.stats import t as student

    count = 40_000
    draws = Draws(fold("student"), torch.arange(count))
    for law in (LogStudentT(), LogStudentT(mean=1.0, std=0.6, df=3.0, low=0.5, high=20.0)):
        sigma = law.sample(draws, EDM())
        assert law.low * (1 - 1e-9) <= float(sigma.min()) < float(sigma.max()) <= law.high * (1 + 1e-9)
        ends = torch.tensor([law.low, law.high], dtype=F64).log()
        low, high = (float(student.cdf((e - law.mean) / law.std, law.df)) for e in ends)
        for q in (0.05, 0.3, 0.5, 0.8, 0.97):
            value = float(sigma.log().quantile(q))
            below = (float(student.cdf((value - law.mean) / law.std, law.df)) - low) / (high - low)
            assert abs(below - q) < 4.5 * (q * (1 - q) / count) ** 0.5, (law, q, below)
    trig = LogStudentT().sample(Draws(fold("student"), torch.arange(50)), Trig())
    edm = LogStudentT().sample(Draws(fold("student"), torch.arange(50)), EDM())
    torch.testing.assert_close(torch.tan(trig), edm, rtol=1e-9, atol=0)


def test_ctm_with_a_gan_trains_critic_and_heads_and_adds_its_term() -> None:
    torch.manual_seed(3)
    student, critic = (Denoiser(MLP(2, 16, 4, 0, i), Flow(), "velocity", "angle") for i in (("s",), ()))
    example = (torch.zeros(1, 2), torch.full((1,), 0.5, dtype=F64), None)
    roles = Roles(
        teacher=gaussian(Flow(), MEAN, STD).float(), student=student, critic=critic,
        discriminator=Discriminator(critic, ("mid",), example, 8),
    )  # fmt: skip
    method = CTM(gan=Gan(weight=0.5), gan_from=3, target_decay=None)
    assert method.needs().trained == {"student", "critic", "discriminator"}
    batch = Batch(Draws(fold("ctm gan"), torch.arange(8)), (2,), torch.randn(8, 2))
    for step, wanted in ((2, False), (3, True)):
        turns = list(method.turns(roles, step))
        assert [t.updates for t in turns] == [("student",), ("critic", "discriminator")]
        (losses,) = list(turns[0].losses(batch))
        assert ("gan" in losses) is wanted
    (losses,) = list(turns[1].losses(batch))
    assert {"discriminator", "denoise"} <= set(losses)
    roles.train_only("critic", "discriminator")
    losses.total().backward()
    assert float(gradients(roles.parameters("discriminator")).abs().max()) > 0
    assert all(p.grad is None for p in student.parameters())


def test_align_your_flow_rests_at_the_exact_map_and_has_a_bounded_residual() -> None:
    exact = ExactMap(Flow())
    weight = torch.nn.Parameter(torch.zeros((), dtype=F64))

    class Off(torch.nn.Module):
        takes_s, process, inputs = True, Flow(), ("s",)

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            right = exact(x, t, cond, **call)
            return Prediction(right.x0 + weight, right.eps - (1 - t)[:, None] / t[:, None] * weight, x, t, Flow())

    roles = Roles(student=Off(), teacher=gaussian(Flow(), MEAN, STD))
    method = MeanFlow(source="teacher", apart=1.0, power=0.0, normalize=0.1, warmup=0)
    (losses,) = list(method.losses(roles, Batch64.of(16), 5))
    (slope,) = torch.autograd.grad(losses.total(), weight)
    assert float(losses.total()) < 1e-10
    assert abs(float(slope)) < 1e-5
    torch.manual_seed(4)
    wild = Denoiser(MLP(1, 12, 3, 0, ("s",)), Flow(), "velocity", "angle").double()
    for p in wild.net.last.parameters():
        p.data.mul_(300)
    plain = MeanFlow(source="teacher", apart=1.0, power=0.0)
    values = [
        float(next(iter(m.losses(Roles(student=wild, teacher=roles.teacher), Batch64.of(16), 5))).total())
        for m in (method, plain)
    ]
    # |R / (|R| + c)| < 1, whatever the network says; without it the loss is its square.
    assert values[0] < 1.0 < values[1]


def vgg(seed: int = 0) -> tuple[Any, list[Tensor]]:
    from torchvision.models import vgg16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vgg16(weights=None).features, [torch.rand(1, c, 1, 1) for c in CHANNELS]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("lpips")
    layers, linear = vgg()
    torch.save({f"features.{k}": v for k, v in layers.state_dict().items()}, folder / "vgg.pth")
    torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(linear)}, folder / "lin.pth")
    return {"features": str(folder / "vgg.pth"), "linear": str(folder / "lin.pth")}


def test_lpips_is_the_weighted_distance_of_unit_features(weights: dict[str, str]) -> None:
    layers, linear = vgg()
    net = LPIPSSpec(**weights).build(Site((3, 18, 22), 0, {}, 0))
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.rand(2, 3, 18, 22, generator=generator) * 2 - 1 for _ in range(2))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    wanted = torch.zeros(2)
    x, y = ((z - shift[:, None, None]) / scale[:, None, None] for z in (a, b))
    with torch.no_grad():
        for start, end, w in zip((0, 4, 9, 16, 23), (4, 9, 16, 23, 30), linear, strict=True):
            x, y = layers[start:end](x), layers[start:end](y)
            u, v = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
            wanted = wanted + torch.einsum("bchw,c->bhw", (u - v) ** 2, w[0, :, 0, 0]).mean((1, 2))
        torch.testing.assert_close(net(a, b), wanted, rtol=1e-4, atol=1e-6)
        assert float(net(a, a).abs().max()) == 0
        grey = net(a[:, :1], b[:, :1])
        torch.testing.assert_close(grey, net(a[:, :1].repeat(1, 3, 1, 1), b[:, :1].repeat(1, 3, 1, 1)))
    assert list(net.parameters()) == []
    assert net.state_dict() == {}
    assert net.double()._linear[0].dtype == torch.float64


def test_methods_use_lpips_as_a_role(weights: dict[str, str]) -> None:
    process = Flow()

    class Grey(torch.nn.Module):
        """One number beside the answer: half the input."""

        process = Flow()

        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
            x0 = self.gain * x
            return Prediction(
                x0,
                (x - (1 - t).float().reshape(-1, 1, 1, 1) * x0) / t.float().reshape(-1, 1, 1, 1),
                x,
                t,
                process,
            )

    layers, linear = vgg()
    method = Consistency(distance="lpips", solver="ddim")
    assert "perceptual" in method.needs().roles
    assert "perceptual" not in method.needs().trained
    roles = Roles(teacher=Grey().requires_grad_(False), student=Grey(), perceptual=Perceptual(layers, linear))
    batch = Batch(Draws(fold("lpips"), torch.arange(3)), (1, 16, 20), torch.rand(3, 1, 16, 20))
    (losses,) = list(method.losses(roles, batch, 0))
    assert float(losses.total()) > 0
    (slope,) = torch.autograd.grad(losses.total(), roles.student.gain)
    assert float(slope.abs()) > 0


def test_lpips_errors_name_the_file(weights: dict[str, str], tmp_path: Path) -> None:
    site = Site((3, 32, 32), 0, {}, 0)
    with pytest.raises(UserError, match=r"nothing\.pth: no such file; LPIPS weights are never downloaded"):
        LPIPSSpec(features=str(tmp_path / "nothing.pth"), linear=weights["linear"]).build(site)
    with pytest.raises(UserError, match="not VGG16's and LPIPS's weights"):
        LPIPSSpec(features=weights["linear"], linear=weights["linear"]).build(site)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth: cannot be read as weights"):
        LPIPSSpec(features=str(tmp_path / "text.pth"), linear=weights["linear"]).build(site)
    with pytest.raises(RecipeError, match="images need a side of 16, not 8"):
        LPIPSSpec(**weights).build(Site((1, 8, 8), 0, {}, 0))
    with pytest.raises(RecipeError, match="needs the role perceptual"):
        load("toy/cd", ["method.distance=lpips"])


def test_negative_prompts_steer_cross_attention_alone() -> None:
    from diffusers.models.attention_processor import Attention

    from fewstep.networks.nasa import negative_away

    torch.manual_seed(6)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Attention(query_dim=12, heads=3, dim_head=4)
            self.cross = Attention(query_dim=12, cross_attention_dim=10, heads=3, dim_head=4)

        @property
        def attn_processors(self) -> dict[str, Any]:
            return {"own": self.own.processor, "cross": self.cross.processor}

        def set_attn_processor(self, by_name: dict[str, Any]) -> None:
            for name, p in by_name.items():
                getattr(self, name).set_processor(p)

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.cross(self.own(x), encoder_hidden_states=text)

    model = Model().eval()
    x, text, bad = torch.randn(2, 5, 12), torch.randn(2, 7, 10), torch.randn(1, 6, 10)

    def attended(tokens: Tensor) -> Tensor:
        """softmax(Q K) V in front of the output projection."""
        a, h = model.cross, model.own(x)
        q, k, v = a.to_q(h), a.to_k(tokens), a.to_v(tokens)
        q, k, v = (z.unflatten(-1, (3, 4)).transpose(1, 2) for z in (q, k, v))
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)

    with torch.no_grad():
        plain = model(x, text)
        with negative_away(model, bad, 0.3):
            steered = model(x, text)
        wanted = model.cross.to_out[0](attended(text) - 0.3 * attended(bad.expand(2, -1, -1)))
        torch.testing.assert_close(steered, wanted, rtol=1e-4, atol=1e-5)
        with negative_away(model, bad, 0.0):
            assert torch.equal(model(x, text), plain)
        assert torch.equal(model(x, text), plain)
    assert float((steered - plain).abs().max()) > 1e-3


def test_rcm_adds_the_gradients_of_scm_and_score_difference() -> None:
    small = ["student.width=16", "student.depth=3", "train.batch=8", "train.steps=2", "before.0.steps=1"]
    recipe = load("toy/rcm", [*small, "train.sample_every=0"])
    trainer = Trainer(recipe, cpu=True)
    trainer.fit()
    assert trainer.progress.skipped == 0
    assert {"scm/scm", "dmd2/match", "dmd2/dsm"} <= set(trainer.last_record)
    joint: Any = recipe.method
    scm, dmd = (share.method for share in joint.methods)
    roles = trainer.roles
    stage = recipe.stages()[-1]
    trainer.progress.stage, trainer.progress.step = 1, 1
    batch = trainer.loop.batch(stage, (0, 0), 0)

    def gradient(method: Any, draws: Draws) -> Tensor:
        roles.train_only("student")
        for p in roles.parameters("student"):
            p.grad = None
        batch.draws = draws
        turn = next(iter(method.turns(roles, 1)))
        for losses in turn.losses(batch):
            losses.total().backward()
        return gradients(roles.parameters("student")).clone()

    key, index = batch.draws.key, batch.draws.index
    whole = gradient(joint, Draws(key, index))
    parts = gradient(scm, Draws(key, index)) + 0.02 * gradient(dmd, Draws(fold(key, "joint", 1), index))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert joint.sampler().kind == "renoise"
