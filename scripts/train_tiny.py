# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35", "transformers>=5", "safetensors", "sentencepiece", "numpy", "pillow"]
# ///
"""Train a text-to-image pipeline like configs/tiny from nothing on procedurally drawn, captioned scenes (scenes.py).

    python scripts/train_tiny.py OUT [--steps 1264] [--seed 0] [--dtype bfloat16] [--family flux2] [--start OUT1]

Writes a pipeline in diffusers layout that fastflux opens (`fastflux generate --model OUT …`) and prints its score. Sizes and tokenizers are
those of configs/tiny; every weight is new. Text encoders and transformer are trained together by flow matching. The VAE's latents are fixed
from the start (principal components of 8×8 patches), its decoder learns to draw from them and its encoder to give them, so that all of it
can be trained at the same time.
"""

import argparse
import copy
import json
import math
import pathlib
import random
import shutil
import time

import diffusers
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDE, PATCH, CHANNELS = 64, 8, 16


def draw_batch(rng, count):
    """Images (count, 3, 64, 64) in [-1, 1], and their captions."""
    drawn = [scenes.draw_scene(rng) for _ in range(count)]
    images = np.stack([scenes.render(scene, SIDE) for scene in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, [scenes.caption(scene) for scene in drawn]


class Latents:
    """Images → fixed latents: the first principal components of patches, partly whitened, of variance 1 in all."""

    def __init__(self, images):
        patches = self.patches(images).flatten(0, 2)
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T))
        kept, self.vectors = values[-CHANNELS:], vectors[:, -CHANNELS:]
        self.share = float(kept.sum() / values.sum())
        self.scale = kept ** -0.25  # half way to white: fine detail gets some weight, noise not all
        self.scale = self.scale / (kept * self.scale**2).mean().sqrt()

    @staticmethod
    def patches(images):
        b, c, h, w = images.shape
        cut = images.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (b, 8, 8, 192)

    def __call__(self, images):
        return (((self.patches(images) - self.mean) @ self.vectors) * self.scale).permute(0, 3, 1, 2).contiguous()


def pack(latents):
    return FluxPipeline._pack_latents(latents, len(latents), *latents.shape[1:])


def position_ids(latents):
    return FluxPipeline._prepare_latent_image_ids(len(latents), latents.shape[2] // 2, latents.shape[3] // 2, "cpu", torch.float32)


def build(like, blocks, heads):
    """New weights in the sizes of a pipeline folder, but for the transformer's blocks (double, single) and heads where given."""
    config = lambda part: json.loads((like / part / "config.json").read_text())
    own = lambda cls, part, **sizes: cls.from_config(cls.load_config(like / part) | sizes)
    sizes = dict(zip(("num_layers", "num_single_layers"), blocks or ()))
    if heads:
        sizes["num_attention_heads"] = heads
    transformer = own(FluxTransformer2DModel, "transformer", **sizes)
    vae = own(AutoencoderKL, "vae")
    clip = CLIPTextModel(CLIPTextConfig(**config("text_encoder"))).float()
    t5 = T5EncoderModel(T5Config(**config("text_encoder_2"))).float()
    for name, weights in transformer.named_parameters():
        # the model starts as zero velocity, every block as the identity
        if name.endswith(".bias") or ".linear." in name and "norm" in name or name.startswith("proj_out"):
            torch.nn.init.zeros_(weights)
        elif weights.dim() == 2:
            torch.nn.init.normal_(weights, std=weights.shape[1] ** -0.5)
    with torch.no_grad():
        # FLUX gives text no positions, so word order can only come from T5: heads that look at the words around
        bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        half = t5.config.relative_attention_num_buckets // 2
        for head, bucket in zip(range(bias.shape[1]), (1, half + 1, 2, half + 2)):
            bias[:, head] = -2.0
            bias[bucket, head] = 4.0
    return transformer, vae, clip, t5


class Flux1:
    """The model of configs/tiny: how it is built, called and written. tiny_flux2.py has the same of the other family."""

    guidance = 3.5

    def __init__(self, args, _):
        self.transformer, self.vae, clip, t5 = build(args.like, args.blocks, args.heads)
        self.clip, self.t5 = clip, t5
        self.tokenizers = CLIPTokenizer.from_pretrained(args.like / "tokenizer"), T5Tokenizer.from_pretrained(args.like / "tokenizer_2")
        self.trained = torch.nn.ModuleList([self.transformer, clip, t5])
        self.parts = {"transformer": self.transformer, "vae": self.vae, "text_encoder": clip, "text_encoder_2": t5}
        self.steps = json.loads((args.like / "fastflux.json").read_text())["steps"]

    def pack(self, latents):
        return pack(latents)

    def velocity(self, noised, captions, t):
        def ids(tokenizer):
            given = tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
            return given.input_ids

        pooled = self.clip(ids(self.tokenizers[0])).pooler_output
        text = self.t5(ids(self.tokenizers[1]))[0]
        return self.transformer(
            hidden_states=pack(noised), encoder_hidden_states=text, pooled_projections=pooled, timestep=t,
            guidance=1 + 4 * torch.rand(len(noised)), img_ids=position_ids(noised), txt_ids=torch.zeros(text.shape[1], 3),
        ).sample

    def pipeline(self, average, like):
        transformer, clip, t5 = average
        self.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)  # the latents have variance 1 as they are
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(FlowMatchEulerDiscreteScheduler.load_config(like / "scheduler"))
        return FluxPipeline(
            scheduler=scheduler, vae=self.vae.eval(), text_encoder=clip.eval(), tokenizer=self.tokenizers[0],
            text_encoder_2=t5.eval(), tokenizer_2=self.tokenizers[1], transformer=transformer.eval(),
        )

    def save(self, pipe, out, like):
        pipe.save_config(out)
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
            getattr(pipe, name).save_pretrained(out / name)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(like / name, out / name)
        shutil.copy(like / "fastflux.json", out / "fastflux.json")

    def options(self):
        return {"max_sequence_length": self.tokenizers[1].model_max_length, "num_inference_steps": self.steps}


def family_of(args):
    """The family that is trained, with new weights."""
    if args.family == "flux2":
        from tiny_flux2 import Flux2

        return Flux2(args, random.Random(args.seed + 2))
    return Flux1(args, None)


def rate(step, steps, warm_up=60):
    if step < warm_up:
        return (step + 1) / warm_up
    late = max(0.0, (step - steps / 2) / max(1.0, steps / 2))
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * late))


def train(args):
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    family = family_of(args)
    vae = family.vae
    if args.start:
        for name, part in family.parts.items():
            part.load_state_dict(type(part).from_pretrained(args.start / name, torch_dtype=torch.float32).state_dict())
    seen = draw_batch(random.Random(1), 1024)[0]
    latents_of = Latents(seen)
    print(f"latents hold {100 * latents_of.share:.1f} % of the images' variance", flush=True)
    if args.start:
        with torch.no_grad():
            error = F.mse_loss(vae.encode(seen[:32]).latent_dist.mean, latents_of(seen[:32]))
        print(f"the VAE gives them with an error of {error.item():.4f}", flush=True)

    words = family.trained
    average = copy.deepcopy(words).requires_grad_(False)
    optimizer = torch.optim.AdamW(words.parameters(), lr=args.lr, betas=(0.9, 0.96), weight_decay=0.01)
    vae_optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.96))
    half = lambda: torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)
    start, losses = time.time(), []
    for step in range(args.steps):
        images, captions = draw_batch(rng, args.batch)
        clean = latents_of(images)
        for optim, factor in ((optimizer, args.lr), (vae_optimizer, 1.5e-3)):
            for group in optim.param_groups:
                group["lr"] = factor * rate(step, args.steps)
        t = torch.sigmoid(0.3 + torch.randn(len(clean)))
        noise = torch.randn_like(clean)
        noised = (1 - t)[:, None, None, None] * clean + t[:, None, None, None] * noise
        with half():
            velocity = family.velocity(noised, captions, t)
        loss = F.mse_loss(velocity.float(), family.pack(noise - clean))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(words.parameters(), 1.0)
        optimizer.step()
        keep = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), words.parameters()):
                mean.lerp_(now, 1 - keep)
        losses.append(loss.item())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            recent = sum(losses[-args.every :]) / len(losses[-args.every :])
            print(f"step {step + 1}: velocity loss {recent:.4f}, {time.time() - start:.0f} s", flush=True)
        if args.start:
            continue  # the VAE has converged
        # the VAE on a part of the batch: it converges far sooner
        few = slice(0, max(1, args.batch // 4))
        with half():
            drawn = vae.decode(clean[few] + 0.1 * torch.randn_like(clean[few])).sample
            seen = vae.encode(images[few]).latent_dist
        error = F.mse_loss(drawn.float(), images[few]) + 0.1 * F.l1_loss(drawn.float(), images[few])
        vae_loss = error + F.mse_loss(seen.mean.float(), clean[few]) + 1e-3 * (seen.logvar.float() + 6).square().mean()
        vae_optimizer.zero_grad()
        vae_loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        vae_optimizer.step()
        if (step + 1) % args.every == 0:
            print(f"    VAE loss {vae_loss.item():.4f}", flush=True)
    return family, family.pipeline(average, args.like)


def score(pipe, family, count, seed):
    rng, verdicts = random.Random(seed), []
    for first in range(0, count, 32):
        wanted = [scenes.draw_scene(rng) for _ in range(min(32, count - first))]
        out = pipe(
            prompt=[scenes.caption(scene) for scene in wanted], height=SIDE, width=SIDE, guidance_scale=family.guidance,
            generator=torch.Generator().manual_seed(seed + first), output_type="np", **family.options(),
        )
        verdicts += [scenes.judge(scene, np.rint(255 * image)) for scene, image in zip(wanted, out.images)]
    return {name: sum(v[name] for v in verdicts) / len(verdicts) for name in verdicts[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="new folder to write")
    parser.add_argument("--like", type=pathlib.Path, default=ROOT / "configs/tiny", help="pipeline whose sizes and tokenizers to take")
    pair = lambda text: tuple(int(number) for number in text.split(","))
    parser.add_argument("--blocks", type=pair, metavar="DOUBLE,SINGLE", help="other numbers of blocks than there (flux1)")
    parser.add_argument("--heads", type=int, help="another number of heads of 32 (flux1)")
    parser.add_argument("--family", choices=["flux1", "flux2"], default="flux1")
    parser.add_argument("--start", type=pathlib.Path, help="pipeline that this script wrote: go on from its weights, its VAE stays as it is")
    parser.add_argument("--steps", type=int, default=1264)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights in float32: faster where the CPU has AMX or AVX-512 BF16")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of what is written")
    parser.add_argument("--every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--score", type=int, default=128, help="captions to score on")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    diffusers.utils.logging.set_verbosity_error()

    family, pipe = train(args)
    pipe = pipe.to(getattr(torch, args.dtype))
    family.save(pipe, args.out, args.like)
    pipe = pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    steps = family.options()["num_inference_steps"]
    result = score(pipe, family, args.score, 1000)
    print(f"{args.out}: {100 * result['ok']:.1f} % of {args.score} captions right at {steps} steps;", json.dumps(result))


if __name__ == "__main__":
    main()
