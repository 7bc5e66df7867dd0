#!/usr/bin/env bash
# What each choice of pruning is worth on the bundled model, before any training: which blocks go, what they are
# calibrated with, what takes their place and what is fitted again. Three tables of `fastflux eval`, which compares every
# pruned model with the unpruned one on the same captions and noise, none of which the fits have seen.
#
#   scripts/ablation_prune.sh [WORK [TABLE...]]      (default: ablation-prune, which data forms; what is there already is not
#                                                     made again)
#
# Environment: FASTFLUX, the program (default: target/release/fastflux); MODEL, the unpruned model (default: the bundled
# one); NUM, captions that each model is judged on; RATIOS, FORMS and REFITS, what the last table compares. Some 20 minutes of
# CPU time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fastflux=${FASTFLUX:-target/release/fastflux}
work=${1:-ablation-prune}
shift $(($# > 0))
num=${NUM:-96}
model=(${MODEL:+--model "$MODEL"})
mkdir -p "$work"
stats="$work/stats.safetensors"
printf '{"fit": {"refit-projections": "none"}}\n' >"$work/none.json"

# made OUTPUT COMMAND...: unless it is there
made() {
    local output=$1
    shift
    [ -e "$output" ] || "$fastflux" -q "$@" "${model[@]}" --output "$output" >/dev/null
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

# chosen RATIO: the blocks that go by default
chosen() {
    made "$work/by-greedy-$1.json" plan --stats "$stats" --ratio "$1"
    blocks "$work/by-greedy-$1.json"
}

which() {
    echo "Which blocks go at 20 % (linear layers, nothing else fitted again)"
    local metric blocks models=()
    for metric in greedy ablation removal fit-error fit-residual cosine relative-change; do
        if [ "$metric" = greedy ]; then
            blocks=$(chosen 0.2)
        else
            made "$work/scores-$metric.json" score --stats "$stats" --metric "$metric"
            [ -e "$work/by-$metric.json" ] || "$fastflux" -q plan --scores "$work/scores-$metric.json" --ratio 0.2 \
                --output "$work/by-$metric.json" >/dev/null
            blocks=$(blocks "$work/by-$metric.json")
        fi
        echo "$metric: $blocks"
        made "$work/by-$metric" prune --stats "$stats" --blocks "$blocks" --recipe "$work/none.json"
        models+=("by-$metric")
    done
    judged which "${models[@]}"
}

data() {
    local blocks pair models=()
    blocks=$(chosen 0.2)
    echo "What calibration looks at ($blocks; prompts x sampling steps)"
    for pair in 40x28 160x28 320x14 640x8 1280x4; do
        made "$work/$pair" prune --blocks "$blocks" --num-prompts "${pair%x*}" --steps "${pair#*x}"
        models+=("$pair")
    done
    judged data "${models[@]}"
}

forms() {
    echo "What takes a block's place, and whether kept projections are fitted again"
    local ratio blocks form refit models=()
    for ratio in ${RATIOS:-0.13 0.2 0.33 0.4}; do
        blocks=$(chosen "$ratio")
        echo "$ratio: $blocks"
        for form in ${FORMS:-remove linear conditioned modulated}; do
            for refit in ${REFITS:-none all}; do
                printf '{"fit": {"refit-projections": "%s"}}\n' "$refit" >"$work/$refit.json"
                made "$work/$form-$refit-$ratio" prune --stats "$stats" --blocks "$blocks" --form "$form" --recipe "$work/$refit.json"
                models+=("$form-$refit-$ratio")
            done
        done
    done
    judged forms "${models[@]}"
}

made "$stats" calibrate
[ $# -gt 0 ] || set -- which data forms
for table in "$@"; do
    case $table in
    which | data | forms) "$table" ;;
    *)
        echo "$table: expected which, data or forms" >&2
        exit 2
        ;;
    esac
done
