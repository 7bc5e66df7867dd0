# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35", "transformers>=4.48", "safetensors", "accelerate", "sentencepiece"]
# ///
"""Record what diffusers computes with a FLUX pipeline, for `fastflux verify --reference`.

PIPELINE is a folder in diffusers layout, tiny or real. Every part is loaded on its own, used and freed, so the largest
part (the transformer) is what has to fit. For a real model on one GPU:

    make_reference.py FLUX.1-dev dev.safetensors --dtype bfloat16 --width 1024 --height 1024 --steps 28 \\
        --batch 1 --inputs prompt --components clip,t5,transformer,pipeline

which leaves out `blocks`, the outputs of all blocks (3 GB there). OUT holds float32 tensors:

    clip         clip.input_ids, clip.pooled
    t5           t5.input_ids, t5.hidden
    transformer  transformer.{img,txt,vec,timestep,guidance,img_ids,txt_ids,velocity}: one call
    blocks       blocks.double_blocks.I.{img,txt}, blocks.single_blocks.I.x (text tokens first), in that call
    vae          vae.latents, vae.image
    pipeline     pipeline.{latents,sigmas,final_latents,image,seeded_image}: prompt to image
"""

import argparse
import gc
import importlib.metadata
import json
import pathlib

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import FluxPipeline
from safetensors.torch import save_file

COMPONENTS = ["clip", "t5", "transformer", "blocks", "vae", "pipeline"]
PARTS = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer", "vae", "scheduler"]
# Latent pixels per image pixel, and per token: FLUX packs 2x2 latent pixels into a token.
PIXELS_PER_TOKEN = 16


class Recorder:
    """Loads parts of one pipeline and collects named tensors."""

    def __init__(self, args):
        self.args = args
        self.tensors = {}
        # What the whole pipeline is told of the negative prompt.
        self.negative = {}
        self.dtype = getattr(torch, args.dtype)
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.config = json.loads((args.pipeline / "transformer" / "config.json").read_text())
        self.guided = bool(self.config.get("guidance_embeds"))
        self.rows = args.height // PIXELS_PER_TOKEN
        self.columns = args.width // PIXELS_PER_TOKEN
        # Inputs come from the host's generator, so that they do not depend on the device.
        self.generator = torch.Generator("cpu").manual_seed(args.seed)

    def load(self, *parts):
        absent = {part: None for part in PARTS if part not in parts}
        pipe = FluxPipeline.from_pretrained(self.args.pipeline, torch_dtype=self.dtype, local_files_only=True, **absent)
        pipe.set_progress_bar_config(disable=True)
        for part in parts:
            module = getattr(pipe, part)
            if isinstance(module, torch.nn.Module):
                module.eval().to(self.device)
        return pipe

    def free(self):
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def keep(self, name, tensor):
        tensor = tensor.detach().to("cpu")
        self.tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor.long()).contiguous()

    def noise(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    # --- text -------------------------------------------------------------------------------------------------------

    def clip(self):
        pipe = self.load("text_encoder", "tokenizer")
        ids = self.tokens(pipe.tokenizer, pipe.tokenizer.model_max_length)
        pooled = pipe.text_encoder(ids).pooler_output
        if self.args.true_cfg is not None:
            ids_of_negative = self.tokens(pipe.tokenizer, pipe.tokenizer.model_max_length, self.args.negative_prompt)
            self.negative["negative_pooled_prompt_embeds"] = pipe.text_encoder(ids_of_negative).pooler_output
        return ids, pooled

    def t5(self):
        pipe = self.load("text_encoder_2", "tokenizer_2")
        length = self.text_length(pipe.tokenizer_2)
        ids = self.tokens(pipe.tokenizer_2, length)
        hidden = pipe.text_encoder_2(ids)[0]
        if self.args.true_cfg is not None:
            ids_of_negative = self.tokens(pipe.tokenizer_2, length, self.args.negative_prompt)
            self.negative["negative_prompt_embeds"] = pipe.text_encoder_2(ids_of_negative)[0]
            self.negative["true_cfg_scale"] = self.args.true_cfg
        return ids, hidden

    def tokens(self, tokenizer, length, prompt=None):
        prompt = self.args.prompt if prompt is None else prompt
        batch = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids.to(self.device)

    def text_length(self, tokenizer):
        """The flag, or what the family uses where the tokenizer allows it."""
        if self.args.max_sequence_length is None:
            family = 512 if self.guided else 256
            self.args.max_sequence_length = min(family, tokenizer.model_max_length)
        return self.args.max_sequence_length

    # --- one call of the transformer --------------------------------------------------------------------------------

    def call(self, transformer, txt, vec, record_blocks):
        batch, tokens = self.args.batch, self.rows * self.columns
        length = self.args.max_sequence_length
        inputs = {"img": self.noise(batch, tokens, self.config["in_channels"])}
        if self.args.inputs == "prompt":
            inputs["txt"], inputs["vec"] = txt.expand(batch, -1, -1), vec.expand(batch, -1)
        else:
            inputs["txt"] = self.noise(batch, length, self.config["joint_attention_dim"])
            inputs["vec"] = self.noise(batch, self.config["pooled_projection_dim"])
        # One in each of `batch` equal parts of [0, 1].
        spread = (torch.arange(batch) + torch.rand(batch, generator=self.generator)) / batch
        inputs["timestep"] = spread.to(self.device, self.dtype)
        if self.guided:
            inputs["guidance"] = torch.linspace(1, 5, batch).to(self.device, self.dtype)
        y, x = torch.meshgrid(torch.arange(self.rows), torch.arange(self.columns), indexing="ij")
        ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(tokens, 3)
        inputs["img_ids"] = ids.to(self.device, self.dtype)
        inputs["txt_ids"] = torch.zeros(length, 3, device=self.device, dtype=self.dtype)

        handles = self.watch(transformer) if record_blocks else []
        velocity = transformer(
            hidden_states=inputs["img"],
            encoder_hidden_states=inputs["txt"],
            pooled_projections=inputs["vec"],
            timestep=inputs["timestep"],
            guidance=inputs.get("guidance"),
            img_ids=inputs["img_ids"],
            txt_ids=inputs["txt_ids"],
            return_dict=False,
        )[0]
        for handle in handles:
            handle.remove()
        for name, tensor in inputs.items():
            self.keep(f"transformer.{name}", tensor)
        self.keep("transformer.velocity", velocity)

    def watch(self, transformer):
        """Hooks that keep every block's output. diffusers' blocks return (text, image)."""

        def double(index):
            def hook(_module, _inputs, output):
                self.keep(f"blocks.double_blocks.{index}.txt", output[0])
                self.keep(f"blocks.double_blocks.{index}.img", output[1])

            return hook

        def single(index):
            def hook(_module, _inputs, output):
                joined = torch.cat(list(output), dim=1) if isinstance(output, tuple) else output
                self.keep(f"blocks.single_blocks.{index}.x", joined)

            return hook

        kinds = ((transformer.transformer_blocks, double), (transformer.single_transformer_blocks, single))
        return [block.register_forward_hook(make(i)) for blocks, make in kinds for i, block in enumerate(blocks)]

    # --- images ---------------------------------------------------------------------------------------------------

    def decode(self):
        pipe = self.load("vae")
        config = pipe.vae.config
        latents = self.noise(1, config.latent_channels, 2 * self.rows, 2 * self.columns)
        image = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        self.keep("vae.latents", latents)
        self.keep("vae.image", image)

    def sample(self, pipe, txt, vec, name, **start):
        """Prompt to image. Returns the final packed latents."""
        final = pipe(
            prompt_embeds=txt,
            pooled_prompt_embeds=vec,
            height=self.args.height,
            width=self.args.width,
            num_inference_steps=self.args.steps,
            guidance_scale=self.args.guidance,
            output_type="latent",
            **self.negative,
            **start,
        ).images
        # What the pipeline does with output_type="pt", without sampling twice.
        config = pipe.vae.config
        latents = pipe._unpack_latents(final, self.args.height, self.args.width, pipe.vae_scale_factor)
        image = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        self.keep(name, pipe.image_processor.postprocess(image, output_type="pt"))
        return final

    def pipeline(self, pipe, txt, vec):
        tokens = self.rows * self.columns
        start = self.noise(1, tokens, self.config["in_channels"])
        self.keep("pipeline.latents", start)
        final = self.sample(pipe, txt, vec, "pipeline.image", latents=start.clone())
        self.keep("pipeline.final_latents", final)
        self.keep("pipeline.sigmas", pipe.scheduler.sigmas)
        seeded = torch.Generator("cpu").manual_seed(self.args.image_seed)
        self.sample(pipe, txt, vec, "pipeline.seeded_image", generator=seeded)

    # --- all of it --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self):
        wanted = set(self.args.components)
        sampled = "pipeline" in wanted
        called = bool(wanted & {"transformer", "blocks"})
        encoded = sampled or (called and self.args.inputs == "prompt")
        txt = vec = None
        if "clip" in wanted or encoded:
            ids, vec = self.clip()
            if "clip" in wanted:
                self.keep("clip.input_ids", ids)
                self.keep("clip.pooled", vec)
            self.free()
        if "t5" in wanted or encoded:
            ids, txt = self.t5()
            if "t5" in wanted:
                self.keep("t5.input_ids", ids)
                self.keep("t5.hidden", txt)
            self.free()
        elif called and self.args.max_sequence_length is None:
            self.text_length(self.load("tokenizer_2").tokenizer_2)
        if "vae" in wanted:
            self.decode()
            self.free()
        if called or sampled:
            parts = ["transformer", "vae", "scheduler"] if sampled else ["transformer"]
            pipe = self.load(*parts)
            if called:
                self.call(pipe.transformer, txt, vec, "blocks" in wanted)
            if sampled:
                self.pipeline(pipe, txt, vec)

    def metadata(self):
        args = self.args
        facts = {
            "prompt": args.prompt,
            "image_seed": args.image_seed,
            "height": args.height,
            "width": args.width,
            "steps": args.steps,
            "guidance": args.guidance,
            "dtype": args.dtype,
        }
        if args.true_cfg is not None:
            facts |= {"true_cfg": args.true_cfg, "negative_prompt": args.negative_prompt}
        if args.max_sequence_length is not None:
            facts["t5_len"] = args.max_sequence_length
        for package in ("diffusers", "torch", "transformers"):
            facts[package] = importlib.metadata.version(package)
        return {key: str(value) for key, value in facts.items()}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=pathlib.Path, metavar="PIPELINE")
    parser.add_argument("out", type=pathlib.Path, metavar="OUT.safetensors")
    parser.add_argument("--prompt", default="a small red house under a tall tree")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, help="default: 3.5, or 0 for a model without guidance embedding")
    parser.add_argument("--true-cfg", type=float, help="diffusers' true_cfg_scale, of the whole pipeline")
    parser.add_argument("--negative-prompt", default="", help="for --true-cfg")
    parser.add_argument("--seed", type=int, default=0, help="of the recorded inputs")
    parser.add_argument("--image-seed", type=int, default=1234, help="of the seeded image")
    parser.add_argument("--batch", type=int, default=2, help="of the recorded transformer call")
    parser.add_argument("--inputs", choices=["random", "prompt"], default="random", help="text of the transformer call")
    parser.add_argument("--max-sequence-length", type=int, help="T5 tokens; default: the model's")
    parser.add_argument("--components", default=",".join(COMPONENTS), help="default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="to compute in")
    parser.add_argument("--device", help="default: cuda where there is one")
    args = parser.parse_args()

    args.components = [part for part in args.components.split(",") if part]
    unknown = sorted(set(args.components) - set(COMPONENTS))
    if unknown:
        parser.error(f"--components: unknown {', '.join(unknown)}; there are {', '.join(COMPONENTS)}")
    config = args.pipeline / "transformer" / "config.json"
    if not config.is_file():
        parser.error(f"{args.pipeline}: no transformer/config.json; a pipeline folder in diffusers layout is needed")
    channels = json.loads(config.read_text())
    if "pipeline" in args.components and channels.get("out_channels") not in (None, channels["in_channels"]):
        parser.error("this model takes an image besides noise: leave `pipeline` out of --components")
    for name in ("width", "height"):
        if getattr(args, name) % PIXELS_PER_TOKEN or getattr(args, name) <= 0:
            parser.error(f"--{name} must be a multiple of {PIXELS_PER_TOKEN}")
    return args


def main():
    args = arguments()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    recorder = Recorder(args)
    if args.guidance is None:
        args.guidance = 3.5 if recorder.guided else 0.0
    recorder.run()
    save_file(recorder.tensors, args.out, metadata=recorder.metadata())
    for name, tensor in sorted(recorder.tensors.items()):
        spread = f"{tensor.std():.4f}" if tensor.is_floating_point() and tensor.numel() > 1 else ""
        print(f"{name:32} {str(tuple(tensor.shape)):20} {spread}")


if __name__ == "__main__":
    main()
