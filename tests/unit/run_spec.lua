-- `kelvin run`: rows on disk as points end, Ctrl-C and --resume, the report's files; and the small modules under it.
local H = require "helper"
local json = require "kelvin.json"
local results = require "kelvin.results"

-- Elements of a page as a stack: every tag closed in order, attributes quoted.  Void elements are HTML's.
local void = { meta = true, br = true, hr = true, input = true, img = true, link = true, col = true, wbr = true }
local function well_formed(text)
  text = text:gsub("<!%-%-.-%-%->", ""):gsub("<!DOCTYPE[^>]*>", ""):gsub("<!doctype[^>]*>", ""):gsub("<%?xml.-%?>", "")
  text = text:gsub("(<script[^>]*>).-(</script>)", "%1%2"):gsub("(<style[^>]*>).-(</style>)", "%1%2")
  local stack = {}
  for close, name, rest in text:gmatch "<(/?)([%a][%w:-]*)([^<>]*)>" do
    if close == "/" then
      if stack[#stack] ~= name then return nil, ("</%s> closes <%s>"):format(name, stack[#stack] or "nothing") end
      stack[#stack] = nil
    elseif not void[name] and not rest:match "/%s*$" then stack[#stack + 1] = name end
    local left = rest:gsub("%s+[%w:_-]+=\"[^\"]*\"", ""):gsub("%s+[%w:_-]+", ""):gsub("[%s/]", "")
    if left ~= "" then return nil, ("<%s>: attributes hold '%s'"):format(name, left) end
  end
  if #stack > 0 then return nil, ("<%s> is not closed"):format(stack[#stack]) end
  local bare = text:gsub("<[/%a][^<>]*>", "")
  if bare:find "[<>]" then return nil, "a bare < or >: " .. bare:match "[^\n]*[<>][^\n]*" end
  if bare:gsub("&#?%w+;", ""):find "&" then return nil, "a bare &" end
  return true
end

local experiment = [[
local kv = require "kelvin"
return kv.experiment { name = "tiny", context = 32, chunks = 2, sink = 1, calibrate = { context = 32, chunks = 1 },
  arms = { { name = "a<b>&\"q\"", arm = "q4_0", family = "<f>" }, "q8_0", "turboquant-3" }, measure = { "kld", "bytes_per_token" },
  report = { kv.plot { x = "bits_allin", y = "kld.mean", series = "family" }, kv.table { rows = "family", cell = "kld.mean" } } }
]]

describe("kelvin run", function()
  local folder, script, text
  setup(function()
    folder = H.temporary()
    os.remove(folder)
    os.execute("mkdir '" .. folder .. "'")
    script, text = folder .. "/tiny.lua", folder .. "/text.txt"
    results.write(script, experiment)
    results.write(text, ("The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs.\n"):rep(20))
  end)
  teardown(function()
    os.execute("rm -rf '" .. folder .. "'")
    H.cleanup()
  end)

  local function numbers(out)
    local rows = assert(results.rows(folder .. "/" .. out .. "/tiny/latest/rows.jsonl"))
    local by = {}
    for _, r in ipairs(rows) do by[r.arm] = json.encode { r.kld, r.bits_allin, r.ppl, r.bytes_per_token, r.manifest.id, r.status } end
    return by, rows
  end

  it("keeps its rows on Ctrl-C, and --resume ends with what a whole run gives", function()
    if not H.model "smollm2-135m" then return end
    local out, rc = H.run(("run '%s' --text '%s' --out '%s/whole'"):format(script, text, folder))
    assert.are.equal(0, rc, out)
    local whole, rows = numbers "whole"
    assert.are.equal(3, #rows)
    assert.are.equal(1, rows[1].manifest.policy and 1)

    local t = require("pty").open { H.program(), "run", script, "--text", text, "--out", folder .. "/cut" }
    t:expect('a<b>&"q"', 120)
    t:expect("KLD", 10)
    t:send "\3"
    t:expect("rows are kept in", 60)
    assert.matches("%-%-resume", t:expect "\r\n")
    assert.are.equal(130, t:close())
    local cut = numbers "cut"
    assert.are.equal(whole['a<b>&"q"'], cut['a<b>&"q"'])
    assert.is_nil(cut["turboquant-3"])

    out, rc = H.run(("run '%s' --text '%s' --out '%s/cut' --resume"):format(script, text, folder))
    assert.are.equal(0, rc, out)
    assert.are.same(whole, (numbers "cut"))
    assert.are.equal(3, json.read(folder .. "/cut/tiny/latest/run.json").counts.resumed + json.read(folder .. "/cut/tiny/latest/run.json").counts.done)
  end)

  it("writes a report that is well formed and needs nothing from elsewhere", function()
    if not H.model "smollm2-135m" then return end
    local at = folder .. "/whole/tiny/latest/"
    for _, name in ipairs { "report.html", "plot.svg" } do
      local page = assert(results.read(at .. name))
      assert.is_true(well_formed(page))
      for _, foreign in ipairs { "src%s*=%s*[\"']?[^d]", "href%s*=%s*[\"']?[^#\"]", "url%(", "@import", "<link", "<iframe" } do
        assert.is_nil(page:lower():find(foreign), name .. ": " .. foreign)
      end
      assert.is_nil(page:gsub('xmlns[:%w]*="[^"]*"', ""):find "https?://[^%s]-[\"']", name)
    end
  end)

  it("lists its points without a model", function()
    local out, rc = H.run(("run '%s' --list --model /no/such.gguf"):format(script))
    assert.are.equal(0, rc)
    assert.are.equal('  1  a<b>&"q"\n  2  q8_0\n  3  turboquant-3\n', out)
  end)

  it("gives every experiment of the tree a smoke run that resolves", function()
    local E = require "kelvin.experiment"
    for name in io.popen(("ls '%s/experiments'"):format(H.root)):lines() do
      if name:match "^%d%d_.*%.lua$" then
        local e = E.resolve(E.load(H.root .. "/experiments/" .. name), { smoke = true })
        local model = type(e.arms) == "function" and { name = "m", n_layers = 2, n_kv_heads = 1, head_dim = 64, layer = function() return { sliding_window = 0 } end } or nil
        assert.is_true(#e:points(model) >= 2, name)
        assert.is_true(e.context <= 4 + 128, name)
      end
    end
  end)

  it("fits edges_then_sensitivity to its default budget, and says what fits otherwise", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local p = dofile(H.root .. "/experiments/policies/edges_then_sensitivity.lua")
    local calib = m:calibrate { text = results.read(text), context = 32, chunks = 1 }
    local plan = H.kv.policy.resolve(p, m, { calib = calib })
    assert.are.equal(m.n_layers, #plan.layers)
    assert.matches("1 bits per element cannot be met: the fewest here are [%d.]+ at context 2048", H.fails(H.kv.policy.resolve, p { budget = 1 }, m, { calib = calib }))
  end)
end)

describe("a text", function()
  local T = require "kelvin.text"
  it("is cut at line ends into parts that do not overlap", function()
    local all = ("line one\nline two\n"):rep(8)
    local a, b = T.part(all, 0, 0.25), T.part(all, 0.25, 1)
    assert.are.equal(all, a .. b)
    assert.are.equal("\n", a:sub(-1))
    assert.are.equal(all, T.part(all, 0, 1))
    assert.are.equal("", T.part("", 0, 1))
    assert.are.equal("one line", T.part("one line", 0, 0.25) .. T.part("one line", 0.25, 1))
  end)
  it("is known by its digests", function()
    local path = H.temporary ".txt"
    results.write(path, "a\nb\nc\nd\n")
    local t = T.load(path)
    assert.are.equal(H.kv.sha256 "a\nb\nc\nd\n", t.sha256)
    assert.are.equal(H.kv.sha256(t.score), t.score_sha256)
    assert.are.equal(t.calibrate .. t.score, "a\nb\nc\nd\n")
    assert.are.equal(path:match "[^/]+$", T.describe(t).name)
    assert.matches("is neither a file nor known; known: ", H.fails(T.load, "nosuch"))
    H.cleanup()
  end)
end)

describe("a manifest", function()
  local M = require "kelvin.manifest"
  it("quotes for the shell whatever a name holds", function()
    for _, s in ipairs { "plain", "it's", "$(echo no) `no` \\ \"", "a\nb", "-n", "" } do
      assert.are.equal(s, (M.capture("printf %s " .. M.quote(s))))
    end
  end)
  it("tells output, success and status of a command", function()
    assert.are.same({ "x", true, 0 }, { M.capture "echo x" })
    local out, ok, code = M.capture "echo y >&2; (exit 3)"
    assert.are.same({ "y", false, 3 }, { out, ok, code })
  end)
  it("has equal digests for equal content only", function()
    assert.are.equal(M.digest { a = 1, b = { 2, 3 } }, M.digest { b = { 2, 3 }, a = 1 })
    assert.are_not.equal(M.digest { a = 1 }, M.digest { a = 2 })
  end)
  it("folds equal neighbours of a plan", function()
    local x, y = { sink = 4 }, { sink = 0 }
    local digest, expansion = M.plan { page_tokens = 64, layers = { x, x, y, x } }
    assert.are.equal(64, #digest)
    local spans = {}
    for i, part in ipairs(expansion.layers) do spans[i] = part.from .. "-" .. part.to end
    assert.are.same({ "1-2", "3-3", "4-4" }, spans)
  end)
  it("names no commit outside a source tree", function() assert.are.same({ commit = "none" }, M.git "/") end)
  it("names the commit that an installed tree was made from", function()
    local folder = H.temporary()
    os.remove(folder)
    results.mkdir(folder)
    results.write(folder .. "/commit", "0123abcd dirty\n")
    assert.are.same({ commit = "0123abcd", dirty = true }, M.git(folder))
    results.write(folder .. "/commit", "0123abcd\n")
    assert.are.same({ commit = "0123abcd", dirty = false }, M.git(folder))
    os.remove(folder .. "/commit")
    os.remove(folder)
  end)
end)

describe("progress", function()
  local P = require "kelvin.progress"
  local function stream()
    local s = { text = "" }
    function s:write(...) self.text = self.text .. table.concat { ... } end
    function s.flush() end
    return s
  end
  local time = 0
  local function clock() return time end

  it("rewrites one line of a terminal, cut at its width between characters", function()
    local s = stream()
    time = 0
    local p = P.new { stream = s, tty = true, width = 24, now = clock }
    time = 10
    p:update(1, 4, "ééééééééé")
    assert.are.equal("\r\27[K 25 %  30 s left  ", s.text:sub(1, 22))
    assert.is_true(#s.text <= 4 + 23)
    assert.is_nil(s.text:find "[\194-\244]$")
    p:update(2, 4, "too soon")
    assert.is_nil(s.text:find "soon")
    p:say "a line that stays"
    assert.are.equal("\r\27[Ka line that stays\n", s.text:match "\r\27%[Ka.*")
  end)
  it("writes a line every ten seconds elsewhere", function()
    local s = stream()
    time = 0
    local p = P.new { stream = s, now = clock }
    for t = 1, 25 do
      time = t
      p:update(t, 100, "x")
    end
    assert.are.equal(" 10 %  1 min 30 s left  x\n 20 %  1 min 20 s left  x\n", s.text)
  end)
  it("tells durations in words", function()
    assert.are.same({ "3 s", "2 min 05 s", "2 h 01 min", "?" }, { P.duration(3.2), P.duration(125), P.duration(7260), P.duration(math.huge) })
  end)
end)

describe("shards of a run", function()
  local folder
  before_each(function()
    folder = H.temporary()
    os.remove(folder)
    results.mkdir(folder)
  end)
  after_each(function() os.execute("rm -rf '" .. folder .. "'") end)

  local function row(arm, status) return { arm = arm, status = status or "ok", bits_allin = 3, manifest = { id = arm } } end
  local function description(run) return { run_id = run.id, command = "kelvin run x.lua --shard 1/2", config = { points = { "a", "b", "c", "d" } }, counts = { skipped = 1 },
    plans = {}, skipped = { { point = "d", reason = "no room" } }, started = "2026-01-01T00:00:00Z", report = {} } end

  it("have files of their own in one folder, and become one run in the order of its points", function()
    local one = results.open(folder, "2026-01-01-00000000", false, { 1, 2 })
    local two = results.open(folder, "2026-01-01-00000000", false, { 2, 2 })
    one:save(description(one))
    two:save(description(two))
    one:append(row "c")
    two:append(row("b", "error"))
    one:append(row "a")
    one:close() two:close()
    results.merge(one.dir)
    local rows = assert(results.rows(one.dir .. "/rows.jsonl"))
    assert.are.same({ "a", "b", "c" }, { rows[1].arm, rows[2].arm, rows[3].arm })
    local run = json.read(one.dir .. "/run.json")
    assert.are.same({ done = 2, failed = 1, skipped = 1, missing = 0, resumed = 0 }, run.counts)
    assert.are.equal("kelvin run x.lua", run.command)
    assert.are.equal(2, #run.shards)

    -- A shard that goes on knows the rows of all, and a failed point is made again.
    local again = results.open(folder, "2026-01-02-00000000", true, { 2, 2 })
    assert.are.equal(one.dir, again.dir)
    assert.is_truthy(again:done "a")
    assert.is_nil(again:done "b")
    again:append(row "b")
    again:close()
    results.merge(one.dir)
    assert.are.same({ done = 3, failed = 0, skipped = 1, missing = 0, resumed = 0 }, json.read(one.dir .. "/run.json").counts)
    assert.are.equal(3, #results.rows(one.dir .. "/rows.jsonl"))
    assert.matches("- d: no room", require("kelvin.report").render(rows, run)[1][2], 1, true)
  end)
  it("of different runs are refused", function()
    local one = results.open(folder, "2026-01-01-00000000", false, { 1, 2 })
    one:save(description(one))
    local d = description(one)
    d.run_id = "2026-01-01-11111111"
    results.write(one.dir .. "/run.2-of-2.json", json.encode(d))
    one:close()
    assert.matches("it is of run 2026%-01%-01%-11111111", H.fails(results.merge, one.dir))
  end)
end)

describe("the ladder", function()
  local kv = require "kelvin"
  local model = { name = "m", n_layers = 2, n_kv_heads = 3, head_dim = 64, layer = function(_, l) return { sliding_window = l == 2 and 512 or 0 } end }

  it("counts what the cache's ledger counts", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    for _, case in ipairs { { "q4_0" }, { "kivi-2" }, { "turboquant-3" }, { "kivi-4", sink = 0, recent = 20 } } do
      local o = { sink = case.sink or 4, recent = case.recent or 0 }
      local s = m:session { arm = ("k=%s,v=%s,sink=%d,recent=%d"):format(case[1], case[1], o.sink, o.recent), max_tokens = 200 }
      local ids = {}
      for i = 1, 150 do ids[i] = 100 + i end
      s:feed(ids, { logits = "none" })
      o.context = 150
      local expected = kv.ladder.bits(m, { k = { case[1] }, v = { case[1] } }, o)
      local b = s:bytes()
      local real = 8 * (b.total - b.shared) / require("kelvin.eval").cached(m, 150)
      assert.is_true(math.abs(expected / real - 1) < 0.01, ("%s: %.4f expected, %.4f real"):format(case[1], expected, real))
    end
  end)
  it("takes the first setting near enough, then two different ones, and names what nothing reaches", function()
    local arms = kv.ladder { model = model, targets = { 3.25, 3.75, 9 }, context = 2052, sink = 4, methods = { { name = "tq", k = { { "turboquant-3" }, { "turboquant-4" } } } } }
    assert.are.equal(5, #arms)
    assert.are.equal("turboquant-3", arms[1].setting)
    assert.are.same({ "no", "yes" }, { arms[1].mean, arms[2].mean })
    assert.are.same({ "none", "both" }, { arms[1].arm.mean, arms[2].arm.mean })
    assert.are.equal("turboquant-4 / turboquant-3", arms[3].setting)
    assert.matches("no setting within 2 %%; nearest: 4%.%d+ bits", arms[5].skip)
  end)
  it("takes windows for what they hold", function()
    assert.are.equal((2052 + 512) * 3 * 64 * 2, require("kelvin.eval").cached(model, 2052))
    local all = kv.ladder.bits(model, { k = { "turboquant-3" }, v = { "turboquant-3" } }, { context = 2052, sink = 4 })
    assert.is_true(all > 3.25 and all < 3.36, tostring(all))
  end)
end)

describe("what results/all_codecs holds", function()
  for _, model in ipairs { "smollm2-135m", "gemma-3-270m" } do
    it("is within 2 % of its targets, scored on 16 000 positions, and means agree with their depths: " .. model, function()
      local rows = results.rows(H.root .. "/results/all_codecs/" .. model .. "/rows.jsonl")
      if not rows then return pending "results/all_codecs is not in this tree" end
      for _, r in ipairs(rows) do
        assert.are.equal("ok", r.status, r.arm)
        if r.target then assert.is_true(math.abs(r.bits_allin / r.target - 1) <= 0.0205, r.arm .. " " .. r.bits_allin) end
        assert.is_true(r.n_scored >= 16000, r.arm)
        local n, sum = 0, 0
        for _, d in ipairs(r.depth) do n, sum = n + d.n, sum + d.n * d.mean end
        assert.are.equal(r.n_scored, n, r.arm)
        assert.is_true(math.abs(r.kld.mean - sum / n) <= 1e-5 + 1e-4 * r.kld.mean, r.arm)
      end
    end)
  end
end)

describe("measurements", function()
  local M = require "kelvin.measure"
  it("add their fields and their columns", function()
    local row = { bytes = { total = 1000, shared = 200 } }
    M.run({ "kld", "bytes_per_token" }, { context = 100 }, row)
    assert.are.equal(8, row.bytes_per_token)
    assert.are.same({ "bytes_per_token", "decode_us.median" }, M.columns { "kld", "bytes_per_token", "decode_us" })
  end)
  it("are refused by name when unknown", function()
    assert.matches("measure 'speed' is none of bytes_per_token, decode_us, kld, ppl", H.fails(require "kelvin.experiment", { name = "x", arms = { "q4_0" }, measure = { "speed" } }))
  end)
end)
