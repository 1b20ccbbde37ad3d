"""Networks sharded over processes by FSDP2, and their tensors in checkpoints that any number of processes reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.adapters import Adapted
from fewstep.networks.denoiser import Denoiser


def is_sharded(t: Tensor) -> bool:
    """True for a DTensor."""
    return hasattr(t, "to_local")


def local(t: Any) -> Tensor:
    """This process's part of a tensor; the tensor itself when it is not sharded."""
    return t.to_local() if is_sharded(t) else t


def full(t: Any) -> Tensor:
    """The whole tensor; every process must call this."""
    return t.full_tensor() if is_sharded(t) else t


def shard(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Shard the networks inside denoisers in place (FSDP2), block by block; heads and small nets stay whole.

    Parameters become DTensors, of adapters too, whose roles look their own up again.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    found = list(modules)
    for module in found:
        for m in module.modules():
            if isinstance(m, Denoiser):
                for block in _blocks(m.net):
                    fully_shard(block, mesh=mesh)
                # The root too: left whole after a forward pass, its parameters would not be the sharded ones.
                fully_shard(m.net, mesh=mesh, reshard_after_forward=True)
                # Leaving a forward pass by an exception would skip the hooks that free what was gathered.
                m.stops_early = False
    for module in found:
        for m in module.modules():
            if isinstance(m, Adapted):
                m.rebind()


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The entries of the outermost lists of modules, where networks keep their blocks."""
    out: list[nn.Module] = []
    for child in net.children():
        if isinstance(child, nn.ModuleList):
            out += [m for m in child if m is not None and any(True for _ in m.parameters())]
        else:
            out += _blocks(child)
    return out


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """torch's clip_grad_norm_ for lists in which some gradients are sharded; the same norm on every process."""
    if not any(is_sharded(p) for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    whole = torch.zeros((), dtype=torch.float64)
    split = torch.zeros((), dtype=torch.float64)
    for p in parameters:
        if p.grad is not None:
            square = local(p.grad).double().square().sum().cpu()
            if is_sharded(p):
                split += square
            else:
                whole += square
    device = local(parameters[0]).device
    split = split.to(device)
    torch.distributed.all_reduce(split)
    norm = torch.sqrt(split.cpu() + whole)
    factor = float(torch.clamp(limit / (norm + 1e-6), max=1.0))
    for p in parameters:
        if p.grad is not None:
            local(p.grad).mul_(factor)
    return norm.float()


def like(value: Tensor, model: Any) -> Tensor:
    """A whole tensor cut as `model` is; every process holds the whole one, nothing is sent."""
    if not is_sharded(model) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(local(model).device),
        model.device_mesh,
        model.placements,
        src_data_rank=None,
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether floating-point tensors are finite. Where some are sharded every process must call this."""
    found = [t for t in tensors if t.is_floating_point()]
    good = all(bool(torch.isfinite(local(t)).all()) for t in found)
    split = next((local(t).device for t in found if is_sharded(t)), None)
    if split is None:
        return good
    worst = torch.tensor(float(good), device=split)
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MIN)
    return bool(worst)


def write_sharded(tensors: Mapping[str, Tensor], path: Path, main: bool) -> None:
    """Write tensors of which some are sharded as one safetensors file, by torch's distributed checkpoint.

    Each process writes its part, then the parts are joined. The storage is safetensors: the default one pickles its
    index. Every process must call this with the same path.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    folder = path.with_name(f".{path.name}.parts")
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    dcp.save({k: v.detach() for k, v in tensors.items()}, storage_writer=writer)
    torch.distributed.barrier()
    if main:
        joined = sorted(folder.glob("*.safetensors"))
        assert len(joined) == 1, joined
        joined[0].rename(path)
        for p in sorted(folder.rglob("*"), reverse=True):
            p.rmdir() if p.is_dir() else p.unlink()
        folder.rmdir()
    torch.distributed.barrier()


def read_sharded(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill tensors, sharded or not, from a safetensors file; each process reads only its parts."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    with tempfile.TemporaryDirectory() as folder:
        # The reader takes every file of a folder, and a checkpoint's folder holds all roles.
        (Path(folder) / path.name).symlink_to(path.resolve())
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(folder))


def gathered_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state_dict with whole tensors on the CPU; every process must call this."""
    moments = {
        i: {k: full(v).cpu() if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in state["state"].items()
    }
    return {**state, "state": moments}


def scattered_optimizer(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """A whole state_dict cut as the parameters are, in the optimiser's order."""
    moments = {
        i: {
            k: like(v, parameters[i]) if isinstance(v, Tensor) and v.shape == parameters[i].shape and v.ndim else v
            for k, v in s.items()
        }
        for i, s in state["state"].items()
    }
    return {**state, "state": moments}
