"""The processes of one training run: one alone, or several that `torchrun` started."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

# The others wait while the first process evaluates or writes alone; PyTorch's ten minutes with NCCL can be too few.
_LONGEST_WAIT = timedelta(minutes=30)

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among all of a run. The one of rank 0 writes and prints."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    """How many of them run on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether results have to be exchanged."""
        return self.count > 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor of equal shape in each."""
        if self.several:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean likewise."""
        return self.sum(values) / self.count if self.several else values

    def any(self, condition: bool, device: torch.device) -> bool:
        """Whether a condition holds in any process; all of them must ask."""
        if not self.several:
            return condition
        flag = torch.tensor(float(condition), device=device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def gather(self, value: Any) -> list[Any]:
        """One value of every process, in the order of ranks; all of them must give one. Values are pickled."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values


ALONE = Processes()


def is_main_process() -> bool:
    """Whether this process is alone or the first of those that torchrun started. Needs no PyTorch set-up."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes of this run, connected while the block runs.

    Where torchrun's variables are set they are connected, unless the caller has done so already: NCCL for tensors on
    GPUs, gloo for those on the CPU. Warnings of all but the first are silenced. After an error they stay connected:
    they can only part together, and one that failed must end without waiting for the others, so that torchrun ends
    those.
    """
    local_rank, local_count = (int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE"))
    if distributed.is_available() and distributed.is_initialized():
        yield Processes(distributed.get_rank(), distributed.get_world_size(), local_rank, max(local_count, 1))
        return
    if not all(name in os.environ for name in _VARIABLES):
        yield ALONE
        return
    processes = Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, max(local_count, 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(processes.local_rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=_LONGEST_WAIT)
    if not processes.is_main:
        logging.getLogger("asag.train").setLevel(logging.ERROR)
    yield processes
    distributed.destroy_process_group()
