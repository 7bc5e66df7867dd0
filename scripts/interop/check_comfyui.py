"""Prune a small random FLUX in every form, open it in ComfyUI with `comfyui_fastflux.py`, and compare the velocity with fastflux's.

    python scripts/interop/check_comfyui.py COMFYUI [--fastflux target/release/fastflux]

COMFYUI is a checkout of ComfyUI whose requirements the interpreter has, and diffusers besides (for `make_tiny_pipeline.py`). Nothing is written into
it. Runs on the CPU in float32; two steps with ComfyUI's own sampler must run as well. What was only removed is opened by ComfyUI alone. Exit status
1 when a case fails.
"""

import argparse
import importlib.machinery
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
# name: blocks, --form, one layer for both streams
CASES = {
    "linear": ("double.00,single.02-03", "linear", False),
    "joint, across the kinds": ("double.03,single.00-01", "linear", True),
    "conditioned": ("double.01,single.05", "conditioned", False),
    "modulated": ("double.03,single.00", "modulated", False),
    "remove": ("double.00,single.01-02", "remove", False),
}
# latent pixels and text tokens of the compared call
BATCH, CHANNELS, HEIGHT, WIDTH, TEXT = 2, 16, 8, 6, 16


# a LoRA in these dialects on the first case: how a module of the original is called, and its two factors
DIALECTS = {
    "kohya": (lambda name: "lora_unet_" + name.replace(".", "_"), ("lora_down", "lora_up")),
    "original names": (lambda name: "diffusion_model." + name, ("lora_A", "lora_B")),
    "diffusers": (lambda name: "transformer." + DIFFUSERS[name], ("lora_A", "lora_B")),
    "OneTrainer": (lambda name: "lora_transformer_" + DIFFUSERS[name].replace(".", "_"), ("lora_down", "lora_up")),
    "XLabs": (lambda name: XLABS[name], ("down", "up")),
}
# modules of a model of two heads, and their sizes; double.00 is replaced in the first case
WIDTH = 256
MODULES = {"double_blocks.2.img_attn.proj": (WIDTH, WIDTH), "single_blocks.4.linear2": (5 * WIDTH, WIDTH), "double_blocks.0.txt_attn.proj": (WIDTH, WIDTH)}
DIFFUSERS = {
    "double_blocks.2.img_attn.proj": "transformer_blocks.2.attn.to_out.0", "single_blocks.4.linear2": "single_transformer_blocks.4.proj_out",
    "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
}  # fmt: skip
XLABS = {
    "double_blocks.2.img_attn.proj": "double_blocks.2.processor.proj_lora1", "single_blocks.4.linear2": "single_blocks.4.processor.proj_lora",
    "double_blocks.0.txt_attn.proj": "double_blocks.0.processor.proj_lora2",
}  # fmt: skip


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=pathlib.Path, metavar="COMFYUI")
    parser.add_argument("--fastflux", default=ROOT / "target/release/fastflux")
    return parser.parse_args()


def stand_in(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return object


def stand_in_for(*names):
    for name in names:
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        module.__getattr__ = stand_in
        sys.modules[name] = module


def start_comfyui(folder):
    """ComfyUI reads its flags from the command line when it is imported."""
    sys.argv = [sys.argv[0], "--cpu", "--force-fp32"]
    sys.path[:0] = [str(folder), str(ROOT / "scripts/interop")]
    sys.dont_write_bytecode = True
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        # ComfyUI imports it for models of sound; nothing of it is called here
        stand_in_for("torchaudio", "torchaudio.functional", "torchaudio.transforms")
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        stand_in_for("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    import comfy.options

    comfy.options.enable_args_parsing()


def packed(x):
    """(batch, 16, height, width) to (batch, tokens, 64)."""
    x = x.view(BATCH, CHANNELS, HEIGHT // 2, 2, WIDTH // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(BATCH, -1, 4 * CHANNELS).contiguous()


@torch.no_grad()
def record(patcher, path):
    """One call as a file for `fastflux verify`, and two steps of sampling."""
    import comfy.model_management
    import comfy.sample

    comfy.model_management.load_models_gpu([patcher])
    flux = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH, generator=generator)
    txt = torch.randn(BATCH, TEXT, flux.txt_in.in_features, generator=generator)
    vec = torch.randn(BATCH, flux.params.vec_in_dim, generator=generator)
    timestep, guidance = torch.tensor([0.3, 0.8]), torch.tensor([1.0, 5.0])
    velocity = flux(x.clone(), timestep, txt.clone(), y=vec, guidance=guidance, transformer_options={})
    rows, columns = torch.meshgrid(torch.arange(HEIGHT // 2), torch.arange(WIDTH // 2), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    tensors = {
        "img": packed(x), "txt": txt, "vec": vec, "timestep": timestep, "guidance": guidance, "img_ids": img_ids,
        "txt_ids": torch.zeros(TEXT, 3), "velocity": packed(velocity),
    }  # fmt: skip
    facts = {"prompt": "", "image_seed": "0", "height": "64", "width": "48", "steps": "1", "guidance": "3.5", "dtype": "float32", "t5_len": str(TEXT)}
    save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, path, metadata=facts)

    text = [[txt[:1], {"pooled_output": vec[:1], "guidance": 3.5}]]
    latents = comfy.sample.sample(patcher, x[:1], 2, 1.0, "euler", "simple", text, text, torch.zeros_like(x[:1]), seed=0)
    return bool(latents.isfinite().all())


def check(args, base, work, blocks, form, joint):
    import comfy.sd
    import folder_paths
    from comfyui_fastflux import LoadFastFlux

    recipe, pruned, reference = work / "recipe.json", work / "pruned", work / "reference.safetensors"
    recipe.write_text(json.dumps({"calibration": {"num-prompts": 8}, "fit": {"joint": joint}}))
    command = ["prune", "--model", base, "--blocks", blocks, "--form", form, "--recipe", recipe, "--output", pruned, "--quiet"]
    subprocess.run([args.fastflux, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    if form == "remove":
        patcher = comfy.sd.load_diffusion_model(str(pruned / "flux.safetensors"))
    else:
        folder_paths.folder_names_and_paths["diffusion_models"] = ([str(pruned)], {".safetensors"})
        folder_paths.filename_list_cache.clear()
        (patcher,) = LoadFastFlux().load(LoadFastFlux.INPUT_TYPES()["required"]["unet_name"][0][0])
    sampled = record(patcher, reference)
    command = [args.fastflux, "verify", "--quiet", "--model", str(pruned), "--reference", str(reference)]
    return subprocess.run(command, check=False).returncode == 0 and sampled


def check_lora(args, pruned, work):
    """A LoRA of every dialect, through the node's own names, against fastflux; and one that must be refused."""
    import comfy.sd
    from comfyui_fastflux import known_names, load

    failed = []
    for dialect, (spell, words) in DIALECTS.items():
        generator = torch.Generator().manual_seed(5)
        lora = {}
        for name, (columns, rows) in MODULES.items():
            factors = torch.randn(4, columns, generator=generator) * 0.2, torch.randn(rows, 4, generator=generator) * 0.2
            lora |= {f"{spell(name)}.{word}.weight": factor for word, factor in zip(words, factors)}
        path, reference = work / "lora.safetensors", work / "lora.reference.safetensors"
        save_file(lora, path)
        patcher = load(str(pruned / "flux.safetensors"))
        patcher, _ = comfy.sd.load_lora_for_models(patcher, None, known_names(lora, patcher.model, None), 1.0, 0.0)
        record(patcher, reference)
        command = [args.fastflux, "verify", "--quiet", "--model", str(pruned), "--lora", str(path), "--reference", str(reference)]
        print(f"a LoRA in {dialect} names", flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(f"LoRA, {dialect}")
    try:
        known_names({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 8)}, patcher.model, None)
        failed.append("an SDXL LoRA was not refused")
    except ValueError as error:
        print(f"refused: {error}")
    return failed


def main():
    args = parsed()
    start_comfyui(args.comfyui.resolve())
    failed = []
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        # two heads of FLUX.1's size: ComfyUI tells the sizes from the tensors, but not the rotary axes
        sizes = ["--heads", "2", "--axes", "16,56,56", "--double", "4", "--single", "6", "--guidance"]
        make = [sys.executable, str(ROOT / "scripts/make_tiny_pipeline.py"), str(work / "base"), *sizes]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, (blocks, form, joint) in CASES.items():
            print(f"{name}: {blocks} --form {form}", flush=True)
            folder = work / name.split(",")[0]
            folder.mkdir()
            if not check(args, work / "base/pipe", folder, blocks, form, joint):
                failed.append(name)
        failed += check_lora(args, work / "linear/pruned", work)
        print(f"FAILED: {', '.join(failed)}" if failed else "all agree", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
