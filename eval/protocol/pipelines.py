"""Any diffusers pipeline as ``generate(indices)``: one generator per global index, so batches do not
matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pipeline_generate(
    pipeline: Any,
    *,
    seed: int = 0,
    labels: Callable[[list[int]], Sequence[int]] | None = None,
    prompts: Sequence[str] | None = None,
    label_argument: str = "class_labels",
    **call: Any,
) -> Callable[[list[int]], Tensor]:
    """Make the evaluation seam of a loaded pipeline.

    Args:
        seed: sample i starts from a CPU generator seeded ``seed + i``.
        labels: class labels of given indices, passed as `label_argument`.
        prompts: prompt i belongs to index i; an index past the end is an error.
        call: further arguments of the pipeline's call, such as ``num_inference_steps``.

    Returns:
        indices -> (N, C, H, W) fp32 in [-1, 1].
    """
    # diffusers wraps __call__ in no_grad; signature() looks through the wrapper.
    accepts_batch_size = "batch_size" in inspect.signature(pipeline.__call__).parameters

    def generate(indices: list[int]) -> Tensor:
        arguments = dict(call)
        arguments["generator"] = [torch.Generator().manual_seed(seed + index) for index in indices]
        if prompts is not None:
            if max(indices) >= len(prompts):
                raise ValueError(f"prompts: {len(prompts)} given, index {max(indices)} is asked for")
            arguments["prompt"] = [prompts[index] for index in indices]
        if labels is not None:
            arguments[label_argument] = list(labels(indices))
        if prompts is None and accepts_batch_size:
            arguments["batch_size"] = len(indices)
        images = pipeline(output_type="np", **arguments).images
        array = np.asarray(images, dtype=np.float32)
        if array.ndim == 3:
            array = array[..., None]
        return torch.from_numpy(array).permute(0, 3, 1, 2) * 2 - 1

    return generate


def count_calls(network: torch.nn.Module, generate: Callable[[list[int]], Tensor], indices: list[int]) -> int:
    """Forward calls of `network` that `generate` makes for one batch."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = network.register_forward_pre_hook(hook)
    try:
        generate(indices)
    finally:
        handle.remove()
    return calls
