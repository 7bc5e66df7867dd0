#!/usr/bin/env bash
# Make tests/golden again: two tiny random pipelines, what diffusers computes with them, and torch's noise.
# The numbers follow the installed versions of torch, diffusers and transformers; `git diff --stat` shows what moved.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
golden=tests/golden
rm -rf "$golden/dev" "$golden/schnell"

# As FLUX.1-dev: guidance embedding, dynamic shift, one file.
"$python" scripts/make_tiny_pipeline.py "$golden/dev" --seed 1 --guidance --dynamic-shift \
    --heads 2 --axes 4,6,6 --double 2 --single 3 --t5-width 40 --t5-length 16 --clip-width 24 --dtype bfloat16
"$python" scripts/make_reference.py "$golden/dev/pipe" "$golden/dev/reference.safetensors" --seed 11 --image-seed 1234 \
    --width 64 --height 48 --steps 4 --prompt "a photo of a small red house under a tall tree, at night"
"$python" scripts/make_reference.py "$golden/dev/pipe" "$golden/dev/true_cfg.safetensors" --seed 13 --image-seed 1234 \
    --width 64 --height 48 --steps 3 --components pipeline --true-cfg 2.5 --negative-prompt "rain, and a green car" \
    --prompt "a photo of a small red house under a tall tree, at night"

# As FLUX.1-schnell: no guidance, fixed shift, several files; other sizes, CLIP's tokenizer as vocab.json and merges.txt,
# and the original names as all-in-one files carry them.
"$python" scripts/make_tiny_pipeline.py "$golden/schnell" --seed 2 --shift 1.0 \
    --heads 3 --axes 2,8,8 --double 1 --single 2 --t5-width 32 --t5-length 20 --clip-width 20 --clip-merges 40 \
    --clip-layout merges --vae-channels 4,8,12,12 --vae-groups 2 --dtype float16 --shard-size 150KB \
    --original-prefix model.diffusion_model. --original-norm weight
"$python" scripts/make_reference.py "$golden/schnell/pipe" "$golden/schnell/reference.safetensors" --seed 12 \
    --image-seed 4321 --width 32 --height 80 --steps 3 --batch 1 --prompt "Two dogs run, & the sea"
"$python" scripts/make_reference.py "$golden/schnell/pipe" "$golden/schnell/true_cfg.safetensors" --seed 14 \
    --image-seed 4321 --width 48 --height 32 --steps 3 --components pipeline --true-cfg 4 --prompt "Two dogs run, & the sea"

"$python" - "$golden/torch_randn.safetensors" <<'PY'
import sys, torch
from safetensors.torch import save_file

# torch draws fewer than 16 values one by one, more than that in blocks of 16 with a tail that overlaps.
shapes = {0: (1, 16, 4, 6), 7: (3,), 8: (15,), 9: (16,), 10: (17,), 42: (2, 16, 2, 3), 2**63 - 1: (64,)}
noise = {f"seed{s}": torch.randn(shape, generator=torch.Generator("cpu").manual_seed(s)) for s, shape in shapes.items()}
save_file(noise, sys.argv[1], metadata={"torch": torch.__version__.split("+")[0]})
PY
"$python" scripts/golden_flux2.py
"$python" scripts/golden_sample.py
"$python" scripts/golden_clip.py
"$python" scripts/golden_lpips.py
"$python" scripts/golden_lora.py
"$python" scripts/golden_lora_flux2.py
find "$golden" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum " bytes" }'
