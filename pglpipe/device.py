"""CPU and CUDA behind one face, so that nothing else asks which one it is on."""

from __future__ import annotations

import resource

import torch
from torch import Tensor

from pglpipe.errors import ConfigError, nearest, setting

DEVICES = ("auto", "cpu", "cuda")


def pick(name: str, local_rank: int) -> torch.device:
    """The device of one worker, made its current one.

    Args:
        name: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
        local_rank: index of the worker on its host; workers share GPUs round robin.

    Raises:
        ConfigError: CUDA is asked for and absent, or the name is unknown.
    """
    if name not in DEVICES:
        raise ConfigError(
            f"unknown {setting('device')} {name!r}: {nearest(name, DEVICES)}"
        )
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError(
            f"expected a CUDA device for {setting('device', 'cuda')}, but PyTorch "
            f"{torch.__version__} sees none; use {setting('device', 'cpu')} or install a CUDA build"
        )
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    # Streams and NCCL groups that are made without naming a device belong on this one.
    torch.cuda.set_device(device)
    return device


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; its copy to a GPU is queued, and nobody waits for it.

    Free if it is there already.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def spare_memory_bytes(device: torch.device) -> int:
    """What nobody holds of a GPU's memory; 0 on a device that has no memory of its own."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: by PyTorch on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
