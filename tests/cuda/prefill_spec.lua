-- Attention of many queries over bf16 images and slabs of codes, against double precision on the host: tests/cuda/prefill_check.cu does it,
-- on the GPU (make gpu-test builds it) every shape in both forms, under the emulator (make emulated) a few small ones.
local h = require "helper"
local K = require "kelvin.ffi"
local ffi = K.ffi

local function find(...)
  for _, p in ipairs { ... } do if K.exists(p) then return p end end
end
local function claim(name, program, args, missing)
  if not program then pending(name .. " (" .. missing .. ")") return end
  it(name, function()
    local pipe = assert(io.popen("'" .. program .. "' " .. args .. " 2>&1; echo rc $?"))
    local out = pipe:read "*a"
    pipe:close()
    assert(out:find("rc 0", 1, true) and not out:find("FAIL", 1, true), out)
    assert(out:match "(%d+) checks, 0 failed", out)
    assert(h ~= nil)
  end)
end

describe("attention of many queries", function()
  local info = ffi.new "kv_device_info"
  K.C.kv_device_query("cuda", info)
  claim("equals double precision on the GPU, early and late rows, every form", info.available == 1 and find(K.folder .. "/cuda/prefill_check", K.folder .. "/../libexec/prefill_check"), "check",
    info.available == 1 and "prefill_check is not built: make gpu-test" or "no CUDA device")
  claim("equals double precision under the emulator", find(K.folder .. "/emulated/prefill_check"), "check plain small", "prefill_check is not built: make emulated")
end)
