local H = require "helper"

local TINY = H.root .. "/tests/golden/tiny/llama.gguf"

local function run(args, stdin)
  local out, rc = H.run(args, stdin)
  H.cleanup()
  return out, rc
end

describe("the program", function()
  it("answers a wrong command or option in one line, with status 2", function()
    for args, want in pairs {
      ["frobnicate"] = "kelvin: unknown command 'frobnicate'\n",
      ["eval"] = "kelvin: missing argument 'model'\n",
      ["codecs --nope"] = "kelvin: unknown option '--nope'\n",
      ["eval m --text t --arm q4_0 --context 0"] = "kelvin: --context=0 is not a whole number from 1\n",
      ["chat --temperature hot"] = "kelvin: --temperature=hot is not a number from 0\n",
      ["--threads none doctor"] = "kelvin: --threads=none is not a whole number from 1\n",
    } do
      local out, rc = run(args)
      assert.are.equal(want, out)
      assert.are.equal(2, rc, args)
    end
  end)

  it("answers what cannot be done in one line, with status 1", function()
    for args, want in pairs {
      ["codecs nosuch-codec-at-all"] = "^kelvin: codec 'nosuch%-codec%-at%-all' is unknown; known: [^\n]*\n$",
      ["models /no/such.gguf"] = "^kelvin: model '/no/such.gguf': no such file\n$",
      ["chat /no/such.gguf"] = "^kelvin: model '/no/such.gguf': no such file\n$",
      ["eval no-such-model --text t --arm q4_0"] = "^kelvin: model 'no%-such%-model' is unknown[^\n]*\n$",
      ["eval /dev/null --text t --arm q4_0"] = "^kelvin: [^\n]*/dev/null[^\n]*\n$",
      ["run /no/such.lua"] = "^kelvin: [^\n]*/no/such.lua[^\n]*\n$",
      ["report /no/such/folder"] = "^kelvin: [^\n]*/no/such/folder[^\n]*\n$",
      ["--threads 1000 doctor"] = "^kelvin: [^\n]*1000[^\n]*64[^\n]*\n$",
    } do
      local out, rc = run(args)
      assert.matches(want, out)
      assert.are.equal(1, rc, args)
    end
  end)

  it("shows help with an example for every command", function()
    for _, command in ipairs { "run", "repl", "codecs", "models", "doctor", "report", "chat", "bench", "eval", "policies", "index", "calibrate" } do
      local out, rc = run(command .. " --help")
      assert.are.equal(0, rc)
      assert.matches("Usage: kelvin " .. command, out)
      assert.matches("Examples?: ", out)
    end
  end)

  it("lists codecs and describes one", function()
    assert.matches("turboquant%-4 +preset +scalar", (run "codecs"))
    local out, rc = run "codecs q4_0"
    assert.are.equal(0, rc)
    assert.matches("bits +4 +1%.%.8", out)
  end)

  it("lists policies and layer presets, describes one, and shows the plan it makes", function()
    local out, rc = run "policies"
    assert.are.equal(0, rc)
    assert.matches("hybrid +the better of TurboAngle and TurboQuant", out)
    assert.matches("phi%-1.5 +1%-8 17%-24 +256 +128 +3.583", out)
    assert.matches("layers +1%-4 with 256 angles for keys, 128 for values", (run "policies early_boost_mistral_like"))
    assert.matches("judge +vector +vector, attention or kl", (run "policies hybrid"))
    out, rc = run("policies mixedkv:early=1:edge=0,sink=4 --model " .. TINY)
    assert.are.equal(0, rc)
    assert.matches("layers 1%-1: k turboangle%(angles=256,[^\n]*sink 4.*layers 2%-2: k turboangle%(angles=128,", out)
    assert.are.equal("kelvin: policies: no layer preset fits model 'llama' (2 layers, 4 K/V heads, head_dim 16)\n", (run("policies --model " .. TINY)))
    out, rc = run "policies nosuch"
    assert.are.equal(1, rc)
    assert.matches("^kelvin: policies: 'nosuch' is neither a policy nor a preset; known: budgets, hybrid, mixedkv, saved, [^\n]*\n$", out)
  end)

  it("measures policies: a file, a file with parameters, a name with parameters", function()
    local text = os.tmpname()
    local path = text .. ".lua"
    local function write(file, what)
      local f = assert(io.open(file, "wb"))
      f:write(what)
      f:close()
    end
    write(text, ("The river carried %d stones to the harbour, and the captain painted each window silver. "):rep(30))
    write(path, [[return require("kelvin").policy { name = "mine", params = { bits = { default = 4, min = 1, max = 8 } }, plan = function(p, model)
      local layers = {}
      for l = 1, model.n_layers do layers[l] = { k = { "turboquant", bits = p.bits }, v = "turboquant-4" } end
      return layers
    end }]])
    local out, rc = run(("eval %s --text %s --context 64 --chunks 1 --no-controls --format json --policy %s --arm policy=%s:bits=2 --arm policy=mixedkv:early=1"):format(TINY, text, path, path))
    assert.are.equal(0, rc)
    local rows = {}
    for line in out:gmatch "{[^\n]+" do rows[#rows + 1] = H.kv.json.decode(line, "row") end
    assert.are.same({ 3, "policy=" .. path .. ":bits=2", "policy=mixedkv:early=1", "mine" }, { #rows, rows[1].arm, rows[2].arm, rows[3].arm })
    assert.is_true(rows[1].bits_k < rows[3].bits_k and rows[1].kld.mean > rows[3].kld.mean)
    write(path, "return 3")
    for _, option in ipairs { "--policy " .. path, "--arm policy=" .. path } do
      out, rc = run(("eval %s --text %s --context 64 --chunks 1 --no-controls %s"):format(TINY, text, option))
      assert.are.same({ ("kelvin: policy: '%s' returns a number, kv.policy{...} is needed\n"):format(path), 1 }, { out, rc })
    end
    out, rc = run(("eval %s --text %s --context 64 --chunks 1"):format(TINY, text))
    assert.are.same({ "kelvin: eval: no arm to measure: --arm ARM or --policy FILE is needed\n", 1 }, { out, rc })
    os.remove(path)
    os.remove(text)
  end)

  it("tells the doctor's findings", function()
    local out, rc = run "doctor"
    assert.are.equal(0, rc)
    assert.matches("ok +library", out)
    assert.matches("ok +round trip", out)
  end)

  it("names its version and declarations", function()
    assert.matches("^kelvin [%d.]+ .* declarations " .. require("kelvin.ffi").hash:sub(1, 12), (run "--version"))
  end)
end)
