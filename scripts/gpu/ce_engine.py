"""An engine stand-in whose weights arrive through checkpoint-engine's own, unmodified worker loop.

`ckpt bench update --worker ce --ce-worker 'python3 scripts/gpu/ce_engine.py'` starts it. It answers vLLM's two routes
on a UNIX socket, calls `update_weights_from_ipc` of the installed checkpoint-engine, and copies every tensor into
parameters that were allocated at the start, as an engine's load_weights does.
"""
import argparse
import http.server
import json
import os
import socketserver
import sys
import threading
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stubs import without_http_packages  # noqa: E402

without_http_packages()
import torch  # noqa: E402
import zmq  # noqa: E402
from checkpoint_engine.worker import update_weights_from_ipc  # noqa: E402

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}


class Engine:
    def __init__(self, local_rank, shapes):
        torch.cuda.set_device(local_rank)
        self.local_rank = local_rank
        self.uuid = f"GPU-{torch.cuda.get_device_properties(local_rank).uuid}"
        self.context = zmq.Context()
        # One allocation a parameter would take minutes for hundreds of thousands of them.
        sizes = [DTYPES[dtype].itemsize * torch.Size(shape).numel() for _, dtype, shape in shapes]
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += (size + 255) // 256 * 256
        memory = torch.zeros(max(end, 1), dtype=torch.uint8, device="cuda")
        self.parameters = {
            name: memory[start:start + size].view(DTYPES[dtype]).view(shape)
            for (name, dtype, shape), start, size in zip(shapes, starts, sizes)
        }

    def load(self, weights):
        for name, tensor in weights:
            self.parameters[name].copy_(tensor)

    def update(self, endpoints):
        update_weights_from_ipc(self.context, endpoints[self.uuid], self.local_rank, run=self.load)

    def sums(self):
        """The sum of each parameter's bytes: what a checkpoint's writer can compare."""
        return {
            name: int(p.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for name, p in self.parameters.items()
        }


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        if self.path == "/v1/sums":
            self.answer(200, self.server.engine.sums())
        else:
            self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/collective_rpc" or body.get("method") != "update_weights_from_ipc":
            return self.answer(404, {})
        try:
            self.server.engine.update(body["args"][0])
            self.answer(200, {"results": [None]})
        except Exception as error:
            traceback.print_exc()
            self.answer(500, {"error": str(error)})

    def log_message(self, *_):
        pass


class Server(socketserver.UnixStreamServer):
    request_queue_size = 16


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--uds", required=True)
    options.add_argument("--port-file", required=True)
    options.add_argument("--local-rank", type=int, default=0)
    options.add_argument("--shapes", required=True, help="JSON: a list of [name, dtype, shape]")
    options.add_argument("--exit-with-parent", action="store_true")
    args = options.parse_args()
    if args.exit_with_parent:
        def watch():
            sys.stdin.read()
            os._exit(0)
        threading.Thread(target=watch, daemon=True).start()
    with open(args.shapes) as file:
        shapes = json.load(file)
    engine = Engine(args.local_rank, shapes)
    torch.cuda.synchronize()
    with Server(args.uds, Handler) as server:
        server.engine = engine
        temporary = args.port_file + ".new"
        with open(temporary, "w") as file:
            file.write(f"unix:{args.uds}\n")
        os.rename(temporary, args.port_file)
        server.serve_forever()


if __name__ == "__main__":
    main()
