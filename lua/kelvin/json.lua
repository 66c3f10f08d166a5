--- JSON as results need it: a canonical encoder in Lua, a strict reader over the library's parser.
--
-- The encoder sorts keys and prints numbers with %.17g, so that equal data gives equal bytes and every double comes back
-- as it was (cJSON's printer does not keep 2^53).  JSON has no NaN: "nan", "inf" and "-inf" are written as strings and
-- json.number() turns them back.

local M = {}

-- An empty Lua table says nothing about its kind; arrays read from JSON, or marked with json.array, carry this.
local Array = { __name = "json.array" }

--- Stands for JSON's null inside tables, where nil would vanish.
M.null = setmetatable({}, { __tostring = function() return "null" end })

--- Marks a table as an array, so that an empty one is written as [].
function M.array(t) return setmetatable(t or {}, Array) end

local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }
local function quote(s)
  return '"' .. s:gsub('[%c"\\\127]', function(c) return escapes[c] or ("\\u%04x"):format(c:byte()) end) .. '"'
end

local function number(x)
  if x ~= x then return '"nan"' end
  if x == math.huge then return '"inf"' end
  if x == -math.huge then return '"-inf"' end
  if x == 0 then return "0" end -- -0 and 0 are the same value and must be the same bytes
  return ("%.17g"):format(x)
end

--- A number that may have been written as "nan", "inf" or "-inf"; nil for anything else.
function M.number(v)
  if type(v) == "number" then return v end
  if v == "nan" then return 0 / 0 elseif v == "inf" then return math.huge elseif v == "-inf" then return -math.huge end
end

local function is_array(t)
  if getmetatable(t) == Array then return true end
  local n = #t
  if n == 0 then return false end
  for k in pairs(t) do
    if type(k) ~= "number" or k < 1 or k > n or k % 1 ~= 0 then
      error("json: a table has both a list part and the key '" .. tostring(k) .. "'", 0)
    end
  end
  return true
end

local function encode(v, indent, depth, out)
  local kind = type(v)
  if v == nil or v == M.null then out[#out + 1] = "null"
  elseif kind == "string" then out[#out + 1] = quote(v)
  elseif kind == "number" then out[#out + 1] = number(v)
  elseif kind == "boolean" then out[#out + 1] = tostring(v)
  elseif kind ~= "table" then error("json: cannot write a " .. kind, 0)
  elseif depth > 60 then error("json: nested deeper than 60, or a cycle", 0)
  else
    local array, keys = is_array(v), {}
    if array then
      for i = 1, #v do keys[i] = i end
    else
      for k in pairs(v) do
        if type(k) ~= "string" then error("json: the key " .. tostring(k) .. " is not a string", 0) end
        keys[#keys + 1] = k
      end
      table.sort(keys)
    end
    local pad = indent and "\n" .. indent:rep(depth + 1) or ""
    out[#out + 1] = array and "[" or "{"
    for i, k in ipairs(keys) do
      if i > 1 then out[#out + 1] = "," end
      out[#out + 1] = pad
      if not array then out[#out + 1] = quote(k) .. (indent and ": " or ":") end
      encode(v[k], indent, depth + 1, out)
    end
    if indent and #keys > 0 then out[#out + 1] = "\n" .. indent:rep(depth) end
    out[#out + 1] = array and "]" or "}"
  end
end

--- Canonical text of a value; with indent ("  ") the same data spread over lines.
function M.encode(v, indent)
  local out = {}
  encode(v, indent, 0, out)
  return table.concat(out)
end

local function build(C, ffi, node)
  local kind = C.kv_json_type(node)
  if kind == C.KV_JSON_OBJECT then
    local t, child = {}, C.kv_json_child(node)
    while child ~= nil do
      t[ffi.string(C.kv_json_key(child))] = build(C, ffi, child)
      child = C.kv_json_next(child)
    end
    return t
  elseif kind == C.KV_JSON_ARRAY then
    local t, child = M.array(), C.kv_json_child(node)
    while child ~= nil do
      t[#t + 1] = build(C, ffi, child)
      child = C.kv_json_next(child)
    end
    return t
  elseif kind == C.KV_JSON_STRING then return ffi.string(C.kv_json_string(node))
  elseif kind == C.KV_JSON_NUMBER then return C.kv_json_number(node)
  elseif kind == C.KV_JSON_TRUE then return true
  elseif kind == C.KV_JSON_FALSE then return false
  end
  return M.null
end

--- Reads a JSON text; `what` names it in the message.  Returns nil and one line when it does not parse.
function M.decode(text, what)
  local ffi, C = require "ffi", require("kelvin.ffi").C
  local doc = ffi.new("kv_json *[1]")
  if C.kv_json_parse(doc, text, #text, what or "JSON") ~= 0 then return nil, ffi.string(C.kv_last_error()) end
  local ok, value = pcall(build, C, ffi, C.kv_json_root(doc[0]))
  C.kv_json_free(doc[0])
  if not ok then return nil, (what or "JSON") .. ": " .. tostring(value) end
  return value
end

--- Reads a JSON file.  Returns nil and one line when it is missing or does not parse.
function M.read(path)
  local f, message = io.open(path, "rb")
  if not f then return nil, message end
  local text = f:read("*a")
  f:close()
  return M.decode(text, path)
end

return M
