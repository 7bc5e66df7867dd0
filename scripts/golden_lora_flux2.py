# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.42", "transformers>=5", "peft>=0.17", "safetensors", "accelerate"]
# ///
"""Make tests/golden/flux2/lora: a small LoRA in every dialect for the tiny FLUX.2 in tests/golden/flux2, and what diffusers computes with its weights merged.

    python scripts/golden_lora_flux2.py

`NAME.safetensors` is the LoRA, `NAME.reference.safetensors` a recording for `fastflux verify` of one call of the transformer in float32 after the change was
added to the weights in float64. Where diffusers 0.42 opens the file itself (`load_lora_weights`), it must compute the same within 1e-5.
"""

import pathlib
import shutil

import diffusers.utils.logging
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
PIPE, OUT = ROOT / "tests/golden/flux2/pipe", ROOT / "tests/golden/flux2/lora"
WIDTH, MLP, TEXT, ROWS, COLUMNS = 32, 96, 24, 3, 4
generator = torch.Generator().manual_seed(18)
# original module -> modules of diffusers' model whose rows make it up
DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"], "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.linear_in"], "img_mlp.2": ["ff.linear_out"],
    "txt_mlp.0": ["ff_context.linear_in"], "txt_mlp.2": ["ff_context.linear_out"],
}  # fmt: skip
SINGLE = {"linear1": ["attn.to_qkv_mlp_proj"], "linear2": ["attn.to_out"]}
OTHER = {
    "img_in": ["x_embedder"], "txt_in": ["context_embedder"], "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"], "final_layer.linear": ["proj_out"],
}  # fmt: skip
MODULATION = {
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
}


def table(*more):
    out = {f"double_blocks.0.{ours}": [f"transformer_blocks.0.{name}" for name in names] for ours, names in DOUBLE.items()}
    for i in range(2):
        out |= {f"single_blocks.{i}.{ours}": [f"single_transformer_blocks.{i}.{name}" for name in names] for ours, names in SINGLE.items()}
    for names in more:
        out |= names
    return out


def random(*shape, size=0.15):
    return torch.randn(shape, generator=generator) * size


def transformer():
    return Flux2Transformer2DModel.from_pretrained(PIPE / "transformer", torch_dtype=torch.float32).eval()


INPUTS = {
    "img": torch.randn(2, ROWS * COLUMNS, 16, generator=generator),
    "txt": torch.randn(2, TEXT, 48, generator=generator),
    "timestep": torch.rand(2, generator=generator),
    "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(ROWS), torch.arange(COLUMNS), torch.arange(1)),
    "txt_ids": torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(TEXT)),
}


def velocity(model):
    return model(INPUTS["img"], INPUTS["txt"], INPUTS["timestep"], INPUTS["img_ids"], INPUTS["txt_ids"], return_dict=False)[0]


def difference(one, other):
    return ((one - other).norm() / other.norm()).item()


def merged(changes):
    """The model with `change(weight)` in the place of weights by diffusers' names, in float64 and rounded once."""
    model = transformer()
    for names, change in changes:
        modules = [model.get_submodule(name) for name in names]
        weight = change(torch.cat([module.weight for module in modules]).double()).float()
        for module, rows in zip(modules, weight.split([module.weight.shape[0] for module in modules])):
            module.weight.copy_(rows)
    return model


def save(name, tensors, changes, opened=True):
    """A LoRA file and its recording; `opened`: whether diffusers opens it."""
    path = OUT / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    expected = velocity(merged(changes))
    change = difference(expected, velocity(transformer()))
    assert change > 0.02, f"{name} changes next to nothing: {change}"
    theirs = ""
    if opened:
        model = transformer()
        none = {part: None for part in ("text_encoder", "tokenizer", "vae")}
        pipe = Flux2KleinPipeline.from_pretrained(PIPE, transformer=model, **none)
        pipe.load_lora_weights(path)
        theirs = difference(velocity(model), expected)
        assert theirs < 1e-5, f"{name}: diffusers computes something else: {theirs}"
    recording = {f"transformer.{key}": value for key, value in INPUTS.items()} | {"transformer.velocity": expected}
    recording = {key: (value.float() if value.is_floating_point() else value.long()).contiguous() for key, value in recording.items()}
    save_file(recording, OUT / f"{name}.reference.safetensors", metadata={"text_len": str(TEXT)})
    print(f"{name:18} changes the velocity by {change:.2f}; diffusers' own loader: {theirs if opened else 'does not open it'}")


def shapes(names):
    model = transformer()
    modules = [model.get_submodule(name) for name in names]
    return modules[0].weight.shape[1], sum(module.weight.shape[0] for module in modules)


def factors(modules, rank, dtype=torch.float32):
    """Factors for each of `modules` (name -> diffusers' names), and what they change."""
    found = {}
    for name, names in modules.items():
        width, height = shapes(names)
        found[name] = (random(rank, width).to(dtype), random(height, rank).to(dtype))
    return found


def low_rank(modules, found, scale=1.0):
    add = lambda a, b: lambda weight: weight + scale * b.double() @ a.double()
    return [(names, add(*found[name])) for name, names in modules.items()]


def spelled(found, spell, words, alpha=None):
    out = {}
    for name, pair in found.items():
        for word, factor in zip(words, pair):
            out[f"{spell(name)}.{word}.weight"] = factor
        if alpha is not None:
            out[f"{spell(name)}.alpha"] = torch.tensor(alpha).to(pair[0].dtype)
    return out


def of_diffusers():
    """Names of diffusers' modules, each by itself."""
    every = [name for names in table(OTHER, MODULATION).values() for name in names]
    return {name: [name] for name in every}


def lora():
    modules = of_diffusers()
    found = factors(modules, 2)
    save("peft", spelled(found, lambda n: f"transformer.{n}", ("lora_A", "lora_B")), low_rank(modules, found))
    blocks = {name: names for name, names in modules.items() if "blocks" in name}
    found = factors(blocks, 3, torch.bfloat16)
    save("base_model", spelled(found, lambda n: f"base_model.model.{n}", ("lora_A", "lora_B")), low_rank(blocks, found))
    found = factors(blocks, 2)
    # what some exports leave of `transformer_blocks`
    odd = lambda n: "diffusion_model." + (n if n.startswith("single") else n.removeprefix("tran"))
    save("sformer", spelled(found, odd, ("lora_A", "lora_B")), low_rank(blocks, found))
    found = factors(modules, 2)
    spell = lambda n: "lora_transformer_" + n.replace(".", "_")
    save("onetrainer", spelled(found, spell, ("lora_down", "lora_up"), 1.0), low_rank(modules, found, 0.5), opened=False)

    modules = table(OTHER, MODULATION)
    found = factors(modules, 4, torch.bfloat16)
    save("ai_toolkit", spelled(found, lambda n: f"diffusion_model.{n}", ("lora_A", "lora_B")), low_rank(modules, found))
    found = factors(modules, 2)
    # diffusers takes files with `lora_down` for kohya's and finds none of its names
    dotted = spelled(found, lambda n: f"diffusion_model.{n}", ("lora_down", "lora_up"), 1.0)
    save("comfyui", dotted, low_rank(modules, found, 0.5), opened=False)
    modules = table(OTHER)
    found = factors(modules, 4, torch.float16)
    kohya = lambda n: "lora_unet_" + n.replace(".", "_")
    save("kohya", spelled(found, kohya, ("lora_down", "lora_up"), 2.0), low_rank(modules, found, 0.5))
    found = factors(table(), 2)
    # a converter's mixture of both: dots around the block's number, underscores within
    mixed = lambda n: "diffusion_model." + n.replace("_attn.", "_attn_").replace("_mlp.", "_mlp_")
    save("underscores", spelled(found, mixed, ("lora_A", "lora_B")), low_rank(table(), found), opened=False)


def lokr():
    """Kronecker products: of whole fused modules by ai-toolkit, of diffusers' modules by LyCORIS, one factor in parts."""
    for name, modules, spell, opened in (
        ("lokr", table(OTHER), lambda n: f"diffusion_model.{n}", True),
        ("lycoris", {n: m for n, m in of_diffusers().items() if "blocks" in n}, lambda n: "lycoris_" + n.replace(".", "_"), True),
        ("fused", {}, lambda n: f"transformer.{n}", False),
    ):
        if name == "fused":
            modules = {f"transformer_blocks.0.attn.{ours}": table()[f"double_blocks.0.{theirs}"]
                       for ours, theirs in (("to_qkv", "img_attn.qkv"), ("to_added_qkv", "txt_attn.qkv"))}  # fmt: skip
        tensors, changes = {}, []
        for i, (module, names) in enumerate(modules.items()):
            width, height = shapes(names)
            left = random(4, 4, size=0.4)
            if i % 2:
                right, scale = random(height // 4, width // 4), 1.0
                tensors[f"{spell(module)}.lokr_w2"] = right
            else:
                a, b, scale = random(height // 4, 2, size=0.4), random(2, width // 4, size=0.4), 0.5
                right = a.double() @ b.double()
                tensors |= {f"{spell(module)}.lokr_w2_a": a, f"{spell(module)}.lokr_w2_b": b, f"{spell(module)}.alpha": torch.tensor(1.0)}
            tensors[f"{spell(module)}.lokr_w1"] = left
            changes.append((names, lambda w, l=left, r=right, s=scale: w + s * torch.kron(l.double(), r.double())))
        save(name, tensors, changes, opened)


def dora():
    """Magnitudes of rows, in kohya's names, for modules that the model fuses."""
    tensors, changes = {}, []
    for name, names in table().items():
        key = "lora_unet_" + name.replace(".", "_")
        (a, b), model = factors({name: names}, 2)[name], transformer()
        weight = torch.cat([model.get_submodule(n).weight for n in names]).detach()
        norm = weight.norm(dim=1, keepdim=True)
        scale = norm * (1 + random(*norm.shape))
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0), f"{key}.dora_scale": scale}

        def change(w, a=a, b=b, scale=scale):
            w = w + 0.5 * b.double() @ a.double()
            return scale.double() * w / w.norm(dim=1, keepdim=True)

        changes.append((names, change))
    save("dora", tensors, changes, opened=False)


@torch.no_grad()
def main():
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    lora()
    lokr()
    dora()
    print(sum(file.stat().st_size for file in OUT.iterdir()), "bytes")


if __name__ == "__main__":
    main()
