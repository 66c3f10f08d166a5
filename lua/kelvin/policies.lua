--- kelvin.policies: what policies there are, TurboAngle's layer presets, and the plan that a policy makes for a model.
-- `kelvin policies` and kv.policies.

local check = require "kelvin.check"
local mixedkv = require "kelvin.mixedkv"
local policy = require "kelvin.policy"
local doc = require("kelvin.help").doc

local M = {}

local function columns(rows, indent)
  local width, out = {}, {}
  for _, r in ipairs(rows) do for i, cell in ipairs(r) do width[i] = math.max(width[i] or 0, #cell) end end
  for i, r in ipairs(rows) do
    local cells = {}
    for j, cell in ipairs(r) do cells[j] = j == #r and cell or ("%-" .. width[j] .. "s"):format(cell) end
    out[i] = indent .. table.concat(cells, "  ")
  end
  return table.concat(out, "\n")
end

local function layers(preset)
  local out = {}
  for i, r in ipairs(preset.boost) do out[i] = r.first .. "-" .. r.last end
  return table.concat(out, " ")
end

--- The presets once each, sorted by name; aliases are in them.
local function presets()
  local out = {}
  for name, p in pairs(mixedkv.presets()) do if p.name == name then out[#out + 1] = p end end
  table.sort(out, function(a, b) return a.name < b.name end)
  return out
end

local function range(p)
  if type(p.default) ~= "number" then return "" end
  return (p.min or p.max) and ("%s..%s"):format(p.min or "", p.max or "") or ""
end

local function parameters(x)
  local names, rows = {}, {}
  for name in pairs(x.params) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do
    local p = x.params[name]
    local value = x.given[name]
    if value == nil then value = p.default end
    rows[i] = { name, value == "" and "-" or tostring(value), range(p), p.about or "" }
  end
  return #rows > 0 and columns(rows, "    ") or "    none"
end

local function show_preset(p)
  local shape = {}
  for key, value in pairs(p.shape or {}) do shape[#shape + 1] = key .. " " .. value end
  table.sort(shape)
  return table.concat({ ("preset %s: %s"):format(p.name, p.about),
    columns({ { "layers", layers(p) .. (" with %d angles for keys, %d for values; the others as %s"):format(p.k_angles, p.v_angles, p.codec) },
      { "for", ("models whose name has %s, or %s"):format(table.concat(p.names, " or "), table.concat(shape, ", ")) },
      { "also", table.concat(p.aliases or {}, " ") ~= "" and table.concat(p.aliases, " ") or "-" },
      { "published", ("%g angle bits over %d layers, perplexity %+g (uniform %+g)"):format(p.published.angle_bits, p.published.layers, p.published.dppl, p.published.dppl_uniform) },
      { "source", p.source }, { "as an arm", "policy=mixedkv:preset=" .. p.name } }, "  ") }, "\n")
end

doc("kv.policies", [[
  kv.policies()                      the policies that have names, and TurboAngle's layer presets
  kv.policies(name)                  a policy's parameters, or a preset's layers, angles and published figures
  kv.policies(text, { model =, calib =, context = })   the plan that an arm or policy makes for a model
  The first two are tables that print themselves; the third is a plan (plan:describe()).  text: mixedkv:early=8,sink=4 or any arm.
  kv.policies.match(model) -> preset, "name" or "shape": what policy=mixedkv takes for it, or nil.]])
function M.list()
  local rows = {}
  for _, name in ipairs(policy._named()) do rows[#rows + 1] = { name = name, kind = "policy", about = policy[name].about } end
  for _, p in ipairs(presets()) do
    rows[#rows + 1] = { name = p.name, kind = "preset", about = p.about, layers = layers(p), k_angles = p.k_angles, v_angles = p.v_angles, published = p.published, source = p.source }
  end
  return setmetatable(rows, { __tostring = function(t)
    local named, cells = {}, { { "preset", "layers", "angles k", "v", "angle bits", "published dPPL", "uniform", "about" } }
    for _, r in ipairs(t) do
      if r.kind == "policy" then named[#named + 1] = { r.name, r.about }
      else
        cells[#cells + 1] = { r.name, r.layers, tostring(r.k_angles), tostring(r.v_angles), ("%g"):format(r.published.angle_bits), ("%+g"):format(r.published.dppl),
          ("%+g"):format(r.published.dppl_uniform), r.about }
      end
    end
    return table.concat({ "policies (kelvin policies NAME; as arms policy=NAME:PARAM=VALUE, FILE.lua for one of your own):", columns(named, "  "),
      "layer presets of mixedkv, TurboAngle with more angles on some layers:", columns(cells, "  ") }, "\n")
  end })
end

--- An arm's text from what a user writes: policies need no "policy=".
local function arm_text(text)
  local name = text:match "^[%w_%-]+"
  for _, known in ipairs(policy._named()) do if name == known then return "policy=" .. text end end
  return text:find "%.lua" and not text:find "^policy=" and "policy=" .. text or text
end

function M.describe(name, o)
  check.that(type(name) == "string", "kv.policies: a %s given, a name is needed", type(name))
  if o and o.model then return policy.resolve(arm_text(name), o.model, { calib = o.calib, context = o.context }) end
  local preset = mixedkv.presets()[name]
  if preset then return setmetatable({ name = name, preset = preset }, { __tostring = function() return show_preset(preset) end }) end
  for _, known in ipairs(policy._named()) do
    if name == known then
      local x = policy[name]
      return setmetatable({ name = name, params = x.params, about = x.about }, { __tostring = function()
        return ("policy %s: %s\n  parameters:\n%s\n  as an arm: policy=%s:PARAM=VALUE"):format(name, x.about, parameters(x), name)
      end })
    end
  end
  local known = policy._named()
  for _, p in ipairs(presets()) do known[#known + 1] = p.name end
  check.fail("policies: '%s' is neither a policy nor a preset; known: %s (an arm needs a model: --model)", name, table.concat(known, ", "))
end

M.match = mixedkv.match

--- For `kelvin policies`.
function M.main(a, calibration)
  if not a.model then
    print(tostring(a.name and M.describe(a.name) or M.list()))
    return 0
  end
  local model = require("kelvin.model").open(a.model)
  local preset, by = M.match(model)
  if not a.name then
    check.that(preset, "policies: no layer preset fits model '%s' (%d layers, %d K/V heads, head_dim %d)", model.name, model.n_layers, model.n_kv_heads, model.head_dim)
    print(("model %s: preset %s, by its %s\n%s"):format(model.name, preset.name, by, show_preset(preset)))
    return 0
  end
  local arm = arm_text(a.name)
  print(policy.resolve(arm, model, { calib = calibration(model, { path = a.calib, artifact = a.artifact, arms = { arm } }), context = a.context }):describe())
  return 0
end

return setmetatable(M, { __call = function(_, name, o) return name and M.describe(name, o) or M.list() end })
