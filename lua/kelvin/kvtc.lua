--- kelvin.kvtc: KV Cache Transform Coding of whole sessions: tokens that leave memory in blocks and come back.
--
-- A basis over all layers and heads, bits by dynamic programming, then a lossless stage (arXiv 2511.01815).

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local bytes = require "kelvin.bytes"
local doc = require("kelvin.help").doc

local M, Tables, Offload = {}, {}, {}
Tables.__index, Tables.__name = Tables, "kvtc tables"
Offload.__index, Offload.__name = Offload, "offload"

local types = { paper = 0, fine = 1, truncate = 2 }

--- The published settings: how many times smaller than f16 before the lossless stage.
M.presets = { ["kvtc-8x"] = 8, ["kvtc-16x"] = 16, ["kvtc-20x"] = 20, ["kvtc-32x"] = 32, ["kvtc-64x"] = 64 }

doc("kv.kvtc", [[
  kv.kvtc{ calib =, ratio = 16, ratio_k =, ratio_v =, layers = 0, rank = 0, types = "paper" } -> tables
  The basis and the bits of every component, from a calibration (kv.calibrate{ rows = 2048 }: no more components than three quarters
  of its rows).  ratio: f16 bytes over coded ones, before the lossless stage, of keys and values apart if wished.  layers: how many
  share a basis, 0 for all.  types: "paper" (0, 2, 4, 8 bits), "fine" (0 to 8, calibrated steps), "truncate" (8 bits or nothing).
  t.bytes, t.rank_k, t.rank_v]])
function M.new(o)
  local calib = check.that(o.calib and o.calib._c and o.calib, "kv.kvtc: calib = kv.calibrate{...} is needed")
  local kind = o.types or "paper"
  check.that(types[kind], "kv.kvtc: types='%s' is none of paper, fine, truncate", tostring(kind))
  local ratio = o.ratio or 16
  local h = K.handle("kv_kvtc", C.kv_kvtc_free, function(out)
    return C.kv_kvtc_new(out, calib._c, o.ratio_k or ratio, o.ratio_v or ratio, o.layers or 0, o.rank or 0, types[kind])
  end)
  local n, rk, rv = ffi.new "double[1]", ffi.new "int[1]", ffi.new "int[1]"
  check(C.kv_kvtc_tables(h, n, rk, rv))
  return setmetatable({ _k = h, model = calib.model, bytes = n[0], rank_k = rk[0], rank_v = rv[0], types = kind }, Tables)
end

function Tables:__tostring()
  return ("kvtc tables of %s: rank %d for keys, %d for values, %.0f bytes"):format(self.model.name, self.rank_k, self.rank_v, self.bytes)
end

doc("kv.offload", [[
  kv.offload{ session =, codec = "kvtc-16x" | kv.kvtc{...}, calib =, sink = 4, window = 128, cadence = 16, block = 64, stage = "smallest" } -> offload
  Compresses a session's tokens, all but the first `sink` and the last `window` to window - cadence + 1 (whole cadences leave), which
  stay f16.  stage: raw, zlib, lzma, rans or smallest; each block of tokens is coded alone.
  o:restore(empty session) -> session   o:read(side, block) -> tensor [layers, heads, tokens, dim]
  o:ratio() -> { tokens, whole, with_tables }: f16 bytes over stored ones, of the coded tokens, of all, and with the tables counted.
  o:bytes() -> by purpose (shared: the tables)]])
function M.offload(o)
  check.that(o.session and o.session._s, "kv.offload: session = is needed")
  local tables = o.codec or "kvtc-16x"
  if type(tables) == "string" then
    check.that(M.presets[tables], "kv.offload: codec '%s' is none of kvtc-8x, kvtc-16x, kvtc-20x, kvtc-32x, kvtc-64x or kv.kvtc{...}", tables)
    tables = M.new { calib = o.calib, ratio = M.presets[tables] }
  end
  check.that(getmetatable(tables) == Tables, "kv.offload: codec is neither a name nor kv.kvtc{...}")
  local sink, window, cadence, block = o.sink or 4, o.window or 128, o.cadence or 16, o.block or 64
  check.that(cadence >= 1 and cadence % 1 == 0, "kv.offload: cadence=%s is not a whole number from 1", tostring(cadence))
  local n = #o.session.ids
  -- Whole cadences leave as soon as they are there, so the window floats between window - cadence + 1 and window.
  local float = window - (cadence - 1)
  local coded = math.floor((n - sink - math.max(float, 0)) / cadence) * cadence
  check.that(coded > 0, "kv.offload: of %d tokens none leaves sink=%d and window=%d", n, sink, window)
  local h = K.handle("kv_offload", C.kv_offload_free, function(out)
    return C.kv_offload_new(out, tables._k, o.session._s, sink, n - sink - coded, block, o.stage or "smallest")
  end)
  local ids = {}
  for i, id in ipairs(o.session.ids) do ids[i] = id end
  local shape = { ffi.new "int[1]", ffi.new "int[1]", ffi.new "int[1]" }
  check(C.kv_offload_shape(h, shape[1], shape[2], shape[3]))
  return setmetatable({ _o = h, model = o.session.model, tables = tables, ids = ids, block = block, n_tokens = n, n_coded = shape[2][0], n_blocks = shape[3][0] }, Offload)
end

local function token_bytes(self) return 4 * self.model.n_layers * self.model.n_kv_heads * self.model.head_dim end

function Offload:bytes()
  local b = ffi.new "kv_bytes[1]"
  check(C.kv_offload_bytes(self._o, b))
  return bytes.new(b[0], self.n_tokens * token_bytes(self) / 2)
end

function Offload:ratio()
  local b, whole = self:bytes(), self.n_tokens * token_bytes(self)
  return { tokens = self.n_coded * token_bytes(self) / (b.codes + b.state), whole = whole / (b.total - b.shared), with_tables = whole / b.total }
end

--- o:restore(session): fills an empty session of the same model; it goes on as the offloaded one would.
function Offload:restore(session)
  check.that(session and session._s and #session.ids == 0, "offload: restore needs an empty session")
  check(C.kv_offload_restore(self._o, session._s))
  return session:_adopt(self.ids)
end

--- o:read(side, block): rows of one block, tensor [layers, heads, tokens, dim]; block counts from 1.
function Offload:read(side, block)
  check.that(side == "k" or side == "v", "offload: side '%s' is neither k nor v", tostring(side))
  check.that(type(block) == "number" and block >= 1 and block <= self.n_blocks, "offload: block %s is outside 1..%d", tostring(block), self.n_blocks)
  local n = math.min(self.block, self.n_coded - (block - 1) * self.block)
  local t = require("kelvin.tensor").zeros { self.model.n_layers, self.model.n_kv_heads, n, self.model.head_dim }
  check(C.kv_offload_read(self._o, side == "k" and C.KV_SIDE_K or C.KV_SIDE_V, block - 1, t:_data()))
  return t
end

function Offload:__tostring()
  local r = self:ratio()
  return ("offload of %s: %d of %d tokens coded, ratio %.2f (%.2f with exact tokens, %.2f with tables)"):format(self.model.name, self.n_coded, self.n_tokens, r.tokens, r.whole, r.with_tables)
end

return setmetatable(M, { __call = function(_, o) return M.new(o) end })
