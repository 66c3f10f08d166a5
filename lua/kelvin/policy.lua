--- kelvin.policy: from a short function over layers to a resolved plan.
--
-- A policy says which codec each layer and head gets for keys and for values; it runs once per plan, never per token.
--    layers[l] = { k = SPEC, v = SPEC, sink = 0, recent = 0, mean = "none", page_rope = false, exact = "f16" }
--    SPEC      = "q4_0" | { "turboquant", bits = 3 } | kv.codec(...) | { [1] = SPEC, [3] = SPEC, default = SPEC } by K/V head

local check = require "kelvin.check"
local codec = require "kelvin.codec"
local doc = require("kelvin.help").doc

local M, Policy = {}, {}
Policy.__index, Policy.__name = {}, "policy"

local layer_keys = { k = true, v = true, sink = true, recent = true, mean = true, page_rope = true, exact = true }
local means = { both = true, k = true, v = true, auto = true, bias = true, none = true }
local exacts = { f16 = true, f32 = true, bf16 = true }

local function sorted_keys(t)
  local out = {}
  for k in pairs(t) do out[#out + 1] = tostring(k) end
  table.sort(out)
  return out
end

-- ---- codec specs ----------------------------------------------------------------------------------------------------

local function params_of(spec)
  local params = {}
  for name, value in pairs(spec) do
    if type(name) == "string" then params[name] = value end
  end
  return params
end

--- A spec as a codec; `seed` goes to codecs that have a seed parameter and none given.
local function to_codec(spec, seed, where)
  if type(spec) == "string" then
    spec = require("kelvin.arm").spec(spec)
  end
  local c
  if codec.is(spec) then c = spec
  else
    check.that(type(spec) == "table" and type(spec[1]) == "string", "%s: a codec is needed, such as \"q4_0\" or { \"turboquant\", bits = 3 }", where)
    c = codec.new(spec[1], params_of(spec))
  end
  if seed and c:param "seed" and c.given.seed == nil then c = c:with { seed = seed } end
  return c
end

local function by_head(spec)
  return type(spec) == "table" and not codec.is(spec) and (spec.default ~= nil or type(spec[1]) ~= "string")
end

--- { [0] = codec of every head } or { codec of head 1, ... } when they differ.
local function side_codecs(spec, n_heads, seed, where)
  check.that(spec ~= nil, "%s: no codec given", where)
  if not by_head(spec) then
    return { [0] = to_codec(spec, seed, where) }
  end
  local out = {}
  for key in pairs(spec) do
    check.that(key == "default" or type(key) == "number" and key % 1 == 0 and key >= 1 and key <= n_heads,
      "%s: head %s given, model has %d K/V heads", where, tostring(key), n_heads)
  end
  for h = 1, n_heads do
    local s = spec[h] or spec.default
    check.that(s ~= nil, "%s: head %d has no codec and there is no default", where, h)
    out[h] = to_codec(s, seed, ("%s head %d"):format(where, h))
  end
  return out
end

-- ---- policies -------------------------------------------------------------------------------------------------------

doc("kv.policy", [[
  kv.policy { name =, params = { x = { default =, min =, max =, about = } }, plan = function(p, model, stats) … end } -> policy
  A custom layerwise policy.  plan runs once and returns layers[l] = { k =, v =, sink =, recent =, mean =, page_rope =, exact = }
  with l = 1 .. model.n_layers; k and v are codec specs, { [1] = spec, default = spec } by K/V head.  p holds the parameters;
  model: n_layers, n_heads, n_kv_heads, head_dim, arch, key_bias, layer(l); stats: stats:rank(l, "k") and stats[l].k (kv.calib).
  policy{ x = 3 } is a copy with other parameters.]])
function M.new(def)
  check.that(type(def) == "table", "kv.policy: a table is needed")
  check.that(type(def.name) == "string", "kv.policy: a name is needed")
  check.that(type(def.plan) == "function", "policy '%s': plan is a %s, a function is needed", def.name, type(def.plan))
  for key in pairs(def) do
    check.that(key == "name" or key == "params" or key == "plan" or key == "about" or key == "page_tokens" or key == "arm",
      "policy '%s': unknown key '%s'; allowed: name, about, params, plan, page_tokens", def.name, tostring(key))
  end
  for name, p in pairs(def.params or {}) do
    check.that(type(p) == "table" and p.default ~= nil, "policy '%s': parameter '%s' needs a default", def.name, tostring(name))
  end
  return setmetatable({ name = def.name, about = def.about, params = def.params or {}, plan = def.plan, page_tokens = def.page_tokens, arm = def.arm, given = {} }, Policy)
end

function M.is(p) return getmetatable(p) == Policy end

function Policy:__call(given)
  local copy = {}
  for k, v in pairs(self) do copy[k] = v end
  copy.given = {}
  for k, v in pairs(self.given) do copy.given[k] = v end
  for k, v in pairs(given or {}) do copy.given[k] = v end
  return setmetatable(copy, Policy)
end

function Policy:__tostring()
  local out = {}
  for _, name in ipairs(sorted_keys(self.params)) do
    local v = self.given[name]
    if v == nil then v = self.params[name].default end
    out[#out + 1] = name .. "=" .. tostring(v)
  end
  return ("policy %s(%s)"):format(self.name, table.concat(out, ", "))
end

local function parameters(policy, given)
  local p = {}
  for name, def in pairs(policy.params) do p[name] = def.default end
  for _, set in ipairs { policy.given, given or {} } do
    for name, value in pairs(set) do
      local def = policy.params[name]
      check.that(def, "policy '%s': unknown parameter '%s'; allowed: %s", policy.name, tostring(name), table.concat(sorted_keys(policy.params), ", "))
      check.that(type(value) == type(def.default), "policy '%s': %s is a %s, a %s is needed", policy.name, name, type(value), type(def.default))
      if type(value) == "number" then
        check.that(not (def.min and value < def.min or def.max and value > def.max), "policy '%s': %s=%.14g is outside %s..%s", policy.name, name, value,
          tostring(def.min or ""), tostring(def.max or ""))
      end
      p[name] = value
    end
  end
  return p
end

local uniform_keys = { k = true, v = true, sink = true, recent = true, mean = true, page_rope = true, page_tokens = true, exact = true, name = true, seed = true }

doc("kv.policy.uniform", [[
  kv.policy.uniform { k = SPEC, v = SPEC, sink = 0, recent = 0, mean = "none", page_rope = false, page_tokens = 64, exact = "f16" } -> policy
  The same codecs on every layer.  SPEC: "q4_0", { "turboquant", bits = 3 } or a codec.  sink, recent: tokens that stay exact
  at the start and at the end, stored as `exact` (f16, f32 or bf16).  mean: both, k, v (channel means from calibration), auto
  (both, but values keep theirs where without it the calibration's tokens are longer for their length), bias
  (keys only, from the model's key bias), none.  page_rope: keys in page-relative RoPE.  Takes kv.codec.parse_arm's table.]])
function M.uniform(o)
  check.that(type(o) == "table", "kv.policy.uniform: a table is needed")
  for key in pairs(o) do
    check.that(uniform_keys[key], "kv.policy.uniform: unknown key '%s'; allowed: %s", tostring(key), table.concat(sorted_keys(uniform_keys), ", "))
  end
  check.that(o.k ~= nil and o.v ~= nil, "kv.policy.uniform: %s has no codec", o.k == nil and "k" or "v")
  return M.new { name = o.name or "uniform", arm = o, page_tokens = o.page_tokens, plan = function(_, model)
    local layers = {}
    for l = 1, model.n_layers do
      layers[l] = { k = o.k, v = o.v, sink = o.sink, recent = o.recent, mean = o.mean, page_rope = o.page_rope, exact = o.exact }
    end
    return layers
  end }
end

-- Policies by name, each a module that makes it.
local named = { budgets = "kelvin.budgets", mixedkv = "kelvin.mixedkv", hybrid = "kelvin.hybrid", saved = "kelvin.hybrid" }

--- Names of the policies that have one, sorted.
function M._named() return sorted_keys(named) end

--- A policy from a Lua file that returns one.
function M.file(path)
  local f, err = loadfile(path)
  check.that(f, "policy: %s", err)
  local p = f()
  check.that(M.is(p), "policy: '%s' returns a %s, kv.policy{...} is needed", path, type(p))
  return p
end

--- policy=NAME:PARAM=VALUE:...,PARAM=VALUE,... as that policy (FILE.lua: the one that the file returns) with these parameters;
-- defaults: of parameters that it has.
local function by_text(text, defaults)
  local given, name = {}, nil
  for item in text:gsub("%s+", ""):gmatch "[^,:]+" do
    local key, value = item:match "^([%w_]+)=(.+)$"
    check.that(key, "arm '%s': '%s' is not PARAM=VALUE", text, item)
    if key == "policy" and not name then name = value else given[key] = tonumber(value) or value end
  end
  check.that(named[name] or (name or ""):find "%.lua$", "arm '%s': policy '%s' is unknown; known: %s, or a FILE.lua", text, tostring(name), table.concat(sorted_keys(named), ", "))
  local policy = named[name] and M[name] or M.file(name)
  for key, value in pairs(defaults or {}) do
    if policy.params[key] and given[key] == nil then given[key] = value end
  end
  policy = policy(given)
  policy.name = text
  return policy
end

--- A policy from whatever names one: a policy, an arm's text, a table for uniform.
function M.of(x, defaults)
  if M.is(x) then return x end
  if type(x) == "string" and x:find "^%s*policy=" then return by_text(x, defaults) end
  if type(x) == "string" then x = require("kelvin.arm").parse(x) end
  check.that(type(x) == "table", "policy: a %s given; a policy, an arm's text or a table { k =, v = } is needed", type(x))
  local o = {}
  for k, v in pairs(defaults or {}) do o[k] = v end
  for k, v in pairs(x) do o[k] = v end
  if type(o[1]) == "string" then o.k, o.v, o[1] = o.k or o[1], o.v or o[1], nil end
  return M.uniform(o)
end

-- ---- resolving --------------------------------------------------------------------------------------------------------

local scope          -- the model and context that kv.fit_budget reads while a plan function runs

local function whole(name, l, key, value)
  check.that(type(value) == "number" and value % 1 == 0 and value >= 0 and value < 2 ^ 31, "policy '%s': layer %d: %s=%s is not a whole number from 0", name, l, key, tostring(value))
  return value
end

--- Every layer's settings with codecs for each side: what kelvin.plan turns into C.
local function normalise(name, layers, model, seed)
  check.that(type(layers) == "table", "policy '%s': plan returned a %s, a table of layers is needed", name, type(layers))
  for l in pairs(layers) do
    check.that(type(l) == "number" and l >= 1 and l % 1 == 0, "policy '%s': layer '%s' is not a number", name, tostring(l))
    check.that(l <= model.n_layers, "policy '%s': layer %s given, model has %d", name, tostring(l), model.n_layers)
  end
  local out = {}
  for l = 1, model.n_layers do
    local y = layers[l]
    check.that(type(y) == "table", "policy '%s': layer %d of %d is missing", name, l, model.n_layers)
    for key in pairs(y) do
      check.that(layer_keys[key], "policy '%s': layer %d: unknown key '%s'; allowed: %s", name, l, tostring(key), table.concat(sorted_keys(layer_keys), ", "))
    end
    local mean, exact, rope = y.mean or "none", y.exact or "f16", y.page_rope
    check.that(means[mean], "policy '%s': layer %d: mean='%s' is none of both, k, v, auto, bias, none", name, l, tostring(mean))
    check.that(exacts[exact], "policy '%s': layer %d: exact='%s' is none of f16, f32, bf16", name, l, tostring(exact))
    check.that(rope == nil or type(rope) == "boolean" or rope == "k" or rope == "none", "policy '%s': layer %d: page_rope='%s' is none of true, false, k, none", name, l, tostring(rope))
    out[l] = { sink = whole(name, l, "sink", y.sink or 0), recent = whole(name, l, "recent", y.recent or 0), mean = mean, exact = exact,
      page_rope = rope == true or rope == "k" }
    for _, side in ipairs { "k", "v" } do
      out[l][side] = side_codecs(y[side], model.n_kv_heads, seed, ("policy '%s': layer %d, %s"):format(name, l, side))
    end
  end
  return out
end

doc("kv.policy.resolve", [[
  kv.policy.resolve(policy, model [, { calib =, params =, seed =, page_tokens = 64, context = 2048 }]) -> plan
  Runs the policy once.  calib (kv.calib or model:calibrate) is needed when a layer removes calibrated means or the policy reads
  stats.  seed: of every codec that has one and none given.  plan.resolved holds every layer, head and parameter, for manifests;
  plan:describe() prints it.]])
function M.resolve(policy, model, o)
  o = o or {}
  policy = M.of(policy)
  local p = parameters(policy, o.params)
  local stats = o.calib and o.calib:stats() or setmetatable({}, { __index = function()
    check.fail("policy '%s': it reads stats, which need calibration: pass calib = model:calibrate{...} (--calib FILE)", policy.name)
  end })
  local outer = scope
  scope = { model = model, context = o.context or 2048, calib = o.calib }
  local ok, layers = pcall(policy.plan, p, model, stats)
  scope = outer
  if not ok then error(layers, 0) end
  local seed = o.seed or (policy.arm and policy.arm.seed)
  local resolved = normalise(policy.name, layers, model, seed)
  return require("kelvin.plan").new(model, resolved, { name = policy.name, params = p, calib = o.calib, page_tokens = o.page_tokens or policy.page_tokens or codec.PAGE_TOKENS })
end

-- ---- budgets ------------------------------------------------------------------------------------------------------------

local exact_bits = { f16 = 16, bf16 = 16, f32 = 32 }

--- All-in bits per element of one slot at `context` tokens: exact tokens, whole pages, the tail short of a granule.
local function slot_bits(c, side, y, model, context)
  local info = c:info_for(model.head_dim, codec.PAGE_TOKENS, side)
  local coded = math.max(0, context - (y.sink or 0) - (y.recent or 0))
  coded = math.floor(coded / info.granule) * info.granule
  local pages = math.ceil(coded / info.page_tokens)
  return (8 * pages * info.page_bytes / model.head_dim + (context - coded) * exact_bits[y.exact or "f16"]) / context
end

doc("kv.fit_budget", [[
  kv.fit_budget(layers, bits [, { model =, context = 2048 }]) -> layers
  Scales the `bits` parameter of every codec that has one until the mean all-in bits per element (window, sinks, scales and
  whole pages at `context` tokens) is as near to the budget as it gets without passing it.  Proportions between layers stay:
  each slot's bits are multiplied by one factor, rounded down, and what is left goes to the slots rounded hardest.  An error if
  even the fewest bits exceed the budget.  Inside a policy's plan the model and context are known.]])
function M.fit_budget(layers, budget, o)
  o = o or {}
  local model = o.model or scope and scope.model
  local context = o.context or scope and scope.context or 2048
  check.that(model, "kv.fit_budget: outside a policy's plan a model is needed: kv.fit_budget(layers, bits, { model = m })")
  check.that(type(budget) == "number" and budget > 0, "kv.fit_budget: %s is not a number of bits", tostring(budget))

  local slots, cache = {}, {}
  local total = 0
  local function cost(s, bits)
    local c = bits and s.codec:with { bits = bits } or s.codec
    local y = layers[s.layer]
    local key = table.concat({ tostring(c.name), s.side, tostring(bits), y.sink or 0, y.recent or 0, y.exact or "f16" }, "|")
    for name, value in pairs(c.given) do key = key .. ";" .. name .. "=" .. tostring(value) end
    cache[key] = cache[key] or slot_bits(c, s.side, y, model, context)
    return cache[key] * s.weight
  end
  for l = 1, model.n_layers do
    check.that(layers[l], "kv.fit_budget: layer %d of %d is missing", l, model.n_layers)
    for _, side in ipairs { "k", "v" } do
      local codecs = side_codecs(layers[l][side], model.n_kv_heads, nil, ("kv.fit_budget: layer %d, %s"):format(l, side))
      for h, c in pairs(codecs) do
        local knob = c:param "bits"
        slots[#slots + 1] = { layer = l, side = side, head = h, codec = c, weight = h == 0 and model.n_kv_heads or 1,
          wanted = knob and c:value("bits", side), min = knob and (knob.min > 0 and knob.min or 1), max = knob and knob.max }
        total = total + slots[#slots].weight
      end
    end
  end
  table.sort(slots, function(a, b)
    if a.layer ~= b.layer then return a.layer < b.layer end
    if a.side ~= b.side then return a.side < b.side end
    return a.head < b.head
  end)
  local function set(scale)
    local sum = 0
    for _, s in ipairs(slots) do
      if s.wanted then s.bits = math.max(s.min, math.min(s.max, math.floor(s.wanted * scale + 1e-9))) end
      sum = sum + cost(s, s.bits)
    end
    return sum / total
  end
  local least = set(0)
  check.that(least <= budget + 1e-9, "kv.fit_budget: %.3g bits per element cannot be met: the fewest here are %.3f at context %d", budget, least, context)
  local lo, hi = 0, 16
  for _ = 1, 40 do
    local mid = (lo + hi) / 2
    if set(mid) <= budget + 1e-9 then lo = mid else hi = mid end
  end
  local sum = set(lo) * total
  while true do
    local best, gain
    for _, s in ipairs(slots) do
      if s.wanted and s.bits < s.max then
        local short = s.wanted * lo - s.bits
        if short > 1e-6 and (not gain or short > gain + 1e-9) and (sum + cost(s, s.bits + 1) - cost(s, s.bits)) / total <= budget + 1e-9 then best, gain = s, short end
      end
    end
    if not best then break end
    sum = sum + cost(best, best.bits + 1) - cost(best, best.bits)
    best.bits = best.bits + 1
  end

  local out = {}
  for l = 1, model.n_layers do
    out[l] = {}
    for key, value in pairs(layers[l]) do out[l][key] = value end
  end
  for _, s in ipairs(slots) do
    local c = s.bits and s.codec:with { bits = s.bits } or s.codec
    if s.head == 0 then out[s.layer][s.side] = c
    else
      if out[s.layer][s.side] == layers[s.layer][s.side] then out[s.layer][s.side] = {} end
      out[s.layer][s.side][s.head] = c
    end
  end
  return out
end

--- The model, context and calibration that a policy is being resolved for.
function M._scope() return scope end

return setmetatable(M, {
  __call = function(_, def) return M.new(def) end,
  __index = function(_, name) return named[name] and require(named[name])[name] end,
})
