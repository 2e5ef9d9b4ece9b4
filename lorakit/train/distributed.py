"""One run on several processes, one a device: who am I, wait for one another, add up.

`accelerate launch -m lorakit train CONFIG` starts them and tells each in its environment who it is. They share every
batch, so that the same run comes out whatever their number; the first alone writes files.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """This process among those of the run; alone, nothing here does anything."""

    number: int = 0
    size: int = 1
    flags: object = None  # a group on the CPU: what is agreed on there never waits for a device

    @property
    def first(self) -> bool:
        return self.number == 0

    def share(self, count: int) -> slice:
        """Which of `count` things are this process's; they differ by one at most, and may be none."""
        each, more = divmod(count, self.size)
        start = self.number * each + min(self.number, more)
        return slice(start, start + each + (self.number < more))

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each tensor (in place), in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, said: bool) -> bool:
        """Whether any process says so; all of them hear the same."""
        if self.size == 1:
            return said
        flag = torch.tensor(float(said))
        torch.distributed.all_reduce(flag, group=self.flags)
        return bool(flag)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first goes through the block alone, then all others: what it wrote is there for them."""
        if not self.first:
            torch.distributed.barrier(group=self.flags)
        yield
        if self.first and self.size > 1:
            torch.distributed.barrier(group=self.flags)


ALONE = Team()


def join_team(device: str = "auto") -> Team:
    """This process's place, from what the launcher put into the environment; on CUDA it takes its own card.

    Args:
        device: as in the config; "cpu" lets the processes talk by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    # Encoding a large dataset takes the first its time; the others wait for as long as it needs.
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    return Team(state.process_index, state.num_processes, group)
