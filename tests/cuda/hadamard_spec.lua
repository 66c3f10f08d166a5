-- Sign + FWHT on a device gives the CPU's bits: same additions, same order, no contraction.
local h = require "helper"
local kv = h.kv
local K = require "kelvin.ffi"
local ffi = K.ffi
local check = require "kelvin.check"

local info = ffi.new "kv_device_info"

for _, device in ipairs { "cuda", "emulated" } do
  describe(device .. " hadamard", function()
    it("says in one line what is missing, or names the device", function()
      K.C.kv_device_query(device, info)
      if info.available == 1 then
        assert(#ffi.string(info.name) > 0 and info.sm >= 75)
      else
        local reason = ffi.string(info.reason)
        assert(#reason > 0 and not reason:find "\n", reason)
        local x = ffi.new("float[64]")
        local message = h.fails(function() check(K.C.kv_device_hadamard(device, x, nil, 1, 64)) end)
        assert(message:find(device, 1, true), message)
      end
    end)

    for n = 0, 12 do
      local width = 2 ^ n
      local name = ("rows of %d have the CPU's bits"):format(width)
      local lacks = h.no_device(device)
      if lacks then pending(name .. " (" .. lacks .. ")") else
        it(name, function()
          for _, rows in ipairs { 1, 7, device == "cuda" and 333 or 33 } do
            local count = rows * width
            local want, got, sign = ffi.new("float[?]", count), ffi.new("float[?]", count), ffi.new("float[?]", width)
            K.C.kv_rng_normal(n + 1, 9, 0, count, want)
            K.C.kv_rng_uniform(n + 1, 10, 0, width, sign)
            for i = 0, width - 1 do sign[i] = sign[i] < 0.5 and -1 or 1 end
            want[0] = 1e30                                    -- a needle, and the other extreme
            want[count - 1] = -1e-30
            ffi.copy(got, want, count * 4)
            for _, s in ipairs { sign, false } do
              check(K.C.kv_device_hadamard("cpu", want, s or nil, rows, width))
              check(K.C.kv_device_hadamard(device, got, s or nil, rows, width))
              assert(ffi.string(want, count * 4) == ffi.string(got, count * 4), ("n=%d rows=%d: bits differ"):format(width, rows))
            end
          end
        end)
      end
    end
  end)
end

describe("hadamard", function()
  it("keeps working after a refused call", function()
    local x = ffi.new("float[8]", 1)
    local message = h.fails(function() check(K.C.kv_device_hadamard("cpu", x, nil, 1, 7)) end)
    assert(message:find("n=7 is not a power of two in 1..4096", 1, true), message)
    check(K.C.kv_device_hadamard("cpu", x, nil, 1, 8))
    h.close(x[0], math.sqrt(8), 1e-6)
    assert(kv ~= nil)
  end)
end)
