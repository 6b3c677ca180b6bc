"""The names of checkpoint-engine 0.4, served by ckpt-engine. docs/python.md says what is the same and what is not."""

from ._version import __version__
from .api import request_inference_to_update
from .data_types import (
    BucketRange,
    DataToGather,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from .device_utils import DeviceManager, get_ip, npu_generate_uuid
from .p2p_store import P2PStore
from .ps import ParameterServer
from .worker import FlattenedTensorMetadata, VllmColocateWorkerExtension, update_weights_from_ipc

__all__ = [
    "BucketRange",
    "DataToGather",
    "DeviceManager",
    "FlattenedTensorMetadata",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "P2PStore",
    "ParameterMeta",
    "ParameterServer",
    "VllmColocateWorkerExtension",
    "__version__",
    "get_ip",
    "npu_generate_uuid",
    "request_inference_to_update",
    "update_weights_from_ipc",
]
