-- Codecs on a device: the CPU's bytes from encode, the CPU's bits from decode, for every preset that has a device form, keys and
-- values, over hostile rows, pages that held other tokens, part-filled pages and pages of random bytes.
local h = require "helper"
local kv = h.kv
local K = require "kelvin.ffi"
local ffi, C = K.ffi, K.C
local check = require "kelvin.check"
local codec = require "kelvin.codec"


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

local side_code = { k = C.KV_SIDE_K, v = C.KV_SIDE_V }

-- The C codec of a preset, or of a family and parameters, with tables made from rows where it needs some.
local function instance(name, dim, page_tokens, side)
  local family, params = name:match "^(%w+):(.*)$"
  if family then
    local rows = kv.tensor.randn { 64, dim, seed = 5 }
    return K.handle("kv_codec", C.kv_codec_free, function(out)
      return C.kv_codec_fit(out, family, params, dim, page_tokens, side_code[side], rows:_view(), nil)
    end)
  end
  local c = kv.codec(name)
  if c.has_tables then c = c:calibrated(kv.tensor.randn { 64, dim, seed = 5 }, { side = side, page_tokens = page_tokens }) end
  return c:_instance(dim, page_tokens, side)
end

local presets = {}
for _, name in ipairs(codec.names()) do
  local f = codec.describe(name, { head_dim = 128 })
  if f.abilities and f.abilities:find("cuda: yes", 1, true) and name ~= f.family then presets[#presets + 1] = name end
end

-- What no preset asks for.
local others = {
  "scalar:bits=4,rotation=orthogonal,codebook=beta,norm=lsq", "scalar:bits=3,rotation=none,norm=unbiased", "scalar:bits=5,codebook=uniform,search=9",
  "scalar:bits=7,norm=raw,search=4", "scalar:bits=4,codebook=calibrated", "scalar:bits=2,scale=calibrated",
  "scalar:bits=2,residual=orthogonal,gain=lsq", "scalar:bits=3,residual=hadamard,gain=expected", "scalar:bits=0,residual=hadamard",
  "scalar:bits=2,residual=sign,gain=lsq,rotation=orthogonal", "scalar:bits=2,residual=qjl,gain=expected,scale=calibrated",
  "scalar:bits=3,outliers=16,outlier_bits=6,pick=calibrated", "scalar:bits=1,outliers=24,outlier_bits=8,residual=hadamard,gain=lsq",
  "scalar:bits=2,outliers=8,residual=sign,pick=calibrated", "int:bits=1,group=16", "int:bits=2,group=64,order=interleaved",
  "int:bits=3,group=24,mode=symmetric", "int:bits=6,group=8", "int:bits=7,group=40,mode=symmetric", "int:bits=8,group=64,mode=affine",
  "int:bits=5,group=32,axis=token,mode=symmetric", "int:bits=1,group=8,axis=token", "int:bits=8,group=64,axis=token,mode=symmetric",
  "int:bits=3,group=16,axis=token", "int:bits=5,mode=ggml_1,axis=token", "int:bits=8,mode=ggml_0,axis=token",
  "fp:grid=e4m3,block=e4m3,group=48,scale=token", "fp:grid=e2m1,scale=token", "fp:grid=e5m2,value=0.37",
  "fp:grid=e2m1,block=e4m3,group=16,value=0.001", "polar:angles=7,norm=lin,norm_bits=3,rotation=none", "polar:angles=100,norm=lloyd,norm_bits=0",
  "polar:angles=3,norm=log,norm_bits=8", "polar:angles=4096,norm=f32", "polar:levels=3,angles=12,upper=5,norm=lloyd,norm_bits=4",
  "polar:levels=2,angles=11,upper=3,norm=log,norm_bits=5", "polar:levels=4,angles=9,upper=64,norm=f32", "nuq:bits=2,outliers=4,span=8",
  "nuq:bits=3,outliers=0.3,span=32,levels=uniform", "nuq:bits=4,outliers=2,span=64", "pca:bits=1,types=e4m3,scale=token",
  "pca:bits=6,types=fine,scale=static", "pca:bits=3,types=e4m3,scale=static", "pca:bits=5,types=paper,scale=token,allocate=lagrange",
  "wf:bits=5,scale=f16,basis=rows,search=9", "wf:bits=1,basis=channels,mix=none,search=1", "wf:bits=7.5,scale=f16",
  "fused:angles=7,norm=lloyd,norm_bits=3", "fused:angles=100,norm=log,norm_bits=5,scale=unbiased", "fused:form=subspace,pairs=11,bits=1,angles=9,norm_bits=2",
}
local only = os.getenv "KELVIN_CODECS"
if only then presets, others = { only }, {} end

local function cases(device, list, dims, page_tokens)
  for _, name in ipairs(list) do
    local title = name .. " has the CPU's bytes and bits"
    local lacks = h.no_device(device)
    if lacks then pending(title .. " (" .. lacks .. ")") else
      it(title, function()
        local done, refused = 0, nil
        for _, dim in ipairs(dims) do
          for _, side in ipairs { "k", "v" } do
            local ok, c = pcall(instance, name, dim, page_tokens, side)
            if ok then
              compare(device, c, ("%s %s d=%d"):format(name, side, dim), 1000 * dim)
              done = done + 1
            else
              refused = c
            end
          end
        end
        assert(done > 0, ("%s: no geometry was accepted: %s"):format(name, tostring(refused)))
      end)
    end
  end
end

for _, device in ipairs { "cuda", "emulated" } do
  local all = device == "cuda" or os.getenv "KELVIN_SLOW"
  describe(device .. " codecs, presets:", function() cases(device, presets, all and { 64, 80, 128, 256 } or { 64, 80 }, 64) end)
  describe(device .. " codecs:", function() cases(device, others, all and { 64, 96, 112, 512 } or { 64, 80 }, 64) end)
  if all then describe(device .. " codecs, pages of 192 tokens:", function() cases(device, presets, { 128 }, 192) end) end
end
