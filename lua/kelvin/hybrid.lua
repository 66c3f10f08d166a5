--- kelvin.hybrid: per layer, K/V head and side the better of TurboAngle and TurboQuant (and their fused forms) at matched
-- stored bits, judged on vectors that the model made or on synthetic ones; and policies from a saved choice.
--
--    keys    score = rel_mse(k) + rel_mse(q k^T)      values   score = rel_mse(v)

local codec = require "kelvin.codec"
local check = require "kelvin.check"
local compare = require("kelvin.compare").compare
local json = require "kelvin.json"
local log = require "kelvin.log"
local policy = require "kelvin.policy"
local tensor = require "kelvin.tensor"
local doc = require("kelvin.help").doc

local M = {}

M.SYNTHETIC = "judged on synthetic vectors: not a choice for this model, calibrate on its own keys and values (source=captured)"
local OUTLIERS, OUTLIER_GAIN, TAIL = 2, 6, 0.3       -- channels made large, by how much, and the strength of a common heavy tail

--- Every setting that costs at most bits + tolerance, the dearest of each kind; cheaper decoding first, for ties.
local function candidates(bits, tolerance, head_dim, page_tokens)
  local out = {}
  local function cost(c, side) return c:info_for(head_dim, page_tokens, side).bits_payload end
  local function add(kind, list)
    local best
    for _, c in ipairs(list) do
      local b = math.max(cost(c, "k"), cost(c, "v"))
      if b <= bits + tolerance and (not best or b > best.bits) then best = { kind = kind, codec = c, bits = b } end
    end
    if best then out[#out + 1] = best end
  end
  local function each(family, key, values, fixed)
    local list = {}
    for _, v in ipairs(values) do
      local params = { [key] = v }
      for name, value in pairs(fixed) do params[name] = value end
      list[#list + 1] = codec.new(family, params)
    end
    return list
  end
  local all = { 1, 2, 3, 4, 5, 6, 7, 8 }
  for _, norm in ipairs { "matched", "lsq" } do add("turboquant", each("scalar", "bits", all, { norm = norm })) end
  for _, norm in ipairs { "lin", "log", "lloyd" } do
    local list = {}
    for _, aim in ipairs { bits + tolerance, bits, bits - tolerance, bits - 0.1, bits - 0.25 } do
      if aim > 0 then list[#list + 1] = codec.new("polar", { norm = norm }):fit_bits(aim, { head_dim = head_dim }) end
    end
    add(norm == "lloyd" and "turboangle-lloyd" or "turboangle", list)
  end
  add("fused", each("fused", "angles", { 4, 8, 16, 32, 64 }, { form = "residual", norm = "lin", norm_bits = 4 }))
  add("fused", each("fused", "bits", all, { form = "subspace", angles = 64, norm_bits = 4, pairs = math.max(1, math.floor(head_dim / 16)) }))
  check.that(#out > 0, "policy 'hybrid': no codec here fits bits=%g at head_dim %d", bits, head_dim)
  return out
end

--- Gaussian rows with a few large channels and a heavy tail common to a row.
local function synthetic(heads, tokens, dim, layer, stream)
  local t = tensor.randn { heads, tokens, dim, seed = layer, stream = stream }
  local tail = tensor.randn { heads, tokens, seed = layer, stream = stream + 16 }
  local x, z = t:_data(), tail:_data()
  for h = 0, heads - 1 do
    for i = 0, tokens - 1 do
      local row, gain = (h * tokens + i) * dim, math.exp(TAIL * z[h * tokens + i])
      for j = 0, dim - 1 do x[row + j] = x[row + j] * gain * ((j * 7 + h * 3 + layer) % dim < OUTLIERS and OUTLIER_GAIN or 1) end
    end
  end
  return t
end

--- Keys, values, and the queries of each K/V head's first query head.
local function samples(model, layer, taps, tokens)
  local group = model.n_heads / model.n_kv_heads
  if not taps then
    return { k = synthetic(model.n_kv_heads, tokens, model.head_dim, layer, 1), v = synthetic(model.n_kv_heads, tokens, model.head_dim, layer, 2),
      q = tensor.randn { model.n_kv_heads, 16, model.head_dim, seed = layer, stream = 3 } }
  end
  local x = { q = taps.q:select(1, layer), k = taps.k:select(1, layer), v = taps.v:select(1, layer) }
  local n = x.k:shape()[2]
  local first = tensor.zeros { model.n_kv_heads, math.min(16, n), model.head_dim }
  local from, to, d = x.q:_data(), first:_data(), model.head_dim
  local rows = first:shape()[2]
  for h = 0, model.n_kv_heads - 1 do
    for i = 0, rows - 1 do                                             -- spread over the text
      local src, dst = (h * group * n + math.floor((i + 0.5) * n / rows)) * d, (h * rows + i) * d
      for j = 0, d - 1 do to[dst + j] = from[src + j] end
    end
  end
  return { k = x.k, v = x.v, q = first }
end

local function head(t, h) return t:slice(1, h, h) end

--- Scores of one candidate, by head.
local function scores(c, x, side, exact)
  local block = c.codec:encode(x[side], { side = side })
  local y = block:decode()
  local dots = side == "k" and block:dot(x.q) or nil
  local out = {}
  for h = 1, x[side]:shape()[1] do
    out[h] = compare(head(x[side], h), head(y, h)).rel_mse + (dots and compare(head(exact, h), head(dots, h)).rel_mse or 0)
  end
  return out
end

doc("kv.policy.hybrid", [[
  kv.policy.hybrid { bits = 4.25, source = "captured", per = "head", tokens = 256, tolerance = 0.02, text = "", save = "", sink = 0, recent = 0 } -> policy
  Per layer, side and K/V head (or per = "layer") the codec with the least error among TurboAngle, TurboQuant and fused settings
  that store at most bits + tolerance per element.  source: captured (keys and values of the calibration's first chunk, or of the
  file `text`) or synthetic (needs nothing; says nothing about a model).  save: a JSON file with every choice and what it beat,
  which kv.policy.saved { file = } reads.  As arms: policy=hybrid:bits=4.25,sink=4  policy=saved:file=choice.json]])
function M.choose(model, p, ids)
  local tokens = p.tokens
  local list = candidates(p.bits, p.tolerance, model.head_dim, codec.PAGE_TOKENS)
  local rows = {}
  local taps = ids and model:tap { tokens = ids, layer = "all" }
  for l = 1, model.n_layers do
    log.progress(l / model.n_layers, ("hybrid: layer %d"):format(l))
    local x = samples(model, l, taps, tokens)
    for _, side in ipairs { "k", "v" } do
      local exact = side == "k" and codec.new("f32"):encode(x.k):dot(x.q) or nil
      local by = {}
      for i, c in ipairs(list) do by[i] = scores(c, x, side, exact) end
      if p.per == "layer" then
        for i in ipairs(list) do
          local sum = 0
          for _, s in ipairs(by[i]) do sum = sum + s end
          by[i] = { sum / #by[i] }
        end
      end
      for h = 1, #by[1] do
        local best, others = 1, {}
        for i, c in ipairs(list) do
          if by[i][h] < by[best][h] then best = i end
          others[c.kind] = math.min(others[c.kind] or math.huge, by[i][h])
        end
        local c = list[best]
        rows[#rows + 1] = { layer = l, side = side, head = p.per == "layer" and 0 or h, kind = c.kind, family = c.codec.family,
          params = c.codec:info_for(model.head_dim, codec.PAGE_TOKENS, side).params, bits = c.codec:info_for(model.head_dim, codec.PAGE_TOKENS, side).bits_payload,
          score = by[best][h], least = others }
      end
    end
  end
  log.clear()
  return { policy = "hybrid", model = model.name, n_layers = model.n_layers, n_kv_heads = model.n_kv_heads, head_dim = model.head_dim, bits = p.bits,
    source = ids and "captured" or "synthetic", caveat = not ids and M.SYNTHETIC or nil, tokens = ids and #ids or tokens, rows = rows }
end

--- layers[l] of a choice.
local function layers_of(choice, p)
  local out = {}
  for l = 1, choice.n_layers do out[l] = { k = {}, v = {}, sink = p.sink, recent = p.recent, mean = p.mean } end
  for _, r in ipairs(choice.rows) do
    local c = codec.new(r.family, codec._parse_params(r.params))
    if r.head == 0 then out[r.layer][r.side] = c else out[r.layer][r.side][r.head] = c end
  end
  return out
end

local function tokens_of(p, model)
  if p.source == "synthetic" then return nil end
  check.that(p.source == "captured", "policy 'hybrid': source=%s is none of captured, synthetic", p.source)
  local ids
  if p.text ~= "" then
    local f, err = io.open(p.text, "rb")
    check.that(f, "policy 'hybrid': text: %s", err)
    ids = model:tokenize(f:read "*a", { add_special = false })
    f:close()
  else
    local scope = policy._scope()
    ids = check.that(scope and scope.calib and scope.calib.first_chunk, "policy 'hybrid': source=captured needs a text: a calibration (--calib FILE) or text=FILE")
  end
  check.that(#ids >= 32, "policy 'hybrid': %d tokens are too few to judge by, 32 are needed", #ids)
  return { unpack(ids, 1, math.min(#ids, p.tokens)) }
end

local window = { sink = { default = 0, min = 0, about = "exact tokens at the start" }, recent = { default = 0, min = 0, about = "exact tokens at the end" },
  mean = { default = "none", about = "both, k, v, bias or none" } }
local function with_window(params)
  for name, p in pairs(window) do params[name] = p end
  return params
end

M.hybrid = policy.new {
  name = "hybrid", about = "the better of TurboAngle and TurboQuant, per layer, head and side",
  params = with_window {
    bits = { default = 4.25, min = 1, max = 16, about = "stored bits per element of every slot" },
    tolerance = { default = 0.02, min = 0, max = 1, about = "how much more a candidate may cost" },
    source = { default = "captured", about = "captured or synthetic" }, per = { default = "head", about = "head or layer" },
    tokens = { default = 256, min = 32, max = 4096, about = "to judge by" }, text = { default = "", about = "file to capture from" },
    save = { default = "", about = "file for the choice" },
  },
  plan = function(p, model)
    check.that(p.per == "head" or p.per == "layer", "policy 'hybrid': per=%s is none of head, layer", p.per)
    local choice = M.choose(model, p, tokens_of(p, model))
    if choice.caveat then log.warn("hybrid: %s", choice.caveat) end
    local count, slots = {}, 0
    for _, r in ipairs(choice.rows) do count[r.kind], slots = (count[r.kind] or 0) + 1, slots + 1 end
    log.info("hybrid at %.3g bits (%s), %d slots: turboquant %d, turboangle %d, turboangle with Lloyd-Max radii %d, fused %d", p.bits, choice.source, slots,
      count.turboquant or 0, count.turboangle or 0, count["turboangle-lloyd"] or 0, count.fused or 0)
    if p.save ~= "" then
      local f, err = io.open(p.save, "wb")
      check.that(f, "policy 'hybrid': save: %s", err)
      f:write(json.encode(choice, "  "), "\n")
      f:close()
    end
    return layers_of(choice, p)
  end,
}

M.saved = policy.new {
  name = "saved", about = "a choice that policy hybrid saved",
  params = with_window { file = { default = "", about = "the JSON file" } },
  plan = function(p, model)
    check.that(p.file ~= "", "policy 'saved': file= is needed")
    local choice = check.that(json.read(p.file))
    check.that(type(choice) == "table" and type(choice.rows) == "table", "policy 'saved': '%s' is not a saved choice", p.file)
    for _, key in ipairs { "n_layers", "n_kv_heads", "head_dim" } do
      check.that(choice[key] == model[key], "policy 'saved': '%s' is for %s=%s, model has %s", p.file, key, tostring(choice[key]), tostring(model[key]))
    end
    return layers_of(choice, p)
  end,
}

return M
