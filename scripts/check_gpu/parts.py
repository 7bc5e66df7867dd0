"""Text encoders and VAE with random weights, for a transformer that comes without; needs nothing but Python.

    python scripts/check_gpu/parts.py OUT [--t5-width 4096] [--clip-width 768] [--channels 128,256,512,512]

OUT gets the folders text_encoder, text_encoder_2, tokenizer, tokenizer_2 and vae in diffusers layout. The tokenizers are the
bundled model's. The encoders have one layer: they only have to give text of the right shape. The VAE is of FLUX.1's size.
"""

import argparse
import json
import os
import pathlib
import shutil
import struct

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "configs" / "tiny"
ONE = b"\x80\x3f"  # 1 in bfloat16


def random(count, scale):
    """`count` numbers in bfloat16, of random sign, between half and all of the power of two below `scale`."""
    exponent = 127
    while 2.0 ** (exponent - 126) > scale:
        exponent -= 1
    exponent -= 1
    low = bytes((b & 0x7F) | (exponent & 1) << 7 for b in range(256))
    high = bytes((b & 0x80) | exponent >> 1 for b in range(256))
    out = bytearray(2 * count)
    out[0::2] = os.urandom(count).translate(low)
    out[1::2] = os.urandom(count).translate(high)
    return bytes(out)


def write(path, shapes):
    """A safetensors file: norms are 1, biases 0, matrices random."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, offset, data = {}, 0, []
    for name, shape in shapes.items():
        count, inputs = 1, 1
        for size in shape:
            count *= size
        for size in shape[1:]:
            inputs *= size
        if len(shape) > 1:
            values = random(count, 1.0 / inputs**0.5)
        else:
            values = bytes(2 * count) if name.endswith("bias") else ONE * count
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(values)]}
        offset += len(values)
        data.append(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(data)


def describe(out, name, **changes):
    """The bundled model's config with other sizes; returns it."""
    config = json.loads((TINY / name / "config.json").read_text())
    config.update(changes)
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def linear(name, outputs, inputs):
    return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}


def norm(name, width):
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def clip(out, width, length):
    c = describe(out, "text_encoder", hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=1,
                 max_position_embeddings=length)
    at = "text_model.encoder.layers.0"
    shapes = {
        "text_model.embeddings.token_embedding.weight": [c["vocab_size"], width],
        "text_model.embeddings.position_embedding.weight": [length, width],
        **norm(f"{at}.layer_norm1", width), **norm(f"{at}.layer_norm2", width), **norm("text_model.final_layer_norm", width),
        **linear(f"{at}.mlp.fc1", width, width), **linear(f"{at}.mlp.fc2", width, width),
    }
    for part in ("q", "k", "v", "out"):
        shapes.update(linear(f"{at}.self_attn.{part}_proj", width, width))
    write(out / "text_encoder" / "model.safetensors", shapes)


def t5(out, width):
    c = describe(out, "text_encoder_2", d_model=width, num_layers=1, num_decoder_layers=1)
    inner, at = c["num_heads"] * c["d_kv"], "encoder.block.0"
    shapes = {
        "shared.weight": [c["vocab_size"], width],
        f"{at}.layer.0.SelfAttention.relative_attention_bias.weight": [c["relative_attention_num_buckets"], c["num_heads"]],
        f"{at}.layer.0.SelfAttention.o.weight": [width, inner],
        f"{at}.layer.0.layer_norm.weight": [width],
        f"{at}.layer.1.layer_norm.weight": [width],
        f"{at}.layer.1.DenseReluDense.wi_0.weight": [c["d_ff"], width],
        f"{at}.layer.1.DenseReluDense.wi_1.weight": [c["d_ff"], width],
        f"{at}.layer.1.DenseReluDense.wo.weight": [width, c["d_ff"]],
        "encoder.final_layer_norm.weight": [width],
    }
    for part in "qkv":
        shapes[f"{at}.layer.0.SelfAttention.{part}.weight"] = [inner, width]
    write(out / "text_encoder_2" / "model.safetensors", shapes)


def tokenizers(out, lengths):
    for name, length in lengths.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(TINY / name / "tokenizer.json", out / name)
        config = json.loads((TINY / name / "tokenizer_config.json").read_text())
        (out / name / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": length}))


def conv(name, outputs, inputs, side=3):
    return {f"{name}.weight": [outputs, inputs, side, side], f"{name}.bias": [outputs]}


def resnet(name, inputs, outputs):
    shapes = {**norm(f"{name}.norm1", inputs), **conv(f"{name}.conv1", outputs, inputs),
              **norm(f"{name}.norm2", outputs), **conv(f"{name}.conv2", outputs, outputs)}
    return {**shapes, **conv(f"{name}.conv_shortcut", outputs, inputs, 1)} if inputs != outputs else shapes


def vae(out, channels):
    c = describe(out, "vae", block_out_channels=channels, layers_per_block=2, norm_num_groups=min(32, channels[0]),
                 scaling_factor=0.3611, shift_factor=0.1159)
    widest = channels[-1]
    mid = "decoder.mid_block"
    shapes = {**conv("decoder.conv_in", widest, c["latent_channels"]), **norm(f"{mid}.attentions.0.group_norm", widest)}
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes.update(linear(f"{mid}.attentions.0.{part}", widest, widest))
    for i in range(2):
        shapes.update(resnet(f"{mid}.resnets.{i}", widest, widest))
    inputs = widest
    for level, outputs in enumerate(reversed(channels)):
        at = f"decoder.up_blocks.{level}"
        for i in range(c["layers_per_block"] + 1):
            shapes.update(resnet(f"{at}.resnets.{i}", inputs, outputs))
            inputs = outputs
        if level + 1 < len(channels):
            shapes.update(conv(f"{at}.upsamplers.0.conv", outputs, outputs))
    shapes.update(norm("decoder.conv_norm_out", channels[0]))
    shapes.update(conv("decoder.conv_out", c["out_channels"], channels[0]))
    write(out / "vae" / "diffusion_pytorch_model.safetensors", shapes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--t5-width", type=int, default=4096)
    parser.add_argument("--t5-length", type=int, default=512)
    parser.add_argument("--clip-width", type=int, default=768)
    parser.add_argument("--channels", type=lambda text: [int(part) for part in text.split(",")], default=[128, 256, 512, 512])
    args = parser.parse_args()
    clip(args.out, args.clip_width, 77)
    t5(args.out, args.t5_width)
    tokenizers(args.out, {"tokenizer": 77, "tokenizer_2": args.t5_length})
    vae(args.out, args.channels)


if __name__ == "__main__":
    main()
