# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35"]
# ///
"""One forward of the same FLUX (2 + 4 blocks of width 1024, 1024 + 256 tokens, CPU) in fastflux, candle-transformers and diffusers, in float32 and
bfloat16.

    python scripts/bench_peers.py [--rounds 2] [--runs 7] [--threads N] [--json]

Runs `cargo bench --bench forward` (fastflux and candle-transformers in turn) and diffusers' FluxTransformer2DModel on PyTorch by turns, so that a
busy machine slows all of them, and prints medians and how many times as long as fastflux in the same dtype each takes. Weights are random: time
does not depend on them. Needs cargo, torch and diffusers; `--bench PATH` takes the benchmark as it was built before instead of cargo.
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
SIDE, TEXT = 32, 256
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def rust(args):
    """Seconds of fastflux and of candle-transformers, by name and dtype."""
    environment = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    command = [args.bench] if args.bench else ["cargo", "bench", "--bench", "forward", "--"]
    out = subprocess.run([*command, "--runs", str(args.runs)], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: float(seconds) for name, seconds in re.findall(r"^(\S+ \S+)\s+([\d.]+) s", out, re.M)}


def model(dtype):
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=8,
        joint_attention_dim=512, pooled_projection_dim=256, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    ).to(dtype).eval()


@torch.inference_mode()
def pytorch(flux, runs):
    """Seconds of one forward, median."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    inputs = {
        "hidden_states": torch.randn(1, SIDE * SIDE, 64).to(flux.dtype), "encoder_hidden_states": torch.randn(1, TEXT, 512).to(flux.dtype),
        "pooled_projections": torch.randn(1, 256).to(flux.dtype), "timestep": torch.tensor([0.6]), "guidance": torch.tensor([3.5]),
        "img_ids": img_ids, "txt_ids": torch.zeros(TEXT, 3),
    }
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        flux(**inputs, return_dict=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7, help="forwards that count in each round, after one that does not")
    parser.add_argument("--bench", help="the built benchmark")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models, rounds = {name: model(dtype) for name, dtype in DTYPES.items()}, []
    for _ in range(args.rounds):
        theirs = {f"diffusers {name}": pytorch(flux, args.runs) for name, flux in models.items()}
        rounds.append({**rust(args), **theirs})
    seconds = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ratios = {name: value / seconds[f"fastflux {name.split()[1]}"] for name, value in seconds.items()}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    if args.json:
        print(json.dumps({"threads": args.threads, "versions": versions, "rounds": rounds, "seconds": seconds, "ratios": ratios}, indent=1))
        return
    print(f"one forward, {args.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}")
    for name, value in seconds.items():
        each = ", ".join(f"{r[name]:.3f}" for r in rounds)
        print(f"{name:<25} {value:.3f} s  {ratios[name]:.2f} times fastflux {name.split()[1]}  (rounds: {each})")


if __name__ == "__main__":
    main()
