"""Networks and schedulers of diffusers that are refused as teachers, and why: for messages and a README's table."""

from __future__ import annotations

from collections.abc import Mapping

_PICTURE = "takes a picture or a video beside x, which no condition of fewstep is"
_SOUND = "draws sound"
NETWORKS: Mapping[str, str] = {
    "LTX2VideoTransformer3DModel": "its state is two tensors, a video and its sound",
    "Cosmos3OmniTransformer": "its state is several tensors of different media",
    "CosmosTransformer3DModel": "steps EDM-like levels with x scaled and its time sigma / (1 + sigma), and guides from 0",
    "MochiTransformer3DModel": "its flow runs from noise at 0 to pictures at 1 (invert_sigmas), on a grid of its own",
    "OmniGenTransformer2DModel": "takes token ids and the picture in one sequence, and its flow runs from noise at 0",
    "HunyuanDiT2DModel": "takes two texts with a mask each, sizes, a style and rotary positions of its pipeline's making",
    "HunyuanImageTransformer2DModel": "takes two texts with a mask each; conditions have room for them (text2, mask2)",
    "HunyuanVideo15Transformer3DModel": "takes two texts with a mask each and a picture's embedding",
    "HiDreamImageTransformer2DModel": "takes hidden states of Llama's layers, in which the batch is axis 1",
    "Kandinsky5Transformer3DModel": "x has its channels last, and rotary positions are of its pipeline's making",
    "CogVideoXTransformer3DModel": "x has frames before channels, and rotary positions are of its pipeline's making",
    "PRXTransformer2DModel": "no entry has been tried; its pipeline takes no noise levels",
    "BriaTransformer2DModel": "its pipeline makes levels of its own, .07 from those that it is given",
    "StableCascadeUNet": "is one of three networks that draw after each other",
    "Kandinsky3UNet": "takes a mask of its text in every layer; no entry has been written",
    "UVit2DModel": "draws discrete tokens; there is no noise level",
    "PriorTransformer": "draws an embedding, not a picture",
    "UNetMotionModel": "moves a UNet's pictures; no entry has been written",
    "UNet3DConditionModel": "x (b, c, f, h, w) of a table of noise levels; no entry has been written",
    **dict.fromkeys(
        ("UNetSpatioTemporalConditionModel", "I2VGenXLUNet", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel",
         "ConsisIDTransformer3DModel", "ChronoEditTransformer3DModel", "JoyImageEditTransformer3DModel",
         "HunyuanVideoFramepackTransformer3DModel"), _PICTURE,
    ),
    **dict.fromkeys(
        ("StableAudioDiTModel", "StableAudio3DiTModel", "AceStepTransformer1DModel", "LongCatAudioDiTTransformer",
         "MiniMaxMusic3Transformer1DModel"), _SOUND,
    ),
}  # fmt: skip
"""What stands in the way of an entry, by the class in transformer/config.json or unet/config.json."""
SCHEDULERS: Mapping[str, str] = {
    "KDPM2DiscreteScheduler": "calls its network between indices; name EulerDiscreteScheduler with these betas",
    "KDPM2AncestralDiscreteScheduler": "as KDPM2DiscreteScheduler; name EulerAncestralDiscreteScheduler",
    "DDPMParallelScheduler": "name DDPMScheduler, whose table is the same",
    "DDIMParallelScheduler": "name DDIMScheduler, whose table is the same",
    "SASolverScheduler": "name DPMSolverMultistepScheduler, whose table is the same",
    "DDPMWuerstchenScheduler": "is Stable Cascade's, whose three networks are refused",
    "VQDiffusionScheduler": "is of discrete tokens",
    "ScoreSdeVeScheduler": "is of continuous scores that no network of these classes predicts",
}
"""What to do about a scheduler that is not read."""
SETTINGS: Mapping[str, str] = {
    "prediction_type `v_prediction` under an EDM scheduler": "its network answers with the other sign (CosXL)",
    "timestep_type `continuous` with v_prediction": "the network is called with ln(sigma) / 4 (Stable Video Diffusion)",
    "invert_sigmas": "the flow runs the other way",
    "num_train_timesteps other than 1000 of a flow": "the network's time would be another",
    "rescale_betas_zero_snr with prediction_type epsilon": "at pure noise such an answer tells nothing",
    "transformer/ and transformer_2/ (Wan 2.2)": "two networks with a boundary; a teacher is one network",
    "more input than output channels": "a mask or a picture is a part of the input (inpainting, editing)",
    "class_embed_type, num_class_embeds of a UNet2DConditionModel": "its further condition has no key",
    "a single file, a GGUF, a quantised folder": "the network is read from safetensors in float32, bf16 or fp16",
}
"""What of a supported class's configs is refused."""


def why(kind: str) -> str:
    """What stands in the way of a network class, for a message."""
    return NETWORKS.get(kind, "no entry has been written for it")


def table() -> str:
    """The README's: classes and settings that are refused. A class of neither list has no entry yet."""
    lines = ["| refused | why |", "|---|---|"]
    by_reason: dict[str, list[str]] = {}
    for kind, reason in NETWORKS.items():
        by_reason.setdefault(reason, []).append(f"`{kind}`")
    lines += [f"| {', '.join(kinds)} | {reason} |" for reason, kinds in by_reason.items()]
    lines += [f"| `{name}` | {reason} |" for name, reason in SCHEDULERS.items()]
    lines += [f"| {said} | {reason} |" for said, reason in SETTINGS.items()]
    return "\n".join([*lines, "", "Every other class of diffusers is refused because no entry has been written for it."])
