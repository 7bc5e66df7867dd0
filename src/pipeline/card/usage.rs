//! What a card says about using the model in fastflux, diffusers and ComfyUI.

use std::fmt::Write as _;

use super::CardFacts;
use crate::{
    checkpoint::{output::Naming, record::Record},
    layout::{BlockSpec, Form},
};

/// How to use it in the three programs; `base` is the hub's name of the base, or a word for it.
pub(super) fn usage(record: &Record, facts: &CardFacts, base: &str) -> String {
    let prompt = "--prompt \"a fox in the snow\"";
    let mut out = "\n## How to use it\n\nfastflux:\n\n```\n".to_owned();
    let model = if facts.patch {
        format!("{base} --patch patch.safetensors")
    } else {
        "FOLDER".to_owned()
    };
    let _ = writeln!(out, "fastflux generate --model {model} {prompt}\n```");
    if facts.patch {
        out += "\n`fastflux convert --model BASE --patch patch.safetensors --dtype bf16 --output whole` writes the whole checkpoint for other programs.\n";
        return out;
    }
    let plain = record.layout.iter().all(|spec| match spec {
        BlockSpec::Original(_) => true,
        BlockSpec::Replaced(r) => r.form == Form::Remove,
    });
    let (plain_class, pruned_class, pipeline) = if facts.family.starts_with("FLUX.2") {
        (
            "Flux2Transformer2DModel",
            "FastFlux2Transformer2DModel",
            "Flux2KleinPipeline",
        )
    } else {
        (
            "FluxTransformer2DModel",
            "FastFluxTransformer2DModel",
            "FluxPipeline",
        )
    };
    let trust = if plain {
        ""
    } else {
        ", trust_remote_code=True"
    };
    if facts.layout == Naming::Diffusers {
        out += "\ndiffusers:\n\n```python\n";
        let _ = if facts.whole {
            writeln!(
                out,
                "pipe = DiffusionPipeline.from_pretrained(\"FOLDER\"{trust}, torch_dtype=torch.bfloat16)"
            )
        } else {
            let class = if plain { plain_class } else { "AutoModel" };
            writeln!(
                out,
                "transformer = {class}.from_pretrained(\"FOLDER/transformer\"{trust}, torch_dtype=torch.bfloat16)\npipe = {pipeline}.from_pretrained(\"{base}\", transformer=transformer, torch_dtype=torch.bfloat16)"
            )
        };
        out += "```\n\nComfyUI: `fastflux convert --model FOLDER --dtype bf16 --output flux.safetensors` writes the file for it.\n";
    } else if plain {
        out += "\nComfyUI, stable-diffusion.cpp and others open the file in this folder as any FLUX with fewer blocks; diffusers opens what `fastflux convert` and `prune --layout diffusers` write.\n";
    } else {
        let _ = write!(
            out,
            "\nComfyUI: put `comfyui_fastflux.py` (in `scripts/interop` of fastflux) into `custom_nodes` and the file of this folder into `models/diffusion_models`; the node \"Load fastflux model\" opens it.\n\ndiffusers: `fastflux_flux.{pruned_class}.from_single_file(\"flux.safetensors\")`, with `fastflux_flux.py` from the same folder; {plain_class}'s own ends with a `KeyError` at the first replaced block.\n\nOther programs do not know the linear layers: they ignore them or fail.\n"
        );
    }
    out
}
