-- kelvin bench gpu: what it refuses, what its rows hold, and that plots are functions of rows alone.
local h = require "helper"
local gpu = require "kelvin.bench_gpu"
local lib = require "kelvin.lib"
local results = require "kelvin.results"
local json = require "kelvin.json"
local manifest = require "kelvin.manifest"
local K = require "kelvin.ffi"

local FIELDS = { "bench", "k", "v", "bits_k", "bits_v", "head_dim", "n_kv_heads", "group", "batch", "length", "bytes", "us", "tb_per_s", "ceiling_tb_per_s", "share", "limit" }

local CODEC_FIELDS = { "what", "side", "codec", "family", "bits", "head_dim", "length", "bytes", "us", "tb_per_s", "ceiling_tb_per_s", "share", "limit" }

local function run(arguments)
  local out, status = h.run(arguments)
  return out:gsub("\n$", ""), status == 0
end

-- A row as a device would give it.
local function row(bits, length, us, more)
  local r = { bench = "decode", k = "scalar", v = "scalar", bits_k = bits, bits_v = bits, head_dim = 128, n_kv_heads = 8, group = 4, batch = 1, length = length, bytes = length * 8 * (32 * bits + 4), us = us,
    ceiling_tb_per_s = 4.5, limit = "memory" }
  for key, value in pairs(more or {}) do r[key] = value end
  r.tb_per_s = r.bytes / us / 1e6
  r.share = r.tb_per_s / 4.5
  return r
end

describe("bench gpu", function()
  it("says in one line what it does not understand", function()
    for _, case in ipairs { { "--shape 8x1", "shape '8x1'" }, { "--shape 8x32768x128x8x4x", "shape '8x32768x128x8x4x'" }, { "--shape x8x1x1x1x1", "shape" }, { "--bits 5", "bits '5'" },
      { "--bits 4/9", "bits '4/9'" }, { "--bits ,", "names none" }, { "--device gpu", "device 'gpu' is not" }, { "--device cpu", "device 'cpu' has no measurements" }, { "--repeats 0", "--repeats" } } do
      local out, ok = run("bench gpu " .. case[1])
      assert(not ok and out:find(case[2], 1, true) and not out:find "\n", case[1] .. ": " .. out)
    end
  end)

  it("without a GPU says what is missing, and writes nothing", function()
    if lib.device("cuda").available then return pending "a CUDA device is here" end
    local path = h.temporary ".jsonl"
    local out, ok = run("bench gpu --rows " .. manifest.quote(path))
    assert(not ok and out:find("bench: cuda: ", 1, true) and not out:find "\n", out)
    assert((results.read(path) or "") == "")
  end)

  it("reads shapes and bits as they are printed", function()
    for _, s in ipairs(gpu.shapes()) do assert.same(s, gpu.parse_shape(gpu.shape_name(s))) end
    assert.same({ { 4, 4 }, { 2, 2 }, { 4, 2 } }, gpu.parse_bits "4,2,4/2")
  end)

  it("has committed rows of peers that are right, or say why they are not here", function()
    local rows = assert(gpu.rows(K.root .. "/results/gpu/peers.jsonl"))
    assert(#rows > 0)
    for i, r in ipairs(rows) do
      for _, f in ipairs(r.status == "missing" and { "peer", "reason" } or { "peer", "batch", "length", "head_dim", "n_kv_heads", "group", "bytes", "us", "tb_per_s", "rel_err", "copies",
        "repeats", "torch", "device" }) do
        assert(r[f] ~= nil, ("peers.jsonl:%d: %s"):format(i, f))
      end
      if r.status == "ok" then h.close(r.tb_per_s, r.bytes / r.us / 1e6, 1e-9) end
    end
  end)

  it("reads the fixed cost and the rate off two lengths, and no rate above the ceiling", function()
    local fixed, rate = gpu.line({ us = 30, bytes = 4e7 }, { us = 15, bytes = 1e7 }, 4)
    h.close(fixed, 10, 1e-9)
    h.close(rate, 2, 1e-9)
    fixed, rate = gpu.line({ us = 30, bytes = 4e7 }, { us = 29, bytes = 1e7 }, 4)
    h.close(fixed, 20, 1e-9)
    h.close(rate, 4, 1e-9)
  end)

  it("writes a codec's case as text, or says what is missing", function()
    local codec = require "kelvin.codec"
    local c, line = codec.new("f16"):_instance(64, nil, "k"), K.ffi.new "char[1000]"
    require "kelvin.check"(K.C.kv_codec_bench_case(c, "encode", 128, line, 1000))
    assert(K.ffi.string(line):find("^encode family=raw tokens=128 head_dim=64 .* pod=%x+$"), K.ffi.string(line))
    for _, case in ipairs { { "fold", 1000, "'fold' is neither encode nor decode" }, { "decode", 20, "20 given" } } do
      local message = h.fails(function() require "kelvin.check"(K.C.kv_codec_bench_case(c, case[1], 128, line, case[2])) end)
      assert(message:find(case[3], 1, true), message)
    end
  end)

  it("joins the best bf16 peer of a shape, and leaves out those that failed", function()
    local function peer(name, us, status, batch) return { peer = name, us = us, status = status, batch = batch or 1, length = 4096, head_dim = 128, n_kv_heads = 8, group = 4 } end
    local rows = gpu.join({ row(4, 4096, 20), row(4, 8192, 30), { bench = "codec" } }, { peer("sdpa_flash", 70, "ok"), peer("sdpa_cudnn", 60, "ok"), peer("flashinfer_bf16", 10, "wrong"),
      peer("flashinfer_fp8", 40, "ok"), peer("sdpa_cudnn", 1, "ok", 2) })
    assert.same({ "sdpa_cudnn", 60, 3, "flashinfer_fp8", 40, 2 }, { rows[1].peer, rows[1].peer_us, rows[1].ratio, rows[1].fp8_peer, rows[1].fp8_us, rows[1].fp8_ratio })
    assert.is_nil(rows[2].peer)
    assert.truthy(gpu.table({ rows[1], rows[2] }):find("3.00x", 1, true))
  end)

  it("draws the same bytes from the same rows", function()
    local rows = {}
    for _, bits in ipairs { 4, 3, 2 } do for e = 12, 20 do rows[#rows + 1] = row(bits, 2 ^ e, 15 + 2 ^ e * bits / 1e4) end end
    local a, b = gpu.render(rows, "a caption"), gpu.render(rows, "a caption")
    assert.same(a, b)
    for _, name in ipairs { "4 bits", "3 bits", "2 bits" } do assert.truthy(a[2][2]:find(name, 1, true)) end
  end)

  it("has committed rows with every field, whose table and plot follow from them", function()
    local paths = manifest.capture("ls " .. manifest.quote(K.root .. "/results/gpu") .. "/decode*.jsonl 2>/dev/null")
    for path in paths:gmatch "[^\n]+" do
      local rows, stem = assert(gpu.rows(path)), path:match "^(.*)%.jsonl$"
      local info = assert(json.read(stem .. ".run.json"))
      for i, r in ipairs(rows) do
        for _, f in ipairs(r.bench == "codec" and CODEC_FIELDS or FIELDS) do assert(r[f] ~= nil, ("%s:%d: %s"):format(path, i, f)) end
        h.close(r.tb_per_s, r.bytes / r.us / 1e6, 1e-9)
        h.close(r.share, r.tb_per_s / r.ceiling_tb_per_s, 1e-9)
        if r.peer then h.close(r.ratio, r.peer_us / r.us, 1e-9) end
      end
      for _, f in ipairs(gpu.render(rows, gpu.caption(info, rows))) do assert(results.read(stem .. "." .. f[1]) == f[2], stem .. "." .. f[1] .. " is not what its rows give") end
    end
  end)

  local emulated, known = pcall(lib.device, "emulated")
  local name = "measures in turns, on the emulator with shapes of a few pages"
  if not emulated or not known.available then pending(name .. " (no libkelvin_emulated.so: make emulated)") else
    it(name, function()
      local shape = gpu.parse_shape "2x96x128x1x3r"
      local rows = gpu.run { device = "emulated", shapes = { shape }, bits = { { 4, 4 }, { 2, 2 } }, repeats = 1, size = { ceiling = 2 ^ 16, cold = 0 } }
      assert.equal(2, #rows)
      for _, r in ipairs(rows) do
        for _, f in ipairs(FIELDS) do assert(r[f] ~= nil, f) end
        assert(r.us > 0 and r.share > 0)
      end
      local tile = 128 * 32 * (4 + 4) / 8 + 128                               -- codes and norms of 32 tokens; 192 tokens are six tiles, or seven where the cut falls between
      assert(rows[1].bytes == 6 * tile or rows[1].bytes == 7 * tile, rows[1].bytes)
      local codecs = assert(gpu.codec("emulated", "f16", 64, 1, { ceiling = 2 ^ 16, cold = 0, source = 2 ^ 14 }))
      assert.equal(4, #codecs)
      for _, r in ipairs(codecs) do assert.equal(64 * 64 * (4 + 2), r.bytes) end
      local message = h.fails(function() gpu.measure("emulated", { "attend bits_k=4" }, 1) end)
      assert(message:find("bits_v= is missing", 1, true), message)
    end)
  end
end)

describe("bench generate", function()
  local generate = require "kelvin.bench_generate"
  local function at(arm, batch, depth, us)
    return { bench = "generate", model = "m", arm = arm, batch = batch, depth = depth, us = us, tokens_per_s = 1e6 * batch / us, status = "ok", cache_bytes = 1e6, path = "p" }
  end
  local function rows()
    return generate.derive({ at("f16", 1, 0, 100), at("f16", 1, 1000, 200), at("f16", 1, 2000, 300), at("q", 1, 0, 120), at("q", 1, 1000, 205), at("q", 1, 2000, 290), at("z", 1, 0, 90), at("z", 1, 1000, 100),
      at("w", 1, 0, 500), at("w", 1, 1000, 900), { bench = "generate", model = "m", arm = "f16", batch = 64, depth = 1000, status = "no memory" } }, "f16")
  end

  it("finds where a codec starts to win, and what attention takes", function()
    local r = rows()
    assert.same({ 0, 100, .5 }, { r[1].attention_us, r[2].attention_us, r[2].attention_share })
    local p, q = 200 / 205, 300 / 290
    h.close(r[4].wins_from, 1000 + (1 - p) / (q - p) * 1000, 1e-9)
    assert.equal(0, r[7].wins_from)
    assert.is_nil(r[9].wins_from)
    assert.is_nil(r[1].wins_from)
  end)

  it("has committed rows whose table and plot follow from them", function()
    local paths = manifest.capture("ls " .. manifest.quote(K.root .. "/results/gpu") .. "/generate*.jsonl 2>/dev/null")
    for path in paths:gmatch "[^\n]+" do
      local committed, stem = assert(gpu.rows(path)), path:match "^(.*)%.jsonl$"
      for i, r in ipairs(committed) do
        for _, f in ipairs(r.status == "ok" and { "model", "arm", "batch", "depth", "us", "tokens_per_s", "attention_share", "cache_bytes",
          "path" } or { "model", "arm", "batch", "depth", "status", "reason" }) do
          assert(r[f] ~= nil, ("%s:%d: %s"):format(path, i, f))
        end
      end
      for _, f in ipairs(generate.render(committed, generate.caption(assert(json.read(stem .. ".run.json"))))) do
        assert(results.read(stem .. "." .. f[1]) == f[2], stem .. "." .. f[1] .. " is not what its rows give")
      end
    end
  end)

  it("prints every row, also those that found no memory, and draws the same bytes twice", function()
    local r = rows()
    local text = generate.table(r)
    assert(text:find("no memory", 1, true) and text:find("1.00x", 1, true), text)
    assert.same(generate.render(r, "c"), generate.render(rows(), "c"))
  end)

  it("says in one line what it does not understand or lacks", function()
    for _, case in ipairs { { "shape:llama", "shape 'llama' is none of llama-3-8b, tiny" }, { "nosuch", "model 'nosuch'" }, { "--batch 0", "batch '0'" }, { "--depth -1", "depth" },
      { "shape:tiny --device gpu", "device 'gpu' is not" } } do
      local out, ok = run("bench generate " .. case[1])
      assert(not ok and out:find(case[2], 1, true) and not out:find "\n", case[1] .. ": " .. out)
    end
  end)

  local name = "decodes a tiny model of random weights, on the emulator"
  local known, d = pcall(lib.device, "emulated")
  if not known or not d.available then pending(name .. " (no libkelvin_emulated.so: make emulated)") else
    it(name, function()
      local got = generate.run { model = "shape:tiny", device = "emulated", arms = { "f16" }, depths = { 40 }, repeats = 1, tokens = 1 }
      assert.equal(1, #got)
      assert(got[1].us > 0 and got[1].cache_bytes > 40 * 2 * 2 * 64 * 2 * 2 and got[1].status == "ok", tostring(got))
    end)
  end
end)
