--- The report as one HTML file: style, plots and the few lines of script are inside it; it needs no network.

local svg = require "kelvin.svg"
local tables = require "kelvin.table"
local json = require "kelvin.json"
local M = {}
local e = svg.escape

local STYLE = [[
body{font:15px/1.5 system-ui,Helvetica,Arial,sans-serif;color:#1a1a1a;background:#fff;max-width:1180px;margin:2em auto;padding:0 1.2em}
h1{font-size:1.5em;margin-bottom:.1em}h2{font-size:1.15em;margin-top:1.8em}.sub{color:#5f6368;margin-top:0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px}
th,td{padding:.32em .65em;text-align:right;white-space:nowrap;border-bottom:1px solid #e4e6e9}
th{border-bottom:2px solid #9aa0a6;cursor:pointer;user-select:none}th.left,td.left{text-align:left}
th[data-dir="1"]::after{content:" \25B4"}th[data-dir="-1"]::after{content:" \25BE"}
tbody tr:hover{background:#f5f7f9}tr.front td:first-child{font-weight:600}
svg{max-width:100%;height:auto}pre{background:#f5f7f9;padding:1em;overflow-x:auto;font-size:12.5px}
.apart{border-left:4px solid #E69F00;padding-left:1em}.bad{border-left:4px solid #D55E00;padding-left:1em}
details{margin-top:1em}summary{cursor:pointer;color:#0072B2}]]

local SCRIPT = [[
for (const th of document.querySelectorAll('table.sort th')) th.onclick = () => {
  const t = th.closest('table'), i = th.cellIndex, dir = th.dataset.dir === '1' ? -1 : 1;
  for (const o of t.querySelectorAll('th')) delete o.dataset.dir;
  th.dataset.dir = dir;
  const key = r => r.cells[i].dataset.v ?? r.cells[i].textContent;
  [...t.tBodies[0].rows].sort((a, b) => {
    const x = key(a), y = key(b), d = parseFloat(x) - parseFloat(y);
    return dir * (isNaN(d) ? x.localeCompare(y) : d);
  }).forEach(r => t.tBodies[0].append(r));
};]]

-- A table of rows with the ranking's columns; the exact value goes along for sorting and for the curious.
local function ranking(rows, extra, front)
  local out = { '<div class="scroll"><table class="sort"><thead><tr>' }
  local columns = tables.columns_of(rows, extra)
  for _, c in ipairs(columns) do
    out[#out + 1] = ("<th%s>%s</th>"):format(c.left and ' class="left"' or "", e(c[1]))
  end
  out[#out + 1] = "</tr></thead><tbody>\n"
  for _, r in ipairs(rows) do
    out[#out + 1] = front[r] and '<tr class="front">' or "<tr>"
    for _, c in ipairs(columns) do
      local v = json.number(tables.get(r, c[2]))
      local attribute = c.left and ' class="left"' or v and (' data-v="%.17g"'):format(v) or ""
      if v and v == v and not c.left then attribute = attribute .. (' title="%.10g"'):format(v) end
      out[#out + 1] = ("<td%s>%s</td>"):format(attribute, e(c[3](r)))
    end
    out[#out + 1] = "</tr>\n"
  end
  out[#out + 1] = "</tbody></table></div>\n"
  return table.concat(out)
end

--- A Markdown table (as kelvin.table writes it) as HTML.
local function from_markdown(text)
  local out, n = { '<div class="scroll"><table class="sort">' }, 0
  for line in text:gmatch "[^\n]+" do
    n = n + 1
    if n ~= 2 then
      local cells, tag, i = {}, n == 1 and "th" or "td", 0
      for cell in line:gsub("\\|", "\1"):gmatch "|([^|]+)" do
        i = i + 1
        cells[i] = ("<%s%s>%s</%s>"):format(tag, i == 1 and ' class="left"' or "", e((cell:gsub("\1", "|"):match "^%s*(.-)%s*$")), tag)
      end
      out[#out + 1] = (n == 1 and "<thead>" or n == 3 and "<tbody>" or "") .. "<tr>" .. table.concat(cells) .. "</tr>" .. (n == 1 and "</thead>" or "") .. "\n"
    end
  end
  out[#out + 1] = (n >= 3 and "</tbody>" or "") .. "</table></div>\n"
  return table.concat(out)
end

--- Controls of the rows: what each control did, by row.
local function controls(rows)
  local out, names, seen = {}, {}, {}
  for _, r in ipairs(rows) do
    for name in pairs(type(r.controls) == "table" and r.controls or {}) do
      if not seen[name] then seen[name], names[#names + 1] = true, name end
    end
  end
  if #names == 0 then return nil end
  table.sort(names)
  out[1] = '<div class="scroll"><table class="sort"><thead><tr><th class="left">arm</th>'
  for _, n in ipairs(names) do out[#out + 1] = ('<th class="left">%s</th>'):format(e(n)) end
  out[#out + 1] = "<th>compressed pairs</th></tr></thead><tbody>\n"
  for _, r in ipairs(rows) do
    out[#out + 1] = ('<tr><td class="left">%s</td>'):format(e(r.arm or "?"))
    for _, n in ipairs(names) do
      local v = type(r.controls) == "table" and r.controls[n]
      local text = type(v) == "table" and json.encode(v):gsub('[{}"]', ""):gsub(":", " "):gsub(",", ", ") or v == nil and "" or json.number(v) and tables.format(v) or tostring(v)
      out[#out + 1] = ('<td class="left">%s</td>'):format(e(text))
    end
    local pairs_share = json.number(r.compressed_pair_fraction)
    out[#out + 1] = ("<td>%s</td></tr>\n"):format(pairs_share and ("%.1f %%"):format(100 * pairs_share) or "")
  end
  out[#out + 1] = "</tbody></table></div>\n"
  return table.concat(out)
end

--- The page.
-- @param p { title, subtitle, split = tables.split(rows), rows, extra, front = {row = true}, plots = {svg text},
--            pivots = {{title, markdown}}, run = table of run.json, about }
function M.page(p)
  local out = {}
  local function put(s) out[#out + 1] = s end
  put('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">')
  put(("<title>%s</title><style>%s</style></head><body>\n<h1>%s</h1><p class=\"sub\">%s</p>\n"):format(e(p.title), STYLE, e(p.title), e(p.subtitle)))
  if p.about then put(("<p>%s</p>\n"):format(e(p.about))) end
  for _, plot in ipairs(p.plots) do put("<figure style=\"margin:0\">" .. plot .. "</figure>\n") end
  put "<h2>Ranking by all-in bits</h2>\n"
  if next(p.front) then put "<p class=\"sub\">Arms in bold are on the Pareto front: no other arm has both fewer all-in bits and a smaller mean KLD. KLD in nats per token; click a heading to sort.</p>\n" end
  put(#p.split.ranked > 0 and ranking(p.split.ranked, p.extra, p.front) or "<p>No row yet.</p>\n")
  if #p.split.vacuous > 0 then
    put '<div class="apart"><h2>VACUOUS: not ranked</h2><p>Too few query-key pairs of these arms were served from compressed storage for their numbers to say anything about the codec.</p>\n'
    put(ranking(p.split.vacuous, p.extra, {}) .. "</div>\n")
  end
  if #p.split.failed > 0 then
    put '<div class="bad"><h2>Failed</h2><ul>\n'
    for _, r in ipairs(p.split.failed) do put(("<li><b>%s</b>: %s</li>\n"):format(e(r.arm or "?"), e(r.error or r.message or ""))) end
    put "</ul></div>\n"
  end
  for _, pivot in ipairs(p.pivots) do put(("<h2>%s</h2>\n"):format(e(pivot.title)) .. from_markdown(pivot.markdown)) end
  local c = controls(p.rows)
  if c then
    put "<h2>Controls</h2><p class=\"sub\">Identity: an exact cache must give KLD 0. Canary: a broken codec must fail. Mutation: flipping bits in compressed pages must change the logits.</p>\n"
    put(c)
  end
  put(("<details><summary>Manifest of the run</summary><pre>%s</pre></details>\n"):format(e(json.encode(p.run, "  "))))
  put "<details><summary>Manifests of the rows</summary><pre>"
  for _, r in ipairs(p.rows) do put(e(("%s  %s\n"):format(r.arm or "?", json.encode(r.manifest or json.null)))) end
  put("</pre></details>\n<script>" .. SCRIPT .. "</script>\n</body></html>\n")
  return table.concat(out)
end

return M
