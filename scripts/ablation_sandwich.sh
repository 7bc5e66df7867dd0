#!/usr/bin/env bash
# What each choice of sandwich training is worth: one run for each, from one pruned model, as a Markdown table.
#
#   scripts/ablation_sandwich.sh [WORK]      (default: ablation; a run that is there already is not made again)
#
# Environment: FASTFLUX, the program (default: target/release/fastflux); MODEL, the unpruned model (default: the bundled
# one); BLOCKS, what to prune; STEPS and FINETUNE, the length of the reference run. The reference is the default recipe of
# these lengths; every other run changes what its name says and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fastflux=${FASTFLUX:-target/release/fastflux}
work=${1:-ablation}
blocks=${BLOCKS:-double.01,double.03,single.00}
steps=${STEPS:-100}
finetune=${FINETUNE:-200}
model=(${MODEL:+--model "$MODEL"})
mkdir -p "$work"

if [ ! -d "$work/pruned" ]; then
    "$fastflux" -q prune "${model[@]}" --blocks "$blocks" --output "$work/pruned" >/dev/null
fi

# run NAME RECIPE FLAGS...: train and keep the report
run() {
    local name=$1 recipe=$2
    shift 2
    if [ ! -f "$work/$name.json" ]; then
        printf '%s\n' "$recipe" >"$work/$name.recipe.json"
        "$fastflux" -q train-sandwich --model "$work/pruned" --output "$work/$name" --recipe "$work/$name.recipe.json" \
            --json "$@" >"$work/$name.part"
        mv "$work/$name.part" "$work/$name.json"
    fi
    # the first `after` of the report is that of the velocity
    awk -v name="$name" '
        /"before":/ && !b { b = $2 + 0 }
        /"after":/ && !a { a = $2 + 0 }
        /"seconds":/ { s = $2 + 0 }
        END { printf "| %s | %.4f | %.0f |\n", name, a, s }' "$work/$name.json"
}

no_finetune=(--steps "$steps" --finetune 0)
echo "| $blocks, $steps steps for each sandwich | velocity relative MSE | seconds |"
echo "| --- | --- | --- |"
run "sandwiches-only" '{}' "${no_finetune[@]}"
run "target-local" '{"sandwich": {"target": "local"}}' "${no_finetune[@]}"
run "downwards" '{"sandwich": {"order": "downwards"}}' "${no_finetune[@]}"
run "two-neighbours" '{"sandwich": {"neighbours": 2}}' "${no_finetune[@]}"
run "loss-none" '{"loss": {"normalise": "none"}}' "${no_finetune[@]}"
run "loss-channel" '{"loss": {"normalise": "channel"}}' "${no_finetune[@]}"
run "loss-token" '{"loss": {"normalise": "token"}}' "${no_finetune[@]}"
run "loss-velocity" '{"loss": {"normalise": "velocity"}}' "${no_finetune[@]}"
run "rank-4" '{}' "${no_finetune[@]}" --rank 4
run "rank-16" '{}' "${no_finetune[@]}" --rank 16
run "rank-64" '{}' "${no_finetune[@]}" --rank 64
run "no-lora" '{}' "${no_finetune[@]}" --no-lora
run "lora-without-modulation" '{"lora": {"targets": ["attention", "mlp"]}}' "${no_finetune[@]}"
run "half-the-steps" '{}' --steps $((steps / 2)) --finetune 0
run "twice-the-steps" '{}' --steps $((steps * 2)) --finetune 0
run "cache-20" '{}' "${no_finetune[@]}" --cache 20
run "layers-at-the-full-rate" '{"optimiser": {"layer-lr": 1.0}}' "${no_finetune[@]}"
run "finetune" '{}' --steps "$steps" --finetune "$finetune"
run "finetune-layers-at-the-full-rate" '{"optimiser": {"layer-lr": 1.0}}' --steps "$steps" --finetune "$finetune"
run "finetune-two-neighbours" '{"sandwich": {"neighbours": 2}}' --steps "$steps" --finetune "$finetune"
run "finetune-rank-64" '{}' --steps "$steps" --finetune "$finetune" --rank 64
run "finetune-neighbours-only" '{"finetune": {"blocks": "sandwiches"}}' --steps "$steps" --finetune "$finetune"
run "finetune-alone" '{}' --steps 0 --finetune "$finetune"
