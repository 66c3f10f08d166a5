--- kelvin.bench: speed, always beside what the machine can do: bytes over measured bandwidth, flops over measured sgemm.
--
-- Repeats of all candidates are interleaved, so that a slow moment of a shared machine hits everyone; medians are shown.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local lib = require "kelvin.lib"
local log = require "kelvin.log"
local doc = require("kelvin.help").doc

local M = {}

--- median(list): and the inter-quartile range.
function M.median(list)
  local s = {}
  for i, x in ipairs(list) do s[i] = x end
  table.sort(s)
  local function q(p)
    local at = p * (#s - 1) + 1
    local i = math.floor(at)
    return i < #s and s[i] + (at - i) * (s[i + 1] - s[i]) or s[i]
  end
  return q(.5), q(.75) - q(.25)
end

--- read_bandwidth(threads): GB/s of a plain read; memcpy_bandwidth counts bytes read and written.
function M.read_bandwidth(threads)
  local x = ffi.new "double[1]"
  check(C.kv_bench_read(256, threads, x))
  return x[0]
end
function M.memcpy_bandwidth(threads)
  local x = ffi.new "double[1]"
  check(C.kv_bench_memcpy(256, threads, x))
  return x[0]
end

doc("kv.bench", [[
  kv.bench.decode{ model =, arms = { "f16", "turboquant-4" }, depths = { 0, 4096 }, repeats = 5, tokens = 16, calib = } -> rows
  kv.bench.codecs{ names =, dims = { 64 }, queries = 4, repeats = 5, ggml = } -> rows;  kv.bench.eval{ model = } -> row
  kv.bench.gpu{ device = "cuda", shapes =, bits = { { 4, 4 } }, codecs =, repeats = 21, peers = FILE, rows = FILE } -> rows
  kv.bench.generate{ model = "smollm2-135m" or "shape:llama-3-8b", device = "cuda", arms =, depths =, batches =, repeats = 5, tokens = 16, rows = FILE } -> rows
  What `kelvin bench` prints.  decode: tokens/s at a depth, bytes of the cache, floor_us (weights and cache once over the
  measured read bandwidth) and share (floor / time).  codecs: every preset; GB/s of f32 source and of stored bytes on one
  thread for encode, decode, dot and accumulate, memcpy's, and whether attention on codes beats decoding a page to f32
  first; ggml: a folder of its libraries, timed in the same run.  eval: tokens/s and the share of the f32 sgemm rate.
  gpu: decode attention on codes as a share of the read-only ceiling of the same moments, with what limits it, and codecs' encode and decode beside a copy; peers: rows of
  tests/bench/gpu_peers.py.  generate: tokens/s of a model on a device by codec, depth and batch, the share of attention and the
  depth from which an arm beats the first.  rows: JSON lines, with a manifest, a table and a plot beside them.]])
function M.decode(o)
  local model = type(o.model) == "string" and require("kelvin.model").open(o.model) or o.model
  local policies = require "kelvin.policy"
  local depths, n = o.depths or { 0, 4096 }, o.tokens or 16
  local deepest = math.max(unpack(depths))
  local filler = {}
  for i = 1, deepest + 2 * n do filler[i] = math.floor(lib.random(7, 0, i) * (model.n_vocab - 10)) + 5 end
  local read = not model.device and M.read_bandwidth(lib.threads()) or nil       -- of this machine's memory: no floor for a device (kelvin bench generate has shares)
  local rows, candidates = {}, {}
  for _, depth in ipairs(depths) do
    for _, arm in ipairs(o.arms or { "f16", "q8_0", "turboquant-4" }) do
      log.progress(0, ("filling %s to %d"):format(arm, depth))
      local plan = policies.resolve(policies.of(arm), model, { calib = o.calib })
      local s = model:session { plan = plan, max_tokens = depth + 2 * n + 1 }
      if depth > 0 then s:feed({ unpack(filler, 1, depth) }, { logits = "none" }) end
      candidates[#candidates + 1] = { arm = arm, depth = depth, s = s, times = {} }
    end
  end
  local one = ffi.new "int32_t[1]"
  for r = 0, o.repeats or 5 do                          -- the first round warms up and is not counted
    for _, c in ipairs(candidates) do
      log.progress(r / (o.repeats or 5), ("repeat %d: %s at %d"):format(r, c.arm, c.depth))
      local t0 = C.kv_now()
      for t = 1, n do
        one[0] = filler[deepest + t]
        check(C.kv_session_feed(c.s._s, one, 1, 1))
      end
      local dt = (C.kv_now() - t0) / n
      if r > 0 then c.times[#c.times + 1] = dt end
      check(C.kv_session_truncate(c.s._s, c.depth))
      if C.kv_interrupted() == 1 then check.fail("interrupted") end
    end
  end
  for _, c in ipairs(candidates) do
    local t, iqr = M.median(c.times)
    check(C.kv_session_feed(c.s._s, one, 1, 0))
    local b = ffi.new "kv_bytes[1]"
    check(C.kv_session_bytes(c.s._s, b))
    local floor = read and (model.weight_bytes + (c.depth > 0 and b[0].codes + b[0].scales + b[0].exact or 0)) / (read * 1e9) or nil
    rows[#rows + 1] = { arm = c.arm, depth = c.depth, tokens_per_s = 1 / t, us = 1e6 * t, iqr_us = 1e6 * iqr, cache_bytes = b[0].total,
      floor_us = floor and 1e6 * floor, share = floor and floor / t, threads = lib.threads(), read_gb_s = read, path = c.s:paths(), repeats = #c.times,
      device = model.device or "cpu", device_name = model.device_name }
  end
  log.clear()
  return setmetatable(rows, { __tostring = function(t)
    local lines = { { "arm", "depth", "tokens/s", "us/token", "IQR", "cache MB", "floor us", "of floor", "path" } }
    for _, r in ipairs(t) do
      lines[#lines + 1] = { r.arm, tostring(r.depth), ("%.1f"):format(r.tokens_per_s), ("%.0f"):format(r.us), ("%.0f"):format(r.iqr_us), ("%.2f"):format(r.cache_bytes / 1e6),
        r.floor_us and ("%.0f"):format(r.floor_us) or "-", r.share and ("%.0f %%"):format(100 * r.share) or "-", r.path }
    end
    local head = read and ("%s, %d threads, read %.1f GB/s; floor: weights and cache read once\n"):format(model.name, lib.threads(), read)
      or ("%s on %s (%s)\n"):format(model.name, model.device, model.device_name)
    return head .. require("kelvin.evaltext").aligned(lines)
  end })
end

--- codecs{...}: see kelvin.bench_codecs.
function M.codecs(o) return require("kelvin.bench_codecs").run(o) end

function M.eval(o)
  local model = type(o.model) == "string" and require("kelvin.model").open(o.model) or o.model
  local context, chunks = o.context or 512, o.chunks or 2
  local ids = {}
  for i = 1, context * chunks do ids[i] = math.floor(lib.random(11, 0, i) * (model.n_vocab - 10)) + 5 end
  local g = ffi.new "double[1]"
  check(C.kv_bench_sgemm(context, model.n_ff, model.n_embd, g))
  local arms = o.arms or { "q4_0", "turboquant-4" }
  local rows = require("kelvin.eval").run { model = model, tokens = ids, arms = arms, context = context, chunks = chunks, controls = false, on_progress = log.progress }
  log.clear()
  -- Two operations a weight and token; the output layer only where positions are scored.
  local head = model.n_vocab * model.n_embd
  local flop = 2 * ((model.n_params - head) + head * 0.5)
  local rate = rows.tokens / rows.seconds
  local row = { model = model.name, context = context, chunks = chunks, arms = #arms, tokens_per_s = rate, gflop_per_s = rate * flop / 1e9, sgemm_gflop_per_s = g[0],
    share = rate * flop / 1e9 / g[0], threads = lib.threads() }
  return setmetatable(row, { __tostring = function(r)
    return ("%s: %.0f tokens/s through the model (%d arms and the reference, context %d), %.1f GFLOP/s of weights, %.0f %% of sgemm's %.1f GFLOP/s, %d threads"):format(r.model, r.tokens_per_s,
      r.arms, r.context, r.gflop_per_s, 100 * r.share, r.sgemm_gflop_per_s, r.threads)
  end })
end

local function numbers(what, text, least)
  local list = {}
  for word in text:gmatch "[^,]+" do
    local n = tonumber(word)
    check.that(n and n >= least and n % 1 == 0, "bench: %s '%s' is not a whole number from %d", what, word, least)
    list[#list + 1] = n
  end
  return list
end

--- gpu{...}: see kelvin.bench_gpu.
function M.gpu(o) return require("kelvin.bench_gpu").run(o) end

--- generate{...}: see kelvin.bench_generate.
function M.generate(o) return require("kelvin.bench_generate").run(o) end

--- main(options): `kelvin bench`.
function M.main(a)
  local arms = a.arm and #a.arm > 0 and a.arm or nil
  local result
  if a.what == "decode" then
    local depths = numbers("depth", a.depth, 0)
    local model = require("kelvin.model").open(a.model)
    result = M.decode { model = model, calib = a.artifact and model:calibrate { artifact = a.artifact }, arms = arms, depths = depths, repeats = a.repeats, tokens = a.tokens }
  elseif a.what == "codecs" then
    local dims = numbers("dim", a.dim or "64", 1)
    result = M.codecs { names = arms, dims = dims, queries = a.queries, repeats = a.repeats, ggml = a.ggml, rows = a.rows }
  elseif a.what == "gpu" then
    local gpu, shapes = require "kelvin.bench_gpu", nil
    for i, text in ipairs(a.shape) do
      shapes = shapes or {}
      shapes[i] = gpu.parse_shape(text)
    end
    if arms and not shapes then shapes = {} end
    result = M.gpu { device = a.device or "cuda", shapes = shapes, codecs = arms, dims = a.dim and numbers("dim", a.dim, 1), bits = gpu.parse_bits(a.bits),
      repeats = a.repeats, peers = a.peers, rows = a.rows }
  elseif a.what == "generate" then
    local generate, depths, batches = require "kelvin.bench_generate", numbers("depth", a.depth, 0), numbers("batch", a.batch, 1)
    local model = generate.open(a.model, a.device or "cuda")
    result = generate.run { model = model, device = a.device or "cuda", calib = a.artifact and model:calibrate { artifact = a.artifact }, arms = arms, depths = depths, batches = batches,
      repeats = a.repeats, tokens = a.tokens, rows = a.rows }
  else result = M.eval { model = a.model, arms = arms } end
  if a.format == "json" then
    local json = require "kelvin.json"
    if result[1] then for _, r in ipairs(result) do print(json.encode(r)) end else print(json.encode(setmetatable(result, nil))) end
  else print(tostring(result)) end
  return 0
end

return M
