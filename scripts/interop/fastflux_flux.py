"""FLUX.1 and FLUX.2 transformers pruned by fastflux, in diffusers.

`fastflux prune --layout diffusers` and `fastflux train-sandwich --layout diffusers` put this file next to the weights:

    transformer = AutoModel.from_pretrained("pruned/transformer", trust_remote_code=True, torch_dtype=torch.bfloat16)
    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=transformer, torch_dtype=torch.bfloat16)

(`Flux2KleinPipeline` for FLUX.2, which needs diffusers 0.37 or newer.)

The single file that they write otherwise opens with this file in reach (`import fastflux_flux`):

    transformer = fastflux_flux.FastFluxTransformer2DModel.from_single_file("pruned/flux.safetensors", torch_dtype=torch.bfloat16)

`FastFlux2Transformer2DModel` is the class for FLUX.2.
"""

import json
import re

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

try:
    from diffusers import Flux2Transformer2DModel
except ImportError:  # an older diffusers, which opens FLUX.1 all the same
    Flux2Transformer2DModel = None

logger = logging.get_logger(__name__)

# Original module -> diffusers' modules, whose rows, one under the other, make it up.
TOP = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
    "linear2": ["proj_out"],
}
BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
FLUX1 = {"top": TOP, "double": DOUBLE, "single": SINGLE}

# FLUX.2 has no pooled text and shares its modulation, and the first projections of its single blocks are not split.
NORMS = {name: modules for name, modules in DOUBLE.items() if "_norm" in name}
FLUX2 = {
    "top": {
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
        "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
        "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
        "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
        "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
        "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
        "single_stream_modulation.lin": ["single_stream_modulation.linear"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
        "final_layer.linear": ["proj_out"],
    },
    "double": {
        **NORMS,
        "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_attn.proj": ["attn.to_out.0"],
        "txt_attn.proj": ["attn.to_add_out"],
        "img_mlp.0": ["ff.linear_in"],
        "img_mlp.2": ["ff.linear_out"],
        "txt_mlp.0": ["ff_context.linear_in"],
        "txt_mlp.2": ["ff_context.linear_out"],
    },
    "single": {
        "linear1": ["attn.to_qkv_mlp_proj"],
        "linear2": ["attn.to_out"],
        "norm.query_norm": ["attn.norm_q"],
        "norm.key_norm": ["attn.norm_k"],
    },
}


class Layer(nn.Module):
    """y = x + g * (W z + V silu(temb) + b) for the tokens x of a stream.

    linear: z = x, no V, g = 1; conditioned: with V; modulated: z = LN(x) (1 + scale) + shift and the gate g, as the replaced block has them:
    by a projection of its own, or given where all blocks share it.
    """

    def __init__(self, width, form, shares_modulation=False):
        super().__init__()
        own = form == "modulated" and not shares_modulation
        self.form = form
        # zeros: tokens pass unchanged until weights are loaded
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.vec = nn.Linear(width, width, bias=False) if form == "conditioned" else None
        self.modulation = nn.ModuleDict({"lin": nn.Linear(width, 3 * width)}) if own else None

    def forward(self, x, temb, modulation=None):
        if self.form == "modulated":
            if self.modulation is not None:
                modulation = self.modulation["lin"](F.silu(temb)).unsqueeze(1)
            # of the six parts of a double block those of its first branch
            shift, scale, gate = modulation.split(x.shape[-1], dim=-1)[:3]
            z = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            y = x + gate * F.linear(z, self.weight, self.bias)
        else:
            y = x + F.linear(x, self.weight, self.bias)
            if self.vec is not None:
                y = y + self.vec(F.silu(temb)).unsqueeze(1)
        # as diffusers' blocks do
        return y.clip(-65504, 65504) if y.dtype == torch.float16 else y


class ReplacedBlock(nn.Module):
    """What stands for one or several replaced blocks: a layer for each stream, or one for both. Called as diffusers' blocks are, of either kind."""

    def __init__(self, width, form, joint):
        super().__init__()
        self.linear = Layer(width, form) if joint else nn.ModuleDict({s: Layer(width, form) for s in ("txt", "img")})

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        txt, img = (self.linear, self.linear) if isinstance(self.linear, Layer) else (self.linear["txt"], self.linear["img"])
        return txt(encoder_hidden_states, temb), img(hidden_states, temb)


class Seen:
    """What FLUX.2's blocks are not told in a forward, noted by the model for the layers in their places."""

    temb = None  # embedding of the timestep
    text = 0  # number of text tokens


class Replaced2(nn.Module):
    """What stands for replaced blocks of FLUX.2."""

    def __init__(self, width, form, joint, seen):
        super().__init__()
        layer = lambda: Layer(width, form, shares_modulation=True)
        self.linear = layer() if joint else nn.ModuleDict({s: layer() for s in ("txt", "img")})
        self.seen = seen

    def layers(self, txt, img, txt_modulation, img_modulation):
        of_txt, of_img = (self.linear, self.linear) if isinstance(self.linear, Layer) else (self.linear["txt"], self.linear["img"])
        with_batch = lambda mod: mod.unsqueeze(1) if mod.ndim == 2 else mod
        return of_txt(txt, self.seen.temb, with_batch(txt_modulation)), of_img(img, self.seen.temb, with_batch(img_modulation))


class ReplacedDouble2(Replaced2):
    """Called as diffusers' double blocks are."""

    def forward(
        self, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        return self.layers(encoder_hidden_states, hidden_states, temb_mod_txt, temb_mod_img)


class ReplacedSingle2(Replaced2):
    """Called as diffusers' single blocks are: on the text tokens and then those of the image."""

    def forward(self, hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb=None, joint_attention_kwargs=None, **_):
        txt, img = hidden_states[:, : self.seen.text], hidden_states[:, self.seen.text :]
        return torch.cat(self.layers(txt, img, temb_mod, temb_mod), dim=1)


class Pruned:
    """What the classes of both families have in common."""

    _auto_class = "AutoModel"  # `save_pretrained` writes the `auto_map` again
    _renumbered = False  # whether `renumbered` was called: who knows of it need not be told

    def _replace(self, fastflux, replaced):
        """Puts `replaced(kind, entry)` in the place of each block that was replaced."""
        for kind, slots in slots_of(fastflux).items():
            blocks = getattr(self, BLOCKS[kind])
            if fastflux is not None and len(slots) != len(blocks):
                raise ValueError(f"the layout has {len(slots)} {kind} blocks, the configuration says {len(blocks)}")
            for slot, entry in enumerate(slots):
                if isinstance(entry, dict):
                    blocks[slot] = replaced(kind, entry)

    @classmethod
    def from_single_file(cls, path, torch_dtype=None, dtype=None, **_):
        """Opens a .safetensors file that fastflux wrote under the original names. `dtype` or `torch_dtype`: default is the file's."""
        with safe_open(path, "pt") as file:
            record = (file.metadata() or {}).get("fastflux")
            if record is None:
                raise ValueError(f"`{path}` has no fastflux metadata; FluxTransformer2DModel.from_single_file opens other files")
            state = {name: file.get_tensor(name) for name in file.keys()}
        dtype = dtype or torch_dtype or state["img_in.weight"].dtype
        state, config = diffusers_names(state, json.loads(record), dtype, cls._names)
        with torch.device("meta"):
            model = cls(**config)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
        return model.eval()

    def renumbered(self, lora):
        """A LoRA of the unpruned model in diffusers' names, its blocks numbered as they are here; those that were replaced are left out."""
        self._renumbered = True
        here = {}
        for kind, slots in slots_of(self.config.fastflux).items():
            for slot, entry in enumerate(slots):
                if isinstance(entry, str):
                    here[f"{BLOCKS[kind]}.{int(entry.split('.')[1])}"] = f"{BLOCKS[kind]}.{slot}"
        out = {}
        for name, tensor in lora.items():
            block = re.search(r"(?:single_)?transformer_blocks\.\d+(?=\.)", name)
            if block is None or block[0] in here:
                out[name if block is None else name.replace(block[0], here[block[0]], 1)] = tensor
        return out

    def load_lora_adapter(self, *args, **kwargs):
        slots = slots_of(self.config.fastflux).values()
        moved = any(isinstance(entry, str) and int(entry.split(".")[1]) != slot for entries in slots for slot, entry in enumerate(entries))
        if moved and not self._renumbered:
            logger.warning(
                "Blocks are numbered from 0 without gaps in this pruned model. Pass a LoRA of the unpruned one through "
                "`transformer.renumbered(state_dict)` first."
            )
        return super().load_lora_adapter(*args, **kwargs)


class FastFluxTransformer2DModel(Pruned, FluxTransformer2DModel):
    """diffusers' FLUX.1 transformer with linear layers in the place of some blocks; `fastflux["layout"]` says which."""

    _no_split_modules = [*FluxTransformer2DModel._no_split_modules, "ReplacedBlock"]
    _names = FLUX1

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        theta: float = 10000,
        mlp_ratio: float = 4.0,
        fastflux: dict | None = None,
        auto_map: dict | None = None,  # of config.json; unused, but diffusers warns of what it does not find here
    ):
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        if mlp_ratio != 4:
            raise ValueError(f"diffusers' FLUX blocks have MLPs 4 times as wide as the stream, this model's are {mlp_ratio} times")
        self.pos_embed.theta = theta
        self._replace(fastflux, lambda _, entry: ReplacedBlock(self.inner_dim, entry["form"], entry.get("joint", False)))


if Flux2Transformer2DModel is not None:

    class FastFlux2Transformer2DModel(Pruned, Flux2Transformer2DModel):
        """diffusers' FLUX.2 transformer with linear layers in the place of some blocks; `fastflux["layout"]` says which."""

        _no_split_modules = [*Flux2Transformer2DModel._no_split_modules, "ReplacedDouble2", "ReplacedSingle2"]
        _names = FLUX2

        @register_to_config
        def __init__(
            self,
            patch_size: int = 1,
            in_channels: int = 128,
            out_channels: int | None = None,
            num_layers: int = 5,
            num_single_layers: int = 20,
            attention_head_dim: int = 128,
            num_attention_heads: int = 24,
            joint_attention_dim: int = 7680,
            timestep_guidance_channels: int = 256,
            mlp_ratio: float = 3.0,
            axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32),
            rope_theta: float = 2000,
            eps: float = 1e-6,
            guidance_embeds: bool = False,
            fastflux: dict | None = None,
            auto_map: dict | None = None,  # of config.json; unused, but diffusers warns of what it does not find here
        ):
            super().__init__(
                patch_size=patch_size,
                in_channels=in_channels,
                out_channels=out_channels,
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=attention_head_dim,
                num_attention_heads=num_attention_heads,
                joint_attention_dim=joint_attention_dim,
                timestep_guidance_channels=timestep_guidance_channels,
                mlp_ratio=mlp_ratio,
                axes_dims_rope=axes_dims_rope,
                rope_theta=rope_theta,
                eps=eps,
                guidance_embeds=guidance_embeds,
            )
            seen = self._seen = Seen()
            classes = {"double": ReplacedDouble2, "single": ReplacedSingle2}
            self._replace(fastflux, lambda kind, entry: classes[kind](self.inner_dim, entry["form"], entry.get("joint", False), seen))

            def note(_, __, temb):
                seen.temb = temb

            self.time_guidance_embed.register_forward_hook(note)

        def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            self._seen.text = encoder_hidden_states.shape[1]
            return super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)


def slots_of(record):
    """The entries of fastflux's layout that have tensors, by kind: `double.07` for a kept block, a dict for a replacement. Empty without a record."""
    slots = {"double": [], "single": []}
    for entry in record["layout"] if record else []:
        if isinstance(entry, str):
            slots[entry.split(".")[0]].append(entry)
        elif entry["form"] != "remove":
            slots[entry["replaces"][0].split(".")[0]].append(entry)
    return slots


def diffusers_names(state, record, dtype, names):
    """The tensors of a file with original names under diffusers' `names`, float8 ones in `dtype`, and the configuration that they and its metadata
    tell."""
    state = unscaled(state, dtype)
    width, in_channels = state["img_in.weight"].shape
    slots = slots_of(record)
    norm = next(name for name in state if name.endswith("query_norm.scale"))
    config = {
        "in_channels": in_channels,
        "out_channels": state["final_layer.linear.weight"].shape[0],
        "num_layers": len(slots["double"]),
        "num_single_layers": len(slots["single"]),
        "attention_head_dim": state[norm].shape[0],
        "num_attention_heads": width // state[norm].shape[0],
        "joint_attention_dim": state["txt_in.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in state,
        "axes_dims_rope": tuple(record["axes-dims"]),
        "fastflux": record,
    }
    if names is FLUX2:
        config["rope_theta"] = record["theta"]
        # only single blocks' MLPs stand in one matrix with something else; both kinds have the same
        single = next((t for n, t in state.items() if n.endswith("linear1.weight")), None)
        hidden = single.shape[0] - 3 * width if single is not None else next(t for n, t in state.items() if n.endswith("img_mlp.0.weight")).shape[0]
        config["mlp_ratio"] = hidden / (2 * width)
    else:
        config["theta"] = record["theta"]
        config["pooled_projection_dim"] = state["vector_in.in_layer.weight"].shape[1]
    out = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)\.(\w+)", name)
        if block is None:
            module, leaf = name.rsplit(".", 1)
            prefix, modules = "", names["top"][module]
        else:
            kind, slot, module, leaf = block.groups()
            blocks, table = BLOCKS[kind], names[kind]
            # replacement layers have one name in both
            prefix, modules = f"{blocks}.{slot}.", [module] if module.split(".")[0] == "linear" else table[module]
        if module == "final_layer.adaLN_modulation.1":
            # the original's rows are shift and scale, diffusers' scale and shift
            tensor = torch.cat(tensor.chunk(2)[::-1])
        # every part is as wide as the stream, the last one takes what is left
        sizes = [width] * (len(modules) - 1)
        parts = tensor.split([*sizes, tensor.shape[0] - sum(sizes)])
        leaf = "weight" if leaf == "scale" else leaf
        out.update((f"{prefix}{part}.{leaf}", rows.contiguous()) for part, rows in zip(modules, parts))
    return out, config


def unscaled(state, dtype):
    """float8 weights multiplied by their scales in float32 and rounded once, to `dtype`, one at a time; other tensors as they are."""
    state.pop("scaled_fp8", None)
    scales = {name.removesuffix(".scale_weight"): state.pop(name) for name in list(state) if name.endswith(".scale_weight")}
    for name, tensor in state.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = scales.get(name.removesuffix(".weight"), torch.ones(())).float()
            state[name] = (tensor.float() * scale).to(dtype)
    return state
