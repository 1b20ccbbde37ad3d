"""Adapters over one frozen base: which LoRA set a call uses is part of the call, never state of the module."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.algebra.guidance import combined
from fewstep.algebra.prediction import Prediction
from fewstep.algebra.process import Process
from fewstep.kernels import attention_contexts, attention_in_force
from fewstep.networks.extras import goes_to

# Walking all modules of a large network at each call would cost more than switching; filled at injection.
_LAYERS: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def _layers(net: nn.Module) -> Sequence[Any]:
    if net not in _LAYERS:
        _LAYERS[net] = tuple(lora_layers(net))
    return _LAYERS[net]


def lora_layers(net: nn.Module) -> list[Any]:
    """peft's LoRA layers inside a network."""
    if "peft" not in sys.modules:  # then there are none, and importing it costs as much as torch
        return []
    from peft.tuners.lora import LoraLayer

    return [m for m in net.modules() if isinstance(m, LoraLayer)]


def _adapter_ids(net: nn.Module) -> set[int]:
    """Parameters that adapters have hung into a network."""
    return {
        id(p)
        for layer in lora_layers(net)
        for name in layer.adapter_layer_names
        for p in getattr(layer, name).parameters()
    }


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a role without those of adapters that sit inside it; an adapter's own are its LoRA set."""
    if isinstance(module, Adapted):
        return list(module.own.values())
    foreign = _adapter_ids(module)
    return [p for p in module.parameters() if id(p) not in foreign]


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """state_dict of a role as it was before any adapter was hung into it; an adapter's holds its LoRA set alone."""
    layers = {name: m for name, m in module.named_modules() if _is_lora(m)}
    out = {}
    for key, value in module.state_dict().items():
        inside = _layer_of(key, layers)
        if inside is None:
            out[key] = value
        elif key.startswith(f"{inside}.base_layer."):
            out[inside + key.removeprefix(f"{inside}.base_layer")] = value
    return out


def load_own_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `own_state` gives, strictly; adapters inside stay as they are. Raises RuntimeError as torch does."""
    layers = {name: m for name, m in module.named_modules() if _is_lora(m)}
    whole = {}
    for key, value in module.state_dict().items():
        if (inside := _layer_of(key, layers)) and not key.startswith(f"{inside}.base_layer."):
            whole[key] = value
    for key, value in tensors.items():
        inside = _layer_of(key, layers)
        whole[key if inside is None else f"{inside}.base_layer{key.removeprefix(inside)}"] = value
    module.load_state_dict(whole, strict=True)


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _layer_of(key: str, layers: Mapping[str, nn.Module]) -> str | None:
    parts = key.split(".")
    return next((n for k in range(1, len(parts)) if (n := ".".join(parts[:k])) in layers), None)


def plain_copy(module: nn.Module) -> nn.Module:
    """An independent copy without adapters. Of an adapter: the base with all that its calls use merged in.

    What is merged is float32 whatever the base is kept in, for half precision would round most of the set away.
    """
    adapters = module.names if isinstance(module, Adapted) else ()
    source = module.base if isinstance(module, Adapted) else module
    memo: dict[int, Any] = {}
    for layer in lora_layers(source):
        bare = copy.deepcopy(layer.base_layer, memo)
        for adapter in (name for name in adapters if name in layer.lora_A):
            unhalved(bare)
            with torch.no_grad():
                bare.weight += layer.get_delta_weight(adapter).to(bare.weight.dtype)
        memo[id(layer)] = bare  # deepcopy puts what the memo holds in the place of the layer
    out = copy.deepcopy(source, memo)
    if adapters:
        unhalved(out)
    for m in out.modules():
        m.__dict__.pop("peft_config", None)
    return out


def unhalved(module: nn.Module) -> None:
    """Put what a module holds in half precision into float32, in place."""
    for t in (*module.parameters(), *module.buffers()):
        if t.dtype in (torch.bfloat16, torch.float16):
            t.data = t.data.float()


def apart(module: nn.Module) -> nn.Module:
    """An independent copy that computes as the module does: an adapter comes with a base of its own, unmerged."""
    if not isinstance(module, Adapted):
        return plain_copy(module)
    other = Adapted(copy.deepcopy(module.base), None)
    for name in ("adapter", "rank", "alpha", "targets", "beside"):
        setattr(other, name, getattr(module, name))
    return other.train(module.training)


def on_cpu(module: nn.Module) -> nn.Module:
    """`apart`, in float32 on the CPU."""
    other = apart(module)
    (other.base if isinstance(other, Adapted) else other).cpu().float()
    for m in other.modules():
        if hasattr(m, "with_own_base"):  # weights of another role, which may be on another device
            m.with_own_base()  # type: ignore[operator]
    return other.eval()


def placed(module: nn.Module, device: torch.device | str) -> nn.Module:
    """The module itself, moved together with the weights of other roles that it calls, which its own `to` does not reach.

    They are an adapter's base and the UNet beside a ControlNet.
    """
    module.to(device)
    modules: list[Any] = list(module.modules())
    for m in modules:
        if isinstance(m, Adapted):
            placed(m.base, device)
            m.rebind()
        elif hasattr(m, "with_own_base"):
            m.model.to(device)
    return module


def twin(module: nn.Module) -> nn.Module:
    """A copy to be averaged into: of an adapter another LoRA set on the same base, else `plain_copy`."""
    return copy.deepcopy(module) if isinstance(module, Adapted) else plain_copy(module)


@contextmanager
def active(layers: Sequence[Any], *adapters: str, factors: Mapping[str, float] = MappingProxyType({})) -> Iterator[None]:
    """Run the calls inside with these adapters (none: the bare base) and put the former choice back.

    factors: on the updates of some of them.

    Sets peft's fields directly: its set_adapter would also flip requires_grad of the other adapter, and
    gradients of a graph built before would then be dropped without an error.
    """
    scaled = [{a: m.scaling[a] for a in adapters if a in m.scaling} for m in layers]
    before = [(m._active_adapter, m._disable_adapters) for m in layers]
    for m, scales in zip(layers, scaled, strict=True):
        m._active_adapter, m._disable_adapters = list(adapters), not adapters
        m.scaling.update({a: s * factors[a] for a, s in scales.items() if a in factors})
    try:
        yield
    finally:
        for m, (names, disabled), scales in zip(layers, before, scaled, strict=True):
            m._active_adapter, m._disable_adapters = names, disabled
            m.scaling.update(scales)


class Adapted(nn.Module):
    """A denoiser on a shared base with one LoRA set; only that set is its own parameters and state.

    The base called by itself stays bare. Keys of the state name layers, not the adapter, so that one set of
    equal rank and targets can be loaded from another.

    Args:
        base: the denoiser that owns the weights; it belongs to its own role.
        adapter: a new name; None is the bare base with all adapters off.
        rank, alpha: of LoRA (arXiv 2106.09685); alpha is the rank when left out.
        targets: suffixes of the layers to adapt; None takes every Linear and Conv2d.
        beside: names of other adapters on the base that a call uses as well; they belong to roles of their own.

    Raises ValueError for targets that match nothing and for a base without one network inside.
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: str | None,
        *,
        rank: int = 16,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        beside: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(base, Adapted):
            raise ValueError("an adapter cannot carry another adapter; name the role with the weights")
        self._base = (base,)
        self.adapter = adapter
        self.rank, self.alpha, self.targets = rank, float(alpha if alpha is not None else rank), targets
        self.beside = tuple(beside)
        self.own = nn.ParameterDict()
        if adapter is not None:
            self._inject(network_of(base), adapter)

    def _inject(self, net: nn.Module, adapter: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = _matching(net, self.targets)
        frozen = {p: p.requires_grad for p in net.parameters()}
        # One pattern: of a list peft compares every layer with every name, which takes long for a large network.
        pattern = "|".join(map(re.escape, names))
        spec = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=pattern, init_lora_weights=True)  # type: ignore[arg-type]
        with warnings.catch_warnings():  # several sets on one base are what is wanted here
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(spec, net, adapter_name=adapter)
        for p, flag in frozen.items():
            p.requires_grad_(flag)
        self.rebind()
        _LAYERS.clear()
        for layer in _layers(net):
            # peft leaves the newest adapter switched on, and the base would answer with it.
            layer._active_adapter, layer._disable_adapters = [], True

    def rebind(self) -> None:
        """Look the LoRA set up in the base, at first and when something has replaced its parameters."""
        mark = f".{self.adapter}."
        for name, p in network_of(self.base).named_parameters():
            if mark in name and "lora_" in name:
                self.own[name.replace(mark, ".").replace(".", "/")] = p

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        """Another LoRA set with the same values on the same base."""
        name = None if self.adapter is None else fresh_name(self.base)
        with torch.random.fork_rng(devices=[]):
            sizes: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}
            other = Adapted(self.base, name, **sizes, beside=self.beside)
        with torch.no_grad():
            for key, p in self.own.items():
                other.own[key].data = p.detach().clone()
                other.own[key].requires_grad_(p.requires_grad)
        memo[id(self)] = other
        return other.train(self.training)

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that a call uses, its own first."""
        return (*(() if self.adapter is None else (self.adapter,)), *self.beside)

    @property
    def layers(self) -> Sequence[Any]:
        return _layers(network_of(self.base))

    @property
    def process(self) -> Process:
        return self.base.process  # type: ignore[return-value]

    @property
    def inputs(self) -> tuple[str, ...]:
        return getattr(self.base, "inputs", ())

    @property
    def takes_s(self) -> bool:
        return goes_to(self.inputs)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, adapter_scale: float = 1.0, **call: Any) -> Prediction:
        """adapter_scale: factor on the adapter's update in this call; 0 is the base."""
        factors = {} if self.adapter is None or adapter_scale == 1.0 else {self.adapter: adapter_scale}
        with active(self.layers, *self.names, factors=factors):
            return self.base(x, t, cond, **call)

    def combine(self, own: Prediction, null: Prediction, scale: float | Tensor) -> Prediction:
        """The guided prediction of the two as the base's family has it."""
        return combined(self.base, own, null, scale)

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> Mapping[str, Tensor]:
        with active(self.layers, *self.names):
            return self.base.features(x, t, cond, taps)  # type: ignore[operator]


def network_of(denoiser: nn.Module) -> nn.Module:
    """The network inside a denoiser and its wrappers. Raises ValueError where there is not exactly one."""
    here: Any = denoiser
    while not isinstance(getattr(here, "net", None), nn.Module):
        here = getattr(here, "denoiser", None)
        if here is None:
            raise ValueError(f"a {type(denoiser).__name__} has no single network that could carry an adapter")
    return here.net


def fresh_name(base: nn.Module) -> str:
    """A name that no adapter on this base has."""
    taken = {name for layer in lora_layers(base) for name in layer.lora_A}
    return next(f"lora{k}" for k in range(len(taken) + 1) if f"lora{k}" not in taken)


def _matching(net: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Full names of the Linear and Conv2d layers that end in one of `targets`; all of them for None."""
    kinds = (nn.Linear, nn.Conv2d)
    names = []
    for name, m in net.named_modules():
        if isinstance(m, kinds) and "lora_" not in name:
            names.append(name.removesuffix(".base_layer"))
    if targets is None:
        return names
    unmatched = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched or not targets:
        ends = sorted({".".join(n.split(".")[-2 if n[-1].isdigit() else -1 :]) for n in names})
        raise ValueError(
            f"targets {unmatched} match no Linear or Conv2d layer of this network; its layers end in "
            f"{', '.join(ends[:12])}"
        )
    return [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]


def checkpoint_function(net: nn.Module) -> Callable[..., Any]:
    """A `gradient_checkpointing_func` for diffusers that recomputes a block with the adapter of its forward.

    Without it the recompute runs with whatever adapter is active at backward time, which is silently wrong
    whenever a graph holds two adapters.
    """

    def run(block: Callable[..., Any], *args: Any) -> Any:
        layers = _layers(net)
        disabled = layers[0]._disable_adapters if layers else True
        chosen = [] if disabled else list(layers[0]._active_adapter)
        scales = [{a: m.scaling[a] for a in chosen if a in m.scaling} for m in layers]

        def again(*inner: Any) -> Any:
            with active(layers, *chosen):
                for m, own in zip(layers, scales, strict=True):  # a call's own factor on an adapter
                    m.scaling.update(own)
                return block(*inner)

        # The recompute runs outside every mode: without its contexts it would save what other attention saves.
        options: dict[str, Any] = {"context_fn": attention_contexts} if attention_in_force() else {}
        return checkpoint(again, *args, use_reentrant=False, **options)

    return run


def enable_checkpointing(net: nn.Module) -> int:
    """Switch on adapter-safe activation checkpointing in the models of `recomputing`; their number."""
    found = recomputing(net)
    for m, around in found:
        m.enable_gradient_checkpointing(checkpoint_function(around))
    return len(found)


def recomputing(net: nn.Module) -> list[tuple[Any, nn.Module]]:
    """(diffusers model, the network that its adapters hang in) of all models whose activations a role's backward needs.

    Of an adapter those in its base, of a ControlNet the UNet as well, though it is frozen: gradients go through it.
    """
    if isinstance(net, Adapted):
        return recomputing(net.base)
    modules: list[Any] = list(net.modules())
    beside = [m.model for m in modules if hasattr(m, "with_own_base")]
    found = [*((m, net) for m in modules), *((m, m) for m in beside)]
    return [(m, around) for m, around in found if callable(getattr(m, "enable_gradient_checkpointing", None))]


def frozen(module: nn.Module) -> nn.Module:
    """The module in eval mode with no parameter asking for a gradient."""
    for p in module.parameters():
        p.requires_grad_(False)
    return module.eval()
