-- The REPL on a terminal: keys in, screen out.
local H = require "helper"
local pty = require "pty"

local UP, LEFT, WORD_LEFT = "\27[A", "\27[D", "\27[1;5D"

describe("on a terminal the REPL", function()
  local home, t

  local function start()
    t = pty.open({ H.program() }, { env = { HOME = home, XDG_STATE_HOME = home .. "/state", TERM = "xterm", KV_LOG = "info" } })
    t:prompt "\r\n> "
  end
  -- Types a line; returns what the program wrote between its echo and the next prompt.
  local function enter(line, prompt)
    t:send(line .. "\r")
    local shown = t:prompt("\r\n" .. (prompt or "> ")):gsub("\r\n", "\n")
    return (shown:match "\n(.*)" or "")
  end

  before_each(function()
    home = H.temporary()
    os.remove(home)
    assert(os.execute("mkdir -p '" .. home .. "'") == 0)
    start()
  end)
  after_each(function()
    if t.fd then t:send "\4" end
    t:close(5)
    os.execute("rm -rf '" .. home .. "'")
    H.cleanup()
  end)

  it("greets in one line, prints what a line is worth, and leaves on Ctrl-D with status 0", function()
    assert.matches("^kelvin [%d.]+  cpu %w+, %d+ threads? %(cuda: [^:]", t.all)
    assert.are.equal("2", enter "1 + 1")
    assert.are.equal("", enter "x = 3")
    assert.are.equal("9", enter "x * x")
    t:send "\4"
    assert.are.equal(0, t:close())
  end)

  it("asks for the rest of a statement, and forgets it on Ctrl-C", function()
    enter("for i = 1, 2 do", ">> ")
    enter("print(i * 10)", ">> ")
    assert.are.equal("10\n20", enter "end")
    enter("for i = 1, 2 do", ">> ")
    t:send "print(\3"
    t:prompt "^C\r\n> "
    assert.are.equal("7", enter "7")
  end)

  it("goes on after every error", function()
    assert.are.equal("error: codec 'int': bits=9 is outside 1..8", enter "kv.codec('int', { bits = 9 })")
    assert.are.equal("error: 'nosuch' is not defined", enter "nosuch()")
    assert.matches("^error: ", enter "error({})")
    assert.matches("^error: ", enter "error()")
    assert.matches("^error: unexpected symbol", enter "1 +* 2")
    assert.matches("^error: .*stack overflow", enter "f = function() return 1 + f() end f()")
    assert.are.equal("1", enter "1")
  end)

  it("shows help by ?name", function() assert.matches("^kv.compare%(a, b%) %-> comparison\n", enter "?kv.compare") end)

  it("stops a long computation on Ctrl-C", function()
    enter "f = function(n) local s = 0 for i = 1, n do s = s + i % 3 end return s end"
    for _, line in ipairs { "while true do end", "while true do f(1000) end" } do
      t:send(line .. "\r")
      t:expect "\r\n"
      t:read(0.2)      -- the loops run by now
      t:send "\3"
      t:prompt "error: interrupted\r\n> "
    end
    assert.are.equal("9", enter "9")
  end)

  it("completes words, and lists them when there are several", function()
    t:send "kv.thr\t"
    assert.are.equal("2", enter "(2)")
    t:send "kv.co\t"
    local list = t:expect "kv.compare"
    assert.matches("kv.codec", list)
    t:send "\3"
    t:prompt "^C\r\n> "
    enter "longername = 5"
    t:send "longern\t"
    assert.are.equal("6", enter " + 1")
  end)

  it("edits lines, beyond ASCII too", function()
    assert.are.equal("21", enter("12" .. LEFT .. LEFT .. "\27[3~\27[C1"))
    assert.are.equal('"añb"', enter("'ab'" .. LEFT .. LEFT .. "ñ"))
    assert.are.equal("30", enter("10 + 10" .. WORD_LEFT .. "\11" .. "20"))
  end)

  it("keeps its history, across sessions", function()
    enter "a1 = 41"
    assert.are.equal("42", enter "a1 + 1")
    assert.are.equal("43", enter(UP .. " + 1"))
    t:send "\4"
    t:close()
    start()
    enter(UP .. UP .. UP)
    assert.are.equal("42", enter "a1 + 1")
  end)

  it("wraps lines by the terminal's new width after a resize", function()
    t:resize(30)
    local line = "#'" .. ("a"):rep(48) .. "'"
    assert.are.equal("48", enter(line):match "%d+$")
    t:send("#'" .. ("b"):rep(40))
    t:expect(("b"):rep(10))
    t:resize(100)
    t:read(0.3)
    assert.are.equal("40", enter("'"):match "%d+$")
  end)
end)
