"""A small FLUX.2 for train_tiny.py: sizes, a tokenizer that knows the words of scenes.py, and how it is called.

Five double and ten single blocks of width 128, four rotary axes of 8, and a Qwen3 of 27 narrow layers, as FLUX.2 reads the hidden states 9, 18 and 27.
It is trained by flow matching like the other one, without guidance, and is not distilled.
"""

import json
import shutil
import tempfile

import scenes
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHANNELS, WIDTH, TEXT_WIDTH, LAYERS, STEPS = 16, 128, 48, 27, 8
STATES = (9, 18, 27)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def tokenizer(captions):
    """Byte-level BPE in which every word of the captions is one token."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator([*captions, "user\nassistant\n"], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tok.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    folder = tempfile.mkdtemp()
    tok.save(f"{folder}/tokenizer.json")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 131072}
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        json.dump({**config, "chat_template": TEMPLATE}, file)
    tok = Qwen2TokenizerFast.from_pretrained(folder)
    shutil.rmtree(folder)
    return tok


class Flux2:
    """What train_tiny.py asks of a family."""

    guidance = 1.0

    def __init__(self, args, rng):
        captions = [scenes.caption(scenes.draw_scene(rng)) for _ in range(2000)]
        # trained again it may break ties in another way
        self.tokenizer = Qwen2TokenizerFast.from_pretrained(args.start / "tokenizer") if args.start else tokenizer(captions)
        chats = [self.chat(caption) for caption in captions]
        self.length = max(len(ids) for ids in self.tokenizer(chats).input_ids)
        heads = 4
        self.text = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(self.tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rope_theta=1e4, tie_word_embeddings=True,
            )
        ).float()  # fmt: skip
        self.transformer = Flux2Transformer2DModel(
            in_channels=4 * CHANNELS, num_layers=5, num_single_layers=10, attention_head_dim=WIDTH // heads, num_attention_heads=heads,
            joint_attention_dim=3 * TEXT_WIDTH, axes_dims_rope=(8, 8, 8, 8), rope_theta=2000, guidance_embeds=False,
        )  # fmt: skip
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        sizes = json.loads((args.like / "vae/config.json").read_text())
        self.vae = AutoencoderKLFlux2(
            block_out_channels=sizes["block_out_channels"], layers_per_block=sizes["layers_per_block"], latent_channels=CHANNELS,
            norm_num_groups=sizes["norm_num_groups"], sample_size=64, **blocks,
        )  # fmt: skip
        # the latents have variance 1 as they are
        self.vae.bn.running_mean.zero_()
        self.vae.bn.running_var.fill_(1 - self.vae.config.batch_norm_eps)
        with torch.no_grad():
            for name, weights in self.transformer.named_parameters():
                # the model starts as zero velocity, every block as the identity
                if "modulation" in name or name.startswith(("norm_out", "proj_out")):
                    torch.nn.init.zeros_(weights)
                elif weights.dim() == 2:
                    torch.nn.init.normal_(weights, std=weights.shape[1] ** -0.5)
            for weights in self.text.parameters():
                if weights.dim() == 2:
                    torch.nn.init.normal_(weights, std=0.5 * weights.shape[1] ** -0.5)
        self.trained = torch.nn.ModuleList([self.transformer, self.text])
        self.parts = {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text}

    def chat(self, caption):
        messages = [{"role": "user", "content": caption}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)

    def pack(self, latents):
        return Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents))

    def velocity(self, noised, captions, t):
        given = self.tokenizer(
            [self.chat(caption) for caption in captions], padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )  # fmt: skip
        states = self.text.model(**given, output_hidden_states=True, use_cache=False).hidden_states
        text = torch.cat([states[k] for k in STATES], -1)
        line, side = torch.arange, noised.shape[-1] // 2
        return self.transformer(
            hidden_states=self.pack(noised), encoder_hidden_states=text, timestep=t,
            img_ids=torch.cartesian_prod(line(1), line(side), line(side), line(1)),
            txt_ids=torch.cartesian_prod(line(1), line(1), line(1), line(self.length)),
        ).sample  # fmt: skip

    def pipeline(self, average, like):
        transformer, text = average
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return Flux2KleinPipeline(
            scheduler=scheduler, vae=self.vae.eval(), text_encoder=text.eval(), tokenizer=self.tokenizer, transformer=transformer.eval(), is_distilled=False
        )

    def save(self, pipe, out, like):
        pipe.save_pretrained(out)
        defaults = {"family": "FLUX.2, small and trained", "steps": STEPS, "guidance": 1.0, "size": 64, "text-length": self.length}
        (out / "fastflux.json").write_text(json.dumps(defaults, indent=2) + "\n")

    def options(self):
        return {"max_sequence_length": self.length, "num_inference_steps": STEPS}
