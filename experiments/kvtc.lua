-- What does KVTC keep of a model, at how many bytes?  A text is read, offloaded and restored; what the model then says of the text that
-- follows is held against what it says with the cache it had.  Presets, and the paper's ablations (arXiv 2511.01815, T.6 to T.17).
--
--   kelvin lua experiments/kvtc.lua text=FILE calib=FILE [model=smollm2-135m] [context=1024] [score=96] [chunks=6] [rows=6144]
--          [only=presets,types,...] [part=1/4] [threads=N] [out=DIR] [name=NAME]
--
-- part=I/N: arms I, I+N, I+2N, ... of what is left.  groups (only=): presets, budget (keys against values), types, window, sinks, stage, layers, rope, weight, rows, svd.  Every arm of a group stands
-- on `base`: kvtc-16x, all layers and heads in one basis, sinks 4, window 128, deflate.  Ratios count everything: coded
-- tokens with their headers and index; then with sinks and window; then with the tables, once.
local kv = require "kelvin"

local o = { model = "smollm2-135m", context = "1024", score = "96", chunks = "6", rows = "6144", calib_context = "1024", only = "", out = "results/scratch/kvtc" }
local allowed = { text = true, calib = true, threads = true, name = true, part = true }
for name in pairs(o) do allowed[name] = true end
for _, word in ipairs(arg) do
  local name, value = word:match "^([%w_]+)=(.+)$"
  if not allowed[name or ""] then error(("kvtc: '%s' is no option, or lacks its value; kelvin lua experiments/kvtc.lua text=FILE calib=FILE ..."):format(word), 0) end
  o[name] = value
end
local function number(name) return tonumber(o[name]) or error(("kvtc: %s=%s is not a number"):format(name, o[name]), 0) end
local function read(name)
  local f, why = io.open(o[name] or error(("kvtc: %s=FILE is needed"):format(name), 0), "rb")
  if not f then error("kvtc: " .. why, 0) end
  local text = f:read "*a"
  f:close()
  return text
end
if o.threads then kv.threads(number "threads") end
local context, n_score, n_chunks, n_rows = number "context", number "score", number "chunks", number "rows"

-- ---- arms: tables = what kv.kvtc takes beside the basis, basis = what makes one, offload = what kv.offload takes
local arms = {}
local function arm(group, name, settings)
  local a = { group = group, name = name, chunks = settings.chunks, basis = settings.basis or {}, tables = settings.tables or { ratio = 16 } }
  a.offload = { sink = 4, window = 128, cadence = 16, block = 256, stage = "zlib" }
  for k, v in pairs(settings.offload or {}) do a.offload[k] = v end
  arms[#arms + 1] = a
end
for _, n in ipairs { 8, 16, 20, 32, 64 } do arm("presets", ("kvtc-%dx"):format(n), { tables = { ratio = n } }) end
for _, name in ipairs { "k1v3", "k2v3", "k2v4", "k3v4", "k4v2", "k4v6" } do
  arm("presets", "kvtc-" .. name, { tables = { ratio_k = 16 / name:sub(2, 2), ratio_v = 16 / name:sub(4, 4) } })
end
for _, b in ipairs { { 16, 64 }, { 64, 16 }, { 16, 256 }, { 256, 16 } } do
  arm("budget", ("keys %dx, values %dx"):format(b[1], b[2]), { tables = { ratio_k = b[1], ratio_v = b[2] } })
end
for _, ratio in ipairs { 16, 64 } do
  local function types(name, t)
    t.ratio = ratio
    arm("types", ("%s, %dx"):format(name, ratio), { tables = t })
  end
  types("paper", {})
  types("paper, Lagrange", { allocate = "lagrange" })
  types("paper with e4m3", { types = "e4m3" })
  types("fine", { types = "fine" })
  types("8 bits or nothing", { types = "truncate" })
  types("4 bits or nothing", { types = "uniform", bits = 4 })
  types("2 bits or nothing", { types = "uniform", bits = 2 })
  for _, w in ipairs { 1, 16, 64, 128 } do arm("window", ("window %d, %dx"):format(w, ratio), { tables = { ratio = ratio }, offload = { window = w, cadence = 1 } }) end
  for _, s in ipairs { 0, 1, 4, 16 } do arm("sinks", ("sinks %d, %dx"):format(s, ratio), { tables = { ratio = ratio }, offload = { sink = s } }) end
  arm("rope", ("RoPE undone, %dx"):format(ratio), { tables = { ratio = ratio } })
  arm("rope", ("keys as cached, %dx"):format(ratio), { basis = { rope = false }, tables = { ratio = ratio } })
  for _, t in ipairs { "paper", "fine" } do
    arm("weight", ("%s, as published, %dx"):format(t, ratio), { tables = { ratio = ratio, types = t } })
    arm("weight", ("%s, slots of equal weight, %dx"):format(t, ratio), { basis = { equal = true }, tables = { ratio = ratio, types = t } })
  end
end
for _, s in ipairs { "raw", "zlib 1", "zlib 6", "zlib 9", "lzma 6", "rans", "smallest" } do
  local stage, level = s:match "^(%a+) ?(%d*)$"
  for _, types in ipairs { "paper", "fine" } do
    arm("stage", ("%s, %s"):format(s, types), { tables = { ratio = 16, types = types }, offload = { stage = stage, level = tonumber(level) }, chunks = 2 })          -- the same rows at other sizes
  end
end
arm("layers", "1 layer, 1 head", { basis = { layers = 1, heads = 1 } })
for _, l in ipairs { 1, 2, 4, 8, 16, 0 } do arm("layers", l == 0 and "all layers" or ("%d layers"):format(l), { basis = { layers = l } }) end
for _, r in ipairs { 256, 512, 1024, 2048, 4096, 0 } do
  if r < n_rows then arm("rows", ("%d rows"):format(r == 0 and n_rows or r), { basis = { rows = r } }) end
end
for _, r in ipairs { 256, 1024 } do
  for _, svd in ipairs { "gram", "randomized" } do arm("svd", ("%s, rank %d"):format(svd, r), { basis = { svd = svd, rank = r } }) end
end
if o.only ~= "" then
  local chosen, known = {}, {}
  for _, a in ipairs(arms) do known[a.group] = true end
  for group in o.only:gmatch "[^,]+" do
    if not known[group] then error(("kvtc: only=%s is no group"):format(group), 0) end
    for _, a in ipairs(arms) do if a.group == group then chosen[#chosen + 1] = a end end
  end
  arms = chosen
end
if o.part then
  local i, n = o.part:match "^(%d+)/(%d+)$"
  i, n = tonumber(i), tonumber(n)
  if not i or i < 1 or i > n then error(("kvtc: part=%s is not I/N with I from 1 to N"):format(o.part), 0) end
  local chosen = {}
  for k = i, #arms, n do chosen[#chosen + 1] = arms[k] end
  arms = chosen
end

-- ---- the model, a calibration of one text, chunks of the other
local model = kv.model(o.model)
local ids = model:tokenize(read "text", { add_special = false })
if #ids < n_chunks * (context + n_score) then error(("kvtc: %s has %d tokens, %d chunks of %d are needed"):format(o.text, #ids, n_chunks, context + n_score), 0) end
local calib_text = read "calib"
local calib_context = number "calib_context"
local calib = kv.calibrate { model = model, text = calib_text:sub(1, n_rows * 12), context = calib_context, chunks = math.ceil(n_rows / (calib_context - 4)), rows = n_rows }
print(("%s: calibrated on %d tokens of %s, %d rows kept"):format(model.name, calib.n_tokens, o.calib, calib.n_rows))

-- Chunks lie evenly over the text.
local chunks = {}
for c = 1, n_chunks do
  local at, chunk = math.floor((c - 1) * (#ids - context - n_score) / math.max(1, n_chunks - 1)), { head = {}, tail = {} }
  for i = 1, context do chunk.head[i] = i == 1 and model.add_bos and model.bos or ids[at + i] end
  for i = 1, n_score do chunk.tail[i] = ids[at + context + i] end
  chunk.session = model:session { max_tokens = context + n_score }:feed(chunk.head, { logits = "none" })
  chunks[c] = chunk
end

local exp, log = math.exp, math.log
local function largest(z, n)
  local top, at = -math.huge, 0
  for i = 0, n - 1 do if z[i] > top then top, at = z[i], i end end
  return top, at
end
-- Of each position of [positions, vocab] tensors: sum of p (z - y) less the difference of the logarithms of the sums; how often the
-- likeliest token is the same.  The tensors are used once more at the end: what only a pointer leads to is Lua's to free.
local function divergence(reference, got, n, vocab)
  local out, same, from, to = {}, 0, reference:_data(), got:_data()
  for t = 0, n - 1 do
    local z, y = from + t * vocab, to + t * vocab
    local top_z, at_z = largest(z, vocab)
    local top_y, at_y = largest(y, vocab)
    local sum_z, sum_y, sum = 0, 0, 0
    for i = 0, vocab - 1 do
      local p = exp(z[i] - top_z)
      sum_z, sum_y, sum = sum_z + p, sum_y + exp(y[i] - top_y), sum + p * (z[i] - y[i])
    end
    out[t + 1] = sum / sum_z - log(sum_z) - top_z + log(sum_y) + top_y
    if at_z == at_y then same = same + 1 end
  end
  return out, same, reference, got
end

local function energies(x, want, n)
  local a, b, wrong, all = x:_data(), want:_data(), 0, 0
  for i = 0, n - 1 do
    wrong = wrong + (a[i] - b[i]) ^ 2
    all = all + b[i] ^ 2
  end
  return wrong, all, x, want
end

-- Relative squared error of coded rows, over layers and heads together (keys at their positions: RoPE keeps distances).
local function row_error(chunk, off, side)
  local wrong, all = 0, 0
  for b = 1, off.n_blocks do
    local x, first, last = off:read(side, b), off:range(b)
    local n = (last - first + 1) * model.head_dim
    for l = 1, model.n_layers do
      if model:layer(l).sliding_window == 0 then
        for h = 1, model.n_kv_heads do
          local want = chunk.session:read { layer = l, head = h, side = side, first = first, last = last }
          local e, d = energies(x:select(1, l):select(1, h), want, n)
          wrong, all = wrong + e, all + d
        end
      end
    end
  end
  return wrong / all
end

local function mean_of(x)
  local sum = 0
  for _, v in ipairs(x) do sum = sum + v end
  return sum / #x
end
-- Error of the mean from the means of chunks: positions of one chunk are not independent.
local function error_of(means)
  if #means < 2 then return nil end
  local m, sum = mean_of(means), 0
  for _, v in ipairs(means) do sum = sum + (v - m) ^ 2 end
  return math.sqrt(sum / (#means - 1) / #means)
end

-- ---- measuring.  Arms of one basis follow each other; one basis is kept at a time.
local rows = {}
local function key_of(b)
  return kv.json.encode { layers = b.layers or 0, heads = b.heads or 0, rank = b.rank or 0, rows = b.rows or 0, rope = b.rope ~= false, equal = b.equal == true, svd = b.svd or "gram" }
end
local by_basis, order = {}, {}
for i, a in ipairs(arms) do
  a.index, a.klds, a.means, a.same, a.bytes, a.ratio, a.seconds = i, {}, {}, 0, {}, {}, { encode = 0, restore = 0 }
  local key = key_of(a.basis)
  if not by_basis[key] then
    by_basis[key] = {}
    order[#order + 1] = key
  end
  table.insert(by_basis[key], a)
end
local t_start = kv.now()

local function measure_chunk(a, tables, c, chunk)
  local settings = { session = chunk.session, codec = tables }
  for k, v in pairs(a.offload) do settings[k] = v end
  local t0 = kv.now()
  local off = kv.offload(settings)
  local t1 = kv.now()
  local back = off:restore(model:session { max_tokens = context + n_score })
  local t2 = kv.now()
  a.seconds.encode, a.seconds.restore = a.seconds.encode + (t1 - t0) / a.chunks, a.seconds.restore + (t2 - t1) / a.chunks
  back:feed(chunk.tail, { logits = "all" })
  chunk.reference = chunk.reference or chunk.session:fork():feed(chunk.tail, { logits = "all" }):logits()
  local klds, same = divergence(chunk.reference, back:logits(), n_score, model.n_vocab)
  for _, v in ipairs(klds) do a.klds[#a.klds + 1] = v end
  a.means[c] = mean_of(klds)
  a.same = a.same + same
  local b, r = off:bytes(), off:ratio()
  for k, v in pairs { codes = b.codes, exact = b.exact, index = b.state, tables = b.shared } do a.bytes[k] = (a.bytes[k] or 0) + v / a.chunks end
  for k, v in pairs(r) do a.ratio[k] = (a.ratio[k] or 0) + v / a.chunks end
  if c == 1 then a.error_k, a.error_v = row_error(chunk, off, "k"), row_error(chunk, off, "v") end
end

local function measure(a, tables)
  a.chunks = math.min(a.chunks or n_chunks, n_chunks)
  for c = 1, a.chunks do
    measure_chunk(a, tables, c, chunks[c])
    collectgarbage()                                   -- sessions and logits are large, and Lua does not see their size
  end
  table.sort(a.klds)
  local function quantile(q) return a.klds[math.max(1, math.ceil(q * #a.klds))] end
  rows[a.index] = {
    group = a.group, arm = a.name, basis = a.basis, tables = a.tables, offload = a.offload, model = model.name, context = context, n_scored = #a.klds, chunks = a.chunks,
    kld = { mean = mean_of(a.klds), se = error_of(a.means), median = quantile(0.5), p95 = quantile(0.95), p99 = quantile(0.99), max = a.klds[#a.klds] }, same_top1 = a.same / #a.klds,
    ratio = a.ratio, bytes = a.bytes, rank_k = tables.rank_k, rank_v = tables.rank_v, error_k = a.error_k, error_v = a.error_v, seconds = a.seconds,
  }
  print(("%-8s %-28s %6.2f coded  %6.2f whole  %5.2f with tables  KLD %.5f ± %.5f  top-1 %.3f  error k %.4f v %.4f  %5.2f s + %.2f s"):format(a.group, a.name, a.ratio.tokens, a.ratio.whole,
    a.ratio.with_tables, mean_of(a.klds), error_of(a.means) or 0, a.same / #a.klds, a.error_k, a.error_v, a.seconds.encode, a.seconds.restore))
  io.stdout:flush()
end

-- ---- rows and what made them, after every arm: a run that is cut short keeps what it has
os.execute(("mkdir -p '%s'"):format(o.out))
local name = o.name or model.name:gsub("[^%w_.-]", "_")
local digests = { model = kv.sha256_file(model.path), text = kv.sha256_file(o.text), experiment = kv.sha256_file(arg[0]) }
local function write(file, text)
  local f = assert(io.open(o.out .. "/" .. file, "wb"))
  f:write(text)
  f:close()
end
local function save()
  local lines, cells, group = {}, {}, nil
  for i = 1, #arms do
    local row = rows[i]
    if row then
      lines[#lines + 1] = kv.json.encode(row)
      if row.group ~= group then
        cells[#cells + 1] = ("\n## %s\n\n| arm | coded | whole | with tables | KLD | ± | p99 | same top-1 | error k | error v | rank k, v | tables, MB |\n|%s"):format(row.group, (" --- |"):rep(12))
        group = row.group
      end
      cells[#cells + 1] = ("| %s | %.2f | %.2f | %.2f | %.4f | %.4f | %.3f | %.3f | %.4f | %.4f | %d, %d | %.1f |"):format(row.arm, row.ratio.tokens, row.ratio.whole, row.ratio.with_tables, row.kld.mean,
        row.kld.se or 0, row.kld.p99, row.same_top1, row.error_k, row.error_v, row.rank_k, row.rank_v, row.bytes.tables / 1e6)
    end
  end
  write(name .. ".jsonl", table.concat(lines, "\n") .. "\n")
  write(name .. ".md", ("# KVTC on %s: context %d, %d chunks, %d positions scored after each, %d calibration rows\n\n%s\n%s\n"):format(model.name, context, n_chunks, n_score, calib.n_rows,
    "f16 bytes over stored ones: coded tokens, all tokens, tables counted. KLD in nats against the cache that stayed.", table.concat(cells, "\n")))
  local b = kv.build()
  write(name .. ".json", kv.json.encode { experiment_sha256 = digests.experiment, model = { name = model.name, sha256 = digests.model }, text_sha256 = digests.text,
    calibration = calib:describe(), context = context, score = n_score, chunks = n_chunks, rows = n_rows, only = o.only, part = o.part, threads = kv.threads(), seconds = kv.now() - t_start,
    code = { version = b.version, abi_hash = b.abi_hash, flags = b.flags }, host = { cpu = b.cpu, simd = b.simd } } .. "\n")
end

local function measure_basis(key)
  local first
  for _, a in ipairs(by_basis[key]) do
    local options = {}
    for k, v in pairs(a.tables) do options[k] = v end
    if first then options.basis = first
    else
      options.calib = calib
      for k, v in pairs(a.basis) do options[k] = v end
    end
    local t0 = kv.now()
    local tables = kv.kvtc(options)
    if not first then print(("basis %s: %.1f s"):format(key, kv.now() - t0)) end
    first = first or tables
    measure(a, tables)
    save()
  end
end
for _, key in ipairs(order) do
  measure_basis(key)
  collectgarbage()
end

print(("%s/%s.jsonl, .md, .json"):format(o.out, name))
