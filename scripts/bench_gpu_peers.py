# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35"]
# ///
"""FLUX.1-dev's transformer in diffusers on a GPU: the time of a step, next to what the card reaches at most; prints JSON.

    python scripts/bench_gpu_peers.py                       # eager, full and with 11 of 57 blocks as linear layers
    python scripts/bench_gpu_peers.py --compile whole --train # torch.compile too, and a step of training

Weights are random, made on the GPU in bfloat16; batch 1, 1024×1024 (4096 image tokens), 512 text tokens. Times are medians
by CUDA events, in milliseconds. `fastflux bench --config flux1-dev --dtype bf16` times the same.

Compiling takes a minute, in which nothing else should be timed: with --ready and --hold the script writes one file when it
has warmed up, and goes on to measure when the other appears.
"""

import argparse
import copy
import json
import pathlib
import signal
import statistics
import sys
import time

try:
    import torch
    from diffusers import FluxTransformer2DModel
except ImportError as error:
    sys.exit(f"PyTorch and diffusers are needed: {error}")

# as scripts/check_gpu.sh prunes: doubles and singles that are no neighbours
DOUBLE, SINGLE = [4, 9, 14], [2, 6, 11, 15, 20, 24, 29, 33]
RANK = 32


class Linear(torch.nn.Module):
    """y = x + Wx + b."""

    def __init__(self, width, **place):
        super().__init__()
        self.layer = torch.nn.Linear(width, width, **place)

    def forward(self, x):
        return x + self.layer(x)


class Replacement(torch.nn.Module):
    """In place of a block of either kind: a layer for each stream."""

    def __init__(self, width, **place):
        super().__init__()
        self.img, self.txt = Linear(width, **place), Linear(width, **place)

    def forward(self, hidden_states, encoder_hidden_states, *_, **__):
        return self.txt(encoder_hidden_states), self.img(hidden_states)


class Lora(torch.nn.Module):
    """A frozen layer and a low-rank product added to it."""

    def __init__(self, layer, rank, **place):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = torch.nn.Linear(layer.in_features, rank, bias=False, **place)
        self.up = torch.nn.Linear(rank, layer.out_features, bias=False, **place)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Clock:
    """Times work on a GPU by events; on the CPU, for trying this script out, by the clock."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def once(self, work):
        """Milliseconds."""
        if not self.cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def median(self, out, name, work, seconds, warm_up=2, most=50):
        """Puts the median, the extremes and how many there were into `out`; returns the median, in milliseconds."""
        for _ in range(warm_up):
            work()
        times = []
        stop = time.perf_counter() + seconds
        while len(times) < 3 or (time.perf_counter() < stop and len(times) < most):
            times.append(self.once(work))
        out[f"{name}_ms"] = statistics.median(times)
        out[f"{name}_runs"] = [len(times), min(times), max(times)]
        return out[f"{name}_ms"]


def peaks(out, clock, place, seconds, small):
    """What the card reaches: FLOP/s of a large product, bytes/s of a copy (read and written) and of copies from the host."""
    side, size = (256, 1 << 20) if small else (8192, 1 << 30)
    a, b = (torch.randn(side, side, **place) for _ in range(2))
    out["flops_per_second"] = 2 * side**3 / clock.median(out, "product", lambda: a @ b, seconds) * 1e3
    source = torch.empty(size, dtype=torch.uint8, device=place["device"]).random_()
    target = torch.empty_like(source)
    out["copy_bytes_per_second"] = 2 * size / clock.median(out, "copy", lambda: target.copy_(source), seconds) * 1e3
    for name, pin in (("pageable", False), ("pinned", True)) if clock.cuda else ():
        host = torch.ones(size, dtype=torch.uint8, pin_memory=pin)
        took = clock.median(out, name, lambda: target.copy_(host, non_blocking=pin), seconds)
        out[f"{name}_bytes_per_second"] = size / took * 1e3


@torch.no_grad()
def random_model(config, place):
    """The transformer with weights of a size at which activations stay finite."""
    with torch.device(place["device"]):
        default = torch.get_default_dtype()
        torch.set_default_dtype(place["dtype"])
        flux = FluxTransformer2DModel(**config)
        torch.set_default_dtype(default)
    for value in flux.parameters():
        if value.ndim > 1:
            value.normal_(0, 0.3 / value.shape[-1] ** 0.5)
    return flux.eval().requires_grad_(False)


def replace(flux, width, place):
    """Linear layers in place of a fifth of the blocks."""
    for blocks, chosen in ((flux.transformer_blocks, DOUBLE), (flux.single_transformer_blocks, SINGLE)):
        for i in chosen:
            if i < len(blocks):
                blocks[i] = Replacement(width, **place)
                with torch.no_grad():
                    for value in blocks[i].parameters():
                        value.normal_(0, 0.02 / width**0.5)
    return flux.eval().requires_grad_(False)


def inputs(config, side, text, place):
    def normal(*shape):
        return torch.randn(*shape, **place)

    rows, columns = torch.meshgrid(*2 * [torch.arange(side, device=place["device"])], indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(place["dtype"])
    return {
        "hidden_states": normal(1, side * side, config["in_channels"]),
        "encoder_hidden_states": normal(1, text, config["joint_attention_dim"]),
        "pooled_projections": normal(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.6], **place),
        "guidance": torch.tensor([3.5], **place),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, **place),
        "return_dict": False,
    }


def sandwich_step(flux, given, place, width):
    """A step of training as `train-sandwich` takes it for one layer in place of eleven single blocks, in two parts. `prepare` runs the
    unpruned blocks up to there on new noise, and what is to come out; `learn` one linear layer between two blocks with LoRA, recomputed on
    the way back."""
    from torch.utils.checkpoint import checkpoint

    singles = flux.single_transformer_blocks
    first = min(13, len(singles) - 3)
    last = min(first + 12, len(singles) - 1)
    prefix, teacher = [*flux.transformer_blocks, *singles[:first]], singles[first:last + 1]
    before, after = (copy.deepcopy(block) for block in (teacher[0], teacher[-1]))
    temb = flux.time_text_embed(1000 * given["timestep"], 1000 * given["guidance"], given["pooled_projections"])
    rotary = flux.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))

    def run(blocks, hidden, encoder, checkpointing=False):
        for block in blocks:
            if checkpointing:
                encoder, hidden = checkpoint(block, hidden, encoder, temb, rotary, use_reentrant=False)
            else:
                encoder, hidden = block(hidden, encoder, temb, rotary)
        return hidden, encoder

    for block in (before, after):
        attention = block.attn
        for owner, name in [(attention, "to_q"), (attention, "to_k"), (attention, "to_v"), (block, "proj_mlp"),
                            (block, "proj_out"), (block.norm, "linear")]:
            setattr(owner, name, Lora(getattr(owner, name), RANK, **place))
    student = torch.nn.ModuleList([before, Replacement(width, **place), after])
    trained = [value for value in student.parameters() if value.requires_grad]
    adam = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    matrices, vectors = ([value for value in trained if (value.ndim == 2) == matrix] for matrix in (True, False))
    optimisers = {"adamw": [torch.optim.AdamW(trained, **adam)]}
    if hasattr(torch.optim, "Muon"):  # from PyTorch 2.9 on; what fastflux trains with
        optimisers["muon"] = [torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.0), torch.optim.AdamW(vectors, **adam)]

    @torch.no_grad()
    def prepare():
        noise = torch.randn_like(given["hidden_states"])
        start = run(prefix, flux.x_embedder(noise), flux.context_embedder(given["encoder_hidden_states"]))
        return start, run(teacher, *start)

    def learn(start, wanted, by):
        student.zero_grad(set_to_none=True)
        got = run(student, *start, checkpointing=True)
        loss = sum(((a - b).float() ** 2).mean() for a, b in zip(got, wanted))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimiser in optimisers[by]:
            optimiser.step()

    return prepare, learn, optimisers


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", choices=["whole", "blocks"], help="time torch.compile's result too; blocks: each kind of block is compiled "
                        "once, in a fraction of the time")
    parser.add_argument("--train", action="store_true", help="time a step of training one sandwich too")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement, about")
    parser.add_argument("--size", type=int, default=1024, help="side of the image in pixels")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this script out")
    parser.add_argument("--ready", type=pathlib.Path, help="write this file when all is compiled and warm")
    parser.add_argument("--hold", type=pathlib.Path, help="then wait until this file is there")
    return parser.parse_args()


def main():
    args = arguments()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here")
    place = {"device": device, "dtype": torch.bfloat16}
    clock = Clock(device)
    heads, double, single, text_width, pooled = (1, 5, 7, 64, 64) if args.tiny else (24, 19, 38, 4096, 768)
    config = dict(
        patch_size=1, in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=heads,
        joint_attention_dim=text_width, pooled_projection_dim=pooled, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )
    torch.manual_seed(0)
    flux = random_model(config, place)
    given = inputs(config, args.size // 16, args.text_tokens, place)
    out = {"torch": torch.__version__, "size": args.size, "text_tokens": args.text_tokens, "tiny": args.tiny}
    if clock.cuda:
        out["device"] = torch.cuda.get_device_name()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        measure(args, out, clock, place, config, flux, given)
    finally:  # what there is, also when it took too long
        if clock.cuda:
            out["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(out, indent=1))


def measure(args, out, clock, place, config, flux, given):
    """Fills `out`."""

    def warm(model):
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(3):
                velocity = model(**given)[0]
        if not torch.isfinite(velocity).all():
            sys.exit("the random transformer gave numbers that are not finite")
        return time.perf_counter() - start

    def step(name, model, stance="default"):
        with torch.no_grad(), torch.compiler.set_stance(stance):
            clock.median(out, name, lambda: model(**given), args.seconds)

    compiled = None
    warm(flux)
    if args.compile:
        try:
            if args.compile == "blocks":
                flux.compile_repeated_blocks()
                compiled = flux
            else:
                compiled = torch.compile(flux)
            out["compiled"], out["compile_seconds"] = args.compile, warm(compiled)
        except Exception as error:  # whatever a compiler may raise; the eager figures are still worth having
            compiled = None
            out["compile_error"] = str(error)[:500]
    if args.ready:
        args.ready.touch()
    while args.hold and not args.hold.exists():
        time.sleep(0.1)
    peaks(out, clock, place, min(args.seconds, 1.0), args.tiny)
    step("eager", flux, "force_eager")
    if compiled is not None:
        step("compiled", compiled)
    width = config["attention_head_dim"] * config["num_attention_heads"]
    if args.train:
        with torch.compiler.set_stance("force_eager"):
            prepare, learn, optimisers = sandwich_step(flux, given, place, width)
            clock.median(out, "sandwich_step", lambda: learn(*prepare(), "adamw"), args.seconds)
            prepared = prepare()
            for by in optimisers:
                clock.median(out, f"sandwich_learn_{by}", lambda: learn(*prepared, by), args.seconds)
    pruned = replace(flux, width, place)
    step("pruned_eager", pruned, "force_eager")


if __name__ == "__main__":
    main()
