"""diffusers' UNet2DModel as a fewstep network: class labels, feature taps, an early stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fewstep.networks.extras import Extras


class _Stop(Exception):
    """Leaves the forward pass once all taps are known."""


class UNet2D(nn.Module):
    """Wraps a `diffusers.UNet2DModel`.

    Args:
        model: the module; class-conditional when it has `num_class_embeds`.
        classes: number of real classes; an embedding row beyond them is the null class. 0: unconditional.
    Taps: "mid", "down0".., "up0".. (activations (b, c, h, w)).
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model = model
        self.classes = classes
        self.extras = Extras(model.time_embedding.linear_2.out_features)  # type: ignore[union-attr]

    def _block(self, tap: str) -> nn.Module:
        blocks: dict[str, nn.Module] = {"mid": self.model.mid_block}  # type: ignore[dict-item]
        blocks |= {f"down{i}": m for i, m in enumerate(self.model.down_blocks)}  # type: ignore[arg-type]
        blocks |= {f"up{i}": m for i, m in enumerate(self.model.up_blocks)}  # type: ignore[arg-type]
        if tap not in blocks:
            raise ValueError(f"tap {tap!r} is unknown to this UNet; allowed: {', '.join(blocks)}")
        return blocks[tap]

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Any = None,
        *,
        taps: Sequence[str] = (),
        stop: bool = False,
        extras: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """x (b, c, h, w), time (b,) as the model was trained, cond int (b,) or None -> (raw, features)."""
        if self.classes and cond is None:
            raise ValueError("this UNet is class-conditional: cond is missing")
        features: dict[str, Tensor] = {}
        handles = []

        def watch(tap: str) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                features[tap] = output[0] if isinstance(output, tuple) else output
                if stop and len(features) == len(taps):
                    raise _Stop

            return hook

        try:
            handles = [self._block(tap).register_forward_hook(watch(tap)) for tap in taps]
            further = self.extras.embed(extras)
            if isinstance(further, Tensor):
                # The time embedding is where diffusers adds all conditions; it has no argument for ours.
                embedding: Any = self.model.time_embedding
                handles.append(embedding.register_forward_hook(lambda _m, _a, out: out + further))
            labels = cond if self.classes else None
            return self.model(x, time, class_labels=labels, return_dict=False)[0], features
        except _Stop:
            return None, features
        finally:
            for handle in handles:
                handle.remove()
