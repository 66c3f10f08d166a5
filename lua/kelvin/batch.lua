--- kelvin.batch: sequences that decode together on the model's device, each at its own length.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local doc = require("kelvin.help").doc

local M, Batch = {}, {}
Batch.__index, Batch.__name = {}, "batch"

doc("model:batch", [[
  m:batch{ policy = | plan = | arm = "turboquant-4", n_seqs = 8, max_tokens = 4096, calib =, seed =, path = "fused" } -> batch
  n_seqs sequences of one plan, decoded together; the model is on a device (kv.model(name, { device = "cuda" })).
  b:feed(ids)  the same to all    b:generate{ first =, n_steps = } -> ids of each sequence, seconds    b:truncate(n)  b:bytes()  b:paths()]])
function M.new(model, o)
  local plan = o.plan
  if not plan and (o.policy or o.arm) then plan = require("kelvin.policy").resolve(o.policy or o.arm, model, { calib = o.calib, seed = o.seed }) end
  local n_seqs, max_tokens = o.n_seqs or 1, o.max_tokens or 4096
  check.that(type(n_seqs) == "number" and n_seqs >= 1 and n_seqs % 1 == 0 and n_seqs <= 65536, "batch: n_seqs=%s is not a whole number in 1..65536", tostring(n_seqs))
  check.that(type(max_tokens) == "number" and max_tokens >= 1 and max_tokens < 2 ^ 31, "batch: max_tokens=%s is not a whole number from 1", tostring(max_tokens))
  local b = K.handle("kv_batch", C.kv_batch_free, function(out) return C.kv_batch_new(out, model._m, plan and plan.handle or nil, n_seqs, max_tokens) end)
  local self = setmetatable({ _b = b, model = model, plan = plan, n_seqs = n_seqs, max_tokens = max_tokens }, Batch)
  if o.path then
    local path = ({ fused = C.KV_PATH_FUSED, tile = C.KV_PATH_TILE, bf16 = 2 --[[ core/backend.h ]] })[o.path]
    check.that(path, "batch: path '%s' is not fused, tile or bf16", tostring(o.path))
    check(C.kv_batch_path(b, path))
  end
  return self
end

--- b:feed(ids): the same tokens to every sequence; lists of ids, one a sequence, each to its own.
function Batch.__index:feed(ids)
  check.that(type(ids) == "table" and #ids > 0, "batch: no tokens")
  local each = type(ids[1]) == "table"
  local n = each and #ids[1] or #ids
  check.that(not each or #ids == self.n_seqs, "batch: %d lists of tokens for %d sequences", #ids, self.n_seqs)
  local buf = ffi.new("int32_t[?]", math.max(1, each and n * self.n_seqs or n))
  for s = 1, each and self.n_seqs or 1 do
    local list = each and ids[s] or ids
    check.that(#list == n, "batch: sequence %d gets %d tokens, the first %d", s, #list, n)
    ffi.copy(buf + (s - 1) * n, (self.model:_ids(list, "batch")), 4 * n)
  end
  check(C.kv_batch_feed(self._b, buf, n, each and 0 or 1, nil))
  return self
end

--- b:skip(n): n tokens whose rows are never written, for measuring speed at a depth.
function Batch.__index:skip(n)
  check(C.kv_batch_skip(self._b, n))
  return self
end

--- b:generate{ first = { id of each sequence }, n_steps = 16, temperature =, top_k =, top_p =, seed = } -> { ids of each }, seconds of the device.
function Batch.__index:generate(o)
  local n = o.n_steps or 16
  check.that(type(n) == "number" and n >= 1 and n % 1 == 0, "batch: n_steps=%s is not a whole number from 1", tostring(n))
  check.that(type(o.first) == "table" and #o.first == self.n_seqs, "batch: first = a token of each of %d sequences is needed", self.n_seqs)
  local first = self.model:_ids(o.first, "batch")
  local params = ffi.new("kv_sampler_params", { o.temperature or 0, o.top_p or 1, o.seed or 1, o.top_k or 0 })
  local out, seconds = ffi.new("int32_t[?]", n * self.n_seqs), ffi.new "double[1]"
  check(C.kv_batch_generate(self._b, first, n, params, out, seconds))
  local ids = {}
  for s = 1, self.n_seqs do
    ids[s] = {}
    for t = 1, n do ids[s][t] = out[(t - 1) * self.n_seqs + s - 1] end
  end
  return ids, seconds[0]
end

--- b:truncate(n): every sequence to n tokens.
function Batch.__index:truncate(n)
  for s = 0, self.n_seqs - 1 do check(C.kv_batch_truncate(self._b, s, n)) end
  return self
end

function Batch.__index:n_tokens(s) return C.kv_batch_n_tokens(self._b, s - 1) end

function Batch.__index:bytes()
  local b = ffi.new "kv_bytes[1]"
  check(C.kv_batch_bytes(self._b, b))
  local tokens, m = 0, self.model
  for s = 1, self.n_seqs do tokens = tokens + self:n_tokens(s) end
  return require("kelvin.bytes").new(b[0], tokens * m.n_kv_heads * m.head_dim * 2 * m.n_layers)
end

function Batch.__index:paths() return ffi.string(C.kv_batch_paths(self._b)) end

--- b:free(): its memory now, not when the collector comes by.
function Batch.__index:free()
  if self._b then
    C.kv_batch_free(ffi.gc(self._b, nil))
    self._b = nil
  end
end

return M
