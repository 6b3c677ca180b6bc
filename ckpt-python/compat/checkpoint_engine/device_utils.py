"""Devices and RDMA devices, by checkpoint-engine's rules."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from typing import Any

import torch
from ckpt_engine import device as devices
from ckpt_engine.device import get_ip, npu_generate_uuid

__all__ = ["DeviceManager", "get_ip", "has_efa_pci", "npu_generate_uuid"]

logger = logging.getLogger(__name__)

_MOST_HCAS = 32
_AMAZON = "0x1d0f"


def _ibv_get_device_list() -> list[str]:
    """Names of RDMA devices, in the order of verbs; OSError without the library."""
    verbs = ctypes.CDLL("libibverbs.so.1")
    verbs.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
    verbs.ibv_get_device_name.argtypes = [ctypes.c_void_p]
    verbs.ibv_get_device_name.restype = ctypes.c_char_p
    verbs.ibv_free_device_list.argtypes = [ctypes.POINTER(ctypes.c_void_p)]
    count = ctypes.c_int()
    listed = verbs.ibv_get_device_list(ctypes.byref(count))
    if not listed:
        return []
    try:
        return [verbs.ibv_get_device_name(listed[index]).decode() for index in range(count.value)]
    finally:
        verbs.ibv_free_device_list(listed)


def _get_rdma_devices() -> list[str]:
    named = os.environ.get("PS_P2P_STORE_RDMA_DEVICES")
    if named:
        return named.split(",")
    available = _ibv_get_device_list()
    return _parse_NCCL_IB_HCA(os.environ.get("NCCL_IB_HCA") or "", available) or available


def _get_my_rdma_device(local_rank: int, gpu_count: int, devices: list[str]) -> str:
    if not devices:
        raise RuntimeError("there is no RDMA device here")
    few, many = sorted((len(devices), gpu_count))
    assert many % few == 0, (
        f"{len(devices)} RDMA devices and {gpu_count} accelerators do not divide: choose devices with NCCL_IB_HCA or "
        "PS_P2P_STORE_RDMA_DEVICES"
    )
    if len(devices) <= gpu_count:
        return devices[local_rank // (gpu_count // len(devices))]
    each = len(devices) // gpu_count
    return ",".join(devices[local_rank * each : (local_rank + 1) * each])


def _parse_NCCL_IB_HCA(value: str, available_devices: list[str]) -> list[str]:  # noqa: N802
    value = value.strip()
    if not value:
        return available_devices[:_MOST_HCAS]
    inverted = value.startswith("^")
    value = value.removeprefix("^")
    exact = value.startswith("=")
    tokens = [token.strip() for token in value.removeprefix("=").split(",") if token.strip()]
    found = _resolve_device_specs(tokens, exact, available_devices)
    if inverted:
        found = [name for name in available_devices if name not in found]
    return found[:_MOST_HCAS]


def _resolve_device_specs(
    device_specs: list[str], is_exact_match: bool, available_devices: list[str]
) -> list[str]:
    matched: set[str] = set()
    for spec in device_specs:
        name = spec.split(":", 1)[0].strip()  # ports are ignored
        if name in available_devices:
            matches = {name}
        elif is_exact_match:
            matches = set()
        else:
            matches = {device for device in available_devices if device.startswith(name)}
        if not matches:
            logger.warning("no RDMA device is called %s%s", "" if is_exact_match else "or begins with ", name)
        matched |= matches
    return sorted(matched)


def has_efa_pci() -> bool:
    """Whether any RDMA device is Amazon's."""
    for vendor in Path("/sys/class/infiniband").glob("*/device/vendor"):
        try:
            if vendor.read_text().strip() == _AMAZON:
                return True
        except OSError:
            continue
    return False


class _Host:
    """Host memory in the place of `torch.cuda`: what callers ask of a device module."""

    def device_count(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def ipc_collect(self) -> None: ...

    def empty_cache(self) -> None: ...

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def memory_reserved(self, device: Any = None) -> int:
        return 0

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


class DeviceManager:
    """The kind of accelerator here. Without one it is `cpu`, where checkpoint-engine raises."""

    def __init__(self) -> None:
        self.device_type = devices.device_type()
        self.device_module: Any = devices.module(self.device_type) or _Host()

    @property
    def backend(self) -> str:
        """Torch's name of the collective library."""
        return {"npu": "hccl", "cuda": "nccl"}.get(self.device_type, "gloo")

    @property
    def transfer_engine_protocol(self) -> str:
        """Mooncake's name of the protocol."""
        if self.device_type == "npu":
            return "ascend_direct"
        if self.device_type == "cpu":
            return "tcp"
        return "efa" if has_efa_pci() else "rdma"

    def rdma_device(self, rank: int) -> str:
        """The RDMA devices of a local rank, with commas between; nothing where the protocol names none."""
        if self.transfer_engine_protocol in ("ascend_direct", "tcp"):
            return ""
        return _get_my_rdma_device(rank, self.device_module.device_count(), _get_rdma_devices())
