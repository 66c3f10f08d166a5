--- kelvin.calib: channel means of keys and values over a text, and figures per layer that policies rank by.
--
-- Calibrate on another text than the one that is scored.  The first positions of each chunk are attention sinks with keys
-- and values unlike any other (`skip`), and are left out.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local doc = require("kelvin.help").doc

local M, Calib, Stats = {}, {}, {}
Calib.__index, Calib.__name = {}, "calibration"
Stats.__name = "stats"

doc("model:calibrate", [[
  m:calibrate{ text = | tokens =, chunks = 8, context = 512, skip = 4, on_progress = } -> calibration
  Channel means of K, pre-RoPE K and V over the first chunks of a text (exact cache), leaving out the first `skip` positions of
  each chunk.  c:mean(side, layer, head) -> tensor [dim]; c:stats() ranks layers.  A text shorter than one chunk is an error.]])
function M.new(model, o)
  local ids = o.tokens or model:tokenize(check.that(o.text, "calibrate: text = or tokens = is needed"), { add_special = false })
  local context, chunks, skip = o.context or 512, o.chunks or 8, o.skip or 4
  check.that(context % 1 == 0 and context > skip and chunks >= 1, "calibrate: context=%s, chunks=%s, skip=%s: whole chunks longer than skip are needed", tostring(context), tostring(chunks), tostring(skip))
  check.that(#ids >= context, "calibrate: %s has %d tokens, one chunk of context=%d needs as many", o.name or "the text", #ids, context)
  local h = K.handle("kv_calib", C.kv_calib_free, function(out) return C.kv_calib_new(out, model._m, o.sample or 0) end)
  local self = setmetatable({ _c = h, model = model, context = context, skip = skip, chunks = 0 }, Calib)
  local more, buf = ffi.new "int[1]", ffi.new("int32_t[?]", context)
  for chunk = 0, math.min(chunks, math.floor(#ids / context)) - 1 do
    for i = 0, context - 1 do buf[i] = ids[chunk * context + i + 1] end
    if model.add_bos then buf[0] = model.bos end
    if chunk == 0 then self.first_chunk = { unpack(ids, 1, math.min(context, 256)) } end
    check(C.kv_calib_begin(h, buf, context, skip))
    repeat
      check(C.kv_calib_step(h, more))
      if C.kv_interrupted() == 1 then check.fail("interrupted") end
    until more[0] == 0
    self.chunks = chunk + 1
    if o.on_progress then o.on_progress(chunk + 1, chunks) end
  end
  local n = ffi.new "double[1]"
  check(C.kv_calib_count(h, n))
  self.n_tokens = n[0]
  self.source = o.source
  self.sha256 = require("kelvin.lib").sha256(table.concat(ids, " ", 1, self.chunks * context))
  return self
end

local what = { k = C.KV_CALIB_K, k_pre = C.KV_CALIB_K_PRE, v = C.KV_CALIB_V }

--- For kelvin.plan: writes the mean of a slot; page: tokens in a page when keys are held in page-relative RoPE.
function Calib.__index:_mean(side, l, h, page, mean)
  if page and side == "k" then check(C.kv_calib_page_mean(self._c, l - 1, h - 1, page, mean))
  else check(C.kv_calib_mean(self._c, what[side], l - 1, h - 1, mean)) end
end

--- c:mean(side, layer, head): tensor [dim]; side "k" (as cached), "k_pre" (before RoPE) or "v".
function Calib.__index:mean(side, l, h)
  check.that(what[side], "calibration: side '%s' is none of k, k_pre, v", tostring(side))
  local t = require("kelvin.tensor").zeros { self.model.head_dim }
  self:_mean(side, l, h, nil, t:_data())
  return t
end

--- For manifests.
function Calib.__index:describe()
  return { n_tokens = self.n_tokens, chunks = self.chunks, context = self.context, skip = self.skip, tokens_sha256 = self.sha256, source = self.source }
end

function Calib:__tostring()
  return ("calibration of %s: %d tokens (%d chunks of %d, first %d of each left out)"):format(self.model.name, self.n_tokens, self.chunks, self.context, self.skip)
end

doc("calibration:stats", [[
  c:stats() -> stats
  stats[l].k and stats[l].v hold rms (of one element), mean_share (share of the energy that a per-channel mean takes away),
  outlier (largest channel rms over the median one) and hardness (rms of what is left after the mean).
  stats:rank(l, side) -> 1 for the layer with the greatest hardness, n_layers for the least.  Measured on up to 256 tokens.]])
function Calib.__index:stats()
  if not self._stats then self._stats = setmetatable({ calib = self, layers = {}, ranks = {} }, Stats) end
  return self._stats
end

local function side_figures(session, l, side, means, skip)
  local heads, dim, tokens = #means, session.model.head_dim, session.n_tokens
  local energy, centred, channel = 0, 0, {}
  for h = 1, heads do
    local x, mean = session:read { layer = l, head = h, side = side }:_data(), means[h]:_data()
    for d = 0, dim - 1 do
      local sum = 0
      for n = skip, tokens - 1 do
        local v = x[n * dim + d]
        sum, centred = sum + v * v, centred + (v - mean[d]) ^ 2
      end
      energy = energy + sum
      channel[#channel + 1] = math.sqrt(sum / (tokens - skip))
    end
  end
  table.sort(channel)
  local n = heads * dim * (tokens - skip)
  return { rms = math.sqrt(energy / n), mean_share = 1 - centred / energy, outlier = channel[#channel] / channel[math.ceil(#channel / 2)], hardness = math.sqrt(centred / n) }
end

local function layer_stats(stats, l)
  local c = stats.calib
  check.that(type(l) == "number" and l >= 1 and l <= c.model.n_layers, "stats: layer %s is outside 1..%d", tostring(l), c.model.n_layers)
  -- One pass over the first chunk with an exact cache, whose rows are what is measured.
  stats.session = stats.session or c.model:session { max_tokens = #c.first_chunk }:feed(c.first_chunk, { logits = "none" })
  local out = {}
  for _, side in ipairs { "k", "v" } do
    local means = {}
    for h = 1, c.model.n_kv_heads do means[h] = c:mean(side, l, h) end
    out[side] = side_figures(stats.session, l, side, means, math.min(c.skip, #c.first_chunk - 1))
  end
  return out
end

local stats_methods = {}
function stats_methods:rank(l, side)
  side = side or "k"
  check.that(side == "k" or side == "v", "stats:rank: side '%s' is neither k nor v", tostring(side))
  local ranks = self.ranks[side]
  if not ranks then
    local n, by = self.calib.model.n_layers, {}
    for i = 1, n do by[i] = { i, self[i][side].hardness } end
    table.sort(by, function(a, b) if a[2] ~= b[2] then return a[2] > b[2] end return a[1] < b[1] end)
    ranks = {}
    for r, e in ipairs(by) do ranks[e[1]] = r end
    self.ranks[side] = ranks
  end
  check.that(ranks[l], "stats:rank: layer %s is outside 1..%d", tostring(l), #ranks)
  return ranks[l]
end

function Stats.__index(self, key)
  if type(key) ~= "number" then return stats_methods[key] end
  if key % 1 ~= 0 then return nil end
  local s = self.layers[key] or layer_stats(self, key)
  self.layers[key] = s
  return s
end

return setmetatable(M, { __call = function(_, model, o) return M.new(model, o) end })
