#!/usr/bin/env bash
# The numbers and images of README.md, part by part. What is there already is not made again.
#
#   scripts/reproduce.sh [WORK [PART...]]      (default: reproduced results)
#
#   results   removal, replacement and training at four ratios, judged on captions they have not seen (45 minutes of CPU time)
#   formats   what float8 and GGUF cost (1 minute)
#   pruning   what each choice of pruning is worth: ablation_prune.sh (20 minutes)
#   training  what each choice of training is worth: ablation_sandwich.sh (1 hour)
#   speed     a forward next to candle-transformers and diffusers: bench_peers.py (needs diffusers; 10 minutes to compile)
#
# Environment: FASTFLUX, the program (default: target/release/fastflux); MODEL, the unpruned model (default: the bundled
# one); RATIOS, shares of blocks to replace; NUM, images that each model draws; TRAIN, flags for train-sandwich (a quick
# look: TRAIN="--steps 20 --finetune 20").
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export FASTFLUX=${FASTFLUX:-target/release/fastflux}
work=${1:-reproduced}
shift $(($# > 0))
num=${NUM:-256}
model=(${MODEL:+--model "$MODEL"})
read -r -a train <<<"${TRAIN:-}"
mkdir -p "$work"

# made OUTPUT COMMAND...: unless it is there
made() {
    local output=$1
    shift
    [ -e "$output" ] || "$FASTFLUX" -q "$@" --output "$output" >/dev/null
}

# judged TABLE IMAGES MODEL...
judged() {
    local table="$work/$1" num=$2
    shift 2
    if [ ! -f "$table.txt" ]; then
        "$FASTFLUX" -q eval --baseline "${MODEL:-bundled}" "${@/#/--model=$work/}" --num-prompts "$num" --output "$table" --force >"$table.part"
        mv "$table.part" "$table.txt"
    fi
    cat "$table.txt"
}

results() {
    local ratio blocks models=()
    for ratio in ${RATIOS:-0.2 0.3333 0.4 0.5}; do
        made "$work/brll-$ratio" prune "${model[@]}" --ratio "$ratio"
        blocks=$(grep -o '"\(double\|single\)\.[0-9]*"' "$work/brll-$ratio/plan.json" | tr -d '"' | paste -sd,)
        made "$work/remove-$ratio" prune "${model[@]}" --blocks "$blocks" --form remove
        made "$work/sandwich-$ratio" train-sandwich --model "$work/brll-$ratio" "${train[@]}"
        models+=("remove-$ratio" "brll-$ratio" "sandwich-$ratio")
    done
    judged results "$num" "${models[@]}"
    echo "images: $work/brll-*/before-after.png, $work/results/report.html" >&2
}

formats() {
    made "$work/f8e4m3.safetensors" convert "${model[@]}" --dtype f8e4m3
    made "$work/f8e4m3-no-scale.safetensors" convert "${model[@]}" --dtype f8e4m3 --no-scale
    made "$work/q8_0.gguf" convert "${model[@]}" --gguf q8_0
    judged formats 64 f8e4m3.safetensors f8e4m3-no-scale.safetensors q8_0.gguf
}

for part in "${@:-results}"; do
    case $part in
    results | formats) "$part" ;;
    pruning) scripts/ablation_prune.sh "$work/pruning" ;;
    training) scripts/ablation_sandwich.sh "$work/training" ;;
    speed) python3 scripts/bench_peers.py --rounds 1 --runs 3 ;;
    *)
        echo "$part: expected results, formats, pruning, training or speed" >&2
        exit 2
        ;;
    esac
done
