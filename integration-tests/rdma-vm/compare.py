"""compare.py CKPT ROUNDS: runs inside the virtual machine; see perftest.sh. One NIC a side, the same queue pairs, depth,
reads in flight, MTU and one buffer for all messages on both."""

import json
import statistics
import subprocess
import sys
import time

CKPT, ROUNDS = sys.argv[1], int(sys.argv[2])
QPS, DEPTH, READS = 1, 16, 16
OWNER, READER = "rxe_a0", "rxe_b0"
# Of each size: messages, enough that what is done once counts little: the first run of each line of code is emulated at
# a tenth of the speed, and its page comes from the host.
BANDWIDTH = {65536: 1000, 1048576: 96}
LATENCY = {8: 2000}
WARMUP = 64


def perftest(tool, size, iterations, options):
    """The words of the result's line."""
    common = [tool, "-F", "-x", "1", "-u", "18", "-m", "4096", "-o", str(READS)]
    common += ["-s", str(size), "-n", str(iterations)] + options
    server = subprocess.Popen(common + ["-d", OWNER], stdout=subprocess.DEVNULL)
    try:
        for _ in range(50):
            # The server listens some time after its start.
            time.sleep(0.2)
            client = subprocess.run(
                common + ["-d", READER, "127.0.0.1"], capture_output=True, text=True, timeout=300
            )
            lines = [line.split() for line in client.stdout.splitlines()]
            found = [words for words in lines if len(words) >= 5 and words[0] == str(size)]
            if found:
                return [float(word) for word in found[0]]
        sys.exit(f"{tool} says nothing: {client.stdout}{client.stderr}")
    finally:
        server.kill()
        server.wait()


def ours(size, iterations):
    """The result of one size."""
    command = [CKPT, "bench", "transport", "--transport", "rdma", "--device", "host", "--op", "read"]
    command += ["--sizes", str(size), "--iters", str(iterations), "--warmup", str(WARMUP), "--qps", str(QPS)]
    command += ["--depth", str(DEPTH), "--one-buffer", "--hcas", f"{OWNER}/{READER}", "--timeout", "280", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if run.returncode != 0:
        sys.exit(f"{' '.join(command)}: {run.stdout}{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])["results"][0]


failed = False
print(f"{'#bytes':>8} {'what':<24} {'ours':>10} {'perftest':>10} {'ratio':>6}  rounds (ours/perftest)")
for what, sizes in (("READ average, MiB/s", BANDWIDTH), ("READ latency p50, us", LATENCY)):
    for size, iterations in sizes.items():
        pairs = []
        for _ in range(ROUNDS):
            if sizes is BANDWIDTH:
                mine = ours(size, iterations)["avg_gb_per_s"] * 1e9 / 2**20
                theirs = perftest("ib_read_bw", size, iterations, ["-q", str(QPS), "-t", str(DEPTH)])[3]
            else:
                mine = ours(size, iterations)["p50_us"]
                theirs = perftest("ib_read_lat", size, iterations, [])[4]
            pairs.append((mine, theirs))
        mine, theirs = (statistics.median(column) for column in zip(*pairs))
        ratio = mine / theirs
        good = ratio >= 0.95 if sizes is BANDWIDTH else ratio <= 1.2
        failed |= not good
        rounds = " ".join(f"{a:.1f}/{b:.1f}" for a, b in pairs)
        print(f"{size:>8} {what:<24} {mine:>10.2f} {theirs:>10.2f} {ratio:>6.2f}  {rounds}{'' if good else '  <-- missed'}")
sys.exit(1 if failed else 0)
