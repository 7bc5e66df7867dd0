# Part of scripts/check_gpu.sh: speed and memory at FLUX.1-dev's size.

checkpoint='' checkpoint_pid='' peers_pid=''

# A random FLUX.1-dev is written while small models are checked.
begin_checkpoint() {
    local folder
    folder=$(room $((gigabytes + 2)))/full
    mkdir -p "$folder"
    checkpoint=$folder/flux.safetensors
    {
        TIMEFORMAT='real %R'
        time "$binary" init --config "$work/full.json" --output "$checkpoint" --force
    } >"$output/logs/init.out" 2>"$output/logs/init.err" &
    checkpoint_pid=$!
    background+=("$checkpoint_pid")
}

# PyTorch's model is compiled, and waits until it may measure: meanwhile, where the GPU has room for two.
begin_peers() {
    [[ -n $python && -z $peers_pid ]] || return
    local options=(--compile "${PEERS_COMPILE:-whole}" --train --ready "$work/peers-ready" --hold "$work/peers-go")
    [[ -n $rehearse ]] && options+=(--tiny --device cpu --size 64 --text-tokens 16 --seconds 0.2)
    "$python" "$root/scripts/bench_gpu_peers.py" "${options[@]}" >"$output/logs/peers.out" 2>"$output/logs/peers.err" &
    peers_pid=$!
    background+=("$peers_pid")
}

# waited FILE SECONDS PID: until the file is there, the process is gone or the time is over.
waited() {
    local until=$(($(elapsed) + $2))
    while [[ ! -e $1 ]] && kill -0 "$3" 2>/dev/null && (($(elapsed) < until && $(elapsed) < limit)); do sleep 0.1; done
    [[ -e $1 ]]
}

# Nothing else runs on the machine from here on.
quiet() {
    if [[ -n $peers_pid && ! -e $work/peers-go ]]; then
        waited "$work/peers-ready" 120 "$peers_pid" || note 'PyTorch was not done compiling when bench began'
    fi
    wait_for_checkpoint
}

wait_for_checkpoint() {
    [[ -n $checkpoint_pid ]] || return
    waited "$work/never" 180 "$checkpoint_pid"
    if kill -0 "$checkpoint_pid" 2>/dev/null; then
        note 'the random checkpoint was not written in time'
        checkpoint=''
    elif wait "$checkpoint_pid"; then
        fact 'random checkpoint' "$(stat -c %s "$checkpoint") bytes, written in $(awk '/^real/ { print $2 }' "$output/logs/init.err") s"
    else
        note "the random checkpoint could not be written: $(tail -n 1 "$output/logs/init.err")"
        checkpoint=''
    fi
    checkpoint_pid=''
}

step_bench() {
    local kind best='' milliseconds least='' device=cuda longest=2 subject=(--config "$work/full.json") share
    quiet
    [[ -n $checkpoint ]] && subject=(--model "$checkpoint")
    local sizes=(--dtype bf16 --size "$side" --text-tokens "$text" --device "$device")
    [[ -n $quick ]] && longest=1
    # every way of attention, unless one was asked for
    local kinds=(flash3 flash2 plain)
    [[ -n $quick ]] && kinds=(auto)
    [[ -n ${FASTFLUX_ATTENTION:-} ]] && kinds=("$FASTFLUX_ATTENTION")
    for kind in "${kinds[@]}"; do
        export FASTFLUX_ATTENTION=$kind
        [[ $kind == auto ]] && unset FASTFLUX_ATTENTION
        attempt "bench-$kind" 60 "$binary" bench "${subject[@]}" "${sizes[@]}" --seconds "$longest" --step-only --json || continue
        milliseconds=$(calc "1000 * $(row "bench-$kind" step median)")
        figure bench "step, attention $kind" "$milliseconds" ms
        if [[ -z $least ]] || [[ $(calc "$milliseconds < $least") == 1 ]]; then best=$kind least=$milliseconds; fi
    done
    unset FASTFLUX_ATTENTION
    [[ -n $best ]] || return
    [[ $best == auto ]] || export FASTFLUX_ATTENTION=$best
    full_ms=$least
    share=$(row "bench-$best" step share_of_peak_flops)
    fact 'matrix product, bf16' "$(calc "$(value "bench-$best" flops_per_second) / 1e12") TFLOP/s by bench, a copy $(calc "$(value "bench-$best" bytes_per_second) / 1e9") GB/s"
    figure bench 'share of the matrix product over a whole step' "$share" '' '>= 0.65'
    [[ -n $quick ]] && return
    attempt bench-pruned 60 "$binary" bench --config "$work/pruned.json" "${sizes[@]}" --seconds "$longest" --step-only --json
    pruned_ms=$(calc "1000 * $(row bench-pruned step median)")
    local estimate speed_up
    estimate=$(calc "$(row "bench-$best" step flops) / $(row bench-pruned step flops)")
    speed_up=$(calc "$full_ms / $pruned_ms")
    figure bench 'step, 11 of 57 blocks replaced' "$pruned_ms" ms '' "$(calc "$full_ms / $estimate")"
    figure bench 'speed-up of that' "$speed_up" times '>= 1.2' "$estimate"
    figure bench 'share of what its FLOPs estimate' "$(calc "$speed_up / $estimate")" '' '>= 0.95'
    attempt bench-blocks 60 "$binary" bench "${subject[@]}" "${sizes[@]}" --seconds 0.5
    note "blocks, attention $best:"
    cat "$output/logs/bench-blocks.out" >>"$notes"
}

step_peers() {
    if [[ -z $python ]]; then
        note 'peers: left out, as no Python was named (--python)'
        return
    fi
    begin_peers
    touch "$work/peers-go"
    waited "$work/never" 120 "$peers_pid"
    kill "$peers_pid" 2>/dev/null
    wait "$peers_pid" 2>/dev/null
    local eager compiled
    eager=$(value peers eager_ms) compiled=$(value peers compiled_ms)
    peer_peak=$(value peers flops_per_second) pinned=$(value peers pinned_bytes_per_second) peer_train=$(value peers sandwich_learn_muon_ms)
    [[ -n $peer_train ]] || note "peers: $(tail -n 1 "$output/logs/peers.err")"
    fact PyTorch "$(value peers torch): product $(calc "$peer_peak / 1e12") TFLOP/s, copy $(calc "$(value peers copy_bytes_per_second) / 1e9") GB/s, from pinned memory $(calc "$pinned / 1e9") GB/s, from pageable $(calc "$(value peers pageable_bytes_per_second) / 1e9") GB/s; compiled in $(value peers compile_seconds) s"
    figure peers 'PyTorch, eager' "$eager" ms
    figure peers 'PyTorch, compiled' "$compiled" ms
    figure peers 'PyTorch, eager, 11 of 57 blocks replaced' "$(value peers pruned_eager_ms)" ms
    figure peers 'PyTorch, step of one sandwich with its sample' "$(value peers sandwich_step_ms)" ms
    figure peers 'PyTorch, step of one sandwich, AdamW' "$(value peers sandwich_learn_adamw_ms)" ms
    figure peers 'PyTorch, step of one sandwich, Muon as here' "$peer_train" ms
    if [[ -n ${full_ms:-} ]]; then
        figure peers 'fastflux over compiled PyTorch' "$(calc "$full_ms / $compiled")" times '<= 1.0'
        figure peers 'fastflux over eager PyTorch' "$(calc "$full_ms / $eager")" times
        figure peers "share of PyTorch's product over a whole step" "$(calc "$(row "bench-${FASTFLUX_ATTENTION:-auto}" step flops) / ($full_ms / 1000) / $peer_peak")" '' '>= 0.65'
    fi
}

step_kernels() {
    if [[ -z $bench_kernels ]]; then
        note 'kernels: left out, as no benchmark was named (--bench-kernels)'
        return
    fi
    attempt kernels 60 "$bench_kernels"
    note 'kernels:'
    cat "$output/logs/kernels.out" >>"$notes"
    local name time share
    while IFS=$'\t' read -r name time share; do figure kernels "bf16: $name, $time µs" "$share" '% copy'; done < <(
        awk '/a copy reaches/ { here = /^BF16/ } here && / µs/ && / %/ { name = substr($0, 1, 44); sub(/ *$/, "", name); print name "\t" $(NF - 5) "\t" $(NF - 1) }' "$output/logs/kernels.out")
}

# What a random transformer is drawn with.
parts() {
    [[ -n $checkpoint ]] || { note "$1: left out, as there is no random checkpoint"; return 1; }
    [[ -d $work/parts ]] && return
    [[ -n $python3 ]] || { note "$1: left out, as it needs a python3 for the text encoders' files"; return 1; }
    "$python3" "$here/parts.py" "$work/parts" --t5-width "$t5" --t5-length "$text" --clip-width "$clip" --channels "$vae" ||
        { note "$1: text encoders and VAE could not be written"; return 1; }
    for ((i = 0; i < 8; i++)); do echo "a red circle at the left, number $i"; done >"$work/prompts.txt"
    model=(--model "$checkpoint" --text-encoders "$work/parts" --vae "$work/parts/vae")
    format=(--device cuda --dtype bf16)
    image=(--width "$side" --height "$side")
}

step_full() {
    wait_for_checkpoint
    parts full || return
    local begun reading name most steps=8 of
    # read once before, so that neither way has to wait for a disk
    cat "$checkpoint" >/dev/null
    begun=$EPOCHREALTIME
    cat "$checkpoint" >/dev/null
    reading=$(calc "$EPOCHREALTIME - $begun")
    figure full 'reading the file' "$reading" s
    draw() {
        name=$1
        shift
        attempt "$name" 60 "$binary" generate "${model[@]}" "${format[@]}" "${image[@]}" --prompt 'a red circle' --output "$work/$name.png" --force "$@"
    }
    draw generate-1 --steps 1
    local first
    first=$(calc "$(when generate-1 'generated 1 image') - $(when generate-1 'encoded 1 prompt')")
    figure full 'from the file to the first step' "$first" s
    figure full 'that over reading the file' "$(calc "$first / $reading")" times '<= 1.3'
    draw generate-plain --steps 28
    plain_step=$(calc "$(told generate-plain 'generated 1 image') / 28")
    figure full 'a step of generate' "$plain_step" s '' "$([[ -n ${full_ms:-} ]] && calc "$full_ms / 1000")"
    figure full 'generate: peak on the GPU' "$peak" MiB
    for most in "${limits[@]}"; do
        draw "generate-$most" --steps $steps --max-vram "$most"
        of=$(calc "$(sed 's/GiB/* 1024/; s/MiB//' <<<"$most")")
        figure full "a step within $most" "$(calc "$(told "generate-$most" 'generated 1 image') / $steps")" s
        figure full "generate within $most: peak on the GPU" "$peak" MiB "${peak:+<= $of}"
        grep -o '[0-9]* of [0-9]* blocks stay.*' "$output/logs/generate-$most.err" | head -n 1 >>"$notes"
    done
    draw generate-offload --steps $steps --offload
    local offload copy slower
    offload=$(calc "$(told generate-offload 'generated 1 image') / $steps")
    copy=$(calc "$(stat -c %s "$checkpoint") / ${pinned:-0}")
    slower=$(awk -v a="${copy:-0}" -v b="${plain_step:-0}" 'BEGIN { print (a > b ? a : b) }')
    figure full 'a step with --offload' "$offload" s '' "$slower"
    figure full 'generate --offload: peak on the GPU' "$peak" MiB
    [[ -n $copy ]] && figure full 'that step over the larger of compute and copying' "$(calc "$offload / $slower")" times '<= 1.2'
}

# step_seconds TOKENS LAST: seconds of a step, from the first to the LAST, by the lines of a log on stdin.
step_seconds() {
    awk -v tokens="$1" -v last="$2" '
        function number(key) { return match($0, "\"" key "\":[-0-9.e+]+") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0 : 0 }
        number("tokens-per-second") { step = number("step"); at[step] = tokens * step / number("tokens-per-second") }
        END { if (at[last] > at[1]) printf "%.4g", (at[last] - at[1]) / (last - 1) }'
}

mib() { calc "$1 / 1048576"; }

step_whole() {
    wait_for_checkpoint
    parts whole || return
    local at prompts fewer
    echo '{"score": {"held-out": 8}}' >"$work/prune-recipe.json" # of one image
    prompts=(--recipe "$work/prune-recipe.json" --prompts "$work/prompts.txt" --num-prompts 4 --steps 8)
    fewer=(--recipe "$work/prune-recipe.json" --prompts "$work/prompts.txt" --num-prompts 2 --steps 2)
    attempt generate-4 60 "$binary" generate "${model[@]}" "${format[@]}" "${image[@]}" --prompt-file <(head -n 4 "$work/prompts.txt") --steps 8 --output "$work/four" --force
    attempt calibrate-estimate 20 "$binary" calibrate "${model[@]}" "${format[@]}" "${image[@]}" "${prompts[@]}" --dry-run --json
    local stats
    stats=$(room $((gigabytes - 5)))/stats.safetensors
    attempt calibrate 90 "$binary" calibrate "${model[@]}" "${format[@]}" "${image[@]}" "${prompts[@]}" --output "$stats" --force --json
    rm -f "$stats" # 17 GB
    figure whole 'calibrate of 4 prompts × 8 steps: peak on the GPU' "$peak" MiB '' "$(mib "$(value calibrate-estimate device)")"
    local sampling gathering
    # calibration draws held-out images too
    sampling=$(calc "$(told generate-4 'generated 4 images') * $(value calibrate-estimate prompts) / 4")
    gathering=$(grep -o '([0-9.]* s)$' "$output/logs/calibrate.err" 2>/dev/null | tr -d '()s' | awk '{ sum += $1 } END { if (NR) print sum }')
    figure whole 'sampling the same' "$sampling" s
    figure whole 'calibrating' "$gathering" s
    figure whole 'calibrating over sampling' "$(calc "$gathering / $sampling")" times '<= 1.25'

    # what follows keeps to a card of 24 GiB, as the driver counts
    local within=(--max-vram "$train_limit") of
    of=$(calc "$(sed 's/GiB/* 1024/; s/MiB//' <<<"$train_limit")")
    attempt calibrate-limited-estimate 20 "$binary" calibrate "${model[@]}" "${format[@]}" "${image[@]}" "${fewer[@]}" "${within[@]}" --dry-run --json
    attempt calibrate-limited 60 "$binary" calibrate "${model[@]}" "${format[@]}" "${image[@]}" "${fewer[@]}" "${within[@]}" --output "$stats" --force --json
    rm -f "$stats"
    figure whole "calibrate within $train_limit" "$seconds" s
    figure whole "calibrate within $train_limit: peak on the GPU" "$peak" MiB "${peak:+<= $of}" "$(mib "$(value calibrate-limited-estimate device)")"

    # eleven neighbours: one layer in their place, and one sandwich to train
    at=$(room $((gigabytes - 2)))
    echo "{\"replace\": [{\"replaces\": [$(printf '"single.%02d", ' {14..24} | sed 's/, $//')], \"form\": \"linear\"}]}" >"$work/plan.json"
    attempt prune-estimate 20 "$binary" prune "${model[@]}" "${format[@]}" --plan "$work/plan.json" "${fewer[@]}" "${image[@]}" "${within[@]}" --dry-run --json
    attempt prune 90 "$binary" prune "${model[@]}" "${format[@]}" --plan "$work/plan.json" "${fewer[@]}" "${image[@]}" "${within[@]}" --output "$at/pruned" --force --json
    figure whole 'prune --plan of 11 blocks' "$seconds" s
    figure whole 'prune --plan: peak on the GPU' "$peak" MiB "${peak:+<= $of}" "$(mib "$(value prune-estimate device)")"
    figure whole 'prune --plan: memory of its own on the host' "$host" MiB '' "$(mib "$(value prune-estimate host)")"
    echo '{"data": {"num-prompts": 2, "steps": 2, "held-out": 1}}' >"$work/train.json"
    local train=(train-sandwich --model "$at/pruned" "${format[@]}" --recipe "$work/train.json" --prompts "$work/prompts.txt" --batch 1 "${image[@]}"
        --steps 5 --finetune 3 "${within[@]}" --json)
    local trained
    trained=$(room $((gigabytes - 2)))/trained
    attempt train-estimate 30 "$binary" "${train[@]}" --output "$trained" --dry-run
    attempt train 120 "$binary" "${train[@]}" --output "$trained" --force --log "$output/logs/losses-full.jsonl"
    figure whole 'train-sandwich: peak on the GPU' "$peak" MiB "${peak:+<= $of}" "$(mib "$(value train-estimate peak_bytes)")"
    figure whole 'train-sandwich, 5 + 3 steps' "$seconds" s
    # the log has tokens per second since a phase began: without its first and its last step, at which more is done:
    # samples are drawn several at a time before the first
    local tokens=$((side * side / 256 + text)) each
    each=$(grep -v finetune "$output/logs/losses-full.jsonl" | step_seconds "$tokens" 4)
    figure whole 'train-sandwich: a step of the sandwich' "$each" s '' "${peer_train:+$(calc "$peer_train / 1000")}"
    [[ -z ${peer_train:-} ]] || figure whole "that over PyTorch's" "$(calc "1000 * $each / $peer_train")" times '<= 1.1'
    figure whole 'train-sandwich: a step of the finetuning' "$(grep finetune "$output/logs/losses-full.jsonl" | step_seconds "$tokens" 2)" s
    [[ -d $trained ]] || trained=$at/pruned
    attempt generate-trained 60 "$binary" generate --model "$trained" "${format[@]}" "${image[@]}" --prompt 'a red circle' --steps 8 --output "$work/trained.png" --force
    figure whole 'the result draws: a step' "$(calc "$(told generate-trained 'generated 1 image') / 8")" s
    attempt eval 60 "$binary" eval --model "$trained" "${format[@]}" "${image[@]}" --prompts "$work/prompts.txt" --num-prompts 1 --steps 2 "${within[@]}" --output "$work/eval" --force --json
    figure whole 'eval ends well' "$code" '' '= 0'
    figure whole 'eval: peak on the GPU' "$peak" MiB "${peak:+<= $of}"
    # last, as it takes longest: every block is fitted and tried
    attempt plan 150 "$binary" plan "${model[@]}" "${format[@]}" "${image[@]}" "${fewer[@]}" "${within[@]}" --ratio 0.2 --output "$work/chosen.json" --force
    figure whole 'plan --ratio 0.2 ends well' "$code" '' '= 0'
    figure whole 'plan --ratio 0.2' "$seconds" s
    figure whole 'plan: peak on the GPU' "$peak" MiB "${peak:+<= $of}"
    figure whole 'plan: memory of its own on the host' "$host" MiB
}
