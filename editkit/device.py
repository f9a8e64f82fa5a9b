"""What depends on the kind of device, in one place: waiting for it, its memory, its random state."""

from __future__ import annotations

import torch


def is_accelerator(device: torch.device) -> bool:
    """Whether a device is this machine's accelerator (of whatever make torch was built for)."""
    current = torch.accelerator.current_accelerator()
    return current is not None and device.type == current.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work; on the CPU there is nothing to wait for."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)
