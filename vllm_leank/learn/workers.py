"""Processes that learn one mask together, each on its own GPU and samples.

`accelerate launch` and `torchrun` both describe them by the environment of torch.distributed.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vllm_leank.errors import UserError


@dataclass(frozen=True)
class Workers:
    """How many processes there are, and which this one is; by default it is alone."""

    count: int = 1
    rank: int = 0

    @classmethod
    def join(cls, device: str) -> tuple["Workers", str]:
        """Meet the other processes, if there are any; returns the device for this one as well.

        Raises:
            UserError: there are more processes on this machine than GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(), device
        if device == "cuda":
            index = int(os.environ.get("LOCAL_RANK", "0"))
            if index >= torch.cuda.device_count():
                raise UserError(
                    f"process {index} on this machine has no GPU of its own: there are "
                    f"{torch.cuda.device_count()}; start as many processes"
                )
            device = f"cuda:{index}"
            torch.cuda.set_device(index)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_world_size(), dist.get_rank()), device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its mean over the processes; returns it."""
        if self.count > 1:
            dist.all_reduce(tensor)
            tensor /= self.count
        return tensor

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by that of the first process; returns it."""
        if self.count > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set in one of the processes."""
        if self.count == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=device)) > 0)

    def leave(self) -> None:
        """End the connection."""
        if self.count > 1:
            dist.destroy_process_group()
