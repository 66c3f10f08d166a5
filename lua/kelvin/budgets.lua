--- kelvin.budgets: bits per layer from the spectra of its keys and values, as KVTC's implementations give them, and the
-- allocation that minimises the squared error at the same mean.
--
--    variance   bits_l = base + 2 strength (difficulty_l - 1), difficulty_l the layer's variance over the mean of layers
--    entropy    bits_l ~ sqrt(difficulty_l), difficulty_l the entropy of the layer's normalised eigenvalues over their mean
--    lagrange   reverse water-filling of every eigenvalue of every layer under one level: bits_l the mean of 1/2 log2(value / level)
--
-- Each side by itself.  Codecs take whole bits: the layers that rounding cut most get what the mean leaves over.

local check = require "kelvin.check"
local codec = require "kelvin.codec"
local policy = require "kelvin.policy"
local doc = require("kelvin.help").doc

local M = {}

local SWEEPS = 12        -- of Jacobi rotations; covariances of 256 channels are diagonal to 1e-12 after 9

--- Eigenvalues of a symmetric matrix (row-major list of n^2, overwritten), clamped at 0: cyclic Jacobi.
function M.eigenvalues(a, n)
  local function off()
    local s, all = 0, 0
    for i = 0, n - 1 do
      for j = 0, n - 1 do
        all = all + a[i * n + j] ^ 2
        if i ~= j then s = s + a[i * n + j] ^ 2 end
      end
    end
    return s > 1e-24 * all
  end
  for _ = 1, SWEEPS do
    if not off() then break end
    for p = 0, n - 2 do
      for q = p + 1, n - 1 do
        local apq = a[p * n + q]
        if apq ~= 0 then
          local theta = (a[q * n + q] - a[p * n + p]) / (2 * apq)
          local t = (theta < 0 and -1 or 1) / (math.abs(theta) + math.sqrt(theta * theta + 1))
          local c = 1 / math.sqrt(t * t + 1)
          local s = t * c
          for k = 0, n - 1 do
            local x, y = a[k * n + p], a[k * n + q]
            a[k * n + p], a[k * n + q] = c * x - s * y, s * x + c * y
          end
          for k = 0, n - 1 do
            local x, y = a[p * n + k], a[q * n + k]
            a[p * n + k], a[q * n + k] = c * x - s * y, s * x + c * y
          end
        end
      end
    end
  end
  local out = {}
  for i = 0, n - 1 do out[i + 1] = math.max(0, a[i * n + i]) end
  return out
end

--- spectra[l][h]: eigenvalues of the covariance of a side, keys before RoPE; once a calibration, they take seconds.
local function spectra(calib, side)
  local known = rawget(calib, "_spectra") or {}
  calib._spectra = known
  if known[side] then return known[side] end
  local m, out = calib.model, {}
  local n = m.head_dim
  local a = require("ffi").new("double[?]", n * n)
  for l = 1, m.n_layers do
    out[l] = {}
    for h = 1, m.n_kv_heads do
      local kind = side == "k" and "k_pre" or "v"
      local mean, second = calib:mean(kind, l, h):_data(), calib:second(kind, l, h):_data()
      for i = 0, n - 1 do
        for j = 0, n - 1 do a[i * n + j] = second[i * n + j] - mean[i] * mean[j] end
      end
      out[l][h] = M.eigenvalues(a, n)
    end
  end
  known[side] = out
  return out
end

local function mean_of(list)
  local sum = 0
  for _, x in ipairs(list) do sum = sum + x end
  return sum / #list
end

local function clamp(x, lo, hi) return math.max(lo, math.min(hi, x)) end

--- Layers' difficulty: f(eigenvalues of a head), mean over heads, over its mean of layers.
local function difficulty(values, f)
  local out = {}
  for l, heads in ipairs(values) do
    local by = {}
    for h, e in ipairs(heads) do by[h] = f(e) end
    out[l] = mean_of(by)
  end
  local mean = mean_of(out)
  for l, x in ipairs(out) do out[l] = mean > 0 and x / mean or 1 end
  return out
end

M.rules = {
  variance = function(values, base, strength)
    local out = difficulty(values, function(e) return mean_of(e) end)
    for l, x in ipairs(out) do out[l] = base + (x - 1) * strength * 2 end
    return out
  end,
  entropy = function(values, base, strength)
    local out = difficulty(values, function(e)
      local sum, h = mean_of(e) * #e, 0
      for _, x in ipairs(e) do
        if x > 0 then h = h - x / sum * math.log(x / sum) end
      end
      return h
    end)
    for l, x in ipairs(out) do out[l] = math.sqrt(x) end
    local mean = mean_of(out)
    for l, x in ipairs(out) do out[l] = base * ((1 - strength) + strength * x / mean) end
    return out
  end,
  lagrange = function(values, base)
    local function bits_at(level)
      local out = {}
      for l, heads in ipairs(values) do
        local sum, n = 0, 0
        for _, e in ipairs(heads) do
          for _, x in ipairs(e) do
            if x > level then sum = sum + math.log(x / level) / math.log(4) end
            n = n + 1
          end
        end
        out[l] = sum / n
      end
      return out
    end
    local lo, hi = -700, 0                               -- log of the level, from below the smallest float to above the largest value
    for _, heads in ipairs(values) do
      for _, e in ipairs(heads) do for _, x in ipairs(e) do hi = math.max(hi, math.log(x + 1e-300)) end end
    end
    for _ = 1, 100 do
      local mid = (lo + hi) / 2
      if mean_of(bits_at(math.exp(mid))) > base then lo = mid else hi = mid end
    end
    return bits_at(math.exp(hi))
  end,
}

--- Whole bits in min..max; with `keep` their mean is as near to base as whole bits get without passing it.
function M.whole(bits, base, min, max, keep)
  local out = {}
  if not keep then
    for l, b in ipairs(bits) do out[l] = clamp(math.floor(b + 0.5), min, max) end
    return out
  end
  local lo, hi, room = -64, 64, math.floor(base * #bits + 1e-9)
  local function total(shift)
    local sum = 0
    for l, b in ipairs(bits) do
      out[l] = clamp(math.floor(b + shift), min, max)
      sum = sum + out[l]
    end
    return sum
  end
  check.that(total(lo) <= room, "policy 'budgets': a mean of %g bits is less than the fewest, %d", base, min)
  for _ = 1, 60 do
    local mid = (lo + hi) / 2
    if total(mid) <= room then lo = mid else hi = mid end
  end
  local sum = total(lo)
  while sum < room do
    local best, short
    for l, b in ipairs(bits) do
      local s = b + lo - out[l]
      if out[l] < max and (not short or s > short) then best, short = l, s end
    end
    if not best then break end
    out[best], sum = out[best] + 1, sum + 1
  end
  return out
end

doc("kv.policy.budgets", [[
  kv.policy.budgets { rule = "lagrange", k_bits = 4, v_bits = 4, codec = "turboquant", strength = 0.5, keep = 1, sink = 0, recent = 0 } -> policy
  Bits per layer from calibration, each side by itself, for a codec that has `bits`.  rule: variance (KVTC's first: more to layers
  of more variance), entropy (its second: to flatter spectra) or lagrange (least squared error at the mean).  strength: of
  variance (0.5) and entropy (1 is the published one).  keep = 0: the mean may move, as it did when variance was published.
  As an arm, with a calibration: policy=budgets:rule=entropy:k_bits=3:v_bits=4,sink=4]])
M.budgets = policy.new {
  name = "budgets", about = "bits per layer from the spectra of its keys and values (KVTC)",
  params = {
    rule = { default = "lagrange", about = "variance, entropy or lagrange" },
    k_bits = { default = 4, min = 1, max = 16, about = "mean of the keys' layers" }, v_bits = { default = 4, min = 1, max = 16, about = "mean of the values' layers" },
    codec = { default = "turboquant", about = "a codec with a parameter `bits`" },
    strength = { default = 0.5, min = 0, max = 4, about = "of variance and entropy" },
    keep = { default = 1, min = 0, max = 1, about = "1: the mean stays" },
    sink = { default = 0, min = 0, about = "exact tokens at the start" }, recent = { default = 0, min = 0, about = "exact tokens at the end" },
    mean = { default = "none", about = "both, k, v, auto, bias or none" },
  },
  plan = function(p, model)
    local rule = check.that(M.rules[p.rule], "policy 'budgets': rule=%s is none of variance, entropy, lagrange", p.rule)
    local scope = policy._scope()
    local calib = check.that(scope and scope.calib, "policy 'budgets': spectra come from a calibration: --calib FILE or calib =")
    local knob = check.that(codec.new(p.codec):param "bits", "policy 'budgets': codec '%s' has no parameter bits", p.codec)
    local out = {}
    for l = 1, model.n_layers do out[l] = { sink = p.sink, recent = p.recent, mean = p.mean } end
    for _, side in ipairs { "k", "v" } do
      local base = p[side .. "_bits"]
      local bits = M.whole(rule(spectra(calib, side), base, p.strength), base, math.max(1, knob.min), knob.max, p.keep == 1)
      for l, b in ipairs(bits) do out[l][side] = { p.codec, bits = b } end
    end
    return out
  end,
}

return M
