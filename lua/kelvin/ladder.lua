--- kelvin.ladder: every method at the same all-in bits.
--
-- Methods are compared at equal bytes or not at all, and their parameters come in steps.  For each target the ladder takes
-- the first setting of a method that weighs within the tolerance, everything counted as the cache's ledger counts it, and
-- names the nearest one where there is none.

local check = require "kelvin.check"
local codec = require "kelvin.codec"
local doc = require("kelvin.help").doc

local M = {}

local STORE, POINTER, LINE = 64, 8, 64      -- bytes of a store's books and of a page's pointer, and what allocations are rounded to (core/cache_count.c)
local EXACT = 16                            -- bits of sinks, window and unflushed groups: f16

local function block(n) return math.ceil(n / LINE) * LINE end

-- Bytes of one layer, head and side after `context` tokens: pages that its window still sees, sinks, the buffer in which a
-- group waits until it is whole, books.
local function store_bytes(info, head_dim, window, o)
  local row, held = head_dim * EXACT / 8, o.sink
  local tail = o.recent == 0 and info.granule - 1 or o.recent + info.granule
  local coded = math.floor(math.max(0, o.context - o.sink - o.recent) / info.granule) * info.granule
  local pages = math.ceil(coded / info.page_tokens)
  local table_bytes, first = block(POINTER * pages), window > 0 and math.max(0, o.context - window + 1) or 0
  if first > 0 then
    pages = pages - math.max(0, math.min(pages, math.floor((first - o.sink) / info.page_tokens)))
    if first >= o.sink then held = 0 end
  end
  return pages * info.page_bytes + block(row * held) + block(row * tail) + STORE + table_bytes
end

-- All-in bits of one side.
local function side_bits(model, side, spec, o, stored)
  local info
  if stored then
    local bits, granule = stored(spec, model.head_dim)
    info = { granule = granule or 1, page_tokens = o.page_tokens, page_bytes = bits * model.head_dim * o.page_tokens / 8 }
  else
    local params = {}
    for name, value in pairs(spec) do if name ~= 1 then params[name] = value end end
    info = codec.new(spec[1], params):info_for(model.head_dim, o.page_tokens, side)
  end
  local total = 0
  for l = 1, model.n_layers do total = total + model.n_kv_heads * store_bytes(info, model.head_dim, model:layer(l).sliding_window, o) end
  return 8 * total / (require("kelvin.eval").cached(model, o.context) / 2)
end

local function geometry(o, page_tokens)
  return { context = o.context or 2048, sink = o.sink or 0, recent = o.recent or 0, page_tokens = page_tokens or codec.PAGE_TOKENS }
end

doc("kv.ladder.bits", [[
  kv.ladder.bits(model, { k = SPEC, v = SPEC } [, { context = 2048, sink = 0, recent = 0, page_tokens = 64 }]) -> all-in bits, of K, of V
  What bits_allin of an evaluation's row will be: pages, sinks, window, unflushed groups and books over the scalars that an
  exact cache would hold.  Calibrated codecs count at their nominal size.]])
function M.bits(model, spec, o)
  o = geometry(o or {}, o and o.page_tokens)
  local k, v = side_bits(model, "k", spec.k, o), side_bits(model, "v", spec.v, o)
  return (k + v) / 2, k, v
end

-- "bits=3 outliers=12", in the order of the names.
local function words(spec)
  local names, out = {}, {}
  for name in pairs(spec) do if name ~= 1 then names[#names + 1] = name end end
  table.sort(names)
  for i, name in ipairs(names) do out[i] = name .. "=" .. tostring(spec[name]) end
  return spec[1] .. (#out > 0 and ":" or "") .. table.concat(out, ":")
end

-- Every setting of a method's sides with its bits; settings that a geometry does not allow are left out.
local function weigh(model, method, o)
  local function size(side, list)
    local out = {}
    for i, spec in ipairs(list) do
      local ok, bits = pcall(side_bits, model, side, spec, geometry(o, method.page_tokens), method.stored and method.stored[side])
      if ok then out[#out + 1] = { spec = spec, bits = bits, index = i } end
    end
    check.that(#out > 0, "kv.ladder: method '%s': no setting of %s fits head_dim %d", method.name, side, model.head_dim)
    return out
  end
  return { k = size("k", method.k), v = size("v", method.v or method.k) }
end

local SPREAD = 4          -- a bit that is no code's counts as much as keys and values so many bits apart
local UNEVEN = 0.25        -- bits that a pair with fewer bits for keys is set back: keys suffer more

-- The pair for a target: one setting for both sides, the first of the list that is within the tolerance; else two with the
-- fewest bits beside codes, as close together as it gets, keys before values.  Otherwise nil and the nearest there is.
local function choose(sized, same, target, within)
  local best, nearest
  local function off(bits) return math.abs(bits / target - 1) end
  local function consider(k, v, rank)
    local bits = (k.bits + v.bits) / 2
    if not nearest or off(bits) < off(nearest.bits) - 1e-12 then nearest = { k = k.spec, v = v.spec, bits = bits } end
    if off(bits) <= within and (not best or rank < best.rank - 1e-9 or rank < best.rank + 1e-9 and off(bits) < off(best.bits) - 1e-9) then
      best = { k = k.spec, v = v.spec, bits = bits, rank = rank }
    end
  end
  if same then
    for _, k in ipairs(sized.k) do
      for _, v in ipairs(sized.v) do
        if k.index == v.index then consider(k, v, k.index) end
      end
    end
    if best then return best end
  end
  for _, k in ipairs(sized.k) do
    for _, v in ipairs(sized.v) do
      local a, b, over = k.bits, v.bits, 0
      if k.spec.bits and v.spec.bits then                 -- where the codes' bits are a parameter, the fewest bits beside them
        a, b = k.spec.bits, v.spec.bits
        over = k.bits - a + v.bits - b
      end
      consider(k, v, over * SPREAD + math.abs(a - b) + (a < b - 1e-9 and UNEVEN or 0))
    end
  end
  return best, nearest
end

doc("kv.ladder", [[
  kv.ladder { model =, targets = { 2.25, … }, methods = { … }, context = 2048, sink = 0, recent = 0, within = 0.02 } -> arms
  Arms for kv.experiment: each method at each target of all-in bits, without and with calibrated means, target by target.
  A method: { name =, family =, k = { SPEC, … }, v = { SPEC, … }, page_rope = true, page_tokens = 64, targets = its own }.
  k lists settings in order of preference, v as well; without v both sides share one, and differ only when no shared setting
  is near enough.  stored = { k = function(spec, head_dim) … end, v = … } tells stored bits per element, and the tokens of a
  group, of codecs whose tables would have to be made to know.  An arm has method, target, mean ("no" or "yes"), setting and expected (its bits).  What no setting reaches is
  an arm with skip: what is nearest.]])
function M.new(o)
  local within, arms, sized = o.within or 0.02, {}, {}
  for i, method in ipairs(o.methods) do sized[i] = weigh(o.model, method, o) end
  for _, target in ipairs(o.targets) do
    for i, method in ipairs(o.methods) do
      local wanted = not method.targets
      for _, t in ipairs(method.targets or {}) do wanted = wanted or t == target end
      if wanted then
        local found, nearest = choose(sized[i], method.v == nil, target, within)
        local name = ("%s @%g"):format(method.name, target)
        if not found then
          arms[#arms + 1] = { name = name, method = method.name, target = target,
            skip = ("no setting within %g %%; nearest: %.3f bits, k=%s v=%s"):format(100 * within, nearest.bits, words(nearest.k), words(nearest.v)) }
        else
          local setting = words(found.k)
          if setting ~= words(found.v) then setting = setting .. " / " .. words(found.v) end
          for _, mean in ipairs { "no", "yes" } do
            arms[#arms + 1] = { name = name .. (mean == "yes" and " −mean" or ""), family = method.family or method.name, method = method.name, target = target, mean = mean,
              setting = setting, expected = found.bits,
              arm = { k = found.k, v = found.v, page_tokens = method.page_tokens, mean = mean == "yes" and "both" or "none", page_rope = (mean == "yes" or method.page_rope) and true or nil } }
          end
        end
      end
    end
  end
  return arms
end

return setmetatable(M, { __call = function(_, o) return M.new(o) end })
