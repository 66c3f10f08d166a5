--- kelvin.cli: the program's commands.  A wrong command or option is one line and exit status 2; anything else that goes
-- wrong is one line and 1, with a traceback only under --log debug.

local log = require "kelvin.log"

local M = {}

local DEFAULT_MODEL = "smollm2-135m"

-- ---- the options --------------------------------------------------------------------------------------------------------

local MAX_COUNT, MAX_SEED = 2 ^ 31 - 1, 2 ^ 32 - 1

local function whole(name, min, max)
  return function(text)
    local n = tonumber(text)
    if not n or n % 1 ~= 0 or n < min then return nil, ("%s=%s is not a whole number from %d"):format(name, text, min) end
    if n > max then return nil, ("%s=%s is outside %d..%.0f"):format(name, text, min, max) end
    return n
  end
end
local function positive(name) return whole(name, 1, MAX_COUNT) end
local function from_zero(name) return whole(name, 0, MAX_COUNT) end
local function seed() return whole("--seed", 0, MAX_SEED) end

local function one_of(name, ...)
  local list = { ... }
  return function(text)
    for _, word in ipairs(list) do if word == text then return word end end
    return nil, ("%s=%s is none of %s"):format(name, text, table.concat(list, ", "))
  end
end

local function real(name)
  return function(text)
    local n = tonumber(text)
    if not n or not (n >= 0 and n < math.huge) then return nil, ("%s=%s is not a number from 0"):format(name, text) end
    return n
  end
end

local function shard(text)
  local i, n = text:match "^(%d+)/(%d+)$"
  i, n = tonumber(i), tonumber(n)
  if not i or i < 1 or i > n or n > 10000 then return nil, ("--shard=%s is not I/N with I in 1..N"):format(text) end
  return { i, n }
end

local function parser()
  local argparse = require "argparse"
  local p = argparse("kelvin", "An absolute scale for KV-cache compression.", "Without a command: the REPL.  `kelvin COMMAND --help` shows a command's options and an example.")
  p:require_command(false):command_target "command":help_max_width(110)
  p:option("--threads", "Threads for the core (default: all that this process may use)."):convert(positive "--threads"):argname "N"
  p:option("--device", "Where models run: cpu (default), cuda, cuda:N.  Sessions, generation, evaluations and decode benches; calibration stays on the cpu."):argname "NAME"
  p:option("--log", "error, warn, info or debug (KV_LOG sets the default)."):convert(one_of("--log", "error", "warn", "info", "debug")):argname "LEVEL"
  p:flag("--version", "Print version, compiler and declarations' hash."):target "version"

  local run = p:command("run", "Run an experiment script; tables and plots go to results/.", "Example: kelvin run experiments/01_pareto.lua --smoke")
  run:argument("file", "A Lua file that returns kv.experiment{...}."):argname "FILE"
  run:flag("--smoke", "The small version: seconds, to see that it works.")
  run:flag("--resume", "Skip points whose rows are there already.")
  run:flag("--list", "Print the points and stop.")
  run:option("--set", "Override a field of the experiment: --set seed=2."):argname "KEY=VALUE":count "*"
  run:option("--out", "Folder for the results."):argname "DIR"
  run:option("--model", "Model instead of the experiment's."):argname "MODEL"
  run:option("--text", "Text file instead of the experiment's data."):argname "FILE"
  run:option("--calib", "Text to calibrate on; all of the other text is scored then."):argname "FILE"
  run:option("--shard", "Every N-th point from the I-th only, so that N processes or machines share a run; kelvin report joins their rows."):convert(shard):argname "I/N"

  local script = p:command("lua", "Run a plain Lua script with `require \"kelvin\"` in reach.", "Example: kelvin lua sweep.lua first second")
  script:argument("file", "The script; its arguments are in `arg` and `...`.")
  script:argument("args", "Arguments."):args "*"
  p:command("repl", "The interactive session (also plain `kelvin`).", "Example: echo 'kv.codec \"q4_0\"' | kelvin repl")

  local codecs = p:command("codecs", "List codec families and presets, or describe one: parameters, bytes of a page, what it can, source.",
    "Examples: kelvin codecs; kelvin codecs turboquant-4 --dim 128")
  codecs:argument("name", "A family or preset."):args "?":argname "NAME"
  codecs:option("--dim", "head_dim that bytes are told at (default 64)."):convert(positive "--dim"):argname "N"
  codecs:option("--page-tokens", "Tokens of a page (default 64)."):convert(positive "--page-tokens"):argname "N"

  local policies = p:command("policies", "List policies and layer presets, describe one, or show the plan that one makes for a model.",
    "Examples: kelvin policies; kelvin policies mistral-7b; kelvin policies mixedkv:early=8,sink=4 --model smollm2-135m")
  policies:argument("name", "A policy or preset; with --model: a policy with parameters, a FILE.lua, or any arm."):args "?":argname "NAME"
  policies:option("--model", "A model's name or a .gguf file; without NAME: the preset that fits it."):argname "MODEL"
  policies:option("--calib", "Text that policies judge or calibrate by."):argname "FILE"
  policies:option("--artifact", "Calibration of `kelvin calibrate` instead."):argname "FILE"
  policies:option("--context", "Tokens that budgets are met at."):convert(positive "--context"):default "2048":argname "N"

  local models = p:command("models", "List models, describe one, or fetch one.", "Examples: kelvin models; kelvin models smollm2-135m; kelvin models get smollm2-135m")
  models:argument("what", "A model to describe; or `get` and its name."):args "?":argname "NAME | get"
  models:argument("name", "The model to get."):args "?":argname "NAME"
  models:flag("--tensors", "List the file's tensors too.")
  models:flag("--meta", "List the file's metadata too.")

  local cache = p:command("cache", "Keep a prompt's cache in a file; see and check such files (any that kv.save wrote).",
    "Examples: kelvin cache make prompt.kv --text prompt.txt --arm turboquant-4; kelvin cache info prompt.kv; kelvin cache verify prompt.kv; "
    .. "kelvin cache tables t.kv --artifact smollm2.kvcal --offload kvtc-16x; kelvin cache make prompt.kv --text prompt.txt --tables t.kv")
  cache:argument("what", "make, info, verify, or tables (KVTC's, that serve many caches)."):choices { "make", "info", "verify", "tables" }
  cache:argument("file", "The file."):argname "FILE"
  cache:option("--text", "make: the text whose cache it is."):argname "TEXT"
  cache:option("--model", "make: a model's name or a .gguf file."):default(DEFAULT_MODEL):argname "MODEL"
  cache:option("--arm", "make: cache setting (default: exact f32)."):argname "ARM"
  cache:option("--stage", "make: raw, zlib, lzma, rans or smallest."):choices { "raw", "zlib", "lzma", "rans", "smallest" }:default "raw"
  cache:option("--level", "make: of zlib (1-9) or lzma (0-9)."):convert(from_zero "--level"):argname "N"
  cache:option("--context", "make: tokens the cache can hold."):convert(positive "--context"):default "4096":argname "N"
  cache:option("--offload", "make, tables: KVTC over layers and heads: kvtc-16x, kvtc-k4v2, ... (make: the tables lie in the file)."):argname "NAME"
  cache:option("--artifact", "make, tables: calibration of `kelvin calibrate` that --offload is made from."):argname "FILE"
  cache:option("--tables", "make: KVTC tables in a file of their own, which the cache then names."):argname "FILE"
  cache:option("--sink", "make: tokens at the beginning that KVTC leaves exact."):convert(from_zero "--sink"):default "4":argname "N"
  cache:option("--window", "make: tokens at the end that KVTC leaves exact."):convert(from_zero "--window"):default "128":argname "N"

  p:command("doctor", "What is here, what is missing, and how to get it.", "Example: kelvin doctor")

  local report = p:command("report", "Make a run's tables, plots and report again from its rows.", "Example: kelvin report results/scratch/01_pareto/latest")
  report:argument("dir", "A run's folder, with rows.jsonl."):argname "DIR"

  local index = p:command("index", "Nearest vectors on codes: build an index, search it, describe it.",
    "Examples: kelvin index build words.kv --vectors words.npy --codec turboquant-4 --metric cosine; kelvin index search words.kv --queries more.npy")
  index:argument("what", "build, search or info."):choices { "build", "search", "info" }
  index:argument("file", "The index."):argname "FILE"
  index:option("--vectors", "build: .fvecs, .npy, or text with a vector a line."):argname "FILE"
  index:option("--codec", "build: a codec for keys."):default "turboquant-4":argname "CODEC"
  index:option("--metric", "build: ip, l2 or cosine."):choices { "ip", "l2", "cosine" }:default "ip"
  index:option("--keep", "build: originals for re-ranking: none, f16 or f32."):choices { "none", "f16", "f32" }:default "none"
  index:option("--page", "build: vectors of a page."):convert(positive "--page"):default "256":argname "N"
  index:option("--stage", "build: raw, zlib, lzma, rans or smallest."):choices { "raw", "zlib", "lzma", "rans", "smallest" }:default "raw"
  index:flag("--no-mean", "build: code the vectors as they are, not less their mean.")
  index:option("--queries", "search: vectors to look for; a line each is printed: its number, then number and score of what is near."):argname "FILE"
  index:option("-k", "search: neighbours."):convert(positive "-k"):default "10":argname "N"
  index:option("--rerank", "search: candidates for each neighbour, ordered by the originals."):convert(from_zero "--rerank"):default "0":argname "N"

  local chat = p:command("chat", "Generate text over a cache of your choice, with speed and bytes per token.",
    "Example: kelvin chat --arm k=turboquant-4,v=turboquant-3 --prompt 'Why is the sky blue?'")
  chat:argument("model", "A model's name or a .gguf file (default: " .. DEFAULT_MODEL .. ")."):args "?":argname "MODEL"
  chat:option("--arm", "Cache setting, such as q8_0 or k=turboquant-4,v=turboquant-3,sink=4 (default: exact f16)."):argname "ARM"
  chat:option("--policy", "A Lua file that returns kv.policy{...}."):argname "FILE"
  chat:option("--prompt", "One prompt; without it, lines of the terminal or all of piped stdin."):argname "TEXT"
  chat:option("--system", "System message."):argname "TEXT"
  chat:flag("--raw", "No chat template: continue the text.")
  chat:option("--max-tokens", "Tokens to generate at most."):convert(positive "--max-tokens"):default "256":argname "N"
  chat:option("--context", "Tokens the cache can hold."):convert(positive "--context"):default "4096":argname "N"
  chat:option("--temperature", "0 is greedy."):convert(real "--temperature"):default "0":argname "T"
  chat:option("--top-k", "Sample among the k likeliest (0: all)."):convert(from_zero "--top-k"):default "0":argname "K"
  chat:option("--top-p", "Sample among the likeliest that make up this share."):convert(real "--top-p"):default "1":argname "P"
  chat:option("--seed", "Of the sampler, and of rotations."):convert(seed()):default "1":argname "N"
  chat:option("--calib", "Text for calibrated means and codecs."):argname "FILE"
  chat:option("--artifact", "Calibration of `kelvin calibrate` instead."):argname "FILE"

  local bench = p:command("bench", "Measure speed: decode, codecs, eval, gpu or generate.",
    "Examples: kelvin bench decode --depth 0,4096 --arm f16 --arm turboquant-4; kelvin bench gpu --shape 8x32768x128x8x4 --bits 4,3,2")
  bench:argument("what", "decode, codecs, eval, gpu (a device's kernels as shares of its memory's speed) or generate (whole models on a device); these two on --device, cuda without it."):convert(
    one_of("bench", "decode", "codecs", "eval", "gpu", "generate"))
  bench:argument("model", "A model's name or a .gguf file (default: " .. DEFAULT_MODEL .. "); for generate also shape:llama-3-8b, of random weights."):args "?":argname "MODEL"
  bench:option("--depth", "Depths of the cache, for decode and generate."):default "0,4096":argname "N,N"
  bench:option("--arm", "Cache setting; again for more (decode: f16, q8_0, turboquant-4; gpu: codecs to encode and decode)."):count "*":argname "ARM"
  bench:option("--repeats", "Interleaved repeats; medians are shown (5; gpu 21)."):convert(positive "--repeats"):argname "N"
  bench:option("--tokens", "Tokens a repeat."):convert(positive "--tokens"):default "16":argname "N"
  bench:option("--artifact", "Calibration of `kelvin calibrate`, for calibrated codecs in decode."):argname "FILE"
  bench:option("--dim", "head_dims, for codecs (64) and for --arm in gpu (128)."):argname "N,N"
  bench:option("--queries", "Query heads of a K/V head, for codecs."):convert(positive "--queries"):default "4":argname "N"
  bench:option("--ggml", "Folder of libggml-base.so and libggml-cpu.so, timed in the same run, for codecs."):argname "DIR"
  bench:option("--rows", "Write rows as JSON lines, for codecs, gpu and generate (these with a manifest, a table and a plot beside them)."):argname "FILE"
  bench:option("--shape", "For gpu, batch x length x head_dim x K/V heads x query heads each (8x32768x128x8x4; r at its end: ragged); again for more (default: those of results/gpu)."):count "*":argname "SHAPE"
  bench:option("--bits", "For gpu, bits of keys and values, or K/V: 4,3,2,4/2."):default "4,3,2":argname "N,N"
  bench:option("--batch", "For generate, sequences that decode together."):default "1":argname "N,N"
  bench:option("--peers", "For gpu, rows of tests/bench/gpu_peers.py of the same run."):argname "FILE"
  bench:option("--format", "table or json."):convert(one_of("--format", "table", "json")):default "table"

  local calibrate = p:command("calibrate", "Collect what calibrated codecs and means are made from, into one artifact; check arms on held-out text.",
    "Examples: kelvin calibrate smollm2-135m --text book.txt -o smollm2.kvcal --check k=turboquant-3,v=turboquant-3,mean=k,page_rope=k; kelvin calibrate smollm2-135m --artifact smollm2.kvcal")
  calibrate:argument("model", "A model's name or a .gguf file."):argname "MODEL"
  calibrate:option("--text", "Text file; its first tokens calibrate, --check reads what comes after them."):argname "FILE"
  calibrate:flag("--weights", "No text: the model reads random tokens, so that all follows from its weights; --check reads --text.")
  calibrate:option("-o --out", "The artifact to write."):argname "FILE"
  calibrate:option("--artifact", "A saved one: shown, or checked on --text."):argname "FILE"
  calibrate:option("--tokens", "Tokens to collect, in whole chunks."):convert(positive "--tokens"):default "4096":argname "N"
  calibrate:option("--context", "Tokens of a chunk."):convert(positive "--context"):default "512":argname "N"
  calibrate:option("--skip", "First positions of each chunk that are left out."):convert(from_zero "--skip"):default "4":argname "N"
  calibrate:option("--rows", "Tokens whose K and V are kept."):convert(positive "--rows"):default "1024":argname "N"
  calibrate:option("--what", "What to collect, apart by commas: moments, rows (quantiles, codebooks), queries (default: all)."):argname "LIST"
  calibrate:option("--check", "Arm to hold against its data-oblivious twin at the same bits; again for more."):count "*":argname "ARM"
  calibrate:option("--check-chunks", "Held-out chunks."):convert(positive "--check-chunks"):default "4":argname "N"

  local eval = p:command("eval", "Measure arms against an exact cache: KL divergence, perplexity, bits.",
    "Example: kelvin eval smollm2-135m --text book.txt --context 512 --chunks 30 --arm q4_0 --arm k=turboquant-4,v=turboquant-3,mean=both --calib other.txt")
  eval:argument("model", "A model's name or a .gguf file."):argname "MODEL"
  eval:option("--text", "Text file to score."):argname "FILE":count "1"
  eval:option("--arm", "Cache setting, or policy=NAME:PARAM=VALUE; again for more."):argname "ARM":count "*"
  eval:option("--policy", "A Lua file that returns kv.policy{...}, as an arm; again for more."):argname "FILE":count "*"
  eval:option("--context", "Tokens of a chunk."):convert(positive "--context"):default "512":argname "N"
  eval:option("--chunks", "Chunks at most."):convert(positive "--chunks"):default "30":argname "N"
  eval:option("--score", "second-half or all."):convert(one_of("--score", "second-half", "all")):default "second-half"
  eval:option("--sink", "Exact tokens at the start, for arms that do not say."):convert(from_zero "--sink"):default "0":argname "N"
  eval:option("--recent", "Exact tokens at the end, for arms that do not say."):convert(from_zero "--recent"):default "0":argname "N"
  eval:option("--page-tokens", "Tokens of a page, for arms that do not say."):convert(positive "--page-tokens"):argname "N"
  eval:option("--mode", "visibility (one pass) or stream (token by token)."):convert(one_of("--mode", "visibility", "stream")):default "visibility"
  eval:option("--calib", "Another text than the one scored, for means and calibrated codecs (default: the demo's)."):argname "FILE"
  eval:option("--calib-chunks", "Chunks of it."):convert(positive "--calib-chunks"):default "8":argname "N"
  eval:option("--artifact", "Calibration of `kelvin calibrate` instead of --calib."):argname "FILE"
  eval:option("--seed", "Of every codec that has one."):convert(seed()):argname "N"
  eval:option("--rows", "Write rows as JSON lines."):argname "FILE"
  eval:option("--format", "table, json or llama."):convert(one_of("--format", "table", "json", "llama")):default "table"
  eval:flag("--no-controls", "Leave out identity, canary and mutation.")
  return p
end

-- ---- commands -------------------------------------------------------------------------------------------------------------

local check

--- The whole of a file; an error that names it otherwise.
local function read_file(path, what)
  local f, err = io.open(path, "rb")
  if not f then check.fail("%s: %s", what, err) end
  local text = f:read "*a"
  f:close()
  if not text then check.fail("%s: '%s' cannot be read", what, path) end
  return text
end

local DEFAULT_CALIB = "jargon"

local function unpack_spec(spec)
  local params = {}
  for name, value in pairs(spec) do if name ~= 1 then params[name] = value end end
  return spec[1], params
end

-- Means and tables come from a text: --calib's, or for arms that need them the default's calibration part.  Never from what is
-- scored.
local function calibration(model, o)
  local lib = require "kelvin.lib"
  local text, source
  if o.artifact then
    check.that(not o.path, "--calib %s and --artifact %s: one of them", o.path, o.artifact)
    return model:calibrate { artifact = o.artifact }
  end
  if o.path then
    text, source = read_file(o.path, "--calib"), o.path:match "[^/]+$"
    check.that(text ~= o.scored, "--calib: '%s' is the text that is scored; means must come from another", o.path)
  else
    local needs
    for _, arm in ipairs(o.arms or {}) do
      local parsed = require("kelvin.policy").of(arm).arm or {}     -- policies proper ask with --calib
      local needed = parsed.mean and parsed.mean ~= "none" and parsed.mean ~= "bias"
      for _, side in ipairs { parsed.k, parsed.v } do needed = needed or require("kelvin.codec").new(unpack_spec(side)).needs_calibration end
      if needed then needs = needs or arm end
    end
    if not needs then return nil end
    local ok, t = pcall(require("kelvin.text").load, DEFAULT_CALIB)
    check.that(ok, "arm '%s' needs calibration, and the default text for it cannot be had (%s): give another with --calib FILE", needs, t)
    check.that(not o.scored or lib.sha256(o.scored) ~= t.sha256 and not o.scored:find(t.calibrate:sub(1, 4096), 1, true),
      "arm '%s' needs calibration, and the default text for it is what is scored: give another with --calib FILE", needs)
    text, source = t.calibrate, { name = t.name, part = "calibrate", sha256 = t.calibrate_sha256 }
    log.info("calibrating on %s; --calib FILE takes another text", t.name)
  end
  return model:calibrate { text = text, chunks = o.chunks or 8, source = source, name = type(source) == "string" and "--calib " .. source or nil,
    on_progress = function(i, n) log.progress(i / n, "calibrating") end }
end

local commands = {}

function commands.eval(a)
  local json = require "kelvin.json"
  local model = require("kelvin.model").open(a.model)
  local text = read_file(a.text, "--text")
  check.that(#a.arm + #a.policy > 0, "eval: no arm to measure: --arm ARM or --policy FILE is needed")
  for _, arm in ipairs(a.arm) do require("kelvin.policy").of(arm) end
  for _, path in ipairs(a.policy) do a.arm[#a.arm + 1] = require("kelvin.policy").file(path) end
  local out
  if a.rows then
    local err
    out, err = io.open(a.rows, "ab")
    if not out then check.fail("--rows: %s", err) end
  end
  -- The manifest names the model file by content: two seconds for what makes a row replayable.
  local sha = out and require("kelvin.lib").sha256_file(model.path) or nil
  local failed = false
  local rows = require("kelvin.eval").run { model = model, text = text, data_name = a.text:match "[^/]+$", arms = a.arm, context = a.context, chunks = a.chunks, score = a.score,
    sink = a.sink, recent = a.recent, page_tokens = a.page_tokens, mode = a.mode, seed = a.seed,
    calib = calibration(model, { path = a.calib, artifact = a.artifact, chunks = a.calib_chunks, arms = a.arm, scored = text }),
    controls = not a.no_controls, model_sha256 = sha, on_progress = log.progress,
    on_row = function(row)
      log.clear()
      log.info("%s", ("%-40s bits %.3f  KLD %.6f%s  %s"):format(row.arm, row.bits_allin, row.kld.mean,
        row.kld.se == row.kld.se and (" ± %.6f"):format(row.kld.se) or "", row.status))
      failed = failed or row.status == "error"
      if out then
        local written, why = out:write(json.encode(row), "\n")
        if written then written, why = out:flush() end
        check.that(written, "--rows: %s: %s", a.rows, why)
      end
    end }
  log.clear()
  if out then out:close() end
  if a.format == "json" then
    for _, row in ipairs(rows) do print(json.encode(row)) end
  elseif a.format == "llama" then
    for _, row in ipairs(rows) do print(("arm: %s\n%s\n"):format(row.arm, require("kelvin.evaltext").llama(row))) end
  else print(tostring(rows)) end
  if rows.interrupted then log.warn("interrupted: %d of %d arms are complete", #rows, #a.arm) end
  return (failed or rows.interrupted) and 1 or 0
end

function commands.calibrate(a)
  local model = require("kelvin.model").open(a.model)
  if not a.text and not a.artifact and not a.weights then check.fail("calibrate: --text FILE is needed, or --weights, or --artifact FILE to show one") end
  if a.weights and a.artifact then check.fail("calibrate: --weights and --artifact, one of them") end
  if not a.artifact and not a.out and #a.check == 0 then check.fail("calibrate: -o FILE is needed, or --check ARM") end
  local text = a.text and read_file(a.text, "--text")
  local checked = a.artifact or a.weights
  if checked and #a.check > 0 and not text then check.fail("calibrate: --check with --%s needs --text FILE of another text", a.weights and "weights" or "artifact") end
  local c
  if a.artifact then c = model:calibrate { artifact = a.artifact }
  else
    c = model:calibrate { text = not a.weights and text or nil, weights = a.weights, context = a.context, chunks = math.ceil(a.tokens / a.context), skip = a.skip, rows = a.rows, what = a.what,
      source = not a.weights and a.text:match "[^/]+$" or nil,
      on_progress = function(i, n) log.progress(i / n, "calibrating") end }
    log.clear()
  end
  for _, arm in ipairs(a.check) do
    c:check(arm, { text = checked and text or nil, chunks = a.check_chunks, on_progress = log.progress })
    log.clear()
  end
  if a.out then c:save(a.out) end
  print(tostring(c))
  local d = c:describe()
  for _, line in ipairs { { "text", c.source or "unnamed" }, { "tokens", d.tokens_sha256 }, { "model", d.model_fingerprint }, { "rope", d.rope_sha256 }, { "moments", d.sha256 } } do
    print(("  %-8s %s"):format(line[1], tostring(line[2])))
  end
  for _, x in ipairs(c.notes.checks or {}) do print("  check    " .. require("kelvin.calib").verdict(x)) end
  if a.out then print(("  wrote    %s"):format(a.out)) end
  return 0
end

function commands.run(a)
  return require("kelvin.experiment").run_file(a.file, { smoke = a.smoke, resume = a.resume, list = a.list, set = a.set, out = a.out, model = a.model, text = a.text,
    calib = a.calib, shard = a.shard })
end

function commands.report(a) return require("kelvin.report").remake(a.dir) end
function commands.repl() return require("kelvin.repl").run() end
function commands.doctor() return require("kelvin.doctor").main() end
function commands.chat(a)
  check.that(not (a.policy and a.arm), "chat: --policy %s and --arm %s: one of them", a.policy, a.arm)
  check.that(not (a.raw and a.system), "chat: --system needs the chat template that --raw leaves out")
  a.policy = a.policy and require("kelvin.policy").file(a.policy)
  return require("kelvin.chat").main(a, calibration)
end
function commands.index(a) return require("kelvin.index").main(a) end
function commands.bench(a) return require("kelvin.bench").main(a) end

-- KVTC tables as asked for: a saved file's, or made of a calibration; nil when neither is.
local function kvtc_tables(a, model)
  check.that(not (a.tables and a.offload), "cache: --tables or --offload, not both")
  if a.tables then return require("kelvin.container").load(a.tables, { model = model }) end
  if not a.offload then return nil end
  local kvtc = require "kelvin.kvtc"
  local preset = check.that(kvtc.presets[a.offload], "cache: --offload '%s' is none of %s", a.offload, kvtc.preset_names())
  local calib = model:calibrate { artifact = check.that(a.artifact, "cache: --offload needs --artifact FILE (kelvin calibrate %s --rows 2048 ...)", a.model) }
  return kvtc.new { calib = calib, ratio_k = preset.ratio_k, ratio_v = preset.ratio_v }
end

function commands.cache(a)
  local container = require "kelvin.container"
  local model = (a.what == "make" or a.what == "tables") and require("kelvin.model").open(a.model)
  local tables = model and kvtc_tables(a, model)
  if a.what == "tables" then
    container.save(a.file, check.that(tables, "cache tables: --offload NAME and --artifact FILE are needed"), { stage = a.stage, level = a.level })
  elseif a.what == "make" then
    local text = read_file(check.that(a.text, "cache make: --text FILE is needed"), "--text")
    local session = model:session { arm = a.arm, max_tokens = a.context }
    session:feed(text)
    if tables then container.save(a.file, require("kelvin.kvtc").offload { session = session, codec = tables, sink = a.sink, window = a.window }, { tables = not a.tables })
    else session:save(a.file, { stage = a.stage, level = a.level }) end
    print(tostring(session))
  end
  local f = container.open(a.file)
  if a.what ~= "verify" then
    print(tostring(f))
    return 0
  end
  local damaged, pages = f:verify(), 0
  for _, s in ipairs(f.sections) do pages = pages + s.pages end
  for _, message in ipairs(damaged) do print(message) end
  print(("%s: %d of %d pages are whole"):format(a.file, pages - #damaged, pages))
  return #damaged > 0 and 1 or 0
end

function commands.codecs(a)
  local codec = require "kelvin.codec"
  check.that(a.name or not (a.dim or a.page_tokens), "codecs: --dim and --page-tokens are for one codec: kelvin codecs NAME --dim 128")
  print(tostring(a.name and codec.describe(a.name, { head_dim = a.dim, page_tokens = a.page_tokens }) or codec.list()))
  return 0
end

function commands.policies(a) return require("kelvin.policies").main(a, calibration) end

function commands.models(a)
  local models = require "kelvin.model"
  if not a.what then
    print(tostring(models.list()))
    return 0
  end
  if a.what == "get" then
    if not a.name then check.fail("models get: a name is needed; known: %s", table.concat(require("kelvin.config").list "models", ", ")) end
    return require("kelvin.fetch").get(a.name)
  end
  check.that(not a.name, "models: '%s' after '%s'; one model is described at a time", a.name, a.what)
  local m = models.open(a.what, { device = "cpu" })
  print(tostring(m))
  local function line(key, value) print(("  %-14s %s"):format(key, tostring(value))) end
  line("path", m.path)
  line("tokenizer", m.tokenizer)
  line("chat template", m.chat_template)
  line("trained for", m.n_ctx_train .. " tokens")
  line("cache", ("%d bytes a token in f16"):format(m.n_layers * m.n_kv_heads * m.head_dim * 4))
  line("key bias", m.has_kv_bias and "yes" or "no")
  local windows, n = {}, 0
  for l = 1, m.n_layers do
    local w = m:layer(l).sliding_window
    if w > 0 then windows[w], n = true, n + 1 end
  end
  if n > 0 then line("sliding", ("%d of %d layers, window %d"):format(n, m.n_layers, (next(windows)))) end
  if m.config then line("about", m.config.about) line("license", m.config.license or "see the file") end
  if a.meta then for _, kv in ipairs(m:meta()) do line(kv[1], kv[2]:sub(1, 100)) end end
  if a.tensors then
    for _, t in ipairs(m:tensors()) do
      print(("  %-34s %-6s [%s]  %d bytes"):format(t.name, t.type, table.concat(t.shape, ", "), t.bytes))
    end
  end
  return 0
end

local function version()
  local b = require("kelvin.lib").build()
  print(("kelvin %s  %s  declarations %s"):format(b.version, b.flags, b.abi_hash:sub(1, 12)))
  return 0
end

function commands.lua(a)
  local chunk, err = loadfile(a.file)
  if not chunk then check.fail("%s", err) end
  a.args[0] = a.file
  _G.arg = a.args
  return chunk(unpack(a.args))
end

-- "--seed -1" as "--seed=-1": argparse would take -1 for an option of its own and name that.
local function with_values(arg)
  local out = {}
  for _, word in ipairs(arg) do
    local last = out[#out]
    if word:match "^%-[%d.]" and last and last:match "^%-%-[%w-]+$" then out[#out] = last .. "=" .. word else out[#out + 1] = word end
  end
  return out
end

-- Whether stdout took everything: a full disk must not look like success.
local function flushed()
  local ffi = require "ffi"
  ffi.cdef "int ferror(void *stream);"
  local ok, why = io.stdout:flush()
  if ok and ffi.C.ferror(io.stdout) == 0 then return true end
  io.stderr:write("kelvin: stdout: ", why or "not everything could be written", "\n")
  return false
end

--- main(arg): runs a command line and returns the exit status.
function M.main(arg)
  local ok_parser, p = pcall(parser)
  if not ok_parser then
    io.stderr:write("kelvin: lua module 'argparse' is not here: apt-get install lua-argparse\n")
    return 1
  end
  local ok, a = p:pparse(with_values(arg))
  if not ok then
    io.stderr:write("kelvin: ", (tostring(a):gsub("\n.*", "")), "\n")
    return 2
  end
  local level = log.level
  local trace
  ok, a.status = xpcall(function()
    if a.log then log.set(a.log) end
    level = log.level
    check = require "kelvin.check"
    local K = require "kelvin.ffi"
    if a.threads then require("kelvin.lib").threads(a.threads) end
    if a.version then return version() end
    local name = a.command or "repl"
    if name == "chat" or name == "bench" then a.model = a.model or DEFAULT_MODEL end      -- argparse has no default for an optional argument
    require("kelvin.model").device = a.device
    if name ~= "repl" then K.C.kv_interrupt_enable() end
    local status = commands[name](a)
    if type(status) == "boolean" then status = status and 0 or 1 end
    return status or 0
  end, function(e)
    trace = debug.traceback("", 2)
    return type(e) == "table" and (e.message or (e.interrupted and "interrupted")) or e
  end)
  pcall(log.clear)
  if ok then return flushed() and (type(a.status) == "number" and a.status or 0) or 1 end
  io.stdout:flush()
  io.stderr:write("kelvin: ", tostring(a.status), level == "debug" and trace or "", "\n")
  return 1
end

--- The parser, for tests and docs.
M.parser = parser
return M
