--- kelvin.check: a status becomes a Lua error that points at the script's own line.
--
-- check(status) raises with kv_last_error(); check.fail(fmt, ...) raises a message of ours.  The position put in front is
-- that of the nearest caller outside lua/kelvin/; when there is none (the command line) the message stands alone.

local M = {}
local C, ffi

--- Called once by kelvin.ffi when the library is there.
function M.bind(lib, f) C, ffi = lib, f end

-- By the end of the path: a runner may load one module by two paths.
local OURS = "lua/kelvin/[%w_]+%.lua$"

local function caller_level()
  for level = 3, 60 do
    local info = debug.getinfo(level, "S")
    if not info then return 0 end
    if info.what ~= "C" and info.source ~= "=[C]" and not info.source:match(OURS) then
      if info.source:match "kv_main%.lua$" then return 0 end
      return level - 1       -- error() counts from its own caller
    end
  end
  return 0
end

--- Raises "fmt" formatted, at the line of the caller outside Kelvin.
function M.fail(fmt, ...)
  local message = select("#", ...) > 0 and fmt:format(...) or fmt
  error(message, caller_level())
end

--- Raises unless `ok`.  The message is formatted only when it is needed.
function M.that(ok, fmt, ...)
  if not ok then
    local message = select("#", ...) > 0 and fmt:format(...) or fmt
    error(message, caller_level())
  end
  return ok
end

--- The candidates nearest to `name` by edit distance, at most three, for "did you mean".
function M.near(name, candidates)
  local function distance(a, b)
    local row = {}
    for j = 0, #b do row[j] = j end
    for i = 1, #a do
      local diagonal = row[0]
      row[0] = i
      for j = 1, #b do
        local cost = a:byte(i) == b:byte(j) and 0 or 1
        diagonal, row[j] = row[j], math.min(row[j] + 1, row[j - 1] + 1, diagonal + cost)
      end
    end
    return row[#b]
  end
  local scored = {}
  for _, c in ipairs(candidates) do
    local d = distance(name, c)
    if c:find(name, 1, true) == 1 then d = math.min(d, 1) end
    if d <= math.max(1, math.floor(#name / 3)) and d < #name then scored[#scored + 1] = { d, c } end
  end
  table.sort(scored, function(a, b) if a[1] ~= b[1] then return a[1] < b[1] end return a[2] < b[2] end)
  local out = {}
  for i = 1, math.min(3, #scored) do out[i] = scored[i][2] end
  return out
end

--- "; did you mean a, b?" or the whole list when nothing is near.
function M.suggest(name, candidates, what)
  local near = M.near(tostring(name), candidates)
  if #near > 0 then return "; near: " .. table.concat(near, ", ") end
  return ("; %s: %s"):format(what or "allowed", table.concat(candidates, ", "))
end

return setmetatable(M, {
  __call = function(_, status)
    if status < 0 then error(ffi.string(C.kv_last_error()), caller_level()) end
    return status
  end,
})
