#!/usr/bin/env python3
"""Builds a GPU out of nothing: libcuda, libcublas and libcurand that compute on the CPU.

    python3 scripts/emulated_gpu/build.py target/emulated-gpu

A binary built with `--features cuda` then runs on a machine without a GPU, slowly, and the same code runs as on one: candle's
kernels and our own are compiled from their sources. Needs g++ 12, OpenBLAS (Debian: libopenblas-dev) and `cargo fetch`.
"""

import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# candle's kernels that are PTX in the binary; threads of the second kind wait for each other
ALONE = ["affine", "binary", "cast", "conv", "fill", "indexing", "ternary", "unary"]
TOGETHER = ["reduce", "sort", "quantized"]
HEADERS = ["binary_op_macros.cuh", "cuda_utils.cuh", "compatibility.cuh"]
COMPILE = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-fPIC", "-w", "-fno-strict-aliasing", "-D__CUDA_ARCH__=900"]
# what our kernels write in PTX
OURS = {
    "float2 from_f16(": "return {emulated_from_half(pair & 0xffff), emulated_from_half(pair >> 16)};",
    "unsigned to_f16(": "return emulated_to_half(first) | (unsigned)emulated_to_half(second) << 16;",
    "unsigned to_bf16(": "return emulated_to_bfloat(first) | (unsigned)emulated_to_bfloat(second) << 16;",
    "float power_of_two(": "return exp2f(x);",
    "float reciprocal(": "return 1 / x;",
    "unsigned shared_address(": "return (const char *)at - emulated_shared;",
    "void copy_16_bytes(": "emulated_copy_later(to, from, bytes);",
    "void wait_for_copies(": "emulated_finish_copies();",
    "void load_matrices(": "emulated_load_matrices(to, at, false);",
    "void load_transposed(": "emulated_load_matrices(to, at, true);",
    "void multiply_f16(": "emulated_multiply<emulated_from_half>(sum, a, b0, b1);",
    "void multiply_bf16(": "emulated_multiply<emulated_from_bfloat>(sum, a, b0, b1);",
}
OUR_SOURCES = ["numbers.cu", "kernels.cu", "attention_backward.cu", "backward.cu", "change.cu"]
OURS_ALONE = ("gelu", "swiglu", "gated_residual", "residual_backward", "weighted_sum", "column_sums", "add_products")


def run(*command, **more):
    return subprocess.run([str(word) for word in command], check=True, **more)


def body(source, function, text):
    """The source with another body of a function."""
    start = source.index("{", source.index(function))
    end, depth = start, 0
    while True:
        depth += {"{": 1, "}": -1}.get(source[end], 0)
        end += 1
        if depth == 0:
            return source[:start] + "{ " + text + " }" + source[end:]


def portable(source):
    source = re.sub(r'extern\s+"C"\s+__global__', "static GLOBAL", source)
    return re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1 *\2 = (\1 *)emulated_shared;", source)


def kernels(out, name, source, waits, prefix=""):
    """Compiles one source file, with a function that registers all its kernels."""
    (out / f"{name}.cu").write_text(portable(source))
    include = ["-I", out]
    text = run(*COMPILE, "-DGLOBAL=GLOBAL", *include, "-include", HERE / "device.h", "-E", "-P", "-x", "c++",
               out / f"{name}.cu", capture_output=True, text=True).stdout
    names = dict.fromkeys(re.findall(r"static\s+GLOBAL\s+void\s+(\w+)\s*\(", text))
    lines = [f'REGISTER("{prefix}{kernel}", {kernel}, {str(waits(kernel)).lower()});' for kernel in names]
    (out / f"{name}.cpp").write_text(
        f'#include "{name}.cu"\n#undef min\n#undef max\n'
        + "static const bool registered = [] {\n    " + "\n    ".join(lines) + "\n    return true;\n}();\n"
    )
    run(*COMPILE, "-DGLOBAL=", *include, "-include", HERE / "device.h", "-c", out / f"{name}.cpp", "-o", out / f"{name}.o")
    print(f"{name}: {len(lines)} kernels", file=sys.stderr)


def library(out, name, sources, exported, versioned, *libraries):
    version = f"{name} " if versioned else ""
    (out / "exported").write_text(f"{version}{{ global: {exported}; local: *; }};\n")
    run(*COMPILE, "-shared", "-Wl,-z,muldefs", f"-Wl,--version-script={out / 'exported'}", f"-Wl,-soname,{name}",
        "-o", out / name, *sources, *libraries)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = pathlib.Path(sys.argv[1]).resolve()
    (out / "cuda" / "std").mkdir(parents=True, exist_ok=True)
    (out / ".gitignore").write_text("*\n")
    found = sorted(pathlib.Path.home().glob(".cargo/registry/src/*/candle-kernels-0.11.1/src"))
    if not found:
        sys.exit("candle-kernels 0.11.1 is not there: run `cargo fetch` first")
    for header in HEADERS:
        (out / header).write_text(portable((found[-1] / header).read_text()))
    # all that these would declare is in device.h
    for header in ["cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h", "cuda/std/limits"]:
        (out / header).write_text("")
    for name in ALONE + TOGETHER:
        kernels(out, name, (found[-1] / f"{name}.cu").read_text(), lambda _: name in TOGETHER)
    ours = "".join((ROOT / "src/model/ops/cuda" / name).read_text() for name in OUR_SOURCES)
    for function, text in OURS.items():
        ours = body(ours, function, text)
    kernels(out, "ours", ours, lambda kernel: not kernel.startswith(OURS_ALONE), "ours:")
    objects = [out / f"{name}.o" for name in [*ALONE, *TOGETHER, "ours"]]
    library(out, "libcuda.so.1", [HERE / "driver.cpp", *objects], "cu*", False)
    blas = HERE / "blas.cpp"
    library(out, "libcublas.so.13", [blas], "cublas*", True, "-lopenblas")
    library(out, "libcurand.so.10", [blas], "curand*", True, "-lopenblas")
    print(f"LD_LIBRARY_PATH={out}")


if __name__ == "__main__":
    main()
