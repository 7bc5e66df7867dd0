# Part of scripts/check_gpu.sh: what is installed, and whether it is right on small models.

# What is measured, and what stands for it in a rehearsal.
sizes() {
    doubles=19 singles=38 side=1024 text=512 heads=24 t5=4096 clip=768 vae=128,256,512,512 gigabytes=24
    limits=(24GiB 12GiB 6GiB) train_limit=24GiB
    replaced=(double.04 double.09 double.14 single.02 single.06 single.11 single.15 single.20 single.24 single.29 single.33)
    if [[ -n $rehearse ]]; then
        side=64 text=16 heads=1 t5=64 clip=64 vae=16,32,32,32 gigabytes=1 limits=(40MiB 30MiB 20MiB) train_limit=1200MiB
    fi
    transformer "$work/full.json"
    transformer "$work/pruned.json" "${replaced[@]}"
}

# transformer FILE BLOCK…: a transformer's config.json, with linear layers in place of the blocks.
transformer() {
    local file=$1 kind count i id layout='' record=''
    shift
    for kind in double single; do
        [[ $kind == double ]] && count=$doubles || count=$singles
        for ((i = 0; i < count; i++)); do
            printf -v id '%s.%02d' "$kind" "$i"
            [[ " $* " == *" $id "* ]] && id="{\"replaces\": [\"$id\"], \"form\": \"linear\"}" || id="\"$id\""
            layout+="${layout:+, }$id"
        done
    done
    if (($#)); then
        record=", \"fastflux\": {\"version\": 1, \"tool\": \"\", \"base\": \"\", \"base-fingerprint\": \"random\", \"layout\": [$layout],
            \"axes-dims\": [16, 56, 56], \"theta\": 10000.0, \"scheduler\": {}, \"defaults\": {}, \"recipe\": {}}"
    fi
    cat >"$file" <<JSON
{"_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "out_channels": 64, "num_layers": $doubles,
 "num_single_layers": $singles, "attention_head_dim": 128, "num_attention_heads": $heads, "joint_attention_dim": $t5,
 "pooled_projection_dim": $clip, "guidance_embeds": true, "axes_dims_rope": [16, 56, 56]$record}
JSON
}

smi() { nvidia-smi -i 0 --format=csv,noheader,nounits --query-gpu="$1" 2>/dev/null | sed 's/^ *//; s/ *$//'; }

step_device() {
    fact program "$("$binary" --version 2>&1 | head -n 1)"
    fact system "$(uname -sr), $(nproc) cores, $(awk '/MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo) GiB"
    if command -v nvidia-smi >/dev/null; then
        fact GPU "$(smi name)"
        fact 'compute capability' "$(smi compute_cap)"
        fact driver "$(smi driver_version), CUDA $(nvidia-smi | grep -o 'CUDA Version: [0-9.]*' | cut -d' ' -f3)"
        fact 'GPU memory, MiB' "$(smi memory.total), $(smi memory.used) in use at the start"
        fact 'PCIe' "generation $(smi pcie.link.gen.max), $(smi pcie.link.width.max) lanes at most"
        stdbuf -oL nvidia-smi -i 0 --format=csv,noheader,nounits --query-gpu=memory.used -lms 100 >"$memory" 2>/dev/null &
        background+=($!)
    else
        note 'nvidia-smi is not there: nothing is said of the GPU, and no peak of its memory'
    fi
    fact 'CUDA libraries' "$(ldd "$binary" 2>/dev/null | grep -E 'libcublas\.|libcudart|libnvrtc|libcuda\.' | awk '{ print $3 }' | paste -sd' ')"
    local missing
    missing=$(ldd "$binary" 2>/dev/null | grep 'not found' | awk '{ print $1 }' | paste -sd' ')
    figure device 'libraries that are missing' "${missing:-none}" '' '= none'
    # a small model first: what cannot start is known at once
    attempt device-start 60 "$binary" inspect --json
    figure device 'the program starts' "$code" '' '= 0'
    [[ ,$steps, == *,full,* || ,$steps, == *,whole,* ]] && begin_checkpoint
    local size
    size=$(smi memory.total)
    [[ ,$steps, == *,peers,* ]] && { ((${size:-0} > 60000)) || [[ -n $rehearse ]]; } && begin_peers
}

step_tests() {
    if [[ -z $tests ]]; then
        note 'tests: left out, as no test program was named (--tests)'
        return
    fi
    attempt tests 90 "$tests" model:: --skip eval::
    local line
    line=$(grep '^test result' "$output/logs/tests.out" | tail -n 1)
    figure tests 'tests of model:: that passed' "$(sed 's/.* \([0-9]*\) passed.*/\1/' <<<"$line")" '' '>= 1'
    figure tests 'tests of model:: that failed' "$(sed 's/.* \([0-9]*\) failed.*/\1/' <<<"$line")" '' '<= 0'
    grep '^test .*FAILED' "$output/logs/tests.out" | while read -r line; do note "tests: $line"; done
}

step_verify() {
    local folder name dtype goal found=''
    for folder in "$pipelines"/*/pipe; do
        [[ -e $folder/../reference.safetensors ]] || continue
        found=1 name=$(basename "$(dirname "$folder")")
        for dtype in f32 bf16; do
            [[ $dtype == f32 ]] && goal='<= 1e-4' || goal='<= 2e-2'
            attempt "verify-$name-$dtype" 40 "$binary" verify --device cuda --dtype "$dtype" --model "$folder" \
                --reference "$folder/../reference.safetensors" --json
            figure verify "$name $dtype: the velocity's error" "$(awk '$1 == "\"name\":" { here = $2 ~ /transformer.velocity/ }
                $1 == "\"relative\":" { sub(",", "", $2); relative = $2 } /^ *}/ && here { print relative; exit }
                ' "$output/logs/verify-$name-$dtype.out")" '' "$goal"
            figure verify "$name $dtype: first tensor that is off" "$(value "verify-$name-$dtype" first_off)" '' '= null'
        done
    done
    [[ -n $found ]] || note "verify: left out, as $pipelines holds no recorded pipeline"
}

# The largest difference of two folders' images and its root mean square, of 255; without Python only whether there is none.
difference() {
    if [[ -n $python3 ]]; then
        "$python3" "$here/images.py" "$1" "$2" 2>/dev/null
    elif diff -rq "$1" "$2" >/dev/null 2>&1; then
        echo 0 0
    fi
}

step_bundled() {
    local device dtype at=$work/bundled
    local losses=()
    mkdir -p "$at"
    head -n 16 "$root/configs/tiny/prompts.txt" >"$at/captions.txt"
    for device in cuda cpu; do
        attempt "bundled-prune-$device" 60 "$binary" prune --device "$device" --dtype f32 --ratio 0.2 --num-prompts 16 --steps 2 --output "$at/pruned-$device" --json
        # both devices train what the CPU's rounding has no part in: the same pruned model
        attempt "bundled-train-$device" 60 "$binary" train-sandwich --device "$device" --dtype f32 --model "$at/pruned-cuda" --num-prompts 16 --steps 3 --finetune 3 \
            --log "$output/logs/losses-$device.jsonl" --output "$at/trained-$device" --json
        for dtype in f32 bf16; do
            attempt "bundled-generate-$device-$dtype" 40 "$binary" generate --device "$device" --dtype "$dtype" --prompt-file "$at/captions.txt" --seed 3 --steps 12 \
                --output "$at/$device-$dtype"
        done
    done
    for device in cuda cpu; do
        awk '/"replaces": \[/ { inside = 1 } inside { gsub(/[ ",\[\]]|replaces:/, ""); if ($0 != "") print } /\]/ { inside = 0 }' \
            "$output/logs/bundled-prune-$device.out" | grep -o '\(double\|single\)\.[0-9]*' | sort | paste -sd' ' >"$at/blocks-$device"
        losses+=("$output/logs/losses-$device.jsonl")
    done
    local same=no
    [[ -s $at/blocks-cuda && $(<"$at/blocks-cuda") == "$(<"$at/blocks-cpu")" && $(<"$at/blocks-cuda") == *.* ]] && same=yes
    figure bundled "prune chooses the CPU's blocks" "$same" '' '= yes'
    figure bundled 'largest relative difference of a loss' "$(paste -d' ' "${losses[@]}" 2>/dev/null | awk '{
            n = 0
            while (match($0, /"loss":[-0-9.e+]+/)) { got[n++] = substr($0, RSTART + 7, RLENGTH - 7); $0 = substr($0, RSTART + RLENGTH) }
            if (n == 2) { d = (got[0] - got[1]) / got[1]; if (d < 0) d = -d; if (d > most) most = d; seen++ }
        } END { if (seen) printf "%.2e", most }')" '' '<= 1e-4'
    local most rms
    read -r most rms <<<"$(difference "$at/cuda-f32" "$at/cpu-f32")"
    figure bundled "16 images in f32: largest difference from the CPU's" "$most" /255 '<= 3'
    # bf16 rounds in many places: diffusers 0.42 in bf16 is 0.83 (34 at most) from itself in f32 over these captions (bf16_images.py)
    read -r most rms <<<"$(difference "$at/cpu-bf16" "$at/cpu-f32")"
    figure bundled "the CPU's in bf16: root mean square from f32" "$rms" /255 '<= 0.83'
    read -r most rms <<<"$(difference "$at/cuda-bf16" "$at/cpu-f32")"
    figure bundled 'images in bf16: root mean square from f32' "$rms" /255 '<= 0.83'
    figure bundled 'images in bf16: largest difference from f32' "$most" /255
}
