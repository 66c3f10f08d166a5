--- kelvin.config: reads configs/*/*.json and checks every key against configs/schema.lua.
--
-- A wrong key, type or value is an error that names the file, the key and what is allowed.

local K = require "kelvin.ffi"
local check = require "kelvin.check"
local json = require "kelvin.json"

local M = { root = K.root }
local schema

local function validate(value, spec, path, file)
  local function fail(fmt, ...) check.fail("%s: %s", file, fmt:format(...)) end
  if spec.type == "array" then
    if type(value) ~= "table" or (next(value) ~= nil and #value == 0) then fail("'%s' is a %s, a list is needed", path, type(value)) end
    for i, v in ipairs(value) do validate(v, spec.items, ("%s[%d]"):format(path, i), file) end
    return
  end
  local lua_type = spec.type == "object" and "table" or spec.type
  if type(value) ~= lua_type and spec.type ~= "any" then fail("'%s' is a %s, a %s is needed", path, type(value), spec.type) end
  if spec.choices then
    local ok
    for _, c in ipairs(spec.choices) do ok = ok or c == value end
    if not ok then fail("'%s' is '%s', one of %s is needed", path, tostring(value), table.concat(spec.choices, ", ")) end
  end
  if spec.type ~= "object" then return end
  local keys = {}
  for k in pairs(spec.keys or {}) do keys[#keys + 1] = k end
  table.sort(keys)
  for k, v in pairs(value) do
    local s = spec.keys and spec.keys[k] or spec.values
    local at = path == "" and k or path .. "." .. k
    if not s then fail("unknown key '%s'%s", at, check.suggest(k, keys)) end
    validate(v, s, at, file)
  end
  for _, k in ipairs(keys) do
    if spec.keys[k].required and value[k] == nil then fail("key '%s' is missing: %s", path == "" and k or path .. "." .. k, spec.keys[k].about or "") end
  end
end

--- config.check(value, kind, file): validates against the schema's entry for `kind`; returns value.
function M.check(value, kind, file)
  schema = schema or dofile(M.root .. "/configs/schema.lua")
  check.that(schema[kind], "config: no schema for '%s'", kind)
  validate(value, schema[kind], "", file)
  return value
end

--- config.path(kind, name): where configs/<kind>/<name>.json lies.
function M.path(kind, name) return ("%s/configs/%s/%s.json"):format(M.root, kind, name) end

--- config.list(kind): names of the files in configs/<kind>/, sorted.
function M.list(kind)
  local names = {}
  local p = io.popen(("ls '%s/configs/%s' 2>/dev/null"):format(M.root:gsub("'", "'\\''"), kind))
  for line in p:lines() do names[#names + 1] = line:match "^(.*)%.json$" end
  p:close()
  table.sort(names)
  return names
end

--- config.load(kind, name): the checked content of configs/<kind>/<name>.json, or nil when there is no such file.
function M.load(kind, name)
  local path = M.path(kind, name)
  if not K.exists(path) then return nil end
  return M.check(check.that(json.read(path)), kind, path)
end

return M
