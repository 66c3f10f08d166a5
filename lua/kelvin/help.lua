--- kelvin.help: docstrings that `?name` in the REPL, `kelvin help` and the docs show.
--
-- A module registers text beside the function it describes.  The first line is the signature, the rest says shapes,
-- units, errors and where it comes from.

local M = { topics = {} }

--- help.doc(name, text): registers text under a public name such as "kv.codec" or "session:feed".
function M.doc(name, text)
  local lines = {}
  for line in (text .. "\n"):gmatch "(.-)\n" do lines[#lines + 1] = line end
  while lines[1] and not lines[1]:find "%S" do table.remove(lines, 1) end
  while lines[#lines] and not lines[#lines]:find "%S" do table.remove(lines) end
  local margin
  for _, line in ipairs(lines) do
    if line:find "%S" then
      local n = #line:match "^ *"
      margin = math.min(margin or n, n)
    end
  end
  for i, line in ipairs(lines) do lines[i] = line:sub((margin or 0) + 1) end
  M.topics[name] = table.concat(lines, "\n")
end

-- Everything is described even before it is used: load the modules that register text.
local described = { "lib", "tensor", "codec", "compare", "arm", "policy", "policies", "mixedkv", "hybrid", "budgets", "plan", "model", "session", "batch", "calib", "eval", "experiment", "report",
  "json", "config", "container", "index", "log", "bench", "doctor", "repl" }
local loaded
local function load_all()
  if loaded then return end
  loaded = true
  for _, name in ipairs(described) do pcall(require, "kelvin." .. name) end
end

--- help.names(): every documented name, sorted.
function M.names()
  load_all()
  local names = {}
  for name in pairs(M.topics) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- help.text(name): the docstring, or nil.  "codec" finds "kv.codec"; "feed" finds "session:feed".
function M.text(name)
  load_all()
  name = name:gsub("^%s+", ""):gsub("%s+$", "")
  local t = M.topics
  if t[name] or t["kv." .. name] then return t[name] or t["kv." .. name] end
  local found = {}
  for topic, text in pairs(t) do
    if topic:match "[%w_]+$" == name or topic:match "^%w+" == name then found[#found + 1] = { topic, text } end
  end
  if #found == 0 then return nil end
  table.sort(found, function(a, b) return a[1] < b[1] end)
  if #found == 1 then return found[1][2] end
  local out = {}
  for i, f in ipairs(found) do out[i] = f[2] end
  return table.concat(out, "\n\n")
end

--- help.overview(): one line for every documented name.
function M.overview()
  local out = { "?NAME shows one of these; values print themselves; _ holds the last result; Ctrl-D leaves", "" }
  for _, name in ipairs(M.names()) do
    local text = M.topics[name]
    local about = text:match "^[^\n]*\n+([^\n]*)" or ""
    out[#out + 1] = ("  %-24s %s"):format(name, about)
  end
  return table.concat(out, "\n")
end

return M
