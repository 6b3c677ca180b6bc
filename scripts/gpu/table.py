"""One table from the results that compare.sh left in a folder:  table.py FOLDER"""
import glob
import json
import os
import sys

PARTS = ["total", "transfer", "last_ack", "join", "prepare", "go", "open", "reload", "commit", "release", "post_hook"]


def result(path):
    with open(path) as file:
        lines = [line for line in file if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def seconds(value):
    return f"{value:.4f}"


def main(folder):
    rows = [["run", "update", *PARTS, "limit", "transfer/limit"]]
    for path in sorted(glob.glob(os.path.join(folder, "*.out")), key=os.path.getmtime):
        name = os.path.basename(path)[:-4]
        try:
            found = result(path)
        except ValueError:
            found = None
        if found is None:
            rows.append([name, "failed"])
        elif "peer" in found:
            for i, total in enumerate(found["updates_s"]):
                rows.append([name, str(i + 1), seconds(total)])
            setup = "  ".join(f"{key} {found[key]}" for key in found if key.endswith("_s") and key != "updates_s")
            print(f"{name}: {found['tensors']} tensors, {found['tensor_bytes']} bytes, {setup}")
        elif "h2d_limit_s" in found:
            limit = found["h2d_limit_s"]
            print(
                f"{name}: {found['tensors']} tensors, {found['tensor_bytes']} bytes, {found['buckets']} buckets of "
                f"{found['bucket_bytes']}, ring {found['ring_bytes']}, load {found['load_s']:.2f} s, metas "
                f"{found['gather_metas_s']:.3f} s, transport {found['transport']}, H2D "
                f"{', '.join(f'{rate:.1f}' for rate in found['h2d_gib_per_s'])} GiB/s"
            )
            for kind, updates in (("", found["updates"]), ("empty", found["floor"])):
                for i, times in enumerate(updates):
                    row = [name, kind or str(i + 1), *(seconds(times[part + "_s"]) for part in PARTS)]
                    rows.append(row + ([] if kind else [seconds(limit), f"{times['transfer_s'] / limit:.3f}"]))
        elif "results" in found:
            rates = (
                f"{line['size_bytes'] >> 10} KiB {line['time_us']:.0f} us {line.get('algbw_gb_per_s', 0):.1f}/"
                f"{line.get('busbw_gb_per_s', 0):.1f} wrong {line['wrong_bytes']}"
                for line in found["results"]
            )
            print(f"{name}: {found['ranks']} ranks, time, algbw/busbw GB/s: {', '.join(rates)}")
        else:
            print(f"{name}: {json.dumps(found)}")
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


main(sys.argv[1])
