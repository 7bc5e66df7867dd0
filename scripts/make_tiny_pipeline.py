# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35", "transformers>=4.48", "tokenizers", "safetensors", "accelerate"]
# ///
"""Write a small random FLUX pipeline for tests.

OUT/pipe is a pipeline in diffusers layout; OUT/bfl.safetensors holds the same transformer under the names of the
original single-file release. Sizes are free, so that odd ones (head counts, widths, block counts, shards) can be
tried. The weights are random but of a magnitude at which a wrong mask, axis or scale shows in every output.
"""

import argparse
import json
import math
import pathlib
import string
import sys
from collections import Counter

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

sys.path.append(str(pathlib.Path(__file__).resolve().parent / "interop"))
from fastflux_flux import DOUBLE, SINGLE, TOP  # noqa: E402

# What the tokenizers learn their pieces from.
CORPUS = """
a photo of a red cat under a tall tree
an oil painting of a small house at night, with snow on the roof
three blue birds over the sea, watercolour
a robot reads a book in the garden
the old lighthouse on the rocky coast in heavy rain
a green bicycle next to a white wall at noon
portrait of a woman with a straw hat, soft light
two dogs run along the beach at sunset
a bowl of oranges and lemons on a wooden table
the city from above, neon lights, 1980s film
""".strip().splitlines()
PUNCTUATION = ".,;:!?'\"()-"

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# How CLIP cuts text into words before byte-pair merging.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

def original_names(state, norm_tail="scale", prefix=""):
    """The transformer's tensors under their original names; fails if one is left over."""
    left = dict(state)
    out = {}

    def move(table, ours, theirs):
        for name, sources in table.items():
            for tail in ("weight", "bias"):
                rows = [left.pop(f"{theirs}{source}.{tail}", None) for source in sources]
                if rows[0] is None:
                    continue
                tensor = torch.cat(rows)
                if name.startswith("final_layer.adaLN"):
                    scale, shift = tensor.chunk(2)
                    tensor = torch.cat([shift, scale])
                ending = norm_tail if name.endswith("_norm") else tail
                out[f"{prefix}{ours}{name}.{ending}"] = tensor.contiguous().clone()

    def count(kind):
        return len({name.split(".")[1] for name in state if name.startswith(kind + ".")})

    move(TOP, "", "")
    for i in range(count("transformer_blocks")):
        move(DOUBLE, f"double_blocks.{i}.", f"transformer_blocks.{i}.")
    for i in range(count("single_transformer_blocks")):
        move(SINGLE, f"single_blocks.{i}.", f"single_transformer_blocks.{i}.")
    if left:
        raise SystemExit(f"tensors without an original name: {sorted(left)}")
    return out


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# The libraries' own tokenizer trainers break ties by chance; these two small ones give the same pieces every time.


def learn_merges(words, count):
    """The `count` byte-pair merges that join the most frequent neighbours first."""
    words = Counter(tuple(word[:-1]) + (word[-1] + "</w>",) for word in words)
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for pieces, seen in words.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += seen
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for pieces, seen in words.items():
            out = []
            for piece in pieces:
                if out and (out[-1], piece) == best:
                    out[-1] += piece
                else:
                    out.append(piece)
            merged[tuple(out)] += seen
        words = merged
    return merges


def learn_pieces(words, alphabet, count):
    """`count` pieces with log-probabilities: the alphabet, and the parts of words that spare the most characters."""
    seen = Counter(word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1))
    longer = sorted((p for p in seen if len(p) > 1), key=lambda p: (-seen[p] * (len(p) - 1), p))
    chosen = alphabet + longer[: count - len(alphabet)]
    total = sum(seen.values())
    scored = [(piece, round(math.log(max(seen[piece], 0.5) / total), 4)) for piece in chosen]
    return sorted(scored, key=lambda entry: (-entry[1], entry[0]))


def clip_tokenizer(folder, merges, max_length, layout):
    """A byte-level BPE tokenizer as CLIP's: all 256 bytes, each also as the end of a word, then merges."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    words = [word for line in CORPUS for word, _span in split.pre_tokenize_str(line.lower())]
    learnt = learn_merges(words, merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in learnt] + [CLIP_START, CLIP_END]

    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in learnt]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": CLIP_START,
            "eos_token": CLIP_END,
            "model_max_length": max_length,
            "pad_token": CLIP_END,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": CLIP_END,
        },
    )
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    if layout == "json":
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    return CLIPTokenizerFast.from_pretrained(folder)


def t5_tokenizer(folder, size, max_length):
    """A unigram tokenizer as T5's: pieces that start a word carry a mark, an end token follows the text."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    words = [word for line in CORPUS for word, _span in split.pre_tokenize_str(line)]
    alphabet = ["\u2581", *string.ascii_letters, *string.digits, *PUNCTUATION]
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in special] + learn_pieces(words, alphabet, size - len(special))
    learner = Tokenizer(models.Unigram(pieces, unk_id=2))
    learner.add_special_tokens(special)
    learner.pre_tokenizer = split
    learner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    learner.decoder = decoders.Metaspace(prepend_scheme="always")
    folder.mkdir(parents=True)
    learner.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "eos_token": "</s>",
            "extra_ids": 0,
            "model_max_length": max_length,
            "pad_token": "<pad>",
            "tokenizer_class": "T5Tokenizer",
            "unk_token": "<unk>",
        },
    )
    return T5TokenizerFast.from_pretrained(folder)


@torch.no_grad()
def randomise(module, gain=1.2):
    """Random weights that keep activations near 1 and make every bias and norm weight count."""
    for name, part in module.named_modules():
        for tail, value in part.named_parameters(recurse=False):
            if isinstance(part, torch.nn.Embedding):
                value.normal_(0, 0.7)
            elif tail == "bias":
                value.normal_(0, 0.1)
            elif value.ndim == 1:
                value.normal_(1, 0.2)
            else:
                value.normal_(0, gain / value[0].numel() ** 0.5)
    return module.eval()


def parts(args, clip_ids, t5_ids):
    """The five models of the pipeline."""
    axes = args.axes
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_ids),
            hidden_size=args.clip_width,
            intermediate_size=4 * args.clip_width,
            projection_dim=args.clip_width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=args.clip_length,
            hidden_act="quick_gelu",
            bos_token_id=clip_ids.bos_token_id,
            eos_token_id=clip_ids.eos_token_id,
            pad_token_id=clip_ids.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_ids),
            d_model=args.t5_width,
            d_kv=8,
            d_ff=2 * args.t5_width,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=args.in_channels,
        out_channels=args.out_channels,
        num_layers=args.double,
        num_single_layers=args.single,
        attention_head_dim=sum(axes),
        num_attention_heads=args.heads,
        joint_attention_dim=args.t5_width,
        pooled_projection_dim=args.clip_width,
        guidance_embeds=args.guidance,
        axes_dims_rope=tuple(axes),
    )
    levels = len(args.vae_channels)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=args.vae_channels,
        layers_per_block=1,
        norm_num_groups=args.vae_groups,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=64,
    )
    for module in (text_encoder, text_encoder_2, transformer, vae):
        randomise(module)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.8)  # most of an image lies inside [-1, 1], where clipping hides nothing
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=args.shift,
        use_dynamic_shifting=args.dynamic_shift,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return text_encoder, text_encoder_2, transformer, vae, scheduler


def numbers(text):
    return [int(part) for part in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="new folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--axes", type=numbers, default=[4, 6, 6], help="rotary axes; their sum is the head size")
    parser.add_argument("--double", type=int, default=2, help="double blocks")
    parser.add_argument("--single", type=int, default=3, help="single blocks")
    parser.add_argument("--guidance", action="store_true", help="with guidance embedding, as FLUX.1-dev")
    parser.add_argument("--in-channels", type=int, default=64)
    parser.add_argument("--out-channels", type=int, default=None, help="default: as --in-channels")
    parser.add_argument("--t5-width", type=int, default=32)
    parser.add_argument("--t5-length", type=int, default=16, help="model_max_length of the T5 tokenizer")
    parser.add_argument("--t5-vocab", type=int, default=160)
    parser.add_argument("--clip-width", type=int, default=24)
    parser.add_argument("--clip-length", type=int, default=77, help="model_max_length of the CLIP tokenizer")
    parser.add_argument("--clip-merges", type=int, default=80)
    parser.add_argument("--clip-layout", choices=["json", "merges"], default="json",
                        help="CLIP tokenizer as tokenizer.json, or as vocab.json and merges.txt")
    parser.add_argument("--vae-channels", type=numbers, default=[8, 8, 16, 16])
    parser.add_argument("--vae-groups", type=int, default=4)
    parser.add_argument("--shift", type=float, default=None, help="default: 3.0 with --dynamic-shift, else 1.0")
    parser.add_argument("--dynamic-shift", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--shard-size", default="10GB", help="largest file of the transformer, such as 100KB")
    parser.add_argument("--original-prefix", default="", help="before each name in bfl.safetensors")
    parser.add_argument("--original-norm", choices=["scale", "weight"], default="scale")
    args = parser.parse_args()
    if args.shift is None:
        args.shift = 3.0 if args.dynamic_shift else 1.0
    return args


def main():
    args = arguments()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    pipe_dir = args.out / "pipe"
    clip_ids = clip_tokenizer(pipe_dir / "tokenizer", args.clip_merges, args.clip_length, args.clip_layout)
    t5_ids = t5_tokenizer(pipe_dir / "tokenizer_2", args.t5_vocab, args.t5_length)
    text_encoder, text_encoder_2, transformer, vae, scheduler = parts(args, clip_ids, t5_ids)
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_ids,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_ids,
        transformer=transformer,
    ).to(getattr(torch, args.dtype))
    # The tokenizers are there already, in the layout asked for.
    pipe.save_config(pipe_dir)
    for name in ("vae", "text_encoder", "text_encoder_2", "scheduler"):
        getattr(pipe, name).save_pretrained(pipe_dir / name)
    transformer.save_pretrained(pipe_dir / "transformer", max_shard_size=args.shard_size)
    original = original_names(transformer.state_dict(), args.original_norm, args.original_prefix)
    save_file(original, args.out / "bfl.safetensors")

    values = sum(p.numel() for p in transformer.parameters())
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {args.double}+{args.single} blocks, {values} parameters in the transformer, {size} bytes")


if __name__ == "__main__":
    main()
