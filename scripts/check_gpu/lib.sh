# Part of scripts/check_gpu.sh: runs programs under a limit, watches the GPU's memory, keeps figures, writes the report.

start=$EPOCHREALTIME
figures=$output/figures.tsv runs=$output/runs.tsv facts=$output/facts.tsv notes=$output/notes.txt memory=$work/memory
: >"$figures" >"$runs" >"$facts" >"$notes" >"$memory"

# Arithmetic with fractions: calc '1 / 3'; prints nothing where a number is missing.
calc() { awk "BEGIN { printf \"%.6g\", ($1) }" 2>/dev/null | grep -vi 'nan\|inf'; }
elapsed() { awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%d", b - a }'; }
left() { (($(elapsed) + 5 < limit)); }
note() { printf '%s\n' "$*" | tee -a "$notes"; }
fact() { printf '%s\t%s\n' "$1" "$2" >>"$facts"; }

# figure STEP NAME VALUE UNIT [GOAL] [ESTIMATE]: GOAL is `<= 3`, `>= 1.2`, `= ok` or nothing.
figure() {
    local verdict='' goal=${5:-}
    if [[ -n $goal ]]; then
        verdict=$(awk -v value="$3" -v goal="$goal" 'BEGIN {
            split(goal, part, " ")
            if (value == "") ok = 0
            else if (part[1] == "<=") ok = value + 0 <= part[2] + 0
            else if (part[1] == ">=") ok = value + 0 >= part[2] + 0
            else ok = value == part[2]
            print ok ? "pass" : "FAIL"
        }')
    fi
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "${3:--}" "$4" "${goal:--}" "${6:--}" "${verdict:--}" >>"$figures"
    printf '   %-52s %12s %-6s %s\n' "$2" "${3:--}" "$4" "${goal:+goal $goal }${6:+estimate $6 }$verdict"
}

stamp() { while IFS= read -r line; do printf '%s %s\n' "$EPOCHREALTIME" "$line"; done; }

# watch PID FILE: the most memory that the child of a process has of its own, without mapped files, in KiB.
watch() {
    local child kib most=0
    while [[ -e /proc/$1 ]]; do
        read -r child _ 2>/dev/null <"/proc/$1/task/$1/children"
        kib=$(awk '/^RssAnon/ { print $2 }' "/proc/${child:-none}/status" 2>/dev/null)
        ((${kib:-0} > most)) && most=$kib && echo "$most" >"$2"
        sleep 0.2
    done
}

# The program before may hold the GPU's memory for a second after its end: waits until what is used is near `level`, what was
# used before it began.
level=''
settle() {
    local i
    for ((i = 0; i < 25; i++)); do
        [[ -z $level ]] || (($(tail -n 1 "$memory") <= level + 64)) && break
        sleep 0.1
    done
    level=$(tail -n 1 "$memory")
}

# attempt NAME SECONDS COMMAND…: stdout to logs/NAME.out, stderr with times to logs/NAME.err. Sets code, seconds, peak (MiB on
# the GPU beyond the least that was used meanwhile), host (MiB of its own); empty if unknown.
attempt() {
    local name=$1 most=$2 before base rest
    shift 2
    [[ -n $rehearse ]] && most=$((4 * most)) # an emulated GPU is slow
    rest=$((limit - $(elapsed)))
    ((rest < most)) && most=$rest
    code=124 seconds='' peak=''
    if ((most < 3)); then
        note "$name: left out, --limit $limit is over"
        return 1
    fi
    settle
    before=$(wc -l <"$memory")
    local begun=$EPOCHREALTIME
    exec 3> >(stamp >"$output/logs/$name.err")
    local stamper=$!
    timeout -k 5 "$most" "$@" >"$output/logs/$name.out" 2>&3 3>&- &
    local runner=$!
    rm -f "$work/host"
    watch "$runner" "$work/host" 2>/dev/null 3>&- &
    local watcher=$!
    wait "$runner"
    code=$?
    kill "$watcher" 2>/dev/null
    wait "$watcher" 2>/dev/null
    host=$(awk '{ printf "%d", $1 / 1024 }' "$work/host" 2>/dev/null)
    exec 3>&-
    wait "$stamper" 2>/dev/null
    seconds=$(calc "$EPOCHREALTIME - $begun")
    ((before > 0)) && peak=$(tail -n +"$before" "$memory" | awk 'NR == 1 || $1 < least { least = $1 } $1 > most { most = $1 } END { print most - least }')
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$code" "$seconds" "${peak:--}" "${host:--}" >>"$runs"
    if ((code)); then
        note "$name: exit status $code after $seconds s$( ((code == 124)) && echo ', the limit'): $(tail -n 2 "$output/logs/$name.err" | cut -d' ' -f2- | tr '\n' ' ' | cut -c1-300)"
    fi
    return "$code"
}

# Numbers and texts out of indented JSON: the first value of a key; the seconds that a note on stderr tells.
value() { sed -n "s/^ *\"$2\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}$/\1/p" "$output/logs/$1.out" 2>/dev/null | head -n 1; }
told() { grep -o "$2.*([0-9.]* s)" "$output/logs/$1.err" 2>/dev/null | sed 's/.*(\([0-9.]*\) s)$/\1/' | head -n 1; }
when() { grep -m 1 "$2" "$output/logs/$1.err" 2>/dev/null | cut -d' ' -f1; }
# The value of KEY of the row `what` = WHAT in a bench's JSON, whatever the order of its keys.
row() {
    awk -v what="\"$2\"" -v wanted="\"$3\":" '
        { value = $2; sub(",$", "", value) }
        $1 == "\"what\":" { here = value == what }
        $1 == wanted { found = value }
        /^    }/ { if (here) { print found; exit } here = 0; found = "" }' "$output/logs/$1.out" 2>/dev/null
}

# A folder with room for so many gigabytes in addition to what is there: in memory where possible.
room() {
    local free
    free=$(df --output=avail -B1000000000 "$shm" 2>/dev/null | tail -n 1)
    if ((${free:-0} > $1)); then echo "$shm"; else echo "$work"; fi
}

report() {
    local passed failed
    passed=$(grep -c $'\tpass$' "$figures") failed=$(grep -c $'\tFAIL$' "$figures")
    {
        echo "fastflux on a GPU, $(date -u '+%Y-%m-%d %H:%M') UTC, $(elapsed) s${rehearse:+, a rehearsal with tiny models}"
        awk -F'\t' '{ printf "%-20s %s\n", $1, $2 }' "$facts"
        echo
        awk -F'\t' 'BEGIN { printf "%-9s %-52s %12s %-6s %-14s %-14s\n", "step", "", "measured", "", "goal", "estimate" }
            { printf "%-9s %-52s %12s %-6s %-14s %-14s %s\n", $1, $2, $3, $4, $5, $6, $7 }' "$figures"
        echo
        awk -F'\t' 'BEGIN { printf "%-28s %6s %10s %12s %12s\n", "run", "status", "seconds", "GPU MiB", "own MiB" } { printf "%-28s %6s %10.2f %12s %12s\n", $1, $2, $3, $4, $5 }' "$runs"
        [[ -s $notes ]] && { echo; cat "$notes"; }
        echo
        echo "$passed figures as they should be, $failed not"
    } >"$output/report.txt"
    awk -F'\t' '
        function quoted(text) { gsub(/\\/, "\\\\", text); gsub(/"/, "\\\"", text); gsub(/[\001-\037]/, " ", text); return "\"" text "\"" }
        function plain(text) { return text == "-" ? "null" : text ~ /^-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?$/ ? text : quoted(text) }
        { rows[kind, ++counts[kind]] = $0 }
        function list(name, kind, keys,   n, key, i, j, cell) {
            n = split(keys, key, " ")
            printf "  %s: [", quoted(name)
            for (i = 1; i <= counts[kind]; i++) {
                split(rows[kind, i], cell, "\t")
                printf "%s\n    {", (i > 1 ? "," : "")
                for (j = 1; j <= n; j++) printf "%s%s: %s", (j > 1 ? ", " : ""), quoted(key[j]), plain(cell[j])
                printf "}"
            }
            printf "\n  ]"
        }
        END {
            print "{"
            list("facts", "F", "name value"); print ","
            list("figures", "G", "step name value unit goal estimate verdict"); print ","
            list("runs", "R", "name status seconds gpu_mib host_mib"); print ","
            list("notes", "N", "text"); print "\n}"
        }' /dev/null kind=F "$facts" kind=G "$figures" kind=R "$runs" kind=N "$notes" >"$output/report.json"
}
