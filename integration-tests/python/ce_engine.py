"""A tiny vLLM: an HTTP server in front of checkpoint-engine style workers, one thread for each device.

Prints its address, takes one `/collective_rpc`, answers when all workers are through, and then prints what each device
holds as one JSON object. A worker that fails makes the answer a 500 with the traceback.
"""
import argparse
import hashlib
import http.server
import json
import signal
import threading

import zmq

import ce_worker


class Device(threading.Thread):
    def __init__(self, uuid, endpoint, options):
        super().__init__(daemon=True)
        self.uuid = uuid
        self.endpoint = endpoint
        self.worker = ce_worker.Worker(options)
        self.error = None

    def run(self):
        # As the worker extension does it: one context and one REP socket for each update.
        context = zmq.Context()
        socket = context.socket(zmq.REP)
        socket.connect(self.endpoint)
        try:
            self.worker.run(socket)
        except Exception:
            self.error = ce_worker.trace()
        finally:
            socket.close(linger=5000)
            context.term()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, b"")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/collective_rpc" or request["method"] != "update_weights_from_ipc":
            return self.answer(404, b"")
        endpoints = request["args"][0]
        devices = [Device(uuid, endpoints[uuid], self.server.options) for uuid in sorted(endpoints)]
        for device in devices:
            device.start()
        for device in devices:
            device.join()
        errors = [device.error for device in devices if device.error]
        try:
            if errors:
                self.answer(500, errors[0].encode())
            else:
                self.answer(200, json.dumps({"results": [None] * len(devices)}).encode())
        except BrokenPipeError:
            pass  # after a failure nobody may wait for the answer
        held = {
            device.uuid: {
                name: [tensor["dtype"], tensor["shape"], hashlib.sha256(bytes.fromhex(tensor["hex"])).hexdigest()]
                for name, tensor in device.worker.held.items()
            }
            for device in devices
        }
        events = {device.uuid: device.worker.events for device in devices}
        print(json.dumps({"held": held, "events": events, "errors": errors}), flush=True)
        threading.Thread(target=self.server.shutdown).start()

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", default="0.4", choices=["0.3", "0.4"])
    parser.add_argument("--fail-at-open", action="store_true")
    parser.add_argument("--fail-at-bucket", type=int)
    parser.add_argument("--die-at-bucket", type=int)
    options = parser.parse_args()
    signal.alarm(120)  # nothing of a test outlives it
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.options = options
    print(f"engine listens on http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
