-- How much does each codec damage a real model's predictions, at how many bits?  Every arm keeps the same four sinks and the
-- same window of 32 recent tokens exact; means are calibrated on another part of the text than the one that is scored.
local kv = require "kelvin"

local function arm(family, name, text) return { family = family, name = name, arm = text or name } end
local mean = "turboquant, mean removed"

return kv.experiment {
  name = "pareto", title = "KV-cache codecs: all-in bits against damage",
  about = "Every arm: 4 sinks and 32 recent tokens exact (f16), the rest compressed; the reference is an exact f32 cache.",
  model = "smollm2-135m", data = "jargon", seed = 1,
  context = 2048, chunks = 4, sink = 4, recent = 32,
  calibrate = { context = 512, chunks = 4 },

  -- The first goes alone with the reference, so that a row comes early.
  arms = {
    arm("ggml blocks", "q4_0"), arm("turboquant", "turboquant-4"), arm("turboquant", "turboquant-3"),
    arm("exact", "f16"), arm("ggml blocks", "q8_0"), arm("ggml blocks", "q5_1"),
    arm("kivi", "kivi-4"), arm("kivi", "kivi-2"), arm("turboquant", "turboquant-2"),
    arm(mean, "turboquant-4 −mean", "k=turboquant-4,v=turboquant-4,mean=both"),
    arm(mean, "turboquant-3 −mean", "k=turboquant-3,v=turboquant-3,mean=both"),
    arm(mean, "turboquant-2 −mean", "k=turboquant-2,v=turboquant-2,mean=both"),
    arm("K ≠ V", "K q8_0 · V turboquant-3", "k=q8_0,v=turboquant-3"),
    arm("K ≠ V", "K tq-4 · V tq-2 −mean", "k=turboquant-4,v=turboquant-2,mean=both"),
  },

  measure = { "kld", "ppl", "bytes_per_token" },
  report = { kv.plot { x = "bits_allin", y = "kld.mean", series = "family", log_x = true, log_y = true, front = true } },
  smoke = { context = 128, chunks = 1, calibrate = { context = 128, chunks = 2 } },
}
