--- A run's folder: rows.jsonl (appended and flushed as each point ends), run.json, log.txt, and what is derived from them.
--
--   results/scratch/<experiment>/<run-id>/   and beside it the link `latest`
--   run-id = UTC date + 8 hex digits of a digest of the resolved configuration, model, text and commit
--
-- Shard i of n of a run has the same folder and files of its own: rows.i-of-n.jsonl, run.i-of-n.json, log.i-of-n.txt.

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
      if row ~= nil and (type(row) ~= "table" or row == json.null or row.manifest ~= nil and type(row.manifest) ~= "table") then row, why = nil, ("%s:%d: a row is a JSON object"):format(path, n) end
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

-- Names in a folder that shards have written: stem "rows", extension "jsonl".
local function shards(dir, stem, extension)
  local out = {}
  for _, name in ipairs(folders(dir)) do
    if name:match("^" .. stem .. "%.%d+%-of%-%d+%." .. extension .. "$") then out[#out + 1] = name end
  end
  return out
end

--- One run from the files of its shards: rows.jsonl and run.json, the points in their order.  Nothing without shards.
-- The same files give the same bytes; shards that are missing or unfinished are named in run.json.
function M.merge(dir)
  local descriptions = shards(dir, "run", "json")
  if #descriptions == 0 then return end
  local run, described
  for _, name in ipairs(descriptions) do
    local d, message = json.read(dir .. "/" .. name)
    if not d then fail("%s", message) end
    if not run then
      run, described = d, { plans = {}, shards = json.array {} }
      run.counts = { done = 0, failed = 0, skipped = d.counts.skipped, resumed = 0 }
      run.command = run.command:gsub(" %-%-shard %d+/%d+", "")
      run.interrupted = nil
    end
    if d.run_id ~= run.run_id then fail("%s: it is of run %s, others here are of %s", dir .. "/" .. name, tostring(d.run_id), tostring(run.run_id)) end
    for digest, plan in pairs(d.plans or {}) do described.plans[digest] = plan end
    if d.started and d.started < run.started then run.started = d.started end
    if d.finished and d.finished > (run.finished or "") then run.finished = d.finished end
    described.shards[#described.shards + 1] = { shard = name:match "%.(%d+%-of%-%d+)%.", host = d.host, started = d.started, finished = d.finished, interrupted = d.interrupted }
  end
  run.plans, run.shards = described.plans, described.shards
  local order = {}
  for i, name in ipairs(run.config.points) do order[name] = i end
  local rows, at = {}, {}
  local files = shards(dir, "rows", "jsonl")
  table.insert(files, 1, "rows.jsonl")
  for _, name in ipairs(files) do
    for _, row in ipairs(M.rows(dir .. "/" .. name) or {}) do
      local key = row.manifest and row.manifest.id or row.arm
      if not at[key] or rows[at[key]].status == "error" then
        at[key] = at[key] or #rows + 1
        rows[at[key]] = row
      end
    end
  end
  table.sort(rows, function(a, b)
    local x, y = order[a.arm] or math.huge, order[b.arm] or math.huge
    if x ~= y then return x < y end
    return (a.manifest and a.manifest.id or "") < (b.manifest and b.manifest.id or "")
  end)
  local lines = {}
  for i, row in ipairs(rows) do
    lines[i] = json.encode(row) .. "\n"
    local kind = row.status == "error" and "failed" or "done"
    run.counts[kind] = run.counts[kind] + 1
  end
  run.counts.missing = #run.config.points - run.counts.skipped - #rows
  M.write(dir .. "/rows.jsonl", table.concat(lines))
  M.write(dir .. "/run.json", json.encode(run, "  ") .. "\n")
end

--- Opens a run's folder under `parent`.  With resume, an earlier folder of the same configuration (any date) is continued
-- and its rows are in run.rows, those of other shards too; without, rows of the same run are replaced.  run.own: those of
-- the file that is written.  shard: { i, n }.
function M.open(parent, id, resume, shard)
  M.mkdir(parent)
  local own, replaced = {}, false
  if resume then
    for _, name in ipairs(folders(parent)) do
      if name:match "^%d%d%d%d%-%d%d%-%d%d%-%x+$" and name:sub(-8) == id:sub(-8) then id = name end
    end
  end
  local run = setmetatable({ id = id, dir = parent .. "/" .. id, parent = parent }, Run)
  M.mkdir(run.dir)
  local part = shard and ("%d-of-%d."):format(shard[1], shard[2]) or ""
  local name = "rows." .. part .. "jsonl"
  local path = run.dir .. "/" .. name
  run.path, run.run_json = path, run.dir .. "/run." .. part .. "json"
  local old = M.read(path)
  if old and resume then
    local message
    own, message = M.rows(path)
    if not own then fail("%s", message) end
    if #old > 0 and old:sub(-1) ~= "\n" then
      local kept = {}
      for i, row in ipairs(own) do kept[i] = json.encode(row) .. "\n" end
      M.write(path, table.concat(kept))
    end
  elseif old and #old > 0 then replaced = true end
  local why
  run.file, why = io.open(path, resume and "ab" or "wb")
  if not run.file then fail("cannot write %s", why) end
  run.log = io.open(run.dir .. "/log." .. part .. "txt", resume and "ab" or "wb")
  run.own, run.rows, run.replaced = own, {}, replaced
  for i, row in ipairs(own) do run.rows[i] = row end
  if resume then
    local others = shards(run.dir, "rows", "jsonl")
    others[#others + 1] = "rows.jsonl"
    for _, other in ipairs(others) do
      for _, row in ipairs(other ~= name and M.rows(run.dir .. "/" .. other) or {}) do run.rows[#run.rows + 1] = row end
    end
  end
  manifest.capture("ln -sfn -- " .. manifest.quote(id) .. " " .. manifest.quote(parent .. "/latest"))
  return run
end

--- Appends a row; it is on disk when this returns.
function Run:append(row)
  local ok, why = self.file:write(json.encode(row), "\n")
  if ok then ok, why = self.file:flush() end
  if not ok then fail("cannot write %s/rows.jsonl: %s", self.dir, why) end
  for _, list in ipairs { self.own, self.rows } do
    local at = #list + 1
    for i, old in ipairs(list) do
      if old.manifest and row.manifest and old.manifest.id == row.manifest.id then at = i end
    end
    list[at] = row
  end
end

--- The row of an id that ended well, if there is one.
function Run:done(row_id)
  for _, row in ipairs(self.rows) do
    if row.manifest and row.manifest.id == row_id and row.status ~= "error" then return row end
  end
end

function Run:save(description) M.write(self.run_json, json.encode(description, "  ") .. "\n") end

function Run:close()
  self.file:close()
  if self.log then self.log:close() end
end

return M
