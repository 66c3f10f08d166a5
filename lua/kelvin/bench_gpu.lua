--- kelvin.bench_gpu: decode attention and encoding on a device, as shares of what its memory gave in the same moments.
--
-- One call of the device measures a shape: the read-only ceiling and all bit widths take turns, each with caches in rotation
-- that exceed the second-level cache, each as one graph; medians.  A quarter of the length is measured beside, and the line through
-- both says what a launch costs before any token (fixed_us) and the rate after that (stream_tb_per_s), so that `limit` is read off
-- numbers: "memory" from 85 % of the ceiling on, "fixed cost" where that is at least half of what is missing, "instructions" otherwise.
--
-- Peers are rows of tests/bench/gpu_peers.py, of the same run on the same device: `ratio` is the best bf16 one's time over ours.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local json = require "kelvin.json"
local lib = require "kelvin.lib"
local log = require "kelvin.log"
local manifest = require "kelvin.manifest"
local results = require "kelvin.results"

local M = {}

local CEILING_BYTES, COLD_BYTES = 2 ^ 31, 2 ^ 29
local MEMORY_BOUND = .85
local ROOM = 2 ^ 18

--- measure(device, cases, repeats): the device's own measurements; cases are lines of kernels/bench.cu's list -> a table each.
-- nil and the reason where one of them has no kernel.
function M.measure(device, cases, repeats)
  local text = ffi.new("char[?]", ROOM)
  local status = C.kv_device_bench(device, table.concat(cases, "\n") .. "\n", repeats, text, ROOM)
  if status == C.KV_E_UNSUPPORTED and device ~= "cpu" then return nil, ffi.string(C.kv_last_error()) end
  check(status)
  local out = {}
  for line in ffi.string(text):gmatch "[^\n]+" do out[#out + 1] = json.decode(line) end
  return out
end

-- The ceiling of a call: the best of several grids, since a chip may like any.
local function ceiling_cases(kind, bytes)
  local cases = {}
  for i, blocks in ipairs(kind == "copy" and { 0, 2, 4, 8 } or { 2, 4, 8 }) do cases[i] = ("%s bytes=%d blocks=%d"):format(kind, bytes, blocks) end
  return cases
end
local function fastest(r, from, to)
  local top = 0
  for i = from, to do top = math.max(top, r[i].bytes / r[i].us / 1e6) end
  return top
end

--- ceilings(device, bytes, repeats): TB/s of a read-only stream and of a copy (bytes read and written).
function M.ceilings(device, bytes, repeats)
  bytes = bytes or CEILING_BYTES
  local cases = ceiling_cases("read", bytes)
  local reads = #cases
  for _, line in ipairs(ceiling_cases("copy", bytes)) do cases[#cases + 1] = line end
  local r = M.measure(device, cases, repeats or 9)
  return { read_tb_per_s = fastest(r, 1, reads), copy_tb_per_s = fastest(r, reads + 1, #r), bytes = r[1].bytes }
end

-- ---- what is measured

local function shape(batch, length, head_dim, n_kv_heads, group, ragged)
  return { batch = batch, length = length, head_dim = head_dim, n_kv_heads = n_kv_heads, group = group, ragged = ragged or nil }
end

--- The shapes of results/gpu: the reference, other batches of as many tokens, one sequence from 4K to 1M, head_dims, groups, ragged.
function M.shapes()
  local list = { shape(8, 32768, 128, 8, 4), shape(64, 4096, 128, 8, 4), shape(32, 8192, 128, 8, 4), shape(64, 4096, 128, 8, 4, true) }
  for e = 12, 20, 2 do list[#list + 1] = shape(1, 2 ^ e, 128, 8, 4) end
  list[#list + 1] = shape(1, 131072, 128, 8, 4)
  for _, group in ipairs { 1, 2, 8 } do list[#list + 1] = shape(8, 32768, 128, 8, group) end
  for _, head_dim in ipairs { 64, 256 } do
    list[#list + 1] = shape(8, 32768, head_dim, 8, 4)
    list[#list + 1] = shape(8, 32768, head_dim, 8, 8)
  end
  return list
end

--- Codecs whose encode and decode are measured when nothing is asked for.
M.CODECS = { "f16", "q8_0", "q4_0", "turboquant-4", "turboquant-3", "turboquant-2", "turboangle-k8v4log", "kivi-2" }

--- "8x32768x128x8x4": batch, length, head_dim, K/V heads, query heads each; "…r" for ragged lengths of the same sum.
function M.parse_shape(text)
  local body, ragged = text:match "^([%dx]+)(r?)$"
  local n = {}
  for word in (body or ""):gmatch "%d+" do n[#n + 1] = tonumber(word) end
  check.that(#n == 5 and not body:find "xx" and body:find "^%d" and body:find "%d$", "bench: shape '%s' is not BATCHxLENGTHxHEAD_DIMxKV_HEADSxGROUP, as 8x32768x128x8x4 (with r at its end: ragged)", text)
  return shape(n[1], n[2], n[3], n[4], n[5], ragged == "r")
end

--- "4,3,2,4/2": bits of keys and values, or of keys / of values.
function M.parse_bits(text)
  local list = {}
  for word in text:gmatch "[^,]+" do
    local k, v = word:match "^(%d)/(%d)$"
    k, v = tonumber(k or word), tonumber(v or word)
    check.that(k and v and k % 1 == 0 and k >= 2 and k <= 4 and v >= 2 and v <= 4, "bench: bits '%s' is not 2, 3, 4 or K/V of these", word)
    list[#list + 1] = { k, v }
  end
  check.that(#list > 0, "bench: bits '%s' names none", text)
  return list
end

function M.shape_name(s)
  return ("%dx%dx%dx%dx%d%s"):format(s.batch, s.length, s.head_dim, s.n_kv_heads, s.group, s.ragged and "r" or "")
end

local function case_of(s, bits, length, ragged, cold)
  return ("attend bits_k=%d bits_v=%d head_dim=%d n_kv_heads=%d group=%d batch=%d length=%d ragged=%d cold=%d"):format(bits[1], bits[2], s.head_dim, s.n_kv_heads, s.group, s.batch, length,
    ragged and 1 or 0, cold)
end

-- ---- rows

local function limit_of(share, us, floor_us, fixed_us)
  if share >= MEMORY_BOUND then return "memory" end
  return fixed_us >= (us - floor_us) / 2 and "fixed cost" or "instructions"
end

--- line(x, quarter, ceiling): the line through a length and a quarter of it -> us at no tokens, TB/s along it (never above the ceiling).
function M.line(x, quarter, ceiling)
  local slope = (x.us - quarter.us) / (x.bytes - quarter.bytes)            -- us a byte
  if slope ~= slope or slope * ceiling * 1e6 < 1 then slope = 1 / (ceiling * 1e6) end
  return math.max(0, x.us - slope * x.bytes), 1 / (slope * 1e6)
end

--- Rows of a shape, one a pair of bit widths; nil and the reason without a kernel.  size = { ceiling =, cold = } bytes, smaller ones for trials without a device.
function M.decode(device, s, bits, repeats, size)
  local cases, cold = ceiling_cases("read", size and size.ceiling or CEILING_BYTES), size and size.cold or COLD_BYTES
  local reads = #cases
  for _, b in ipairs(bits) do
    cases[#cases + 1] = case_of(s, b, s.length, s.ragged, cold)
    cases[#cases + 1] = case_of(s, b, math.max(1, math.floor(s.length / 4)), s.ragged, cold)
  end
  local r, why = M.measure(device, cases, repeats)
  if not r then return nil, why end
  local ceiling, rows = fastest(r, 1, reads), {}
  for i, b in ipairs(bits) do
    local x, quarter = r[reads + 2 * i - 1], r[reads + 2 * i]
    local floor, fixed, stream = x.bytes / ceiling / 1e6, M.line(x, quarter, ceiling)
    rows[i] = { bench = "decode", k = "scalar", v = "scalar", bits_k = b[1], bits_v = b[2], head_dim = s.head_dim, n_kv_heads = s.n_kv_heads, group = s.group, batch = s.batch, length = s.length,
      ragged = s.ragged, bytes = x.bytes, us = x.us, us_q1 = x.us_q1, us_q3 = x.us_q3,
      fixed_us = fixed, stream_tb_per_s = stream, tb_per_s = x.bytes / x.us / 1e6, ceiling_tb_per_s = ceiling, share = floor / x.us,
      limit = limit_of(floor / x.us, x.us, floor, fixed), copies = x.copies, repeats = repeats, path = x.path }
  end
  return rows
end

local CODEC_SOURCE, CODEC_BOUND = 2 ^ 27, .8        -- bytes of f32 rows; the share of a copy from which memory is the limit

--- Rows of a codec: encode and decode, keys and values, as shares of a copy in the same turns.  nil and the reason where the device lacks it.
function M.codec(device, name, head_dim, repeats, size)
  local spec, params = require("kelvin.arm").spec(name), {}
  for key, value in pairs(spec) do if key ~= 1 then params[key] = value end end
  local c = require("kelvin.codec").new(spec[1], params)
  if c.needs_calibration then return nil, ("codec '%s' needs calibration"):format(name) end
  local ceiling, cold = size and size.ceiling or CEILING_BYTES / 2, size and size.cold or COLD_BYTES
  local tokens = (size and size.source or CODEC_SOURCE) / (4 * head_dim)
  local cases, of, room = ceiling_cases("copy", ceiling), {}, 2 ^ 21
  local line, copies = ffi.new("char[?]", room), #cases
  for _, side in ipairs { "k", "v" } do
    for _, what in ipairs { "encode", "decode" } do
      local status = C.kv_codec_bench_case(c:_instance(head_dim, nil, side), what, tokens, line, room)
      if status == C.KV_E_UNSUPPORTED then return nil, ffi.string(C.kv_last_error()) end
      check(status)
      cases[#cases + 1], of[#cases + 1] = ("%s cold=%d"):format(ffi.string(line), cold), { what, side }
    end
  end
  local r, why = M.measure(device, cases, repeats)
  if not r then return nil, why end
  local copy, rows = fastest(r, 1, copies), {}
  for i = copies + 1, #r do
    local x, share = r[i], r[i].bytes / r[i].us / 1e6 / copy
    rows[#rows + 1] = { bench = "codec", what = of[i][1], side = of[i][2], codec = name, family = c.family, bits = c:info_for(head_dim).bits_payload, head_dim = head_dim, length = tokens, bytes = x.bytes,
      us = x.us, us_q1 = x.us_q1, us_q3 = x.us_q3, tb_per_s = x.bytes / x.us / 1e6, ceiling_tb_per_s = copy, share = share, limit = share >= CODEC_BOUND and "memory" or "instructions", copies = x.copies,
      repeats = repeats }
  end
  return rows
end

--- Joins rows of gpu_peers.py: the best bf16 peer of a shape becomes peer, peer_us and ratio; an fp8 one fp8_us and fp8_ratio.
function M.join(rows, peers)
  local best, best8 = {}, {}
  for _, p in ipairs(peers) do
    if p.status == "ok" then
      local to, key = p.peer:find "fp8$" and best8 or best, M.shape_name(p)
      if not to[key] or p.us < to[key].us then to[key] = p end
    end
  end
  for _, r in ipairs(rows) do
    local key = r.bench == "decode" and M.shape_name(r) or ""
    local p, p8 = best[key], best8[key]
    if p then r.peer, r.peer_us, r.ratio = p.peer, p.us, p.us / r.us end
    if p8 then r.fp8_peer, r.fp8_us, r.fp8_ratio = p8.peer, p8.us, p8.us / r.us end
  end
  return rows
end

--- The table that the rows stand for.
function M.table(rows)
  local lines = { { "batch x length", "D", "Hkv", "g", "bits K/V", "MB", "us", "TB/s", "share", "limit", "peer", "peer us", "ratio" } }
  for _, r in ipairs(rows) do
    if r.bench == "decode" then
      lines[#lines + 1] = { ("%d x %d%s"):format(r.batch, r.length, r.ragged and " ragged" or ""), tostring(r.head_dim), tostring(r.n_kv_heads), tostring(r.group), ("%d/%d"):format(r.bits_k, r.bits_v),
        ("%.0f"):format(r.bytes / 1e6), ("%.1f"):format(r.us), ("%.2f"):format(r.tb_per_s), ("%.1f %%"):format(100 * r.share), r.limit, r.peer or "-", r.peer_us and ("%.1f"):format(r.peer_us) or "-",
        r.ratio and ("%.2fx"):format(r.ratio) or "-" }
    end
  end
  local text = #lines > 1 and require("kelvin.evaltext").aligned(lines) or ""
  local codecs = { { "codec", "side", "D", "bits", "what", "MB", "us", "TB/s", "of a copy", "limit" } }
  for _, r in ipairs(rows) do
    if r.bench == "codec" then
      codecs[#codecs + 1] = { r.codec, r.side, tostring(r.head_dim), ("%.2f"):format(r.bits), r.what, ("%.0f"):format(r.bytes / 1e6), ("%.1f"):format(r.us), ("%.2f"):format(r.tb_per_s),
        ("%.1f %%"):format(100 * r.share), r.limit }
    end
  end
  if #codecs > 1 then text = text .. (text ~= "" and "\n\n" or "") .. require("kelvin.evaltext").aligned(codecs) end
  return text
end

-- ---- plots: pure functions of rows

local svg = require "kelvin.svg"

local function bits_name(r) return r.bits_k == r.bits_v and ("%d bits"):format(r.bits_k) or ("K %d, V %d bits"):format(r.bits_k, r.bits_v) end

local function series_by(rows, name, point)
  local order, of = {}, {}
  for _, r in ipairs(rows) do
    local key = name(r)
    if not of[key] then
      of[key] = { name = key, line = true, points = {} }
      order[#order + 1] = of[key]
    end
    table.insert(of[key].points, point(r))
  end
  for _, s in ipairs(order) do table.sort(s.points, function(a, b) return a.x < b.x end) end
  return order
end

--- Share of the ceiling against length: one sequence, head_dim 128, 4 query heads a K/V head, a series a width.
function M.share_plot(rows, caption)
  local chosen = {}
  for _, r in ipairs(rows) do
    if r.bench == "decode" and r.batch == 1 and r.head_dim == 128 and r.group == 4 and not r.ragged then chosen[#chosen + 1] = r end
  end
  return svg.plot { title = "Decode attention on codes: share of the read ceiling, one sequence", caption = caption, x = { label = "tokens in the cache", log = true },
    y = { label = "share of the read-only ceiling of the run (%)" },
    series = series_by(chosen, bits_name, function(r) return { x = r.length, y = 100 * r.share, title = ("%s, %d tokens: %.1f us, %.1f %%"):format(bits_name(r), r.length, r.us, 100 * r.share) } end) }
end

--- Files beside rows: table.md and the plots.
function M.render(rows, caption)
  return { { "table.md", "# Decode attention on codes\n\n" .. caption .. "\n\n```text\n" .. M.table(rows) .. "\n```\n" }, { "share.svg", M.share_plot(rows, caption) } }
end

--- "NVIDIA H200, driver 13.0, read ceiling 4.57 TB/s": of the rows themselves.
function M.caption(run, rows)
  local lo, hi = math.huge, 0
  for _, r in ipairs(rows) do if r.ceiling_tb_per_s then lo, hi = math.min(lo, r.ceiling_tb_per_s), math.max(hi, r.ceiling_tb_per_s) end end
  return ("%s, driver %s, read-only ceiling %.2f to %.2f TB/s in turns with the kernels, %d repeats, library %s"):format(run.device, run.driver, lo, hi, run.repeats, run.code.library_sha256:sub(1, 8))
end

-- ---- a run

--- What a manifest says of a device.
function M.device_facts(device)
  local d = lib.device(device)
  check.that(d.available, "bench: %s", d.reason)
  local facts = { device = d.name, sm = d.sm, driver = ("%d.%d"):format(math.floor(d.driver / 1000), d.driver % 1000 / 10), runtime = ("%d.%d"):format(math.floor(d.runtime / 1000), d.runtime % 1000 / 10) }
  if d.plugin ~= "" then facts.plugin_sha256 = lib.sha256_file(d.plugin) end
  -- What the driver's tool adds; a device without one has no such lines.
  local text, ok = manifest.capture "nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem --format=csv,noheader,nounits"
  local driver, sm, mem, max_sm, max_mem = text:match "^([%d.]+), (%d+), (%d+), (%d+), (%d+)"
  if ok and driver then
    facts.driver_version, facts.sm_clock_mhz, facts.mem_clock_mhz = driver, tonumber(sm), tonumber(mem)
    facts.sm_clock_max_mhz, facts.mem_clock_max_mhz = tonumber(max_sm), tonumber(max_mem)
  end
  return facts
end

--- write("DIR/NAME.jsonl", rows, manifest, files): the rows, NAME.run.json and each derived file as NAME.<its name>.
function M.write(path, rows, run, files)
  local lines, stem = {}, path:match "^(.*)%.jsonl$" or path
  for i, row in ipairs(rows) do lines[i] = json.encode(row) .. "\n" end
  results.write(stem .. ".jsonl", table.concat(lines))
  results.write(stem .. ".run.json", json.encode(run, "  ") .. "\n")
  for _, f in ipairs(files) do results.write(stem .. "." .. f[1], f[2]) end
end

--- rows(path): every line of a file, or nil and the reason.  (kelvin.results keeps one row an arm.)
function M.rows(path)
  local text, why = results.read(path)
  if not text then return nil, why end
  local rows = {}
  for line in text:gmatch "[^\n]+" do
    rows[#rows + 1], why = json.decode(line, path .. ":" .. #rows + 1)
    if why or type(rows[#rows]) ~= "table" then return nil, why or ("%s:%d: a row is a JSON object"):format(path, #rows) end
  end
  return rows
end

--- run{ device =, shapes =, bits =, codecs = { names }, dims = { 128 }, repeats =, peers = path, rows = path, size = } -> rows, and run.json, table.md and share.svg beside `rows`.
function M.run(o)
  local device = o.device or "cuda"
  local run = M.device_facts(device)
  local bits, shapes, repeats = o.bits or M.parse_bits "4,3,2", o.shapes or M.shapes(), o.repeats or 21
  run.what, run.repeats = "bench gpu", repeats
  run.code, run.git, run.host = manifest.code(), manifest.git(K.root), manifest.host()
  run.timing = "CUDA graphs over caches in rotation (512 MB or four at least), events, medians of interleaved repeats"
  local peers
  if o.peers then
    local why
    peers, why = M.rows(o.peers)
    check.that(peers, "--peers: %s", why)
    run.peers = peers[1] and { torch = peers[1].torch, cudnn = peers[1].cudnn, flashinfer = peers[1].flashinfer, device = peers[1].device }
  end
  run.ceilings = M.ceilings(device, o.size and o.size.ceiling, repeats)
  local rows, codecs = {}, o.codecs or not o.shapes and M.CODECS or {}
  local function add(name, measured, why)
    for _, row in ipairs(measured or {}) do rows[#rows + 1] = row end
    if not measured then
      run.unsupported = run.unsupported or json.array {}
      table.insert(run.unsupported, { what = name, reason = why })
      log.warn("%s: %s", name, why)
    end
    if peers then M.join(rows, peers) end
    if o.rows then M.write(o.rows, rows, run, M.render(rows, M.caption(run, rows))) end      -- as it goes, so that an interrupted run has rows
    if C.kv_interrupted() == 1 then check.fail("interrupted") end
  end
  for i, s in ipairs(shapes) do
    log.progress((i - 1) / #shapes, M.shape_name(s))
    add(M.shape_name(s), M.decode(device, s, bits, repeats, o.size))
  end
  for i, name in ipairs(codecs) do
    log.progress((i - 1) / #codecs, name)
    for _, head_dim in ipairs(o.dims or { 128 }) do add(name, M.codec(device, name, head_dim, repeats, o.size)) end
  end
  log.clear()
  return setmetatable(rows, { __tostring = function(t)
    return ("%s: read %.2f TB/s, copy %.2f TB/s (read and written)\n"):format(run.device, run.ceilings.read_tb_per_s, run.ceilings.copy_tb_per_s) .. M.table(t)
  end })
end

return M
