#!/bin/sh
# lint.sh -- the house rules that a program can see.  Prints each breach with its file; exits 1 if there is one.
cd "$(dirname "$0")/.." || exit 2
fail=0
breach() { # title, findings
    [ -z "$2" ] && return
    fail=1
    printf 'lint: %s\n%s\n' "$1" "$2" | sed '2,$s/^/    /'
}
files() { git ls-files --cached --others --exclude-standard -- "$@" 2>/dev/null || ls $@; }

# ---- dependency rule: core knows neither Lua nor CUDA; kernels see backend.h, kelvin.h, bits.h, rng.h; experiments only kelvin
breach "core includes Lua or CUDA" "$(grep -nE '#include *[<"](lua|lauxlib|cuda)' $(files 'core/*.c' 'core/*.h' 'core/codecs/*'))"
breach "kernels include a core header other than backend.h, kelvin.h, bits.h, rng.h and codecs' _device.h" \
    "$(grep -nE '#include *"' $(files 'kernels/*.cu' 'kernels/*.cuh' 'kernels/include/*') | grep -vE '"(backend|kelvin|bits|rng|codecs/[a-z]+_device)\.h"|"[a-z0-9_/]+\.cuh"')"
breach "experiments require something other than kelvin" "$(grep -nE 'require *[("]' $(files 'experiments/*.lua') | grep -vE 'require *\(?"kelvin"')"
breach "raw FFI outside lua/kelvin" "$(grep -lE 'require *\(?"ffi"' $(files 'experiments/*.lua' 'configs/*.lua') 2>/dev/null)"
breach "core prints or exits" "$(grep -nE '[^a-z_](printf|puts|perror|exit|abort) *\(' $(files 'core/*.c' 'core/codecs/*') | grep -vE '(sn|vsn)printf|^core/edit.c:')"   # edit.c lists completions on the terminal it owns
breach "cJSON outside core/json.c" "$(grep -lE 'cJSON\.h' $(files 'core/*.c' 'core/*.h') | grep -v '^core/json.c$')"

# ---- the cdef region: what LuaJIT refuses, and what would arrive there as boxed cdata
region=$(sed -n '/@cdef-begin  Plain/,/@cdef-end/p' core/kelvin.h | sed '1d;$d')
breach "the cdef region holds a preprocessor line" "$(printf '%s\n' "$region" | grep -nE '^ *#')"
breach "the cdef region holds size_t, varargs or a function pointer" "$(printf '%s\n' "$region" | grep -nE 'size_t|\.\.\.\)|\( *\*')"
breach "the cdef region returns an enum or a 64-bit integer" "$(printf '%s\n' "$region" | grep -nE '^ *(u?int64_t|enum [a-z_]+) +[a-z_]+\(')"

# ---- size and leftovers
breach "source files over 800 lines" "$(wc -l $(files '*.c' '*.h' '*.cu' '*.cuh' '*.lua') | awk '$2 != "total" && $1 > 800 { print $2 ": " $1 " lines" }')"
breach "a TODO without an issue number" "$(grep -nE '\b(TODO|FIXME|XXX)\b' $(files 'core/*' 'kernels/*' 'lua/*' 'experiments/*' 'configs/*' 'docs/*' 'tests/*.lua') | grep -vE 'TODO\(#[0-9]+\)' | grep -v '^tests/lint.sh')"
breach "trailing blanks or tabs in source" "$(grep -nE ' +$|	' $(files '*.c' '*.h' '*.cu' '*.cuh' '*.lua') | cut -c1-120 | head -20)"

# ---- Lua
if command -v luacheck >/dev/null 2>&1; then
    out=$(luacheck -q $(files '*.lua') 2>&1) || breach "luacheck" "$out"
else
    echo "lint: luacheck is not here (apt-get install lua-check): Lua is not checked" >&2
    fail=1
fi
[ $fail = 0 ] && echo "lint: clean"
exit $fail
