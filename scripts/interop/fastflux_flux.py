"""FLUX.1 and FLUX.2 transformers pruned by fastflux, in diffusers.

`fastflux prune --layout diffusers` and `fastflux train-sandwich --layout diffusers` put this file next to the weights:

    transformer = AutoModel.from_pretrained("pruned/transformer", trust_remote_code=True, torch_dtype=torch.bfloat16)
    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=transformer, torch_dtype=torch.bfloat16)

(`Flux2KleinPipeline` for FLUX.2.)

The single file that they write otherwise opens with this file in reach (`import fastflux_flux`):

    transformer = fastflux_flux.FastFluxTransformer2DModel.from_single_file("pruned/flux.safetensors", torch_dtype=torch.bfloat16)

`FastFlux2Transformer2DModel` is the class for FLUX.2.
"""

import hashlib
import inspect
import json
import pathlib
import re
import shutil
import sys

import torch
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401: diffusers asks the module of a component for its base
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
# the name of this module in the model_index.json of a saved pipeline, whatever name it was imported under
MODULE = "fastflux_flux"
sys.modules.setdefault(MODULE, sys.modules[__name__])

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
BLOCKS = {"double": ("transformer_blocks", DOUBLE), "single": ("single_transformer_blocks", SINGLE)}

# FLUX.2 has no pooled text and shares its modulation, and the first projections of its single blocks are not split.
TOP2 = {
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
}
DOUBLE2 = {
    **{name: modules for name, modules in DOUBLE.items() if "_norm" in name},
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.linear_in"],
    "img_mlp.2": ["ff.linear_out"],
    "txt_mlp.0": ["ff_context.linear_in"],
    "txt_mlp.2": ["ff_context.linear_out"],
}
SINGLE2 = {
    "linear1": ["attn.to_qkv_mlp_proj"],
    "linear2": ["attn.to_out"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
}
BLOCKS2 = {"double": ("transformer_blocks", DOUBLE2), "single": ("single_transformer_blocks", SINGLE2)}
# In config.json it makes diffusers' own classes refuse the folder, with this text, instead of inventing the blocks that they do not find.
REFUSED = {
    "quant_method": "fastflux, for a model that diffusers has no class for: open it with AutoModel.from_pretrained(FOLDER, trust_remote_code=True)"
}


def tables_of(names):
    """The names outside the blocks and in them of the family that names of tensors, or keys of a configuration, belong to."""
    is_flux2 = any(name == "rope_theta" or name.startswith("single_stream_modulation.") for name in names)
    return (TOP2, BLOCKS2) if is_flux2 else (TOP, BLOCKS)


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


def streams(linear):
    """The layers of the text and the image tokens. Not told by `Layer`: diffusers runs this file again for each model that it opens."""
    return (linear["txt"], linear["img"]) if isinstance(linear, nn.ModuleDict) else (linear, linear)


class ReplacedBlock(nn.Module):
    """What stands for one or several replaced blocks: a layer for each stream, or one for both. Called as diffusers' blocks are, of either kind."""

    def __init__(self, width, form, joint):
        super().__init__()
        self.linear = Layer(width, form) if joint else nn.ModuleDict({s: Layer(width, form) for s in ("txt", "img")})

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        txt, img = streams(self.linear)
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
        of_txt, of_img = streams(self.linear)
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

    def _sizes(self, cls):
        """What the configuration says of the arguments of diffusers' own class."""
        return {name: self.config[name] for name in inspect.signature(cls.__init__).parameters if name in self.config}

    def _replace(self, fastflux, replaced):
        """Puts `replaced(kind, entry)` in the place of each block that was replaced."""
        for kind, slots in slots_of(fastflux).items():
            blocks = getattr(self, BLOCKS[kind][0])
            if fastflux is not None and len(slots) != len(blocks):
                raise ValueError(f"the layout has {len(slots)} {kind} blocks, the configuration says {len(blocks)}")
            for slot, entry in enumerate(slots):
                if isinstance(entry, dict):
                    blocks[slot] = replaced(kind, entry)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As diffusers', without what keeps other classes out."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if str((config.get("quantization_config") or {}).get("quant_method")).startswith("fastflux"):
            del config["quantization_config"]
        return loaded

    def to_json_string(self):
        config = json.loads(super().to_json_string())
        return json.dumps({**config, "quantization_config": config.get("quantization_config", REFUSED)}, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As diffusers', with this file next to the weights, so that the folder opens again."""
        super().save_pretrained(save_directory, *args, **kwargs)
        target = pathlib.Path(save_directory) / "fastflux_flux.py"
        if not target.exists() or not target.samefile(__file__):
            shutil.copyfile(__file__, target)

    @classmethod
    def from_single_file(cls, path, torch_dtype=None, dtype=None, **_):
        """Opens a .safetensors file that fastflux wrote under the original names. `dtype` or `torch_dtype`: default is the file's."""
        with safe_open(path, "pt") as file:
            record = (file.metadata() or {}).get("fastflux")
            if record is None:
                raise ValueError(f"`{path}` has no fastflux metadata; FluxTransformer2DModel.from_single_file opens other files")
            state = {name: file.get_tensor(name) for name in file.keys()}
        dtype = dtype or torch_dtype or state["img_in.weight"].dtype
        state, config = diffusers_names(state, json.loads(record), dtype)
        with torch.device("meta"):
            model = cls(**config)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
        return model.eval()

    @classmethod
    def from_patch(cls, base, patch, level=None, torch_dtype=None, dtype=None, **_):
        """The pruned model that a patch (`fastflux diff`, `prune --patch`) makes of its base: a folder in diffusers layout (or the transformer's own), or
        a file with original names. `level`: which of several, such as "20"."""
        record, tensors = opened_patch(patch, level)
        state = original_names(opened_base(pathlib.Path(base)))
        found = fingerprint(state)
        if found != record["base-fingerprint"]:
            raise ValueError(
                f"the patch `{patch}` is for `{record['base']}` (fingerprint {record['base-fingerprint']}), and `{base}` is another model "
                f"(fingerprint {found})"
            )
        kept = {}
        for kind, slots in slots_of(record).items():
            kept |= {f"{kind}_blocks.{int(e.split('.')[1])}.": f"{kind}_blocks.{slot}." for slot, e in enumerate(slots) if isinstance(e, str)}
        pruned = {}
        for name, tensor in state.items():
            block = re.match(r"(double|single)_blocks\.\d+\.", name)
            if block is None:
                pruned[name] = tensor
            elif block[0] in kept:
                pruned[name.replace(block[0], kept[block[0]], 1)] = tensor
        pruned |= tensors
        dtype = dtype or torch_dtype or pruned["img_in.weight"].dtype
        state, config = diffusers_names(pruned, record, dtype)
        with torch.device("meta"):
            model = cls(**config)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
        return model.eval()

    def renumbered(self, lora):
        """A LoRA of the unpruned model, of any dialect (a state dict or a path), in diffusers' names and with its blocks numbered as they are here.

        What acts on replaced blocks falls away, with a warning that says how much. Names that are none of this model's are an error.
        """
        return renumbered(lora, self.config)

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, *args, metadata=None, network_alphas=None, **kwargs):
        lora = pretrained_model_name_or_path_or_dict
        if isinstance(lora, dict) and not any(hasattr(tensor, "fastflux_renumbered") for tensor in lora.values()):
            # of the unpruned model, as all files are, and already in diffusers' names
            lora = lora | (network_alphas or {})
            metadata = {key.removeprefix("transformer."): value for key, value in (metadata or {}).items()}
            lora, metadata, network_alphas = renumbered(lora, self.config, metadata), None, None
        elif not isinstance(lora, dict):
            raise ValueError(f"pass `{lora}` through `transformer.renumbered` first: this pruned model numbers its blocks without gaps")
        return super().load_lora_adapter(lora, *args, metadata=metadata, network_alphas=network_alphas, **kwargs)


class FastFluxTransformer2DModel(Pruned, FluxTransformer2DModel):
    """diffusers' FLUX.1 transformer with linear layers in the place of some blocks; `fastflux["layout"]` says which."""

    __module__ = MODULE
    _no_split_modules = [*FluxTransformer2DModel._no_split_modules, "ReplacedBlock"]

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
        super().__init__(**self._sizes(FluxTransformer2DModel))
        if mlp_ratio != 4:
            raise ValueError(f"diffusers' FLUX blocks have MLPs 4 times as wide as the stream, this model's are {mlp_ratio} times")
        self.pos_embed.theta = theta
        self._replace(fastflux, lambda _, entry: ReplacedBlock(self.inner_dim, entry["form"], entry.get("joint", False)))


if Flux2Transformer2DModel is not None:

    class FastFlux2Transformer2DModel(Pruned, Flux2Transformer2DModel):
        """diffusers' FLUX.2 transformer with linear layers in the place of some blocks; `fastflux["layout"]` says which."""

        __module__ = MODULE
        _no_split_modules = [*Flux2Transformer2DModel._no_split_modules, "ReplacedDouble2", "ReplacedSingle2"]

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
            super().__init__(**self._sizes(Flux2Transformer2DModel))
            seen = self._seen = Seen()
            classes = {"double": ReplacedDouble2, "single": ReplacedSingle2}
            self._replace(fastflux, lambda kind, entry: classes[kind](self.inner_dim, entry["form"], entry.get("joint", False), seen))

            def note(_, __, temb):
                seen.temb = temb

            self.time_guidance_embed.register_forward_hook(note)

        def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            self._seen.text = encoder_hidden_states.shape[1]
            return super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)


# Endings of names in LoRA files, and what the tensors are.
ENDINGS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A": "down", ".lora_B": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up", ".down.weight": "down", ".up.weight": "up",
    ".alpha": "alpha", ".lora_B.bias": "bias", ".lora_up.bias": "bias",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
# The name of an adapter, which stands in names where a model that PEFT has wrapped was saved as it is.
ADAPTER = re.compile(r"(\.lora_[AB]|\.lora_magnitude_vector)\.[^.]+(\.weight|\.bias)$")
# What stands before the names of modules, also several of them: diffusers and ai-toolkit, ComfyUI, PEFT, pipelines and wrappers of PyTorch, kohya,
# OneTrainer, LyCORIS; nothing in XLabs' files.
PREFIXES = [
    "transformer.", "diffusion_model.", "base_model.model.", "model.", "unet.", "pipe.", "module.", "_orig_mod.", "lora_unet_", "lora_transformer_",
    "lycoris_", "transformer_",
]  # fmt: skip
# XLabs' processors. That of single blocks acts on q, k and v only.
PROCESSORS = {
    "double": {
        "processor.qkv_lora1": ("img_attn.qkv", 0, 3), "processor.qkv_lora2": ("txt_attn.qkv", 0, 3),
        "processor.proj_lora1": ("img_attn.proj", 0, 1), "processor.proj_lora2": ("txt_attn.proj", 0, 1),
    },
    "single": {"processor.qkv_lora": ("linear1", 0, 3), "processor.proj_lora": ("linear2", 0, 1)},
}  # fmt: skip
# Parts of names that tell of another model, or of a form that diffusers cannot add.
FOREIGN = {
    "input_blocks": "SDXL", "output_blocks": "SDXL", "middle_block": "SDXL", "down_blocks": "Stable Diffusion", "up_blocks": "Stable Diffusion",
    "mid_block": "Stable Diffusion", "joint_blocks": "Stable Diffusion 3", "stream_modulation": "FLUX.2", "to_qkv_mlp_proj": "FLUX.2",
    "linear_in": "FLUX.2", "distilled_guidance_layer": "Chroma", "img_attn_qkv": "HunyuanVideo", "img_mod.1": "Qwen-Image", "cross_attn": "Wan",
}  # fmt: skip
FORMS = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA in kohya's names", ".diff": "differences of whole weights", "oft_": "OFT"}
FORMS |= {".w_norm": FORMS[".diff"], ".b_norm": FORMS[".diff"]}


def spellings(counts, top, blocks_of):
    """Names of all modules of the unpruned model, with dots and underscores: (kind or None, block, original module, first part, parts)."""
    out = {}

    def add(name, *place):
        out[name] = out[name.replace(".", "_")] = place

    for original, theirs in top.items():
        add(original, None, None, original, 0, 1)
        # diffusers' rows of the final modulation are in another order
        add(theirs[0], None, None, theirs[0], 0, 1)
    for kind, (blocks, table) in blocks_of.items():
        for index in range(counts[kind]):
            for original, parts in table.items():
                add(f"{kind}_blocks.{index}.{original}", kind, index, original, 0, len(parts))
                for first, part in enumerate(parts):
                    add(f"{blocks}.{index}.{part}", kind, index, original, first, 1)
            for processor, place in PROCESSORS[kind].items():
                add(f"{kind}_blocks.{index}.{processor}", kind, index, *place)
    return out


def opened(lora):
    """The tensors of a LoRA and what is said of its scale, from a path or a state dict."""
    if isinstance(lora, dict):
        return dict(lora), None
    path = pathlib.Path(lora)
    if path.is_dir():
        path = next(path / name for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors") if (path / name).is_file())
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        said = (file.metadata() or {}).get("lora_adapter_metadata")
    metadata = None
    if said is not None:
        metadata = {key.removeprefix("transformer."): value for key, value in json.loads(said).items() if key.startswith("transformer.")}
    elif (path.parent / "adapter_config.json").is_file() and path.name == "adapter_model.safetensors":
        metadata = json.loads((path.parent / "adapter_config.json").read_text())
    return tensors, metadata


def scale_of(module, rank, metadata):
    """alpha / rank of a module by PEFT's configuration, whose patterns are of the ends of names."""
    if not metadata or metadata.get("lora_alpha") is None:
        return 1.0
    alpha = metadata["lora_alpha"]
    for pattern, value in (metadata.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if metadata.get("use_rslora") else rank)


def bare_name(module, known):
    """A module's name without what stands before it; None where it is none of those that are known."""
    while module not in known:
        prefix = next((prefix for prefix in PREFIXES if module.startswith(prefix)), None)
        if prefix is None:
            return None
        module = module.removeprefix(prefix)
    return module


def refusal(name, family):
    for word, form in FORMS.items():
        if word in name:
            return f"`{name}`: {form} cannot be added in diffusers; `fastflux convert --lora` merges it"
    if any(word in name for word in ("query_norm", "key_norm", "norm_q", "norm_k", "norm_added")):
        return f"`{name}`: a control LoRA, which turns the model into another one"
    for word, model in FOREIGN.items():
        if word in name:
            return f"`{name}`: the LoRA is for {model}, not for {family}"
    return f"`{name}` is no tensor of a LoRA for {family} that is known here"


def text_name(name, family):
    """diffusers' name of a tensor of a CLIP LoRA; None for T5's, which diffusers has no place for."""
    module, ending = next(((name.removesuffix(e), e) for e in ENDINGS if name.endswith(e)), (None, None))
    if module is None:
        raise ValueError(refusal(name, family))
    if "text_model" not in module:
        return None
    found = re.search(r"text_model[._]encoder[._]layers[._](\d+)[._](self_attn|mlp)[._](\w+)$", module)
    if found is None:
        raise ValueError(refusal(name, family))
    return f"text_encoder.text_model.encoder.layers.{found[1]}.{found[2]}.{found[3]}", ENDINGS[ending]


def renumbered(lora, config, metadata=None):
    """See `FastFluxTransformer2DModel.renumbered`. `config`: that of the pruned model, or a dict with its `fastflux` record."""
    tensors, said = opened(lora)
    metadata = metadata or said
    record = config["fastflux"]
    layout = record["layout"] if record else []
    originals = [block for entry in layout for block in ([entry] if isinstance(entry, str) else entry["replaces"])]
    counts = {kind: sum(block.startswith(kind) for block in originals) for kind in BLOCKS}
    if not record:
        counts = {"double": config["num_layers"], "single": config["num_single_layers"]}
    top, blocks_of = tables_of(config)
    known, slots = spellings(counts, top, blocks_of), slots_of(record)
    family = "FLUX.2" if top is TOP2 else "FLUX.1"
    modules, text = {}, {}
    for name, tensor in tensors.items():
        name = ADAPTER.sub(r"\1\2", name)
        if "text_model" in name or re.search(r"encoder[._]block[._]", name) or name.startswith("text_encoder"):
            place = text_name(name, family)
            if place is None:
                text.setdefault(None, {})[name] = tensor
            else:
                text.setdefault(place[0], {})[place[1]] = tensor
            continue
        module, role = next(((name.removesuffix(e), role) for e, role in ENDINGS.items() if name.endswith(e)), (None, None))
        bare = module and bare_name(module, known)
        if bare is None:
            raise ValueError(refusal(name, family))
        if role in modules.setdefault((module, bare), {}):
            raise ValueError(f"`{name}` is in the file for two adapters")
        modules[module, bare][role] = tensor
    out, gone, blocks = {}, 0, set()
    for (module, bare), parts in modules.items():
        kind, index, original, first, count = known[bare]
        if kind is None:
            theirs = top.get(original, [original])
            swap = original == "final_layer.adaLN_modulation.1"
            targets = theirs
        else:
            block, swap = f"{kind}.{index:02}", False
            if record and block not in slots[kind]:
                gone += len(parts)
                blocks.add(block)
                continue
            slot = slots[kind].index(block) if record else index
            names = blocks_of[kind][1][original][first : first + count]
            targets = [f"{BLOCKS[kind][0]}.{slot}.{name}" for name in names]
        add_module(out, module, bare, targets, parts, swap, metadata)
    for name, parts in text.items():
        if name is not None:
            add_module(out, name, name, [name], parts, False, None, prefix="")
    if not out:
        raise ValueError(f"nothing of the LoRA applies: all of it acts on replaced blocks ({', '.join(sorted(blocks))})")
    if gone:
        logger.warning(f"{gone} of the LoRA's {len(tensors)} tensors fall away, as these blocks are replaced: {', '.join(sorted(blocks))}")
    if None in text:
        logger.warning(f"{len(text[None])} of the LoRA's {len(tensors)} tensors fall away: diffusers adds nothing to T5")
    for tensor in out.values():
        tensor.fastflux_renumbered = True
    return out


def add_module(out, module, bare, targets, parts, swap, metadata, prefix="transformer."):
    """Puts one module's factors under diffusers' names: those of a fused one share A and split the rows of B."""
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"`{module}` has {', '.join(sorted(parts))}, but not both factors")
    down, up = (parts[role].reshape(parts[role].shape[:2]) for role in ("down", "up"))
    scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else scale_of(bare, down.shape[0], metadata)
    rows = {"up": up if scale == 1 else (up.float() * scale).to(up.dtype)}
    if "bias" in parts:
        rows["bias"] = parts["bias"] if scale == 1 else (parts["bias"].float() * scale).to(up.dtype)
    if "magnitude" in parts:
        rows["magnitude"] = parts["magnitude"]
    if swap:
        rows = {role: torch.cat(tensor.chunk(2)[::-1]) for role, tensor in rows.items()}
    width = up.shape[0] // len(targets)
    if targets[-1].endswith("proj_mlp") and len(targets) == 4:
        width = down.shape[1]  # q, k and v are as wide as the stream, the MLP takes the rest
    sizes = [width] * (len(targets) - 1)
    sizes.append(up.shape[0] - sum(sizes))
    names = {"up": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
    for role, tensor in rows.items():
        for target, part in zip(targets, tensor.split(sizes)):
            out[f"{prefix}{target}.{names[role]}"] = part.clone().contiguous()
    for target in targets:
        out[f"{prefix}{target}.lora_A.weight"] = down.clone().contiguous()


def opened_patch(path, level):
    """The record and the tensors of one pruned model in a patch."""
    with safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get("fastflux-patch")
        if said is None:
            raise ValueError(f"`{path}` is no patch of fastflux")
        levels = json.loads(said)["levels"]
        if level is None and len(levels) > 1:
            raise ValueError(f"`{path}` holds the levels {', '.join(levels)}: name one of them")
        level = str(level) if level is not None else next(iter(levels))
        if level not in levels:
            raise ValueError(f"`{path}` has no level {level}, but {', '.join(levels)}")
        prefix = f"{level}/"
        return levels[level], {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}


def opened_base(path):
    """The tensors of a transformer in a file, or in a folder or its sub-folder `transformer`."""
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [path]
    state = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            state.update((name, opened.get_tensor(name)) for name in opened.keys())
    return state


def original_names(state):
    """The tensors of an unpruned transformer under the original names."""
    for prefix in ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", ""):
        if f"{prefix}img_in.weight" in state:
            names = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
            return {re.sub(r"(query_norm|key_norm)\.weight$", r"\1.scale", new): state[old] for old, new in names.items()}
    top, blocks_of = tables_of(state)
    out = {}
    for original, (theirs,) in top.items():
        for leaf in ("weight", "bias"):
            if f"{theirs}.{leaf}" in state:
                tensor = state[f"{theirs}.{leaf}"]
                swap = original == "final_layer.adaLN_modulation.1"
                out[f"{original}.{leaf}"] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor
    for kind, (blocks, table) in blocks_of.items():
        indices = {int(found[1]) for found in (re.match(rf"{blocks}\.(\d+)\.", name) for name in state) if found}
        for index in indices:
            for original, theirs in table.items():
                for leaf in ("weight", "bias"):
                    parts = [f"{blocks}.{index}.{part}.{leaf}" for part in theirs]
                    if all(part in state for part in parts):
                        ending = "scale" if original.endswith("_norm") else leaf
                        out[f"{kind}_blocks.{index}.{original}.{ending}"] = torch.cat([state[part] for part in parts])
    return out


FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}


def fingerprint(state):
    """fastflux's short identity of a checkpoint: names, formats, shapes, and the first and last 4096 bytes of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous().flatten()
        count = min(4096 // tensor.element_size(), tensor.numel())
        digest.update(f"{name} {FORMATS[tensor.dtype]} {list(state[name].shape)}\n".encode())
        for end in (tensor[:count], tensor[tensor.numel() - count :]):
            digest.update(end.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def slots_of(record):
    """The entries of fastflux's layout that have tensors, by kind: `double.07` for a kept block, a dict for a replacement. Empty without a record."""
    slots = {"double": [], "single": []}
    for entry in record["layout"] if record else []:
        if isinstance(entry, str):
            slots[entry.split(".")[0]].append(entry)
        elif entry["form"] != "remove":
            slots[entry["replaces"][0].split(".")[0]].append(entry)
    return slots


def diffusers_names(state, record, dtype):
    """The tensors of a file with original names under diffusers' names, float8 ones in `dtype`, and the configuration that they and its metadata tell."""
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
    top, blocks_of = tables_of(state)
    if top is TOP2:
        config["rope_theta"] = record["theta"]
        # the MLP's two halves stand behind q, k and v in a single block, and alone in a double one
        single = next((t.shape[0] - 3 * width for n, t in state.items() if n.endswith("linear1.weight")), None)
        config["mlp_ratio"] = (single or next(t.shape[0] for n, t in state.items() if n.endswith("img_mlp.0.weight"))) / (2 * width)
    else:
        config["theta"] = record["theta"]
        config["pooled_projection_dim"] = state["vector_in.in_layer.weight"].shape[1]
    out = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)\.(\w+)", name)
        if block is None:
            module, leaf = name.rsplit(".", 1)
            prefix, modules = "", top[module]
        else:
            kind, slot, module, leaf = block.groups()
            blocks, table = blocks_of[kind]
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
