--- kelvin.bench_codecs: what a codec does with a core's second, beside memcpy, beside ggml, and against itself.
--
-- A codec is made for keys and for values.  `encode` and `decode` are of keys; `dot` are scores of the keys and
-- `accumulate` weighted sums of the values, on codes.  The same two by decoding a page to f32 first say whether attention
-- on codes is worth having.  Every repeat times all of them, so that a slow moment of a shared machine hits all; medians are
-- shown.  The two ways of attention take turns call by call, and a gain is the median ratio of neighbours.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local lib = require "kelvin.lib"
local log = require "kelvin.log"
local manifest = require "kelvin.manifest"

local M = {}

local HEADS, ELEMENTS = 4, 2 ^ 20      -- of source, 4 MB: more than a second-level cache holds
local NOISE = .03            -- a difference that says nothing
local SAMPLE = 2e-3          -- seconds that one timing lasts at least: calls are repeated to fill it
local PAIRS = 4              -- times as many of the two ways of attention

--- Median seconds of one call of each operation; and gain, by operation WHAT that has a WHAT_decoded.
local function clock(ops, repeats)
  local median = require("kelvin.bench").median
  local calls, times, ratio, out, gain = {}, {}, {}, {}, {}
  local function time(name)
    local t = C.kv_now()
    ops[name]()
    t = C.kv_now() - t
    table.insert(times[name], t)
    return t
  end
  for name, f in pairs(ops) do
    f()
    times[name] = {}
    calls[name], times[name] = math.max(1, math.min(1000, math.ceil(SAMPLE / time(name)))), {}
    if ops[name .. "_decoded"] then ratio[name] = {} end
  end
  for r = 1, repeats do
    for name in pairs(ops) do
      local decoded, list = name .. "_decoded", ratio[name]
      if list then
        ops[name]()                          -- what ran before was another operation, on other memory
        for i = 1, PAIRS * math.min(calls[name], calls[decoded]) do
          local codes_first = (i + r) % 2 == 1
          local first, second = time(codes_first and name or decoded), time(codes_first and decoded or name)
          list[#list + 1] = codes_first and second / first or first / second
        end
      elseif not name:find "_decoded$" then
        for _ = 1, calls[name] do time(name) end
      end
    end
  end
  for name, list in pairs(times) do out[name], gain[name] = median(list), ratio[name] and median(ratio[name]) end
  return out, gain
end

--- Source tensors of a head_dim; memcpy and a plain read of as many bytes as the source has.
local function data(dim, queries)
  local tensor = require "kelvin.tensor"
  local tokens = math.max(64, math.floor(ELEMENTS / HEADS / dim / 64) * 64)
  local x = tensor.randn { HEADS, tokens, dim, seed = 3 }
  local rate = ffi.new "double[1]"
  local bytes = 4 * HEADS * tokens * dim
  local read = ffi.new "double[1]"
  check(C.kv_bench_memcpy(math.max(1, bytes / 2 ^ 20), 1, rate))
  check(C.kv_bench_read(math.max(1, bytes / 2 ^ 20), 1, read))
  return { dim = dim, tokens = tokens, queries = queries, x = x, q = tensor.randn { HEADS, queries, dim, seed = 4 }, p = tensor.uniform { HEADS, queries, tokens, seed = 5 },
    out = tensor.zeros { HEADS, tokens, dim }, scores = tensor.zeros { HEADS, queries, tokens }, acc = tensor.zeros { HEADS, queries, dim },
    bytes = bytes, memcpy = rate[0], read = read[0], copy_s = 2 * bytes / (rate[0] * 1e9) }
end

--- A row: GB/s of source and of codes of each operation, from clock's seconds and gains.
local function row_of(d, name, family, fused, k_bytes, v_bytes, seconds, gain)
  local rows = HEADS * d.tokens
  local row = { codec = name, family = family, dim = d.dim, fused = fused, heads = HEADS, tokens = d.tokens, queries = d.queries, threads = 1, memcpy_gb_s = d.memcpy, read_gb_s = d.read,
    bits_k = 8 * k_bytes / (rows * d.dim), bits_v = 8 * v_bytes / (rows * d.dim) }
  for what, s in pairs(seconds) do
    row[what .. "_ns_per_token"] = 1e9 * s / rows
    row[what .. "_gb_s"] = d.bytes / s / 1e9
    row[what .. "_codes_gb_s"] = (what:find "^accumulate" and v_bytes or k_bytes) / s / 1e9
  end
  row.encode_of_memcpy, row.decode_of_memcpy = d.copy_s / seconds.encode, d.copy_s / seconds.decode
  -- The floor of attention: its codes read once, for all queries.
  row.dot_of_floor, row.accumulate_of_floor = k_bytes / (d.read * 1e9) / seconds.dot, v_bytes / (d.read * 1e9) / seconds.accumulate
  if seconds.dot_decoded then
    row.dot_gain, row.accumulate_gain = gain.dot, gain.accumulate
    row.attention_gain = (seconds.dot_decoded + seconds.accumulate_decoded) / (seconds.dot + seconds.accumulate)
    local function loses(by) return by < 1 - NOISE end
    row.faster = not fused and "no codes" or loses(row.dot_gain) and "decoding (dot)" or loses(row.accumulate_gain) and "decoding (acc)" or "codes"
  end
  return row
end

--- One codec on the data of a head_dim.
function M.measure(name, d, repeats)
  local codec = require "kelvin.codec"
  local spec, params = require("kelvin.arm").spec(name), {}
  for key, value in pairs(spec) do if key ~= 1 then params[key] = value end end
  local c = codec.new(spec[1], params)
  if c.has_tables then c = c:calibrated(d.x, { side = "k" }):calibrated(d.x, { side = "v" }) end
  local fused = c:info_for(d.dim).fused
  local k, v = c:encode(d.x, { side = "k" }), c:encode(d.x, { side = "v" })
  local x, q, p, out, scores, acc = d.x:_view(), d.q:_view(), d.p:_view(), d.out:_view(), d.scores:_view(), d.acc:_view()
  local instance, block, flag = c:_instance(d.dim, nil, "k"), ffi.new "kv_block*[1]", fused and 1 or 0
  local seconds, gain = clock({
    encode = function()
      check(C.kv_block_encode(block, instance, x))
      C.kv_block_free(block[0])
    end,
    decode = function() check(C.kv_block_decode(k._b, 0, d.tokens, out)) end,
    dot = function() check(C.kv_block_dot(k._b, q, flag, scores)) end,
    accumulate = function() check(C.kv_block_accumulate(v._b, p, flag, acc)) end,
    dot_decoded = function() check(C.kv_block_dot(k._b, q, 0, scores)) end,
    accumulate_decoded = function() check(C.kv_block_accumulate(v._b, p, 0, acc)) end,
  }, repeats)
  return row_of(d, name, c.family, fused, k:bytes().total, v:bytes().total, seconds, gain)
end

-- ---- ggml: its own quantization, dequantization and dot products of rows, from its shared libraries

local ggml_declared
local function ggml_load(dir)
  if not ggml_declared then
    ffi.cdef [[
      void ggml_cpu_init(void);
      void quantize_row_q8_0(const float *x, void *y, int64_t k);
      void quantize_row_q4_0(const float *x, void *y, int64_t k);
      void dequantize_row_q8_0(const void *x, float *y, int64_t k);
      void dequantize_row_q4_0(const void *x, float *y, int64_t k);
      void ggml_vec_dot_q8_0_q8_0(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc);
      void ggml_vec_dot_q4_0_q8_0(int n, float *s, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc);
    ]]
    ggml_declared = true
  end
  local function open(name, global)
    local ok, library = pcall(ffi.load, dir .. "/" .. name, global)
    check.that(ok, "bench: --ggml %s: %s", dir, tostring(library):match "[^\n]*")
    return library
  end
  local base = open("libggml-base.so", true)
  local cpu = open("libggml-cpu.so", true)
  cpu.ggml_cpu_init()
  return base, cpu
end

--- Rows as a cache of ggml holds them, one after the other.  accumulate: a page's rows dequantized, then our f32 sum, which
-- is kinder than its own: that dequantizes again for every query.
local function measure_ggml(name, d, base, cpu, repeats)
  local block_bytes = name == "q8_0" and 34 or 18
  local row_bytes = d.dim / 32 * block_bytes
  local tokens = d.tokens
  local n_rows, n, total = HEADS * tokens, HEADS * tokens * d.dim, HEADS * tokens * row_bytes
  local codes, rows = ffi.new("uint8_t[?]", total), ffi.cast("float*", d.out:_view().data)
  local x, q, scores = ffi.cast("float*", d.x:_view().data), ffi.cast("float*", d.q:_view().data), ffi.cast("float*", d.scores:_view().data)
  local quantize, dequantize = cpu["quantize_row_" .. name], base["dequantize_row_" .. name]
  local product = cpu["ggml_vec_dot_" .. name .. "_q8_0"]
  local f32 = require("kelvin.codec").new("f32"):encode(d.x, { side = "v" })
  local p, acc, q_bytes = d.p:_view(), d.acc:_view(), d.dim / 32 * 34
  local prepared = ffi.new("uint8_t[?]", HEADS * d.queries * q_bytes)
  local function dot()
    cpu.quantize_row_q8_0(q, prepared, HEADS * d.queries * d.dim)
    for h = 0, HEADS - 1 do
      for g = 0, d.queries - 1 do
        local to, from, query = scores + (h * d.queries + g) * tokens, codes + h * tokens * row_bytes, prepared + (h * d.queries + g) * q_bytes
        for t = 0, tokens - 1 do product(d.dim, to + t, 0, from + t * row_bytes, 0, query, 0, 1) end
      end
    end
  end
  local seconds = clock({
    encode = function() quantize(x, codes, n) end,
    decode = function() dequantize(codes, rows, n) end,
    dot = dot,
    accumulate = function()
      for at = 0, n_rows - 1, 64 do dequantize(codes + at * row_bytes, rows, 64 * d.dim) end
      check(C.kv_block_accumulate(f32._b, p, 1, acc))
    end,
  }, repeats)
  return row_of(d, "ggml " .. name, "ggml", false, total, total, seconds)
end

-- ---- all of them

--- Every preset once, and every family that has none; deliberately broken codecs are left out.
function M.names()
  local codec = require "kelvin.codec"
  local has_preset, names = {}, {}
  for _, name in ipairs(codec.names()) do
    local c = codec.new(name)
    if c.preset then has_preset[c.family] = true end
  end
  for _, name in ipairs(codec.names()) do
    local c = codec.new(name)
    if (c.preset and c.preset.name == name or not c.preset and not has_preset[c.family]) and not c.control then names[#names + 1] = name end
  end
  return names
end

local columns = { { "codec" }, { "d" }, { "bits", "bits_k" }, { "encode", "encode_gb_s" }, { "of memcpy", "encode_of_memcpy" }, { "decode", "decode_gb_s" },
  { "dot", "dot_gb_s" }, { "acc", "accumulate_gb_s" }, { "encode codes", "encode_codes_gb_s" }, { "decode codes", "decode_codes_gb_s" }, { "dot codes", "dot_codes_gb_s" },
  { "acc codes", "accumulate_codes_gb_s" }, { "dot gain", "dot_gain" }, { "acc gain", "accumulate_gain" }, { "faster" } }

--- The rows as a Markdown table.
function M.table(rows)
  local head, rule = {}, {}
  for i, c in ipairs(columns) do head[i], rule[i] = c[1], "---" end
  local lines = { "| " .. table.concat(head, " | ") .. " |", "| " .. table.concat(rule, " | ") .. " |" }
  for _, r in ipairs(rows) do
    local cells = {}
    for i, c in ipairs(columns) do
      local v = r[c[2] or c[1]]
      if c[1] == "d" then v = r.dim end
      cells[i] = v == nil and "-" or type(v) == "number" and (c[1] == "d" and "%d" or "%.2f"):format(v) or tostring(v)
    end
    lines[#lines + 1] = "| " .. table.concat(cells, " | ") .. " |"
  end
  return table.concat(lines, "\n")
end

function M.run(o)
  local codec, json = require "kelvin.codec", require "kelvin.json"
  local dims, queries, repeats, names = o.dims or { 64 }, o.queries or 4, o.repeats or 5, o.names or M.names()
  check.that(queries <= 64, "bench: queries=%d is outside 1..64", queries)
  for _, dim in ipairs(dims) do
    for _, name in ipairs(names) do codec.new(require("kelvin.arm").spec(name)[1]):info_for(dim) end      -- a wrong name or dim before any work
    check.that(not o.ggml or dim % 32 == 0, "bench: --ggml needs a head_dim that is a multiple of 32, %d is not", dim)
  end
  local base, cpu
  if o.ggml then base, cpu = ggml_load(o.ggml) end
  local out, why
  if o.rows then
    out, why = io.open(o.rows, "wb")
    check.that(out, "--rows: %s", why)
    local folder = o.rows:match "^(.*)/[^/]*$" or "."
    require("kelvin.results").write(folder .. "/run.json", json.encode({ what = "bench codecs", dims = dims, queries = queries, repeats = repeats, page_tokens = codec.PAGE_TOKENS,
      ggml = o.ggml and { base = lib.sha256_file(o.ggml .. "/libggml-base.so"), cpu = lib.sha256_file(o.ggml .. "/libggml-cpu.so") } or nil,
      code = manifest.code(), git = manifest.git(K.root), host = manifest.host() }, "  ") .. "\n")
  end
  local threads = lib.threads()
  lib.threads(1)
  local rows = {}
  local function add(row)
    rows[#rows + 1] = row
    if out then check.that(out:write(json.encode(row), "\n") and out:flush(), "--rows: cannot write %s", o.rows) end
    if C.kv_interrupted() == 1 then check.fail("interrupted") end
  end
  local ok, err = pcall(function()
    for i, dim in ipairs(dims) do
      local d = data(dim, queries)
      if o.ggml then for _, name in ipairs { "q8_0", "q4_0" } do add(measure_ggml(name, d, base, cpu, repeats)) end end
      for j, name in ipairs(names) do
        log.progress((i - 1 + j / #names) / #dims, name .. " " .. dim)
        add(M.measure(name, d, repeats))
      end
    end
  end)
  lib.threads(threads)
  log.clear()
  if out then out:close() end
  if not ok then error(err, 0) end
  return setmetatable(rows, { __tostring = function(t)
    return ("GB/s of one thread, %d queries a K/V head: f32 source that the codes stand for, then stored bytes ('codes'); memcpy %.1f GB/s (read + written), read %.1f GB/s\n"
      .. "gain: time of decoding a page to f32 first over time on codes\n"):format(queries, t[1].memcpy_gb_s, t[1].read_gb_s) .. M.table(t)
  end })
end

return M
