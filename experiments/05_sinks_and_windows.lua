-- What do exact tokens buy?  The same codec with and without sinks and a recent window: the window is paid for in all-in bits.
local kv = require "kelvin"

return kv.experiment {
  name = "sinks_and_windows", title = "Sinks and recent windows", model = "smollm2-135m", data = "jargon", seed = 1,
  context = 1024, chunks = 4,
  grid = { codec = { "turboquant", "q4_0" }, sink = { 0, 4 }, recent = { 0, 32, 128 } },
  policy = function(p)
    local codec = p.codec == "turboquant" and { "turboquant", bits = 3 } or { p.codec }
    return kv.policy.uniform { k = codec, v = codec, sink = p.sink, recent = p.recent }
  end,
  measure = { "kld", "ppl", "bytes_per_token" },
  report = { kv.table { rows = "sink", cols = "recent", cell = "kld.mean", where = { codec = "turboquant" } },
             kv.table { rows = "sink", cols = "recent", cell = "bits_allin", where = { codec = "turboquant" } },
             kv.plot { x = "bits_allin", y = "kld.mean", series = "codec", log_y = true, front = true } },
  smoke = { context = 128, chunks = 1, grid = { codec = { "turboquant" }, sink = { 0, 4 }, recent = { 0, 32 } } },
}
