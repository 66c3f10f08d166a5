--- kelvin.calib: moments of queries, keys and values over a text, that means, calibrated codecs and policies are made from.
--
-- Calibrate on another text than the one that is scored: kv.eval refuses otherwise.  The first positions of each chunk are
-- attention sinks with keys and values unlike any other (`skip`), and are left out.  An artifact is the same in a file.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local json = require "kelvin.json"
local lib = require "kelvin.lib"
local log = require "kelvin.log"
local doc = require("kelvin.help").doc

local M, Calib, Stats = {}, {}, {}
Calib.__index, Calib.__name = {}, "calibration"
Stats.__name = "stats"

local function info(self)
  local i = ffi.new "kv_calib_info"          -- not [1]: what i[0] refers to dies with i
  check(C.kv_calib_get_info(self._c, i))
  return i
end

local function wrap(model, handle, source)
  local self = setmetatable({ _c = handle, model = model }, Calib)
  local i = info(self)
  self.n_tokens, self.chunks, self.context, self.skip, self.n_rows = i.count, i.n_chunks, i.context, i.skip, i.n_sample
  self.what = { "moments" }
  if i.without % 4 < 2 then self.what[2] = "rows" end
  if i.without % 2 < 1 then self.what[#self.what + 1] = "queries" end
  self.sha256 = ffi.string(i.tokens)
  local notes = ffi.string(i.notes)
  notes = notes ~= "" and json.decode(notes, "artifact notes")
  self.notes = { text = type(notes) == "table" and type(notes.text) == "string" and notes.text or nil }
  for _, c in ipairs(type(notes) == "table" and type(notes.checks) == "table" and notes.checks or {}) do       -- a file's: those that can be told
    if type(c) == "table" and pcall(M.verdict, c) then
      self.notes.checks = self.notes.checks or {}
      table.insert(self.notes.checks, c)
    end
  end
  self.source = source or self.notes.text
  return self
end

local function load(model, path)
  local self = wrap(model, K.handle("kv_calib", C.kv_calib_free, function(out) return C.kv_calib_load(out, model._m, path) end))
  for _, c in ipairs(self.notes.checks or {}) do
    if c.lost then log.warn("artifact '%s': %s", path, M.verdict(c)) end
  end
  return self
end

-- What may be asked for; moments of keys and values (means and covariances, outliers) are always there.
local collects = { moments = 0, covariances = 0, outliers = 0, queries = 1, rows = 2, quantiles = 2 }

--- What to leave out, from a list or "moments,rows": bits of kv_calib_leave_out.
local function without(wanted)
  if wanted == nil then return 0 end
  if type(wanted) == "string" then
    local list = {}
    for word in wanted:gmatch "[^,%s]+" do list[#list + 1] = word end
    wanted = list
  end
  check.that(type(wanted) == "table" and #wanted > 0, "calibrate: what = a list of moments, rows (quantiles), queries is needed")
  local out = 3
  for _, word in ipairs(wanted) do
    local bit = collects[word]
    check.that(bit, "calibrate: what='%s' is none of moments, covariances, outliers, rows, quantiles, queries", tostring(word))
    if bit > 0 and out % (2 * bit) >= bit then out = out - bit end
  end
  return out
end

-- Token ids drawn uniformly from the vocabulary.
local function noise(model, n)
  local ids = {}
  for i = 1, n do ids[i] = math.min(math.floor(lib.random(1, 0x77656967, i) * model.n_vocab), model.n_vocab - 1) end
  return ids
end

doc("model:calibrate", [[
  m:calibrate{ text = | tokens = | weights = true | artifact =, what =, chunks = 8, context = 512, skip = 4, rows = 1024, on_progress = } -> calibration
  kv.calibrate of this model; `?calibrate`.]])
function M.new(model, o)
  local from = {}
  for _, source in ipairs { "artifact", "text", "tokens", "weights" } do if o[source] then from[#from + 1] = source end end
  check.that(#from > 0, "calibrate: text =, tokens =, weights = true or artifact = is needed")
  check.that(#from == 1, "calibrate: %s and %s, one of them", from[1], from[2])
  if o.artifact then return load(model, o.artifact) end
  local context, chunks, skip = o.context or 512, o.chunks or 8, o.skip or 4
  check.that(context % 1 == 0 and context > skip and chunks >= 1, "calibrate: context=%s, chunks=%s, skip=%s: whole chunks longer than skip are needed", tostring(context), tostring(chunks), tostring(skip))
  local ids = o.tokens or o.text and model:tokenize(o.text, { add_special = false }) or noise(model, chunks * context)
  check.that(#ids >= context, "calibrate: %s has %d tokens, one chunk of context=%d needs as many", o.name or "the text", #ids, context)
  local h = K.handle("kv_calib", C.kv_calib_free, function(out) return C.kv_calib_new(out, model._m, o.rows or 0) end)
  check(C.kv_calib_leave_out(h, without(o.what)))
  local more, buf = ffi.new "int[1]", ffi.new("int32_t[?]", context)
  chunks = math.min(chunks, math.floor(#ids / context))
  for chunk = 0, chunks - 1 do
    for i = 0, context - 1 do buf[i] = ids[chunk * context + i + 1] end
    if model.add_bos then buf[0] = model.bos end
    check(C.kv_calib_begin(h, buf, context, skip))
    repeat
      check(C.kv_calib_step(h, more))
      if C.kv_interrupted() == 1 then check.fail("interrupted") end
    until more[0] == 0
    if o.on_progress then o.on_progress(chunk + 1, chunks) end
  end
  local self = wrap(model, h, o.source or o.weights and "none: the weights alone" or nil)
  if o.weights then return self end
  self.rest, self.first_chunk = {}, {}
  for i = 1, context do self.first_chunk[i] = i == 1 and model.add_bos and model.bos or ids[i] end
  for i = chunks * context + 1, #ids do self.rest[i - chunks * context] = ids[i] end
  return self
end

doc("kv.calibrate", [[
  kv.calibrate{ model =, text = | tokens = | weights = true | artifact =, what =, chunks = 8, context = 512, skip = 4, rows = 1024, on_progress = } -> calibration
  Runs the first chunks of a text through an exact cache and keeps, of every layer and K/V head: mean and second moment of K
  (as cached and before RoPE), V and the queries that read them, and `rows` tokens' K and V, the same tokens everywhere.  The
  first `skip` positions of each chunk are left out.  what: "moments" (means, covariances, outliers), "rows" (quantiles,
  codebooks) and "queries", a list or text; without it all.  Codecs made from rows refuse a calibration without them; those that
  weigh by queries then weigh all channels alike.  A text shorter than one chunk is an error.  weights: no text at all, the model
  reads tokens drawn uniformly from its vocabulary, so that everything is a function of its weights.  artifact: a saved one.
  Pass it as calib = to kv.policy.resolve, kv.eval and model:session's plans.
  c:save(path)  c:check(arm)  c:stats()  c:mean(side, l, h)  c:second(side, l, h)  c:rows(side, l, h)  c:quantile(side, l, h, shares)
  c:outliers(side, l, h, times)
  An artifact is numbers with checksums, never code; another model, layout or RoPE is refused with both digests.]])
function M.calibrate(o)
  check.that(type(o) == "table", "kv.calibrate: a table is needed: kv.calibrate{ model =, text = }")
  local model = type(o.model) == "string" and require("kelvin.model").open(o.model) or o.model
  check.that(type(model) == "table" and model._m, "kv.calibrate: model = a name, a path or kv.model(...) is needed")
  return M.new(model, o)
end

local what = { k = C.KV_CALIB_K, k_pre = C.KV_CALIB_K_PRE, v = C.KV_CALIB_V, q = C.KV_CALIB_Q, q_pre = C.KV_CALIB_Q_PRE }

--- For kelvin.plan: writes the mean of a slot; page: tokens in a page when keys are held in page-relative RoPE.
function Calib.__index:_mean(side, l, h, page, mean)
  if page and side == "k" then check(C.kv_calib_page_mean(self._c, l - 1, h - 1, page, mean))
  else check(C.kv_calib_mean(self._c, what[side], l - 1, h - 1, mean)) end
end

--- For kelvin.plan: the kept tokens' mean of |v - mean|² / |v|², v a token's values.  Above 1, what has to be coded is longer for the
-- token's own length, and so is its error.  nil: no rows were kept.
function Calib.__index:_stretch(l, h)
  if self.n_rows == 0 then return nil end
  local rows, mean, dim, sum = self:rows("v", l, h), self:mean("v", l, h), self.model.head_dim, 0
  local x, m = rows:_data(), mean:_data()
  for t = 0, self.n_rows - 1 do
    local all, less = 0, 0
    for d = t * dim, (t + 1) * dim - 1 do
      all = all + x[d] * x[d]
      less = less + (x[d] - m[d - t * dim]) ^ 2
    end
    sum = sum + (all > 0 and less / all or 1)
  end
  return sum / self.n_rows, rows, mean          -- the tensors too: what only a pointer leads to is Lua's to free
end

local function read(self, fn, side, l, h, shape)
  check.that(what[side], "calibration: side '%s' is none of k, k_pre, v, q, q_pre", tostring(side))
  local t = require("kelvin.tensor").zeros(shape)
  check(fn(self._c, what[side], l - 1, h - 1, t:_data()))
  return t
end

--- c:mean(side, layer, head): tensor [dim]; side "k" (as cached), "k_pre" (before RoPE), "v", "q" or "q_pre" (over the head's queries).
function Calib.__index:mean(side, l, h) return read(self, C.kv_calib_mean, side, l, h, { self.model.head_dim }) end

--- c:rms(side, layer, head): tensor [dim], of each channel with its mean.
function Calib.__index:rms(side, l, h) return read(self, C.kv_calib_rms, side, l, h, { self.model.head_dim }) end

--- c:second(side, layer, head): E x x^T, tensor [dim, dim].
function Calib.__index:second(side, l, h) return read(self, C.kv_calib_second, side, l, h, { self.model.head_dim, self.model.head_dim }) end

--- c:rows(side, layer, head): the kept rows of "k_pre" or "v", tensor [rows, dim].
function Calib.__index:rows(side, l, h)
  check.that(self.n_rows > 0, "calibration: rows were left out of this one")
  return read(self, C.kv_calib_rows, side, l, h, { self.n_rows, self.model.head_dim })
end

doc("calibration:outliers", [[
  c:outliers(side, layer, head [, times = 4]) -> { { channel =, rms =, times = }, ... }
  Channels whose rms is over `times` the median channel's, largest first; side as for c:mean.]])
function Calib.__index:outliers(side, l, h, times)
  times = times or 4
  check.that(type(times) == "number" and times > 0, "calibration: times=%s is not a number above 0", tostring(times))
  local rms, sorted, out = self:rms(side, l, h):_data(), {}, {}
  for d = 0, self.model.head_dim - 1 do sorted[d + 1] = rms[d] end
  table.sort(sorted)
  local median = sorted[math.ceil(#sorted / 2)]
  for d = 0, self.model.head_dim - 1 do
    if rms[d] > times * median then out[#out + 1] = { channel = d + 1, rms = rms[d], times = rms[d] / median } end
  end
  table.sort(out, function(a, b) return a.rms > b.rms end)
  return out
end

doc("calibration:quantile", [[
  c:quantile(side, layer, head, shares) -> tensor [#shares, dim]
  Quantiles of each channel over the kept rows, side "k_pre" or "v": c:quantile("v", 1, 1, { 0.01, 0.5, 0.99 }).]])
function Calib.__index:quantile(side, l, h, shares)
  local rows, n, dim = self:rows(side, l, h):_data(), self.n_rows, self.model.head_dim
  local out = require("kelvin.tensor").zeros { #shares, dim }
  local to, column = out:_data(), {}
  for d = 0, dim - 1 do
    for t = 0, n - 1 do column[t + 1] = rows[t * dim + d] end
    table.sort(column)
    for i, q in ipairs(shares) do
      check.that(type(q) == "number" and q >= 0 and q <= 1, "calibration: share %s is outside 0..1", tostring(q))
      local at = q * (n - 1) + 1
      local lo = math.floor(at)
      to[(i - 1) * dim + d] = column[lo] + (at - lo) * ((column[lo + 1] or column[lo]) - column[lo])
    end
  end
  return out
end

--- Digest of everything that was collected, which all tables are made from.
function Calib.__index:digest()
  if not self._digest then
    local hex = ffi.new "char[65]"
    check(C.kv_calib_digest(self._c, hex))
    self._digest = ffi.string(hex, 64)
  end
  return self._digest
end

--- For manifests.
function Calib.__index:describe()
  local i = info(self)
  return { n_tokens = self.n_tokens, chunks = self.chunks, context = self.context, skip = self.skip, rows = self.n_rows, what = self.what, tokens_sha256 = self.sha256, source = self.source,
    model_fingerprint = ffi.string(i.model), rope_sha256 = ffi.string(i.rope), sha256 = self:digest() }
end

function Calib:__tostring()
  return ("calibration of %s: %d tokens (%d chunks of %d, first %d of each left out), %d rows kept%s"):format(self.model.name, self.n_tokens, self.chunks, self.context, self.skip, self.n_rows,
    #self.what < 3 and ("; %s alone"):format(table.concat(self.what, ", ")) or "")
end

-- ---- the text that is scored must be another, and an oblivious codec must lose --------------------------------------------

local SAME = 4       -- runs of 32 tokens in common that two texts may not have; fewer are quotations and licenses

--- For kelvin.eval: refuses tokens (int32_t[n]) that the calibration has seen.
function Calib.__index:refuse_overlap(ids, n, who)
  local found, of = ffi.new "int[1]", ffi.new "int[1]"
  check(C.kv_calib_overlap(self._c, ids, n, found, of))
  local name = type(self.source) == "table" and self.source.name or self.source
  check.that(found[0] == 0 or found[0] < math.min(SAME, of[0]), "%s: %d of the calibration's %d runs of 32 tokens%s are in the scored text: calibrate on another text",
    who, found[0], of[0], name and (" (" .. tostring(name) .. ")") or "")
end

--- A check in words.
function M.verdict(c)
  return ("%s %s its data-oblivious twin on held-out text: KLD %.4g ± %.2g at %.3f bits, twin %.4g at the same bits (%s)"):format(c.arm,
    c.lost and "LOSES to" or "beats", c.kld, c.kld_se, c.bits, c.twin_kld, c.twin)
end

-- The scalar codec whose stored bits come next below and next above those of a calibrated one.
local function scalar_at(bits, head_dim, page_tokens, side)
  local codec = require "kelvin.codec"
  local below, above
  local p = codec.family("scalar").by_name.bits
  for b = p.min, p.max do
    local c = codec.new("scalar", { bits = b })
    local ok, i = pcall(c.info_for, c, head_dim, page_tokens, side)
    if ok and i.bits_payload <= bits * 1.0001 then below = c end
    if ok and i.bits_payload >= bits * 0.9999 then above = above or c end
  end
  return below or above, above or below
end

local function to_codec(spec)
  local codec = require "kelvin.codec"
  if codec.is(spec) then return spec end
  if type(spec) == "string" then spec = require("kelvin.arm").spec(spec) end
  local params = {}
  for name, value in pairs(spec) do if name ~= 1 then params[name] = value end end
  return codec.new(spec[1], params)
end

doc("calibration:check", [[
  c:check(arm [, { text = | tokens =, chunks = 4, context =, on_progress = }]) -> check
  The guard: KL divergence of an arm with this calibration and of its data-oblivious twin on held-out text (what of the
  calibration's text comes after it, unless another is given).  The twin has the same window and pages, the scalar codec
  (Hadamard, Lloyd-Max) in place of each calibrated one, no mean and no page-relative keys; its KLD at the arm's stored bits is
  interpolated between the next fewer and the next more bits.  check.lost: the calibrated arm is worse.  c:save keeps checks.]])
function Calib.__index:check(arm, o)
  o = o or {}
  local policies = require "kelvin.policy"
  local text = type(arm) == "string" and arm or arm.name or "arm"
  if type(arm) == "string" then arm = require("kelvin.arm").parse(arm) end
  local ids = o.tokens or (o.text and self.model:tokenize(o.text, { add_special = false })) or self.rest
  check.that(ids, "check: the calibration came from a file or from weights: text = or tokens = of held-out text is needed")
  local context = o.context or math.min(512, self.context)
  check.that(#ids >= context, "check: %d held-out tokens, context=%d needs as many; calibrate on fewer chunks or give another text", #ids, context)
  local plan = policies.resolve(policies.of(arm), self.model, { calib = self })
  local low, high, words = {}, {}, {}
  for key, value in pairs(arm) do low[key], high[key] = value, value end
  low.mean, low.page_rope, high.mean, high.page_rope, low.name, high.name = "none", "none", "none", "none", "twin below", "twin above"
  for _, side in ipairs { "k", "v" } do
    local c = to_codec(arm[side])
    if c.has_tables then
      low[side], high[side] = scalar_at(plan.bits_payload[side], self.model.head_dim, plan.page_tokens, side)
      words[#words + 1] = ("%s %s"):format(side, low[side]:value "bits" == high[side]:value "bits" and "scalar-" .. low[side]:value "bits"
        or ("scalar-%d..%d"):format(low[side]:value "bits", high[side]:value "bits"))
    end
  end
  if #words == 0 then words[1] = "the same codecs without mean" end
  local rows = require("kelvin.eval").run { model = self.model, tokens = ids, context = context, chunks = o.chunks or 4, calib = self, controls = false, first_group = 3,
    arms = { plan, low, high }, on_progress = o.on_progress }
  if rows.interrupted then check.fail("interrupted") end
  local a, x, y = rows[1], rows[2], rows[3]
  local twin = y.kld.mean
  if y.bits_payload - x.bits_payload > 1e-9 then
    local share = (a.bits_payload - x.bits_payload) / (y.bits_payload - x.bits_payload)
    twin = math.exp(math.log(x.kld.mean) * (1 - share) + math.log(y.kld.mean) * share)       -- KLD falls by a factor a bit
  end
  local beats = a.kld.mean < twin                        -- false for nan, too
  local c = { arm = text, twin = table.concat(words, ", "), bits = a.bits_payload, kld = a.kld.mean, kld_se = a.kld.se, twin_kld = twin, twin_bits = { x.bits_payload, y.bits_payload },
    lost = not beats, n = a.n_scored, context = context }
  self.notes.checks = self.notes.checks or {}
  table.insert(self.notes.checks, c)
  return setmetatable(c, { __tostring = M.verdict })
end

doc("calibration:save", [[
  c:save(path) -> c
  Writes the artifact: moments, rows, digests of model, RoPE and text, the checks made so far.  docs/formats.md has the bytes.
  kv.calibrate{ model =, artifact = path } reads it; a check that was lost is told then, too.]])
function Calib.__index:save(path)
  check.that(type(path) == "string", "calibration:save: a path is needed")
  self.notes.text = self.source
  check(C.kv_calib_note(self._c, json.encode { text = self.notes.text, checks = self.notes.checks and json.array(self.notes.checks) or nil }))
  check(C.kv_calib_save(self._c, path))
  for _, c in ipairs(self.notes.checks or {}) do
    if c.lost then log.warn("artifact '%s': %s", path, M.verdict(c)) end
  end
  return self
end

-- ---- figures per layer ------------------------------------------------------------------------------------------------------

doc("calibration:stats", [[
  c:stats() -> stats
  stats[l].k and stats[l].v hold rms (of one element), mean_share (share of the energy that a per-channel mean takes away),
  outlier (largest channel rms over the median one) and hardness (rms of what is left after the mean).
  stats:rank(l, side) -> 1 for the layer with the greatest hardness, n_layers for the least.]])
function Calib.__index:stats()
  if not self._stats then self._stats = setmetatable({ calib = self, layers = {}, ranks = {} }, Stats) end
  return self._stats
end

local function layer_stats(stats, l)
  local c = stats.calib
  check.that(type(l) == "number" and l >= 1 and l <= c.model.n_layers, "stats: layer %s is outside 1..%d", tostring(l), c.model.n_layers)
  local out, heads, dim = {}, c.model.n_kv_heads, c.model.head_dim
  for _, side in ipairs { "k", "v" } do
    local energy, centred, channel = 0, 0, {}
    for h = 1, heads do
      local mean, rms = c:mean(side, l, h):_data(), c:rms(side, l, h):_data()
      for d = 0, dim - 1 do
        energy, centred = energy + rms[d] ^ 2, centred + math.max(0, rms[d] ^ 2 - mean[d] ^ 2)
        channel[#channel + 1] = rms[d]
      end
    end
    table.sort(channel)
    out[side] = { rms = math.sqrt(energy / (heads * dim)), mean_share = 1 - centred / energy, outlier = channel[#channel] / channel[math.ceil(#channel / 2)],
      hardness = math.sqrt(centred / (heads * dim)) }
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
