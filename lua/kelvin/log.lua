--- kelvin.log: words for a person, on stderr; stdout is for what was asked.
--
-- Levels error, warn, info, debug: KV_LOG sets the default, --log wins.  Progress is one rewritten line on a terminal, and
-- a line every ten seconds otherwise.

local M = { level = "info" }

local rank = { error = 1, warn = 2, info = 3, debug = 4 }
local from_env = os.getenv "KV_LOG"
if from_env and rank[from_env] then M.level = from_env end

local on_terminal, line_width = nil, 0
local last_line = 0

local function terminal()
  if on_terminal == nil then
    local K = require "kelvin.ffi"
    on_terminal = K.C.kv_isatty(2) ~= 0
  end
  return on_terminal
end

--- Removes the progress line, so that something else may be written.
function M.clear()
  if line_width > 0 then
    io.stderr:write("\r", (" "):rep(line_width), "\r")
    line_width = 0
  end
end

--- log.set(level): error, warn, info or debug; an error for anything else.
function M.set(level)
  require("kelvin.check").that(rank[level], "log: level '%s' is none of error, warn, info, debug", tostring(level))
  M.level = level
end

local function write(level, fmt, ...)
  if rank[level] > rank[M.level] then return end
  M.clear()
  io.stderr:write(level == "info" and "" or level .. ": ", select("#", ...) > 0 and fmt:format(...) or fmt, "\n")
end

function M.error(...) write("error", ...) end
function M.warn(...) write("warn", ...) end
function M.info(...) write("info", ...) end
function M.debug(...) write("debug", ...) end

--- log.progress(share, text): how far (0..1) and what is being done.
function M.progress(share, text)
  if rank[M.level] < rank.info then return end
  local now = require("kelvin.lib").now()
  local line = ("%3d %%  %s"):format(math.floor(100 * share), text or "")
  if terminal() then
    local width = require("kelvin.ffi").C.kv_term_width() - 1
    line = line:sub(1, width)
    io.stderr:write("\r", line, (" "):rep(math.max(0, line_width - #line)))
    io.stderr:flush()
    line_width = #line
  elseif now - last_line >= 10 then
    last_line = now
    io.stderr:write(line, "\n")
  end
end

return M
