# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "diffusers>=0.35", "transformers>=5", "safetensors"]
# ///
"""Make tests/golden/tokenizer_ids.json and tests/golden/sample.safetensors: what transformers and diffusers give for odd prompts.

The first holds the ids of FLUX.1's own tokenizers (configs/flux1); the second, in float32, for each tiny pipeline in tests/golden
`NAME.clip.pooled` and `NAME.t5.hidden` of a batch of prompts (in the metadata), and `NAME.vae.image` and `NAME.vae.mean`.
"""

import json
import pathlib

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"

TEXTS = [
    "", " ", "\n", "\t\n ", "A photo of a cat", "  leading", "trailing  ", "a  b   c", "a\r\nb\tc",
    "don't can't I'll we've they'd I'm he's 's 'S", "It’s “quoted” – dash — em…", "1234567890 3.14, 2,718; 50% $100 #1 @home",
    "éàü ÀÉÎ ñ ß ẞ ŉ ǆ İ ı ﬁ ﬀ", "e\u0301 a\u0308 o\u0302\u0301 \u0300start \u0344", "\u1112\u1161\u11ab 한국어", "日本語のテキスト、カタカナ。",
    "中文字符,标点!", "🙂😀👨‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽", "Привет мир", "שלום مرحبا", "हिन्दी क्षत्रिय ไทย", "<|endoftext|>", "a<|endoftext|>b",
    "<|startoftext|> a cat <|EndOfText|>", "</s>", "a</s>b", " </s>  x", "<pad><unk> x <extra_id_0> y<extra_id_100>", "a\u0000b\u0001\u001f",
    "\u200b\u200c\u200d\ufeff", "a\u00a0b\u2003c\u3000d\u0085e\u2028f", "▁▁a ▁ b", "\ufffd\ue000\U0010ffff", "½ ² ₂ Ⅳ ① ٣ 𝟛", "ＡＢＣ ｆｕｌｌ ﷺ",
    "C++ & C# <b>html</b> snake_case", "((( [[[ {{{ …!!!???", "ΣΑΣ ǅ 𝔘𝔫𝔦 ⓐⓑ", "a" * 120, "word " * 100, "é" * 90, "🙂" * 30,
]
PROMPTS = ["a photo of a small red house under a tall tree, at night", "", "Two dogs run, & the sea! " * 12, "é<|endoftext|> x </s> y"]


def ids(tokenizer, text, length):
    return tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids


def main():
    clip = CLIPTokenizer.from_pretrained(ROOT / "configs/flux1/tokenizer")
    t5 = T5Tokenizer.from_pretrained(ROOT / "configs/flux1/tokenizer_2")
    rows = [{"text": text, "clip": ids(clip, text, 77), "t5": ids(t5, text, 64)} for text in TEXTS]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    (GOLDEN / "tokenizer_ids.json").write_text(f"[\n{lines}\n]\n")

    tensors = {}
    generator = torch.Generator().manual_seed(5)
    for name in ("dev", "schnell"):
        pipe = GOLDEN / name / "pipe"
        clip, t5 = CLIPTokenizer.from_pretrained(pipe / "tokenizer"), T5Tokenizer.from_pretrained(pipe / "tokenizer_2")
        with torch.no_grad():
            model = CLIPTextModel.from_pretrained(pipe / "text_encoder", dtype=torch.float32).eval()
            tensors[f"{name}.clip.pooled"] = model(torch.tensor([ids(clip, p, clip.model_max_length) for p in PROMPTS])).pooler_output
            model = T5EncoderModel.from_pretrained(pipe / "text_encoder_2", dtype=torch.float32).eval()
            tensors[f"{name}.t5.hidden"] = model(torch.tensor([ids(t5, p, t5.model_max_length) for p in PROMPTS]))[0]
            vae = AutoencoderKL.from_pretrained(pipe / "vae", torch_dtype=torch.float32).eval()
            image = torch.rand(2, 3, 24, 40, generator=generator) * 2 - 1
            tensors[f"{name}.vae.image"] = image
            tensors[f"{name}.vae.mean"] = vae.encode(image).latent_dist.mean
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, GOLDEN / "sample.safetensors", metadata={"prompts": json.dumps(PROMPTS)})


main()
