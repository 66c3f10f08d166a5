--- kelvin: the module.  `local kv = require "kelvin"` is all that a script, an experiment or the REPL needs.
--
-- Submodules load when they are first named, so that reading an experiment file touches neither the library nor a model.

local M = { _VERSION = "0.1" }

-- public name -> { module, field }; without a field the module itself is the value.
local where = {
  tensor = { "kelvin.tensor" }, codec = { "kelvin.codec" }, codecs = { "kelvin.codec", "list" },
  compare = { "kelvin.compare", "compare" }, policy = { "kelvin.policy" }, policies = { "kelvin.policies" }, fit_budget = { "kelvin.policy", "fit_budget" },
  plan = { "kelvin.plan" }, model = { "kelvin.model" }, synthetic = { "kelvin.model", "synthetic" }, calib = { "kelvin.calib" }, calibrate = { "kelvin.calib", "calibrate" }, eval = { "kelvin.eval" },
  kvtc = { "kelvin.kvtc" }, offload = { "kelvin.kvtc", "offload" },
  ladder = { "kelvin.ladder" }, experiment = { "kelvin.experiment" }, table = { "kelvin.experiment", "table" }, plot = { "kelvin.experiment", "plot" },
  json = { "kelvin.json" }, config = { "kelvin.config" }, log = { "kelvin.log" }, help = { "kelvin.help" },
  repl = { "kelvin.repl" }, bench = { "kelvin.bench" }, doctor = { "kelvin.doctor" },
  threads = { "kelvin.lib", "threads" }, simd = { "kelvin.lib", "simd" }, now = { "kelvin.lib", "now" },
  interrupted = { "kelvin.lib", "interrupted" }, sha256 = { "kelvin.lib", "sha256" },
  sha256_file = { "kelvin.lib", "sha256_file" }, hadamard = { "kelvin.lib", "hadamard" },
  lloyd_max = { "kelvin.lib", "lloyd_max" }, device = { "kelvin.lib", "device" }, build = { "kelvin.lib", "build" },
  random = { "kelvin.lib", "random" }, container = { "kelvin.container" }, save = { "kelvin.container", "save" },
  load = { "kelvin.container", "load" }, index = { "kelvin.index" },
}

--- Names that the module offers, sorted: for help and completion.
function M._names()
  local names = {}
  for name in pairs(where) do names[#names + 1] = name end
  table.sort(names)
  return names
end

return setmetatable(M, {
  __index = function(t, name)
    local w = where[name]
    if not w then return nil end
    local value = require(w[1])
    if w[2] then value = value[w[2]] end
    rawset(t, name, value)
    return value
  end,
})
