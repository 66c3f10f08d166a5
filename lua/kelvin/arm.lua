--- kelvin.arm: one line of text names a whole cache setting.
--
--    q4_0                                          both sides
--    turboquant-4:norm=lsq                         both sides, a parameter
--    k=turboquant-4,v=turboquant-3,mean=both,sink=4,recent=32,page_rope=k,k.norm=lsq
--
-- The result is what kv.policy.uniform takes: { name =, k = { "turboquant-4", norm = "lsq" }, v = {...}, sink =, ... }.

local check = require "kelvin.check"
local codec = require "kelvin.codec"
local doc = require("kelvin.help").doc

local M = {}

local allowed = "k, v, k.PARAM, v.PARAM, sink, recent, mean, page_rope, page_tokens, exact, seed, name"

local function word(value) return tonumber(value) or value end

local function whole(arm, key, value, min)
  local n = tonumber(value)
  check.that(n and n % 1 == 0 and n >= min and n < 2 ^ 31, "arm '%s': %s=%s is not a whole number from %d", arm, key, value, min)
  return n
end

local function choice(arm, key, value, choices)
  for _, c in ipairs(choices) do if c == value then return value end end
  check.fail("arm '%s': %s=%s is none of %s", arm, key, value, table.concat(choices, ", "))
end

--- "turboquant-4:norm=lsq:seed=3" as { "turboquant-4", norm = "lsq", seed = 3 }.
function M.spec(text, arm)
  local spec = {}
  for part in text:gmatch "[^:]+" do
    if not spec[1] then spec[1] = part
    else
      local name, value = part:match "^([%w_]+)=(.+)$"
      check.that(name, "arm '%s': '%s' is not PARAM=VALUE", arm or text, part)
      spec[name] = word(value)
    end
  end
  check.that(spec[1], "arm '%s': a codec name is missing", arm or text)
  return spec
end

doc("kv.codec.parse_arm", [[
  kv.codec.parse_arm(text) -> table
  "q4_0", "turboquant-4:norm=lsq" (both sides) or "k=turboquant-4,v=turboquant-3,mean=both,sink=4,recent=32,page_rope=k,
  k.norm=lsq": what `kelvin eval --arm` takes, as the table that kv.policy.uniform takes.  mean: both, k, v, auto, bias or none.]])
function M.parse(text)
  check.that(type(text) == "string" and text:find "%S", "arm: text is needed, such as q4_0 or k=turboquant-4,v=turboquant-3")
  text = text:gsub("%s+", "")
  local arm, side_params = { name = text }, { k = {}, v = {} }
  for item in text:gmatch "[^,]+" do
    local key, value = item:match "^([%w_%.]+)=(.+)$"
    if not key then
      check.that(not arm.k and not arm.v, "arm '%s': '%s' comes after a codec; KEY=VALUE is needed, KEY one of %s", text, item, allowed)
      arm.k, arm.v = M.spec(item, text), M.spec(item, text)
    elseif key:find "%." then
      local side, name = key:match "^([kv])%.([%w_]+)$"
      check.that(side, "arm '%s': unknown key '%s'; allowed: %s", text, key, allowed)
      side_params[side][name] = word(value)
    elseif key == "k" or key == "v" then arm[key] = M.spec(value, text)
    elseif key == "sink" or key == "recent" or key == "seed" then arm[key] = whole(text, key, value, 0)
    elseif key == "page_tokens" then arm[key] = whole(text, key, value, 1)
    elseif key == "mean" then arm[key] = choice(text, key, value, { "both", "k", "v", "auto", "bias", "none" })
    elseif key == "page_rope" then arm[key] = choice(text, key, value, { "k", "none" })
    elseif key == "exact" then arm[key] = choice(text, key, value, { "f16", "f32", "bf16" })
    elseif key == "name" then arm[key] = value
    else check.fail("arm '%s': unknown key '%s'; allowed: %s", text, key, allowed)
    end
  end
  for _, side in ipairs { "k", "v" } do
    check.that(arm[side], "arm '%s': no codec for %s; write %s=CODEC, or one CODEC for both sides", text, side, side)
    for name, value in pairs(side_params[side]) do arm[side][name] = value end
    local params = {}
    for name, value in pairs(arm[side]) do if name ~= 1 then params[name] = value end end
    codec.new(arm[side][1], params)
  end
  return arm
end

return M
