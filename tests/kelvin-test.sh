#!/bin/sh
# kelvin-test -- the specs of a relocatable tree, under its own LuaJIT, with nothing installed.  Arguments: specs or folders.
here=$(cd "$(dirname "$0")/.." && pwd) || exit 2
share=$here/share/kelvin
cd "$share" || exit 2
export LUA_PATH="$share/busted/?.lua;$share/busted/?/init.lua;$share/tests/?.lua;;" LUA_CPATH="$share/busted/?.so;;" KELVIN_DIST="$here"
exec "$here/bin/kelvin" lua tests/run_busted.lua "$@"
