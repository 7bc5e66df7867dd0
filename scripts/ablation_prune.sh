#!/usr/bin/env bash
# What each choice of pruning is worth on the bundled model, before any training: which blocks go, what they are
# calibrated with, what takes their place and what is fitted again. Three tables of `fastflux eval`, which compares every
# pruned model with the unpruned one on the same captions and noise, none of which the fits have seen.
#
#   scripts/ablation_prune.sh [WORK]      (default: ablation-prune; what is there already is not made again)
#
# Environment: FASTFLUX, the program (default: target/release/fastflux); NUM, captions that each model is judged on. Some
# 20 minutes of CPU time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fastflux=${FASTFLUX:-target/release/fastflux}
work=${1:-ablation-prune}
num=${NUM:-96}
mkdir -p "$work"
stats="$work/stats.safetensors"
printf '{"fit": {"refit-projections": "none"}}\n' >"$work/none.json"

# made OUTPUT COMMAND...: unless it is there
made() {
    local output=$1
    shift
    [ -e "$output" ] || "$fastflux" -q "$@" --output "$output" >/dev/null
}

# judged TABLE MODEL...
judged() {
    local table="$work/$1"
    shift
    if [ ! -f "$table.txt" ]; then
        "$fastflux" -q eval "${@/#/--model=$work/}" --num-prompts "$num" --output "$table" --force >"$table.part"
        mv "$table.part" "$table.txt"
    fi
    sed "s|$work/||; /^worst of/,+1d; /^followed/d; /^wrote/d" "$table.txt"
    echo
}

# blocks PLAN: those that it replaces
blocks() {
    grep -o '"\(double\|single\)\.[0-9]*"' "$1" | tr -d '"' | paste -sd,
}

made "$stats" calibrate

echo "Which 3 blocks go (linear layers, nothing else fitted again)"
models=()
made "$work/by-greedy.json" plan --stats "$stats" --ratio 0.2
for metric in ablation removal fit-error fit-residual cosine relative-change; do
    made "$work/scores-$metric.json" score --stats "$stats" --metric "$metric"
    made "$work/by-$metric.json" plan --scores "$work/scores-$metric.json" --ratio 0.2
done
for metric in greedy ablation removal fit-error fit-residual cosine relative-change; do
    chosen=$(blocks "$work/by-$metric.json")
    echo "$metric: $chosen"
    made "$work/by-$metric" prune --stats "$stats" --blocks "$chosen" --recipe "$work/none.json"
    models+=("by-$metric")
done
judged which "${models[@]}"

chosen=$(blocks "$work/by-greedy.json")
echo "What calibration looks at ($chosen; prompts x sampling steps)"
models=()
for pair in 40x28 160x28 320x14 640x8 1280x4; do
    made "$work/$pair" prune --blocks "$chosen" --num-prompts "${pair%x*}" --steps "${pair#*x}"
    models+=("$pair")
done
judged data "${models[@]}"

echo "What takes a block's place, and whether kept projections are fitted again"
models=()
for ratio in 0.13 0.2 0.33 0.4; do
    made "$work/linear-all-$ratio" prune --stats "$stats" --ratio "$ratio"
    chosen=$(blocks "$work/linear-all-$ratio/plan.json")
    echo "$ratio: $chosen"
    for form in remove linear; do
        made "$work/$form-none-$ratio" prune --stats "$stats" --blocks "$chosen" --form "$form" --recipe "$work/none.json"
    done
    for form in remove conditioned; do
        made "$work/$form-all-$ratio" prune --stats "$stats" --blocks "$chosen" --form "$form"
    done
    for kind in remove-none remove-all linear-none linear-all conditioned-all; do
        models+=("$kind-$ratio")
    done
done
judged forms "${models[@]}"
