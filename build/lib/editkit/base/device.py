"""What depends on the kind of device, in one place: waiting for it, its memory, what still fits on it."""

from __future__ import annotations

import torch

HOST = torch.device("cpu")


def is_accelerator(device: torch.device) -> bool:
    """Whether a device is this machine's accelerator (of whatever make torch was built for)."""
    current = torch.accelerator.current_accelerator()
    return current is not None and device.type == current.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work; on the CPU there is nothing to wait for."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def auto(name: str = "auto") -> torch.device:
    """ "auto": the accelerator where there is one, else the CPU; any other name is that device."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() or HOST


def free_bytes(device: torch.device) -> int | None:
    """Bytes that torch can still take on an accelerator, its own unused cache included; None: not known, or the CPU."""
    if not is_accelerator(device):
        return None
    module = torch.get_device_module(device.type)
    if not hasattr(module, "mem_get_info"):
        return None
    cached = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(module.mem_get_info(device)[0]) + max(cached, 0)


def with_room(device: torch.device, needed: int) -> torch.device:
    """The device itself if it has `needed` bytes free, or does not say; else the host."""
    free = free_bytes(device)
    return device if free is None or needed <= free else HOST


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocation that failed, on an accelerator or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
