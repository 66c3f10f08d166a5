--- kelvin.judge: how far a codec's keys or values are from one layer's own, by K/V head.  What kelvin.hybrid compares.
--
--    judge       keys                                              values
--    vector      rel_mse(k) + rel_mse(q k^T)                       rel_mse(v)
--    attention   rel_mse of the output, exact values               rel_mse of the output, exact weights
--    kl          KL of the attention weights, nats a query         as attention
--
-- Queries of all heads that read a K/V head, spread over the text, see what they would see when decoding: tokens up to their
-- own and within the layer's window, the first `sink` and the last `recent` of them exact.

local check = require "kelvin.check"
local codec = require "kelvin.codec"
local compare = require("kelvin.compare").compare
local tensor = require "kelvin.tensor"

local M = {}

M.judges = { vector = true, attention = true, kl = true }

local QUERIES = 32                                  -- of one K/V head
local OUTLIERS, OUTLIER_GAIN, TAIL = 2, 6, 0.3       -- synthetic rows: channels made large, by how much, and the strength of a common heavy tail

--- Gaussian rows with a few large channels and a heavy tail common to a row.
local function synthetic(heads, tokens, dim, layer, stream)
  local t = tensor.randn { heads, tokens, dim, seed = layer, stream = stream }
  local tail = tensor.randn { heads, tokens, seed = layer, stream = stream + 16 }
  local x, z = t:_data(), tail:_data()
  for h = 0, heads - 1 do
    for i = 0, tokens - 1 do
      local row, gain = (h * tokens + i) * dim, math.exp(TAIL * z[h * tokens + i])
      for j = 0, dim - 1 do x[row + j] = x[row + j] * gain * ((j * 7 + h * 3 + layer) % dim < OUTLIERS and OUTLIER_GAIN or 1) end
    end
  end
  return t
end

--- Softmax weights of scores s [heads, queries, tokens] into out; `exact` scores where tokens stay exact.
local function weigh(x, s, exact, out)
  local n, rows, from, to, kept = x.n, x.n_queries, s:_data(), out:_data(), exact:_data()
  for r = 0, x.heads * rows - 1 do
    local at, row = x.at[r % rows + 1], r * n
    local lo, fresh = math.max(0, at - x.span + 1), at - x.recent + 1
    local top = -math.huge
    for t = lo, at do
      local a = ((t < x.sink or t >= fresh) and kept[row + t] or from[row + t]) * x.scale
      to[row + t] = a
      if a > top then top = a end
    end
    local sum = 0
    for t = lo, at do
      to[row + t] = math.exp(to[row + t] - top)
      sum = sum + to[row + t]
    end
    for t = lo, at do to[row + t] = to[row + t] / sum end
  end
  return out
end

--- One layer: keys and values [heads, tokens, dim] and the queries that read each K/V head [heads, queries, dim].
-- taps: model:tap{ layer = "all" }, or nil for synthetic rows.  o: sink, recent, tokens.
function M.layer(model, l, taps, o)
  local heads, dim = model.n_kv_heads, model.head_dim
  local x = { heads = heads, dim = dim, sink = o.sink or 0, recent = math.max(1, o.recent or 0), scale = 1 / math.sqrt(dim), span = math.huge, at = {} }
  if taps then
    x.k, x.v = taps.k:select(1, l), taps.v:select(1, l)
    local window = model:layer(l).sliding_window
    if window > 0 then x.span = window end
  else
    x.k, x.v = synthetic(heads, o.tokens, dim, l, 1), synthetic(heads, o.tokens, dim, l, 2)
  end
  x.n = x.k:shape()[2]
  x.n_queries = math.min(QUERIES, x.n)
  for i = 1, x.n_queries do x.at[i] = math.floor((i - 0.5) * x.n / x.n_queries) end      -- counted from 0
  if taps then
    local group, q = model.n_heads / heads, taps.q:select(1, l)
    x.q = tensor.zeros { heads, x.n_queries, dim }
    local from, to = q:_data(), x.q:_data()
    for h = 0, heads - 1 do
      for i = 0, x.n_queries - 1 do
        local src, dst = ((h * group + i % group) * x.n + x.at[i + 1]) * dim, (h * x.n_queries + i) * dim
        for j = 0, dim - 1 do to[dst + j] = from[src + j] end
      end
    end
  else
    x.q = tensor.randn { heads, x.n_queries, dim, seed = l, stream = 3 }
  end
  x.dots = codec.new("f32"):encode(x.k):dot(x.q)
  return x
end

-- What the attention judges hold candidates against, made when first asked for.
local function attention(x)
  if x.weights then return end
  local function empty() return tensor.zeros { x.heads, x.n_queries, x.n } end
  x.weights = weigh(x, x.dots, x.dots, empty())
  x.coded = x.weights:clone()                       -- of tokens that are not exact
  local w = x.coded:_data()
  for r = 0, x.heads * x.n_queries - 1 do
    local at = x.at[r % x.n_queries + 1]
    for t = 0, at do
      if t < x.sink or t > at - x.recent then w[r * x.n + t] = 0 end
    end
  end
  x.scratch = empty()
  x.values = codec.new("f32"):encode(x.v, { side = "v" })
  x.out, x.out_coded = x.values:accumulate(x.weights), x.values:accumulate(x.coded)
end

--- Squared distance of a and b over squared length of `of`, one head of [heads, rows, dim].
local function relative(x, a, b, of, h)
  local p, q, r, size = a:_data(), b:_data(), of:_data(), x.n_queries * x.dim
  local err, energy = 0, 0
  for i = (h - 1) * size, h * size - 1 do
    err, energy = err + (p[i] - q[i]) ^ 2, energy + r[i] ^ 2
  end
  return energy > 0 and err / energy or 0
end

local function divergence(x, w, h)
  local p, q, size = x.weights:_data(), w:_data(), x.n_queries * x.n
  local sum = 0
  for i = (h - 1) * size, h * size - 1 do
    if p[i] > 0 then sum = sum + p[i] * math.log(p[i] / math.max(q[i], 1e-38)) end      -- the least normal f32
  end
  return math.max(0, sum / x.n_queries)
end

local function head(t, h) return t:slice(1, h, h) end

--- Scores of a codec by head.
function M.scores(x, c, side, judge)
  check.that(M.judges[judge], "judge '%s' is none of attention, kl, vector", tostring(judge))
  local block = c:encode(x[side], { side = side })
  local out = {}
  if judge == "vector" then
    local y, dots = block:decode(), side == "k" and block:dot(x.q) or nil
    for h = 1, x.heads do
      out[h] = compare(head(x[side], h), head(y, h)).rel_mse + (dots and compare(head(x.dots, h), head(dots, h)).rel_mse or 0)
    end
    return out
  end
  attention(x)
  if side == "v" then
    local y = block:accumulate(x.coded)
    for h = 1, x.heads do out[h] = relative(x, x.out_coded, y, x.out, h) end
    return out
  end
  local w = weigh(x, block:dot(x.q), x.dots, x.scratch)
  local y = judge == "attention" and x.values:accumulate(w)
  for h = 1, x.heads do out[h] = y and relative(x, x.out, y, x.out, h) or divergence(x, w, h) end
  return out
end

return M
