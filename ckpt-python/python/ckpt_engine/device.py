"""Which accelerator this process has, and by what name parameter servers and workers know it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import subprocess
from types import ModuleType

import torch

NPU_CARDS = 8


@functools.lru_cache(maxsize=1)
def get_ip() -> str:
    """This host's address on the way out; nothing is sent. Without a way out: the address of its name."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("8.8.8.8", 80))
            return probe.getsockname()[0]
    except OSError:
        return socket.gethostbyname(socket.gethostname())


def npu_generate_uuid() -> str:
    """`<ip>-<chip>` of the Ascend chip that this process runs on, as `npu-smi` lists it."""
    pid = os.getpid()
    if shutil.which("npu-smi") is None:
        raise ValueError("npu-smi is not installed here, so this process runs on no NPU")
    for card in range(NPU_CARDS):
        command = ["npu-smi", "info", "-t", "proc-mem", "-i", str(card)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        if listed.returncode != 0:
            break
        here = re.search(rf"\b{pid}\b", listed.stdout)
        if here is None:
            continue
        count = re.search(r"Chip Count\D*(\d+)", listed.stdout)
        # The chip that a process belongs to is named after the process.
        chip = re.search(r"Chip ID\D*(\d+)", listed.stdout[here.end() :])
        if count and chip:
            return f"{get_ip()}-{card * int(count[1]) + int(chip[1])}"
    raise ValueError(f"npu-smi lists no NPU for process {pid}; use the device before asking for its name")


def host_uuid(rank: int) -> str:
    """The name of host memory that plays a device, for rank `rank`."""
    return f"HOST-{os.uname().nodename}-{rank}"


def device_type() -> str:
    """`npu`, `cuda` or `cpu`."""
    npu = getattr(torch, "npu", None)
    if npu is not None and npu.is_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def module(kind: str) -> ModuleType | None:
    """Torch's module for a kind of device; `None` for the CPU."""
    if kind == "npu":
        import torch_npu

        return torch_npu.npu
    return torch.cuda if kind == "cuda" else None


def device_uuid(kind: str, index: int | None = None, rank: int = 0) -> str:
    """The key of this process's endpoint: `GPU-...`, `NPU-<ip>-<chip>` or `HOST-<host>-<rank>`."""
    if kind == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(index).uuid!s}"
    return f"NPU-{npu_generate_uuid()}" if kind == "npu" else host_uuid(rank)
