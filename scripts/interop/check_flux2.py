# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.42", "transformers>=5", "safetensors", "accelerate"]
# ///
"""The comparison of check_diffusers.py for FLUX.2: a small random pipeline pruned in every form, opened in diffusers.

    python scripts/interop/check_flux2.py [--fastflux target/release/fastflux] [--cases linear,remove]

The model is that of tests/golden/flux2, which `golden_flux2.py` makes. Exit status 1 when a case fails.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoModel, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
from check_diffusers import fastflux  # noqa: E402
from fastflux_flux import FastFlux2Transformer2DModel  # noqa: E402

# name: blocks, --form, one layer for both streams
CASES = {
    "linear": ("single.01", "linear", False),
    "double": ("double.00", "linear", False),
    "joint, across the kinds": ("double.00,single.00", "linear", True),
    "conditioned": ("single.00", "conditioned", False),
    "modulated": ("double.00,single.01", "modulated", False),
    "remove": ("single.00", "remove", False),
}
PROMPT, TEXT, SIDE, STEPS = "a red house", 24, 64, 4


def record(model, pipeline, path):
    """One call of the transformer, and a whole image."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    n, width = SIDE // 16, model.config.joint_attention_dim
    img, txt, timestep = normal(2, n * n, model.config.in_channels), normal(2, TEXT, width), torch.rand(2, generator=generator)
    line = torch.arange
    img_ids = torch.cartesian_prod(line(1), line(n), line(n), line(1))
    txt_ids = torch.cartesian_prod(line(1), line(1), line(1), line(TEXT))
    velocity = model(img, txt, timestep, img_ids, txt_ids, return_dict=False)[0]
    values = {"img": img, "txt": txt, "timestep": timestep, "img_ids": img_ids, "txt_ids": txt_ids, "velocity": velocity}
    tensors = {f"transformer.{name}": value for name, value in values.items()}
    pipe = Flux2KleinPipeline.from_pretrained(pipeline, transformer=model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    latents = normal(1, model.config.in_channels, n, n)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": 1.0, "max_sequence_length": TEXT}
    tensors["pipeline.latents"] = latents
    tensors["pipeline.image"] = pipe(prompt=PROMPT, latents=latents.clone(), output_type="pt", **options).images
    metadata = {"prompt": PROMPT, "height": SIDE, "width": SIDE, "steps": STEPS, "guidance": 1.0, "text_len": TEXT}
    tensors = {name: (t.float() if t.is_floating_point() else t.long()).contiguous() for name, t in tensors.items()}
    save_file(tensors, path, metadata={key: str(value) for key, value in metadata.items()})


@torch.no_grad()
def check(args, work, blocks, form, joint):
    pipeline = work / "pipe"
    shutil.copytree(ROOT / "tests/golden/flux2/pipe", pipeline)
    (pipeline / "fastflux.json").write_text(json.dumps({"text-length": TEXT, "size": SIDE}))
    recipe = work / "recipe.json"
    recipe.write_text(json.dumps({"calibration": {"num-prompts": 16}, "score": {"held-out": 16}, "fit": {"joint": joint}}))
    pruned, single, reference = work / "pruned", work / "flux.safetensors", work / "reference.safetensors"
    command = ["prune", "--model", pipeline, "--blocks", blocks, "--form", form, "--recipe", recipe, "--layout", "diffusers", "--output", pruned]
    if fastflux(args, *command).returncode != 0:
        return False
    folder = str(pruned / "transformer")
    if form == "remove":
        model = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
    if fastflux(args, "convert", "--model", pruned, "--dtype", "f32", "--output", single).returncode != 0:
        return False
    ours, theirs = model.state_dict(), FastFlux2Transformer2DModel.from_single_file(single, torch_dtype=torch.float32).state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"    {len(ours)} tensors from the single file: {'equal' if same else 'NOT EQUAL'}")
    record(model, pipeline, reference)
    verified = fastflux(args, "verify", "--model", pruned, "--reference", reference, "--json")
    for tensor in json.loads(verified.stdout)["tensors"]:
        print(f"    {tensor['name']:32} relative error {tensor['relative']:.1e}{'' if tensor['ok'] else '  OFF'}")
    return same and verified.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastflux", default=ROOT / "target/release/fastflux")
    parser.add_argument("--cases", help="those whose names start so, separated by commas; default: all")
    args = parser.parse_args()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    wanted = tuple(args.cases.split(",")) if args.cases else ("",)
    failed = []
    for name, (blocks, form, joint) in CASES.items():
        if not name.startswith(wanted):
            continue
        print(f"{name}: {blocks} --form {form}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            if not check(args, pathlib.Path(work), blocks, form, joint):
                failed.append(name)
    print(f"FAILED: {', '.join(failed)}" if failed else "all agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
