# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib"]
# ///
"""Draws what models cost in velocity error against what they bring in speed and size, from `fastflux eval --output report`.

    python scripts/plot_frontier.py report/report.json frontier.png

Models called KIND-NUMBER (`pruned-20`, `pruned-40`) are joined by a line; others are marks of their own.
"""

import argparse
import json
import re
from collections import defaultdict

import matplotlib.pyplot as plt


def points(report):
    """{kind: [(what the mark says, times as fast, share of the bytes, error)]}, in order of the report."""
    groups = defaultdict(list)
    for model in report["models"]:
        name = model["name"].rsplit("/", 1)[-1]
        kind, number = re.fullmatch(r"(.+?)(?:-(\d+))?", name).groups()
        share = model["bytes"] / report["baseline"]["bytes"]
        error = model["against_baseline"]["velocity"]["error"]
        groups[kind].append((f"{number} %" if number else "", model["speed_up"], share, error))
    return groups


def draw(report, output):
    figure, (speed, size) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for (kind, marks), colour in zip(points(report).items(), plt.cm.tab10.colors * 10):
        labels, faster, smaller, errors = zip(*marks)
        for axes, x in ((speed, faster), (size, smaller)):
            axes.plot(x, errors, "-o" if len(marks) > 1 else "D", color=colour, label=kind)
            for label, at, error in zip(labels, x, errors):
                axes.annotate(label, (at, error), textcoords="offset points", xytext=(5, 5), fontsize=8, color=colour)
    speed.set_xlabel("a step: times as fast as the unpruned model's")
    speed.set_ylabel("velocity error")
    size.set_xlabel("bytes of the transformer, of the unpruned model's")
    for axes in (speed, size):
        axes.set_yscale("log")
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    size.legend(frameon=False, fontsize=9)
    figure.savefig(output, metadata={"Date": None} if output.endswith(".svg") else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", help="report.json of `fastflux eval`")
    parser.add_argument("output", help="the SVG, PNG or PDF to write")
    arguments = parser.parse_args()
    with open(arguments.report) as file:
        draw(json.load(file), arguments.output)
