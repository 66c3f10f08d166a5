#!/bin/sh
# kelvin-test -- the specs of a relocatable tree, under its own LuaJIT, with nothing installed.  Arguments: specs or folders.
here=$(cd "$(dirname "$0")/.." && pwd) || exit 2
share=$here/share/kelvin
fail=0
for t in "$here"/libexec/test_*; do
    [ -x "$t" ] || continue
    LD_LIBRARY_PATH=$here/lib "$t" > "${TMPDIR:-/tmp}/kelvin-ctest.$$" 2>&1 && echo "  $(basename "$t"): $(tail -1 "${TMPDIR:-/tmp}/kelvin-ctest.$$")" ||
        { fail=1; tail -20 "${TMPDIR:-/tmp}/kelvin-ctest.$$"; echo "FAILED: $(basename "$t")"; }
    rm -f "${TMPDIR:-/tmp}/kelvin-ctest.$$"
done
cd "$share" || exit 2
export LUA_PATH="$share/busted/?.lua;$share/busted/?/init.lua;;" LUA_CPATH="$share/busted/?.so;;" KELVIN_DIST=$here
"$here/bin/kelvin" run-lua tests/run_busted.lua "$@" || fail=1
exit $fail
