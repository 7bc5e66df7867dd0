"""FLUX.1 and FLUX.2 models pruned by fastflux, in ComfyUI.

Put this file into ComfyUI's `custom_nodes` and the `flux.safetensors` that `fastflux prune` or `fastflux train-sandwich` wrote into
`models/diffusion_models`. The node "Load fastflux model" then gives a MODEL, as "Load Diffusion Model" does for other files.

ComfyUI's own loader opens what was kept. The linear layers then take their places among the blocks, each block where it stood in the unpruned model,
so that LoRA and ControlNets for that model meet the right blocks. What they would change in a replaced block has no effect.
"""

import json

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


class ReplacedDouble(Replaced):
    """In the place of a double block."""

    def forward(self, img, txt, vec, **_):
        if isinstance(vec, tuple):
            # FLUX.2 hands on what its shared projections give: for image and text, the first and the second branch
            (of_img, _), (of_txt, _) = vec
            return self.img(img, self.seen.vec, of_img), self.txt(txt, self.seen.vec, of_txt)
        return self.img(img, vec), self.txt(txt, vec)


class ReplacedSingle(Replaced):
    """In the place of a single block, whose tokens are those of the text and then those of the image."""

    def forward(self, x, vec, transformer_options, **_):
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
    """The embedding of the timestep in the current forward, which FLUX.2 does not hand to its blocks."""

    vec = None

    def note(self, _, __, vec):
        self.vec = vec


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


def load(path, **options):
    """A ModelPatcher for a .safetensors file in original layout that fastflux wrote; other files are left to ComfyUI."""
    tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    if "fastflux" not in (metadata or {}):
        return comfy.sd.load_diffusion_model(path, **options)
    record = json.loads(metadata["fastflux"])
    if (record["axes-dims"], record["theta"]) not in ROTARY:
        raise ValueError(f"`{path}`: ComfyUI knows the rotary axes {ROTARY[0][0]} and {ROTARY[1][0]} only, these are {record['axes-dims']}")
    seen = Seen()
    places, kept = stacks(record["layout"], tensors, seen)
    patcher = comfy.sd.load_diffusion_model_state_dict(kept, metadata=metadata, **options)
    if patcher is None:
        raise ValueError(f"`{path}`: ComfyUI does not recognise what was kept; it needs a double block to tell that it is FLUX")
    model = patcher.model
    if SHARED in kept:
        model.diffusion_model.time_in.register_forward_hook(seen.note)
    for kind, depth in (("double", "depth"), ("single", "depth_single_blocks")):
        blocks = iter(getattr(model.diffusion_model, f"{kind}_blocks"))
        stack = [next(blocks) if module is None else module for _, module in sorted(places[kind].items())]
        stack = nn.ModuleList(stack).to(patcher.offload_device)
        setattr(model.diffusion_model, f"{kind}_blocks", stack)
        # what ComfyUI names the blocks of a LoRA by
        model.model_config.unet_config[depth] = len(stack)
    patcher.size = 0  # counted again
    patcher.cached_patcher_init = (load, (path,))
    return patcher


class LoadFastFlux:
    """The node."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": (folder_paths.get_filename_list("diffusion_models"),)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders"

    def load(self, unet_name):
        return (load(folder_paths.get_full_path_or_raise("diffusion_models", unet_name)),)


NODE_CLASS_MAPPINGS = {"LoadFastFlux": LoadFastFlux}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadFastFlux": "Load fastflux model"}
