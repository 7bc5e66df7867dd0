# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35", "transformers", "sentencepiece"]
# ///
"""How far diffusers' images in bfloat16 are from its own in float32: what `check_gpu.sh` judges fastflux's bfloat16 by.

    python scripts/bf16_images.py            # the bundled model, its first 16 captions, 12 steps, one noise for all; on the CPU

Prints the root mean square and the largest difference, of 255.
"""

import pathlib

import numpy
import torch
from diffusers import FluxPipeline

TINY = pathlib.Path(__file__).resolve().parent.parent / "configs" / "tiny"
SIDE, STEPS = 64, 12


def images(dtype, captions):
    """(captions, SIDE, SIDE, 3), rounded, of 255."""
    pipe = FluxPipeline.from_pretrained(TINY, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    channels, side = pipe.transformer.config.in_channels // 4, 2 * (SIDE // (2 * pipe.vae_scale_factor))
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(3))
    latents = pipe._pack_latents(noise, 1, channels, side, side).to(dtype)
    draw = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": 3.5, "latents": latents,
            "max_sequence_length": 48, "output_type": "np"}
    return numpy.round(255 * numpy.stack([pipe(caption, **draw).images[0] for caption in captions]))


def main():
    captions = (TINY / "prompts.txt").read_text().splitlines()[:16]
    difference = images(torch.bfloat16, captions) - images(torch.float32, captions)
    print(f"{(difference ** 2).mean() ** 0.5:.4f} {abs(difference).max():.0f}")


if __name__ == "__main__":
    main()
