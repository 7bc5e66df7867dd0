# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35", "transformers>=4.48", "safetensors", "accelerate", "sentencepiece"]
# ///
"""Prune a model in every form, open what comes out in diffusers, and compare what the two compute.

    python scripts/interop/check_diffusers.py [--fastflux target/release/fastflux] [--model configs/tiny] [--cases linear,remove]

Each case prunes with `--layout diffusers`, opens the folder with `AutoModel` (removed blocks: with diffusers' own class), records the velocity
and a whole image, and has `fastflux verify` compare them. The same model as one file with original names must give the same tensors by
`from_single_file`. Exit status 1 when a case fails.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoModel, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
sys.dont_write_bytecode = True
from fastflux_flux import FastFluxTransformer2DModel  # noqa: E402
from make_reference import PARTS, Recorder  # noqa: E402

# name: blocks, --form, one layer for both streams
CASES = {
    "linear": ("double.01,single.03-04", "linear", False),
    "joint, across the kinds": ("double.04,single.00,single.05", "linear", True),
    "conditioned": ("double.00,single.08-09", "conditioned", False),
    "modulated": ("double.01,single.03", "modulated", False),
    "remove": ("double.02,single.05-06", "remove", False),
}


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


def fastflux(args, *command):
    return subprocess.run([args.fastflux, *map(str, command), "--quiet"], check=False, stdout=subprocess.PIPE, text=True)


def open_folder(folder, form):
    if form == "remove":
        return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)


def check(args, work, blocks, form, joint):
    recipe = work / "recipe.json"
    recipe.write_text(json.dumps({"calibration": {"num-prompts": 32}, "fit": {"joint": joint}}))
    pruned = work / "pruned"
    command = ["prune", "--model", args.model, "--blocks", blocks, "--form", form, "--recipe", recipe, "--layout", "diffusers", "--output", pruned]
    if fastflux(args, *command).returncode != 0:
        return False
    transformer = open_folder(str(pruned / "transformer"), form)

    single = work / "flux.safetensors"
    if fastflux(args, "convert", "--model", pruned, "--dtype", "f32", "--output", single).returncode != 0:
        return False
    ours, theirs = transformer.state_dict(), FastFluxTransformer2DModel.from_single_file(single, torch_dtype=torch.float32).state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"    {len(ours)} tensors from the single file: {'equal' if same else 'NOT EQUAL'}")

    recorded = argparse.Namespace(
        pipeline=pathlib.Path(args.model), dtype="float32", device="cpu", width=64, height=64, steps=args.steps, guidance=3.5, batch=2, seed=0,
        image_seed=1, inputs="random", prompt="a red circle left of a blue square on a white background", max_sequence_length=None,
        components=["transformer", "pipeline"],
    )  # fmt: skip
    recorder = Pruned(recorded, transformer)
    recorder.run()
    reference = work / "reference.safetensors"
    save_file(recorder.tensors, reference, metadata=recorder.metadata())
    verified = fastflux(args, "verify", "--model", pruned, "--reference", reference, "--json")
    tensors = json.loads(verified.stdout)["tensors"]
    for tensor in tensors:
        print(f"    {tensor['name']:32} relative error {tensor['relative']:.1e}{'' if tensor['ok'] else '  OFF'}")
    return same and verified.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastflux", default=ROOT / "target/release/fastflux")
    parser.add_argument("--model", default=ROOT / "configs/tiny", help="pipeline folder in diffusers layout; default: the bundled model")
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
