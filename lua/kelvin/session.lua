--- kelvin.session: one sequence over a cache that a plan shapes.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local tensor = require "kelvin.tensor"
local bytes = require "kelvin.bytes"
local doc = require("kelvin.help").doc

local M, Session = {}, {}
Session.__index, Session.__name = {}, "session"

local PIECE = 512        -- tokens fed in one C call: well under a second on a small model, so Ctrl-C is heard

doc("model:session", [[
  m:session{ policy = | plan = | arm = "k=turboquant-4,v=turboquant-3", max_tokens = 4096, calib =, seed =, path = "fused" } -> session
  One sequence.  With none of policy, plan, arm the cache is exact f32 (the reference).  path: "fused" attends on codes where the
  codec can, "tile" decodes a tile and then attends, "bf16" (on a device) is "fused" with many tokens at once by bf16 products.
  s:feed(text or ids)  s:logits()  s:generate{...}  s:tap{...}  s:read{...}  s:bytes()  s:fork()  s:truncate(n)  s.n_tokens]])
function M.new(model, o)
  local plan = o.plan
  if not plan and (o.policy or o.arm) then
    plan = require("kelvin.policy").resolve(o.policy or o.arm, model, { calib = o.calib, seed = o.seed })
  end
  local max_tokens = o.max_tokens or math.min(model.n_ctx_train > 0 and model.n_ctx_train or 4096, 4096)
  check.that(type(max_tokens) == "number" and max_tokens >= 1 and max_tokens < 2 ^ 31, "session: max_tokens=%s is not a whole number from 1", tostring(max_tokens))
  local s = K.handle("kv_session", C.kv_session_free, function(out) return C.kv_session_new(out, model._m, plan and plan.handle or nil, max_tokens) end)
  local self = setmetatable({ _s = s, model = model, plan = plan, max_tokens = max_tokens, ids = {} }, Session)
  model:_beyond(max_tokens)
  if o.path then self:path(o.path) end
  return self
end

local paths = { fused = C.KV_PATH_FUSED, tile = C.KV_PATH_TILE, bf16 = 2 }          -- core/backend.h

--- s:path "fused", "tile" or, on a device, "bf16".
function Session.__index:path(path)
  check.that(paths[path], "session: path '%s' is not fused, tile or bf16", tostring(path))
  check(C.kv_session_path(self._s, paths[path]))
  return self
end

local wants = { none = 0, last = 1, all = 2 }

doc("session:feed", [[
  s:feed(text or ids [, { logits = "last" }]) -> session
  Appends tokens.  One token is a decode step on codes; more go in one pass in which every query sees what token-by-token
  feeding would have shown it.  Text gets the model's BOS at the start only.  logits: "last", "all" (small texts) or "none".]])
function Session.__index:feed(what, o)
  local ids = what
  if type(what) == "string" then ids = self.model:tokenize(what, { add_special = #self.ids == 0, parse_special = o and o.parse_special })
  elseif type(what) == "number" then ids = { what } end
  local buf, n = self.model:_ids(ids, "feed")
  check.that(n > 0, "feed: no tokens")
  check.that(#self.ids + n <= self.max_tokens, "feed: %d tokens after %d, max_tokens=%d", n, #self.ids, self.max_tokens)
  local want = o and o.logits or "last"
  check.that(wants[want], "feed: logits='%s' is none of none, last, all", tostring(want))
  local step = want == "all" and n or PIECE
  for at = 0, n - 1, step do
    local part = math.min(step, n - at)
    local w = wants[want]
    if w == 1 and at + part < n then w = 0 end
    check(C.kv_session_feed(self._s, buf + at, part, w))
    for i = at + 1, at + part do self.ids[#self.ids + 1] = ids[i] end
    if C.kv_interrupted() == 1 then check.fail("interrupted") end
  end
  self.n_logits = want == "all" and n or want == "last" and 1 or 0
  return self
end

--- s:logits(): tensor [vocab] of the last token, or [tokens, vocab] after logits = "all"; a copy.
function Session.__index:logits()
  local p = C.kv_session_logits(self._s)
  check.that(p ~= nil and (self.n_logits or 0) > 0, "session: no logits: feed tokens with logits = \"last\" first")
  local v = self.model.n_vocab
  local shape = self.n_logits == 1 and { v } or { self.n_logits, v }
  local t = tensor.zeros(shape)
  ffi.copy(t:_data(), p, 4 * v * self.n_logits)
  t.labels = self.n_logits == 1 and { "vocab" } or { "tokens", "vocab" }
  return t
end

function Session.__index:sample(params, counter)
  local out = ffi.new "int[1]"
  check(C.kv_sample(C.kv_session_logits(self._s), self.model.n_vocab, params, counter, out))
  return out[0]
end

doc("session:generate", [[
  s:generate{ prompt =, max_tokens = 128, temperature = 0, top_k = 0, top_p = 1, seed = 1, stop_at_end = true, on_text = } -> text, report
  Feeds the prompt (if given) and samples on.  temperature 0 is greedy.  on_text(piece) is called as whole characters appear.
  report: n_prompt, n_tokens, prefill_tokens_per_s, decode_tokens_per_s, decode_s, ended, ids.]])
function Session.__index:generate(o)
  o = o or {}
  local report = { n_prompt = 0, ids = {} }
  local t0 = C.kv_now()
  if o.prompt then
    local before = #self.ids
    self:feed(o.prompt, o)
    report.n_prompt = #self.ids - before
    report.prefill_tokens_per_s = report.n_prompt / (C.kv_now() - t0)
  end
  check.that((self.n_logits or 0) == 1, "generate: no logits to start from: give a prompt, or feed one")
  local p = ffi.new("kv_sampler_params", { temperature = o.temperature or 0, top_p = o.top_p or 1, seed = o.seed or 1, top_k = o.top_k or 0 })
  local room = math.min(o.max_tokens or 128, self.max_tokens - #self.ids)
  local pieces, pending = {}, ""
  t0 = C.kv_now()
  local fed, drawn = 0, ffi.new "int[1]"
  local id = room > 0 and self:sample(p, #self.ids)
  for i = 1, room do
    if self.model:is_end(id) and o.stop_at_end ~= false then report.ended = "end" break end
    report.ids[i] = id
    pending = pending .. self.model:detokenize { id }
    -- A character may spread over tokens: hold back the bytes of one that is not complete.
    local whole, rest = M.split_utf8(pending)
    if #whole > 0 then
      pieces[#pieces + 1] = whole
      if o.on_text then o.on_text(whole) end
    end
    pending = rest
    -- The last one's logits are what s:logits() and a next generate find; others may stay on a device.
    check(C.kv_session_next(self._s, id, p, i == room and 1 or 2, drawn))
    fed = fed + 1
    self.ids[#self.ids + 1] = id
    id = drawn[0]
    if C.kv_interrupted() == 1 then report.ended = "interrupted" break end
  end
  self.n_logits = C.kv_session_logits(self._s) ~= nil and 1 or 0
  if #pending > 0 then
    pieces[#pieces + 1] = pending
    if o.on_text then o.on_text(pending) end
  end
  report.ended = report.ended or "length"
  report.decode_s, report.n_tokens = C.kv_now() - t0, #report.ids
  report.decode_tokens_per_s = fed / report.decode_s
  return table.concat(pieces), report
end

--- Text up to the last whole UTF-8 character, and the bytes after it.
function M.split_utf8(s)
  local n = #s
  for back = 1, math.min(3, n) do
    local b = s:byte(n - back + 1)
    if b >= 0xc0 then
      local need = b >= 0xf0 and 4 or b >= 0xe0 and 3 or 2
      if back < need then return s:sub(1, n - back), s:sub(n - back + 1) end
      break
    elseif b < 0x80 then break end
  end
  return s, ""
end

doc("session:save", [[
  s:save(path [, { stage = "raw", level = }]) -> path
  The whole cache as a file, with its tokens, its codecs and the last logits: kv.save(path, s).  kv.load(path) gives a session
  that goes on with the same logits as this one would.]])
function Session.__index:save(path, o) return require("kelvin.container").save(path, self, o) end

function Session.__index:_save(path, stage, level)
  local json, plans = require "kelvin.json", require "kelvin.plan"
  local m = self.model
  local about = { about = ("cache of %s: %s, %d tokens of %d"):format(m.name, self.plan and self.plan.name or "exact f32", #self.ids, self.max_tokens), model = { name = m.name, path = m.path },
    plan = self.plan and plans._describe(self.plan) or nil }
  check(C.kv_session_save(self._s, path, (m:_ids(self.ids, "save")), json.encode(about), stage, level))
end

--- For kelvin.container: the session in a file.
function M._load(file, o)
  local models, plans = require "kelvin.model", require "kelvin.plan"
  local about = file.sections[1].meta
  local of = type(about.model) == "table" and about.model or {}
  local name, place = type(of.name) == "string" and of.name or nil, type(of.path) == "string" and of.path or nil
  local m = o.model or name and select(2, models.find(name)) and name or place
  check.that(m, "kv.load: file '%s' does not say which model it belongs to: model = is needed", file.path)
  if type(m) == "string" then m = models.open(m) end
  local s = K.handle("kv_session", C.kv_session_free, function(out) return C.kv_session_load(out, m._m, file._p, o.max_tokens or 0, o.salvage and 1 or 0) end)
  local plan = about.plan and plans._loaded(ffi.gc(C.kv_session_plan(s), C.kv_plan_free), about.plan) or nil
  local self = setmetatable({ _s = s, model = m, plan = plan, max_tokens = C.kv_session_max_tokens(s), ids = {} }, Session)
  local tokens = file:page(1, 5)
  check.that(#tokens >= 4 * self.n_tokens, "kv.load: file '%s' has %d bytes of tokens for %d", file.path, #tokens, self.n_tokens)
  local ids = ffi.cast("const int32_t*", tokens)
  for i = 1, self.n_tokens do self.ids[i] = ids[i - 1] end
  self.n_logits = C.kv_session_logits(s) ~= nil and 1 or 0
  return self
end

--- s:tap{ layer =, what = "k" | "v" | "q" | "k_pre" | "q_pre" }: that tensor over the session's tokens, f32, exact cache.
function Session.__index:tap(o)
  check.that(#self.ids > 0, "tap: the session has no tokens")
  return self.model:tap { tokens = self.ids, layer = o.layer, what = o.what or "k" }
end

doc("session:read", [[
  s:read{ layer =, head =, side = "k", first = 1, last = n_tokens } -> tensor [tokens, dim]
  The cache's rows as attention reads them: exact where they are exact, decoded where they are coded.]])
function Session.__index:read(o)
  local side = o.side or "k"
  check.that(side == "k" or side == "v", "read: side '%s' is neither k nor v", tostring(side))
  self.model:layer(o.layer)
  local head, first, last = o.head or 1, o.first or 1, o.last or #self.ids
  check.that(head >= 1 and head <= self.model.n_kv_heads, "read: head %s is outside 1..%d", tostring(head), self.model.n_kv_heads)
  check.that(first >= 1 and first <= last and last <= #self.ids, "read: tokens %s..%s are outside 1..%d", tostring(first), tostring(last), #self.ids)
  local t = tensor.zeros { last - first + 1, self.model.head_dim }
  t.labels = { "tokens", "dim" }
  check(C.kv_session_read(self._s, o.layer - 1, head - 1, side == "k" and C.KV_SIDE_K or C.KV_SIDE_V, first - 1, last, t:_data()))
  return t
end

--- s:bytes([layer, side]): the ledger, from allocations, and all-in bits per element.
function Session.__index:bytes(layer, side)
  local b = ffi.new "kv_bytes[1]"
  local m = self.model
  local per_layer = #self.ids * m.n_kv_heads * m.head_dim
  if layer then
    check(C.kv_session_layer_bytes(self._s, layer - 1, side == "v" and C.KV_SIDE_V or C.KV_SIDE_K, b))
    return bytes.new(b[0], per_layer)
  end
  check(C.kv_session_bytes(self._s, b))
  return bytes.new(b[0], per_layer * 2 * m.n_layers)
end

--- s:pairs(): compressed, total (query, key) pairs, their ratio `fraction`, and tokens_compressed.
function Session.__index:pairs()
  local p = ffi.new "kv_pairs[1]"
  check(C.kv_session_pairs(self._s, p))
  return { compressed = p[0].compressed, total = p[0].total, tokens_compressed = p[0].tokens_compressed, fraction = p[0].total > 0 and p[0].compressed / p[0].total or 0 }
end

--- s:truncate(n): keeps the first n tokens.
function Session.__index:truncate(n)
  check.that(type(n) == "number" and n >= 0 and n <= #self.ids, "truncate: %s is outside 0..%d", tostring(n), #self.ids)
  check(C.kv_session_truncate(self._s, n))
  for i = #self.ids, n + 1, -1 do self.ids[i] = nil end
  self.n_logits = 0
  return self
end

--- s:fork(): an independent copy that goes its own way.
function Session.__index:fork()
  local s = K.handle("kv_session", C.kv_session_free, function(out) return C.kv_session_fork(out, self._s) end)
  local copy = setmetatable({ _s = s, model = self.model, plan = self.plan, max_tokens = self.max_tokens, ids = {}, n_logits = 0 }, Session)
  for i, id in ipairs(self.ids) do copy.ids[i] = id end
  return copy
end

--- For kelvin.kvtc: n tokens' rows have come from elsewhere.
function Session.__index:_adopt(ids)
  for i, id in ipairs(ids) do self.ids[i] = id end
  self.n_logits = 0
  return self
end

--- s:mutate(share [, seed]): flips every bit of about that share of the bytes of compressed pages; returns how many.
function Session.__index:mutate(share, seed)
  local n = ffi.new "double[1]"
  check(C.kv_session_mutate(self._s, seed or 1, share, n))
  return n[0]
end

--- s:paths(): what attention did, such as "k: fused avx512, v: tile".
function Session.__index:paths() return ffi.string(C.kv_session_paths(self._s)) end

local methods = Session.__index
function Session.__index(self, key)
  if key == "n_tokens" then return C.kv_session_n_tokens(rawget(self, "_s")) end
  return methods[key]
end

function Session:__tostring()
  local n = #self.ids
  local what = self.plan and self.plan.name or "exact f32"
  if n == 0 then return ("session of %s: %s, no tokens"):format(self.model.name, what) end
  local b = self:bytes()
  return ("session of %s: %s, %d tokens, %.0f bytes (%.3f bits/elem)"):format(self.model.name, what, n, b.total, b.bits)
end

return M
