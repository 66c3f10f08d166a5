-- Wrong input to the program: one line that names the thing, the value and what is allowed; exit status not 0; never a traceback.
local H = require "helper"

local folder
local function file(name, text)
  local f = assert(io.open(folder .. "/" .. name, "wb"))
  f:write(text)
  f:close()
end

-- args with @ for the folder of bad files; want: a plain part of the line.
local function refuses(args, want, lines)
  local out, rc = H.run((args:gsub("@", folder)))
  assert.is_truthy(out:find(want:gsub("@", folder), 1, true), ("%s: %q does not say %q"):format(args, out, want))
  assert.are_not.equal(0, rc)
  assert.is_nil(out:find "stack traceback")
  assert.is_nil(out:find "lua/kelvin/", args)
  if lines ~= "any" then assert.matches("^kelvin: [^\n]*\n$", out) end
end

local function u64(n) return string.char(n % 256, math.floor(n / 256) % 256, 0, 0, 0, 0, 0, 0) end

describe("wrong input", function()
  setup(function()
    folder = H.temporary()
    os.remove(folder)
    os.execute("mkdir '" .. folder .. "'")
    file("empty.txt", "")
    file("short.txt", ("one two three four five six seven eight nine ten\n"):rep(30))
    file("notlua.lua", "this is [[ not Lua")
    file("number.lua", "return 5")
    file("words.gguf", "These are words, not a model file.")
    file("tiny.gguf", "GGUF\3\0\0\0")
    file("version.gguf", "GGUF\9\0\0\0" .. u64(0) .. u64(0))
    file("tensors.gguf", "GGUF\3\0\0\0" .. ("\255"):rep(7) .. "\127" .. u64(0))
    file("keys.gguf", "GGUF\3\0\0\0" .. u64(0) .. u64(60000))
    file("string.gguf", "GGUF\3\0\0\0" .. u64(0) .. u64(1) .. ("\255"):rep(8))
    file("type.gguf", "GGUF\3\0\0\0" .. u64(0) .. u64(1) .. u64(1) .. "k\99\0\0\0" .. u64(0))
    file("nothing.gguf", "GGUF\3\0\0\0" .. u64(0) .. u64(0))
  end)
  teardown(function()
    os.execute("rm -rf '" .. folder .. "'")
    H.cleanup()
  end)

  it("as a model file is refused by name", function()
    refuses("models @/words.gguf", "gguf '@/words.gguf': the file does not begin with 'GGUF'")
    refuses("models @/tiny.gguf", "gguf '@/tiny.gguf': tensor count at byte 8 needs 8 bytes, the file has 0 left")
    refuses("models @/version.gguf", "version 9 is outside 2..3")
    refuses("models @/tensors.gguf", "tensors; the")
    refuses("models @/keys.gguf", "60000")
    refuses("models @/string.gguf", "gguf '@/string.gguf'")
    refuses("models @/type.gguf", "type 99")
    refuses("models @/nothing.gguf", "general.architecture")
    refuses("models @/empty.txt", "gguf '@/empty.txt': 0 bytes")
    refuses("models @", "not a regular file")
    refuses("models @/nosuch.gguf", "no such file")
    refuses("models nosuch", "model 'nosuch' is unknown; known: ")
    refuses("models one two", "'two' after 'one'")
  end)

  it("as an option is refused with what is allowed", function()
    refuses("eval m --text t --arm q4_0 --score some", "--score=some is none of second-half, all")
    refuses("eval m --text t --arm q4_0 --mode both", "--mode=both is none of visibility, stream")
    refuses("eval m --text t --arm q4_0 --seed -1", "--seed=-1 is not a whole number from 0")
    refuses("eval m --text t --arm q4_0 --seed 1e30", "--seed=1e30 is outside 0..4294967295")
    refuses("eval m --text t --arm q4_0 --sink 1e12", "--sink=1e12 is outside 0..2147483647")
    refuses("chat --temperature nan", "--temperature=nan is not a number from 0")
    refuses("chat --policy p.lua --arm q4_0", "--policy p.lua and --arm q4_0: one of them")
    refuses("chat --raw --system hi", "--system needs the chat template")
    refuses("bench speed", "bench=speed is none of decode, codecs, eval")
    refuses("bench codecs --arm nosuch", "codec 'nosuch' is unknown")
    refuses("bench codecs --arm q4_0 --dim 7", "head_dim=7")
  end)

  it("as an arm is refused before the model's work begins", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    local eval = "eval smollm2-135m --text @/short.txt --context 64 --arm "
    refuses(eval .. "int:bits=9", "codec 'int': bits=9 is outside 1..8")
    refuses(eval .. "int:bitz=3", "unknown parameter 'bitz'; allowed: ")
    refuses(eval .. "k=int", "no codec for v")
    refuses(eval .. "q4_0,mean=maybe", "mean=maybe is none of both, k, v, bias, none")
    refuses(eval .. "q4_0,mean=bias", "model 'smollm2-135m' has no key bias")
    refuses(eval .. "q4_0,mean=both --calib @/short.txt", "is the text that is scored")
    refuses(eval .. "q4_0,mean=both --calib @/empty.txt", "has 0 tokens")
    refuses(eval .. "q4_0 --page-tokens 99999", "page_tokens=99999 is outside 1..1024")
  end)

  it("as a text or an output file is refused by name", function()
    local m = H.model "smollm2-135m"
    if not m then return end
    refuses("eval smollm2-135m --arm q4_0 --text @/empty.txt", "text 'empty.txt' has 0 tokens")
    refuses("eval smollm2-135m --arm q4_0 --text @/short.txt --context 100000", "one chunk of context=100000 needs as many")
    refuses("eval smollm2-135m --arm q4_0 --text @/short.txt --context 4", "context=4 is not a whole number from 8")
    refuses("eval smollm2-135m --arm q4_0 --text @/nosuch.txt", "--text: @/nosuch.txt: No such file")
    refuses("eval smollm2-135m --arm q4_0 --text @", "--text: '@' cannot be read")
    refuses("eval smollm2-135m --arm q4_0 --text @/short.txt --rows @/no/rows.jsonl", "--rows: @/no/rows.jsonl: No such file")
    refuses("eval smollm2-135m --arm q4_0 --text @/short.txt --rows @", "--rows: @: Is a directory")
    refuses("eval smollm2-135m --arm q4_0 --text @/short.txt --context 32 --chunks 1 --no-controls --rows /dev/full", "--rows: /dev/full: No space left on device", "any")
  end)

  it("as a policy or an experiment is refused by name", function()
    refuses("run @/nosuch.lua", "@/nosuch.lua")
    refuses("run @", "@")
    refuses("run @/notlua.lua", "@/notlua.lua:1:")
    refuses("run @/number.lua", "it returns a number, kv.experiment{…} is needed")
    local run = "run '" .. H.root .. "/experiments/02_bits_sweep.lua' "
    refuses(run .. "--set foo", "--set foo: KEY=VALUE is needed")
    refuses(run .. "--set foo=1", "--set foo: it is none of ")
    refuses(run .. "--set context=-5", "context=-5 is not a whole number from 8")
    refuses(run .. "--set chunks=0", "chunks=0 is not a whole number from 1")
    refuses(run .. "--set score=third", "score='third' is none of second-half, all")
    refuses(run .. "--set k_bits=7", "the grid has no such value")
    refuses(run .. "--device cuda", "experiments run on cpu")
    refuses(run .. "--model nosuch", "model 'nosuch' is unknown")
    refuses("report @", "@/rows.jsonl: No such file")
    if not H.model "smollm2-135m" then return end
    refuses(run .. "--text @/nosuch.txt", "@/nosuch.txt: No such file")
    refuses(run .. "--text @/empty.txt", "text '@/empty.txt' is empty")
    refuses(run .. "--text @/short.txt", "the scored part of 'short.txt' has")
    refuses("chat --prompt hi --policy @/number.lua", "returns a number, kv.policy{...} is needed")
    refuses("chat --prompt hi --context 4", "do not fit --context 4", "any")
  end)

  it("is told from a full disk: what stdout lost is not success", function()
    local exe = H.program()
    local p = io.popen(("{ '%s' codecs > /dev/full; echo \"rc=$?\"; } 2>&1"):format(exe))
    local out = p:read "*a"
    p:close()
    assert.are.equal("kelvin: stdout: No space left on device\nrc=1\n", out)
  end)
end)
