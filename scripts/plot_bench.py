# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib"]
# ///
"""Draws how the time and memory of a step grow with image size and batch, from `fastflux bench --json`.

    fastflux bench --config flux1-dev --step-only --size 256,512,1024 --batch 1,2,4 --json > growth.json
    python scripts/plot_bench.py growth.json growth.svg

Several JSON files (machines, models, shapes of fewer blocks) go into one chart.
"""

import argparse
import json
from collections import defaultdict

import matplotlib.pyplot as plt


def curves(files):
    """(label, sorted rows) for each model, number format and batch; labels name what differs."""
    groups = defaultdict(list)
    for name in files:
        with open(name) as file:
            report = json.load(file)
        machine = report["machine"].get("processor") or report["machine"]["system"]
        for row in report["rows"]:
            if row["what"] == "step":
                groups[row["model"], machine, row["dtype"], f"batch {row['batch']}"].append(row)
    varying = [len(set(column)) > 1 for column in zip(*groups)]
    for key, rows in sorted(groups.items()):
        label = ", ".join(part for part, varies in zip(key, varying) if varies)
        yield label or key[0], sorted(rows, key=lambda row: row["image_tokens"])


def draw(files, output):
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (label, rows), colour in zip(curves(files), plt.cm.tab10.colors * 10):
        tokens = [row["image_tokens"] for row in rows]
        low = [row["time"]["median"] - row["time"]["low"] for row in rows]
        high = [row["time"]["high"] - row["time"]["median"] for row in rows]
        median = [row["time"]["median"] for row in rows]
        time.errorbar(tokens, median, yerr=[low, high], marker="o", capsize=3, color=colour, label=label)
        estimated = [row["estimated_activation_bytes"] / 2**20 for row in rows]
        memory.plot(tokens, estimated, "--", color=colour, label=f"{label}, estimated")
        measured = [(row["image_tokens"], row["activation_bytes"] / 2**20) for row in rows if "activation_bytes" in row]
        if measured:
            memory.plot(*zip(*measured), marker="o", color=colour, label=f"{label}, measured")
    time.set_title("One step: median and quartiles")
    time.set_ylabel("seconds")
    memory.set_title("Memory of a step, beyond the weights")
    memory.set_ylabel("MiB")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("image tokens")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="+", help="output of `fastflux bench --json`")
    parser.add_argument("output", help="the SVG, PNG or PDF to write")
    arguments = parser.parse_args()
    draw(arguments.bench, arguments.output)
