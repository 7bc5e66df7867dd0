#!/usr/bin/env bash
# Checks fastflux on an NVIDIA GPU and measures it: is it right, how fast is it, does it keep to its memory?
#
#     scripts/check_gpu.sh --quick            # a minute: after installing
#     scripts/check_gpu.sh                    # about ten minutes; the whole of it wants 80 GB on the GPU, 110 GB of memory
#
# Every step has its own time limit and its own log, and a step that fails does not stop the next. The report
# (report.txt, report.json) says what each figure should have been.
#
#   --binary PATH         fastflux, built with --features cuda (target/release/fastflux)
#   --tests PATH          the built test program of the library: its model:: tests are run
#   --bench-kernels PATH  the built benches/cuda.rs
#   --python PATH         a python3 with torch and diffusers, for scripts/bench_gpu_peers.py
#   --pipelines DIR       recorded pipelines, DIR/NAME/pipe and DIR/NAME/reference.safetensors (tests/golden)
#   --work DIR            scratch; a random FLUX.1-dev of 24 GB goes to /dev/shm where that has room
#   --output DIR          logs and report (gpu-report)
#   --steps LIST          some of: device,tests,verify,bundled,bench,peers,kernels,full,whole
#   --limit SECONDS       for everything: what does not fit is left out from the end (3600)
#   --quick               device, tests, verify, bundled and a short bench
#   --rehearse            tiny models in place of FLUX.1-dev, to try this script out
set -uo pipefail
export LC_ALL=C
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$root/scripts/check_gpu
binary=$root/target/release/fastflux tests='' bench_kernels='' python='' pipelines=$root/tests/golden
work='' output=gpu-report steps=device,tests,verify,bundled,bench,peers,kernels,full,whole limit=3600 quick='' rehearse=''

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
while (($#)); do
    case $1 in
    --binary | --tests | --bench-kernels | --python | --pipelines | --work | --output | --steps | --limit)
        (($# > 1)) || { echo "$1: a value is missing" >&2; exit 2; }
        name=${1#--}
        printf -v "${name//-/_}" %s "$2"
        shift 2 ;;
    --quick) quick=1 steps=device,tests,verify,bundled,bench; shift ;;
    --rehearse) rehearse=1; shift ;;
    --help | -h) usage; exit ;;
    *) echo "unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
done
[[ -x $binary ]] || { echo "no program at $binary: build it with scripts/build-cuda.sh, or name it with --binary" >&2; exit 2; }
[[ $binary == */* ]] && binary=$(realpath "$binary")
python3=${python:-$(command -v python3 || true)}
mkdir -p "$output/logs" || exit 2
output=$(realpath "$output")
[[ -n $work ]] && mkdir -p "$work"
work=$(mktemp -d "${work:-${TMPDIR:-/tmp}}/check-gpu.XXXXXX") || exit 2
shm=$(mktemp -d /dev/shm/check-gpu.XXXXXX 2>/dev/null) || shm=$work
declare -a background=()
finish() {
    for pid in "${background[@]}"; do kill "$pid" 2>/dev/null; done
    report
    rm -rf "$work" "$shm"
}
trap finish EXIT
trap 'exit 130' INT TERM

source "$here/lib.sh"
source "$here/small.sh"
source "$here/large.sh"

sizes
for step in ${steps//,/ }; do
    [[ $(type -t "step_$step") == function ]] || { echo "--steps: no step is called $step" >&2; exit 2; }
done
for step in ${steps//,/ }; do
    left || { note "$step: left out, --limit $limit is over"; continue; }
    echo "== $step ($(elapsed) s)"
    "step_$step"
    report
done
finish
trap - EXIT
cat "$output/report.txt"
! grep -q $'\tFAIL$' "$figures"
