-- A user's own kernel against the headers of kernels/include alone: tests/cuda/user_kernel.cu, built by nvcc (make gpu-test) and for
-- the emulator; it compares with double precision on the host itself.
local K = require "kelvin.ffi"
local lib = require "kelvin.lib"

local function program(device)
  for _, p in ipairs { K.folder .. "/" .. device .. "/user_kernel", device == "cuda" and K.folder .. "/../libexec/user_kernel" or nil } do
    if K.exists(p) then return p end
  end
end

for _, device in ipairs { "cuda", "emulated" } do
  describe(device .. " user kernel", function()
    local name = "packs, unpacks, rotates and sums a softmax as double precision does"
    local ok, d = pcall(lib.device, device)
    local path = program(device)
    if not ok or not d.available then pending(name .. (device == "cuda" and " (no CUDA device)" or " (no emulated device: make emulated)")) return end
    if not path then pending(name .. " (user_kernel is not built: make " .. (device == "cuda" and "gpu-test" or "emulated") .. ")") return end
    it(name, function()
      local pipe = assert(io.popen("'" .. path .. "' 2>&1; echo rc $?"))
      local out = pipe:read "*a"
      pipe:close()
      assert(out:find("rc 0", 1, true) and not out:find("FAIL", 1, true) and out:find("9 checks, 0 failed", 1, true), out)
    end)
  end)
end
