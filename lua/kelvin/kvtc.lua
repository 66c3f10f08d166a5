--- kelvin.kvtc: KV Cache Transform Coding of whole sessions: tokens that leave memory in blocks and come back.
--
-- A basis over all layers and heads, bits by dynamic programming, then a lossless stage (arXiv 2511.01815).

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local bytes = require "kelvin.bytes"
local json = require "kelvin.json"
local doc = require("kelvin.help").doc

local M, Tables, Offload = {}, {}, {}
Tables.__index, Tables.__name = Tables, "kvtc tables"
Offload.__index, Offload.__name = Offload, "offload"

local types = { paper = C.KV_KVTC_PAPER, fine = C.KV_KVTC_FINE, e4m3 = C.KV_KVTC_E4M3, uniform = C.KV_KVTC_UNIFORM, truncate = C.KV_KVTC_UNIFORM }

--- How many times smaller than f16 before the lossless stage: the published settings, and budgets of bits for keys and for
-- values apart as the literature names them (the paper's own ablation speaks for k4v2).
M.presets = {}
for _, n in ipairs { 8, 16, 20, 32, 64 } do M.presets[("kvtc-%dx"):format(n)] = { ratio_k = n, ratio_v = n } end
for _, name in ipairs { "k1v3", "k2v3", "k2v4", "k3v4", "k4v2", "k4v6" } do
  M.presets["kvtc-" .. name] = { ratio_k = 16 / tonumber(name:sub(2, 2)), ratio_v = 16 / tonumber(name:sub(4, 4)) }
end
local function sorted_presets()
  local names = {}
  for name in pairs(M.presets) do names[#names + 1] = name end
  table.sort(names, function(a, b)
    local x, y = tonumber(a:match "^kvtc%-(%d+)x$"), tonumber(b:match "^kvtc%-(%d+)x$")
    if x and y then return x < y end
    return a < b
  end)
  return names
end
function M.preset_names() return table.concat(sorted_presets(), ", ") end

local SOURCE = "KVTC, arXiv 2511.01815"
local function in_words(name)
  local p = M.presets[name]
  return p.ratio_k == p.ratio_v and ("KVTC over all layers and heads, %g times smaller than f16 before the lossless stage"):format(p.ratio_k)
    or ("KVTC over all layers and heads, keys %g and values %g bits before the lossless stage"):format(16 / p.ratio_k, 16 / p.ratio_v)
end

--- Rows for kelvin.codec's list.
function M.list()
  local rows = {}
  for i, name in ipairs(sorted_presets()) do rows[i] = { name = name, kind = "offload", family = "kvtc", about = in_words(name), source = SOURCE } end
  return rows
end

--- A preset in words, or nil.
function M.describe(name)
  if not M.presets[name] then return nil end
  local p = M.presets[name]
  return setmetatable({ name = name, kind = "offload", about = in_words(name), source = SOURCE, ratio_k = p.ratio_k, ratio_v = p.ratio_v }, { __tostring = function()
    return ([[
%s(ratio_k=%.4g,ratio_v=%.4g)
  %s
  source: %s
  can: keys and values of whole tokens, in blocks of tokens that are read alone; needs a calibration; no attention on codes, so it is for
    sessions that leave memory and come back: kv.offload, kv.save, kelvin cache make --offload %s; not for --arm
  parameters: kv.kvtc{ ratio_k, ratio_v, layers, heads, rank, rows, rope, equal, svd, types, bits, allocate }, kv.offload{ sink, window, cadence, block, stage, level }
  bytes: docs/formats.md, "KVTC tables and offloaded sessions in a file"]]):format(name, p.ratio_k, p.ratio_v, in_words(name), SOURCE, name)
  end })
end

local function choice(o, key, words, default)
  local got = o[key]
  if got == nil then got = default end
  if words[got] ~= nil then return words[got] end
  local names = {}
  for name in pairs(words) do names[#names + 1] = tostring(name) end
  table.sort(names)
  check.fail("kv.kvtc: %s='%s' is none of %s", key, tostring(got), table.concat(names, ", "))
end

local keys = { calib = 1, basis = 1, ratio = 1, ratio_k = 1, ratio_v = 1, layers = 1, heads = 1, rank = 1, rows = 1, rope = 1, equal = 1, svd = 1, seed = 1, types = 1, bits = 1, allocate = 1 }

local function wrap(h, model, about)
  local n, rk, rv = ffi.new "double[1]", ffi.new "int[1]", ffi.new "int[1]"
  check(C.kv_kvtc_tables(h, n, rk, rv))
  return setmetatable({ _k = h, model = model, bytes = n[0], rank_k = rk[0], rank_v = rv[0], about = about }, Tables)
end

doc("kv.kvtc", [[
  kv.kvtc{ calib = | basis =, ratio = 16, ratio_k =, ratio_v =, layers = 0, heads = 0, rank = 0, rows = 0, rope = true, equal = false,
           svd = "gram", types = "paper", bits =, allocate = "dp", seed = 1 } -> tables
  The basis and the bits of every component, from a calibration (kv.calibrate{ rows = 2048 }: no more components than three quarters
  of its rows).  basis: other tables, whose basis serves another ratio or other types.  ratio: f16 bytes over coded ones, before
  the lossless stage, of keys and values apart if wished.  layers, heads: how many share a basis, 0 for all.  rank, rows: fewer
  components or calibration rows.  rope: keys before RoPE (false: as cached).  equal: rows of every layer and head scaled to the same
  mean square, so that small ones count as much as large ones (not in the paper).  svd: "gram" or "randomized" (8 iterations, from seed).
  types: "paper" (0, 2, 4, 8 bits in blocks with shift and scale), "fine" (0 to 8, calibrated steps), "e4m3" (FP8 for 8 bits),
  "uniform" (`bits` or nothing), "truncate" (8 bits or nothing).  allocate: "dp" (every number of bits) or "lagrange".
  t.bytes, t.rank_k, t.rank_v; kv.save(path, t) and kv.load(path, { model = }).]])
function M.new(o)
  for key in pairs(o) do check.that(keys[key], "kv.kvtc: unknown option '%s'; `?kv.kvtc` lists them", tostring(key)) end
  local like = o.basis
  check.that(like == nil or getmetatable(like) == Tables, "kv.kvtc: basis is a %s, not tables of kv.kvtc", type(like))
  local calib = like or check.that(o.calib and o.calib._c and o.calib, "kv.kvtc: calib = kv.calibrate{...} is needed")
  local ratio = o.ratio or 16
  local kind = choice(o, "types", types, "paper")
  local numbers = { ratio_k = o.ratio_k or ratio, ratio_v = o.ratio_v or ratio, seed = o.seed or 1, layers = o.layers or 0, heads = o.heads or 0, rank = o.rank or 0, rows = o.rows or 0,
    bits = o.types == "truncate" and 8 or o.bits or 0 }
  for key, v in pairs(numbers) do check.that(type(v) == "number" and v >= 0 and v < 2 ^ 31, "kv.kvtc: %s=%s is not a number from 0", key, tostring(v)) end
  local options = ffi.new("kv_kvtc_options", numbers)
  options.keep_rope = choice(o, "rope", { [true] = 0, [false] = 1 }, true)
  options.equal = choice(o, "equal", { [true] = 1, [false] = 0 }, false)
  options.randomized = choice(o, "svd", { gram = 0, randomized = 1 }, "gram")
  options.types = kind
  options.lagrange = choice(o, "allocate", { dp = 0, lagrange = 1 }, "dp")
  local h = K.handle("kv_kvtc", C.kv_kvtc_free, function(out) return C.kv_kvtc_new(out, not like and calib._c or nil, like and like._k or nil, options) end)
  local about = { types = o.types or "paper", allocate = o.allocate or "dp", ratio_k = numbers.ratio_k, ratio_v = numbers.ratio_v }
  for _, key in ipairs { "layers", "heads", "rank", "rows", "seed" } do about[key] = like and like.about[key] or numbers[key] end
  if like then about.rope, about.equal, about.svd, about.calibration = like.about.rope, like.about.equal, like.about.svd, like.about.calibration
  else about.rope, about.equal, about.svd, about.calibration = o.rope ~= false, o.equal == true, o.svd or "gram", calib.sha256 end
  return wrap(h, calib.model, about)
end

function Tables:__tostring()
  return ("kvtc tables of %s: rank %d for keys, %d for values, %.0f bytes"):format(self.model.name, self.rank_k, self.rank_v, self.bytes)
end

-- Whole cadences leave as soon as they are there, so the window floats between window - cadence + 1 and window.
local function leaving(n, sink, window, cadence) return math.floor((n - sink - math.max(window - (cadence - 1), 0)) / cadence) * cadence end

local function refresh(self)
  local n, coded, blocks = ffi.new "int[1]", ffi.new "int[1]", ffi.new "int[1]"
  check(C.kv_offload_shape(self._o, n, coded, blocks))
  self.n_tokens, self.n_coded, self.n_blocks = n[0], coded[0], blocks[0]
  return self
end

doc("kv.offload", [[
  kv.offload{ session =, codec = "kvtc-16x" | kv.kvtc{...}, calib =, sink = 4, window = 128, cadence = 16, block = 64, stage = "smallest", level = } -> offload
  Compresses a session's tokens, all but the first `sink` and the last `window` to window - cadence + 1 (whole cadences leave), which
  stay f16.  stage: raw (packed bits), zlib (level 1..9), lzma (level 0..9), rans or smallest; each block of tokens is coded alone.
  codec: kvtc-8x, -16x, -20x, -32x, -64x, kvtc-k1v3, -k2v3, -k2v4, -k3v4, -k4v2, -k4v6, made of calib, or tables.
  o:restore(empty session) -> session   o:extend(session): the session, gone on: what left the window since becomes blocks of its own
  o:read(side, block) -> tensor [layers, heads, tokens, dim]   o:range(block) -> first token, last token
  o:ratio() -> { tokens, whole, with_tables }: f16 bytes over stored ones, of the coded tokens, of all, and with the tables counted.
  o:bytes() -> by purpose (shared: the tables)   kv.save(path, o [, { tables = false }]), kv.load(path [, { model =, tables = }])]])
function M.offload(o)
  check.that(o.session and o.session._s, "kv.offload: session = is needed")
  local tables = o.codec or "kvtc-16x"
  if type(tables) == "string" then
    local preset = check.that(M.presets[tables], "kv.offload: codec '%s' is none of %s or kv.kvtc{...}", tables, M.preset_names())
    tables = M.new { calib = o.calib, ratio_k = preset.ratio_k, ratio_v = preset.ratio_v }
  end
  check.that(getmetatable(tables) == Tables, "kv.offload: codec is neither a name nor kv.kvtc{...}")
  local sink, window, cadence, block = o.sink or 4, o.window or 128, o.cadence or 16, o.block or 64
  check.that(type(cadence) == "number" and cadence >= 1 and cadence % 1 == 0, "kv.offload: cadence=%s is not a whole number from 1", tostring(cadence))
  local n = #o.session.ids
  local coded = leaving(n, sink, window, cadence)
  check.that(coded > 0, "kv.offload: of %d tokens none leaves sink=%d and window=%d", n, sink, window)
  local h = K.handle("kv_offload", C.kv_offload_free, function(out)
    return C.kv_offload_new(out, tables._k, o.session._s, sink, n - sink - coded, block, o.stage == "packed" and "raw" or o.stage or "smallest", o.level or -1)
  end)
  local ids = {}
  for i, id in ipairs(o.session.ids) do ids[i] = id end
  return refresh(setmetatable({ _o = h, model = o.session.model, tables = tables, ids = ids, sink = sink, window = window, cadence = cadence }, Offload))
end

--- o:extend(session): the session has gone on (or one that was restored has); nothing that is coded is coded again.
function Offload:extend(session)
  check.that(session and session._s, "offload: extend needs a session")
  for i, id in ipairs(self.ids) do check.that(session.ids[i] == id, "offload: extend: token %d is not the one that was offloaded", i) end
  local n = #session.ids
  local coded = math.max(self.n_coded, leaving(n, self.sink, self.window, self.cadence))
  check(C.kv_offload_extend(self._o, session._s, n - self.sink - coded))
  for i = #self.ids + 1, n do self.ids[i] = session.ids[i] end
  return refresh(self)
end

--- o:range(block): its first and last token, from 1.
function Offload:range(block)
  local t, n = ffi.new "int[1]", ffi.new "int[1]"
  check.that(type(block) == "number" and block >= 1 and block <= self.n_blocks, "offload: block %s is outside 1..%d", tostring(block), self.n_blocks)
  check(C.kv_offload_block(self._o, block - 1, t, n))
  return t[0] + 1, t[0] + n[0]
end

-- Bytes of the f16 rows that the session's next query could see: of all its tokens, and of the coded ones.  Sliding layers
-- have let go of the rest, which is therefore no gain of the codec's.
local function f16_bytes(self)
  local whole, coded, row = 0, 0, 4 * self.model.n_kv_heads * self.model.head_dim
  for l = 1, self.model.n_layers do
    local w = self.model:layer(l).sliding_window
    local first = w > 0 and math.max(0, self.n_tokens - w + 1) or 0
    whole = whole + (self.n_tokens - first) * row
    coded = coded + (math.max(self.sink + self.n_coded, first) - math.max(self.sink, first)) * row
  end
  return whole, coded
end

function Offload:bytes()
  local b = ffi.new "kv_bytes[1]"
  check(C.kv_offload_bytes(self._o, b))
  return bytes.new(b[0], (f16_bytes(self)) / 2)
end

function Offload:ratio()
  local b, whole, coded = self:bytes(), f16_bytes(self)
  return { tokens = coded / (b.codes + b.state), whole = whole / (b.total - b.shared), with_tables = whole / b.total }
end

--- o:restore(session): fills an empty session of the same model; it goes on as the offloaded one would.
function Offload:restore(session)
  check.that(session and session._s and #session.ids == 0, "offload: restore needs an empty session")
  local n, ids = ffi.new "int[1]", {}
  check(C.kv_offload_restore(self._o, session._s, n))
  for i = 1, n[0] do ids[i] = self.ids[i] end
  return session:_adopt(ids)
end

--- o:read(side, block): rows of one block, tensor [layers, heads, tokens, dim]; block counts from 1.
function Offload:read(side, block)
  check.that(side == "k" or side == "v", "offload: side '%s' is neither k nor v", tostring(side))
  local first, last = self:range(block)
  local n = last - first + 1
  local t = require("kelvin.tensor").zeros { self.model.n_layers, self.model.n_kv_heads, n, self.model.head_dim }
  check(C.kv_offload_read(self._o, side == "k" and C.KV_SIDE_K or C.KV_SIDE_V, block - 1, t:_data()))
  return t
end

-- ---- files

local function of(model) return { name = model.name, path = model.path } end
local function about_tables(t) return json.encode { about = tostring(t), model = of(t.model), settings = t.about } end

--- kv.save(path, tables): for kelvin.container.
function Tables:_save(path, stage, level) check(C.kv_kvtc_save(self._k, path, about_tables(self), stage, level)) end

--- Digest of everything that rows are coded with.
function Tables:digest()
  local hex = ffi.new "char[65]"
  check(C.kv_kvtc_digest(self._k, hex))
  return ffi.string(hex, 64)
end

--- kv.save(path, offload): its payloads are coded already, so stage and level are the tables'.
function Offload:_save(path, _, _, o)
  local ids = ffi.new("int32_t[?]", self.n_tokens)
  for i = 1, self.n_tokens do ids[i - 1] = self.ids[i] end
  local about = json.encode { about = tostring(self), model = of(self.model), window = self.window, cadence = self.cadence }
  check(C.kv_offload_save(self._o, path, ids, about, o.tables ~= false and about_tables(self.tables) or nil))
end

--- For kelvin.container: tables or an offload in a file.
function M._load(file, o)
  local models = require "kelvin.model"
  local meta = file.sections[1].meta
  local given = o.tables
  check.that(given == nil or getmetatable(given) == Tables, "kv.load: tables is a %s, not kvtc tables", type(given))
  local m = o.model or given and given.model or meta.model and (meta.model.name and select(2, models.find(meta.model.name)) and meta.model.name or meta.model.path)
  check.that(m, "kv.load: file '%s' does not say which model it belongs to: model = is needed", file.path)
  if type(m) == "string" then m = models.open(m) end
  local tables_section = file:section "kvtc"
  local settings = tables_section and type(tables_section.meta.settings) == "table" and tables_section.meta.settings or {}
  if file.sections[1].kind == "kvtc" then
    return wrap(K.handle("kv_kvtc", C.kv_kvtc_free, function(out) return C.kv_kvtc_load(out, m._m, file._p) end), m, settings)
  end
  local h = K.handle("kv_offload", C.kv_offload_free, function(out) return C.kv_offload_load(out, m._m, file._p, given and given._k or nil, o.salvage and 1 or 0) end)
  local tables = given or wrap(ffi.gc(C.kv_offload_tables(h), C.kv_kvtc_free), m, settings)
  local self = refresh(setmetatable({ _o = h, model = m, tables = tables, ids = {}, window = tonumber(meta.window) or 128, cadence = tonumber(meta.cadence) or 16 }, Offload))
  local ids = ffi.cast("const int32_t*", file:page(1, 3))
  for i = 1, self.n_tokens do self.ids[i] = ids[i - 1] end
  m:_ids(self.ids, "kv.load")
  self.sink = self:range(1) - 1
  return self
end

function Offload:__tostring()
  local r = self:ratio()
  return ("offload of %s: %d of %d tokens coded, ratio %.2f (%.2f with exact tokens, %.2f with tables)"):format(self.model.name, self.n_coded, self.n_tokens, r.tokens, r.whole, r.with_tables)
end

return setmetatable(M, { __call = function(_, o) return M.new(o) end })
