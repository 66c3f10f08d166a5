-- Is a layerwise policy better than a uniform one at the same bytes?  Uniform, the same bits moved from values to keys, wide edges,
-- and keys weighted by what calibration found: all with the same sinks and window, compared at their all-in bits.
local kv = require "kelvin"

local function uniform(k, v)
  return kv.policy.uniform { k = { "turboquant", bits = k }, v = { "turboquant", bits = v }, sink = 4, recent = 32 }
end

local function layered(name, k, v)
  return kv.policy {
    name = name,
    plan = function(_, model)
      local layers = {}
      for l = 1, model.n_layers do
        layers[l] = { k = { "turboquant", bits = k(l, model.n_layers) }, v = { "turboquant", bits = v(l, model.n_layers) }, sink = 4, recent = 32 }
      end
      return layers
    end,
  }
end

local function edges(l, n) return (l <= 2 or l > n - 2) and 8 or 3 end
local function first_half(l, n) return l <= n / 2 and 4 or 2 end
local function second_half(l, n) return l <= n / 2 and 2 or 4 end

return kv.experiment {
  name = "mixed_layers", title = "Layerwise policies at the same bits", model = "smollm2-135m", data = "jargon", seed = 1,
  context = 1024, chunks = 4,
  arms = {
    { name = "uniform K3 V3", arm = uniform(3, 3), family = "uniform" },
    { name = "uniform K4 V2", arm = uniform(4, 2), family = "uniform" },
    { name = "uniform K2 V4", arm = uniform(2, 4), family = "uniform" },
    { name = "edges at 8, rest 3", arm = layered("edges", edges, edges), family = "layered" },
    { name = "first half 4, second half 2", arm = layered("first_half", first_half, first_half), family = "layered" },
    { name = "first half 2, second half 4", arm = layered("second_half", second_half, second_half), family = "layered" },
  },
  measure = { "kld", "ppl", "bytes_per_token" },
  report = { kv.plot { x = "bits_allin", y = "kld.mean", series = "family", log_y = true, front = true } },
  smoke = { context = 128, chunks = 1 },
}
