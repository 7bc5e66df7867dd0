#!/usr/bin/env bash
# The results of README.md on the bundled model: what removal, replacement and training leave of it at four
# ratios, as numbers and pictures.
#
#   scripts/reproduce.sh [WORK]      (default: reproduced; what is there already is not made again)
#
# Environment: FASTFLUX, the program (default: target/release/fastflux); RATIOS, shares of blocks to replace; NUM, pictures
# that each model draws; TRAIN, flags for train-sandwich (a quick look: TRAIN="--steps 20 --finish 20"). All of it takes
# some 40 minutes on two cores, nearly all of it training. The comparison of training choices is ablation_sandwich.sh, the
# speed beside others bench_peers.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fastflux=${FASTFLUX:-target/release/fastflux}
work=${1:-reproduced}
num=${NUM:-256}
read -r -a train <<<"${TRAIN:-}"
mkdir -p "$work"

# made FOLDER COMMAND...: unless it is there
made() {
    local folder=$1
    shift
    [ -d "$folder" ] || "$fastflux" -q "$@" --output "$folder" >/dev/null
}

models=()
for ratio in ${RATIOS:-0.1 0.2 0.3 0.4}; do
    made "$work/brll-$ratio" prune --ratio "$ratio"
    blocks=$(grep -o '"\(double\|single\)\.[0-9]*"' "$work/brll-$ratio/plan.json" | tr -d '"' | paste -sd,)
    made "$work/remove-$ratio" prune --blocks "$blocks" --form remove
    made "$work/sandwich-$ratio" train-sandwich --model "$work/brll-$ratio" "${train[@]}"
    models+=("remove-$ratio" "brll-$ratio" "sandwich-$ratio")
done
if [ ! -f "$work/table.txt" ]; then
    "$fastflux" -q eval "${models[@]/#/--model=$work/}" --num "$num" --output "$work/report" --force >"$work/table.part"
    mv "$work/table.part" "$work/table.txt"
fi
cat "$work/table.txt"
echo "pictures: $work/brll-*/before-after.png, $work/report/report.html" >&2
