"""A checkpoint-engine style worker without torch: pyzmq REP, protocol versions 0.4 (two None) and 0.3 (one None).

Takes one update and prints what it holds as JSON. An exception sent by the parameter server is raised, so the exit
code is 1 and the traceback is on stderr.
"""
import argparse
import io
import json
import mmap
import os
import pickle
import signal
import sys
import traceback

import zmq

# Bytes of one element, and of nothing that has no torch dtype.
ITEM_SIZES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e8m0fnu": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float4_e2m1fn_x2": 1,
}


class Dtype:
    def __init__(self, name):
        self.name = name
        self.itemsize = ITEM_SIZES[name]


def rebuild_host_buffer(path, offset, size, _3, _4, _5, device_index):
    assert (_3, _4, _5) == (0, 0, 0)
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), offset + size, access=mmap.ACCESS_READ)
    return memoryview(mapping)[offset:offset + size], device_index


class Loader(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("ckpt_engine.worker", "rebuild_host_buffer"):
            return rebuild_host_buffer
        if module == "torch":
            return Dtype(name)
        if (module, name) == ("builtins", "RuntimeError"):
            return RuntimeError
        raise pickle.UnpicklingError(f"{module}.{name} is not expected here")


def receive(socket):
    return Loader(io.BytesIO(socket.recv())).load()


def trace():
    return traceback.format_exc()


class Worker:
    def __init__(self, options):
        self.options = options
        self.buffer = None
        self.held = {}
        self.events = []

    def load(self, tensors, bucket):
        if bucket == self.options.die_at_bucket:
            os.kill(os.getpid(), signal.SIGKILL)
        if bucket == self.options.fail_at_bucket:
            raise ValueError("there is no parameter called lm_head")
        for tensor in tensors:
            assert set(tensor) == {"name", "dtype", "shape", "offset"}, tensor
            size = tensor["dtype"].itemsize
            for dim in tensor["shape"]:
                size *= dim
            data = bytes(self.buffer[tensor["offset"]:tensor["offset"] + size])
            assert len(data) == size, "the tensor is not in the buffer"
            self.held[tensor["name"]] = {
                "dtype": tensor["dtype"].name, "shape": list(tensor["shape"]), "hex": data.hex(),
            }

    def run(self, socket):
        try:
            function, arguments = receive(socket)
            arguments = list(arguments)
            arguments[6] = 5  # every worker puts its own device's index there
            self.buffer, device = function(*arguments)
            assert device == 5
            if self.options.fail_at_open:
                raise MemoryError("cannot map the buffer")
            socket.send(b"")
        except Exception:
            socket.send_string(trace())
            socket.recv()
            raise
        print("opened", flush=True)
        bucket = 0
        released = False
        while True:
            payload = receive(socket)
            if released:
                assert payload is None, "only None may follow a release"
                self.events.append("hook")
                socket.send(b"")
                return
            if payload is None:
                self.buffer = None
                self.events.append("release")
                if self.options.version == "0.3":
                    self.events.append("hook")
                    socket.send(b"")
                    return
                socket.send(b"")
                released = True
            elif isinstance(payload, list):
                try:
                    self.load(payload, bucket)
                    socket.send(b"")
                except Exception:
                    socket.send_string(trace())
                bucket += 1
            elif isinstance(payload, Exception):
                raise payload
            else:
                raise TypeError(type(payload))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("--version", default="0.4", choices=["0.3", "0.4"])
    parser.add_argument("--fail-at-open", action="store_true")
    parser.add_argument("--fail-at-bucket", type=int)
    parser.add_argument("--die-at-bucket", type=int)
    options = parser.parse_args()
    signal.alarm(120)  # nothing of a test outlives it
    worker = Worker(options)
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    socket.connect(options.endpoint)
    try:
        worker.run(socket)
    finally:
        socket.close()
    print(json.dumps({"tensors": worker.held, "events": worker.events}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
