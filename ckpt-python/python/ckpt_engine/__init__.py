"""Puts new weights into running LLM inference engines, from Python.

`ParameterServer` holds a share of a checkpoint and moves it; `update_weights_from_ipc` is the worker's side of it;
`VllmColocateWorkerExtension` is that side inside vLLM. docs/python.md has examples.
"""

from ._native import Error, __version__
from .server import ParameterServer
from .worker import VllmColocateWorkerExtension, update_weights_from_ipc

__all__ = [
    "Error",
    "ParameterServer",
    "VllmColocateWorkerExtension",
    "__version__",
    "update_weights_from_ipc",
]
