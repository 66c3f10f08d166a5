-- How few bits can keys and values take before the next-token distribution moves?
local kv = require "kelvin"

return kv.experiment {
  name = "bits_sweep", title = "Bits of keys and of values", model = "smollm2-135m", data = "jargon", seed = 1,
  context = 1024, chunks = 4, sink = 4, recent = 32,
  grid = { k_bits = { 2, 3, 4 }, v_bits = { 2, 3, 4 } },
  policy = function(p)
    return kv.policy.uniform { k = { "turboquant", bits = p.k_bits }, v = { "turboquant", bits = p.v_bits }, sink = 4, recent = 32 }
  end,
  measure = { "kld", "ppl", "bytes_per_token" },
  report = { kv.table { rows = "k_bits", cols = "v_bits", cell = "kld.mean" },
             kv.plot { x = "bits_allin", y = "kld.mean", series = "k_bits", log_y = true, front = true } },
}
