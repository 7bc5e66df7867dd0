#!/usr/bin/env bash
# Run the tests in the release profile; then say which were skipped and which ten took longest. Arguments go to cargo.
# A test that needs hardware which is not there prints `skipped: …` and passes; FASTFLUX_REQUIRE makes it fail.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Stable test programs know the option that shows times, but hide it without this variable.
times=(-- --show-output -Z unstable-options --report-time)
runner=(--config 'target."cfg(all())".runner = ["env", "RUSTC_BOOTSTRAP=1"]')
case $(uname -s) in
MINGW* | MSYS* | CYGWIN*)
    times=(-- --show-output)
    runner=()
    ;;
esac

status=0
cargo ${runner[@]+"${runner[@]}"} test --release --no-fail-fast "$@" --lib --bins --tests "${times[@]}" 2>&1 | tee "$log" || status=$?
cargo test --release "$@" --doc 2>&1 | tee -a "$log" || status=$?

echo
grep '^skipped: ' "$log" | sort | uniq -c
echo "slowest:"
sed -n 's/^test \(.*\) \.\.\. .*<\([0-9.]*\)s>$/\2 s  \1/p' "$log" | sort -rn | head -n 10
# Each finished test program says `test result: ok. 12 passed; 0 failed; …`; a skipped test counts as passed there.
awk '/^skipped: / { s++ }
     /^test result:/ { for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) p += $(i-1); if ($i ~ /^failed/) f += $(i-1) } }
     END { printf "tests: %d passed, %d failed, %d skipped\n", p - s, f, s }' "$log"
exit "$status"
