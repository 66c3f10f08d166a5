--- kelvin.bench_generate: tokens a second of whole models on a device, by codec, depth and batch.
--
-- A batch of sequences is brought to a depth without computing it (zero rows in pages: the same bytes are read), then decodes;
-- the device's own time counts.  Arms of a depth and batch take turns as far as memory holds them together; what fits not even
-- alone is a row with status "no memory", what fails otherwise one with "error".  What a step costs beyond the same step at depth 0 is the time of its attention:
-- attention_us and attention_share.  `wins_from` is the depth at which a codec's step becomes faster than the first arm's,
-- between two measured depths on the line through them.

local K = require "kelvin.ffi"
local C = K.C
local check = require "kelvin.check"
local lib = require "kelvin.lib"
local log = require "kelvin.log"
local manifest = require "kelvin.manifest"
local svg = require "kelvin.svg"

local M = {}

local PREFIX = "shape:"
local TURN_US = 2.5e5          -- a turn lasts no longer, if that leaves two steps
--- Models of a shape alone, with random weights: speed is measured, nothing else.
M.SHAPES = {
  -- n_layers .. rope_base of Meta's Llama 3 8B (its config.json).
  ["llama-3-8b"] = { n_layers = 32, n_heads = 32, n_kv_heads = 8, head_dim = 128, n_embd = 4096, n_ff = 14336, n_vocab = 128256, rope_base = 5e5 },
  -- Two layers of narrow rows: for trials without a device.
  tiny = { n_layers = 2, n_heads = 4, n_kv_heads = 2, head_dim = 64, n_embd = 128, n_ff = 256, n_vocab = 500, rope_base = 1e4 },
}

--- open("smollm2-135m" or "shape:llama-3-8b", device) -> model on the device.
function M.open(name, device)
  local models, shape, known = require "kelvin.model", name:match("^" .. PREFIX .. "(.*)$"), {}
  for n in pairs(M.SHAPES) do known[#known + 1] = n end
  table.sort(known)
  check.that(not shape or M.SHAPES[shape], "bench: shape '%s' is none of %s", shape, table.concat(known, ", "))
  if not shape and not select(2, models.find(name)) then models.open(name) end         -- says what is wrong with the name
  local d = lib.device(device)
  check.that(d.available, "bench: %s", d.reason)
  if shape then return models.synthetic(name, M.SHAPES[shape], device) end
  return models.open(name, { device = device })
end

-- An allocation that failed, or a cache that said beforehand that it would.
local function no_memory(message) return tostring(message):find("memory", 1, true) or tostring(message):find("MemoryAllocation", 1, true) or tostring(message):find("not fit the device", 1, true) end

local function step(c, n)
  local _, seconds = c.batch:generate { first = c.first, n_steps = n }
  c.batch:truncate(c.depth)
  return 1e6 * seconds / n
end

-- A candidate with memory, at its depth, its graph captured; or false, what is wrong ("no memory", "error") and the message.
local function make(c, model, plan, n)
  local ok, why = pcall(function()
    c.batch = model:batch { plan = plan, n_seqs = c.n_seqs, max_tokens = c.depth + n + 2 }
    if c.depth > 0 then c.batch:skip(c.depth) end
    c.first = {}
    for s = 1, c.n_seqs do c.first[s] = math.floor(lib.random(7, 0, s) * (model.n_vocab - 10)) + 5 end
    step(c, 2)                                            -- captures the graph
    c.steps = math.max(2, math.min(n, math.floor(TURN_US / step(c, 2))))
    c.bytes, c.path, c.times = c.batch:bytes().total, c.batch:paths(), {}
  end)
  if ok then return true end
  if c.batch then c.batch:free() end
  c.batch = nil
  if C.kv_interrupted() == 1 then error(why, 0) end
  return false, no_memory(why) and "no memory" or "error", tostring(why)
end

--- run{ model =, device =, arms =, depths =, batches =, repeats =, tokens =, calib =, rows = } -> rows.
function M.run(o)
  local device, arms, depths, batches = o.device or "cuda", o.arms or { "f16", "q8_0", "turboquant-4", "turboquant-3", "turboquant-2" }, o.depths or { 0, 8192 }, o.batches or { 1 }
  local repeats, n = o.repeats or 5, o.tokens or 16
  local model = type(o.model) == "string" and M.open(o.model, device) or o.model
  local policies, plans = require "kelvin.policy", {}
  for _, arm in ipairs(arms) do plans[arm] = policies.resolve(policies.of(arm), model, { calib = o.calib }) end
  local rows, run = {}, { what = "bench generate", model = model.name, shape = M.SHAPES[model.name:match("^" .. PREFIX .. "(.*)$") or ""], weights = model.device_weights, arms = arms, repeats = repeats,
    tokens = n, timing = "the device's time of whole decode steps, medians of interleaved repeats; depth without computing it" }
  for name, value in pairs(require("kelvin.bench_gpu").device_facts(device)) do run[name] = value end
  for _, n_seqs in ipairs(batches) do
    for _, depth in ipairs(depths) do
      local waiting = {}
      for _, arm in ipairs(arms) do waiting[#waiting + 1] = { arm = arm, depth = depth, n_seqs = n_seqs } end
      while #waiting > 0 do
        local group, later = {}, {}
        for i, c in ipairs(waiting) do
          log.progress((i - 1) / #waiting, ("%s, %d x %d"):format(c.arm, n_seqs, depth))
          local made, state, why = true, nil, nil
          if #later == 0 then made, state, why = make(c, model, plans[c.arm], n) end
          if #later > 0 or state == "no memory" and #group > 0 then later[#later + 1] = c
          elseif made then group[#group + 1] = c
          else
            rows[#rows + 1] = { bench = "generate", model = model.name, arm = c.arm, batch = n_seqs, depth = depth, status = state, reason = why }
            log.warn("%s, batch %d, depth %d: %s", c.arm, n_seqs, depth, why)
          end
        end
        for _ = 1, repeats do
          for _, c in ipairs(group) do c.times[#c.times + 1] = step(c, c.steps) end
          if C.kv_interrupted() == 1 then check.fail("interrupted") end
        end
        for _, c in ipairs(group) do
          local us, iqr = require("kelvin.bench").median(c.times)
          rows[#rows + 1] = { bench = "generate", model = model.name, arm = c.arm, batch = n_seqs, depth = depth, us = us, iqr_us = iqr, tokens_per_s = 1e6 * n_seqs / us, cache_bytes = c.bytes,
            bits_k = plans[c.arm].bits_payload.k, bits_v = plans[c.arm].bits_payload.v, path = c.path,
            sink = plans[c.arm].resolved.layers[1].sink, recent = plans[c.arm].resolved.layers[1].recent, repeats = repeats, tokens = c.steps, status = "ok" }
          c.batch:free()
        end
        waiting = later
        M.derive(rows, arms[1])
        if o.rows then M.write(o.rows, rows, run) end       -- as it goes, so that an interrupted run has rows
      end
    end
  end
  log.clear()
  return setmetatable(rows, { __tostring = function(t) return ("%s on %s\n"):format(model.name, lib.device(device).name) .. M.table(t) end })
end

-- ---- what follows from rows

local function key(...) return table.concat({ ... }, "\0") end

--- Adds attention_us, attention_share, speedup (against the first arm at the same point) and wins_from.
function M.derive(rows, base)
  local at = {}
  for _, r in ipairs(rows) do if r.us then at[key(r.arm, r.batch, r.depth)] = r end end
  for _, r in ipairs(rows) do
    if r.us then
      local empty, other = at[key(r.arm, r.batch, 0)], at[key(base, r.batch, r.depth)]
      if empty then
        r.attention_us = math.max(0, r.us - empty.us)
        r.attention_share = r.attention_us / r.us
      end
      if other then r.speedup = other.us / r.us end
    end
  end
  for _, e in ipairs(M.break_even(rows)) do
    for _, r in ipairs(rows) do if r.arm == e.arm and r.batch == e.batch then r.wins_from = e.wins_from end end
  end
  return rows
end

--- { arm, batch, wins_from } of every arm but the first that has speedups: 0 where it is faster throughout, nil where nowhere.
function M.break_even(rows)
  local order, of = {}, {}
  for _, r in ipairs(rows) do
    if r.speedup and r.speedup ~= 1 then
      local k = key(r.arm, r.batch)
      if not of[k] then
        of[k] = { arm = r.arm, batch = r.batch, points = {} }
        order[#order + 1] = of[k]
      end
      table.insert(of[k].points, { r.depth, r.speedup })
    end
  end
  for _, e in ipairs(order) do
    table.sort(e.points, function(a, b) return a[1] < b[1] end)
    for i = #e.points, 1, -1 do                         -- from the deepest back: the last time that it falls behind
      local p, next_p = e.points[i], e.points[i + 1]
      if p[2] < 1 then
        if next_p then e.wins_from = p[1] + (1 - p[2]) / (next_p[2] - p[2]) * (next_p[1] - p[1]) end
        break
      end
      if i == 1 then e.wins_from = 0 end
    end
    e.points = nil
  end
  return order
end

function M.table(rows)
  local lines = { { "arm", "batch", "depth", "tokens/s", "us/step", "attention", "cache MB", "speedup", "wins from", "path" } }
  for _, r in ipairs(rows) do
    lines[#lines + 1] = { r.arm, tostring(r.batch), tostring(r.depth), r.us and ("%.1f"):format(r.tokens_per_s) or r.status, r.us and ("%.0f"):format(r.us) or "-",
      r.attention_share and ("%.0f %%"):format(100 * r.attention_share) or "-", r.cache_bytes and ("%.1f"):format(r.cache_bytes / 1e6) or "-", r.speedup and ("%.2fx"):format(r.speedup) or "-",
      r.wins_from and ("%.0f"):format(r.wins_from) or "-", r.path or "-" }
  end
  return require("kelvin.evaltext").aligned(lines)
end

--- Speedup against depth, a series an arm and batch: where a line crosses 1, the codec starts to win.
function M.plot(rows, caption)
  local order, of = {}, {}
  for _, r in ipairs(rows) do
    if r.speedup and r.depth > 0 then
      local name = ("%s, batch %d"):format(r.arm, r.batch)
      if r.speedup == 1 then name = r.arm end
      if not of[name] then
        of[name] = { name = name, line = true, points = {} }
        order[#order + 1] = of[name]
      end
      table.insert(of[name].points, { x = r.depth, y = r.speedup, title = ("%s: %.1f tokens/s, %.2fx"):format(name, r.tokens_per_s, r.speedup) })
    end
  end
  for _, s in ipairs(order) do table.sort(s.points, function(a, b) return a.x < b.x end) end
  local first = rows[1] and rows[1].arm or "the first arm"
  return svg.plot { title = ("%s: tokens per second over %s's"):format(rows[1] and rows[1].model or "?", first), caption = caption, x = { label = "tokens in the cache", log = true },
    y = { label = "speed against " .. first .. " (1: break-even)", log = true }, series = order }
end

function M.caption(run)
  return ("%s, driver %s, %s; %d repeats of %d steps, library %s"):format(run.device, run.driver, run.model, run.repeats, run.tokens, run.code.library_sha256:sub(1, 8))
end

function M.render(rows, caption)
  return { { "table.md", "# Tokens per second by codec, depth and batch\n\n" .. caption .. "\n\n```text\n" .. M.table(rows) .. "\n```\n" }, { "break_even.svg", M.plot(rows, caption) } }
end

--- Rows, their manifest and what follows from them, as FILE.jsonl, FILE.run.json, FILE.table.md and FILE.break_even.svg.
function M.write(path, rows, run)
  if not run.code then run.code, run.git, run.host = manifest.code(), manifest.git(K.root), manifest.host() end
  require("kelvin.bench_gpu").write(path, rows, run, M.render(rows, M.caption(run)))
end

return M
