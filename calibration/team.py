"""Processes that share the work, as `torchrun` starts them: who does which part, and what all of them must know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from calibration.errors import DfqError

T = TypeVar("T")


class LeaderError(DfqError):
    """What went wrong in the first process, told in all the others."""


@dataclass(frozen=True)
class Team:
    """The processes of torch.distributed's default group, or one process alone.

    rank: of this one, the leader's is 0; size: how many there are. All of them call the same methods in the same order.
    """

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints, and writes what is there once."""
        return self.rank == 0

    def part_of(self, count: int) -> range:
        """Which of `count` things are this process's: every `size`-th. That depends on nothing else."""
        return range(self.rank, count, self.size)

    def gather(self, value: T) -> list[T]:
        """What each process has, in the order of ranks; all wait until everybody is here."""
        if self.size == 1:
            return [value]
        found: list[T | None] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found  # type: ignore[return-value]  # by now each has one

    def wait(self) -> None:
        """Until everybody is here."""
        self.gather(None)

    def lead(self, action: Callable[[], T]) -> T:
        """What `action` gives in the first process, to all. A DfqError there is one everywhere, and nobody waits."""
        if self.size == 1:
            return action()
        failure: DfqError | None = None
        outcome: list[T | str | None] = [None, None]
        if self.leads:
            try:
                outcome[0] = action()
            except DfqError as error:
                failure, outcome[1] = error, str(error)
        distributed.broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise LeaderError(str(outcome[1]))
        return outcome[0]  # type: ignore[return-value]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, of one type and on one device, by its sum over all processes, the same bits in each."""
        if self.size == 1 or not tensors:
            return
        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(together)
        for tensor, total in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the leader's."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


ALONE = Team(0, 1)


def team() -> Team:
    """The processes that this one works with."""
    if distributed.is_available() and distributed.is_initialized():
        return Team(distributed.get_rank(), distributed.get_world_size())
    return ALONE


@contextmanager
def joined() -> Iterator[Team]:
    """The processes that `torchrun` started together, as one team while it is open; a process alone is left alone.

    On CUDA each takes the device of its own number on its machine. Raises DfqError where the others are not found.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not distributed.is_available() or distributed.is_initialized():
        yield team()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        # Shares differ, and one that is dead is torchrun's to notice: nobody gives up waiting.
        distributed.init_process_group(backend, timeout=timedelta(days=30))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DfqError(f"cannot reach the other processes ({reason}); start them all by torchrun") from error
    try:
        yield team()
    finally:
        distributed.destroy_process_group()
