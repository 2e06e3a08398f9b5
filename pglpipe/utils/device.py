"""CPU and CUDA behind one face, so that nothing else asks which one it is on."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pglpipe.errors import ConfigError, setting
from pglpipe.utils.arguments import choice, flag, whole
from pglpipe.utils.options import Section, option

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")


def _device(name: str, value: Any) -> str:
    text = str(value) if isinstance(value, torch.device) else value
    if isinstance(text, str) and text.startswith("cuda:"):
        raise ConfigError(
            f"expected one of {', '.join(DEVICES)} for {name}, got {text!r}: a worker takes the GPU of its "
            "LOCAL_RANK, of those in CUDA_VISIBLE_DEVICES; set that, and choose 'cuda'"
        )
    return str(choice(DEVICES)(name, text))


@dataclass(frozen=True, kw_only=True)
class Machine(Section, title="Machine"):
    """Where and how it is computed.

    Attributes:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; of several GPUs, the worker's own.
        precision: ``"fp32"``, or ``"bf16"``: forwards in bfloat16 where autocast holds it to be safe. Its
            exponent is as wide as float32's, so no loss is scaled; weights and updates stay in float32.
        compile: whether ``torch.compile`` makes one kernel graph of each stage's body and head.
        overlap_stages: whether the stages of a worker learn at the same time, each in a CUDA
            stream and graphs of its own; for a GPU with room for all their activations. Nothing
            may draw random numbers then, neither layers and heads nor losses.
        threads: CPU threads per worker; 0 for PyTorch's choice.
        seed: where all randomness starts.
        sanity_check: whether every kind of step that a run will take is tried once before, on the first
            batch, without learning from it.

    Raises:
        ConfigError: a number is out of its range, or a word is unknown.
    """

    device: str = option(
        "auto", "where to compute", _device, choices=DEVICES, common=True
    )
    precision: str = option(
        "fp32",
        "precision of the forwards",
        choice(PRECISIONS),
        choices=PRECISIONS,
    )
    compile: bool = option(False, "compile every stage with torch.compile", flag())
    overlap_stages: bool = option(
        False,
        "let the stages of a worker learn at the same time, each in CUDA graphs of its own; "
        "needs memory for the activations of all of them",
        flag(),
    )
    threads: int = option(0, "CPU threads per worker; 0 for PyTorch's choice", whole(0))
    seed: int = option(0, "where all randomness starts", whole(0))
    sanity_check: bool = option(
        True,
        "try every kind of step on the first batch before training, without learning from it",
        flag(),
    )

    def set_threads(self) -> None:
        """Has this process compute with as many CPU threads, if a number was given."""
        if self.threads:
            torch.set_num_threads(self.threads)

    @property
    def bf16(self) -> bool:
        """Whether forwards run under autocast to bfloat16."""
        return self.precision == "bf16"


def pick(name: str, local_rank: int) -> torch.device:
    """The device of one worker, made its current one.

    Args:
        name: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
        local_rank: index of the worker on its host; workers share GPUs round robin.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
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


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
