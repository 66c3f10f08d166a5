--- Plots as SVG text, without a dependency: linear and logarithmic axes with round ticks, series with markers, error
-- bars, a Pareto front, and direct labels that are moved until they cover nothing.
--
-- svg.plot is a pure function: the same description gives the same bytes, whatever the machine.  All coordinates are
-- written with one decimal; text is measured by a table of rough glyph widths, since no font is at hand.

local M = {}

-- Okabe and Ito's palette (without its yellow, which vanishes on white): told apart with any colour vision.  Markers
-- differ as well, so that the plot also works in grey.
M.palette = { "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000" }
M.markers = { "circle", "square", "triangle", "diamond", "down", "pentagon", "cross" }
local INK, MUTED, GRID = "#1a1a1a", "#5f6368", "#e4e6e9"
local FRONT = 'stroke="#9aa0a6" stroke-width="1.5" stroke-dasharray="5 4"'
local FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"

--- Text for XML: markup escaped, control characters and broken UTF-8 replaced.
function M.escape(s)
  s = tostring(s):gsub("[%z\1-\8\11\12\14-\31\127]", "?")
  local out, i = {}, 1
  while i <= #s do
    local b = s:byte(i)
    local n = b < 0x80 and 1 or b >= 0xC2 and b < 0xE0 and 2 or b >= 0xE0 and b < 0xF0 and 3 or b >= 0xF0 and b < 0xF5 and 4 or 0
    local c = n > 0 and s:sub(i, i + n - 1) or ""
    local whole = n == 1 or (n > 1 and #c == n and c:find("^.[\128-\191]+$"))
    local second = c:byte(2) or 0
    if b == 0xE0 and second < 0xA0 or b == 0xED and second > 0x9F or b == 0xF0 and second < 0x90 or b == 0xF4 and second > 0x8F
      or c == "\239\191\190" or c == "\239\191\191" then whole = false end
    out[#out + 1] = whole and c or "?"
    i = i + (whole and n or 1)
  end
  return (table.concat(out):gsub('[&<>"]', { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;" }))
end

-- Width of a text in pixels: Helvetica's advance widths in three classes, good to some 5 % on labels.
local function text_width(s, size)
  local w = 0
  for c in s:gmatch("[%z\1-\127\194-\244][\128-\191]*") do
    w = w + (c:find("^[iljft%.,:;|!' /%-%(%)%[%]]") and 0.31 or c:find("^[mwMW@%%±]") and 0.86 or c:find("^[A-Z=+<>~]") and 0.68 or 0.56)
  end
  return w * size
end

--- Ticks of a linear axis: round numbers (1, 2, 2.5 or 5 times a power of ten), about `want` of them.
function M.linear_ticks(lo, hi, want)
  if hi <= lo or hi ~= hi then return { lo } end
  local raw = (hi - lo) / (want or 6)
  local base = 10 ^ math.floor(math.log10(raw))
  local step = 10 * base
  for _, m in ipairs { 1, 2, 2.5, 5 } do
    if m * base >= raw * 0.999 then step = m * base break end
  end
  local ticks = {}
  for i = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) do ticks[#ticks + 1] = i * step end
  return ticks
end

--- Ticks of a logarithmic axis: powers of ten, filled up with round multiples when the range is short, thinned when long.
function M.log_ticks(lo, hi, want)
  want = want or 6
  local best
  for _, set in ipairs { { 1 }, { 1, 3 }, { 1, 2, 5 }, { 1, 1.5, 2, 3, 4, 6, 8 }, { 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9 } } do
    local ticks = {}
    for e = math.floor(math.log10(lo)) - 1, math.ceil(math.log10(hi)) + 1 do
      for _, m in ipairs(set) do
        local t = m * 10 ^ e
        if t >= lo * (1 - 1e-9) and t <= hi * (1 + 1e-9) then ticks[#ticks + 1] = t end
      end
    end
    if not best or math.abs(#ticks - want) < math.abs(#best - want) then best = ticks end
  end
  if #best > 2 * want then
    local every, thin = math.ceil(#best / want), {}
    for i = 1, #best, every do thin[#thin + 1] = best[i] end
    best = thin
  end
  return best
end

-- A tick as SVG text content: plain where that is short, a power of ten otherwise.
local function tick_label(v)
  if v == 0 then return "0", "0" end
  local e = math.floor(math.log10(math.abs(v)) + 1e-9)
  if e >= -3 and e < 5 then
    local s = ("%.10f"):format(v):gsub("0+$", ""):gsub("%.$", "")
    return s, s
  end
  local m = ("%.2f"):format(v / 10 ^ e):gsub("0+$", ""):gsub("%.$", "")
  local head = (m == "1" and "" or m .. "×") .. "10"
  local power = (e < 0 and "−" or "") .. math.abs(e)
  return ('%s<tspan dy="-5" font-size="10">%s</tspan>'):format(head, power), head .. power
end

local function marker(kind, x, y, r, colour, solid)
  local fill = solid and colour or "#ffffff"
  local style = ('fill="%s" stroke="%s" stroke-width="1.6"'):format(fill, colour)
  local function polygon(...)
    local p = { ... }
    for i = 1, #p, 2 do p[i], p[i + 1] = ("%.1f"):format(x + p[i] * r), ("%.1f"):format(y + p[i + 1] * r) end
    return ('<polygon points="%s" %s/>'):format(table.concat(p, " "), style)
  end
  if kind == "square" then return polygon(-0.9, -0.9, 0.9, -0.9, 0.9, 0.9, -0.9, 0.9)
  elseif kind == "triangle" then return polygon(0, -1.2, 1.1, 0.8, -1.1, 0.8)
  elseif kind == "down" then return polygon(0, 1.2, 1.1, -0.8, -1.1, -0.8)
  elseif kind == "diamond" then return polygon(0, -1.25, 1.25, 0, 0, 1.25, -1.25, 0)
  elseif kind == "pentagon" then return polygon(0, -1.1, 1.05, -0.34, 0.65, 0.9, -0.65, 0.9, -1.05, -0.34)
  elseif kind == "cross" then
    return polygon(-0.4, -1.1, 0.4, -1.1, 0.4, -0.4, 1.1, -0.4, 1.1, 0.4, 0.4, 0.4, 0.4, 1.1, -0.4, 1.1, -0.4, 0.4, -1.1, 0.4, -1.1, -0.4, -0.4, -0.4)
  end
  return ('<circle cx="%.1f" cy="%.1f" r="%.1f" %s/>'):format(x, y, r, style)
end

--- Points no other point beats in both coordinates (smaller is better), by rising x.
function M.front(points)
  local sorted, front, best = {}, {}, math.huge
  for i, p in ipairs(points) do sorted[i] = p end
  table.sort(sorted, function(a, b) if a.x ~= b.x then return a.x < b.x end return a.y < b.y end)
  for _, p in ipairs(sorted) do
    if p.y < best then front[#front + 1], best = p, p.y end
  end
  return front
end

-- An axis: maps values to pixels; range widened so that no marker sits on the frame.
local function axis(spec, values, from, to)
  local lo, hi = math.huge, -math.huge
  for _, v in ipairs(values) do lo, hi = math.min(lo, v), math.max(hi, v) end
  if lo > hi then lo, hi = spec.log and 0.1 or 0, 1 end
  local map, inverse = function(v) return v end, function(v) return v end
  if spec.log then map, inverse = math.log10, function(v) return 10 ^ v end end
  local a, b = map(lo), map(hi)
  local pad = b > a and 0.06 * (b - a) or math.max(0.1, 0.1 * math.abs(b))
  a, b = a - pad, b + pad
  if not spec.log and lo >= 0 and a < 0 then a = 0 end
  local ticks = (spec.log and M.log_ticks or M.linear_ticks)(inverse(a), inverse(b), spec.ticks)
  return { ticks = ticks, at = function(v) return from + (map(v) - a) / (b - a) * (to - from) end }
end

local function overlap(a, b)
  local w = math.min(a[3], b[3]) - math.max(a[1], b[1])
  local h = math.min(a[4], b[4]) - math.max(a[2], b[2])
  return w > 0 and h > 0 and w * h or 0
end

-- Where around its point a label may go: near places first, then further away with a leader line.
local places = {}
for _, d in ipairs { 9, 18, 30, 44, 60, 80 } do
  for _, v in ipairs { { 1, 0 }, { -1, 0 }, { 0.7, -0.7 }, { 0.7, 0.7 }, { -0.7, -0.7 }, { -0.7, 0.7 }, { 0, -1 }, { 0, 1 } } do
    places[#places + 1] = { d, v[1] * d, v[2] * d, v[1] }
  end
end

-- Puts each label where it costs least: covering labels and markers is worst, then lines, then distance.
local function place_labels(labels, obstacles, lines, frame, size)
  local taken = {}
  local function cost_of(box, distance)
    local cost = distance * 0.6
    if box[1] < frame[1] or box[2] < frame[2] or box[3] > frame[3] or box[4] > frame[4] then cost = cost + 4000 end
    for _, o in ipairs(taken) do cost = cost + 40 * overlap(box, o) end
    for _, o in ipairs(obstacles) do cost = cost + 12 * overlap(box, o) end
    for _, l in ipairs(lines) do
      for s = 0, 1, 0.05 do
        local x, y = l[1] + s * (l[3] - l[1]), l[2] + s * (l[4] - l[2])
        if x > box[1] and x < box[3] and y > box[2] and y < box[4] then cost = cost + 6 end
      end
    end
    return cost
  end
  for _, label in ipairs(labels) do
    local w, h, best = text_width(label.text, size), size, nil
    for _, p in ipairs(places) do
      local x, y = label.x + p[2], label.y + p[3]
      local left = p[4] > 0.1 and x or p[4] < -0.1 and x - w or x - w / 2
      local box = { left - 2, y - h * 0.55, left + w + 2, y + h * 0.55 }
      local cost = cost_of(box, p[1])
      if not best or cost < best.cost then best = { cost = cost, box = box, left = left, y = y, far = p[1] >= 30, ex = x, ey = y } end
    end
    label.at, taken[#taken + 1] = best, best.box
  end
end

--- Draws a plot.
-- @param p  { title, caption, x = {label, log, ticks}, y = {…}, front = true, front_label,
--             series = { { name, colour, marker, open = bool, line = bool, points = { {x, y, lo, hi, label, title} } } } }
--           Points whose value a logarithmic axis cannot show are counted in a note, never dropped in silence.
function M.plot(p)
  local W, H = p.width or 900, p.height or 600
  local out, hidden, xs, ys = {}, {}, {}, {}
  local function put(fmt, ...) out[#out + 1] = select("#", ...) > 0 and fmt:format(...) or fmt end
  local function drawable(pt)
    local function fits(v, log) return type(v) == "number" and v == v and math.abs(v) < math.huge and (not log or v > 0) end
    return fits(pt.x, p.x.log) and fits(pt.y, p.y.log)
  end

  local series = {}
  for i, s in ipairs(p.series) do
    local copy = { name = s.name, line = s.line, open = s.open, points = {}, marker = s.marker or M.markers[(i - 1 + math.floor((i - 1) / #M.palette)) % #M.markers + 1],
      colour = s.colour or M.palette[(i - 1) % #M.palette + 1] }
    for _, pt in ipairs(s.points) do
      if drawable(pt) then
        copy.points[#copy.points + 1] = pt
        xs[#xs + 1], ys[#ys + 1] = pt.x, pt.y
        for _, v in ipairs { pt.lo or pt.y, pt.hi or pt.y } do
          if v == v and math.abs(v) < math.huge and (not p.y.log or v > pt.y / 10) then ys[#ys + 1] = v end
        end
      else hidden[#hidden + 1] = pt.label or s.name end
    end
    series[#series + 1] = copy
  end

  -- The legend is a row (or rows) under the title, so that it can never cover data.
  local legend, lx, ly = {}, 72, p.title and 62 or 30
  for _, s in ipairs(series) do
    local w = text_width(s.name, 13) + 34
    if lx + w > W - 20 then lx, ly = 72, ly + 20 end
    legend[#legend + 1] = { x = lx, y = ly, s = s }
    lx = lx + w
  end
  if p.front then legend[#legend + 1] = { x = lx, y = ly, s = { name = p.front_label or "Pareto front" } } end
  local note = #hidden > 0 and ("not drawn (zero or not finite): " .. table.concat(hidden, ", ")) or nil
  local left, right, top, bottom = 82, W - 26, ly + 20, H - 74 - (note and 16 or 0)
  local ax, ay = axis(p.x, xs, left, right), axis(p.y, ys, bottom, top)

  put('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="%s" role="img">', W, H, W, H, FONT)
  put("<title>%s</title>", M.escape(p.title or "plot"))
  put('<rect width="%d" height="%d" fill="#ffffff"/>', W, H)
  if p.title then put('<text x="72" y="34" font-size="19" font-weight="bold" fill="%s">%s</text>', INK, M.escape(p.title)) end
  for _, l in ipairs(legend) do
    if l.s.marker then put(marker(l.s.marker, l.x + 6, l.y - 4.5, 5, l.s.colour, not l.s.open))
    else put('<path d="M%.1f %.1fh20" fill="none" %s/>', l.x - 6, l.y - 4.5, FRONT) end
    put('<text x="%.1f" y="%.1f" font-size="13" fill="%s">%s</text>', l.x + 17, l.y, INK, M.escape(l.s.name))
  end

  for _, t in ipairs(ax.ticks) do
    local x = ax.at(t)
    put('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>', x, top, x, bottom, GRID)
    put('<text x="%.1f" y="%.1f" font-size="13" fill="%s" text-anchor="middle">%s</text>', x, bottom + 19, MUTED, (tick_label(t)))
  end
  for _, t in ipairs(ay.ticks) do
    local y = ay.at(t)
    put('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>', left, y, right, y, GRID)
    put('<text x="%.1f" y="%.1f" font-size="13" fill="%s" text-anchor="end">%s</text>', left - 8, y + 4.5, MUTED, (tick_label(t)))
  end
  put('<path d="M%.1f %.1fV%.1fH%.1f" fill="none" stroke="%s"/>', left, top, bottom, right, MUTED)
  put('<text x="%.1f" y="%.1f" font-size="14" fill="%s" text-anchor="middle">%s</text>', (left + right) / 2, bottom + 43, INK, M.escape(p.x.label or ""))
  put('<text transform="translate(20 %.1f) rotate(-90)" font-size="14" fill="%s" text-anchor="middle">%s</text>', (top + bottom) / 2, INK, M.escape(p.y.label or ""))

  local lines, obstacles, labels, all = {}, {}, {}, {}
  for _, s in ipairs(series) do
    for _, pt in ipairs(s.points) do all[#all + 1] = pt end
  end
  local function polyline(points, style)
    local d = {}
    for i, pt in ipairs(points) do
      d[i] = ("%.1f,%.1f"):format(ax.at(pt.x), ay.at(pt.y))
      if i > 1 then lines[#lines + 1] = { ax.at(points[i - 1].x), ay.at(points[i - 1].y), ax.at(pt.x), ay.at(pt.y) } end
    end
    if #points > 1 then put('<polyline points="%s" fill="none" %s/>', table.concat(d, " "), style) end
  end
  if p.front then polyline(M.front(all), FRONT) end
  for _, s in ipairs(series) do
    if s.line then polyline(s.points, ('stroke="%s" stroke-width="1.4" stroke-opacity="0.6"'):format(s.colour)) end
  end
  for _, s in ipairs(series) do
    for _, pt in ipairs(s.points) do
      local x, y = ax.at(pt.x), ay.at(pt.y)
      if pt.lo and pt.hi and pt.hi > pt.lo then
        -- An interval that reaches zero has no end on a logarithmic axis: its bar stops at the frame.
        local y1, y2 = math.max(top, ay.at(pt.hi)), bottom
        if not p.y.log or pt.lo > 0 then y2 = math.min(bottom, ay.at(pt.lo)) end
        if y2 - y1 > 3 then
          put('<path d="M%.1f %.1fV%.1fM%.1f %.1fH%.1fM%.1f %.1fH%.1f" fill="none" stroke="%s" stroke-width="1.2"/>',
            x, y1, y2, x - 3.5, y1, x + 3.5, x - 3.5, y2, x + 3.5, s.colour)
          obstacles[#obstacles + 1] = { x - 3, y1, x + 3, y2 }
        end
      end
      put("<g>%s<title>%s</title></g>", marker(s.marker, x, y, 5, s.colour, not s.open), M.escape(pt.title or pt.label or s.name))
      obstacles[#obstacles + 1] = { x - 6, y - 6, x + 6, y + 6 }
      if pt.label then labels[#labels + 1] = { x = x, y = y, text = pt.label } end
    end
  end

  place_labels(labels, obstacles, lines, { left + 2, top + 2, right - 2, bottom - 2 }, 12)
  for _, l in ipairs(labels) do
    if l.at.far then
      local bx = math.max(l.at.box[1], math.min(l.x, l.at.box[3]))
      local by = math.max(l.at.box[2] + 2, math.min(l.y, l.at.box[4] - 2))
      put('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#b8bcc2" stroke-width="0.8"/>', l.x, l.y, bx, by)
    end
  end
  for _, l in ipairs(labels) do
    put('<text x="%.1f" y="%.1f" font-size="12" fill="%s" stroke="#ffffff" stroke-width="3" stroke-opacity="0.85" paint-order="stroke">%s</text>',
      l.at.left, l.at.y + 4, INK, M.escape(l.text))
  end
  if note then put('<text x="%.1f" y="%.1f" font-size="11" fill="%s">%s</text>', left, H - 26, MUTED, M.escape(note)) end
  if p.caption then put('<text x="%.1f" y="%.1f" font-size="11" fill="%s">%s</text>', left, H - 10, MUTED, M.escape(p.caption)) end
  put("</svg>\n")
  return table.concat(out, "\n")
end

return M
