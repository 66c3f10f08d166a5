--- kelvin.mixedkv: one codec on every layer, with more angles on some: TurboAngle's layer presets as data
-- (configs/layers/*.json), early boost, ranges of one's own, and protected layers at both ends.

local check = require "kelvin.check"
local config = require "kelvin.config"
local policy = require "kelvin.policy"
local doc = require("kelvin.help").doc

local M = {}

local function plain(name) return (name:lower():gsub("[^%w]", "")) end

local presets

--- Presets by name and alias: { name =, codec =, boost =, ... }.
function M.presets()
  if presets then return presets end
  presets = {}
  for _, file in ipairs(config.list "layers") do
    local c = config.load("layers", file)
    for name, p in pairs(c.presets) do
      p.name, p.codec, p.source = name, c.codec, c.source
      presets[name] = p
      for _, alias in ipairs(p.aliases or {}) do presets[alias] = p end
    end
  end
  return presets
end

local function names()
  local out = {}
  for name in pairs(M.presets()) do out[#out + 1] = name end
  table.sort(out)
  return out
end

local function has_shape(shape, model)
  for key, value in pairs(shape) do if model[key] ~= value then return false end end
  return true
end

--- The preset for a model: by what its name contains, then by its shape.
function M.match(model)
  local given = plain((model.name or "") .. " " .. (model.path or ""):gsub(".*/", ""))
  local all, by_shape = M.presets(), nil
  for _, name in ipairs(names()) do
    for _, part in ipairs(all[name].names) do if given:find(part, 1, true) then return all[name], "name" end end
    if not by_shape and all[name].shape and has_shape(all[name].shape, model) then by_shape = all[name] end
  end
  return by_shape, by_shape and "shape"
end

--- "1-8,17-24" or "1-8+17-24" as ranges.
local function ranges(text)
  local out = {}
  for part in text:gmatch "[^+,]+" do
    local first, last = part:match "^(%d+)%-(%d+)$"
    if not first then first, last = part:match "^(%d+)$", part:match "^(%d+)$" end
    check.that(first and tonumber(first) >= 1 and tonumber(first) <= tonumber(last), "policy 'mixedkv': layers='%s' is not ranges such as 1-8+17-24", text)
    out[#out + 1] = { first = tonumber(first), last = tonumber(last) }
  end
  return out
end

doc("kv.policy.mixedkv", [[
  kv.policy.mixedkv { preset = "auto", early = 0, layers = "", k_angles = 0, v_angles = 0, codec = "", edge = 0, edge_codec = "q8_0", sink = 0, recent = 0 } -> policy
  TurboAngle on every layer with more angles on some.  preset: tinyllama, mistral-7b (early_boost_mistral_like), smollm2, phi-1.5,
  stablelm-2, starcoder2, olmo-1b, uniform, or auto: by the model's name, then its shape.  early = k: layers 1..k instead;
  layers = "1-8+17-24": these.  k_angles, v_angles: of boosted layers (0: the preset's, or 256 and 128).  codec: another preset of
  family polar to start from (turboangle-rebalanced).  edge: layers at each end that hold edge_codec.  As an arm:
  policy=mixedkv:preset=phi-1.5:edge=1,sink=4]])
M.mixedkv = policy.new {
  name = "mixedkv", about = "TurboAngle with more angles on some layers (MixedKV)",
  params = {
    preset = { default = "auto", about = "a model's preset, uniform, or auto" },
    early = { default = 0, min = 0, about = "boost the first so many layers instead of the preset's" },
    layers = { default = "", about = "boost these layers instead: 1-8+17-24" },
    k_angles = { default = 0, min = 0, max = 4096, about = "angles of boosted keys; 0: the preset's" },
    v_angles = { default = 0, min = 0, max = 4096, about = "angles of boosted values; 0: the preset's" },
    codec = { default = "", about = "what every layer starts from; empty: the preset's" },
    edge = { default = 0, min = 0, about = "layers at each end that hold edge_codec" },
    edge_codec = { default = "q8_0", about = "of protected layers" },
    sink = { default = 0, min = 0, about = "exact tokens at the start" }, recent = { default = 0, min = 0, about = "exact tokens at the end" },
    mean = { default = "none", about = "both, k, v, auto, bias or none" },
  },
  plan = function(p, model)
    local preset
    local own = p.early > 0 or p.layers ~= ""
    if p.preset ~= "auto" and p.preset ~= "uniform" then
      preset = check.that(M.presets()[p.preset], "policy 'mixedkv': preset '%s' is unknown; known: auto, uniform, %s", p.preset, table.concat(names(), ", "))
    elseif p.preset == "auto" and not own then
      preset = check.that(M.match(model), "policy 'mixedkv': no preset fits model '%s' (%d layers, %d K/V heads, head_dim %d); name one of %s, or set early or layers",
        tostring(model.name), model.n_layers, model.n_kv_heads, model.head_dim, table.concat(names(), ", "))
    end
    local boost = p.layers ~= "" and ranges(p.layers) or p.early > 0 and { { first = 1, last = p.early } } or preset and preset.boost or {}
    local base = p.codec ~= "" and p.codec or preset and preset.codec or "turboangle"
    local k = p.k_angles > 0 and p.k_angles or preset and preset.k_angles or 256
    local v = p.v_angles > 0 and p.v_angles or preset and preset.v_angles or 128
    local out = {}
    for l = 1, model.n_layers do
      local y = { k = base, v = base, sink = p.sink, recent = p.recent, mean = p.mean }
      for _, r in ipairs(boost) do
        if l >= r.first and l <= r.last then y.k, y.v = { base, angles = k }, { base, angles = v } end
      end
      if l <= p.edge or l > model.n_layers - p.edge then y.k, y.v = p.edge_codec, p.edge_codec end
      out[l] = y
    end
    return out
  end,
}

return M
