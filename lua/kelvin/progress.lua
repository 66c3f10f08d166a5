--- Progress on stderr: one rewritten line on a terminal, a line every ten seconds elsewhere.
--
-- Whatever is said also goes to an optional log file, where each line stands alone.

local M = {}
M.__index = M

local function duration(s)
  if s ~= s or s == math.huge then return "?" end
  if s < 60 then return ("%d s"):format(math.floor(s + 0.5)) end
  if s < 3600 then return ("%d min %02d s"):format(math.floor(s / 60), s % 60) end
  return ("%d h %02d min"):format(math.floor(s / 3600), s % 3600 / 60)
end
M.duration = duration

--- @param o { stream = io.stderr, tty = bool, now = function, width = columns, log = file, every = 10 }
function M.new(o)
  o = o or {}
  local p = setmetatable({ stream = o.stream or io.stderr, tty = o.tty, now = o.now or os.time, width = o.width or 80,
    log = o.log, every = o.every or 10, drawn = false }, M)
  p.started = p.now()
  p.shown = p.started
  return p
end

--- A line that stays: clears what is drawn, prints, and logs.
function M:say(fmt, ...)
  local text = select("#", ...) > 0 and fmt:format(...) or fmt
  self:clear()
  self.stream:write(text, "\n")
  self.stream:flush()
  if self.log then self.log:write(os.date "!%H:%M:%S ", text, "\n") self.log:flush() end
end

function M:clear()
  if self.drawn then self.stream:write "\r\27[K" self.drawn = false end
end

--- done of total (any unit); `what` says what is being worked on.
function M:update(done, total, what)
  local now = self.now()
  local gap = self.tty and 0.1 or self.every
  if now - self.shown < gap then return end
  self.shown = now
  local share = total > 0 and math.min(1, done / total) or 0
  local spent = now - self.started
  local left = share > 0 and spent / share * (1 - share) or math.huge
  local text = ("%3d %%  %s left  %s"):format(math.floor(100 * share), duration(left), what or "")
  if self.tty then
    -- Cut at the width of the terminal: a wrapped line could not be rewritten.
    if #text >= self.width then text = text:sub(1, self.width - 1):gsub("[\194-\244][\128-\191]*$", "") end
    self.stream:write("\r\27[K", text)
    self.drawn = true
  else
    self.stream:write(text, "\n")
    if self.log then self.log:write(os.date "!%H:%M:%S ", text, "\n") end
  end
  self.stream:flush()
end

return M
