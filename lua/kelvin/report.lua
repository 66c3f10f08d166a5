--- table.md, plot.svg and report.html from rows.jsonl and the report's description in run.json: the same rows give the same
-- bytes, so `kelvin report DIR` can remake them anywhere.

local json = require "kelvin.json"
local svg = require "kelvin.svg"
local html = require "kelvin.html"
local tables = require "kelvin.table"
local results = require "kelvin.results"
local M = {}

-- What an axis or a cell says instead of its path.
local names = {
  bits_allin = "all-in bits per cached scalar", bits_payload = "payload bits per cached scalar", bits_nominal = "nominal bits per cached scalar",
  ["kld.mean"] = "mean KL divergence (nats per token)", ["kld.median"] = "median KL divergence (nats per token)",
  ["kld.p99"] = "99th percentile of KL divergence (nats)", ["kld.p999"] = "99.9th percentile of KL divergence (nats)",
  ["kld.max"] = "largest KL divergence (nats)", same_top1 = "share of tokens with the same top-1", ppl = "perplexity", ppl_ratio = "perplexity ratio",
  bytes_per_token = "cache bytes per token", ["decode_us.median"] = "decode step (µs, median)",
}
local function label(path) return names[path] or path end

-- Intervals of a path: the bootstrap's for means, min and max of repeats for timings.
local function interval(row, path)
  if path == "kld.mean" then return tables.number(row, "kld.ci_lo"), tables.number(row, "kld.ci_hi") end
  local base = path:match "^(.*)%.median$"
  if base and tables.number(row, base .. ".q1") then return tables.number(row, base .. ".q1"), tables.number(row, base .. ".q3") end
end

-- Exact tokens of the arms, as their plans have them: a policy may set its own.
local function windows(run)
  local sink, recent
  for _, plan in pairs(run.plans or {}) do
    for _, part in ipairs(plan.layers) do
      local y = part.layer
      if sink and (sink ~= y.sink or recent ~= y.recent) then return "sinks and windows differ between arms or layers" end
      sink, recent = y.sink, y.recent
    end
  end
  return sink and ("all arms: %d sinks, %d recent exact"):format(sink, recent)
end

local function caption(run, rows)
  local parts = { "run " .. tostring(run.run_id or "?") }
  local r = rows[1]
  if r then
    parts[#parts + 1] = tostring(r.model or "?")
    if run.data and run.data.name then parts[#parts + 1] = "text " .. run.data.name end
    if r.context then parts[#parts + 1] = ("context %d"):format(r.context) end
    if r.n_scored then parts[#parts + 1] = ("%d tokens scored"):format(r.n_scored) end
    parts[#parts + 1] = windows(run)
    if tables.number(r, "kld.ci_lo") then parts[#parts + 1] = "bars: 95 % block bootstrap" end
  end
  return table.concat(parts, " · ")
end

--- A plot { x =, y =, series =, where =, log_x =, log_y =, front =, label = "arm", title = } of the rows that are ranked.
function M.plot(spec, rows, run)
  local chosen = tables.select(rows, spec.where)
  local p = { title = spec.title or run.title, caption = caption(run, rows), front = spec.front, width = spec.width, height = spec.height,
    x = { label = spec.x_label or label(spec.x), log = spec.log_x }, y = { label = spec.y_label or label(spec.y), log = spec.log_y }, series = {} }
  local order, of = {}, {}
  for _, r in ipairs(chosen) do
    if r.status ~= "VACUOUS" and r.ranked ~= false then
      local name = spec.series and tables.get(r, spec.series)
      name = name == nil and "arms" or tostring(name)
      if not of[name] then
        of[name] = { name = name, points = {}, line = spec.line }
        order[#order + 1] = of[name]
      end
      local x, y = tables.number(r, spec.x), tables.number(r, spec.y)
      local lo, hi = interval(r, spec.y)
      local text = tables.get(r, spec.label or "arm")
      table.insert(of[name].points, { x = x, y = y, lo = lo, hi = hi, label = spec.label ~= false and tostring(text or "?") or nil,
        title = ("%s: %s = %s, %s = %s"):format(r.arm or "?", spec.x, tables.format(x), spec.y, tables.format(y)) })
    end
  end
  for _, s in ipairs(order) do
    table.sort(s.points, function(a, b) return (a.x or 0) < (b.x or 0) end)
  end
  p.series = order
  return svg.plot(p)
end

-- What every experiment shows when it asks for nothing else.
local default = { { kind = "plot", x = "bits_allin", y = "kld.mean", series = "family", log_x = true, log_y = true, front = true } }

--- Everything derived, as { {name, text}, … }: a pure function of its two arguments.
function M.render(rows, run)
  local files, plots, pivots = {}, {}, {}
  local split = tables.split(rows)
  local extra = run.extra_columns
  local spec = run.report
  if not spec or #spec == 0 then spec = default end

  local md = { "# " .. (run.title or run.experiment or "experiment") .. "\n\n", caption(run, rows), "\n\n" }
  if #split.ranked > 0 then md[#md + 1] = tables.ranking(split.ranked, extra) end
  if #split.vacuous > 0 then md[#md + 1] = "\nVACUOUS, not ranked: too few query-key pairs were served from compressed storage.\n\n" .. tables.ranking(split.vacuous, extra) end
  for _, r in ipairs(split.failed) do md[#md + 1] = ("\nfailed: %s: %s\n"):format(r.arm or "?", r.message or r.error or "") end
  for i, p in ipairs(run.skipped or {}) do md[#md + 1] = (i == 1 and "\nNot measured:\n\n" or "") .. ("- %s: %s\n"):format(p.point, p.reason) end
  md[#md + 1] = "\nKLD in nats per token against an exact cache; bits per cached scalar, all-in at the tested context (sinks and window included); "
    .. "pairs: share of query-key pairs served from compressed storage.\n"

  for _, s in ipairs(spec) do
    if s.kind == "plot" then
      plots[#plots + 1] = M.plot(s, rows, run)
      files[#files + 1] = { ("plot%s.svg"):format(#plots > 1 and "-" .. #plots or ""), plots[#plots] }
    else
      local title = s.title or (s.cols and "%s by %s and %s" or "%s by %s"):format(s.cell, s.rows, s.cols or "")
      pivots[#pivots + 1] = { title = title, markdown = tables.pivot(rows, s) }
      md[#md + 1] = "\n## " .. title .. "\n\n" .. pivots[#pivots].markdown
    end
  end

  local points, front = {}, {}
  for _, r in ipairs(split.ranked) do
    local x, y = tables.number(r, "bits_allin"), tables.number(r, "kld.mean")
    if x and y and y == y and r.ranked ~= false then points[#points + 1] = { x = x, y = y, row = r } end
  end
  for _, p in ipairs(svg.front(points)) do front[p.row] = true end
  table.insert(files, 1, { "table.md", table.concat(md) })
  files[#files + 1] = { "report.html", html.page { title = run.title or run.experiment or "experiment", subtitle = caption(run, rows), about = run.about,
    split = split, rows = rows, extra = extra, front = front, plots = plots, pivots = pivots, run = run } }
  return files
end

--- Writes the derived files of a folder; returns the ranking as text, and the names.
function M.make(dir)
  local rows, message = results.rows(dir .. "/rows.jsonl")
  local run, why = json.read(dir .. "/run.json")
  if not rows or not run then require("kelvin.check").fail("report: %s", message or why) end
  local files, table_text, written = M.render(rows, run), nil, {}
  for i, f in ipairs(files) do
    results.write(dir .. "/" .. f[1], f[2])
    if f[1] == "table.md" then table_text = f[2] end
    written[i] = dir .. "/" .. f[1]
  end
  return table_text, written
end

--- `kelvin report DIR`; shards' files there become one run first.
function M.remake(dir)
  dir = dir:gsub("(.)/+$", "%1")
  results.merge(dir)
  local _, written = M.make(dir)
  for _, path in ipairs(written) do print(path) end
  return 0
end

return M
