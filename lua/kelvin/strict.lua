--- kelvin.strict: a table of globals that says so when a name was never set, and what it might have been.

local check = require "kelvin.check"

local M = {}

--- strict.environment(base): a fresh globals table over `base`; reading an unknown name is an error.
function M.environment(base)
  local env = {}
  env._G = env
  return setmetatable(env, { __index = function(_, name)
    local value = base[name]
    if value ~= nil then return value end
    local names = {}
    for k in pairs(env) do names[#names + 1] = tostring(k) end
    for k in pairs(base) do names[#names + 1] = tostring(k) end
    table.sort(names)
    local near = check.near(tostring(name), names)
    error(("'%s' is not defined%s"):format(tostring(name), #near > 0 and "; near: " .. table.concat(near, ", ") or ""), 2)
  end })
end

return M
