-- luacheck: globals arg
-- Runs the specs of a relocatable tree: busted inside the program's own LuaJIT.  Arguments: specs or folders.
local specs = #arg > 0 and { unpack(arg) } or { "tests" }
_G.arg = { [0] = "busted", "--ignore-lua", "--output=tests/output.lua", "--pattern=_spec", unpack(specs) }
require "busted.runner" { standalone = false }
