# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.42", "transformers>=5", "safetensors", "accelerate", "sentencepiece"]
# ///
"""Prune a FLUX.1 and a FLUX.2 in every form, open what comes out in diffusers, and compare what the two compute.

    python scripts/interop/check_diffusers.py [--fastflux target/release/fastflux] [--family flux2] [--model configs/tiny] [--cases linear,remove]

FLUX.1 is the bundled model, FLUX.2 the small random pipeline of tests/golden/flux2. Each case prunes with `--layout diffusers`, opens the folder with
`AutoModel` (removed blocks: with diffusers' own class, which must refuse the others), records the velocity and a whole image, and has `fastflux verify`
compare them. The same model as one file with original names must give the same tensors by `from_single_file`, and the folder as a pipeline (`--whole`), saved
and opened again, too. LoRA of tests/golden/lora that `load_lora_weights` reads are drawn with on the whole and on a pruned pipeline: no value of an image
may be more than 1 of 255 away. Exit status 1 when a case fails.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import diffusers.utils.logging
import numpy
import torch
import transformers.utils.logging
from diffusers import AutoModel, DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
sys.dont_write_bytecode = True
from fastflux_flux import FastFlux2Transformer2DModel, FastFluxTransformer2DModel  # noqa: E402
from make_reference import PARTS, Recorder  # noqa: E402


class Pruned(Recorder):
    """Records a pipeline with another transformer in it."""

    def __init__(self, args, transformer):
        super().__init__(args)
        self.transformer = transformer

    def load(self, *parts):
        given = {part: None for part in PARTS if part not in parts}
        given.setdefault("transformer", self.transformer)
        pipe = FluxPipeline.from_pretrained(self.args.pipeline, torch_dtype=self.dtype, local_files_only=True, **given)
        pipe.set_progress_bar_config(disable=True)
        return pipe


class Flux1:
    stock, own = FluxTransformer2DModel, FastFluxTransformer2DModel
    # name: blocks, --form, one layer for both streams
    cases = {
        "linear": ("double.01,single.03-04", "linear", False),
        "joint, across the kinds": ("double.04,single.00,single.05", "linear", True),
        "conditioned": ("double.00,single.08-09", "conditioned", False),
        "modulated": ("double.01,single.03", "modulated", False),
        "remove": ("double.02,single.05-06", "remove", False),
    }
    recipe = {"calibration": {"num-prompts": 32}}

    def pipeline(self, args, _):
        return args.model

    def record(self, args, model, pipeline, path):
        recorded = argparse.Namespace(
            pipeline=pathlib.Path(pipeline), dtype="float32", device="cpu", width=64, height=64, steps=args.steps, guidance=3.5, batch=2, seed=0,
            image_seed=1, inputs="random", prompt="a red circle left of a blue square on a white background", max_sequence_length=None,
            components=["transformer", "pipeline"], true_cfg=None, negative_prompt="",
        )  # fmt: skip
        recorder = Pruned(recorded, model)
        recorder.run()
        save_file(recorder.tensors, path, metadata=recorder.metadata())


class Flux2:
    stock, own = Flux2Transformer2DModel, FastFlux2Transformer2DModel
    cases = {
        "linear": ("single.01", "linear", False),
        "double": ("double.00", "linear", False),
        "joint, across the kinds": ("double.00,single.00", "linear", True),
        "conditioned": ("single.00", "conditioned", False),
        "modulated": ("double.00,single.01", "modulated", False),
        "remove": ("single.00", "remove", False),
    }
    recipe = {"calibration": {"num-prompts": 16}, "score": {"held-out": 16}}
    text, side = 24, 64

    def pipeline(self, _, work):
        shutil.copytree(ROOT / "tests/golden/flux2/pipe", work / "pipe")
        (work / "pipe/fastflux.json").write_text(json.dumps({"text-length": self.text, "size": self.side}))
        return work / "pipe"

    @torch.no_grad()
    def record(self, args, model, pipeline, path):
        generator = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        n, width, line = self.side // 16, model.config.joint_attention_dim, torch.arange
        values = {
            "img": normal(2, n * n, model.config.in_channels), "txt": normal(2, self.text, width), "timestep": torch.rand(2, generator=generator),
            "img_ids": torch.cartesian_prod(line(1), line(n), line(n), line(1)),
            "txt_ids": torch.cartesian_prod(line(1), line(1), line(1), line(self.text)),
        }  # fmt: skip
        values["velocity"] = model(*(values[name] for name in ("img", "txt", "timestep", "img_ids", "txt_ids")), return_dict=False)[0]
        tensors = {f"transformer.{name}": value for name, value in values.items()}
        pipe = Flux2KleinPipeline.from_pretrained(pipeline, transformer=model, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        tensors["pipeline.latents"] = latents = normal(1, model.config.in_channels, n, n)
        options = {"height": self.side, "width": self.side, "num_inference_steps": args.steps, "guidance_scale": 1.0}
        facts = {"prompt": "a red house", "height": self.side, "width": self.side, "steps": args.steps, "guidance": 1.0, "text_len": self.text}
        out = pipe(prompt=facts["prompt"], latents=latents.clone(), output_type="pt", max_sequence_length=self.text, **options)
        tensors["pipeline.image"] = out.images
        tensors = {name: (t.float() if t.is_floating_point() else t.long()).contiguous() for name, t in tensors.items()}
        save_file(tensors, path, metadata={name: str(fact) for name, fact in facts.items()})


FAMILIES = {"flux1": Flux1, "flux2": Flux2}


def fastflux(args, *command):
    return subprocess.run([args.fastflux, *map(str, command), "--quiet"], check=False, stdout=subprocess.PIPE, text=True)


def check(args, family, work, blocks, form, joint):
    recipe, pruned, single, reference = work / "recipe.json", work / "pruned", work / "flux.safetensors", work / "reference.safetensors"
    recipe.write_text(json.dumps({**family.recipe, "fit": {"joint": joint}}))
    pipeline = family.pipeline(args, work)
    command = ["prune", "--model", pipeline, "--blocks", blocks, "--form", form, "--recipe", recipe, "--whole", "--output", pruned]
    if fastflux(args, *command).returncode != 0:
        return False
    folder, options = str(pruned / "transformer"), {"torch_dtype": torch.float32}
    if form == "remove":
        model = family.stock.from_pretrained(folder, **options)
    else:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
        try:
            family.stock.from_pretrained(folder)
            print("    OPENED by diffusers' own class, which does not know its layers")
            return False
        except ValueError as error:
            refused = "trust_remote_code=True" in str(error)
            print(f"    refused by {family.stock.__name__}" if refused else f"    refused WITHOUT A WORD: {error}")
            if not refused:
                return False

    if fastflux(args, "convert", "--model", pruned, "--dtype", "f32", "--output", single).returncode != 0:
        return False
    ours, theirs = model.state_dict(), family.own.from_single_file(single, **options).state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"    {len(ours)} tensors from the single file: {'equal' if same else 'NOT EQUAL'}")

    # as a pipeline, and as diffusers saves that
    opened, saved = pruned, work / "saved"
    for _ in range(2):
        pipe = DiffusionPipeline.from_pretrained(opened, trust_remote_code=True, **options)
        theirs = pipe.transformer.state_dict()
        whole = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        print(f"    the pipeline `{opened.name}` opens{'' if whole else ' WITH OTHER TENSORS'}")
        same = same and whole
        pipe.save_pretrained(saved)
        opened = saved

    family.record(args, model, pipeline, reference)
    verified = fastflux(args, "verify", "--model", pruned, "--reference", reference, "--json")
    for tensor in json.loads(verified.stdout)["tensors"]:
        print(f"    {tensor['name']:32} relative error {tensor['relative']:.1e}{'' if tensor['ok'] else '  OFF'}")
    return same and verified.returncode == 0


# those that diffusers reads at the width of that pipeline; its conversion of kohya's fused names knows FLUX.1's own width only
LORA = ["diffusers", "metadata", "dora", "bias", "xlabs", "text"]
LORA_OF_PRUNED = [*LORA, "kohya", "comfyui", "comfyui_alpha", "onetrainer"]


def check_lora(args, work):
    pipe, pruned, failed = ROOT / "tests/golden/dev/pipe", work / "pruned", []
    size = ["--width", 32, "--height", 32]
    few = ["--blocks", "single.01", "--num-prompts", 4, "--steps", 1, *size, "--whole"]
    if fastflux(args, "prune", "--model", pipe, *few, "--output", pruned).returncode != 0:
        return ["LoRA: prune"]
    for model, names in ((pipe, LORA), (pruned, LORA_OF_PRUNED)):
        theirs = DiffusionPipeline.from_pretrained(model, trust_remote_code=True, torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        for name in names:
            file = ROOT / f"tests/golden/lora/{name}.safetensors"
            with safe_open(file, "pt") as lora:  # diffusers leaves T5's part out
                tensors = {key: lora.get_tensor(key) for key in lora.keys() if not key.startswith("lora_te3_")}
                save_file(tensors, work / file.name, metadata=lora.metadata())
            for weight in (1, -0.5):
                if model == pruned:
                    theirs.load_lora_weights(theirs.transformer.renumbered(str(work / file.name)), adapter_name="lora")
                else:
                    theirs.load_lora_weights(work, weight_name=file.name, adapter_name="lora")
                theirs.set_adapters("lora", weight)
                options = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": 16}
                image = theirs("a red house", generator=torch.Generator().manual_seed(0), **options).images[0]
                theirs.delete_adapters("lora")
                output = work / f"{model.name}-{name}-{weight}.png"
                more = ["--prompt", "a red house", *size, "--steps", 2, "--seed", 0, "--max-sequence-length", 16, "--output", output]
                drawn = fastflux(args, "generate", "--model", model, "--lora", f"{work / file.name}:{weight}", *more).returncode == 0
                away = int(abs(numpy.asarray(image).astype(int) - numpy.asarray(Image.open(output))).max()) if drawn else 255
                print(f"    {model.name:8} {name:14} × {weight:4}: images at most {away} of 255 away{'' if away <= 1 else '  OFF'}", flush=True)
                if away > 1:
                    failed.append(f"LoRA: {name} on {model.name}")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastflux", default=ROOT / "target/release/fastflux")
    parser.add_argument("--family", choices=FAMILIES, help="default: both")
    parser.add_argument("--model", default=ROOT / "configs/tiny", help="FLUX.1 pipeline folder in diffusers layout; default: the bundled model")
    parser.add_argument("--cases", help="those whose names start so, separated by commas; default: all")
    parser.add_argument("--steps", type=int, default=4, help="of the image")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    wanted = tuple(args.cases.split(",")) if args.cases else ("",)
    failed = []
    for family in [args.family] if args.family else FAMILIES:
        for name, (blocks, form, joint) in FAMILIES[family].cases.items():
            if not name.startswith(wanted):
                continue
            print(f"{family}: {name}: {blocks} --form {form}", flush=True)
            with tempfile.TemporaryDirectory() as work:
                if not check(args, FAMILIES[family](), pathlib.Path(work), blocks, form, joint):
                    failed.append(f"{family}: {name}")
    if "LoRA".startswith(wanted) and args.family != "flux2":
        print("flux1: LoRA", flush=True)
        with tempfile.TemporaryDirectory() as work:
            failed += check_lora(args, pathlib.Path(work))
    print(f"FAILED: {', '.join(failed)}" if failed else "all agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
