--- kelvin.model: a model file, its tokenizer and its geometry.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local config = require "kelvin.config"
local doc = require("kelvin.help").doc

local M, Model = {}, {}
Model.__index, Model.__name = {}, "model"

local function text(p) return p ~= nil and ffi.string(p) or "" end

--- The folder that model files are kept in: KELVIN_MODELS, or the user's cache.
function M.folder()
  local f = os.getenv "KELVIN_MODELS"
  if f and f ~= "" then return f end
  local cache = os.getenv "XDG_CACHE_HOME"
  if not cache or cache == "" then cache = (os.getenv "HOME" or ".") .. "/.cache" end
  return cache .. "/kelvin/models"
end

--- Where a name or a path leads, and whether a file is there: path, present, config.
function M.find(name)
  if name:find "/" or name:match "%.gguf$" then return name, K.exists(name) end
  local c = config.load("models", name)
  local path = ("%s/%s.gguf"):format(M.folder(), name)
  return path, K.exists(path), c
end

--- Names in configs/models/: { name, about, present, path, config }.
function M.list()
  local rows = {}
  for _, name in ipairs(config.list "models") do
    local path, present, c = M.find(name)
    rows[#rows + 1] = { name = name, about = c.about, path = path, present = present, config = c }
  end
  return setmetatable(rows, { __tostring = function(t)
    local out = {}
    for i, r in ipairs(t) do out[i] = ("  %-16s %-9s %s"):format(r.name, r.present and "here" or "not here", r.about) end
    return table.concat(out, "\n")
  end })
end

doc("kv.model", [[
  kv.model(name or path [, { device = "cuda", weights = "stored" }]) -> model
  A name of configs/models/ (looked up in KELVIN_MODELS, else ~/.cache/kelvin/models) or a path of a .gguf file.
  device: "cpu", "cuda" or "cuda:1"; sessions, evaluations and taps of the model run there.  weights: "stored" (the file's blocks, products in
  f32) or "bf16" (products in bf16 with f32 sums, faster for many rows).  m:to(device) moves it later; m.device is where it is.
  m.n_layers n_heads n_kv_heads head_dim n_vocab n_ctx_train arch weight_type bos eos add_bos has_kv_bias
  m:tokenize(text) -> ids   m:detokenize(ids) -> text   m:session{...}   m:tap{...}   m:calibrate{...}   m:layer(l)]])
function M.open(name, o)
  check.that(type(name) == "string", "kv.model: a %s given, a name or path is needed", type(name))
  local path, present, c = M.find(name)
  if not present then
    if path == name then check.fail("model '%s': no such file", name) end
    if not c then
      local names = config.list "models"
      check.fail("model '%s' is unknown%s", name, check.suggest(name, names, "known"))
    end
    check.fail("model '%s' is not here: kelvin models get %s", name, name)
  end
  local m = K.handle("kv_model", C.kv_model_free, function(out) return C.kv_model_open(out, path) end)
  local self = M._of(m, path == name and name:match "([^/]+)$":gsub("%.gguf$", "") or name, path)
  self.config = c
  local device = o and o.device or M.device
  return device and device ~= "cpu" and self:to(device, o and o.weights) or self
end

--- For this module: a handle with its fields.
function M._of(m, name, path)
  local info = ffi.new "kv_model_info[1]"
  check(C.kv_model_get_info(m, info))
  local i = info[0]
  local self = { _m = m, path = path, name = name, title = text(i.name), arch = text(i.arch), weight_type = text(i.weight_type),
    tokenizer = text(i.tokenizer), chat_template = text(i.chat_template), has_kv_bias = i.has_kv_bias ~= 0, add_bos = i.add_bos ~= 0 }
  for _, f in ipairs { "n_layers", "n_heads", "n_kv_heads", "head_dim", "n_embd", "n_ff", "n_vocab", "n_ctx_train", "n_rot", "bos", "eos",
    "file_bytes", "n_params", "weight_bytes", "rope_base", "norm_eps" } do self[f] = i[f] end
  return setmetatable(self, Model)
end

--- The device that models are put on when kv.model is not told one (the program's --device).
M.device = nil

local storage = { stored = 0, bf16 = 1 }

--- m:to(device [, weights]): copies the weights there once; sessions that exist stay where they are.
function Model.__index:to(device, weights)
  check.that(type(device) == "string", "model:to: a %s given, the name of a device is needed", type(device))
  weights = weights or "stored"
  check.that(storage[weights], "model:to: weights '%s' is none of stored, bf16", tostring(weights))
  check(C.kv_model_device(self._m, device, storage[weights]))
  self.device = device ~= "cpu" and device or nil
  self.device_name = self.device and require("kelvin.lib").device(device).name or nil
  self.device_weights = self.device and weights or nil
  return self
end

doc("kv.synthetic", [[
  kv.synthetic(name, { n_layers =, n_heads =, n_kv_heads =, head_dim =, n_embd =, n_ff =, n_vocab =, rope_base = } [, device = "cuda"]) -> model
  A model of a shape alone with random bf16 weights, made on a device: for measuring speed.  It has no tokenizer and no file.]])
function M.synthetic(name, shape, device)
  check.that(type(shape) == "table", "kv.synthetic: a %s given, a table of sizes is needed", type(shape))
  device = device or M.device or "cuda"
  local s = ffi.new("kv_model_shape", shape)
  local m = K.handle("kv_model", C.kv_model_free, function(out) return C.kv_model_synthetic(out, name, s, device) end)
  local self = M._of(m, name, "")
  self.device, self.device_name, self.device_weights = device, require("kelvin.lib").device(device).name, "bf16"
  return self
end

function Model:__tostring()
  return ("model %s: %s, %d layers, %d q heads, %d kv heads, head_dim %d, vocab %d, %s, %.1f MB%s"):format(self.name, self.arch, self.n_layers, self.n_heads,
    self.n_kv_heads, self.head_dim, self.n_vocab, self.weight_type, self.file_bytes / 1e6, self.device and (", on %s (%s)"):format(self.device, self.device_name) or "")
end

--- m:layer(l): sliding_window (0: global), rope_base, rope_scale.
function Model.__index:layer(l)
  local info = ffi.new "kv_layer_info[1]"
  check.that(type(l) == "number" and l >= 1 and l <= self.n_layers, "model '%s': layer %s is outside 1..%d", self.name, tostring(l), self.n_layers)
  check(C.kv_model_layer(self._m, l - 1, info))
  return { sliding_window = info[0].sliding_window, rope_base = info[0].rope_base, rope_scale = info[0].rope_scale }
end

--- m:key_bias(l): tensor [kv heads, dim] as the cache holds it (half-split order), or nil.
function Model.__index:key_bias(l)
  self:layer(l)
  local p = C.kv_model_key_bias(self._m, l - 1)
  if p == nil then return nil end
  return require("kelvin.tensor")._over(p, { self.n_kv_heads, self.head_dim }, self._m, { "heads", "dim" })
end

--- m:meta(): list of { key, value } of the file's metadata, as text.
function Model.__index:meta()
  local k, v, out = ffi.new "const char*[1]", ffi.new "const char*[1]", {}
  while C.kv_model_meta_at(self._m, #out, k, v) == 0 do out[#out + 1] = { ffi.string(k[0]), ffi.string(v[0]) } end
  return out
end

--- m:tensors(): list of { name, type, shape, bytes } of the file.
function Model.__index:tensors()
  local name, kind, n, shape, bytes = ffi.new "const char*[1]", ffi.new "const char*[1]", ffi.new "int[1]", ffi.new "double[4]", ffi.new "double[1]"
  local out = {}
  while C.kv_model_tensor_at(self._m, #out, name, kind, n, shape, bytes) == 0 do
    local s = {}
    for d = 1, n[0] do s[d] = shape[d - 1] end
    out[#out + 1] = { name = ffi.string(name[0]), type = ffi.string(kind[0]), shape = s, bytes = bytes[0] }
  end
  return out
end

doc("model:tokenize", [[
  m:tokenize(text [, { add_special = true, parse_special = false }]) -> list of ids
  The tokenizer of the model file.  add_special: the model's BOS if it wants one; parse_special: <|im_start|> and the like
  become their own token.  m:detokenize(ids) is the text again.]])
function Model.__index:tokenize(s, o)
  check.that(type(s) == "string", "tokenize: a %s given, text is needed", type(s))
  o = o or {}
  local add, special = o.add_special ~= false and 1 or 0, o.parse_special and 1 or 0
  local n = ffi.new "int[1]"
  local cap = #s + 16
  local buf = ffi.new("int32_t[?]", cap)
  check(C.kv_tokenize(self._m, s, #s, add, special, buf, cap, n))
  local ids = {}
  for i = 1, n[0] do ids[i] = buf[i - 1] end
  return ids
end

--- For modules here: ids as int32_t[n], checked.
function Model.__index:_ids(ids, what)
  check.that(type(ids) == "table", "%s: a %s given, a list of token ids is needed", what, type(ids))
  local n = #ids
  local buf = ffi.new("int32_t[?]", math.max(n, 1))
  for i = 1, n do
    local id = ids[i]
    check.that(type(id) == "number" and id >= 0 and id < self.n_vocab and id % 1 == 0, "%s: token %d is %s, outside 0..%d", what, i, tostring(id), self.n_vocab - 1)
    buf[i - 1] = id
  end
  return buf, n
end

function Model.__index:detokenize(ids)
  if type(ids) == "number" then ids = { ids } end
  local buf, n = self:_ids(ids, "detokenize")
  if n == 0 then return "" end
  local cap, got = n * 16 + 64, ffi.new "int[1]"
  local out = ffi.new("char[?]", cap)
  local status = C.kv_detokenize(self._m, buf, n, out, cap, got)
  if status == C.KV_E_ARG and got[0] > cap then
    cap = got[0]
    out = ffi.new("char[?]", cap)
    status = C.kv_detokenize(self._m, buf, n, out, cap, got)
  end
  check(status)
  return ffi.string(out, got[0])
end

--- For modules here: the words for a context that passes what the model was trained for, else nil.  stderr has them once a model.
function Model.__index:_beyond(n_tokens)
  if n_tokens <= self.n_ctx_train then return nil end
  local words = ("context of %d tokens is beyond the %d that model '%s' was trained for"):format(n_tokens, self.n_ctx_train, self.name)
  if not self._told_beyond then require("kelvin.log").warn("%s", words) end
  self._told_beyond = true
  return words
end

--- m:is_end(id): whether a token ends a text or a turn.
function Model.__index:is_end(id) return C.kv_token_is_end(self._m, id) ~= 0 end

doc("model:chat", [[
  m:chat(role, text [, place = "later"]) -> text
  One turn as the model's template writes it, for m:tokenize(text, { parse_special = true }).  role: system, user, assistant;
  nil opens the assistant's turn.  place: "first" opens the conversation, "second" follows a system turn that did, "later".]])
local places = { later = 0, first = 1, second = 2 }
function Model.__index:chat(role, s, place)
  place = place or "later"
  check.that(places[place], "chat: place '%s' is none of first, second, later", tostring(place))
  local n = ffi.new "int[1]"
  local cap = #(s or "") + 1024
  local buf = ffi.new("char[?]", cap)
  check(C.kv_chat_format(self._m, role, s, places[place], buf, cap, n))
  return ffi.string(buf, n[0])
end

doc("model:tap", [[
  m:tap{ text = | tokens =, layer = } -> { q, q_pre, k, k_pre, v }
  Q, K and V of one layer over a text, f32, exact cache: q [heads, tokens, dim], k and v [kv heads, tokens, dim]; *_pre before
  RoPE.  Keys are in half-split (NeoX) channel order.  With what = "k" only that tensor; layer = "all": of every layer, in one
  pass, [layers, heads, tokens, dim].]])
function Model.__index:tap(o)
  local tensor = require "kelvin.tensor"
  local ids = o.tokens or self:tokenize(check.that(o.text, "tap: text = or tokens = is needed"))
  local all = o.layer == "all"
  if not all then self:layer(o.layer) end
  local buf, n = self:_ids(ids, "tap")
  check.that(n > 0, "tap: no tokens")
  local out = {}
  for _, what in ipairs { "q", "q_pre", "k", "k_pre", "v" } do
    if not o.what or o.what == what then
      local heads = what:sub(1, 1) == "q" and self.n_heads or self.n_kv_heads
      out[what] = tensor.zeros(all and { self.n_layers, heads, n, self.head_dim } or { heads, n, self.head_dim })
    end
  end
  check.that(not o.what or out[o.what], "tap: what='%s' is none of q, q_pre, k, k_pre, v", tostring(o.what))
  local function p(what) return out[what] and out[what]:_data() or nil end
  check(C.kv_model_tap(self._m, buf, n, all and -1 or o.layer - 1, p "q", p "q_pre", p "k", p "k_pre", p "v"))
  if o.what then return out[o.what] end
  return out
end

--- m:calibrate{...}: see kelvin.calib.
function Model.__index:calibrate(o) return require("kelvin.calib").new(self, o) end

--- m:session{...}: see kelvin.session.
function Model.__index:session(o) return require("kelvin.session").new(self, o or {}) end

--- m:batch{...}: see kelvin.batch.
function Model.__index:batch(o) return require("kelvin.batch").new(self, o or {}) end

return setmetatable(M, { __call = function(_, name, o) return M.open(name, o) end })
