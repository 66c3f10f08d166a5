-- Codecs on a device: the CPU's bytes from encode, the CPU's bits from decode, for every preset that has a device form, keys and
-- values, over hostile rows, pages that held other tokens, part-filled pages and pages of random bytes.
local h = require "helper"
local kv = h.kv
local K = require "kelvin.ffi"
local ffi, C = K.ffi, K.C
local check = require "kelvin.check"
local codec = require "kelvin.codec"

local info = ffi.new "kv_device_info"
local function here(device)
  C.kv_device_query(device, info)
  return info.available == 1
end

-- Rows of what comes out of a model, and of what must not break anything.
local function hostile(n, dim, seed)
  local x = ffi.new("float[?]", n * dim)
  C.kv_rng_normal(seed, 1, 0, n * dim, x)
  local kinds = {
    function(r) for i = 0, dim - 1 do r[i] = 0 end end,
    function(r) for i = 0, dim - 1 do r[i] = r[i] * 1e-41 end end,                -- denormal
    function(r) for i = 0, dim - 1 do r[i] = r[i] * 1e-30 end end,                -- squares underflow
    function(r) for i = 0, dim - 1 do r[i] = r[i] * 1e30 end end,                 -- squares overflow
    function(r) for i = 0, dim - 1 do r[i] = r[i] > 0 and 3.4028234e38 or -3.4028234e38 end end,
    function(r) for i = 0, dim - 1 do r[i] = 0 end r[dim - 1] = -5 end,           -- one-hot
    function(r) for i = 0, dim - 1 do r[i] = 0 end r[3] = 1e-44 end,
    function(r) for i = 0, dim - 1 do r[i] = 0.7 end end,                         -- constant
    function(r) for i = 0, dim - 1 do r[i] = i % 2 == 0 and 65519 or -70000 end end,   -- around the largest f16
    function(r) r[1] = 900 r[dim - 2] = -1200 end,                                -- outlier channels
    function(r) for i = 0, dim - 1 do r[i] = math.floor(r[i] * 4) / 4 end end,    -- many equal values, ties
    function(r) for i = 0, dim - 1 do r[i] = -0.0 end end,
  }
  for t = 0, n - 1, 2 do                                                          -- every other row is of the usual kind
    local make = kinds[t / 2 % (#kinds + 1) + 1]
    if make then make(x + t * dim) end
  end
  return x
end

-- Equal as floats' bits; any NaN equals any.  Read as bits: LuaJIT takes a NaN of random bits for a tagged value.
local function same_rows(want, got, n, what)
  local a, b = ffi.cast("const uint32_t *", want), ffi.cast("const uint32_t *", got)
  if ffi.string(a, 4 * n) == ffi.string(b, 4 * n) then return end
  local function nan(u) return u % 0x80000000 > 0x7f800000 end
  for i = 0, n - 1 do
    if a[i] ~= b[i] and not (nan(a[i]) and nan(b[i])) then error(("%s: value %d is %08x, the CPU has %08x"):format(what, i, b[i], a[i]), 0) end
  end
end

local function same_bytes(want, got, n, what)
  if ffi.string(want, n) == ffi.string(got, n) then return end
  for i = 0, n - 1 do
    if want[i] ~= got[i] then error(("%s: byte %d is %d, the CPU has %d"):format(what, i, got[i], want[i]), 0) end
  end
end

-- One codec at one geometry and side; `pages` of them, the last part-filled.
local function compare(device, c, what, seed)
  local i = ffi.new "kv_codec_info[1]"
  check(C.kv_codec_get_info(c, i))
  local dim, granule, page_tokens, page_bytes = i[0].head_dim, i[0].granule, i[0].page_tokens, tonumber(i[0].page_bytes)
  local n = page_tokens + math.max(granule, math.floor(page_tokens * 0.6 / granule) * granule)
  if granule == page_tokens then n = 2 * page_tokens end
  local bytes = 2 * page_bytes
  local want, got = ffi.new("uint8_t[?]", bytes), ffi.new("uint8_t[?]", bytes)
  for round = 1, 2 do                                                             -- the second over the codes of the first
    local x = hostile(n, dim, seed + round)
    check(C.kv_codec_encode_on("cpu", c, x, n, want))
    check(C.kv_codec_encode_on(device, c, x, n, got))
    same_bytes(want, got, bytes, what .. ", encode " .. round)
    if round == 1 then n = n - granule end
  end
  local a, b = ffi.new("float[?]", 2 * page_tokens * dim), ffi.new("float[?]", 2 * page_tokens * dim)
  for _, range in ipairs { { 0, n }, { 1, 1 }, { page_tokens - 3, 5 }, { n - 1, 1 } } do
    for j = 0, range[2] * dim - 1 do a[j], b[j] = -1, -2 end
    check(C.kv_codec_decode_on("cpu", c, want, range[1], range[2], a))
    check(C.kv_codec_decode_on(device, c, want, range[1], range[2], b))
    same_rows(a, b, range[2] * dim, ("%s, tokens %d.. (%d)"):format(what, range[1], range[2]))
  end
  local random = ffi.new("uint32_t[?]", bytes / 4)                                -- any bytes decode to something
  for j = 0, bytes / 4 - 1 do random[j] = math.random(0, 65535) * 65536 + math.random(0, 65535) end
  local noise = ffi.cast("uint8_t *", random)
  check(C.kv_codec_decode_on("cpu", c, noise, 0, 2 * page_tokens, a))
  check(C.kv_codec_decode_on(device, c, noise, 0, 2 * page_tokens, b))
  same_rows(a, b, 2 * page_tokens * dim, what .. ", random bytes")
end

-- The C codec of a name and side, with tables made from rows where it needs some.
local function instance(name, dim, page_tokens, side)
  local c = kv.codec(name)
  if c.has_tables then c = c:calibrated(kv.tensor.randn({ 64, dim }, { seed = 5 }), { side = side, page_tokens = page_tokens }) end
  return c:_instance(dim, page_tokens, side)
end

local names = {}
for _, name in ipairs(codec.names()) do
  local f = codec.describe(name, { head_dim = 128 })
  if f.abilities and f.abilities:find("cuda: yes", 1, true) and name ~= f.family then names[#names + 1] = name end
end
-- Beside the presets: what none of them asks for.
local more = os.getenv "KELVIN_CODECS"
if more then names = { more } end

for _, device in ipairs { "cuda", "emulated" } do
  local dims = device == "cuda" and { 64, 80, 96, 112, 128, 256, 512 } or { 64, 80, 128 }
  describe(device .. " codecs", function()
    for _, name in ipairs(names) do
      local title = name .. " has the CPU's bytes and bits"
      if not here(device) then pending(title .. " (no " .. (device == "cuda" and "CUDA device" or device .. " device: make emulated") .. ")") else
        it(title, function()
          local done = 0
          for _, dim in ipairs(dims) do
            for _, side in ipairs { "k", "v" } do
              local ok, c = pcall(instance, name, dim, 64, side)
              if ok then
                compare(device, c, ("%s %s d=%d"):format(name, side, dim), 1000 * dim)
                done = done + 1
              end
            end
          end
          assert(done > 0, name .. ": no geometry was accepted")
        end)
      end
    end
  end)
end
