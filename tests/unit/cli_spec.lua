local H = require "helper"

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
    for _, command in ipairs { "run", "repl", "codecs", "models", "doctor", "report", "chat", "bench", "eval" } do
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
