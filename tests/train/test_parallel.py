"""Weights in parts, each on a process of its own: what one of them sees holds for all."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import two_processes
from torch import nn


def saved(folder: Path | str) -> None:
    """What each of two processes runs: three checkpoints of weights in halves, of which the second process breaks one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from fewstep.train.parallel import local
    from fewstep.train.state import Progress, is_sound, save_checkpoint

    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    halves = nn.Module()
    halves.weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    halves.whole = nn.Parameter(torch.ones(2))
    for done, sound in ((1, True), (2, True), (3, False)):
        if done == 2 and rank == 1:
            with torch.no_grad():
                local(halves.weight)[1, 2] = float("nan")
        if done == 3 and rank == 1:
            with torch.no_grad():
                local(halves.weight)[1, 2] = 1.0
        save_checkpoint(Path(folder), {"student": halves}, {}, Progress(done=done), 1, rank == 0, sound)
        dist.barrier()
        if rank == 0:
            print(*(f"{p.name[-1]}{is_sound(p):d}" for p in sorted(Path(folder).glob("step-*"))), sep=",")
    dist.destroy_process_group()


def test_a_part_that_is_not_finite_makes_a_checkpoint_unsound(tmp_path: Path):
    """And an unsound one does not push the sound one out, though one checkpoint is kept."""
    told, _ = two_processes(saved, tmp_path / "checkpoints")
    assert told.split() == ["11", "11,20", "11,30"]
