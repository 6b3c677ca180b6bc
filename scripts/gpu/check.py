"""The rows of check.sh: each starts its own workers and ranks as processes, does something to them, and looks."""
import http.client
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib

FOLDER = sys.argv[1]
ONLY = sys.argv[2:]
CKPT = os.path.join(FOLDER, "ckpt")
GPU = os.path.join(FOLDER, "gpu")
HERE = os.path.dirname(os.path.abspath(__file__))
DEVICE = os.environ.get("DEVICE", "cuda")
UPDATES = int(os.environ.get("UPDATES", "200"))
BUDGET = float(os.environ.get("BUDGET", "440"))
OUT = os.environ.get("OUT") or tempfile.mkdtemp(prefix="ckpt-check-")
BEGAN = time.monotonic()
# All ranks end within so many seconds of a death; a silent rank is given up after 5.
SOON = 15
MIB = 1 << 20
# Device memory comes back in such steps.
SLACK = 64 * MIB
ADLER = 65521


class Skip(Exception):
    pass


def expect(holds, message):
    if not holds:
        raise AssertionError(message)


def gpus():
    if DEVICE != "cuda":
        return 2
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    return listed.stdout.count("GPU ")


def memory_used():
    """Bytes of each GPU, as the driver counts them."""
    if DEVICE != "cuda":
        return [0]
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    text = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    return [int(line) * MIB for line in text.split()]


def grown(before):
    return max(now - then for now, then in zip(memory_used(), before))


def settles(before, within=10):
    """Until no GPU has more than before."""
    until = time.monotonic() + within
    while grown(before) > SLACK and time.monotonic() < until:
        time.sleep(0.2)
    expect(grown(before) <= SLACK, f"device memory grew by {grown(before) // MIB} MiB")


# Checkpoints ---------------------------------------------------------------------------------------------------------

WIDTHS = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
    "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1,
}


def write_safetensors(path, tensors):
    """`tensors`: (name, dtype, shape). Bytes are random, but those of BOOL are 0 or 1."""
    header, at = {}, 0
    for name, dtype, shape in tensors:
        size = WIDTHS[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = random.Random(7)
    sums = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, dtype, _ in tensors:
            start, end = header[name]["data_offsets"]
            adler = 1
            while start < end:
                piece = source.randbytes(min(end - start, 16 * MIB))
                if dtype == "BOOL":
                    piece = bytes(byte & 1 for byte in piece)
                file.write(piece)
                adler = zlib.adler32(piece, adler)
                start += len(piece)
            # Its lower half is the sum of all bytes, and 1.
            sums[name] = ((adler & 0xFFFF) - 1) % ADLER
    return sums


def checkpoint(kind):
    """The folder of a checkpoint, made once; and the sum of each tensor's bytes, modulo ADLER."""
    folder = os.path.join(SCRATCH, kind)
    note = folder + ".sums"
    if os.path.exists(note):
        with open(note) as file:
            return folder, json.load(file)
    os.makedirs(folder)
    if kind == "dtypes":
        # Every dtype with odd ends; a scalar; nothing at all; one larger than the ring's 512 MiB.
        tensors = [(f"all.{dtype}.{n}", dtype, [n]) for dtype in WIDTHS for n in (1, 3, 255, 4097, 300_001)]
        tensors += [("all.scalar", "F32", []), ("all.none", "BF16", [0, 5])]
        tensors += [("all.large", "U8", [700 * MIB + 13 if DEVICE == "cuda" else 20 * MIB + 13])]
    elif kind == "small":
        # What the copy kernel takes: thousands of tensors whose sizes are no multiples of anything.
        tensors = [(f"layers.{i}.weight", "U8", [1 + i * 7 % 611]) for i in range(6000)]
    else:
        tensors = [(f"layers.{i}.weight", "BF16", [2048, 1024]) for i in range(int(kind) // 4)]
    sums = write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    with open(note, "w") as file:
        json.dump(sums, file)
    return folder, sums


# Processes -----------------------------------------------------------------------------------------------------------

RUNNING = []


def start(name, command, environment=None):
    log = open(os.path.join(OUT, f"{ROW}-{name}-{len(RUNNING)}.log"), "w+")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, "CKPT_RUNTIME_DIR": os.path.join(SCRATCH, "run"), **(environment or {})},
    )
    process.log = log
    RUNNING.append(process)
    return process


def logged(process):
    process.log.seek(0)
    return process.log.read()


def end_all():
    """Ends what this row started, by its own handles."""
    for process in RUNNING:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        process.log.close()
    RUNNING.clear()


class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


def ask(path, route):
    connection = Connection(path)
    try:
        connection.request("GET", route)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def wait_for(what, holds, within=60):
    until = time.monotonic() + within
    while not holds():
        expect(time.monotonic() < until, f"{what}: not within {within} s")
        time.sleep(0.02)


class Workers:
    """The reference engines of all ranks."""

    def __init__(self, ranks, faults=(), device=None, environment=lambda rank: {}):
        self.device = device or DEVICE
        self.folder = tempfile.mkdtemp(dir=SCRATCH)
        self.environment = environment
        self.processes = [self.start(rank, faults) for rank in range(ranks)]

    def socket(self, rank):
        return os.path.join(self.folder, f"worker-{rank}.sock")

    def start(self, rank, faults=()):
        local = "0" if "CUDA_VISIBLE_DEVICES" in self.environment(rank) else str(rank)
        command = [CKPT, "worker", "--device", self.device, "--rank", str(rank), "--local-rank", local]
        command += ["--uds", self.socket(rank), "--exit-with-parent", *faults]
        process = start(f"worker-{rank}", command, self.environment(rank))
        expect("listens on" in process.stdout.readline(), f"worker {rank} did not start: {logged(process)[-500:]}")
        return process

    def state(self, rank):
        return ask(self.socket(rank), "/v1/state")[0]

    def held(self, rank):
        return {tensor["name"]: tensor for tensor in ask(self.socket(rank), "/v1/tensors")}

    def in_the_middle(self, rank):
        wait_for("an update begins", lambda: self.state(rank)["mixed"])

    def check(self, rank, folder):
        expected = reference(folder)
        held = self.held(rank)
        wrong = [name for name in expected if held.get(name) != expected[name]]
        expect(not wrong and len(held) == len(expected), f"worker {rank}: {len(wrong)} tensors differ: {wrong[:3]}")
        return len(held)


REFERENCES = {}


def reference(folder):
    """What a worker that holds `folder` answers, as one in host memory says it."""
    if folder not in REFERENCES:
        host = Workers(1, device="host")
        update = Update(host, folder, 1, ["--device", "host"])
        update.succeeds()
        REFERENCES[folder] = host.held(0)
    return REFERENCES[folder]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Update:
    """The parameter servers of one `ckpt update`, one process a rank."""

    def __init__(self, workers, folder, ranks, options=()):
        hub = f"127.0.0.1:{free_port()}"
        command = [CKPT, "update", "--json", "--checkpoint-path", folder]
        command += ["--uds", os.path.join(workers.folder, "worker-{rank}.sock"), "--inference-parallel-size", "1"]
        if "--device" not in options:
            command += ["--device", DEVICE]
        if "--worker-protocol" not in options:
            command += ["--worker-protocol", "native"]
        self.ranks = []
        for rank in range(ranks):
            visible = workers.environment(rank)
            local = "0" if "CUDA_VISIBLE_DEVICES" in visible else str(rank)
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": str(ranks),
                "CKPT_HUB_ADDRESS": hub, "RUST_LOG": "info,ckpt_transport_nccl=debug", **visible,
            }
            self.ranks.append(start(f"rank-{rank}", command + list(options), environment))

    def succeeds(self, within=90):
        until = time.monotonic() + within
        results = []
        for rank, process in enumerate(self.ranks):
            try:
                out, _ = process.communicate(timeout=max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} has not ended after {within} s") from None
            expect(process.returncode == 0, f"rank {rank} ended with {process.returncode}: {logged(process)[-400:]}")
            lines = [line for line in out.splitlines() if line.startswith("{")]
            results.append(json.loads(lines[-1]) if lines else None)
        return results[0]

    def fails(self, ranks, since, within=SOON):
        """These ranks end, not well, each with a reason; the reasons."""
        reasons = []
        for rank in ranks:
            process = self.ranks[rank]
            try:
                process.communicate(timeout=max(since + within - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} has not ended {within} s after the fault") from None
            expect(process.returncode != 0, f"rank {rank} ended well")
            errors = [line for line in logged(process).splitlines() if line.startswith("error: ")]
            expect(errors, f"rank {rank} gave no reason: {logged(process)[-300:]}")
            reasons.append(errors[-1])
        return reasons

    def path(self, rank=0):
        text = logged(self.ranks[rank])
        if "along rails over NCCL" in text:
            return "rails"
        if "copies over CUDA IPC" in text:
            return "cuda-ipc"
        return "nccl" if "uses NCCL" in text else "one rank"


# Rows ----------------------------------------------------------------------------------------------------------------

ROWS = []
MOST = min(2, gpus())


def row(function):
    ROWS.append((function.__name__, function))
    return function


def transports():
    return ["cuda-ipc", "nccl"] if DEVICE == "cuda" else ["tcp"]


def demo(folder, ranks, transport):
    command = [CKPT, "demo", "--json", "--device", DEVICE, "--ranks", str(ranks), "--checkpoint-path", folder]
    command += ["--transport", transport if ranks > 1 else "auto"]
    process = start("demo", command)
    out, _ = process.communicate(timeout=120)
    expect(process.returncode == 0, f"over {transport}: {process.returncode}: {logged(process)[-400:]} {out[-300:]}")
    found = json.loads(out.splitlines()[-1])
    expect(found["verified"], f"over {transport}: not verified")
    return found


def every_value(kind):
    folder, _ = checkpoint(kind)
    said = []
    for ranks in range(1, MOST + 1):
        for transport in transports() if ranks > 1 else ["auto"]:
            found = demo(folder, ranks, transport)
            said.append(f"{ranks} over {transport}: {found['verified_tensors']} right, ring {found['ring_bytes'] // MIB} MiB")
    return "; ".join(said)


@row
def values_of_all_dtypes():
    return every_value("dtypes")


@row
def values_of_small_odd_tensors():
    return every_value("small")


@row
def checkpoint_engine_worker():
    if DEVICE != "cuda":
        raise Skip("needs a GPU and torch")
    try:
        import checkpoint_engine.worker  # noqa: F401
    except ImportError as error:
        if "checkpoint_engine" in str(error) or "torch" in str(error) or "zmq" in str(error):
            raise Skip(f"{error}: FOLDER has no wheels, or this machine no torch") from None
    folder, sums = checkpoint("dtypes")
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    shapes = os.path.join(SCRATCH, "shapes.json")
    with open(shapes, "w") as file:
        json.dump([[name, tensor["dtype"], tensor["shape"]] for name, tensor in header.items()], file)
    workers = Workers(0)
    for rank in range(MOST):
        command = ["python3", os.path.join(HERE, "ce_engine.py"), "--uds", workers.socket(rank), "--shapes", shapes]
        command += ["--port-file", workers.socket(rank) + ".port", "--local-rank", str(rank), "--exit-with-parent"]
        start(f"engine-{rank}", command)
    for rank in range(MOST):
        wait_for(f"engine {rank}", lambda rank=rank: os.path.exists(workers.socket(rank) + ".port"))
    Update(workers, folder, MOST, ["--worker-protocol", "ce-0.4", "--repeat", "2"]).succeeds()
    for rank in range(MOST):
        held = ask(workers.socket(rank), "/v1/sums")
        wrong = [name for name in sums if held.get(name, -1) % ADLER != sums[name]]
        expect(not wrong, f"rank {rank}: sums differ: {wrong[:3]}")
    return f"{MOST} engines, the sum of each of {len(sums)} tensors' bytes is right"


def after_a_fault(workers, folder, before):
    """The next update works, and no memory is lost."""
    Update(workers, folder, MOST).succeeds()
    for rank in range(MOST):
        workers.check(rank, folder)
    settles(before)


def prepared(faults_of_last=(), slow=()):
    """Workers that hold the weights of one update already, so that memory can be compared."""
    folder, _ = checkpoint("256")
    reference(folder)
    workers = Workers(MOST, slow)
    last = MOST - 1
    Update(workers, folder, MOST).succeeds()
    before = memory_used()
    return folder, workers, before, last


@row
def a_worker_raises():
    folder, _ = checkpoint("256")
    reference(folder)
    workers = Workers(0)
    last = MOST - 1
    for rank in range(MOST):
        faults = ["--fail-at-bucket", "1", "--fault-once"] if rank == last else []
        workers.processes.append(workers.start(rank, faults))
    update = Update(workers, folder, MOST, ["--bucket-mib", "32"])
    reasons = update.fails(range(MOST), time.monotonic() + 30)
    expect(all("--fail-at-bucket asked for it" in reason for reason in reasons), f"reasons: {reasons}")
    Update(workers, folder, MOST).succeeds()
    before = memory_used()
    after_a_fault(workers, folder, before)
    return "all ranks told its reason; the next update is right"


@row
def a_worker_is_killed():
    folder, workers, before, last = prepared(slow=["--slow-ms", "300"])
    update = Update(workers, folder, MOST, ["--bucket-mib", "16"])
    workers.in_the_middle(last)
    killed = time.monotonic()
    workers.processes[last].kill()
    reasons = update.fails(range(MOST), killed)
    took = time.monotonic() - killed
    workers.processes[last].wait()
    workers.processes[last] = workers.start(last)
    after_a_fault(workers, folder, before)
    return f"all ranks ended after {took:.1f} s: {reasons[0][:120]}"


@row
def a_parameter_server_is_killed():
    if MOST < 2:
        raise Skip("needs two GPUs")
    said = []
    for transport in transports():
        folder, workers, before, last = prepared(slow=["--slow-ms", "300"])
        update = Update(workers, folder, MOST, ["--bucket-mib", "16", "--transport", transport])
        workers.in_the_middle(0)
        killed = time.monotonic()
        update.ranks[last].kill()
        reasons = update.fails(range(last), killed)
        took = time.monotonic() - killed
        update.ranks[last].wait()
        settles(before)
        after_a_fault(workers, folder, before)
        said.append(f"{transport}: the others ended after {took:.1f} s, memory is back")
        expect(reasons, "no reason")
        end_all()
    return "; ".join(said)


@row
def a_parameter_server_is_stopped_and_wakes():
    if MOST < 2:
        raise Skip("needs two GPUs")
    said = []
    for transport in transports():
        folder, workers, before, last = prepared(slow=["--slow-ms", "700"])
        update = Update(workers, folder, MOST, ["--bucket-mib", "16", "--transport", transport])
        workers.in_the_middle(0)
        stopped = time.monotonic()
        update.ranks[last].send_signal(signal.SIGSTOP)
        update.fails(range(last), stopped)
        took = time.monotonic() - stopped
        update.ranks[last].send_signal(signal.SIGCONT)
        woken = update.fails([last], time.monotonic())
        after_a_fault(workers, folder, before)
        said.append(f"{transport}: given up after {took:.1f} s, woke to: {woken[0][:80]}")
        end_all()
    return "; ".join(said)


def footprint(processes):
    """Resident MiB, open files and threads of each process."""
    found = []
    for process in processes:
        with open(f"/proc/{process.pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        expect("VmRSS" in status, "a process ended before it was looked at; make more UPDATES")
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        found.append((int(status["VmRSS"].split()[0]) >> 10, files, int(status["Threads"])))
    return found


@row
def many_updates_do_not_grow():
    folder, _ = checkpoint("64")
    reference(folder)
    workers = Workers(MOST)
    update = Update(workers, folder, MOST, ["--repeat", str(UPDATES)])
    watched = workers.processes + update.ranks
    marks = {}
    first, second = UPDATES // 5, UPDATES * 19 // 20
    for mark in (first, second):
        wait_for(f"update {mark}", lambda: workers.state(0)["updates"] >= mark or update.ranks[0].poll() is not None, 120)
        expect(update.ranks[0].poll() is None, f"the ranks ended early: {logged(update.ranks[0])[-300:]}")
        marks[mark] = (footprint(watched), memory_used())
    result = update.succeeds()
    (early, memory), (late, memory_late) = marks[first], marks[second]
    device = max(now - then for now, then in zip(memory_late, memory)) // MIB
    # A sample falls anywhere in an update, whose ring may be there or not.
    allowed = result["ring_bytes"] // MIB + 64
    expect(device <= allowed, f"device memory grew by {device} MiB")
    for (rss, files, threads), (rss_late, files_late, threads_late) in zip(early, late):
        expect(rss_late <= rss * 1.05 + 48, f"resident memory grew from {rss} to {rss_late} MiB")
        expect(files_late <= files + 12 and threads_late <= threads + 24, f"{files} to {files_late} files, {threads} to {threads_late} threads")
    for rank in range(MOST):
        workers.check(rank, folder)
    each = sum(result["update_s"][1:]) / (UPDATES - 1)
    return f"updates {first} to {second}: device {device:+} MiB, resident {early} to {late} (MiB, files, threads); {each * 1e3:.0f} ms each"


@row
def p2p_updates():
    """Receivers pull from the owners' memory into pinned staging, while they broadcast what they have among them."""
    folder, _ = checkpoint("256")
    reference(folder)
    workers = Workers(MOST)
    found = Update(workers, folder, MOST, ["--update-method", "all", "--repeat", "3"]).succeeds()
    for rank in range(MOST):
        workers.check(rank, folder)
    said = [f"all {MOST} ranks: " + str({method: round(min(s), 3) for method, s in found["update_s_by_method"].items()}) + " s"]
    if MOST > 1:
        # Rank 0 owns half of the bytes and is not updated.
        alone = Workers(MOST)
        Update(alone, folder, MOST, ["--update-method", "p2p", "--ranks", str(MOST - 1), "--repeat", "2"]).succeeds()
        alone.check(MOST - 1, folder)
        expect(alone.state(0)["updates"] == 0, "a rank that was not named was updated")
        said.append(f"only rank {MOST - 1}: right, and the others undisturbed")
    return "; ".join(said)


@row
def each_process_sees_one_gpu():
    if DEVICE != "cuda" or MOST < 2:
        raise Skip("needs two GPUs")
    folder, _ = checkpoint("256")
    reference(folder)
    workers = Workers(MOST, environment=lambda rank: {"CUDA_VISIBLE_DEVICES": str(rank)})
    update = Update(workers, folder, MOST, ["--repeat", "2"])
    update.succeeds()
    for rank in range(MOST):
        workers.check(rank, folder)
    return f"auto took {update.path()}; every tensor is right"


@row
def auto_finds_the_best_path():
    if DEVICE != "cuda" or MOST < 2:
        raise Skip("needs two GPUs")
    folder, _ = checkpoint("256")
    reference(folder)
    workers = Workers(MOST)
    update = Update(workers, folder, MOST)
    update.succeeds()
    for rank in range(MOST):
        workers.check(rank, folder)
    return f"both GPUs visible: auto took {update.path()}"


def on_pretended_hosts(slow=()):
    """Workers of two pretended hosts with two ranks each, on two GPUs. NCCL refuses two members of one group on one GPU, so
    the hosts number them in opposite orders."""
    if DEVICE != "cuda" or MOST < 2:
        raise Skip("needs two GPUs")
    place = [(0, "a"), (1, "a"), (1, "b"), (0, "b")]
    environment = [{"CUDA_VISIBLE_DEVICES": str(gpu), "CKPT_PRETEND_HOST": host} for gpu, host in place]
    return len(place), Workers(len(place), slow, environment=lambda rank: environment[rank])


def along_rails(update, ranks):
    paths = [update.path(rank) for rank in ranks]
    expect(set(paths) == {"rails"}, f"the ranks took {paths}")


@row
def copies_inside_hosts_and_rails_between_them():
    folder, _ = checkpoint("256")
    reference(folder)
    ranks, workers = on_pretended_hosts()
    update = Update(workers, folder, ranks, ["--repeat", "3", "--bucket-mib", "32"])
    found = update.succeeds()
    along_rails(update, range(ranks))
    held = [workers.check(rank, folder) for rank in range(ranks)]
    return f"{ranks} ranks on 2 GPUs: copies and NCCL's rails, {held[0]} tensors right on each, {found['update_s']} s"


@row
def rails_end_when_a_parameter_server_is_killed():
    folder, _ = checkpoint("256")
    reference(folder)
    ranks, workers = on_pretended_hosts(["--slow-ms", "300"])
    Update(workers, folder, ranks).succeeds()
    before = memory_used()
    update = Update(workers, folder, ranks, ["--bucket-mib", "16"])
    workers.in_the_middle(0)
    killed = time.monotonic()
    update.ranks[-1].kill()
    reasons = update.fails(range(ranks - 1), killed)
    took = time.monotonic() - killed
    along_rails(update, range(ranks - 1))
    update.ranks[-1].wait()
    settles(before)
    Update(workers, folder, ranks).succeeds()
    for rank in range(ranks):
        workers.check(rank, folder)
    settles(before)
    return f"the others ended after {took:.1f} s, memory is back, the next update is right: {reasons[0][:120]}"


def conformance(name):
    if DEVICE != "cuda":
        raise Skip("needs a GPU")
    if not os.path.exists(GPU):
        raise Skip("FOLDER has no test binary `gpu`")
    process = start(name, [GPU, "--ignored", "--exact", name, "--nocapture"])
    out, _ = process.communicate(timeout=110)
    # NCCL may crash in its destructors while the process exits, after an aborted join. `ckpt` does not run them.
    ended = process.returncode == 0 or (name == "nccl_conforms" and "test result: ok" in out)
    expect(ended and " 1 passed" in out, f"{process.returncode}: {out[-300:]} {logged(process)[-300:]}")
    return f"{out.count('passed   ')} checks, {out.count('skipped  ')} not for this device"


@row
def cuda_conforms():
    return conformance("cuda_conforms")


@row
def cuda_ipc_conforms():
    return conformance("cuda_ipc_conforms")


@row
def nccl_conforms():
    return conformance("nccl_conforms")


def main():
    global ROW
    table, status = [], 0
    for name, function in ROWS:
        if ONLY and name not in ONLY:
            continue
        ROW = name
        begun = time.monotonic()
        if begun - BEGAN > BUDGET:
            table.append(("LEFT OUT", name, 0.0, "BUDGET is over"))
            continue
        print(f"=== {name} ({time.strftime('%T')})", flush=True)
        try:
            verdict, detail = "PASS", function()
        except Skip as reason:
            verdict, detail = "SKIP", str(reason)
        except Exception as error:
            verdict, detail, status = "FAIL", f"{type(error).__name__}: {error}", 1
        finally:
            end_all()
        print(f"{verdict}: {detail}", flush=True)
        table.append((verdict, name, time.monotonic() - begun, " ".join(detail.split())))
    print(f"=== logs: {OUT}")
    for verdict, name, seconds, detail in table:
        print(f"{verdict:8} {name:42} {seconds:6.1f} s  {detail[:400]}")
    print(f"=== overall: {'PASS' if status == 0 else 'FAIL'}")
    return status


ROW = "none"
SCRATCH = tempfile.mkdtemp(prefix="ckpt-check-", dir="/dev/shm" if shutil.disk_usage("/dev/shm").free > 8 << 30 else None)
os.makedirs(OUT, exist_ok=True)
try:
    sys.exit(main())
finally:
    end_all()
    shutil.rmtree(SCRATCH, ignore_errors=True)
