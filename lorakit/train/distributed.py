"""One run on several processes, each with its own device: ranks, barriers and sums.

`accelerate launch -m lorakit train CONFIG` starts the processes and passes each its rank in environment variables.
They share every batch, so the result does not depend on their number. Only the first one writes files.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from this one; with one process, all methods are trivial."""

    number: int = 0
    size: int = 1
    flags: Any = None  # a process group on the CPU: exchanging flags never waits for a device

    @property
    def first(self) -> bool:
        return self.number == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` items: parts differ by at most one item, and may be empty."""
        each, more = divmod(count, self.size)
        start = self.number * each + min(self.number, more)
        return slice(start, start + each + (self.number < more))

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor (in place) with its sum over all processes, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; the same in all of them."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag))
        torch.distributed.all_reduce(count, group=self.flags)
        return bool(count)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process runs the block before all others, which can then read what it wrote."""
        if not self.first:
            torch.distributed.barrier(group=self.flags)
        yield
        if self.first and self.size > 1:
            torch.distributed.barrier(group=self.flags)


ALONE = Team()


def join_team(device: str = "auto") -> Team:
    """This process's team, from the launcher's environment variables; on CUDA it selects this process's card.

    With the config's device "cpu", the processes communicate by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    # The other processes wait while the first encodes the dataset, which can take hours.
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    return Team(state.process_index, state.num_processes, group)
