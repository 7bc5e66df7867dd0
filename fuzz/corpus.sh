#!/usr/bin/env bash
# Seeds for the fuzz targets: the smallest files of tests/golden and configs. Writes fuzz/corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
for target in checkpoint tokenizer image small_files; do mkdir -p "fuzz/corpus/$target"; done
copy() { # TARGET FILE...
    local target=$1 file
    shift
    for file in "$@"; do
        if [ -f "$file" ] && [ "$(wc -c < "$file")" -le 1048576 ]; then
            cp "$file" "fuzz/corpus/$target/$(echo "$file" | tr / -)"
        fi
    done
}
shopt -s globstar nullglob
copy checkpoint tests/golden/**/*.safetensors tests/golden/**/*.gguf configs/tiny/**/*.safetensors
copy image tests/golden/**/*.png .github/*.png
copy small_files configs/**/*.json tests/golden/**/*.json
for folder in tests/golden/*/pipe/tokenizer*/ configs/tiny/tokenizer*/; do
    if [ -f "$folder/tokenizer.json" ] && [ "$(wc -c < "$folder/tokenizer.json")" -le 1048576 ]; then
        { cat "$folder/tokenizer.json"; printf '\0'; cat "$folder/tokenizer_config.json" 2> /dev/null || printf '{}'; printf '\0a red fox'; } \
            > "fuzz/corpus/tokenizer/$(echo "$folder" | tr / -)"
    fi
done
