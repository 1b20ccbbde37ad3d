"""Adapters over one frozen base: which LoRA set a call uses is part of the call, never state of the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.prediction import Prediction
from fewstep.process import Process


def lora_layers(net: nn.Module) -> list[Any]:
    """peft's LoRA layers inside a network."""
    from peft.tuners.lora import LoraLayer

    return [m for m in net.modules() if isinstance(m, LoraLayer)]


@contextmanager
def active(layers: Sequence[Any], adapter: str | None) -> Iterator[None]:
    """Run the calls inside with one adapter (None: the bare base) and put the former choice back.

    Sets peft's fields directly: its set_adapter would also flip requires_grad of the other adapter, and
    gradients of a graph built before would then be dropped without an error.
    """
    before = [(m._active_adapter, m._disable_adapters) for m in layers]
    for m in layers:
        m._active_adapter, m._disable_adapters = [adapter] if adapter else [], adapter is None
    try:
        yield
    finally:
        for m, (names, disabled) in zip(layers, before, strict=True):
            m._active_adapter, m._disable_adapters = names, disabled


class Adapted(nn.Module):
    """A denoiser on a shared base with one LoRA set; only that set is its own parameters and state.

    Args:
        base: the denoiser that owns the weights; it belongs to its own role and stays frozen.
        adapter: a new name; None is the bare base with all adapters off.
        rank, alpha: of LoRA (arXiv 2106.09685).
        targets: suffixes of the layers to adapt; None takes every Linear and Conv2d.
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: str | None,
        *,
        rank: int = 16,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._base = (base,)
        self.adapter = adapter
        self.own = nn.ParameterDict()
        if adapter is not None:
            self._inject(base, adapter, rank, alpha if alpha is not None else rank, targets)

    def _inject(
        self, base: nn.Module, adapter: str, rank: int, alpha: float, targets: Sequence[str] | None
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        net: nn.Module = base.net  # type: ignore[assignment]
        names = list(targets or _adaptable(net))
        frozen = {p: p.requires_grad for p in net.parameters()}
        spec = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights=True)
        inject_adapter_in_model(spec, net, adapter_name=adapter)
        for p, flag in frozen.items():
            p.requires_grad_(flag)
        for name, p in net.named_parameters():
            if f".{adapter}." in name and "lora_" in name:
                self.own[name.replace(".", "/")] = p

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    @property
    def process(self) -> Process:
        return self.base.process  # type: ignore[return-value]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        with active(lora_layers(self.base), self.adapter):
            return self.base(x, t, cond, **call)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        with active(lora_layers(self.base), self.adapter):
            return self.base.features(x, t, cond, taps)  # type: ignore[operator]


def _adaptable(net: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d)
    names = []
    for name, m in net.named_modules():
        if isinstance(m, kinds) and "lora_" not in name:
            names.append(name.removesuffix(".base_layer"))
    return names


def checkpoint_function(net: nn.Module) -> Callable[..., Any]:
    """A `gradient_checkpointing_func` for diffusers that recomputes a block with the adapter of its forward.

    Without it the recompute runs with whatever adapter is active at backward time, which is silently wrong
    whenever a graph holds two adapters.
    """

    def run(block: Callable[..., Any], *args: Any) -> Any:
        layers = lora_layers(net)
        chosen = layers[0]._active_adapter if layers else []
        disabled = layers[0]._disable_adapters if layers else True
        name = None if disabled or not chosen else chosen[0]

        def again(*inner: Any) -> Any:
            with active(layers, name):
                return block(*inner)

        return checkpoint(again, *args, use_reentrant=False)

    return run


def enable_checkpointing(net: nn.Module) -> int:
    """Switch on adapter-safe activation checkpointing in every diffusers model inside `net`; their number."""
    count = 0
    for m in net.modules():
        if callable(getattr(m, "enable_gradient_checkpointing", None)):
            m.enable_gradient_checkpointing(checkpoint_function(net))  # type: ignore[operator]
            # diffusers checkpoints only in training mode of each block.
            m.train()
            count += 1
    return count


def frozen(module: nn.Module) -> nn.Module:
    """The module in eval mode with no parameter asking for a gradient."""
    for p in module.parameters():
        p.requires_grad_(False)
    return module.eval()
