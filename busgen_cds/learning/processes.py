"""The processes of one run: alone, or started together by `torchrun`.

Rules:
- Rank 0 writes and reports; a decision is taken by rank 0 and followed by all.
- What `Team.parallel` gave must be let go of before the team parts: freed later, it waits for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Team:
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return own_device()

    def parallel(self, network: nn.Module) -> nn.Module:
        """The same network; its gradients are averaged over the team."""
        return nn.parallel.DistributedDataParallel(network) if self.world > 1 else network

    def share_gradients(self, network: nn.Module) -> None:
        """Average the gradients of a network that is not `parallel`."""
        if self.world > 1:
            for parameter in network.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world

    def agree(self, yes: bool) -> bool:
        """What rank 0 decided."""
        if self.world == 1:
            return yes
        said = torch.tensor([float(yes)], device=self.device)
        dist.broadcast(said, 0)
        return bool(said.item())


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """This process's place among those that `torchrun` started; within a team, that team.

    Teams that follow each other in the same processes would meet at one address: whoever is early finds the last one's.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Team()
        return
    opened = not dist.is_initialized()
    if opened:
        if torch.cuda.is_available():
            torch.cuda.set_device(own_device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Team(dist.get_rank(), world)
        dist.barrier()  # nobody leaves while rank 0 still writes
    finally:
        if opened:
            dist.destroy_process_group()


def own_device() -> torch.device:
    """What this process computes with: its own GPU among those of its machine, where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
