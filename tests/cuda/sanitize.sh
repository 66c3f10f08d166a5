#!/bin/sh
# sanitize.sh -- the GPU programs and specs under compute-sanitizer: memcheck, racecheck, initcheck.  `make gpu-sanitize` calls it.
#   sanitize.sh FOLDER[:FOLDER] [TOOL...]      folders of the programs; KELVIN_TEST: the runner of specs, or nothing;
# KELVIN_LIB: a folder of libraries, or nothing
# A line a tool and target: PASS, FAIL with the first finding, or SKIP; exits 1 when one failed, 2 when the tool is not here.
# In a relocatable tree the programs' libraries lie beside them.
[ -z "$KELVIN_LIB" ] || export LD_LIBRARY_PATH="$KELVIN_LIB${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
here=$(cd "$(dirname "$0")" && pwd)
programs=${1:?sanitize.sh: the folder of the programs is needed}
shift
tools=${*:-memcheck racecheck initcheck}
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
log=${OUT:-/tmp}/sanitize.log
[ -x "$sanitizer" ] || { echo "sanitize: compute-sanitizer is not here (CUDA Toolkit): nothing was checked"; exit 2; }
: > "$log"
failed=0
run() { # tool, name, command...
    tool=$1 name=$2
    shift 2
    start=$(date +%s)
    out=$(timeout "${SANITIZE_SECONDS:-120}" "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 3 "$@" 2>&1)
    rc=$?
    printf '=== %s %s: rc %s\n%s\n' "$tool" "$name" "$rc" "$out" >> "$log"
    if [ $rc = 0 ]; then echo "PASS $tool $name ($(($(date +%s) - start)) s)"
    else
        failed=1
        echo "FAIL $tool $name: rc $rc, $(printf '%s\n' "$out" | grep -m1 -E '========= (Invalid|Error|Race|Uninitialized|Program|.*hazard)|FAIL|rror' | cut -c1-160)"
    fi
}
for tool in $tools; do
    for p in "attend_check small" user_kernel language_check "test_device_cache cuda"; do
        path=
        for folder in $(echo "$programs" | tr : ' '); do [ ! -x "$folder/${p%% *}" ] || path=$folder; done
        if [ -n "$path" ]; then run "$tool" "${p%% *}" $path/$p; else echo "SKIP $tool ${p%% *}: not built"; fi
    done
    if [ -n "$KELVIN_TEST" ]; then
        for spec in ${SANITIZE_SPECS:-$(cd "$here" && ls ./*_spec.lua | grep -v attend_spec | sed 's,^\./,tests/cuda/,')}; do run "$tool" "$spec" $KELVIN_TEST "$spec"; done
    fi
done
exit $failed
