#!/usr/bin/env bash
# What each choice of sandwich training is worth: one run for each, from one pruned model, as a Markdown table.
#
#   scripts/ablation_sandwich.sh [WORK]      (default: ablation; a run that is there already is not made again)
#
# Environment: FASTFLUX, the program (default: target/release/fastflux); MODEL, the unpruned model (default: the bundled
# one); BLOCKS, what to prune; STEPS and FINISH, the length of the reference run. The reference is the default recipe of
# these lengths; every other run changes what its name says and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fastflux=${FASTFLUX:-target/release/fastflux}
work=${1:-ablation}
blocks=${BLOCKS:-double.01,double.03,single.00}
steps=${STEPS:-100}
finish=${FINISH:-200}
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

no_finish=(--steps "$steps" --finish 0)
echo "| $blocks, $steps steps for each sandwich | velocity relative MSE | seconds |"
echo "| --- | --- | --- |"
run "sandwiches-only" '{}' "${no_finish[@]}"
run "target-local" '{"sandwich": {"target": "local"}}' "${no_finish[@]}"
run "downwards" '{"sandwich": {"order": "downwards"}}' "${no_finish[@]}"
run "two-neighbours" '{"sandwich": {"neighbours": 2}}' "${no_finish[@]}"
run "loss-none" '{"loss": {"normalise": "none"}}' "${no_finish[@]}"
run "loss-channel" '{"loss": {"normalise": "channel"}}' "${no_finish[@]}"
run "loss-token" '{"loss": {"normalise": "token"}}' "${no_finish[@]}"
run "loss-velocity" '{"loss": {"normalise": "velocity"}}' "${no_finish[@]}"
run "rank-4" '{}' "${no_finish[@]}" --rank 4
run "rank-16" '{}' "${no_finish[@]}" --rank 16
run "rank-64" '{}' "${no_finish[@]}" --rank 64
run "no-lora" '{}' "${no_finish[@]}" --no-lora
run "lora-without-modulation" '{"lora": {"targets": ["attention", "mlp"]}}' "${no_finish[@]}"
run "half-the-steps" '{}' --steps $((steps / 2)) --finish 0
run "twice-the-steps" '{}' --steps $((steps * 2)) --finish 0
run "cache-20" '{}' "${no_finish[@]}" --cache 20
run "layers-at-the-full-rate" '{"optimiser": {"layer-lr": 1.0}}' "${no_finish[@]}"
run "finish" '{}' --steps "$steps" --finish "$finish"
run "finish-layers-at-the-full-rate" '{"optimiser": {"layer-lr": 1.0}}' --steps "$steps" --finish "$finish"
run "finish-two-neighbours" '{"sandwich": {"neighbours": 2}}' --steps "$steps" --finish "$finish"
run "finish-rank-64" '{}' --steps "$steps" --finish "$finish" --rank 64
run "finish-neighbours-only" '{"finish": {"blocks": "sandwiches"}}' --steps "$steps" --finish "$finish"
run "finish-alone" '{}' --steps 0 --finish "$finish"
