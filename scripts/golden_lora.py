# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35", "transformers>=4.48", "peft>=0.17", "safetensors", "accelerate", "sentencepiece"]
# ///
"""Make tests/golden/lora: a small LoRA in every dialect for the tiny pipeline in tests/golden/dev, and what diffusers and PEFT compute with it.

    python scripts/golden_lora.py

`NAME.safetensors` is the LoRA, `NAME.reference.safetensors` a recording for `fastflux verify` of one call of the transformer in float32 (or of the text
encoders). diffusers loads the file itself where it can (`load_lora_weights`); where it cannot, PEFT computes, or the change is added to the weights in
float64.
"""

import argparse
import json
import pathlib
import re
import shutil
import sys

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_base import _pack_dict_with_prefix
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
sys.dont_write_bytecode = True
from make_reference import PARTS, Recorder  # noqa: E402

PIPE = ROOT / "tests/golden/dev/pipe"
OUT = ROOT / "tests/golden/lora"
WIDTH, MLP = 32, 128
# modules of diffusers' model of every kind: parts of fused ones, blocks of both kinds, what is outside of them
SOME = r"(transformer_blocks.1.attn.to_q|transformer_blocks.0.(ff.net.2|norm1.linear|attn.to_add_out)|"
SOME += r"single_transformer_blocks.2.(attn.to_v|proj_mlp|proj_out)|norm_out.linear|x_embedder)"
generator = torch.Generator().manual_seed(15)


def random(*shape, size=0.2):
    return torch.randn(shape, generator=generator) * size


def transformer():
    return FluxTransformer2DModel.from_pretrained(PIPE / "transformer", torch_dtype=torch.float32).eval()


class WithParts(Recorder):
    """Records a pipeline with some of its parts changed."""

    def __init__(self, components, **parts):
        super().__init__(
            argparse.Namespace(
                pipeline=PIPE, dtype="float32", device="cpu", width=32, height=32, steps=1, guidance=3.5, batch=1, seed=0, image_seed=1,
                inputs="random", prompt="a red house", max_sequence_length=16, components=components, true_cfg=None,
            )
        )  # fmt: skip
        self.changed = parts

    def load(self, *parts):
        given = {part: None for part in PARTS if part not in parts}
        given.update({part: module for part, module in self.changed.items() if part in parts})
        pipe = FluxPipeline.from_pretrained(PIPE, torch_dtype=self.dtype, local_files_only=True, **given)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def record(name, components=("transformer",), **parts):
    recorder = WithParts(list(components), **parts)
    recorder.run()
    save_file(recorder.tensors, OUT / f"{name}.reference.safetensors", metadata=recorder.metadata())
    plain = WithParts(list(components))
    plain.run()
    key = {"transformer": "transformer.velocity", "clip": "clip.pooled", "t5": "t5.hidden"}[components[0]]
    change = (recorder.tensors[key] - plain.tensors[key]).norm() / plain.tensors[key].norm()
    assert change > 0.01, f"{name} changes next to nothing"
    print(f"{name:24} changes {key} by {change:.2f}")


def save(name, tensors, metadata=None):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, OUT / f"{name}.safetensors", metadata=metadata)


def by_diffusers(name):
    """What diffusers computes with the file, which must not lose a key of it."""
    model = transformer()
    pipe = FluxPipeline.from_pretrained(PIPE, torch_dtype=torch.float32, transformer=model, vae=None, tokenizer_2=None, text_encoder_2=None)
    pipe.load_lora_weights(OUT / f"{name}.safetensors")
    record(name, transformer=model)


def randomized(model):
    for key, parameter in model.named_parameters():
        if any(word in key for word in ("lora_", "hada_", "lokr_")):
            change = random(*parameter.shape)
            parameter.data = parameter.data + change if "magnitude" in key else change
    return model


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def peft(name, prefix="transformer.", with_metadata=False, rename=None, **settings):
    """A LoRA that PEFT makes, in diffusers' file format."""
    model = transformer()
    config = LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": SOME, **settings})
    model.add_adapter(config)
    randomized(model)
    state = {f"{prefix}{key}": tensor for key, tensor in get_peft_model_state_dict(model).items()}
    metadata = None
    if with_metadata:
        config = model.peft_config["default"].to_dict()
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(_pack_dict_with_prefix(metadata, "transformer"), default=str)}
    save(name, state, metadata)
    record(name, transformer=model)


def original(rank, half=torch.float32):
    """Random factors for modules of the original model: name -> (down, up)."""
    shapes = {
        "double_blocks.0.img_attn.qkv": (WIDTH, 3 * WIDTH),
        "double_blocks.0.txt_attn.qkv": (WIDTH, 3 * WIDTH),
        "double_blocks.1.img_attn.proj": (WIDTH, WIDTH),
        "double_blocks.1.txt_attn.proj": (WIDTH, WIDTH),
        "double_blocks.1.img_mlp.0": (WIDTH, MLP),
        "double_blocks.0.img_mlp.2": (MLP, WIDTH),
        "double_blocks.0.txt_mlp.2": (MLP, WIDTH),
        "double_blocks.1.img_mod.lin": (WIDTH, 6 * WIDTH),
        "single_blocks.0.linear1": (WIDTH, 3 * WIDTH + MLP),
        "single_blocks.2.linear1": (WIDTH, 3 * WIDTH + MLP),
        "single_blocks.1.linear2": (WIDTH + MLP, WIDTH),
        "single_blocks.2.modulation.lin": (WIDTH, 3 * WIDTH),
    }
    return {name: (random(rank, i).to(half), random(o, rank).to(half)) for name, (i, o) in shapes.items()}


DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE = {"modulation.lin": ["norm.linear"], "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "linear2": ["proj_out"]}


def parts_of(model, name):
    """The modules of diffusers' model whose rows make up an original one."""
    kind, index, module = name.split(".", 2)
    blocks, table = ("transformer_blocks", DOUBLE) if kind == "double_blocks" else ("single_transformer_blocks", SINGLE)
    return [model.get_submodule(f"{blocks}.{index}.{part}") for part in table[module]]


def changed(changes):
    """The model with `change(weight)` in the place of the weight of original modules, in float64 and rounded once."""
    model = transformer()
    with torch.no_grad():
        for name, change in changes.items():
            modules = parts_of(model, name)
            weight = change(torch.cat([module.weight for module in modules]).double()).float()
            for module, rows in zip(modules, weight.split([module.weight.shape[0] for module in modules])):
                module.weight.copy_(rows)
    return model


def added(factors, scale):
    return {name: lambda w, a=a, b=b: w + scale * b.double() @ a.double() for name, (a, b) in factors.items()}


def spelled(factors, spell, words, alpha=None):
    out = {}
    for name, pair in factors.items():
        for word, factor in zip(words, pair):
            out[f"{spell(name)}.{word}.weight"] = factor
        if alpha is not None:
            out[f"{spell(name)}.alpha"] = torch.tensor(alpha).to(pair[0].dtype)
    return out


def dialects_of_original_names():
    factors = original(4, torch.float16)
    save("kohya", spelled(factors, lambda n: "lora_unet_" + n.replace(".", "_"), ("lora_down", "lora_up"), 2.0))
    # diffusers splits kohya's fused modules at FLUX.1's own width only
    record("kohya", transformer=changed(added(factors, 0.5)))
    factors = original(2, torch.bfloat16)
    save("comfyui", spelled(factors, lambda n: "diffusion_model." + n, ("lora_A", "lora_B")))
    record("comfyui", transformer=changed(added(factors, 1)))
    factors = original(2)
    save("comfyui_alpha", spelled(factors, lambda n: "diffusion_model." + n, ("lora_down", "lora_up"), 1.0))
    record("comfyui_alpha", transformer=changed(added(factors, 0.5)))

    names = {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.1.processor.proj_lora1": "double_blocks.1.img_attn.proj",
        "double_blocks.1.processor.proj_lora2": "double_blocks.1.txt_attn.proj",
        "single_blocks.1.processor.proj_lora": "single_blocks.1.linear2",
    }
    factors = {theirs: original(2)[ours] for theirs, ours in names.items()}
    for index in (0, 2):
        factors[f"single_blocks.{index}.processor.qkv_lora"] = (random(2, WIDTH), random(3 * WIDTH, 2))
    save("xlabs", spelled(factors, lambda n: n, ("down", "up")))
    by_diffusers("xlabs")


def onetrainer():
    names = [name for name in linears(transformer()) if re.fullmatch(SOME, name)]
    model = transformer()
    state = {}
    with torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            down, up = random(2, module.in_features), random(module.out_features, 2)
            key = "lora_transformer_" + name.replace(".", "_")
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
            module.weight.copy_((module.weight.double() + 0.5 * up.double() @ down.double()).float())
    save("onetrainer", state)
    record("onetrainer", transformer=model)


def lycoris(name, config, alpha):
    """PEFT computes; the names are LyCORIS'."""
    model = inject_adapter_in_model(config, transformer())
    randomized(model)
    state = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        module, leaf = key.rsplit(".", 1)
        module = "lycoris_" + module.replace(".", "_")
        state[f"{module}.{leaf}"] = tensor
        if alpha is not None:
            state[f"{module}.alpha"] = torch.tensor(float(alpha))
    save(name, state)
    record(name, transformer=model)


def dora_scale():
    """DoRA in kohya's names, of fused modules: magnitudes of rows, and of columns as OneTrainer and LyCORIS have them by default."""
    factors, state, changes = original(2), {}, {}
    for index, (name, (a, b)) in enumerate(factors.items()):
        key, columns = "lora_unet_" + name.replace(".", "_"), index % 2 == 1
        weight = torch.cat([module.weight for module in parts_of(transformer(), name)]).detach()
        norm = weight.norm(dim=0 if columns else 1, keepdim=True)
        scale = norm * (1 + random(*norm.shape))
        state |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0), f"{key}.dora_scale": scale}

        def change(w, a=a, b=b, scale=scale, columns=columns):
            w = w + 0.5 * b.double() @ a.double()
            return scale.double() * w / w.norm(dim=0 if columns else 1, keepdim=True)

        changes[name] = change
    save("dora_scale", state)
    record("dora_scale", transformer=changed(changes))


def differences():
    state, changes = {}, {}
    for name, (a, b) in original(2).items():
        if "attn" not in name:
            continue
        difference = b @ a
        state[f"diffusion_model.{name}.diff"] = difference
        changes[name] = lambda w, d=difference: w + d.double()
    model = changed(changes)
    bias = random(WIDTH)
    state["diffusion_model.double_blocks.1.img_attn.proj.diff_b"] = bias
    with torch.no_grad():
        parts_of(model, "double_blocks.1.img_attn.proj")[0].bias.add_(bias)
    save("difference", state)
    record("difference", transformer=model)


def folder_of_peft():
    model = transformer()
    config = LoraConfig(r=2, lora_alpha=8, rank_pattern={"proj_out": 3}, alpha_pattern={"attn.to_q": 1}, target_modules=SOME)
    wrapped = randomized(get_peft_model(model, config))
    folder = OUT / "peft"
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    record("peft", transformer=model)


def text_encoders():
    pipe = FluxPipeline.from_pretrained(PIPE, torch_dtype=torch.float32, transformer=None, vae=None)
    clip, t5, state = pipe.text_encoder, pipe.text_encoder_2, {}
    with torch.no_grad():
        for model, prefix in ((clip, "lora_te1_"), (t5, "lora_te3_")):
            for name, module in model.named_modules():
                if not isinstance(module, torch.nn.Linear):
                    continue
                # names as files of transformers have them
                spelling = name if model is t5 or name.startswith("text_model.") else f"text_model.{name}"
                down, up = random(2, module.in_features), random(module.out_features, 2)
                key = prefix + spelling.replace(".", "_")
                state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
                module.weight.copy_((module.weight.double() + up.double() @ down.double()).float())
    save("text", state)
    record("text", ("clip", "t5"), text_encoder=clip, text_encoder_2=t5)


@torch.no_grad()
def main():
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    peft("diffusers", target_modules=linears(transformer()))
    peft("metadata", with_metadata=True, lora_alpha=4, rank_pattern={"proj_out": 3}, alpha_pattern={"attn.to_q": 1}, use_rslora=True)
    peft("bias", lora_bias=True)
    peft("dora", use_dora=True)
    folder_of_peft()
    dialects_of_original_names()
    onetrainer()
    lycoris("loha", LoHaConfig(r=2, alpha=3, target_modules=SOME), 3)
    lycoris("lokr", LoKrConfig(r=2, alpha=3, target_modules=SOME, decompose_both=True), 3)
    dora_scale()
    differences()
    text_encoders()
    print(sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file()), "bytes")


if __name__ == "__main__":
    main()
