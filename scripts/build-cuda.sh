#!/usr/bin/env bash
# Build fastflux for NVIDIA GPUs: `cargo build --release --features cuda`, with what it needs found or fetched.
# Needs no GPU and no driver. Where there is no CUDA toolkit, one is put together from NVIDIA's packages on PyPI.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/build-cuda.sh [OPTIONS] [-- CARGO ARGUMENTS]

  --compute-cap N   the GPU's compute capability without the dot: A100 80, RTX 3090 86, L40S and RTX 4090 89,
                    H100 and H200 90, B200 100, RTX 5090 120. Default: what nvidia-smi says
  --flash-attn      with flash attention as well (its kernels take long to compile)
  --toolkit DIR     where a toolkit is made or was made before. Default: target/cuda-toolkit
  --wheels          make and use that toolkit even if there is an nvcc
  --env             build nothing; print the environment as export lines, for cargo commands of your own:
                        eval "$(scripts/build-cuda.sh --env)" && cargo test --release --features cuda
TEXT
}

# candle's kernels travel as PTX, which the driver compiles: a driver refuses PTX of a newer CUDA than its own.
# 13.0 asks for driver 580 or later.
wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-nvrtc==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cap=${CUDA_COMPUTE_CAP:-}
features=cuda
toolkit=
wheels_only=false
env_only=false
while [ $# -gt 0 ]; do
    case $1 in
    --compute-cap) cap=${2:?--compute-cap needs a number} && shift ;;
    --flash-attn) features=cuda,flash-attn ;;
    --toolkit) toolkit=${2:?--toolkit needs a folder} && shift ;;
    --wheels) wheels_only=true ;;
    --env) env_only=true ;;
    -h | --help) usage && exit ;;
    --) shift && break ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift
done

say() { echo "build-cuda: $*" >&2; }
fail() { say "$@" && exit 1; }

# For every name of the driver's interface a function that says "no device" (CUDA_ERROR_NO_DEVICE): enough to link
# against, where no driver is installed.
driver_stub() {
    local lib=$1/lib/stubs
    mkdir -p "$lib"
    { grep -ohE '\bcu[A-Z][A-Za-z0-9_]+' "$1"/include/cuda.h "$1"/include/cuda*Typedefs.h || true; } |
        sort -u | awk '{ print "int " $1 "(void) { return 100; }" }' |
        "${CC:-cc}" -x c -shared -fPIC -w -fno-builtin -Wl,-soname,libcuda.so.1 -o "$lib/libcuda.so.1" -
    ln -sf libcuda.so.1 "$lib/libcuda.so"
}

# The wheels bring compiler, headers and libraries, but neither lib64 nor the names that linkers look for.
make_toolkit() {
    local into=$1 part so
    [ -e "$into/complete" ] && return
    say "making a CUDA toolkit in $into (700 MB to fetch)"
    rm -rf "$into" "$into.part"
    mkdir -p "$into.part"
    part=$(cd "$into.part" && pwd)
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
        --target "$part/wheels" "${wheels[@]}" >&2 || fail "pip could not fetch the CUDA packages"
    mv "$part"/wheels/nvidia/cu13/* "$part"
    rm -r "$part/wheels"
    chmod +x "$part"/bin/* "$part"/nvvm/bin/*
    ln -s lib "$part/lib64"
    for so in "$part"/lib/lib*.so.*; do
        ln -sf "$(basename "$so")" "${so%%.so.*}.so"
    done
    driver_stub "$part"
    touch "$part/complete"
    mv "$part" "$into"
}

installed_nvcc() {
    local candidate
    for candidate in "${NVCC:-}" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
        if [ -n "$candidate" ] && [ -x "$candidate" ]; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if [ -z "$cap" ] && command -v nvidia-smi >/dev/null; then
    cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
fi
[[ $cap =~ ^[0-9]{2,3}$ ]] || fail "which GPU is it for? pass --compute-cap (see --help)"

made=false
if ! $wheels_only && nvcc=$(installed_nvcc); then
    # bin/nvcc may be a link into the toolkit.
    home=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)
else
    made=true
    home=${toolkit:-${CARGO_TARGET_DIR:-$root/target}/cuda-toolkit}
    make_toolkit "$home"
    home=$(cd "$home" && pwd)
    nvcc=$home/bin/nvcc
fi
release=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
[ -n "$release" ] || fail "$nvcc does not say its version"
read -r major minor <<<"$release"
say "CUDA $major.$minor in $home, compute capability $cap"

export CUDA_HOME=$home NVCC=$nvcc PATH="$(dirname "$nvcc"):$PATH" CUDA_COMPUTE_CAP=$cap
CUDARC_CUDA_VERSION=$(printf '%d%02d0' "$major" "$minor")
export CUDARC_CUDA_VERSION

if $env_only; then
    printf 'export %s=%q\n' CUDA_HOME "$CUDA_HOME" NVCC "$NVCC" CUDA_COMPUTE_CAP "$cap" \
        CUDARC_CUDA_VERSION "$CUDARC_CUDA_VERSION"
    printf 'export PATH=%q:$PATH\n' "$(dirname "$nvcc")"
    exit
fi

if [ "$features" != cuda ]; then
    # FLUX has no bias by position, no capped scores, no window and no dropout: leave those variants of each kernel out.
    export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -DFLASHATTENTION_DISABLE_ALIBI -DFLASHATTENTION_DISABLE_SOFTCAP \
-DFLASHATTENTION_DISABLE_LOCAL -DFLASHATTENTION_DISABLE_DROPOUT"
fi

cd "$root"
cargo build --release --features "$features" "$@"

binary=${CARGO_TARGET_DIR:-$root/target}/release/fastflux
say "built $binary"
if $made; then
    say "if no CUDA is installed, run it with LD_LIBRARY_PATH=$home/lib (the driver must be there)"
fi
