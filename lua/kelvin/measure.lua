--- Named measurements of an experiment.
--
-- kld and ppl come out of the lockstep evaluation, whose rows have them anyway; the others are taken per arm afterwards.
-- A measurement adds fields to the row and may name columns that tables show.

local M = { known = {} }

M.known.kld = { about = "KL divergence from an exact cache: mean with interval, median, percentiles, maximum" }
M.known.ppl = { about = "perplexity, and its ratio to the exact cache's" }

M.known.bytes_per_token = {
  about = "allocated cache bytes per token at the tested context", columns = { "bytes_per_token" },
  run = function(ctx, row) row.bytes_per_token = (row.bytes.total - row.bytes.shared) / ctx.context end,
}

M.known.decode_us = {
  about = "one decode step at the tested context, on codes where the codec can: median and quartiles over repeats", columns = { "decode_us.median" },
  run = function(ctx, row, arm)
    local lib, repeats, warm = require "kelvin.lib", 16, 2
    local s = ctx.model:session { plan = arm.plan, max_tokens = ctx.context + repeats + warm }
    local ids = {}
    for i = 1, ctx.context do ids[i] = ctx.ids[i] end
    s:feed(ids, { logits = "none" })
    local times = {}
    for i = 1, warm + repeats do
      local t0 = lib.now()
      s:feed(ctx.ids[i])
      if i > warm then times[#times + 1] = (lib.now() - t0) * 1e6 end
    end
    table.sort(times)
    row.decode_us = { median = (times[repeats / 2] + times[repeats / 2 + 1]) / 2, q1 = times[repeats / 4], q3 = times[3 * repeats / 4], repeats = repeats, raw = times }
  end,
}

function M.names()
  local names = {}
  for name in pairs(M.known) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- Columns that the named measurements add to tables.
function M.columns(list)
  local out = {}
  for _, name in ipairs(list) do
    for _, c in ipairs(M.known[name].columns or {}) do out[#out + 1] = c end
  end
  return out
end

--- Takes the measurements of an arm that the evaluation has not taken.
function M.run(list, ctx, row, arm)
  for _, name in ipairs(list) do
    if M.known[name].run then M.known[name].run(ctx, row, arm) end
  end
end

return M
