-- tests/cuda/language_check.cu: what kernels take for granted of CUDA, on the emulator in every order of threads, and on the GPU where one is.
require "helper"
local K = require "kelvin.ffi"
local ffi = K.ffi

local function run(env, program)
  local pipe = assert(io.popen(("%s '%s' 2>&1; echo rc $?"):format(env, program)))
  local out = pipe:read "*a"
  pipe:close()
  assert(out:match "rc (%d+)%s*$" == "0" and out:match "%d+ passed, 0 failed", out)
end
local function built(...)
  for _, path in ipairs { ... } do if K.exists(path) then return path end end
end

describe("the language of the kernels", function()
  local program = built(K.folder .. "/emulated/language_check", K.folder .. "/../libexec/emulated/language_check")
  for _, order in ipairs { "forward", "reverse", "random" } do
    local name = "is CUDA's on the emulator, threads " .. order
    if not program then pending(name .. " (not built: make emulated)") else
      it(name, function() run("KV_EMULATE_ORDER=" .. order, program) end)
    end
  end

  local info, name = ffi.new "kv_device_info", "is the emulator's on the GPU"
  K.C.kv_device_query("cuda", info)
  local device = built(K.folder .. "/cuda/language_check", K.folder .. "/../libexec/language_check")
  if info.available ~= 1 then pending(name .. " (no CUDA device)")
  elseif not device then pending(name .. " (language_check is not built: make gpu-test)")
  else it(name, function() run("", device) end) end
end)
