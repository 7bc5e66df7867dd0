# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "lpips", "numpy", "safetensors"]
# ///
"""Make tests/golden/lpips.safetensors: what the `lpips` package computes with weights that follow from a formula.

`image.N` (uint8, height × width × 3) are compared in pairs (0 with 1, 2 with 3); the metadata hold the distances. The weights have
millions of values, so they are not in the file: the test in src/eval/lpips.rs makes the same ones. `--save FOLDER` writes them as
`alex.safetensors` and `vgg.safetensors`, to be given to `fastflux eval --lpips`.
"""

import argparse
import json
import pathlib

import lpips
import numpy as np
import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/lpips.safetensors"
SIZES = [(64, 64), (41, 67)]  # height, width


def hashed(place, count):
    """Numbers in 0..1 from 32-bit arithmetic."""
    x = (np.arange(1, count + 1, dtype=np.uint64) * 0x9E3779B1 + np.uint64(place) * 0x85EBCA77) & 0xFFFFFFFF
    x ^= x >> np.uint64(15)
    x = (x * 0x2C1B3C6D) & 0xFFFFFFFF
    x ^= x >> np.uint64(12)
    return x.astype(np.float64) / 2**32


def weights(net):
    """A state dict of the package, without the names that it has for the same tensors again."""
    out = {}
    model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).eval()
    names = [name for name in model.state_dict() if not name.startswith(("lins.", "scaling_layer."))]
    for place, name in enumerate(sorted(names)):
        shape = model.state_dict()[name].shape
        u = hashed(place, shape.numel())
        if name.startswith("lin"):
            value = u
        elif name.endswith("bias"):
            value = (u - 0.5) * 0.2
        else:
            value = (u - 0.5) * 2 * (6 / shape[1:].numel()) ** 0.5
        out[name] = torch.from_numpy(value.astype(np.float32)).reshape(shape)
    missing, unexpected = model.load_state_dict(out, strict=False)
    assert not unexpected and all(name.startswith(("lins.", "scaling_layer.")) for name in missing)
    return model, out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=pathlib.Path, metavar="FOLDER")
    args = parser.parse_args()
    rng = np.random.default_rng(6)
    tensors = {}
    for pair, (height, width) in enumerate(SIZES):
        image = rng.integers(0, 256, (height, width, 3))
        other = np.clip(image + rng.integers(-50, 50, image.shape), 0, 255)
        tensors |= {f"image.{2 * pair + i}": torch.from_numpy(x.astype(np.uint8)) for i, x in enumerate((image, other))}
    distances = {}
    for net in ("alex", "vgg"):
        model, state = weights(net)
        if args.save:
            args.save.mkdir(exist_ok=True)
            save_file(state, args.save / f"{net}.safetensors")
        as_input = lambda i: lpips.im2tensor(tensors[f"image.{i}"].numpy())
        with torch.no_grad():
            distances[net] = [model(as_input(2 * pair), as_input(2 * pair + 1)).item() for pair in range(len(SIZES))]
    print(distances)
    save_file(tensors, OUT, metadata={"distances": json.dumps(distances)})


main()
