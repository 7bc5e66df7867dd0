# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35"]
# ///
"""One forward of the same FLUX (2 + 4 blocks of width 1024, 1024 + 256 tokens, float32, CPU) in fastflux, candle-transformers and diffusers.

    python scripts/bench_peers.py [--rounds 2] [--threads N] [--json]

Runs `cargo bench --bench forward` (fastflux and candle-transformers in turn) and diffusers' FluxTransformer2DModel on PyTorch by turns, so that a
busy machine slows all of them, and prints medians and how many times as long as fastflux each takes. Weights are random: time does not
depend on them. Needs cargo, torch and diffusers.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import time

import diffusers
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = 7  # forwards that count in each round, after one that does not, as in benches/forward.rs
SIDE, TEXT = 32, 256


def rust(threads):
    """Seconds of fastflux and of candle-transformers."""
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
    out = subprocess.run(["cargo", "bench", "--bench", "forward"], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: float(re.search(rf"^{name}\s+([\d.]+) s", out, re.M)[1]) for name in ("fastflux", "candle-transformers")}


def model():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=8,
        joint_attention_dim=512, pooled_projection_dim=256, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    ).eval()


@torch.inference_mode()
def pytorch(flux):
    """Seconds of one forward, median."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    inputs = {
        "hidden_states": torch.randn(1, SIDE * SIDE, 64), "encoder_hidden_states": torch.randn(1, TEXT, 512),
        "pooled_projections": torch.randn(1, 256), "timestep": torch.tensor([0.6]), "guidance": torch.tensor([3.5]),
        "img_ids": img_ids, "txt_ids": torch.zeros(TEXT, 3),
    }
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        flux(**inputs, return_dict=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flux, rounds = model(), []
    for _ in range(args.rounds):
        rounds.append({**rust(args.threads), "diffusers": pytorch(flux)})
    seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ratios = {name: value / seconds["fastflux"] for name, value in seconds.items()}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    if args.json:
        print(json.dumps({"threads": args.threads, "versions": versions, "rounds": rounds, "seconds": seconds, "ratios": ratios}, indent=1))
        return
    print(f"one forward, {args.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}")
    for name, value in seconds.items():
        each = ", ".join(f"{r[name]:.3f}" for r in rounds)
        print(f"{name:<20} {value:.3f} s  {ratios[name]:.2f} times fastflux  (rounds: {each})")


if __name__ == "__main__":
    main()
