"""Recipes of published settings against the published values, each with its source; levels against stock schedulers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel

from fewstep.algebra.sampling import knot_levels
from fewstep.config import plain
from fewstep.methods.tdd import target_set
from fewstep.recipe.source import shipped
from fewstep.recipe.store import load
from fewstep.train.product import product_of

DMD2 = "tianweiy/DMD2 @ 8d8fa55"
SDXL, SD15 = f"{DMD2} experiments/sdxl", f"{DMD2} experiments/sdv1.5"
TDD = "RedAIGC/Target-Driven-Distillation @ 89cc1e8 train/SDXL"
LCM = "diffusers @ 58eb52c examples/consistency_distillation"
MEANFLOW = "Gsunshine/meanflow @ d70cb55"
SANA = "NVlabs/Sana @ 3e449ba SanaSprint_1600M_1024px_allqknorm_bf16_scm_ladd.yaml"
SCM_LADD = "NVlabs/Sana @ 0c07b19 train_scripts/train_scm_ladd.py"
LSG = "mingyuanzhou/SiD-LSG @ 3ea6487"
PHASED = "ModelTC/LightX2V @ f8aee98 lightx2v_train/configs/train/phased_dmd"
UNET_LAYERS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]

_ADAMW = {
    "optim.{}.betas": ((0.9, 0.999), f"{DMD2} main/train_sd.py"),
    "optim.{}.weight_decay": (0.01, f"{DMD2} main/train_sd.py"),
}
_OF_DMD2: dict[str, tuple[Any, str]] = {
    "method.times": ({"name": "index", "low": 20, "high": 980, "count": 1000}, f"{DMD2} main/train_sd.py"),
    "method.critic.times.low": (0, f"{DMD2} main/sd_guidance.py"),
    "method.critic.times.high": (999, f"{DMD2} main/sd_guidance.py"),
    "method.critic.weight": ("eps", f"{DMD2} main/sd_guidance.py"),
    "train.clip": (10.0, "max_grad_norm"),
    "train.product": ("student", f"{DMD2} keeps no EMA"),
    "train.ema": ((), f"{DMD2} keeps no EMA"),
    **{key.format("default"): value for key, value in _ADAMW.items()},
    **{key.format("student"): value for key, value in _ADAMW.items()},
    # 500 scheduler steps, of which accelerate takes one a process: 64 an iteration.
    "optim.default.warmup": (8, f"{DMD2} main/train_sd.py"),
}
_OF_SDXL: dict[str, tuple[Any, str]] = {
    **_OF_DMD2,
    "data.zeros": (True, f"{DMD2} main/train_sd.py"),
    "discriminator": ({"trunk": "critic", "taps": ("mid",), "width": None}, f"{DMD2} main/sd_guidance.py"),
    "method.critic.steps": (5, f"{SDXL} dfake_gen_update_ratio"),
    "method.guidance": (8.0, f"{SDXL} real_guidance_scale"),
    "method.gan.weight": (5e-3, f"{SDXL} gen_cls_loss_weight"),
    "method.gan.discriminator_weight": (1e-2, f"{SDXL} guidance_cls_loss_weight"),
    "method.gan.times.low": (0, f"{SDXL} diffusion_gan_max_timestep 1000"),
    "method.gan.times.high": (999, f"{SDXL} diffusion_gan_max_timestep 1000"),
    "optim.student.warmup": (2, f"{DMD2} main/train_sd.py"),
    "train.batch": (128, f"{SDXL} 2 x 64"),
}
_OF_TDD: dict[str, tuple[Any, str]] = {
    "method.knots": (250, f"{TDD}/train_tdd.sh num_ddim_timesteps"),
    "method.counts": ((4, 5, 6, 7, 8), f"{TDD}/train_tdd.sh num_inference_steps_min, _max"),
    "method.shrink": (0.3, f"{TDD}/train_tdd.sh s_ratio"),
    "method.guidance": (1 + 3.5, f"{TDD}/train_tdd.sh w_min, w_max"),
    "method.drop_cond": (0.2, f"{TDD}/train_tdd.sh proportion_empty_prompts"),
    "method.window": (260, f"{TDD}/train_tdd.py"),
    "method.distance": ("huber", f"{TDD}/train_tdd.sh loss_type"),
    "method.c": (1e-3, f"{TDD}/train_tdd.py huber_c"),
    "student.rank": (64, f"{TDD}/train_tdd.sh lora_rank"),
    "student.alpha": (8.0, "peft's default, of which train_tdd.py makes use"),
    "student.targets": (tuple(UNET_LAYERS), f"{TDD}/train_tdd.py"),
    "optim.default.lr": (1e-6, f"{TDD}/train_tdd.sh learning_rate"),
    "optim.default.weight_decay": (0.0, f"{TDD}/train_tdd.sh adam_weight_decay"),
    "train.batch": (16 * 8 * 4, f"{TDD}/train_tdd.sh, config.yaml num_processes 8"),
    "train.accumulate": (4, f"{TDD}/train_tdd.sh"),
    "train.steps": (100_000, f"{TDD}/train_tdd.sh"),
    "train.clip": (1.0, f"{TDD}/train_tdd.py max_grad_norm"),
}
_OF_LCM: dict[str, tuple[Any, str]] = {
    "method.pairing": ({"name": "grid", "points": 51}, f"{LCM} num_ddim_timesteps 50"),
    "method.solver": ("ddim", f"{LCM} DDIMSolver"),
    "method.guidance": ((1 + 5.0, 1 + 15.0), f"{LCM} w_min, w_max"),
    "method.embed_guidance": (True, f"{LCM} w_embedding"),
    "method.sample_guidance": (8.5, "diffusers LatentConsistencyModelPipeline.__call__"),
    "method.distance": ("huber", f"{LCM}/README.md loss_type"),
    "method.c": (1e-3, f"{LCM} huber_c"),
    "method.target_decay": (0.95, f"{LCM}/README.md ema_decay"),
    "optim.default.lr": (1e-6, f"{LCM}/README.md learning_rate"),
    "optim.default.weight_decay": (0.0, f"{LCM}/README.md adam_weight_decay"),
    "optim.default.warmup": (0, "get_scheduler('constant') has none"),
    "train.steps": (1000, f"{LCM}/README.md max_train_steps"),
    "train.clip": (1.0, f"{LCM} max_grad_norm"),
}

PUBLISHED: dict[str, dict[str, tuple[Any, str]]] = {
    "paper/dmd2-sd15": {
        **_OF_DMD2,
        "method.steps": ((1.0,), f"{SD15} conditioning_timestep 999"),
        "method.critic.steps": (10, f"{SD15} dfake_gen_update_ratio"),
        "method.guidance": (1.75, f"{SD15} real_guidance_scale"),
        "method.gan": (None, f"{SD15} without cls_on_clean_image"),
        "optim.default.lr": (1e-5, f"{SD15} guidance_lr"),
        "optim.student.lr": (1e-5, f"{SD15} generator_lr"),
        "optim.student.warmup": (1, f"{DMD2} main/train_sd.py"),
        "train.batch": (32 * 64, f"{SD15} batch_size on 8 nodes"),
        "train.steps": (39_000 // 10, f"{SD15}/README.md"),
    },
    "paper/dmd2-sdxl-4step": {
        **_OF_SDXL,
        "optim.default.lr": (5e-7, f"{SDXL} guidance_lr"),
        "optim.student.lr": (5e-7, f"{SDXL} generator_lr"),
        "train.steps": (19_000 // 5, f"{SDXL}/README.md"),
    },
    "paper/dmd2-sdxl-1step": {
        **_OF_SDXL,
        "optim.default.lr": (5e-7, f"{SDXL} guidance_lr"),
        "optim.student.lr": (5e-7, f"{SDXL} generator_lr"),
        "train.steps": (24_000 // 5, f"{SDXL}/README.md"),
    },
    "paper/dmd2-sdxl-4step-lora": {
        **_OF_SDXL,
        "student.rank": (64, f"{DMD2} main/train_sd.py"),
        "student.alpha": (8.0, f"{DMD2} main/train_sd.py"),
        "student.targets": (tuple(UNET_LAYERS), f"{DMD2} main/sd_unified_model.py"),
        "optim.default.lr": (5e-5, f"{SDXL}/..._lora.sh guidance_lr"),
        "optim.student.lr": (5e-5, f"{SDXL}/..._lora.sh generator_lr"),
        "train.steps": (16_000 // 5, f"{SDXL}/README.md"),
    },
    "paper/decoupled-dmd-sdxl": {
        "method.schedule": ("hybrid", "arXiv 2511.22677"),
        "method.guidance": (8.0, "as DMD2"),
        "method.critic.times": ({"name": "index", "low": 0, "high": 999, "count": 1000}, "as DMD2"),
        "method.critic.weight": ("eps", "as DMD2"),
        "method.critic.steps": (5, "as DMD2"),
        "method.steps": ((1.0, 0.75, 0.5, 0.25), "as DMD2"),
        "discriminator": (None, "arXiv 2511.22677"),
    },
    "paper/lcm-sd15": _OF_LCM,
    "paper/lcm-sdxl": {
        **_OF_LCM,
        "method.guidance": ((1 + 3.0, 1 + 15.0), f"{LCM}/train_lcm_distill_sdxl_wds.py w_min, w_max"),
        "data.zeros": (True, f"{LCM}/train_lcm_distill_sdxl_wds.py"),
    },
    "paper/tdd-sdxl": {**_OF_TDD, "data.zeros": (True, f"{TDD}/train_tdd.py")},
    "paper/tdd-sd15": _OF_TDD,
    "paper/meanflow-dit-xl": {
        "method.source": ("data", "arXiv 2505.13447"),
        "method.times.mean": (-0.4, f"{MEANFLOW} configs/default.py P_mean"),
        "method.times.std": (1.0, f"{MEANFLOW} configs/default.py P_std"),
        "method.apart": (1 - 0.75, f"{MEANFLOW} configs/default.py data_proportion"),
        "method.guidance": (0.2, "arXiv 2505.13447, table 4: omega of XL/2"),
        "method.kappa": (0.92, "arXiv 2505.13447, table 4: kappa of XL/2"),
        "method.guided_until": (0.75, "arXiv 2505.13447, table 4: t_end of XL/2"),
        "method.drop_cond": (0.1, f"{MEANFLOW} configs/default.py class_dropout_prob"),
        "method.power": (1.0, f"{MEANFLOW} configs/default.py norm_p"),
        "method.c": (0.01 / (4 * 32 * 32), f"{MEANFLOW} configs/default.py norm_eps, on a sum"),
        "optim.default.lr": (1e-4, f"{MEANFLOW} configs/run_b4.yml"),
        "optim.default.betas": ((0.9, 0.95), f"{MEANFLOW} configs/run_b4.yml"),
        "optim.default.weight_decay": (0.0, f"{MEANFLOW} train.py"),
        "train.batch": (256, f"{MEANFLOW} configs/run_b4.yml"),
        "train.ema": ((0.9999,), f"{MEANFLOW} configs/default.py ema_val"),
        "train.steps": (pytest.approx(240 * 1_281_167 / 256, rel=1e-3), "arXiv 2505.13447, 240 epochs"),
    },
    "paper/phased-dmd-flow": {
        "method.loss_on": ("x0", f"{PHASED}, trainers/phased_dmd/rollout.py"),
        "method.critic.steps": (5, f"{PHASED} fake_update_ratio"),
        "method.clamp": (10.0, "arXiv 2510.27684"),
        "method.boundaries": ((0.5,), f"{PHASED} match_timestep 500"),
        "method.times.low": (0.02, f"{PHASED} min_sigma"),
        "method.times.high": (0.98, f"{PHASED} max_sigma"),
        "before.0.method.boundaries": ((0.5,), f"{PHASED} match_timestep 500"),
        "before.0.method.loss_on": ("x0", f"{PHASED}, trainers/phased_dmd/rollout.py"),
        "before.0.method.times.low": (0.02 / 0.5, f"{PHASED} margin 20 of (.5, 1]"),
        "before.0.method.times.high": ((0.98 - 0.5) / 0.5, f"{PHASED} max_sigma, of (.5, 1]"),
        "before.0.method.critic.times": (
            {"name": "uniform", "low": 0.04, "high": 0.96, "shift": 1.0},
            f"{PHASED}: the critic's levels are the generator's",
        ),
        "before.0.method.critic.steps": (5, f"{PHASED} fake_update_ratio"),
        "before.0.method.clamp": (10.0, "arXiv 2510.27684"),
        "student.of.rank": (64, "arXiv 2510.27684"),
        "student.of.alpha": (8.0, "arXiv 2510.27684"),
        "optim.student.lr": (5e-5, "arXiv 2510.27684"),
        "optim.critic.lr": (4e-7, f"{PHASED} fake"),
        "optim.student.betas": ((0.0, 0.999), f"{PHASED} adam_beta1, adam_beta2"),
        "optim.critic.betas": ((0.0, 0.999), f"{PHASED} adam_beta1, adam_beta2"),
        "optim.student.weight_decay": (0.01, f"{PHASED} weight_decay"),
        "optim.critic.weight_decay": (0.01, f"{PHASED} weight_decay"),
        "train.clip": (1.0, f"{PHASED}/wan2_2_t2v_a14b_phased_dmd.yaml max_grad_norm"),
        "train.batch": (64, "arXiv 2510.27684"),
    },
    "paper/sana-sprint": {
        "discriminator.taps": (("block2", "block8", "block14", "block19"), f"{SANA} head_block_ids"),
        "method.methods.0.weight": (1.0, f"{SANA} scm_lambda"),
        "method.methods.0.method.times.mean": (0.2, f"{SANA} logit_mean"),
        "method.methods.0.method.times.std": (1.6, f"{SANA} logit_std"),
        "method.methods.0.method.times.sigma_data": (0.5, f"{SANA} sigma_data"),
        "method.methods.0.method.guidance.of": ((4.0, 4.5, 5.0), f"{SANA} scm_cfg_scale"),
        "method.methods.0.method.embed_guidance": (True, f"{SANA} cfg_embed"),
        "method.methods.0.method.weighting": ("learned", f"{SANA} logvar"),
        "method.methods.0.method.prior_weight": (True, f"{SCM_LADD} weight = 1 / sigma"),
        "method.methods.0.method.c": (0.1 / 0.5, f"{SCM_LADD} .1 in units of sigma_data"),
        "method.methods.0.method.warmup": (
            4000 // 2,
            f"{SANA} tangent_warmup_steps, two of global_step an update",
        ),
        "method.methods.1.weight": (0.5, f"{SANA} adv_lambda"),
        "method.methods.1.method.student_times.mean": (0.2, f"{SCM_LADD} get_timesteps"),
        "method.methods.1.method.student_times.std": (1.6, f"{SCM_LADD} get_timesteps"),
        "method.methods.1.method.prior_share": (0.5, f"{SANA} largest_timestep_prob"),
        "method.methods.1.method.guidance.of": ((4.0, 4.5, 5.0), f"{SCM_LADD} scm_cfg_scale"),
        "method.methods.1.method.misaligned": (True, f"{SANA} misaligned_pairs_D"),
        "method.methods.1.method.gan.times.mean": (-0.6, f"{SANA} logit_mean_discriminator"),
        "method.methods.1.method.gan.times.std": (1.0, f"{SANA} logit_std_discriminator"),
        "method.methods.1.method.gan.loss": ("hinge", f"{SANA} discriminator_loss"),
        "optim.default.lr": (2e-6, f"{SANA} optimizer, optimizer_D"),
        "optim.default.rule": ("came", f"{SANA} optimizer.type CAMEWrapper"),
        "optim.default.betas": ((0.9, 0.999), f"{SANA} optimizer.betas"),
        "optim.default.warmup": (0, f"{SCM_LADD}: the discriminator's optimiser has no schedule"),
        "optim.weighting.rule": ("came", f"{SANA}: one optimiser for student and weighting"),
        "optim.weighting.lr": (2e-6, f"{SANA} optimizer"),
        "optim.weighting.warmup": (round(5000 / 32 + 0.5), f"{SANA} num_warmup_steps, one a process"),
        "optim.student.warmup": (round(5000 / 32 + 0.5), f"{SANA} num_warmup_steps, one a process"),
        "train.steps": (20_000 // 2, "arXiv 2503.09641, two of global_step an update"),
        "train.batch": (512, "arXiv 2503.09641"),
        "train.clip": (0.1, f"{SANA} gradient_clip"),
    },
    "paper/sid-lsg-sd15": {
        "method.alpha": (1.0, f"{LSG} run_sid.sh alpha"),
        "method.guidance": (2.0, f"{LSG} run_sid.sh cfg_eval_real"),
        "method.guide_critic": ((2.0, 2.0), f"{LSG} run_sid.sh cfg_train_fake, cfg_eval_fake"),
        "method.times.low": (20, f"{LSG} sid_train.py tmin"),
        "method.times.high": (979, f"{LSG} sid_train.py tmax 980, exclusive"),
        "method.critic.times": (
            {"name": "index", "low": 20, "high": 979, "count": 1000},
            f"{LSG} sid_training_loop.py",
        ),
        "method.critic.weight": ("eps", f"{LSG} sid_training_loop.py"),
        "method.critic.steps": (1, f"{LSG} sid_training_loop.py"),
        "method.gan": (None, f"{LSG} has none"),
        "optim.default.lr": (1e-6, f"{LSG} run_sid.sh lr, glr"),
        "optim.default.betas": ((0.0, 0.999), f"{LSG} sid_train.py"),
        "optim.default.eps": (pytest.approx(1e-8 / (4 * 64 * 64), rel=1e-4), f"{LSG} sid_train.py, on sums"),
        "train.batch": (512, f"{LSG} run_sid.sh batch"),
        "train.steps": (10_000_000 // 512, f"{LSG} run_sid.sh duration"),
        "train.ema": ((pytest.approx(0.5 ** (512 / 50_000), abs=1e-5),), f"{LSG} run_sid.sh ema"),
        "train.precision": ("fp32", f"{LSG} run_sid.sh fp16 0"),
    },
    # No training code: rank and segments are the paper's, what else it holds is ours and says so.
    "paper/tscd-sdxl": {"student.rank": (64, "arXiv 2404.13686"), "method.segments": (1, "arXiv 2404.13686")},
    "paper/tscd-sd15": {"student.rank": (64, "arXiv 2404.13686"), "method.segments": (1, "arXiv 2404.13686")},
}

LEVELS = {
    "paper/dmd2-sd15": (999,),
    "paper/dmd2-sdxl-1step": (399,),
    "paper/dmd2-sdxl-4step": (999, 749, 499, 249),
    "paper/dmd2-sdxl-4step-lora": (999, 749, 499, 249),
    "paper/lcm-sd15": (999, 759, 499, 259),
    "paper/lcm-sdxl": (999, 759, 499, 259),
    "paper/sid-lsg-sd15": (625,),
    "paper/tdd-sd15": (999, 751, 499, 251),
    "paper/tdd-sdxl": (999, 751, 499, 251),
}


def leaf(data: Any, path: str) -> Any:
    """The value at a dotted path, lists as tuples."""
    for key in path.split("."):
        data = data[int(key)] if key.isdigit() else data[key]
    return as_tuples(data)


def as_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(as_tuples(v) for v in value)
    return {k: as_tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_every_recipe_of_published_settings_has_its_row():
    assert set(PUBLISHED) == {n for n in shipped() if n.startswith("paper/")}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_loaded_recipe_holds_the_published_values(name: str):
    data = plain(load(name))
    found = {path: leaf(data, path) for path in PUBLISHED[name]}
    assert found == {path: value for path, (value, _) in PUBLISHED[name].items()}


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_levels_are_indices_of_the_trained_grid(name: str):
    assert tuple(round(1000 * u) - 1 for u in load(name).method.steps) == LEVELS[name]  # type: ignore[attr-defined]


def test_levels_of_lcm_are_those_of_the_stock_scheduler():
    stock = LCMScheduler(original_inference_steps=50)
    sampler = load("paper/lcm-sd15").sampler()
    for steps in range(1, 9):
        stock.set_timesteps(steps)
        levels = sampler.steps if steps == 4 else knot_levels(steps, sampler.knots or 0)
        assert [round(1000 * u) - 1 for u in levels] == stock.timesteps.tolist()


def test_levels_of_tdd_are_targets_it_was_trained_for():
    trained, sampler = {*target_set(), 999}, load("paper/tdd-sdxl").sampler()
    for steps in (4, 5, 6, 7, 8):
        levels = sampler.steps if steps == 4 else knot_levels(steps, sampler.knots or 0)
        assert {round(1000 * u) - 1 for u in levels} <= trained
    assert not {749, 249} & trained


@pytest.mark.parametrize("name", ["paper/lcm-sd15", "paper/tdd-sdxl"])
def test_another_number_of_steps_stands_on_the_trained_grid(name: str):
    recipe = load(name)
    product = product_of(recipe, torch.nn.Identity(), SimpleNamespace(shape=(4, 8, 8), classes=0), name)
    eight = product.with_steps(8).sampler
    assert eight.steps == knot_levels(8, recipe.sampler().knots or 0)
    assert (eight.kind, eight.eta, eight.knots) == (
        product.sampler.kind,
        product.sampler.eta,
        product.sampler.knots,
    )
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.50, the knots of the grid, not 51"):
        knot_levels(51, 50)


def test_the_adapted_layers_of_sdxl_are_the_scripts_788():
    with torch.device("meta"):
        net = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    every = [n for n, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    own = [n for n in every if any(n == t or n.endswith(f".{t}") for t in UNET_LAYERS)]
    assert (len(every), len(own)) == (794, 788)
    outside = {"conv_in", "conv_out", *(f"{n}_embedding.linear_{i}" for n in ("time", "add") for i in (1, 2))}
    assert set(every) - set(own) == outside


def test_phases_look_at_noise_above_their_end_by_the_published_margin():
    recipe = load("paper/phased-dmd-flow")
    first, last = recipe.before[0].method, recipe.method
    for times in (first.times, first.critic.times):  # type: ignore[attr-defined]
        assert (0.5 + 0.5 * times.low, 0.5 + 0.5 * times.high) == (0.52, 0.98)
    assert (last.critic.times.low, last.critic.times.high) == (0.02, 0.98)  # type: ignore[attr-defined]
    same = ("steps", "boundaries", "loss_on", "clamp")
    assert all(getattr(first, key) == getattr(last, key) for key in same)
    assert (first.critic.weight, first.critic.steps) == (last.critic.weight, last.critic.steps)
