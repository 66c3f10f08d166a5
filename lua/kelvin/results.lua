--- A run's folder: rows.jsonl (appended and flushed as each point ends), run.json, log.txt, and what is derived from them.
--
--   results/scratch/<experiment>/<run-id>/   and beside it the link `latest`
--   run-id = UTC date + 8 hex digits of a digest of the resolved configuration, model, text and commit

local json = require "kelvin.json"
local manifest = require "kelvin.manifest"
local M, Run = {}, {}
Run.__index = Run

local function fail(...) require("kelvin.check").fail(...) end

--- Reads a whole file, or nil and a message.
function M.read(path)
  local f, message = io.open(path, "rb")
  if not f then return nil, message end
  local text = f:read("*a")
  f:close()
  return text
end

--- Writes a file so that a reader sees the old content or the new, never half of it.
function M.write(path, text)
  local f, message = io.open(path .. ".part", "wb")
  if not f then fail("cannot write %s", message) end
  local ok, why = f:write(text)
  if ok then ok, why = f:close() end
  if not ok then
    os.remove(path .. ".part")
    fail("cannot write %s: %s", path, why)
  end
  ok, why = os.rename(path .. ".part", path)
  if not ok then fail("cannot write %s", why) end
end

function M.mkdir(path)
  local out, ok = manifest.capture("mkdir -p -- " .. manifest.quote(path))
  if not ok then fail("%s", out:match "[^\n]*") end
end

--- Rows of a file, in order.  A row that was run again replaces the earlier one of the same id (or arm, if it has no id);
-- a last line that was cut off by a crash is left out and said in the second result.
function M.rows(path)
  local f, message = io.open(path, "rb")
  if not f then return nil, message end
  local rows, at, n, cut = {}, {}, 0, nil
  for line in f:lines() do
    n = n + 1
    if line:find "%S" then
      local row, why = json.decode(line, path .. ":" .. n)
      if cut then f:close() return nil, cut end
      if not row then cut = why
      else
        local key = row.manifest and row.manifest.id or row.arm or n
        if not at[key] then at[key] = #rows + 1 end
        rows[at[key]] = row
      end
    end
  end
  f:close()
  return rows, cut
end

--- "2026-01-31-1a2b3c4d"
function M.run_id(config, date) return (date or os.date "!%Y-%m-%d") .. "-" .. manifest.digest(config):sub(1, 8) end

local function folders(parent)
  local out = manifest.capture("ls -1 -- " .. manifest.quote(parent) .. " 2>/dev/null")
  local names = {}
  for name in out:gmatch "[^\n]+" do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- Opens a run's folder under `parent`.  With resume, an earlier folder of the same configuration (any date) is continued
-- and its rows are in run.rows; without, rows of the same run are replaced.
function M.open(parent, id, resume)
  M.mkdir(parent)
  local rows, replaced = {}, false
  if resume then
    for _, name in ipairs(folders(parent)) do
      if name:match "^%d%d%d%d%-%d%d%-%d%d%-%x+$" and name:sub(-8) == id:sub(-8) then id = name end
    end
  end
  local run = setmetatable({ id = id, dir = parent .. "/" .. id, parent = parent }, Run)
  M.mkdir(run.dir)
  local path = run.dir .. "/rows.jsonl"
  local old = M.read(path)
  if old and resume then
    local message
    rows, message = M.rows(path)
    if not rows then fail("%s", message) end
    if #old > 0 and old:sub(-1) ~= "\n" then
      local kept = {}
      for i, row in ipairs(rows) do kept[i] = json.encode(row) .. "\n" end
      M.write(path, table.concat(kept))
    end
  elseif old and #old > 0 then replaced = true end
  local why
  run.file, why = io.open(path, resume and "ab" or "wb")
  if not run.file then fail("cannot write %s", why) end
  run.log = io.open(run.dir .. "/log.txt", resume and "ab" or "wb")
  run.rows, run.replaced = rows, replaced
  manifest.capture("ln -sfn -- " .. manifest.quote(id) .. " " .. manifest.quote(parent .. "/latest"))
  return run
end

--- Appends a row; it is on disk when this returns.
function Run:append(row)
  local ok, why = self.file:write(json.encode(row), "\n")
  if ok then ok, why = self.file:flush() end
  if not ok then fail("cannot write %s/rows.jsonl: %s", self.dir, why) end
  for i, old in ipairs(self.rows) do
    if old.manifest and row.manifest and old.manifest.id == row.manifest.id then self.rows[i] = row return end
  end
  self.rows[#self.rows + 1] = row
end

--- The row of an id that ended well, if there is one.
function Run:done(row_id)
  for _, row in ipairs(self.rows) do
    if row.manifest and row.manifest.id == row_id and row.status ~= "error" then return row end
  end
end

function Run:save(description) M.write(self.dir .. "/run.json", json.encode(description, "  ") .. "\n") end

function Run:close()
  self.file:close()
  if self.log then self.log:close() end
end

return M
