"""Prune a small random FLUX.1 and FLUX.2 in every form, open them in ComfyUI with `comfyui_fastflux.py`, and compare the velocity with fastflux's.

    python scripts/interop/check_comfyui.py COMFYUI [--fastflux target/release/fastflux] [--family flux2] [--cases linear,patch]

COMFYUI is a checkout of ComfyUI whose requirements the interpreter has, and diffusers besides (for `make_tiny_pipeline.py` and `golden_flux2.py`).
Nothing is written into it. Runs on the CPU in float32; two steps with ComfyUI's own sampler must run as well. The whole model and what was only removed
are opened by ComfyUI alone. The model that a patch makes of its base is compared too, and LoRA of every dialect. Exit status 1 when a case fails.
"""

import argparse
import importlib.machinery
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
# sizes of the compared call: images, tokens of the text, heads of 128
BATCH, TEXT, WIDTH = 2, 16, 256


class Flux1:
    """Four double and six single blocks: ComfyUI tells the sizes from the tensors, but not the rotary axes."""

    # name: blocks, --form, one layer for both streams; the LoRA and the patch are for the first
    cases = {
        "linear": ("double.00,single.02-03", "linear", False),
        "joint, across the kinds": ("double.03,single.00-01", "linear", True),
        "conditioned": ("double.01,single.05", "conditioned", False),
        "modulated": ("double.03,single.00", "modulated", False),
        "remove": ("double.00,single.01-02", "remove", False),
    }
    # modules under the original and diffusers' names and XLabs', and their sizes; double.00 is replaced in the first case
    modules = [
        ("double_blocks.2.img_attn.proj", "transformer_blocks.2.attn.to_out.0", "double_blocks.2.processor.proj_lora1", (WIDTH, WIDTH)),
        ("single_blocks.4.linear2", "single_transformer_blocks.4.proj_out", "single_blocks.4.processor.proj_lora", (5 * WIDTH, WIDTH)),
        ("double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out", "double_blocks.0.processor.proj_lora2", (WIDTH, WIDTH)),
    ]
    channels, height, width = 16, 8, 6

    def make(self, folder):
        sizes = ["--heads", "2", "--axes", "16,56,56", "--double", "4", "--single", "6", "--guidance"]
        return [str(ROOT / "scripts/make_tiny_pipeline.py"), str(folder), *sizes]

    def packed(self, x):
        """(batch, 16, height, width) to (batch, tokens, 64)."""
        x = x.view(BATCH, self.channels, self.height // 2, 2, self.width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(BATCH, -1, 4 * self.channels).contiguous()

    def call(self, flux, x, txt, vec):
        """What one call is given and gives, as a file for `verify` has it."""
        timestep, guidance = torch.tensor([0.3, 0.8]), torch.tensor([1.0, 5.0])
        velocity = flux(x.clone(), timestep, txt.clone(), y=vec, guidance=guidance, transformer_options={})
        img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(self.height // 2), torch.arange(self.width // 2)).float()
        return {
            "img": self.packed(x), "vec": vec, "timestep": timestep, "guidance": guidance, "img_ids": img_ids, "txt_ids": torch.zeros(TEXT, 3),
            "velocity": self.packed(velocity),
        }  # fmt: skip


class Flux2:
    """Three double and six single blocks; the call has a reference image."""

    cases = {
        "linear": ("double.00,single.02-03", "linear", False),
        "joint, across the kinds": ("double.02,single.00-01", "linear", True),
        "conditioned": ("double.01,single.05", "conditioned", False),
        "modulated": ("double.02,single.00", "modulated", False),
        "remove": ("double.00,single.01-02", "remove", False),
    }
    modules = [
        ("double_blocks.2.img_attn.proj", "transformer_blocks.2.attn.to_out.0", None, (WIDTH, WIDTH)),
        ("single_blocks.4.linear1", "single_transformer_blocks.4.attn.to_qkv_mlp_proj", None, (WIDTH, 9 * WIDTH)),
        ("single_blocks.4.linear2", "single_transformer_blocks.4.attn.to_out", None, (4 * WIDTH, WIDTH)),
        ("double_blocks.1.txt_mlp.0", "transformer_blocks.1.ff_context.linear_in", None, (WIDTH, 6 * WIDTH)),
        ("double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out", None, (WIDTH, WIDTH)),
    ]
    channels, height, width = 128, 4, 3

    def make(self, folder):
        return [str(ROOT / "scripts/golden_flux2.py"), "--pipeline", str(folder)]

    def call(self, flux, x, txt, _):
        timestep, reference = torch.tensor([0.3, 0.8]), x.flip(1)[:, :, :2]
        velocity = flux(x.clone(), timestep, txt.clone(), ref_latents=[reference], transformer_options={})
        line = torch.arange
        ids = lambda index, image: torch.cartesian_prod(line(index, index + 1), line(image.shape[2]), line(image.shape[3]), line(1))
        tokens = lambda image: image.flatten(2).transpose(1, 2)
        return {
            "img": torch.cat([tokens(x), tokens(reference)], 1), "timestep": timestep, "img_ids": torch.cat([ids(0, x), ids(10, reference)]),
            "txt_ids": torch.cartesian_prod(line(1), line(1), line(1), line(TEXT)), "velocity": tokens(velocity),
        }  # fmt: skip


FAMILIES = {"flux1": Flux1, "flux2": Flux2}
# how a dialect calls a module of the lists above, and the two factors
DIALECTS = {
    "kohya": (lambda original, diffusers, xlabs: "lora_unet_" + original.replace(".", "_"), ("lora_down", "lora_up")),
    "ComfyUI": (lambda original, diffusers, xlabs: "diffusion_model." + original, ("lora_A", "lora_B")),
    "diffusers": (lambda original, diffusers, xlabs: "transformer." + diffusers, ("lora_A", "lora_B")),
    "PEFT": (lambda original, diffusers, xlabs: "base_model.model." + diffusers, ("lora_A.style", "lora_B.style")),
    "OneTrainer": (lambda original, diffusers, xlabs: "lora_transformer_" + diffusers.replace(".", "_"), ("lora_down", "lora_up")),
    "XLabs": (lambda original, diffusers, xlabs: xlabs, ("down", "up")),
}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=pathlib.Path, metavar="COMFYUI")
    parser.add_argument("--fastflux", default=ROOT / "target/release/fastflux")
    parser.add_argument("--family", choices=FAMILIES, help="default: both")
    parser.add_argument("--cases", help="those whose names start so, separated by commas, of whole, the forms, patch and LoRA; default: all")
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
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def start_comfyui(folder):
    """ComfyUI reads its flags from the command line when it is imported."""
    sys.argv = [sys.argv[0], "--cpu", "--force-fp32"]
    sys.path[:0] = [str(folder), str(ROOT / "scripts/interop")]
    sys.dont_write_bytecode = True
    # ComfyUI imports them for other models; nothing of them is called here
    for package, below in {"torchaudio": ("functional", "transforms"), "torchvision": ("ops", "transforms", "transforms.functional")}.items():
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError):
            stand_in_for(package, *(f"{package}.{name}" for name in below))
    import comfy.options

    comfy.options.enable_args_parsing()


@torch.no_grad()
def record(family, patcher, path):
    """One call as a file for `fastflux verify`, and two steps of sampling."""
    import comfy.model_management
    import comfy.sample

    comfy.model_management.load_models_gpu([patcher])
    flux = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, family.channels, family.height, family.width, generator=generator)
    txt = torch.randn(BATCH, TEXT, flux.txt_in.in_features, generator=generator)
    vec = torch.randn(BATCH, flux.params.vec_in_dim or 1, generator=generator)
    tensors = {**family.call(flux, x, txt, vec), "txt": txt}
    facts = {"prompt": "", "image_seed": 0, "height": 64, "width": 48, "steps": 1, "guidance": 3.5, "dtype": "float32", "t5_len": TEXT, "text_len": TEXT}
    tensors = {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={name: str(fact) for name, fact in facts.items()})

    text = [[txt[:1], {"pooled_output": vec[:1], "guidance": 3.5}]]
    options = {"disable_pbar": True, "seed": 0}
    latents = comfy.sample.sample(patcher, x[:1], 2, 1.0, "euler", "simple", text, text, torch.zeros_like(x[:1]), **options)
    return bool(latents.isfinite().all())


def run(args, *command, quiet=True):
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run([args.fastflux, *map(str, command), "--quiet"], check=quiet, stdout=output).returncode


def opened(folder, name, *options):
    """What the node gives for a file in a folder of models."""
    import folder_paths
    from comfyui_fastflux import LoadFastFlux

    folder_paths.folder_names_and_paths["diffusion_models"] = ([str(folder)], {".safetensors"})
    folder_paths.filename_list_cache.clear()
    if name not in LoadFastFlux.INPUT_TYPES()["required"]["unet_name"][0]:
        raise FileNotFoundError(f"{folder}/{name}")
    return LoadFastFlux().load(name, *options)[0]


def compare(args, family, patcher, work, *model):
    """Whether fastflux computes the same with `model`, and ComfyUI's sampler runs."""
    reference = work / "reference.safetensors"
    sampled = record(family, patcher, reference)
    return run(args, "verify", "--model", *model, "--reference", reference, quiet=False) == 0 and sampled


def check(args, family, base, work, blocks, form, joint):
    import comfy.sd

    recipe, pruned = work / "recipe.json", work / "pruned"
    # fitted to the tokens of 8 prompts, layers of this FLUX.2 make 1e-5 of float32's rounding
    recipe.write_text(json.dumps({"calibration": {"num-prompts": 64}, "fit": {"joint": joint}}))
    run(args, "prune", "--model", base, "--blocks", blocks, "--form", form, "--recipe", recipe, "--output", pruned)
    if form == "remove":
        patcher = comfy.sd.load_diffusion_model(str(pruned / "flux.safetensors"))
    else:
        patcher = opened(pruned, "flux.safetensors")
    return compare(args, family, patcher, work, pruned)


def check_patch(args, family, base, pruned, work):
    """The node with a base and a patch; and the patch of another base, which must be refused."""
    whole = work / "whole"
    whole.mkdir()
    shutil.copy(base / "bfl.safetensors", whole / "base.safetensors")
    run(args, "diff", "--model", pruned, "--base", whole / "base.safetensors", "--output", whole / "patch.safetensors")
    level = next(iter(json.loads(metadata(whole / "patch.safetensors")["fastflux-patch"])["levels"]))
    same = [compare(args, family, opened(whole, "base.safetensors", "patch.safetensors", name), work, pruned) for name in ("", level)]
    run(args, "convert", "--model", pruned, "--dtype", "f32", "--output", whole / "other.safetensors")
    try:
        opened(whole, "other.safetensors", "patch.safetensors")
    except ValueError as error:
        print(f"refused: {error}")
        return all(same)
    return False


def metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def check_lora(args, family, models, work):
    """A LoRA of every dialect, through the node's own names, against fastflux; and one that must be refused. `models`: for each the file that the node
    opens and what fastflux does."""
    import comfy.sd
    from comfyui_fastflux import known_names, load

    failed = []
    for dialect, (spell, words) in DIALECTS.items():
        generator = torch.Generator().manual_seed(5)
        lora = {}
        for *names, (columns, rows) in family.modules:
            factors = torch.randn(4, columns, generator=generator) * 0.2, torch.randn(rows, 4, generator=generator) * 0.2
            if spell(*names) is not None:
                lora |= {f"{spell(*names)}.{word}.weight": factor for word, factor in zip(words, factors)}
        if not lora:
            continue
        path = work / "lora.safetensors"
        save_file(lora, path)
        for kind, (file, model) in models.items():
            patcher = load(str(file))
            patcher, _ = comfy.sd.load_lora_for_models(patcher, None, known_names(lora, patcher.model, None), 1.0, 0.0)
            print(f"a LoRA as {dialect} names it, on the {kind} model", flush=True)
            if not compare(args, family, patcher, work, model, "--lora", path):
                failed.append(f"LoRA, {dialect}, {kind}")
    try:
        known_names({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 8)}, patcher.model, None)
        failed.append("an SDXL LoRA was not refused")
    except ValueError as error:
        print(f"refused: {error}")
    return failed


def check_family(args, name, work):
    import comfy.sd

    family, base, failed = FAMILIES[name](), work / "base", []
    subprocess.run([sys.executable, *family.make(base)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = tuple(args.cases.split(",")) if args.cases else ("",)
    if "whole".startswith(wanted):
        print(f"{name}: whole", flush=True)
        if not compare(args, family, comfy.sd.load_diffusion_model(str(base / "bfl.safetensors")), work, base / "pipe"):
            failed.append("whole")
    # the first is what patch and LoRA are for
    for case, (blocks, form, joint) in family.cases.items():
        if case != "linear" and not case.startswith(wanted):
            continue
        print(f"{name}: {case}: {blocks} --form {form}", flush=True)
        folder = work / case.split(",")[0]
        folder.mkdir()
        if not check(args, family, base / "pipe", folder, blocks, form, joint):
            failed.append(case)
    pruned = work / "linear/pruned"
    if "patch".startswith(wanted):
        print(f"{name}: base and patch", flush=True)
        if not check_patch(args, family, base, pruned, work):
            failed.append("patch")
    if "LoRA".startswith(wanted):
        models = {"whole": (base / "bfl.safetensors", base / "pipe"), "pruned": (pruned / "flux.safetensors", pruned)}
        failed += check_lora(args, family, models, work)
    return [f"{name}: {what}" for what in failed]


def main():
    args = parsed()
    start_comfyui(args.comfyui.resolve())
    failed = []
    for name in [args.family] if args.family else FAMILIES:
        with tempfile.TemporaryDirectory() as work:
            failed += check_family(args, name, pathlib.Path(work))
    print(f"FAILED: {', '.join(failed)}" if failed else "all agree", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
