-- Wide codecs at both ends, then more key bits for the layers that calibration found hardest; fitted to a budget.
local kv = require "kelvin"

return kv.policy {
  name = "edges_then_sensitivity",
  params = { edge = { default = 2, min = 0, about = "layers kept at 8 bits at each end" },
             hard = { default = 8, min = 0, about = "layers whose keys get 4 bits" },
             budget = { default = 4.5, min = 1, max = 16, about = "mean all-in bits per element" } },
  plan = function(p, model, stats)
    local layers = {}
    for l = 1, model.n_layers do
      local at_edge = l <= p.edge or l > model.n_layers - p.edge
      layers[l] = { k = { "turboquant", bits = at_edge and 8 or stats:rank(l, "k") <= p.hard and 4 or 3 },
                    v = { "turboquant", bits = at_edge and 8 or 2 }, sink = 4, recent = 32 }
    end
    return kv.fit_budget(layers, p.budget)
  end,
}
