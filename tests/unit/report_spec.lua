-- Tables, plots and reports are pure functions of rows; these need the library only to read JSON.
local svg = require "kelvin.svg"
local tables = require "kelvin.table"
local json = require "kelvin.json"
local report = require "kelvin.report"
local results = require "kelvin.results"

local function row(arm, bits, kld, more)
  local r = { arm = arm, family = "f", bits_nominal = 4, bits_payload = bits, bits_allin = bits, kld = { mean = kld, se = kld / 10, ci_lo = kld * 0.8, ci_hi = kld * 1.2,
    median = kld / 2, p90 = kld * 2, p99 = kld * 5, p999 = kld * 9, max = kld * 10 }, same_top1 = 0.9, ppl = 20, ppl_ratio = 1.01, compressed_pair_fraction = 0.97,
    status = "ok", ranked = true, manifest = { id = arm } }
  for k, v in pairs(more or {}) do r[k] = v end
  return r
end

describe("json", function()
  it("writes equal data as equal bytes, with sorted keys", function()
    assert.equal('{"a":[1,2],"b":{"x":0.10000000000000001},"c":"\\n\\"é"}', json.encode { c = "\n\"é", b = { x = 0.1 }, a = { 1, 2 } })
    assert.equal('["nan","inf","-inf",0,9007199254740992]', json.encode { 0 / 0, math.huge, -math.huge, -0.0, 2 ^ 53 })
    assert.equal("[]", json.encode(json.array {}))
  end)
  it("reads back what it wrote", function()
    local text = json.encode { a = { 1.5, "x", true, json.null }, e = json.array {} }
    assert.equal(text, json.encode(assert(json.decode(text))))
  end)
  it("names what does not parse", function()
    local v, message = json.decode("{", "rows.jsonl:3")
    assert.is_nil(v)
    assert.truthy(message:find("rows.jsonl:3", 1, true))
  end)
end)

describe("tables", function()
  it("sort by all-in bits, not by the order of the file", function()
    local s = tables.split { row("b", 5, 0.1), row("a", 3, 0.2), row("w", 4, 0.3, { status = "VACUOUS" }), row("x", 1, 1, { status = "error" }) }
    assert.same({ "a", "b" }, { s.ranked[1].arm, s.ranked[2].arm })
    assert.equal("w", s.vacuous[1].arm)
    assert.equal("x", s.failed[1].arm)
  end)
  it("say when several rows would fill a cell", function()
    local rows = { row("a", 3, 0.2, { point = { codec = "int", bits = 2 } }), row("b", 5, 0.1, { point = { codec = "int", bits = 2 } }), row("c", 5, 0.1, { point = { codec = "tq", bits = 2 } }) }
    local md = tables.pivot(rows, { rows = "codec", cols = "bits", cell = "kld.mean" })
    assert.truthy(md:find("2 rows", 1, true))
    assert.truthy(md:find("0.100", 1, true))
  end)
  it("write three significant digits", function()
    assert.equal("0.0123", tables.format(0.01234))
    assert.equal("1.23e-5", tables.format(1.234e-5))
    assert.equal("nan", tables.format "nan")
    assert.equal("0.0123 ± 0.0004", tables.with_error(0.0123, 0.0004))
  end)
end)

describe("plots", function()
  local spec = { title = "<&\"\1\255", x = { label = "x", log = true }, y = { label = "y", log = true }, front = true,
    series = { { name = "a", points = { { x = 2, y = 0.1, label = "p" }, { x = 4, y = 0.01, lo = 0, hi = 0.02, label = "q" }, { x = 4, y = 0, label = "zero" } } } } }
  it("are the same bytes each time", function() assert.equal(svg.plot(spec), svg.plot(spec)) end)
  it("escape markup and broken UTF-8", function()
    local text = svg.plot(spec)
    assert.truthy(text:find("&lt;&amp;&quot;??", 1, true))
    assert.is_nil(text:find("[%z\1-\8\255]"))
  end)
  it("say what a logarithmic axis cannot show", function() assert.truthy(svg.plot(spec):find("not drawn (zero or not finite): zero", 1, true)) end)
  it("draw nothing without failing", function() assert.truthy(svg.plot { x = {}, y = { log = true }, series = {} }:find "</svg>") end)
  it("find the Pareto front", function()
    local f = svg.front { { x = 3, y = 3 }, { x = 1, y = 5 }, { x = 2, y = 6 }, { x = 4, y = 1 } }
    assert.same({ 1, 3, 4 }, { f[1].x, f[2].x, f[3].x })
  end)
end)

describe("a run's folder", function()
  it("remakes its report byte for byte, and resumes after a cut line", function()
    local dir = os.tmpname()
    os.remove(dir)
    local run = results.open(dir, results.run_id({ x = 1 }, "2026-01-31"), false)
    run:append(row("a|<b>", 3, 0.2))
    run:append(row("c", 5, 0.1))
    run:save { run_id = run.id, title = "T", report = json.array {}, config = { sink = 4 } }
    run:close()
    report.make(run.dir)
    local before = {}
    for _, name in ipairs { "table.md", "plot.svg", "report.html" } do before[name] = assert(results.read(run.dir .. "/" .. name)) end
    report.make(run.dir)
    for name, text in pairs(before) do assert.equal(text, results.read(run.dir .. "/" .. name)) end

    local f = io.open(run.dir .. "/rows.jsonl", "ab")
    f:write '{"arm":"cut'
    f:close()
    local again = results.open(dir, results.run_id({ x = 1 }, "2026-02-01"), true)
    assert.equal(run.id, again.id)
    assert.truthy(again:done "c")
    again:append(row("d", 6, 0.05))
    again:close()
    assert.equal(3, #results.rows(run.dir .. "/rows.jsonl"))

    for _, line in ipairs { "5", '"x"', "null", '{"manifest":7}' } do
      results.write(run.dir .. "/rows.jsonl", line .. '\n{"arm":"a"}\n')
      local rows, why = results.rows(run.dir .. "/rows.jsonl")
      assert.is_nil(rows)
      assert.matches("rows.jsonl:1: a row is a JSON object$", why)
    end
    os.execute("rm -rf '" .. dir .. "'")
  end)
end)

describe("an experiment", function()
  local experiment = require "kelvin.experiment"
  it("expands its grid in a fixed order and keeps why points are skipped", function()
    local e = experiment { name = "g", grid = { codec = { "int", "tq" }, bits = { 2, 3 } }, policy = function() end, skip = function(p) if p.bits == 3 and p.codec == "tq" then return "no" end end }
    local names = {}
    for i, p in ipairs(e:points()) do names[i] = p.name .. (p.skip or "") end
    assert.same({ "bits=2 codec=int", "bits=2 codec=tq", "bits=3 codec=int", "bits=3 codec=tqno" }, names)
    assert.equal(2, #experiment.resolve(e, { set = { "codec=int" } }):points())
  end)
  it("names a wrong key", function()
    assert.has_error(function() experiment { name = "x", arm = {} } end)
    local ok, message = pcall(experiment, { name = "x", arms = {}, sinks = 4 })
    assert.is_false(ok)
    assert.truthy(message:find("unknown key 'sinks'", 1, true))
  end)
end)
