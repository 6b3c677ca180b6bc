"""Mooncake's Python API as the other side of our transport.

send BYTES...  serves buffers of the pattern below, prints their metas as JSON, ends with its stdin
receive        reads metas from stdin, pulls every buffer, prints one SHA-256 a line
rate           `ADDRESS POINTER BYTES` a line on stdin: reads that once and prints the seconds
"""

import ctypes
import hashlib
import json
import mmap
import sys
import time

import numpy as np
from mooncake.engine import TransferEngine


def engine():
    transfer = TransferEngine()
    code = transfer.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    assert code == 0, code
    return transfer


def buffer(size):
    array = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    return array, array.ctypes.data


def send(sizes):
    transfer, kept, buffers = engine(), [], []
    for index, size in enumerate(sizes):
        array, pointer = buffer(size)
        words = np.arange(size // 8, dtype=np.uint64) + np.uint64(index << 40)
        array.view(np.uint64)[:] = words * np.uint64(0x9E3779B97F4A7C15)
        assert transfer.register_memory(pointer, size) == 0
        kept.append(array)
        meta = {"name": f"part.{index}", "dtype": "torch.uint8", "shape": [size], "aligned_size": size}
        buffers.append({"ptr": pointer, "size": size, "metas": [meta]})
    address = f"127.0.0.1:{transfer.get_rpc_port()}"
    rank = {"p2p_store_addr": address, "rdma_device": "", "memory_buffer_metas_list": buffers}
    print("METAS " + json.dumps({"0": rank}), flush=True)
    sys.stdin.read()


def receive():
    transfer = engine()
    for rank in json.loads(sys.stdin.read()).values():
        for remote in rank["memory_buffer_metas_list"]:
            array, pointer = buffer(remote["size"])
            assert transfer.register_memory(pointer, remote["size"]) == 0
            code = transfer.transfer_sync_read(rank["p2p_store_addr"], pointer, remote["ptr"], remote["size"])
            assert code == 0, code
            print("SHA256 " + hashlib.sha256(array).hexdigest(), flush=True)


def rate():
    transfer = engine()
    array, pointer = buffer(1 << 30)
    array[:] = 0
    assert transfer.register_memory(pointer, len(array)) == 0
    print("READY", flush=True)
    for line in sys.stdin:
        address, remote, size = line.split()
        begun = time.perf_counter()
        code = transfer.transfer_sync_read(address, pointer, int(remote), int(size))
        seconds = time.perf_counter() - begun
        assert code == 0, code
        print(f"TOOK {seconds}", flush=True)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "send":
        send([int(size) for size in rest])
    elif command == "receive":
        receive()
    else:
        rate()
    sys.stdout.flush()
    # The engine's own exit handlers race with its threads.
    ctypes.CDLL(None)._exit(0)
