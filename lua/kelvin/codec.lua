--- kelvin.codec: a codec by name and parameters.
--
-- A family is a C file (`int`, `scalar`, `raw`, `canary`); a preset is a name from the literature that stands for a family
-- with parameters, a file in configs/codecs/.  A codec object says which; what C needs besides (head_dim, tokens in a page,
-- keys or values) comes from the place it is used in, and each such instance is made once.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local check = require "kelvin.check"
local tensor = require "kelvin.tensor"
local bytes = require "kelvin.bytes"
local config = require "kelvin.config"
local json = require "kelvin.json"
local doc = require("kelvin.help").doc

local M, Codec, Block = {}, {}, {}
Codec.__index, Block.__index = {}, {}
Codec.__name, Block.__name = "codec", "block"

M.PAGE_TOKENS = 64       -- a page's default length; kv_plan_new takes the same

-- ---- families and presets -----------------------------------------------------------------------------------------

local families, presets, order

local function text(p) return p ~= nil and ffi.string(p) or "" end

local function load_families()
  families = {}
  local d, p = ffi.new "kv_codec_desc[1]", ffi.new "kv_param[1]"
  for i = 0, C.kv_codec_count() - 1 do
    check(C.kv_codec_describe(i, d))
    local f = { name = text(d[0].name), about = text(d[0].about), source = text(d[0].source), format = d[0].format, caps = d[0].caps, params = {}, by_name = {} }
    for j = 0, d[0].n_params - 1 do
      check(C.kv_codec_param_at(i, j, p))
      local q = { name = text(p[0].name), about = text(p[0].about), type = p[0].type, def = p[0].def, min = p[0].min, max = p[0].max }
      if p[0].type == C.KV_PARAM_CHOICE then
        q.choices = {}
        for word in text(p[0].choices):gmatch "[^|]+" do q.choices[#q.choices + 1] = word end
        q.def = q.choices[q.def + 1]
      end
      f.params[j + 1], f.by_name[q.name] = q, q
    end
    families[f.name] = f
  end
end

local function merged(...)
  local out = {}
  for i = 1, select("#", ...) do
    for k, v in pairs((select(i, ...)) or {}) do out[k] = v end
  end
  return out
end

local function load_presets()
  presets, order = {}, {}
  for _, file in ipairs(config.list "codecs") do
    local c = config.load("codecs", file)
    local function add(name, v, aliases)
      local p = { name = name, family = c.family, about = v.about or c.about, source = v.source or c.source,
        params = merged(c.params, v.params), k = merged(c.k, v.k), v = merged(c.v, v.v) }
      presets[name] = p
      order[#order + 1] = name
      for _, alias in ipairs(aliases or {}) do presets[alias] = p end
    end
    if c.about and not c.abstract then add(file, {}, c.aliases) end
    local names = {}
    for name in pairs(c.variants or {}) do names[#names + 1] = name end
    table.sort(names)
    for _, name in ipairs(names) do add(name, c.variants[name], c.variants[name].aliases) end
  end
end

local function load()
  if not families then load_families() end
  if not presets then load_presets() end
end

local function all_names()
  load()
  local names = {}
  for name in pairs(families) do names[#names + 1] = name end
  for name in pairs(presets) do if not families[name] then names[#names + 1] = name end end
  table.sort(names)
  return names
end
M.names = all_names

local function param_names(f)
  local out = {}
  for i, p in ipairs(f.params) do out[i] = p.name end
  return out
end

-- Ranges are checked here as well as in C, so that a wrong value is refused where it is written, before a head_dim is known.
local function check_params(label, f, params)
  for name, value in pairs(params) do
    local p = f.by_name[name]
    check.that(p, "codec '%s': unknown parameter '%s'; allowed: %s", label, tostring(name), p and "" or table.concat(param_names(f), ", "))
    if type(value) == "boolean" then value = value and 1 or 0 end
    if p.choices then
      local ok
      for _, word in ipairs(p.choices) do ok = ok or word == tostring(value) end
      check.that(ok, "codec '%s': %s=%s is none of %s", label, name, tostring(value), table.concat(p.choices, ", "))
    else
      check.that(type(value) == "number", "codec '%s': %s=%s is not a number", label, name, tostring(value))
      check.that(value >= p.min and value <= p.max, "codec '%s': %s=%.14g is outside %.14g..%.14g", label, name, value, p.min, p.max)
      check.that(p.type ~= C.KV_PARAM_INT or value % 1 == 0, "codec '%s': %s=%.14g is not a whole number", label, name, value)
    end
  end
end

local function param_text(f, params)
  local out = {}
  for _, p in ipairs(f.params) do
    local v = params[p.name]
    if type(v) == "boolean" then v = v and 1 or 0 end
    if type(v) == "number" then v = v % 1 == 0 and ("%d"):format(v) or ("%.17g"):format(v) end
    if v ~= nil then out[#out + 1] = p.name .. "=" .. v end
  end
  return table.concat(out, ",")
end

--- "a=1,b=word" as a table, numbers as numbers.
function M._parse_params(s)
  local out = {}
  for name, value in s:gmatch "([%w_]+)=([^,]+)" do out[name] = tonumber(value) or value end
  return out
end

-- ---- codec objects ------------------------------------------------------------------------------------------------

doc("kv.codec", [[
  kv.codec(name [, params]) -> codec
  A codec by family (int, scalar, raw, canary) or preset (q4_0, kivi-2, turboquant-4, …), with parameters: kv.codec("int", { bits = 3 }).
  c:roundtrip(t) -> tensor   c:encode(t) -> block   c:fit_bits(target) -> codec   c.info: bits, bytes, layout
  Tensors are f32 [heads, tokens, dim].  Unknown names and values out of range are errors that say what is allowed.
  kv.codecs() lists them; `?kv.codecs`.]])
function M.new(name, params)
  if getmetatable(name) == Codec then
    return params and next(params) and M.new(name.name, merged(name.given, params)) or name
  end
  check.that(type(name) == "string", "kv.codec: name is a %s, a string is needed", type(name))
  check.that(params == nil or type(params) == "table", "kv.codec: parameters of '%s' are a %s, a table is needed", name, type(params))
  load()
  local preset = not families[name] and presets[name] or nil
  if not preset and not families[name] then
    check.fail("codec '%s' is unknown%s", name, check.suggest(name, all_names(), "known"))
  end
  local f = families[preset and preset.family or name]
  check.that(f, "preset '%s': family '%s' is not in this library", name, preset and preset.family or "")
  local c = { name = name, family = f.name, given = merged(params), instances = {}, preset = preset, about = (preset or f).about, source = (preset or f).source }
  check_params(name, f, c.given)
  c.side_params = {}
  for _, side in ipairs { "k", "v" } do
    c.side_params[side] = merged(preset and preset.params, preset and preset[side], c.given)
    check_params(name, f, c.side_params[side])
  end
  c.control = bit.band(f.caps, C.KV_CAP_CONTROL) ~= 0
  c.needs_calibration = bit.band(f.caps, C.KV_CAP_CALIBRATED) ~= 0
  c.has_tables = c.needs_calibration or bit.band(f.caps, C.KV_CAP_CALIBRATABLE) ~= 0
  return setmetatable(c, Codec)
end

function M.is(c) return getmetatable(c) == Codec end

--- The family's description: about, source, params.
function M.family(name)
  load()
  return families[name]
end

--- Whether the codec has a parameter, and its description.
function Codec.__index:param(name) return families[self.family].by_name[name] end

--- A parameter's value on a side ("k" by default), the family's default where none is given.
function Codec.__index:value(name, side)
  local p = self:param(name)
  if not p then return nil end
  local v = self.side_params[side or "k"][name]
  if v == nil then v = p.def end
  return v
end

--- A copy with other parameters: c:with{ bits = 3 }.
function Codec.__index:with(params) return M.new(self.name, merged(self.given, params)) end

local side_code = { k = C.KV_SIDE_K, v = C.KV_SIDE_V }

local function made(self, side, make)
  local params = param_text(families[self.family], self.side_params[side])
  return K.handle("kv_codec", C.kv_codec_free, function(out) return make(out, self.family, params) end)
end

--- For modules here: every parameter of a side that was given, as text.
function Codec.__index:_params(side) return param_text(families[self.family], self.side_params[side]) end

local function instance_key(self, head_dim, page_tokens, side)
  page_tokens, side = page_tokens or M.PAGE_TOKENS, side or "k"
  check.that(side_code[side], "codec '%s': side '%s' is neither k nor v", self.name, tostring(side))
  return head_dim .. "/" .. page_tokens .. "/" .. side, page_tokens, side
end

--- For modules here: the C codec for a head_dim, page length and side.
function Codec.__index:_instance(head_dim, page_tokens, side)
  local key
  key, page_tokens, side = instance_key(self, head_dim, page_tokens, side)
  local c = self.instances[key]
  if not c then
    c = made(self, side, function(out, family, params) return C.kv_codec_new(out, family, params, head_dim, page_tokens, side_code[side]) end)
    self.instances[key] = c
    self.head_dim = self.head_dim or head_dim
  end
  return c
end

-- What tells bytes and bits: a codec of calibrated tables that was given none is made on white noise.
local function to_describe(self, head_dim, page_tokens, side)
  local key
  key, page_tokens, side = instance_key(self, head_dim, page_tokens, side)
  if not self.has_tables or self.instances[key] then return self:_instance(head_dim, page_tokens, side) end
  self.nominal = self.nominal or {}
  local c = self.nominal[key]
  if not c then
    c = made(self, side, function(out, family, params) return C.kv_codec_new_nominal(out, family, params, head_dim, page_tokens, side_code[side]) end)
    self.nominal[key] = c
    self.head_dim = self.head_dim or head_dim
  end
  return c
end

--- For kelvin.plan: the C codec of one slot, its tables made from a calibration.  mean: what the plan removes, or nil.
-- Settings without tables share one, whose state then stays in the processor's cache.
function Codec.__index:_calibrated(calib, layer, head, side, page_tokens, page_rope, mean)
  local key = side .. "/" .. page_tokens
  if not self.plain or self.plain.calib ~= calib then self.plain = { calib = calib } end
  if self.plain[key] then return self.plain[key] end
  local c = made(self, side, function(out, family, params)
    return C.kv_codec_calibrate(out, calib._c, family, params, page_tokens, layer - 1, head - 1, side_code[side], page_rope and 1 or 0, mean)
  end)
  local blob, n = ffi.new "const void*[1]", ffi.new "double[1]"
  check(C.kv_codec_blob(c, blob, n))
  if n[0] == 0 then self.plain[key] = c end
  return c
end

doc("codec:info_for", [[
  c:info_for(head_dim, page_tokens = 64, side = "k") -> table
  What the codec is at a geometry: family, params (every one, canonical text), granule (tokens encoded at once), fused,
  page_bytes of one head's page, page (the same by purpose), bits_nominal (codes alone), bits_payload (all stored bits per
  element), table_bytes (calibrated tables, shared by all pages).  c.info is the same at the head_dim it was last used with, or at 64.]])
function Codec.__index:info_for(head_dim, page_tokens, side)
  return M._info(to_describe(self, head_dim, page_tokens, side))
end

--- For modules here: the same of a C codec, with the bytes of its calibrated tables.
function M._info(handle)
  local info, blob, n = ffi.new "kv_codec_info[1]", ffi.new "const void*[1]", ffi.new "double[1]"
  check(C.kv_codec_get_info(handle, info))
  check(C.kv_codec_blob(handle, blob, n))
  local i = info[0]
  return { family = text(i.family), params = text(i.params), head_dim = i.head_dim, page_tokens = i.page_tokens, side = i.side == 0 and "k" or "v",
    caps = i.caps, format = i.format, granule = i.granule, fused = i.fused ~= 0, page_bytes = i.page_bytes, page = bytes.new(i.page, i.page_tokens * i.head_dim),
    bits_nominal = i.bits_nominal, bits_payload = i.bits_payload, table_bytes = n[0], layout = ("%d tokens x %d dims in %d bytes, granule %d"):format(i.page_tokens, i.head_dim, i.page_bytes, i.granule) }
end

local methods = Codec.__index
function Codec.__index(self, key)
  if key == "info" then return methods.info_for(self, rawget(self, "head_dim") or 64) end
  return methods[key]
end

function Codec:__tostring()
  local ok, i
  for _, d in ipairs { rawget(self, "head_dim") or 64, 128, 256 } do
    ok, i = pcall(self.info_for, self, d)
    if ok then break end
  end
  if not ok then return ("codec %s (%s)"):format(self.name, self.family) end
  local v = self:info_for(i.head_dim, i.page_tokens, "v")
  local params = v.params == i.params and i.params or ("k: %s; v: %s"):format(i.params, v.params)
  local bits = v.bits_payload == i.bits_payload and ("%.3g"):format(i.bits_payload) or ("k %.3g, v %.3g"):format(i.bits_payload, v.bits_payload)
  return ("codec %s: %s(%s)  %s bits/elem at d=%d (codes %.3g)  %s%s"):format(self.name, self.family, params, bits, i.head_dim, i.bits_nominal,
    i.fused and "fused" or "tiles", self.control and "  CONTROL: made to fail" or "")
end

-- A tensor as [heads, tokens, dim]: rows alone are one head.
local function as_heads(t)
  check.that(tensor.is(t), "codec: a %s given, a tensor [heads, tokens, dim] is needed", type(t))
  local v = t:_view()
  check.that(v.ndim == 2 or v.ndim == 3, "codec: a tensor of %d dimensions given, [heads, tokens, dim] or [tokens, dim] is needed", v.ndim)
  if v.ndim == 3 then return t, v end
  local w = ffi.new "kv_tensor"
  w.data, w.dtype, w.device, w.ndim = v.data, v.dtype, v.device, 3
  w.shape[0], w.shape[1], w.shape[2] = 1, v.shape[0], v.shape[1]
  w.stride[0], w.stride[1], w.stride[2] = v.stride[0] * v.shape[0], v.stride[0], v.stride[1]
  return t, w
end

doc("codec:encode", [[
  c:encode(t [, { side = "k", page_tokens = 64 }]) -> block
  Encodes f32 [heads, tokens, dim] (or [tokens, dim]).  Tokens past the last whole granule stay f16 and count as exact.
  b:decode([first, last]) -> tensor   b:bytes() -> by purpose   b:dot(q) -> scores   b:accumulate(p) -> out   b:page(head, page)
  NaN or inf in t is an error.]])
function methods:encode(t, o)
  o = o or {}
  local _, view = as_heads(t)
  local head_dim = view.shape[2]
  local c = self:_instance(head_dim, o.page_tokens, o.side)
  local b = K.handle("kv_block", C.kv_block_free, function(out) return C.kv_block_encode(out, c, view) end)
  return setmetatable({ _b = b, codec = self, side = o.side or "k", page_tokens = o.page_tokens or M.PAGE_TOKENS,
    heads = view.shape[0], tokens = view.shape[1], head_dim = head_dim, rows_only = t:_view().ndim == 2 }, Block)
end

doc("codec:calibrated", [[
  c:calibrated(t [, { side = "k", queries =, page_tokens = 64 }]) -> codec
  A codec whose tables are made from rows: t is f32 [heads, tokens, dim] or [tokens, dim], heads pooled; queries likewise.  For
  trying a codec on a tensor; on a model, plans make tables for every layer and head (`?calibrate`).]])
function methods:calibrated(t, o)
  o = o or {}
  local function rows(x)
    local _, v = as_heads(x)
    local flat = tensor.zeros { v.shape[0] * v.shape[1], v.shape[2] }
    local view = ffi.new "kv_tensor"
    view.data, view.dtype, view.ndim = flat:_view().data, C.KV_F32, 3
    view.shape[0], view.shape[1], view.shape[2] = v.shape[0], v.shape[1], v.shape[2]
    view.stride[0], view.stride[1], view.stride[2] = v.shape[1] * v.shape[2], v.shape[2], 1
    check(C.kv_tensor_copy(v, view))
    return flat
  end
  local x, q = rows(t), o.queries and rows(o.queries)
  local head_dim = x:_view().shape[1]
  local c = M.new(self.name, self.given)
  local key, page_tokens, side = instance_key(c, head_dim, o.page_tokens, o.side)
  for old, handle in pairs(self.instances) do c.instances[old] = handle end
  c.instances[key] = made(c, side, function(out, family, params)
    return C.kv_codec_fit(out, family, params, head_dim, page_tokens, side_code[side], x:_view(), q and q:_view() or nil)
  end)
  c.head_dim = head_dim
  return c
end

doc("codec:roundtrip", [[
  c:roundtrip(t [, { side = "k", page_tokens = 64 }]) -> tensor
  Encodes and decodes; the result remembers its bits, so that kv.compare(t, c:roundtrip(t)) shows them.]])
function methods:roundtrip(t, o)
  local b = self:encode(t, o)
  local out = b:decode()
  out.bits, out.codec = b:bytes(), self.name
  return out
end

doc("codec:fit_bits", [[
  c:fit_bits(target [, { head_dim = 64, side = "k" }]) -> codec
  The same codec at the legal setting nearest to `target` stored bits per element.]])
function methods:fit_bits(target, o)
  o = o or {}
  local side = o.side or "k"
  check.that(side_code[side], "codec '%s': side '%s' is neither k nor v", self.name, tostring(side))
  local buf = ffi.new "char[512]"
  local params = param_text(families[self.family], self.side_params[side])
  check(C.kv_codec_fit_bits(self.family, params, o.head_dim or rawget(self, "head_dim") or 64, side_code[side], target, buf, 512))
  return M.new(self.name, merged(self.given, M._parse_params(ffi.string(buf))))
end

-- ---- blocks -------------------------------------------------------------------------------------------------------

function Block.__index:decode(first, last)
  first, last = first or 1, last or self.tokens
  check.that(first >= 1 and first <= last and last <= self.tokens, "block: tokens %s..%s are outside 1..%d", tostring(first), tostring(last), self.tokens)
  local t = tensor.zeros { self.heads, last - first + 1, self.head_dim }
  check(C.kv_block_decode(self._b, first - 1, last, t:_view()))
  return self.rows_only and t:select(1, 1) or t
end

--- Bytes by purpose, and bits per element.
function Block.__index:bytes()
  local b = ffi.new "kv_bytes[1]"
  check(C.kv_block_bytes(self._b, b))
  return bytes.new(b[0], self.heads * self.tokens * self.head_dim)
end

function Block.__index:shape() return { self.heads, self.tokens, self.head_dim } end

local function fused_flag(self, o)
  local f = o and o.fused
  if f == nil then f = self.codec:info_for(self.head_dim, self.page_tokens, self.side).fused end
  return f and 1 or 0
end

--- b:dot(q [, { fused = true }]): scores [heads, queries, tokens] of q [heads, queries, dim].
function Block.__index:dot(q, o)
  local _, v = as_heads(q)
  local t = tensor.zeros { self.heads, v.shape[1], self.tokens }
  check(C.kv_block_dot(self._b, v, fused_flag(self, o), t:_view()))
  return t
end

--- b:accumulate(p [, { fused = true }]): [heads, queries, dim], sum over tokens of p [heads, queries, tokens] times the row.
function Block.__index:accumulate(p, o)
  local _, v = as_heads(p)
  local t = tensor.zeros { self.heads, v.shape[1], self.head_dim }
  check(C.kv_block_accumulate(self._b, v, fused_flag(self, o), t:_view()))
  return t
end

--- b:page(head, page): the encoded bytes of one page as a string.
function Block.__index:page(head, page)
  local data, n = ffi.new "uint8_t*[1]", ffi.new "double[1]"
  check(C.kv_block_page(self._b, head - 1, page - 1, data, n))
  return ffi.string(data[0], n[0])
end

function Block.__index:_save(path, stage, level)
  local about = { about = ("block of %s: %d heads, %d tokens, %d dims"):format(self.codec.name, self.heads, self.tokens, self.head_dim), codec = self.codec.name, rows_only = self.rows_only }
  check(C.kv_block_save(self._b, path, json.encode(about), stage, level))
end

--- For kelvin.container: the block in a file.  Its codec is the file's, tables included; a preset's name is kept while it fits.
function M._load(file, o)
  local b = K.handle("kv_block", C.kv_block_free, function(out) return C.kv_block_load(out, file._p, o.salvage and 1 or 0) end)
  local handle = ffi.gc(C.kv_block_codec(b), C.kv_codec_free)
  local i, about = M._info(handle), file.sections[1].meta
  local name = type(about.codec) == "string" and about.codec or i.family
  local known, preset = pcall(M.new, name)
  local c = M.new(known and preset.family == i.family and name or i.family, M._parse_params(i.params))
  c.instances[i.head_dim .. "/" .. i.page_tokens .. "/" .. i.side], c.head_dim = handle, i.head_dim
  local n = ffi.new "int[3]"
  check(C.kv_block_shape(b, n, n + 1, n + 2))
  return setmetatable({ _b = b, codec = c, side = i.side, page_tokens = i.page_tokens, heads = n[0], tokens = n[1], head_dim = n[2], rows_only = about.rows_only and n[0] == 1 }, Block)
end

function Block:__tostring()
  return ("block %s [%d heads, %d tokens, %d dim]  %s"):format(self.codec.name, self.heads, self.tokens, self.head_dim, tostring(self:bytes()))
end

-- ---- lists --------------------------------------------------------------------------------------------------------

doc("kv.codecs", [[
  kv.codecs() -> list          kv.codecs(name [, { head_dim = 64, page_tokens = 64 }]) -> description
  Families and presets that there are, with a line about each.  kv.codecs "int" describes one: parameters, ranges, the bytes of
  a page at a head_dim, what it can, source.]])
function M.list(name, o)
  load()
  if name then return M.describe(name, o) end
  local rows = {}
  local names = {}
  for n in pairs(families) do names[#names + 1] = n end
  table.sort(names)
  for _, n in ipairs(names) do rows[#rows + 1] = { name = n, kind = "family", family = n, about = families[n].about, source = families[n].source } end
  for _, n in ipairs(order) do
    if not families[n] then rows[#rows + 1] = { name = n, kind = "preset", family = presets[n].family, about = presets[n].about, source = presets[n].source } end
  end
  -- What codes whole tokens cannot be a page's codec, but whoever looks for the name finds it here.
  for _, row in ipairs(require("kelvin.kvtc").list()) do
    if not families[row.name] and not presets[row.name] then rows[#rows + 1] = row end
  end
  return setmetatable(rows, { __tostring = function(t)
    local out = {}
    for i, r in ipairs(t) do out[i] = ("  %-18s %-7s %-7s %s"):format(r.name, r.kind, r.kind == "preset" and r.family or "", r.about) end
    return table.concat(out, "\n")
  end })
end

-- What a codec can do, in words.
local function abilities(f, i)
  local has = function(cap) return bit.band(i.caps, cap) ~= 0 end
  local out = { has(C.KV_CAP_KEYS) and (has(C.KV_CAP_VALUES) and "keys and values" or "keys alone") or "values alone" }
  out[#out + 1] = i.fused and "attention on codes" or "attention on decoded tiles"
  out[#out + 1] = "cuda: " .. (has(C.KV_CAP_CUDA) and "yes" or "no") .. (has(C.KV_CAP_FUSED_CUDA) and ", on codes" or "")
  out[#out + 1] = i.granule == 1 and "a token is encoded at a time" or ("%d tokens are encoded at a time"):format(i.granule)
  out[#out + 1] = "any token is read alone"
  out[#out + 1] = bit.band(f.caps, C.KV_CAP_CALIBRATED) ~= 0 and "needs a calibration" or i.table_bytes > 0 and "these parameters need a calibration"
    or bit.band(f.caps, C.KV_CAP_CALIBRATABLE) ~= 0 and "some parameters need a calibration" or "needs no calibration"
  out[#out + 1] = has(C.KV_CAP_LOSSLESS) and "lossless" or nil
  out[#out + 1] = has(C.KV_CAP_CONTROL) and "a control that must fail" or nil
  return table.concat(out, ", ")
end

-- The pictures of a family's section in docs/formats.md.
local function pictures(family)
  local f = io.open(K.root .. "/docs/formats.md")
  local all = f and f:read "*a" or ""
  if f then f:close() end
  local section, lines = all:match("\n## " .. family .. "\n(.-)\n## ") or "", {}
  for block in section:gmatch "\n```\n(.-\n)```" do
    for line in block:gmatch "(.-)\n" do lines[#lines + 1] = "    " .. line end
  end
  return table.concat(lines, "\n")
end

-- Bytes of a page by purpose, one row a side.
local ledger = { "granule", "page bytes", "codes", "scales", "outliers", "padding", "tables", "bits/elem" }
local function ledger_rows(c, head_dim, page_tokens)
  local rows = { { "side", unpack(ledger) } }
  for _, side in ipairs { "k", "v" } do
    local ok, i = pcall(c.info_for, c, head_dim, page_tokens, side)
    if not ok then rows.refused = tostring(i)
    else
      rows[side] = i
      rows[#rows + 1] = { side, i.granule, ("%d"):format(i.page_bytes), ("%d"):format(i.page.codes), ("%d"):format(i.page.scales), ("%d"):format(i.page.outliers), ("%d"):format(i.page.padding),
        ("%d"):format(i.table_bytes), ("%.4g"):format(i.bits_payload) }
    end
  end
  return rows
end

-- Rows of cells as lines, columns as wide as they need to be; the last one is not padded.
local function columns(rows, indent)
  local width, out = {}, {}
  for _, r in ipairs(rows) do for i, cell in ipairs(r) do width[i] = math.max(width[i] or 0, #tostring(cell)) end end
  for _, r in ipairs(rows) do
    local cells = {}
    for i, cell in ipairs(r) do cells[i] = i == #r and tostring(cell) or ("%-" .. width[i] .. "s"):format(tostring(cell)) end
    out[#out + 1] = indent .. table.concat(cells, "  ")
  end
  return table.concat(out, "\n")
end

--- describe(name [, { head_dim = 64, page_tokens = 64 }]): what a family or preset is and can, its parameters with ranges, the bytes
-- of a page at a geometry, and where it comes from.
function M.describe(name, o)
  o = o or {}
  load()
  if not families[name] and not presets[name] then
    local d = require("kelvin.kvtc").describe(name)
    if d then return d end
  end
  local c = M.new(name)
  local f = families[c.family]
  local head_dim, page_tokens = o.head_dim or 64, o.page_tokens or M.PAGE_TOKENS
  local rows = ledger_rows(c, head_dim, page_tokens)
  local i = rows.k or rows.v
  if not i then check.fail("%s", rows.refused) end
  local d = { name = name, family = c.family, about = c.about, source = c.source, params = f.params, k = c.side_params.k, v = c.side_params.v, head_dim = head_dim,
    page_tokens = page_tokens, page = { k = rows.k, v = rows.v }, abilities = abilities(f, i) }
  return setmetatable(d, { __tostring = function()
    local params = {}
    for _, p in ipairs(f.params) do
      local range = p.choices and table.concat(p.choices, " | ") or ("%.14g..%.14g"):format(p.min, p.max)
      local k, v = c:value(p.name, "k"), c:value(p.name, "v")
      params[#params + 1] = { p.name, k == v and tostring(k) or ("k %s, v %s"):format(tostring(k), tostring(v)), range, p.about }
    end
    return table.concat({ tostring(c), "  " .. d.about, "  source: " .. d.source, "  can: " .. d.abilities,
      "  parameters:" .. (#params == 0 and " none" or "\n" .. columns(params, "    ")),
      ("  at head_dim %d, pages of %d tokens of one head:"):format(head_dim, page_tokens), columns(rows, "    "),
      ("  a page's bytes (docs/formats.md, %s):"):format(c.family), pictures(c.family) }, "\n")
  end })
end

return setmetatable(M, {
  __call = function(_, name, params) return M.new(name, params) end,
  __index = function(_, key)
    if key == "parse_arm" then return require("kelvin.arm").parse end
  end,
})
