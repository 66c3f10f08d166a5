-- Decode attention on codes against double precision on the host: tests/cuda/attend_check.cu does it, needs the device library alone,
-- and prints a line a shape.  On the GPU (make gpu-test builds it) every shape, on the emulator (make emulated) short ones.
require "helper"
local K = require "kelvin.ffi"
local ffi = K.ffi

local function find(...)
  for _, p in ipairs { ... } do if K.exists(p) then return p end end
end
local function claim(name, program, argument, missing)
  if not program then pending(name .. " (" .. missing .. ")") return end
  it(name, function()
    local pipe = assert(io.popen(("'%s' %s 2>&1; echo rc $?"):format(program, argument)))
    local out = pipe:read "*a"
    pipe:close()
    assert(out:find("rc 0", 1, true) and not out:find("FAIL", 1, true), out)
    assert(out:match "(%d+) checks, 0 failed", out)
  end)
end

describe("attention on codes", function()
  local info = ffi.new "kv_device_info"
  K.C.kv_device_query("cuda", info)
  claim("equals double precision on every shape, twice the same, on the GPU", info.available == 1 and find(K.folder .. "/cuda/attend_check", K.folder .. "/../libexec/attend_check"), "check",
    info.available == 1 and "attend_check is not built: make gpu-test" or "no CUDA device")
  claim("equals double precision on short shapes, twice the same, under the emulator", find(K.folder .. "/emulated/attend_check"), "small", "attend_check is not built: make emulated")
end)
