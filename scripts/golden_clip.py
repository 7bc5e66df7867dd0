# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "transformers>=5", "safetensors", "pillow"]
# ///
"""Make tests/golden/clip: a tiny random CLIP in transformers layout, and what transformers computes with it.

`reference.safetensors` holds images (`image.N`, uint8, height × width × 3), what the processor makes of them (`pixels`), and the
normalised embeddings `image` and `text` of images and of the prompts in the metadata. The tokenizer is that of tests/golden/dev.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests/golden"
OUT = GOLDEN / "clip"
PROMPTS = ["a photo of a small red house under a tall tree, at night", "", "Two dogs run, & the sea!"]
SIZES = [(64, 64), (40, 30), (31, 90), (200, 120)]  # width, height: enlarged and reduced, across and upright


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def main():
    OUT.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "dev/pipe/tokenizer" / name, OUT / name)
    tokenizer = CLIPTokenizer.from_pretrained(OUT)
    torch.manual_seed(3)
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu"}
    text = {**shared, "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3,
            "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id, "hidden_act": "quick_gelu"}
    vision = {**shared, "hidden_size": 32, "intermediate_size": 72, "num_attention_heads": 4, "image_size": 48, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start is too small for mistakes to show
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(OUT)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor.save_pretrained(OUT)

    rng = np.random.default_rng(4)
    images = []
    for width, height in SIZES:
        smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.int64) + rng.integers(-60, 60, (height, width, 3))
        images.append(np.clip(noisy, 0, 255).astype(np.uint8))
    pixels = processor(images=[Image.fromarray(p) for p in images], return_tensors="pt")["pixel_values"]
    ids = tokenizer(PROMPTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    tensors = {f"image.{i}": torch.from_numpy(p.copy()) for i, p in enumerate(images)}
    tensors |= {"pixels": pixels, "image": unit(out.image_embeds), "text": unit(out.text_embeds)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, OUT / "reference.safetensors", metadata={"prompts": json.dumps(PROMPTS)})


main()
