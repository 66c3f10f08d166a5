--- Experiments: a file returns data and functions; nothing happens until `kelvin run FILE`.
--
-- A grid (every combination of its axes, each made into a policy) or a list of arms is evaluated in lockstep over the same
-- tokens.  Each point becomes a row when its group ends; a failed point is a row as well, and the run goes on.

local json = require "kelvin.json"
local manifest = require "kelvin.manifest"
local measure = require "kelvin.measure"
local results = require "kelvin.results"
local report = require "kelvin.report"
local M, Experiment = {}, {}
Experiment.__index, Experiment.__name = Experiment, "experiment"

local function fail(...) require("kelvin.check").fail(...) end

local keys = {
  name = "string", title = "string", about = "string", model = "string", data = "string", seed = "number", grid = "table", arms = "table", skip = "function",
  policy = "function", measure = "table", report = "table", context = "number", chunks = "number", score = "string", mode = "string", sink = "number",
  recent = "number", calibrate = "table", calib = "string", group = "number", smoke = "table",
}
local settings = { "model", "data", "calib", "seed", "context", "chunks", "score", "mode", "sink", "recent" }

local function sorted(t)
  local out = {}
  for k in pairs(t) do out[#out + 1] = k end
  table.sort(out, function(a, b) return tostring(a) < tostring(b) end)
  return out
end

-- Sizes as they will be used, with smoke and --set applied.
local function validate(e)
  local least = { seed = 0, context = 8, chunks = 1, sink = 0, recent = 0, group = 1 }
  for _, k in ipairs(sorted(least)) do
    if e[k] % 1 ~= 0 or e[k] < least[k] or e[k] >= 2 ^ 31 then fail("experiment '%s': %s=%.14g is not a whole number from %d", e.name, k, e[k], least[k]) end
  end
  for k, words in pairs { score = { "second-half", "all" }, mode = { "visibility", "stream" } } do
    if e[k] ~= words[1] and e[k] ~= words[2] then fail("experiment '%s': %s='%s' is none of %s", e.name, k, e[k], table.concat(words, ", ")) end
  end
  return e
end

--- Checks a specification and returns it as an experiment; runs nothing.
function M.define(spec)
  if type(spec) ~= "table" then fail("kv.experiment: a %s given, a table is needed", type(spec)) end
  local e = { model = "smollm2-135m", data = "jargon", seed = 1, context = 2048, chunks = 4, score = "second-half", mode = "visibility", sink = 0, recent = 0, group = 6,
    measure = { "kld", "ppl" }, calibrate = {}, smoke = {} }
  for k, v in pairs(spec) do
    if not keys[k] then fail("kv.experiment: unknown key '%s'; allowed: %s", tostring(k), table.concat(sorted(keys), ", ")) end
    if type(v) ~= keys[k] and not (k == "arms" and type(v) == "function") then fail("kv.experiment: %s is a %s, a %s is needed", k, type(v), keys[k]) end
    e[k] = v
  end
  if not e.name or not e.name:find "^[%w_%-]+$" then fail("kv.experiment: name='%s' must be letters, digits, _ and - (it names a folder)", tostring(e.name)) end
  if (e.grid == nil) == (e.arms == nil) then fail("experiment '%s': either grid or arms is needed%s", e.name, e.grid and ", not both" or "") end
  if e.grid and not e.policy then fail("experiment '%s': a grid needs policy = function(p) … end", e.name) end
  for _, name in ipairs(e.measure) do
    if not measure.known[name] then fail("experiment '%s': measure '%s' is none of %s", e.name, tostring(name), table.concat(measure.names(), ", ")) end
  end
  return validate(setmetatable(e, Experiment))
end

function M.is(e) return getmetatable(e) == Experiment end

--- kv.table { rows =, cols =, cell =, where =, title = }: a pivot in a report.
function M.table(spec)
  if type(spec.rows) ~= "string" or type(spec.cell) ~= "string" then fail "kv.table: rows and cell are needed, such as rows = \"codec\", cell = \"kld.mean\"" end
  local out = { kind = "table" }
  for k, v in pairs(spec) do out[k] = v end
  return out
end

--- kv.plot { x =, y =, series =, where =, log_x =, log_y =, front =, title = }: a plot in a report.
function M.plot(spec)
  if type(spec.x) ~= "string" or type(spec.y) ~= "string" then fail "kv.plot: x and y are needed, such as x = \"bits_allin\", y = \"kld.mean\"" end
  local out = { kind = "plot" }
  for k, v in pairs(spec) do out[k] = v end
  return out
end

local function grid_name(p)
  local parts = {}
  for i, k in ipairs(sorted(p)) do parts[i] = k .. "=" .. tostring(p[k]) end
  return table.concat(parts, " ")
end

--- The points: { name, point = {axis = value}, tags = {family = …}, arm = what kv.eval takes, skip = reason }.  Axes in
-- alphabetical order, the last turning fastest.  model: for arms that depend on it.
function Experiment:points(model)
  local out = {}
  if self.arms then
    local arms = self.arms
    if type(arms) == "function" then arms = arms(model, self) end
    if type(arms) ~= "table" then fail("experiment '%s': arms gave a %s, a list is needed", self.name, type(arms)) end
    for i, a in ipairs(arms) do
      local arm, tags = a, {}
      if type(a) == "table" and (a.arm or a.skip) then
        arm = a.arm
        for k, v in pairs(a) do if k ~= "arm" then tags[k] = v end end
      end
      local name = tags.name or type(arm) == "string" and arm or type(arm) == "table" and arm.name or "arm " .. i
      local skip = tags.skip
      tags.name, tags.skip = nil, nil
      out[i] = { name = name, point = {}, tags = tags, arm = arm, skip = skip }
    end
    return out
  end
  local axes = sorted(self.grid)
  local function walk(i, p)
    if i > #axes then
      local point = {}
      for k, v in pairs(p) do point[k] = v end
      out[#out + 1] = { name = grid_name(point), point = point, tags = {}, skip = self.skip and self.skip(point) or nil }
      return
    end
    local values = self.grid[axes[i]]
    if type(values) ~= "table" or #values == 0 then fail("experiment '%s': grid.%s must be a list of values", self.name, tostring(axes[i])) end
    for _, v in ipairs(values) do
      p[axes[i]] = v
      walk(i + 1, p)
    end
    p[axes[i]] = nil
  end
  walk(1, {})
  return out
end

--- Loads a file that returns an experiment.
function M.load(path)
  local chunk, message = loadfile(path)
  if not chunk then fail("%s", message) end
  local e = chunk()
  if not M.is(e) then fail("%s: it returns a %s, kv.experiment{…} is needed", path, type(e)) end
  return e
end

-- "seed=2", "codec=int" (an axis of the grid, cut to that value): a copy with the settings replaced.
local function override(e, set)
  local c = {}
  for k, v in pairs(e) do c[k] = v end
  setmetatable(c, Experiment)
  for _, item in ipairs(set) do
    local k, v = item[1], item[2]
    local kind = keys[k]
    if e.grid and e.grid[k] ~= nil then
      local grid, found = {}, nil
      for a, values in pairs(c.grid) do grid[a] = values end
      for _, have in ipairs(e.grid[k]) do if tostring(have) == tostring(v) then found = have end end
      if found == nil then fail("--set %s=%s: the grid has no such value", k, tostring(v)) end
      grid[k] = { found }
      c.grid = grid
    elseif kind == "number" then
      c[k] = tonumber(v)
      if not c[k] then fail("--set %s=%s: a number is needed", k, tostring(v)) end
    elseif kind == "string" or (kind == "table" and type(v) == "table") then c[k] = v
    else fail("--set %s: it is none of %s or an axis of the grid", k, table.concat(settings, ", ")) end
  end
  return c
end

--- An experiment with smoke and --set applied.
function M.resolve(e, opts)
  local set = {}
  if opts.smoke then
    local smoke = { context = 128, chunks = 1, calibrate = { chunks = 1, context = 128 } }
    for k, v in pairs(e.smoke) do smoke[k] = v end
    for _, k in ipairs(sorted(smoke)) do set[#set + 1] = { k, smoke[k] } end
  end
  if opts.model and opts.model ~= "" then set[#set + 1] = { "model", opts.model } end
  if opts.text and opts.text ~= "" then set[#set + 1] = { "data", opts.text } end
  if opts.calib and opts.calib ~= "" then set[#set + 1] = { "calib", opts.calib } end
  for _, item in ipairs(opts.set or {}) do
    local k, v = item:match "^([%w_]+)=(.*)$"
    if not k then fail("--set %s: KEY=VALUE is needed", item) end
    set[#set + 1] = { k, v }
  end
  return validate(override(e, set))
end

local function list(points)
  for i, p in ipairs(points) do print(("%3d  %s%s"):format(i, p.name, p.skip and "  skipped: " .. p.skip or "")) end
  return 0
end

-- Does a policy or an arm remove calibrated means, or read stats?  Calibrating always is simplest and costs two chunks.
local function calibrate(e, model, text, progress)
  local o = e.calibrate
  local context, chunks = o.context or math.min(512, e.context), o.chunks or 8
  local name = text.calib_name and ("'%s'"):format(text.calib_name) or ("the calibration part of '%s'"):format(text.name)
  progress:say("calibrating on %d chunks of %d tokens of %s", chunks, context, name)
  local c = model:calibrate { text = text.calibrate, name = name, context = context, chunks = chunks, on_progress = function(done, all) progress:update(done, all, "calibration") end }
  c.source = { name = text.calib_name or text.name, part = not text.calib_name and "calibrate" or nil, sha256 = text.calibrate_sha256 }
  return c
end

-- Points as arms: plan, id, and what the row says about itself.
local function prepare(e, points, model, calib, inputs)
  local policies = require "kelvin.policy"
  for _, p in ipairs(points) do
    if not p.skip then
      local ok, message = pcall(function()
        local what = p.arm
        if e.policy then what = e.policy(p.point) end
        local policy = policies.of(what, { sink = e.sink, recent = e.recent })
        p.spec = policy.arm
        p.plan = policies.resolve(policy, model, { calib = calib, seed = e.seed, context = e.context })
      end)
      local expansion = { error = not ok and tostring(message) or nil }
      if ok then
        p.plan.name = p.name
        p.digest, p.expansion = manifest.plan(p.plan.resolved)
        expansion.plan = p.digest
      else p.message = tostring(message) end
      p.inputs = {}
      for k, v in pairs(inputs) do p.inputs[k] = v end
      p.inputs.arm, p.inputs.point, p.inputs.policy = p.name, p.point, expansion
      p.id = manifest.digest(p.inputs)
    end
  end
end

local function side(spec)
  if type(spec) == "string" then return spec end
  if type(spec) ~= "table" or type(spec[1]) ~= "string" then return spec and "mixed" or nil end
  local parts = { spec[1] }
  for _, k in ipairs(sorted(spec)) do
    if type(k) == "string" then parts[#parts + 1] = k .. "=" .. tostring(spec[k]) end
  end
  return table.concat(parts, ":")
end

-- What the row says besides its numbers.
local function complete(row, p, host)
  local spec = p.spec or {}
  row.arm, row.k, row.v = p.name, side(spec.k) or row.k, side(spec.v) or row.v
  row.plan, row.seed = nil, nil
  for k, v in pairs(p.tags) do row[k] = v end
  if next(p.point) then row.point = p.point end
  local m = { schema = "kelvin.row.1", id = p.id, host = host }
  for k, v in pairs(p.inputs) do m[k] = v end
  m.arm, m.point = nil, nil
  row.manifest = m
  return row
end

-- Every n-th point from the i-th of those that are measured: what shard i of n does.
local function part_of(points, shard)
  local out, n = {}, 0
  for _, p in ipairs(points) do
    if not p.skip then n = n + 1 end
    if p.skip or (n - shard[1]) % shard[2] == 0 then out[#out + 1] = p end
  end
  return out
end

--- `kelvin run FILE`: runs an experiment and returns the exit status: 0, 1 when a point failed, 130 after Ctrl-C.
-- opts: smoke, resume, list, set = {"key=value"}, out = folder, model, text, calib, shard = { i, n }.
function M.run_file(path, opts)
  opts = opts or {}
  local e = M.resolve(M.load(path), opts)
  local function open() return require("kelvin.model").open(e.model) end
  local depends = type(e.arms) == "function"
  local all = not depends and e:points()
  if opts.list then
    all = all or e:points(open())
    return list(opts.shard and part_of(all, opts.shard) or all)
  end

  local lib, K = require "kelvin.lib", require "kelvin.ffi"
  local started = os.date "!%Y-%m-%dT%H:%M:%SZ"
  local model = open()
  all = all or e:points(model)
  local points = opts.shard and part_of(all, opts.shard) or all
  local text = require("kelvin.text").load(e.data, e.calib)
  local model_sha = lib.sha256_file(model.path)
  local ids = model:tokenize(text.score)
  if #ids < e.context then fail("experiment '%s': the scored part of '%s' has %d tokens, one chunk of context=%d needs as many", e.name, text.name, #ids, e.context) end
  local code, git = manifest.code(), manifest.git(K.root)

  local config = {}
  for _, k in ipairs(settings) do config[k] = e[k] end
  config.model = model.name
  config.data, config.calib = text.name, text.calib_name
  config.device, config.device_name = model.device, model.device_name
  config.name, config.measure, config.calibrate, config.smoke = e.name, json.array(e.measure), e.calibrate, opts.smoke or nil
  config.points = json.array {}
  for i, p in ipairs(all) do config.points[i] = p.name end
  local checkout = K.exists(K.root .. "/core/kelvin.h")       -- an installed tree is not the user's to write in
  local parent = (opts.out or (checkout and K.root .. "/" or "") .. "results/scratch"):gsub("(.)/+$", "%1") .. "/" .. (path:match "([^/]+)%.lua$" or e.name)
  local run = results.open(parent, results.run_id { config = config, model = model_sha, text = text.sha256, commit = git.commit }, opts.resume, opts.shard)
  local progress = require("kelvin.progress").new { tty = K.C.kv_isatty(2) ~= 0, width = K.C.kv_term_width(), now = lib.now, log = run.log }
  local smoke, resume = opts.smoke and " --smoke" or "", ""
  for _, s in ipairs(opts.set or {}) do resume = resume .. " --set " .. manifest.quote(s) end
  if opts.model and opts.model ~= "" then resume = resume .. " --model " .. manifest.quote(opts.model) end
  if opts.text and opts.text ~= "" then resume = resume .. " --text " .. manifest.quote(opts.text) end
  if opts.calib and opts.calib ~= "" then resume = resume .. " --calib " .. manifest.quote(opts.calib) end
  if model.device then resume = resume .. " --device " .. manifest.quote(model.device) end
  if opts.shard then resume = (resume .. " --shard %d/%d"):format(opts.shard[1], opts.shard[2]) end
  if opts.out then resume = resume .. " --out " .. manifest.quote(opts.out) end
  local command = "kelvin run " .. path .. smoke .. resume
  progress:say("%s: %d points, %s, text %s, context %d, %d chunks%s", e.name, #points, model.name, text.name, e.context, e.chunks, run.replaced and " (replaces the rows of an earlier run)" or "")

  local interrupted, calib
  local ok, message = pcall(function() calib = calibrate(e, model, text, progress) end)
  if not ok then
    interrupted = tostring(message):find "interrupted" ~= nil
    if not interrupted then run:close() error(message, 0) end
  end
  local counts = { done = 0, skipped = 0, failed = 0, resumed = 0 }
  local described = { schema = "kelvin.run.1", run_id = run.id, experiment = e.name, title = e.title or e.name, about = e.about, command = command, config = config,
    report = json.array(e.report or {}), extra_columns = json.array(measure.columns(e.measure)), data = require("kelvin.text").describe(text),
    model = { name = model.name, sha256 = model_sha, bytes = model.file_bytes, arch = model.arch, weights = model.weight_type },
    git = git, code = code, host = manifest.host(), started = started, counts = counts, plans = {}, skipped = json.array {}, calibration = calib and calib:describe() }

  local pending = {}
  if not interrupted then
    local inputs = { model = { name = model.name, sha256 = model_sha, weights = model.weight_type }, data = require("kelvin.text").describe(text),
      calibration = calib:describe(), semantics = e.mode, score = e.score, context = e.context, chunks = e.chunks, seed = e.seed, measure = json.array(e.measure), code = code }
    prepare(e, points, model, calib, inputs)
    for _, p in ipairs(points) do
      if p.digest then described.plans[p.digest] = p.expansion end
      if p.skip then
        counts.skipped = counts.skipped + 1
        described.skipped[counts.skipped] = { point = p.name, reason = p.skip }
      elseif opts.resume and run:done(p.id) then counts.resumed = counts.resumed + 1
      else
        if p.message then
          counts.failed = counts.failed + 1
          run:append(complete({ status = "error", message = p.message }, p, described.host))
          progress:say("%-44s failed: %s", p.name, p.message)
        else pending[#pending + 1] = p end
      end
    end
  end
  run:save(described)

  local ctx = { model = model, context = e.context, ids = ids }
  local function evaluate(group)
    local arms, at = {}, 0
    for i, p in ipairs(group) do arms[i] = p.plan end
    local rows = require("kelvin.eval").run { model = model, tokens = ids, arms = arms, context = e.context, chunks = e.chunks, score = e.score, mode = e.mode,
      calib = calib, seed = e.seed, first_group = 1, group = e.group, on_progress = function(share, what) progress:update(share, 1, what) end,
      on_row = function(row)
        at = at + 1
        local p = group[at]
        local measured, why = pcall(measure.run, e.measure, ctx, row, p)
        if not measured then row.status, row.message = "error", tostring(why) end
        p.finished = true
        counts[row.status == "error" and "failed" or "done"] = counts[row.status == "error" and "failed" or "done"] + 1
        run:append(complete(row, p, described.host))
        local t = require "kelvin.table"
        progress:say("%-44s %6.2f bits  KLD %s  %s", p.name, json.number(row.bits_allin) or 0, t.with_error(row.kld.mean, row.kld.se), row.status)
      end }
    return rows.interrupted
  end
  local function attempt(group)
    local fine, result = pcall(evaluate, group)
    if fine then return result end
    if tostring(result):find "interrupted" then return true end
    local left = {}
    for _, p in ipairs(group) do if not p.finished then left[#left + 1] = p end end
    if #left > 1 then -- one arm must not take the others with it: each goes alone
      for _, p in ipairs(left) do if attempt { p } then return true end end
    elseif left[1] then
      counts.failed = counts.failed + 1
      run:append(complete({ status = "error", message = tostring(result) }, left[1], described.host))
      progress:say("%-44s failed: %s", left[1].name, tostring(result))
    end
  end
  if #pending > 0 and not interrupted then interrupted = attempt(pending) end

  progress:clear()
  described.finished = os.date "!%Y-%m-%dT%H:%M:%SZ"
  described.interrupted = interrupted or nil
  run:save(described)
  run:close()
  local files = { run.path }
  if opts.shard then
    io.stdout:write(("%s: %d rows of shard %d of %d; with all shards' files in one folder: kelvin report %s\n"):format(run.path, #run.own, opts.shard[1], opts.shard[2], run.dir))
  else
    local table_text
    table_text, files = report.make(run.dir)
    io.stdout:write(table_text, "\n", parent, "/latest/report.html\n")
  end
  io.stdout:flush()
  if interrupted then
    progress.log = nil
    progress:say("interrupted: %d rows are kept in %s; go on with: %s --resume", #run.own, run.dir, command)
    return 130
  end
  if counts.failed > 0 then io.stderr:write(("%d of %d points failed; see %s\n"):format(counts.failed, #points, files[1])) end
  return counts.failed > 0 and 1 or 0
end

return setmetatable(M, { __call = function(_, spec) return M.define(spec) end })
