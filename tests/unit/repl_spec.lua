local H = require "helper"
local repl = require "kelvin.repl"

local function session(...)
  local out = {}
  local r = repl.new(function(s) out[#out + 1] = s end)
  local more
  for _, line in ipairs { ... } do more = r:line(line) end
  return table.concat(out), more, r
end

describe("the REPL", function()
  it("prints what a line is worth and keeps it in _", function()
    assert.are.equal("3\n6\n", (session("1 + 2", "_ * 2")))
    assert.are.equal('"a"\n1\n', (session "'a', 1"))
    assert.are.equal("", (session "x = 3"))
    assert.are.equal("", (session "nil"))
  end)

  it("goes on to the next line only when a statement is not complete", function()
    local out, more = session "for i = 1, 2 do"
    assert.is_true(more)
    assert.are.equal("", out)
    assert.are.equal("1\n2\n", (session("for i = 1, 2 do", "  print(i)", "end")))
    out, more = session "1 +* 2"
    assert.is_false(more)
    assert.matches("^error: unexpected symbol", out)
  end)

  it("survives every error and goes on", function()
    local out = session("error 'no'", "error { 1 }", "c = kv.codec('int', { bits = 9 })", "nosuch()", "1")
    assert.are.equal("error: no\nerror: { 1 }\nerror: codec 'int': bits=9 is outside 1..8\nerror: 'nosuch' is not defined\n1\n", out)
  end)

  it("names what a mistyped global may have been", function()
    assert.are.equal("error: 'lenght' is not defined; near: length\n", (session("length = 3", "lenght + 1")))
  end)

  it("keeps its globals to itself", function()
    session "leaked_name = 1"
    assert.is_nil(rawget(_G, "leaked_name"))
  end)

  it("forgets a half-typed statement on cancel", function()
    local _, more, r = session "for i = 1, 2 do"
    assert.is_true(more)
    r:cancel()
    assert.is_false(r:line "y = 2")
  end)

  it("shows tables in order, and objects by their own words", function()
    assert.are.equal("{ 1, 2, a = { b = 3 }, [true] = \"x\" }", repl.show { 1, 2, a = { b = 3 }, [true] = "x" })
    local t = {}
    t.self = t
    assert.are.equal("{ self = {…} }", repl.show(t))
    assert.matches("^tensor f32 %[2 rows, 3 dim%]", repl.show(H.kv.tensor.zeros { 2, 3 }))
  end)

  it("helps by ?name and lists by ?", function()
    assert.matches("^kv.compare%(a, b%) %-> comparison\n", (session "?kv.compare"))
    assert.matches("^kv.compare%(a, b%)", (session "? compare"))
    assert.matches("^no help for 'compar'; near", (session "?compar"))
    assert.matches("\n  kv.codec +", (session "?"))
  end)

  it("tells who is defined", function()
    assert.are.equal("  a            1\n", (session("a = 1", "who()")))
  end)

  it("offers completion words", function()
    local _, _, r = session("c = kv.codec 'q4_0'")
    local words = "\n" .. r:words() .. "\n"
    for _, w in ipairs { "kv.codec", "kv.policy.uniform", "turboquant-4", "c", "c.name", "c:encode", "while" } do
      assert.is_truthy(words:find("\n" .. w .. "\n", 1, true), w)
    end
  end)

  it("reads piped input without editing", function()
    local out, rc = H.run("repl", "x = 20\nx + 1\nnosuch\n2 * x\n")
    assert.are.equal("21\nerror: 'nosuch' is not defined\n40\n", out)
    assert.are.equal(0, rc)
    H.cleanup()
  end)
end)

describe("help", function()
  local help = require "kelvin.help"

  it("documents what the module offers", function()
    for _, name in ipairs { "kv.codec", "kv.codecs", "kv.compare", "kv.tensor", "kv.policy", "kv.policy.uniform", "kv.policy.resolve", "kv.fit_budget", "kv.model", "kv.eval",
      "model:session", "model:batch", "session:feed", "model:calibrate", "kv.codec.parse_arm", "kv.bench" } do
      assert.is_string(help.text(name), name)
    end
  end)

  it("takes its margin off", function()
    help.doc("spec.sample", "\n    sample(x)\n      One.\n    Two.\n")
    assert.are.equal("sample(x)\n  One.\nTwo.", help.text "spec.sample")
    help.topics["spec.sample"] = nil
  end)
end)
