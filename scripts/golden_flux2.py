# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.42", "transformers>=5", "safetensors", "tokenizers", "pillow", "numpy"]
# ///
"""Make tests/golden/flux2: a tiny random FLUX.2 [klein] pipeline and what diffusers computes with it, for `fastflux verify --reference`.

    pipe/                  the pipeline in diffusers layout, weights in bfloat16
    bfl.safetensors        its transformer under the original single-file names
    reference.safetensors  float32: text states, one call of the transformer with every block, VAE, prompt to image, and an edited image
    reference.png          the reference image of the edited one
    base.safetensors       prompt to image as an undistilled model draws it, with true guidance
    qwen_ids.json          ids of the tiny tokenizer on odd texts

The same versions of torch, diffusers and transformers give the same weights; recordings agree to float32 rounding.

    python scripts/golden_flux2.py [--pipeline OUT]

With OUT only a pipeline is made, there: of two heads of FLUX.2's size and its 128 channels, which is what ComfyUI takes for FLUX.2.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

OUT = pathlib.Path(__file__).resolve().parents[1] / "tests/golden/flux2"
PROMPT = "a photo of a small red house under a tall tree, at night"
WIDTH, HEIGHT, STEPS, TEXT, SEED = 80, 48, 4, 24, 4321
WORDS = "user assistant a an the small large red green blue house tree dog on in at under night day and with of photo street old new"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
ODD = ["", "a", "The OLD house's tree,  12 dogs!", "  two spaces\nand a line\r\n", "ein Häuschen — 夜 🌙", "it's<|im_end|>not the end"]


def tokenizer(folder):
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator([WORDS] * 4, trainer)
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tok.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 131072}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return Qwen2TokenizerFast.from_pretrained(folder)


def randomized(model, gain=1.0):
    """Weights that keep the size of what goes through them, rounded to bfloat16."""
    with torch.no_grad():
        for tensor in model.parameters():
            value = 1 + 0.2 * torch.randn_like(tensor) if tensor.ndim == 1 else torch.randn_like(tensor) * gain / tensor.shape[1] ** 0.5
            tensor.copy_(value.bfloat16())
    return model.eval()


def pipeline(tok, channels=4, double=1, single=2, axes=(4, 2, 6, 4), gain=1.2):
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tok), hidden_size=16, intermediate_size=24, num_hidden_layers=28, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=4096, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
        )
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=4 * channels, num_layers=double, num_single_layers=single, attention_head_dim=sum(axes), num_attention_heads=2,
        joint_attention_dim=48, axes_dims_rope=axes, rope_theta=2000, guidance_embeds=False,
    )  # fmt: skip
    # a decoder of other widths than the encoder, as the small one has
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), decoder_block_out_channels=(4, 8, 8, 12), layers_per_block=1, norm_num_groups=2,
        latent_channels=channels, sample_size=64,
    )  # fmt: skip
    for model, of_model in ((text, 1.0), (transformer, gain), (vae, 1.0)):
        randomized(model, of_model)
    vae.bn.running_mean.copy_((0.3 * torch.randn(4 * channels)).bfloat16())
    vae.bn.running_var.copy_(torch.empty(4 * channels).uniform_(0.5, 2.0).bfloat16())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = Flux2KleinPipeline(scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=tok, transformer=transformer, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def original(state):
    """The transformer's tensors under the original names."""
    names = {
        "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin", "single_stream_modulation.linear": "single_stream_modulation.lin",
        "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm", "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm", "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
    }  # fmt: skip
    single = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
    out = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        prefix, table = "", names
        if module.startswith(("transformer_blocks.", "single_transformer_blocks.")):
            stack, index, module = module.split(".", 2)
            kind = "single" if stack.startswith("single") else "double"
            prefix, table = f"{kind}_blocks.{index}.", single if kind == "single" else names
        if module == "norm_out.linear":
            out["final_layer.adaLN_modulation.1.weight"] = torch.cat(tensor.chunk(2)[::-1])
        elif module in ("attn.to_q", "attn.add_q_proj"):
            stream = "img" if module == "attn.to_q" else "txt"
            parts = [state[name.replace("_q", f"_{x}")] for x in "qkv"]
            out[f"{prefix}{stream}_attn.qkv.weight"] = torch.cat(parts)
        elif module not in ("attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj"):
            new = table[module]
            out[f"{prefix}{new}.{'scale' if new.endswith('_norm') else 'weight'}"] = tensor
    return {name: tensor.bfloat16().contiguous() for name, tensor in out.items()}


def call(pipe, tensors, generator):
    """One call of the transformer, with the outputs of all blocks."""
    rows, columns = HEIGHT // 16, WIDTH // 16
    img = torch.randn(2, rows * columns, 16, generator=generator)
    txt = torch.randn(2, TEXT, 48, generator=generator)
    timestep = torch.rand(2, generator=generator)
    img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns), torch.arange(1))
    txt_ids = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(TEXT))

    def keep(name):
        def hook(_, __, output):
            if name.startswith("double"):
                tensors[f"blocks.{name}.txt"], tensors[f"blocks.{name}.img"] = output
            else:
                tensors[f"blocks.{name}.x"] = output

        return hook

    model = pipe.transformer
    hooks = [block.register_forward_hook(keep(f"double_blocks.{i}")) for i, block in enumerate(model.transformer_blocks)]
    hooks += [block.register_forward_hook(keep(f"single_blocks.{i}")) for i, block in enumerate(model.single_transformer_blocks)]
    velocity = model(img, txt, timestep, img_ids, txt_ids, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    values = {"img": img, "txt": txt, "timestep": timestep, "img_ids": img_ids, "txt_ids": txt_ids, "velocity": velocity}
    tensors.update((f"transformer.{name}", value) for name, value in values.items())


def whole(pipe, tensors, generator, guidance, image=None):
    """From prompt and noise to images."""
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": guidance, "max_sequence_length": TEXT}
    latents = torch.randn(1, 16, HEIGHT // 16, WIDTH // 16, generator=generator)
    seeded = lambda: torch.Generator("cpu").manual_seed(SEED)
    tensors["pipeline.latents"] = latents
    tensors["pipeline.final_latents"] = pipe(prompt=PROMPT, latents=latents.clone(), output_type="latent", **options).images
    tensors["pipeline.sigmas"] = pipe.scheduler.sigmas.clone()
    tensors["pipeline.image"] = pipe(prompt=PROMPT, latents=latents.clone(), output_type="pt", **options).images
    tensors["pipeline.seeded_image"] = pipe(prompt=PROMPT, generator=seeded(), output_type="pt", **options).images
    if image is not None:
        tensors["pipeline.edited_image"] = pipe(prompt=PROMPT, image=image, generator=seeded(), output_type="pt", **options).images


def save(name, tensors, guidance):
    metadata = {"prompt": PROMPT, "image_seed": SEED, "height": HEIGHT, "width": WIDTH, "steps": STEPS, "guidance": guidance, "text_len": TEXT}
    tensors = {k: (v.float() if v.is_floating_point() else v.long()).contiguous() for k, v in tensors.items()}
    save_file(tensors, OUT / name, metadata={key: str(value) for key, value in metadata.items()})


@torch.no_grad()
def larger(out):
    """A pipeline of the sizes that ComfyUI takes for FLUX.2's, with its transformer under the original names next to it."""
    # a larger gain makes activations of 10^5 in so many blocks, and the difference of two programs grows with them
    pipe = pipeline(tokenizer(out / "pipe/tokenizer"), channels=32, double=3, single=6, axes=(32, 32, 32, 32), gain=0.7)
    pipe.to(torch.bfloat16)
    pipe.save_pretrained(out / "pipe")
    (out / "pipe/fastflux.json").write_text(json.dumps({"text-length": TEXT, "size": 64}))
    save_file(original(pipe.transformer.state_dict()), out / "bfl.safetensors")


@torch.no_grad()
def main():
    tok = tokenizer(OUT / "pipe/tokenizer")
    pipe = pipeline(tok)
    pipe.to(torch.bfloat16).save_pretrained(OUT / "pipe")
    # opened again: frequencies of positions, which are in no file, were rounded too
    pipe = Flux2KleinPipeline.from_pretrained(OUT / "pipe", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    save_file(original(pipe.transformer.state_dict()), OUT / "bfl.safetensors")
    generator = torch.Generator().manual_seed(6)
    tensors = {}
    message = tok.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    ids = tok(message, return_tensors="pt", padding="max_length", truncation=True, max_length=TEXT)
    tensors["qwen.input_ids"], tensors["qwen.attention_mask"] = ids.input_ids, ids.attention_mask
    tensors["qwen.hidden"], _ = pipe.encode_prompt(PROMPT, max_sequence_length=TEXT)
    call(pipe, tensors, generator)
    latents = torch.randn(1, 16, HEIGHT // 16, WIDTH // 16, generator=generator)
    view = lambda tensor: tensor.view(1, -1, 1, 1)
    unscaled = latents * torch.sqrt(view(pipe.vae.bn.running_var) + pipe.vae.config.batch_norm_eps) + view(pipe.vae.bn.running_mean)
    tensors["vae.latents"] = latents
    tensors["vae.image"] = pipe.vae.decode(pipe._unpatchify_latents(unscaled), return_dict=False)[0]
    # its sides are no multiples of 16
    rgb = (np.indices((72, 100)).sum(0)[..., None] * np.array([3, 5, 7]) % 256).astype("uint8")
    image = Image.fromarray(rgb)
    image.save(OUT / "reference.png")
    whole(pipe, tensors, generator, 1.0, image)
    save("reference.safetensors", tensors, 1.0)
    pipe.register_to_config(is_distilled=False)
    base = {}
    whole(pipe, base, generator, 4.0)
    save("base.safetensors", base, 4.0)
    chat = lambda text: tok.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    encode = lambda text: tok(chat(text), padding="max_length", truncation=True, max_length=48).input_ids
    (OUT / "qwen_ids.json").write_text(json.dumps([{"text": text, "ids": encode(text)} for text in ODD], ensure_ascii=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=pathlib.Path, metavar="OUT", help="make only a pipeline for ComfyUI, in this folder")
    args = parser.parse_args()
    torch.manual_seed(5)
    transformers.utils.logging.set_verbosity_error()
    larger(args.pipeline) if args.pipeline else main()
