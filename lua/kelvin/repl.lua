--- kelvin.repl: explore by hand.  Lines come from libedit on a terminal and from stdin otherwise; nothing ends the session
-- but the end of input.
--
-- A line is tried as `return line`, then as a statement; it continues on the next only when Lua says that it ended too soon
-- ('<eof>').  Results print themselves and stay in `_`.  `?name` shows help.  Globals live in a strict table of their own.

local K = require "kelvin.ffi"
local C, ffi = K.C, K.ffi
local help = require "kelvin.help"
local strict = require "kelvin.strict"
local doc = help.doc

local M, Repl = {}, {}
Repl.__index = Repl

-- ---- values as text ---------------------------------------------------------------------------------------------------

local function is_name(s) return type(s) == "string" and s:match "^[%a_][%w_]*$" end

local kinds = { number = 1, string = 2 }
local function sorted_keys(t)
  local keys = {}
  for k in pairs(t) do keys[#keys + 1] = k end
  table.sort(keys, function(a, b)
    local x, y = kinds[type(a)] or 3, kinds[type(b)] or 3
    if x ~= y then return x < y end
    if x < 3 then return a < b end
    return tostring(a) < tostring(b)
  end)
  return keys
end

local MAX_ENTRIES, WIDTH = 40, 100

--- repl.show(value): text of a value: its own __tostring, or a table's entries in order, two levels deep.
function M.show(v, depth, seen)
  depth, seen = depth or 0, seen or {}
  local kind = type(v)
  if kind == "string" then return depth == 0 and ("%q"):format(v):gsub("\\\n", "\\n"):gsub("\r", "\\r"):gsub("%z", "\\0") or '"' .. v .. '"' end
  if kind == "number" then return ("%.14g"):format(v) end
  if kind ~= "table" then return tostring(v) end
  local meta = getmetatable(v)
  if meta and meta.__tostring then return tostring(v) end
  if seen[v] then return "{…}" end
  if next(v) == nil then return "{}" end
  if depth >= 2 then return "{…}" end
  seen[v] = true
  local parts, n = {}, 0
  for _, k in ipairs(sorted_keys(v)) do
    n = n + 1
    if n > MAX_ENTRIES then
      parts[#parts + 1] = "…"
      break
    end
    local text = M.show(v[k], depth + 1, seen)
    if type(k) == "number" and k >= 1 and k <= #v then parts[#parts + 1] = text
    else parts[#parts + 1] = (is_name(k) and k or "[" .. tostring(k) .. "]") .. " = " .. text end
  end
  seen[v] = nil
  local line = "{ " .. table.concat(parts, ", ") .. " }"
  local pad = ("  "):rep(depth + 1)
  if #line <= WIDTH and not line:find "\n" then return line end
  for i, p in ipairs(parts) do parts[i] = pad .. p end
  return "{\n" .. table.concat(parts, ",\n") .. "\n" .. ("  "):rep(depth) .. "}"
end

-- ---- one session --------------------------------------------------------------------------------------------------------

--- A session that reads lines and writes through `write`; `kv` is set in its globals.
function M.new(write)
  local env = strict.environment(_G)
  local kv = require "kelvin"
  env.kv = kv
  local self = setmetatable({ write = write or function(s) io.stdout:write(s) end, env = env, buffer = nil }, Repl)
  env._ = false
  env.print = function(...)
    local out = {}
    for i = 1, select("#", ...) do out[i] = tostring((select(i, ...))) end
    self.write(table.concat(out, "\t") .. "\n")
  end
  env.who = function() return self:who() end
  env.help = function(name) self:help(name or "") end
  return self
end

doc("who", [[
  who()
  The names defined in this session, with their values.]])
function Repl:who()
  local hidden = { kv = true, _ = true, _G = true, print = true, who = true, help = true }
  local out = {}
  for _, name in ipairs(sorted_keys(self.env)) do
    if not hidden[name] then
      local text = M.show(self.env[name], 1):match "^[^\n]*"
      out[#out + 1] = ("  %-12s %s"):format(tostring(name), text:sub(1, 96))
    end
  end
  self.write(#out > 0 and table.concat(out, "\n") .. "\n" or "  nothing yet\n")
end

function Repl:help(name)
  name = name:gsub("^%s+", ""):gsub("%s+$", "")
  if name == "" then return self.write(help.overview() .. "\n") end
  local text = help.text(name)
  if not text then
    local names = {}
    for i, topic in ipairs(help.names()) do names[2 * i - 1], names[2 * i] = topic, topic:match "[%w_]+$" end
    local near = require("kelvin.check").near(name, names)
    text = ("no help for '%s'%s"):format(name, #near > 0 and "; near: " .. table.concat(near, ", ") or "; ? lists what there is")
  end
  self.write(text .. "\n")
end

local function compile(text, env)
  local f, err = loadstring("return " .. text, "=repl")
  if not f then f, err = loadstring(text, "=repl") end
  if f then setfenv(f, env) end
  return f, err
end

local function incomplete(err) return err:match "'<eof>'%s*$" ~= nil end

local function clean(err, multi)
  if type(err) == "table" and type(err.message) == "string" then return err.message end
  if type(err) ~= "string" then return M.show(err) end
  return (err:gsub("^repl:(%d+): ", multi and "line %1: " or ""))
end

local function keep(env, ok, ...)
  if ok then env._ = (...) end
  return ok, select("#", ...), { ... }
end

-- Ctrl-C stops a line of Lua: compiled loops ask nobody, so what is typed at the prompt is interpreted (functions that it calls
-- are compiled as ever), and the interpreter asks every HOOK_EVERY instructions.
local HOOK_EVERY = 10000
local function stop_on_interrupt()
  if C.kv_interrupted() == 1 then error({ interrupted = true, message = "interrupted" }, 0) end
end

local function guarded(f, handler)
  jit.off(f)
  debug.sethook(stop_on_interrupt, "", HOOK_EVERY)
  return (function(...)
    debug.sethook()
    return ...
  end)(xpcall(f, handler))
end

--- One line.  Returns true when more is wanted to complete what was begun.
function Repl:line(text)
  if not self.buffer and text:match "^%s*%?" then
    self:help(text:match "^%s*%?(.*)$")
    return false
  end
  if not self.buffer and not text:find "%S" then return false end
  local whole = self.buffer and self.buffer .. "\n" .. text or text
  local f, err = compile(whole, self.env)
  if not f and incomplete(err) then
    self.buffer = whole
    return true
  end
  self.buffer = nil
  local multi = whole:find "\n"
  if not f then
    self.write("error: " .. clean(err, multi) .. "\n")
    return false
  end
  local trace
  local before = self.env._
  local ok, n, results = keep(self.env, guarded(f, function(e)
    trace = debug.traceback("", 2)
    return e
  end))
  if not ok then
    require("kelvin.log").clear()
    self.write("error: " .. clean(results[1], multi) .. "\n")
    require("kelvin.log").debug("%s", trace)
    return false
  end
  if n == 0 then self.env._ = before end
  for i = 1, n do
    local good, shown = pcall(M.show, results[i])
    if results[i] ~= nil or n > 1 then self.write((good and shown or "error: " .. tostring(shown)) .. "\n") end
  end
  return false
end

--- Forgets a half-typed statement.
function Repl:cancel() self.buffer = nil end

--- Candidates for completion: globals, fields of kv, methods of objects here, codec and model names.
function Repl:words()
  local set = {}
  local function add(w) set[w] = true end
  for _, w in ipairs { "and", "break", "do", "else", "elseif", "end", "for", "function", "if", "in", "local", "nil", "not", "or", "repeat", "return", "then", "until", "while" } do add(w) end
  for name, value in pairs(self.env) do
    if is_name(name) then
      add(name)
      local meta = getmetatable(value)
      if type(value) == "table" and name ~= "kv" and name ~= "_G" then
        for k in pairs(value) do if is_name(k) and k:sub(1, 1) ~= "_" then add(name .. "." .. k) end end
      end
      local topic = type(meta) == "table" and meta.__name
      for _, t in ipairs(topic and help.names() or {}) do
        local method = t:match("^" .. topic .. ":(.*)$")
        if method then add(name .. ":" .. method) end
      end
      if type(meta) == "table" and type(meta.__index) == "table" then
        for k in pairs(meta.__index) do if is_name(k) and k:sub(1, 1) ~= "_" then add(name .. ":" .. k) end end
      end
    end
  end
  for name in pairs(_G) do if is_name(name) then add(name) end end
  for _, name in ipairs(require("kelvin")._names()) do add("kv." .. name) end
  for _, topic in ipairs(help.names()) do if topic:match "^kv%.[%w_.]+$" then add(topic) end end
  local ok, names = pcall(function() return require("kelvin.codec").names() end)
  for _, name in ipairs(ok and names or {}) do add(name) end
  for _, name in ipairs(require("kelvin.config").list "models") do add(name) end
  local out = sorted_keys(set)
  return table.concat(out, "\n")
end

-- ---- the loop -----------------------------------------------------------------------------------------------------------

local function history_path()
  local state = os.getenv "XDG_STATE_HOME"
  if not state or state == "" then state = (os.getenv "HOME" or ".") .. "/.local/state" end
  return state .. "/kelvin/history", state .. "/kelvin"
end

--- The first line: version, processor, threads, device.
function M.banner()
  local lib = require "kelvin.lib"
  local ok, cuda = pcall(lib.device, "cuda")
  local device = ok and cuda.available and cuda.name or ok and cuda.reason ~= "" and cuda.reason or "not here"
  device = "cuda: " .. device:gsub("^cuda: ", "")
  return ("kelvin %s  cpu %s, %d thread%s (%s)    ? for help, Ctrl-D to leave"):format(ffi.string(C.kv_version()), (lib.simd()), lib.threads(), lib.threads() == 1 and "" or "s", device)
end

doc("kv.repl", [[
  kv.repl.run()
  The interactive session that `kelvin` starts.  ?name shows help, _ is the last result, who() lists what is defined.
  History is kept in ~/.local/state/kelvin/history; piped input runs line by line.]])
function M.run()
  C.kv_interrupt_enable()
  local r = M.new()
  if C.kv_edit_available() ~= 1 then
    for line in io.stdin:lines() do
      r:line(line)
      io.stdout:flush()
    end
    if r.buffer then
      io.stdout:write("error: unfinished: ", r.buffer:match "^[^\n]*", "\n")
      return 1
    end
    return 0
  end
  local path, folder = history_path()
  os.execute(("mkdir -p '%s' 2>/dev/null"):format(folder:gsub("'", "'\\''")))
  C.kv_edit_history_load(path)
  io.stdout:write(M.banner(), "\n")
  io.stdout:flush()
  local more = false
  while true do
    C.kv_edit_words(r:words())
    local got = C.kv_edit_line(more and ">> " or "> ")
    if got == 0 then break end
    if got < 0 then
      r:cancel()
      more = false
    else
      local line = ffi.string(C.kv_edit_text())
      if line:find "%S" then
        C.kv_edit_history_add(line)
        C.kv_edit_history_save(path)
      end
      C.kv_interrupted()          -- a Ctrl-C from before this line is not this line's
      more = r:line(line)
    end
    io.stdout:flush()
  end
  io.stdout:write "\n"
  return 0
end

return M
