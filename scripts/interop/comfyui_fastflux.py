"""FLUX.1 and FLUX.2 models pruned by fastflux, in ComfyUI.

Put this file into ComfyUI's `custom_nodes` and the `flux.safetensors` that `fastflux prune` or `fastflux train-sandwich` wrote into
`models/diffusion_models`. The node "Load fastflux model" then gives a MODEL, as "Load Diffusion Model" does for other files.

ComfyUI's own loader opens what was kept. The linear layers then take their places among the blocks, each block where it stood in the unpruned model,
so that LoRA and ControlNets for that model meet the right blocks. What they would change in a replaced block has no effect.

The node "Load LoRA (fastflux)" adds a LoRA of any dialect, XLabs' too, refuses one that is not for this model, and says what falls away. ComfyUI's own
LoRA nodes work as well, but only log what they do not know.
"""

import hashlib
import json
import logging
import re

import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.ops import manual_cast
from torch import nn
from torch.nn import functional as F

# What ComfyUI takes every FLUX.1 and every FLUX.2 to have.
ROTARY = [([16, 56, 56], 10000), ([32, 32, 32, 32], 2000)]
# A tensor that only FLUX.2 has.
SHARED = "single_stream_modulation.lin.weight"


class Layer(nn.Module):
    """y = x + g * (W z + V silu(vec) + b) for the tokens x of a stream.

    linear: z = x, no V, g = 1; conditioned: with V; modulated: z = LN(x) (1 + scale) + shift and the gate g, as the replaced block has them: by a
    projection of its own, or those of FLUX.2, which all blocks share.
    """

    def __init__(self, tensors, prefix, form):
        super().__init__()
        self.form = form
        self.linear = linear(tensors, f"{prefix}.")
        self.vec = linear(tensors, f"{prefix}.vec.")
        self.modulation = linear(tensors, f"{prefix}.modulation.lin.")

    def forward(self, x, vec, shared=None):
        if self.form == "modulated":
            if self.modulation is not None:
                shift, scale, gate = self.modulation(F.silu(vec)).unsqueeze(1).chunk(3, dim=-1)
            else:
                shift, scale, gate = shared.shift, shared.scale, shared.gate
            y = x + gate * self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        else:
            y = x + self.linear(x)
            if self.vec is not None:
                y = y + self.vec(F.silu(vec)).unsqueeze(1)
        # as ComfyUI's blocks do
        return torch.nan_to_num(y, nan=0.0, posinf=65504, neginf=-65504) if y.dtype == torch.float16 else y


def linear(tensors, prefix):
    """The projection of that name in the dtype of the file, cast to that of its input when it is run; None where there is none."""
    weight, bias = (tensors.get(f"{prefix}{leaf}") for leaf in ("weight", "bias"))
    if weight is None:
        return None
    if weight.dtype == torch.float8_e4m3fn:
        scale = tensors.get(f"{prefix}scale_weight", torch.ones(()))
        weight = (weight.float() * scale.float()).bfloat16()
    rows, columns = weight.shape
    layer = manual_cast.Linear(columns, rows, bias=bias is not None, dtype=weight.dtype, device=weight.device)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


class Replaced(nn.Module):
    """What stands for replaced blocks: a layer for each stream, or one for both."""

    def __init__(self, tensors, joint, form, seen):
        super().__init__()
        self.txt = Layer(tensors, "linear" if joint else "linear.txt", form)
        self.img = self.txt if joint else Layer(tensors, "linear.img", form)
        self.seen = seen


def one_timestep(modulation_dims):
    if modulation_dims is not None:
        raise ValueError("in a pruned model reference images have the timestep of the image: choose another method than index_timestep_zero")


class ReplacedDouble(Replaced):
    """In the place of a double block."""

    def forward(self, img, txt, vec, modulation_dims_img=None, **_):
        one_timestep(modulation_dims_img)
        if isinstance(vec, tuple):
            # FLUX.2 hands on what its shared projections give: for image and text, the first and the second branch
            (of_img, _), (of_txt, _) = vec
            return self.img(img, self.seen.vec, of_img), self.txt(txt, self.seen.vec, of_txt)
        return self.img(img, vec), self.txt(txt, vec)


class ReplacedSingle(Replaced):
    """In the place of a single block, whose tokens are those of the text and then those of the image."""

    def forward(self, x, vec, transformer_options, modulation_dims=None, **_):
        one_timestep(modulation_dims)
        text = transformer_options["img_slice"][0]
        # FLUX.2 hands on shift, scale and gate
        vec, shared = (vec, None) if torch.is_tensor(vec) else (self.seen.vec, vec)
        return torch.cat((self.txt(x[:, :text], vec, shared), self.img(x[:, text:], vec, shared)), 1)


class PassDouble(nn.Module):
    """In the place of a double block that was removed, or that a layer before it replaces as well."""

    def forward(self, img, txt, **_):
        return img, txt


class PassSingle(nn.Module):
    """The same for a single block."""

    def forward(self, x, **_):
        return x


class Seen:
    """The embedding of timestep and guidance in the current forward, which FLUX.2 does not hand to its blocks."""

    vec = None

    def note(self, _, given):
        (self.vec,) = given


MODULES = {"double": (ReplacedDouble, PassDouble), "single": (ReplacedSingle, PassSingle)}


def stacks(layout, tensors, seen):
    """For each kind what stands at the places of the unpruned model's blocks (`None`: the next kept one), and the tensors under the names that a
    model of the kept blocks alone has."""
    places = {kind: {} for kind in MODULES}
    slots, kept = dict.fromkeys(MODULES, 0), dict.fromkeys(MODULES, 0)
    by_slot, out = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(("double_blocks.", "single_blocks.")):
            stack, slot, tail = name.split(".", 2)
            by_slot.setdefault((stack, int(slot)), {})[tail] = tensor
        else:
            out[name] = tensor
    for entry in layout:
        blocks = [block.split(".") for block in ([entry] if isinstance(entry, str) else entry["replaces"])]
        for kind, index in blocks:
            places[kind][int(index)] = MODULES[kind][1]()
        if not isinstance(entry, str) and entry["form"] == "remove":
            continue
        kind, index = blocks[0]
        here = by_slot[f"{kind}_blocks", slots[kind]]
        slots[kind] += 1
        if isinstance(entry, str):
            places[kind][int(index)] = None
            out.update((f"{kind}_blocks.{kept[kind]}.{tail}", tensor) for tail, tensor in here.items())
            kept[kind] += 1
        else:
            places[kind][int(index)] = MODULES[kind][0](here, entry.get("joint", False), entry["form"], seen)
    return places, out


FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}


def fingerprint(tensors):
    """fastflux's short identity of a checkpoint: names, formats, shapes, and the first and last 4096 bytes of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().flatten()
        count = min(4096 // tensor.element_size(), tensor.numel())
        digest.update(f"{name} {FORMATS[tensor.dtype]} {list(tensors[name].shape)}\n".encode())
        for end in (tensor[:count], tensor[tensor.numel() - count :]):
            digest.update(end.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def patched(path, patch, level):
    """The tensors and the record of the pruned model that a patch makes of its base, a file with original names."""
    tensors = comfy.utils.load_torch_file(path)
    prefix = next((p for p in ("model.diffusion_model.", "diffusion_model.", "model.", "") if f"{p}img_in.weight" in tensors), None)
    if prefix is None:
        raise ValueError(f"`{path}` is no FLUX transformer with original names, of which patches are made")
    base = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    base = {re.sub(r"(query_norm|key_norm)\.weight$", r"\1.scale", name): tensor for name, tensor in base.items()}
    differences, metadata = comfy.utils.load_torch_file(patch, return_metadata=True)
    if "fastflux-patch" not in (metadata or {}):
        raise ValueError(f"`{patch}` is no patch of fastflux")
    levels = json.loads(metadata["fastflux-patch"])["levels"]
    level = level or (next(iter(levels)) if len(levels) == 1 else "")
    if level not in levels:
        raise ValueError(f"`{patch}` holds the levels {', '.join(levels)}: name one of them")
    record, found = levels[level], fingerprint(base)
    if found != record["base-fingerprint"]:
        raise ValueError(
            f"the patch `{patch}` is for `{record['base']}` (fingerprint {record['base-fingerprint']}), and `{path}` is another model (fingerprint {found})"
        )
    slots, out = dict.fromkeys(MODULES, 0), {}
    for entry in record["layout"]:
        if not isinstance(entry, str) and entry["form"] == "remove":
            continue
        kind, index = (entry if isinstance(entry, str) else entry["replaces"][0]).split(".")
        if isinstance(entry, str):
            old, new = f"{kind}_blocks.{int(index)}.", f"{kind}_blocks.{slots[kind]}."
            out.update((name.replace(old, new, 1), tensor) for name, tensor in base.items() if name.startswith(old))
        slots[kind] += 1
    out.update((name, tensor) for name, tensor in base.items() if not name.startswith(("double_blocks.", "single_blocks.")))
    out.update((name.removeprefix(f"{level}/"), tensor) for name, tensor in differences.items() if name.startswith(f"{level}/"))
    return out, record


def load(path, patch=None, level="", **options):
    """A ModelPatcher for a .safetensors file in original layout that fastflux wrote, or for a base and a patch; other files are left to ComfyUI."""
    if patch is not None:
        tensors, record = patched(path, patch, level)
        metadata = {}
    else:
        tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        if "fastflux" not in (metadata or {}):
            return comfy.sd.load_diffusion_model(path, **options)
        record = json.loads(metadata["fastflux"])
    if (record["axes-dims"], record["theta"]) not in ROTARY:
        raise ValueError(f"`{path}`: ComfyUI knows the rotary axes {ROTARY[0][0]} and {ROTARY[1][0]} only, these are {record['axes-dims']}")
    seen = Seen()
    places, kept = stacks(record["layout"], tensors, seen)
    shared = SHARED in kept  # ComfyUI empties the dictionary
    patcher = comfy.sd.load_diffusion_model_state_dict(kept, metadata=metadata, **options)
    if patcher is None:
        raise ValueError(f"`{path}`: ComfyUI does not recognise what was kept; it needs a double block to tell that it is FLUX")
    model = patcher.model
    if shared:
        model.diffusion_model.double_stream_modulation_img.register_forward_pre_hook(seen.note)
    for kind, depth in (("double", "depth"), ("single", "depth_single_blocks")):
        blocks = iter(getattr(model.diffusion_model, f"{kind}_blocks"))
        stack = [next(blocks) if module is None else module for _, module in sorted(places[kind].items())]
        stack = nn.ModuleList(stack).to(patcher.offload_device)
        setattr(model.diffusion_model, f"{kind}_blocks", stack)
        # what ComfyUI names the blocks of a LoRA by
        model.model_config.unet_config[depth] = len(stack)
    patcher.size = 0  # counted again
    patcher.cached_patcher_init = (load, (path, patch, level))
    return patcher


# Endings of the names of tensors in LoRA files.
ENDINGS = (
    ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".lora.down.weight", ".lora.up.weight",
    ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".down.weight", ".up.weight", ".alpha", ".dora_scale",
    ".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b",
    ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".diff", ".diff_b", ".w_norm", ".b_norm",
)  # fmt: skip
# Those that ComfyUI has other words for.
SAME = {
    ".down.weight": ".lora_down.weight", ".up.weight": ".lora_up.weight", ".lora.down.weight": ".lora_down.weight", ".lora.up.weight": ".lora_up.weight",
    ".lora_magnitude_vector": ".dora_scale", ".lora_magnitude_vector.weight": ".dora_scale",
}  # fmt: skip
# The name of an adapter, which stands in names where a model that PEFT has wrapped was saved as it is.
ADAPTER = re.compile(r"(\.lora_[AB]|\.lora_magnitude_vector)\.[^.]+(\.weight|\.bias)$")
# What may stand before the names of modules, also several of them.
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.", "pipe.", "module.", "_orig_mod.", "lycoris_", "lora_transformer_")
# XLabs' processors and the modules that they act on; that of single blocks on q, k and v only.
PROCESSORS = {
    "processor.qkv_lora1": "img_attn.qkv", "processor.qkv_lora2": "txt_attn.qkv", "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj", "processor.qkv_lora": "linear1_qkv", "processor.proj_lora": "linear2",
}  # fmt: skip


def replaced_blocks(model):
    """(kind, index) of the blocks that a layer stands for or that were removed."""
    flux = model.diffusion_model
    return {(kind, i) for kind, own in MODULES.items() for i, block in enumerate(getattr(flux, f"{kind}_blocks")) if isinstance(block, own)}


def block_of(module):
    """(kind, index) of the block that a module belongs to, in any spelling; None outside of the blocks."""
    found = re.search(r"(single_|double_)?(transformer_)?blocks[._](\d+)", module)
    return found and ("single" if found[1] == "single_" else "double", int(found[3]))


def spelling_of(module, known):
    """ComfyUI's name of a module of a LoRA; None where it is none of the model's."""
    while module is not None:
        spellings = (f"{prefix}{module}" for prefix in ("", "diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_"))
        found = next((spelling for spelling in spellings if spelling in known), None)
        if found is not None:
            return found
        module = next((module.removeprefix(prefix) for prefix in PREFIXES if module.startswith(prefix)), None)


def known_names(lora, model, clip):
    """The tensors of a LoRA under names that ComfyUI adds to this model. What acts on replaced blocks falls away; a name that is none of this model's
    is an error."""
    known = comfy.lora.model_lora_keys_unet(model, {})
    texts = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}) if clip is not None else {}
    replaced = replaced_blocks(model)
    out, gone, blocks, text = {}, 0, set(), 0
    for name, tensor in lora.items():
        name = ADAPTER.sub(r"\1\2", name)
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        module = name.removesuffix(ending or "")
        if ending is not None and ("text_model" in module or re.search(r"encoder[._]block[._]", module)):
            if clip is None:
                text += 1
            elif module in texts:
                out[name] = tensor
            else:
                raise ValueError(f"`{name}` is none of this model's text encoders")
            continue
        block = block_of(module)
        if ending is not None and block in replaced:
            gone += 1
            blocks.add("{}.{:02}".format(*block))
            continue
        processor = next((p for p in PROCESSORS if module.endswith(f".{p}")), None)
        if processor is not None:
            module = f"diffusion_model.{module.removeprefix('diffusion_model.').removesuffix(processor)}{PROCESSORS[processor]}"
        spelling = spelling_of(module, known)
        if ending is None or spelling is None:
            raise ValueError(f"`{name}` is no tensor of a LoRA for this model: the file is for another one, or of a dialect that is not known here")
        ending = SAME.get(ending, ending)
        if spelling + ending in out:
            raise ValueError(f"`{name}` is in the file twice: under two spellings, or for two adapters")
        out[spelling + ending] = tensor.reshape(-1, 1) if ending == ".dora_scale" and tensor.dim() == 1 else tensor
    if not out:
        raise ValueError(f"nothing of the LoRA applies: all of it acts on replaced blocks ({', '.join(sorted(blocks))}) or on text encoders")
    if gone:
        logging.warning("fastflux: %s of the LoRA's %s tensors fall away, as these blocks are replaced: %s", gone, len(lora), ", ".join(sorted(blocks)))
    if text:
        logging.warning("fastflux: %s of the LoRA's %s tensors act on text encoders and are not applied without a CLIP", text, len(lora))
    return out


class LoadFastFluxLora:
    """The node "Load LoRA (fastflux)"."""

    @classmethod
    def INPUT_TYPES(cls):
        strength = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})
        required = {"model": ("MODEL",), "lora_name": (folder_paths.get_filename_list("loras"),), "strength": strength}
        return {"required": required, "optional": {"clip": ("CLIP",)}}

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"

    def load(self, model, lora_name, strength, clip=None):
        lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", lora_name), safe_load=True)
        return comfy.sd.load_lora_for_models(model, clip, known_names(lora, model.model, clip), strength, strength)


class LoadFastFlux:
    """The node "Load fastflux model"."""

    @classmethod
    def INPUT_TYPES(cls):
        names = folder_paths.get_filename_list("diffusion_models")
        return {"required": {"unet_name": (names,)}, "optional": {"patch": (["none", *names],), "level": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders"

    def load(self, unet_name, patch="none", level=""):
        path, patch = (None if name == "none" else folder_paths.get_full_path_or_raise("diffusion_models", name) for name in (unet_name, patch))
        return (load(path, patch, level),)


NODE_CLASS_MAPPINGS = {"LoadFastFlux": LoadFastFlux, "LoadFastFluxLora": LoadFastFluxLora}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadFastFlux": "Load fastflux model", "LoadFastFluxLora": "Load LoRA (fastflux)"}
