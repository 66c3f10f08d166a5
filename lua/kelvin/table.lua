--- Markdown tables from rows: the ranking every experiment has, and pivots that a report asks for.
--
-- Tables are padded, so the same text reads well in a terminal and in a document.  A cell that several rows would fill
-- says so; nothing is averaged in silence.

local json = require "kelvin.json"
local M = {}

--- Looks up "kld.mean" in a row; names a row lacks are looked for among the point's own parameters.
function M.get(row, path)
  local function walk(v)
    for part in path:gmatch "[^.]+" do
      if type(v) ~= "table" then return nil end
      v = v[part]
    end
    return v
  end
  local v = walk(row)
  if v == nil and type(row.point) == "table" then v = walk(row.point) end
  if v == json.null then return nil end
  return v
end

function M.number(row, path) return json.number(M.get(row, path)) end

-- Width as a reader sees it: UTF-8 continuation bytes take no room.
local function width(s) return select(2, s:gsub("[^\128-\191]", "")) end

--- A number in three significant digits: plain where that is short, 1.2e-5 otherwise.
function M.format(x)
  x = json.number(x)
  if not x then return "" end
  if x ~= x then return "nan" end
  if x == math.huge then return "inf" elseif x == -math.huge then return "-inf" end
  local a = math.abs(x)
  if a == 0 then return "0" end
  if a < 9.995e-4 or a >= 1e6 then return (("%.2e"):format(x):gsub("e([+-])0*(%d)", function(s, d) return "e" .. (s == "-" and s or "") .. d end)) end
  if a % 1 == 0 then return ("%d"):format(x) end
  return ("%%.%df"):format(math.max(0, 2 - math.floor(math.log10(a)))):format(x)
end

--- "0.0123 ± 0.0004": the error with the same decimals as the mean.
function M.with_error(mean, se)
  mean, se = json.number(mean), json.number(se)
  if not mean then return "" end
  if not se or se ~= se or mean == 0 or mean ~= mean or math.abs(mean) == math.huge then return M.format(mean) end
  local a = math.abs(mean)
  if a < 9.995e-4 then
    local e = math.floor(math.log10(a))
    return ("(%.2f ± %.2f)e%d"):format(mean / 10 ^ e, se / 10 ^ e, e)
  end
  local decimals = math.max(0, 2 - math.floor(math.log10(a)))
  local f = "%." .. decimals .. "f"
  return (f .. " ± " .. f):format(mean, se)
end

--- Markdown from a header and rows of text; columns named in `left` are left-aligned, the others right-aligned.
function M.markdown(header, rows, left)
  local widths, lines = {}, {}
  local function clean(s) return (tostring(s):gsub("|", "\\|"):gsub("[\r\n]+", " ")) end
  for i, h in ipairs(header) do widths[i] = math.max(3, width(clean(h))) end
  for _, row in ipairs(rows) do
    for i in ipairs(header) do widths[i] = math.max(widths[i], width(clean(row[i] or ""))) end
  end
  local function line(cells)
    local parts = {}
    for i in ipairs(header) do
      local s = clean(cells[i] or "")
      local pad = (" "):rep(widths[i] - width(s))
      parts[i] = left[i] and s .. pad or pad .. s
    end
    lines[#lines + 1] = "| " .. table.concat(parts, " | ") .. " |"
  end
  line(header)
  local rule = {}
  for i in ipairs(header) do rule[i] = left[i] and ("-"):rep(widths[i]) or ("-"):rep(widths[i] - 1) .. ":" end
  line(rule)
  for _, row in ipairs(rows) do line(row) end
  return table.concat(lines, "\n") .. "\n"
end

local function percent(x, decimals)
  x = json.number(x)
  return x and ("%." .. (decimals or 1) .. "f %%"):format(100 * x) or ""
end
local function bits(x) x = json.number(x) return x and ("%.2f"):format(x) or "" end
local function field(path) return function(row) return M.format(M.get(row, path)) end end

--- Columns of the ranking: title, value for sorting, text.
M.columns = {
  { "arm", "arm", function(r) return r.arm or "?" end, left = true },
  { "nominal", "bits_nominal", function(r) return bits(r.bits_nominal) end },
  { "payload", "bits_payload", function(r) return bits(r.bits_payload) end },
  { "all-in bits", "bits_allin", function(r) return bits(r.bits_allin) end },
  { "KLD mean ± se", "kld.mean", function(r) return M.with_error(M.get(r, "kld.mean"), M.get(r, "kld.se")) end },
  { "median", "kld.median", field "kld.median" },
  { "p90", "kld.p90", field "kld.p90" },
  { "p99", "kld.p99", field "kld.p99" },
  { "p99.9", "kld.p999", field "kld.p999" },
  { "max", "kld.max", field "kld.max" },
  { "same top-1", "same_top1", function(r) return percent(r.same_top1, 2) end },
  { "PPL", "ppl", function(r) return M.format(r.ppl) end },
  { "ratio", "ppl_ratio", function(r) local x = json.number(r.ppl_ratio) return x and ("%.4f"):format(x) or "" end },
  { "pairs", "compressed_pair_fraction", function(r) return percent(r.compressed_pair_fraction) end },
  { "status", "status", function(r) return r.status or "" end, left = true },
}

-- Numbers before text, then by name, so that an order never depends on the order of the file.
local function by(path)
  return function(a, b)
    local x, y = M.number(a, path) or math.huge, M.number(b, path) or math.huge
    if x ~= x then x = math.huge end
    if y ~= y then y = math.huge end
    if x ~= y then return x < y end
    return tostring(a.arm) < tostring(b.arm)
  end
end

--- Splits rows into what is ranked and what is set apart: { ranked, vacuous, failed }, each sorted by all-in bits.
function M.split(rows)
  local ranked, vacuous, failed = {}, {}, {}
  for _, r in ipairs(rows) do
    local to = r.status == "error" and failed or r.status == "VACUOUS" and vacuous or ranked
    to[#to + 1] = r
  end
  for _, t in ipairs { ranked, vacuous, failed } do table.sort(t, by "bits_allin") end
  return { ranked = ranked, vacuous = vacuous, failed = failed }
end

--- The columns that rows have anything in, plus one per further measurement ("decode_us.median").
function M.columns_of(rows, extra)
  local used = {}
  for _, c in ipairs(M.columns) do
    for _, r in ipairs(rows) do
      if M.get(r, c[2]) ~= nil then used[#used + 1] = c break end
    end
  end
  local status = #used > 0 and used[#used][2] == "status" and table.remove(used) or nil
  for _, path in ipairs(extra or {}) do used[#used + 1] = { path, path, field(path) } end
  used[#used + 1] = status
  return used
end

--- The ranking as Markdown.
function M.ranking(rows, extra)
  local columns, header, left, body = M.columns_of(rows, extra), {}, {}, {}
  for i, c in ipairs(columns) do header[i], left[i] = c[1], c.left end
  for i, r in ipairs(rows) do
    body[i] = {}
    for j, c in ipairs(columns) do body[i][j] = c[3](r) end
  end
  return M.markdown(header, body, left)
end

local function matches(row, where)
  for path, want in pairs(where or {}) do
    if tostring(M.get(row, path)) ~= tostring(want) then return false end
  end
  return true
end

--- The rows that a `where = { name = value }` selects.
function M.select(rows, where)
  local out = {}
  for _, r in ipairs(rows) do
    if r.status ~= "error" and matches(r, where) then out[#out + 1] = r end
  end
  return out
end

-- Distinct values of a path, numbers ascending, then text.
local function distinct(rows, path)
  local seen, values = {}, {}
  for _, r in ipairs(rows) do
    local v = M.get(r, path)
    if v ~= nil and not seen[v] then seen[v], values[#values + 1] = true, v end
  end
  table.sort(values, function(a, b)
    if type(a) == type(b) and type(a) ~= "boolean" then return a < b end
    return type(a) == "number" or (type(b) ~= "number" and tostring(a) < tostring(b))
  end)
  return values
end
M.distinct = distinct

--- A pivot table { rows = path, cols = path, cell = path, where = {…} } as Markdown.
function M.pivot(rows, spec)
  local chosen = M.select(rows, spec.where)
  local down, across = distinct(chosen, spec.rows), spec.cols and distinct(chosen, spec.cols) or { spec.cell }
  local header, left, body = { spec.cols and spec.rows .. " \\ " .. spec.cols or spec.rows }, { true }, {}
  header[1] = header[1]:gsub("\\ ", "/ ")
  for i, c in ipairs(across) do header[i + 1] = tostring(c) end
  for i, d in ipairs(down) do
    body[i] = { tostring(d) }
    for j, c in ipairs(across) do
      local found = {}
      for _, r in ipairs(chosen) do
        if M.get(r, spec.rows) == d and (not spec.cols or M.get(r, spec.cols) == c) and M.get(r, spec.cell) ~= nil then found[#found + 1] = r end
      end
      local v = #found == 1 and M.get(found[1], spec.cell)
      body[i][j + 1] = #found == 0 and "–" or #found > 1 and #found .. " rows" or json.number(v) and M.format(v) or tostring(v)
    end
  end
  return M.markdown(header, body, left)
end

return M
