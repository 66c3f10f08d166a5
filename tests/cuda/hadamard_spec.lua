-- Sign + FWHT on the GPU gives the CPU's bits: same additions, same order, no contraction.
local h = require "helper"
local kv = h.kv
local K = require "kelvin.ffi"
local ffi = K.ffi

local info = ffi.new "kv_device_info"
local function cuda_here()
  K.C.kv_device_query("cuda", info)
  return info.available == 1
end

describe("cuda hadamard", function()
  it("says in one line what is missing, or names the device", function()
    K.C.kv_device_query("cuda", info)
    if info.available == 1 then
      assert(#ffi.string(info.name) > 0 and info.sm >= 75)
    else
      local reason = ffi.string(info.reason)
      assert(#reason > 0 and not reason:find "\n", reason)
      local x = ffi.new("float[64]")
      local message = h.fails(function() require "kelvin.check"(K.C.kv_device_hadamard("cuda", x, nil, 1, 64)) end)
      assert(message:find("cuda", 1, true), message)
    end
  end)

  for n = 0, 12 do
    local width = 2 ^ n
    local name = ("rows of %d have the CPU's bits"):format(width)
    if not cuda_here() then pending(name .. " (no CUDA device)") else
      it(name, function()
        for _, rows in ipairs { 1, 7, 333 } do
          local count = rows * width
          local host, device, sign = ffi.new("float[?]", count), ffi.new("float[?]", count), ffi.new("float[?]", width)
          K.C.kv_rng_normal(n + 1, 9, 0, count, host)
          K.C.kv_rng_uniform(n + 1, 10, 0, width, sign)
          for i = 0, width - 1 do sign[i] = sign[i] < 0.5 and -1 or 1 end
          host[0] = 1e30                                    -- a needle, and the other extreme
          host[count - 1] = -1e-30
          ffi.copy(device, host, count * 4)
          for _, s in ipairs { sign, false } do
            require "kelvin.check"(K.C.kv_device_hadamard("cpu", host, s or nil, rows, width))
            require "kelvin.check"(K.C.kv_device_hadamard("cuda", device, s or nil, rows, width))
            assert(ffi.string(host, count * 4) == ffi.string(device, count * 4), ("n=%d rows=%d: bits differ"):format(width, rows))
          end
        end
      end)
    end
  end

  it("keeps working after a refused call", function()
    local x = ffi.new("float[8]", 1)
    local message = h.fails(function() require "kelvin.check"(K.C.kv_device_hadamard("cpu", x, nil, 1, 7)) end)
    assert(message:find("n=7 is not a power of two in 1..4096", 1, true), message)
    require "kelvin.check"(K.C.kv_device_hadamard("cpu", x, nil, 1, 8))
    h.close(x[0], math.sqrt(8), 1e-6)
    assert(kv ~= nil)
  end)
end)
