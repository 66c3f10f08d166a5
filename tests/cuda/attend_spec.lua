-- Decode attention on codes, on the GPU, against double precision on the host: tests/cuda/attend_check.cu does it (make gpu-test
-- builds it), needs the device library alone, and prints a line a shape.
local h = require "helper"
local K = require "kelvin.ffi"
local ffi = K.ffi

local info = ffi.new "kv_device_info"
K.C.kv_device_query("cuda", info)
local program
for _, p in ipairs { K.folder .. "/cuda/attend_check", K.folder .. "/../libexec/attend_check" } do
  if K.exists(p) then program = p break end
end

describe("cuda attention on codes", function()
  local name = "equals double precision on every shape, twice the same"
  if info.available ~= 1 then pending(name .. " (no CUDA device)") return end
  if not program then pending(name .. " (attend_check is not built: make gpu-test)") return end
  it(name, function()
    local pipe = assert(io.popen("'" .. program .. "' check 2>&1; echo rc $?"))
    local out = pipe:read "*a"
    pipe:close()
    assert(out:find("rc 0", 1, true) and not out:find("FAIL", 1, true), out)
    assert(out:match "(%d+) checks, 0 failed", out)
    assert(h ~= nil)
  end)
end)
