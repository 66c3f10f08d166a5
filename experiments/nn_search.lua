-- How near do searches on codes come to exact ones, and how fast are they?  Recall@k and queries/s of codecs at several sizes,
-- next to FAISS (flat, SQ, PQ at the same bytes) on the same vectors, in one run.
--
--   kelvin lua experiments/nn_search.lua [data=FILE [queries=FILE]] [n=100000] [dim=128] [metric=l2] [k=10]
--          [faiss=PYTHON] [indexes=Flat,SQ8,...] [repeats=3] [threads=1] [seed=1] [out=DIR] [name=NAME] [codecs=a,b,c] [clock=wall]
--
-- Without data: clusters of Gaussians.  With data and no queries the last tenth of the vectors, at most 1000, are the queries.
-- indexes: FAISS's, by its factory's names (default: flat, SQ, PQ, RaBitQ at the bytes of the codecs).  PYTHON is an
-- interpreter that has faiss-cpu and numpy; without it only Kelvin's rows are made.  clock=cpu counts the process's own time
-- instead of the clock's, for one thread on a machine that others use too.
local kv = require "kelvin"

local o = { n = "100000", dim = "128", metric = "l2", k = "10", repeats = "3", threads = "1", seed = "1", clock = "wall", out = "results/scratch/nn_search",
  codecs = "f32,q8_0,q4_0,turboquant-8,turboquant-6,turboquant-4,turboquant-3,turboquant-2,turboquant-1,turboangle-n64" }
local allowed = { data = true, queries = true, faiss = true, indexes = true, name = true }
for name in pairs(o) do allowed[name] = true end
for _, word in ipairs(arg) do
  local name, value = word:match "^(%w+)=(.+)$"
  if not allowed[name or ""] then error(("nn_search: '%s' is no option, or lacks its value; kelvin lua experiments/nn_search.lua [n=100000] [dim=128] ..."):format(word), 0) end
  o[name] = value
end
local function number(name) return tonumber(o[name]) or error(("nn_search: %s=%s is not a number"):format(name, o[name]), 0) end
local k, repeats, seed = number "k", number "repeats", number "seed"
kv.threads(number "threads")
if o.clock ~= "wall" and o.clock ~= "cpu" then error(("nn_search: clock=%s is neither wall nor cpu"):format(o.clock), 0) end
if o.clock == "cpu" and kv.threads() > 1 then error("nn_search: clock=cpu adds up the threads' time: threads=1 is needed", 0) end
local now = o.clock == "cpu" and os.clock or kv.now

local base, queries
if o.data then
  base = kv.index.read(o.data)
  if o.queries then queries = kv.index.read(o.queries)
  else
    local n = base:shape()[1]
    local n_queries = math.min(1000, math.max(1, math.floor(n / 10)))
    base, queries = base:slice(1, 1, n - n_queries), base:slice(1, n - n_queries + 1, n)
  end
else
  base, queries = kv.index.clusters { n = number "n", dim = number "dim", seed = seed, queries = { n = 1000 } }
end
local n, dim, n_queries = base:shape()[1], base:shape()[2], queries:shape()[1]
local name = o.name or (o.data and o.data:match "([^/]+)%.%w+$" or "clusters")
local data = { name = name, n = n, dim = dim, queries = n_queries, sha256 = o.data and kv.sha256_file(o.data) or nil, seed = not o.data and seed or nil }
print(("%s: %d vectors of %d, %d queries, %s, k = %d, %d thread(s)"):format(name, n, dim, n_queries, o.metric, k, kv.threads()))

local rows = {}
local function add(row)
  row.data, row.metric, row.k, row.threads, row.clock = data, o.metric, k, kv.threads(), o.clock
  rows[#rows + 1] = row
  print(("%-8s %-34s %9.1f bytes/vector  recall@%d %.4f  nearest in %d %.4f  %9.0f queries/s  alone %7.0f"):format(
    row.engine, row.arm, row.vector_bytes, k, row.recall, k, row.nearest, row.queries_per_s, row.queries_per_s_alone))
end

-- The quickest of the repeats, in queries/s: others on the machine only ever add time.
local function rate(count, search)
  local best = math.huge
  for _ = 1, repeats do
    local t0 = now()
    search()
    best = math.min(best, now() - t0)
  end
  return count / best
end

-- ---- Kelvin.  Truth is an exact search of f32.
local function exact_search()
  local ix = kv.index { dim = dim, codec = "f32", metric = o.metric }
  ix:add(base)
  return (ix:search(queries, { k = k }))
end
local truth = exact_search()

local function measure(codec, settings)
  local t0 = kv.now()
  local ix = kv.index { dim = dim, codec = codec, metric = o.metric, train = base:slice(1, 1, math.min(n, 20000)), mean = settings.mean, keep = settings.rerank and "f16" or "none" }
  ix:add(base)
  local build_s = kv.now() - t0
  local search = { k = k, rerank = settings.rerank or 0 }
  local ids = ix:search(queries, search)
  local found, nearest = kv.index.recall(ids, truth, k)
  local n_few = math.min(n_queries, 50)
  add { engine = "kelvin", arm = codec .. (settings.mean and " mean" or "") .. (settings.rerank and " rerank=" .. settings.rerank or ""), codec = { family = ix.family, params = ix.params },
    mean = settings.mean, rerank = settings.rerank,
    vector_bytes = ix.vector_bytes, original_bytes = settings.rerank and 2 * dim or nil, total_bytes = ix:bytes().total, recall = found, nearest = nearest, build_s = build_s,
    queries_per_s = rate(n_queries, function() ix:search(queries, search) end),
    queries_per_s_alone = rate(n_few, function() for q = 1, n_few do ix:search(queries:slice(1, q, q), search) end end) }
end

for codec in o.codecs:gmatch "[^,]+" do
  for _, mean in ipairs(codec:match "^f%d" and { false } or { false, true }) do
    local ok, why = pcall(measure, codec, { mean = mean })
    if not ok then print(("%-8s %-34s left out: %s"):format("kelvin", codec, (tostring(why):gsub("^%S+:%d+: ", "")))) break end
  end
end
for _, codec in ipairs { "turboquant-4", "turboquant-2", "turboquant-1" } do
  if o.codecs:find(codec, 1, true) then measure(codec, { mean = true, rerank = codec == "turboquant-4" and 2 or 10 }) end
end

-- ---- FAISS, in its own process, on the same vectors; judged here by the same truth
local faiss
if o.faiss then
  local folder = os.tmpname()
  os.remove(folder)
  local script = (arg[0]:gsub("%.lua$", "_faiss.py"))
  local function run(command)
    local p = io.popen(command .. "; echo \"exit $?\"")
    local text = p:read "*a"
    p:close()
    local body, code = text:match "^(.*)exit (%d+)%s*$"
    if code ~= "0" then error("nn_search: faiss failed: " .. (body or text), 0) end
    return body
  end
  run(("mkdir -p '%s'"):format(folder))
  kv.index.write(folder .. "/base.fvecs", base)
  kv.index.write(folder .. "/queries.fvecs", queries)
  local text = run(("'%s' '%s' '%s' %s %d %d %d %d '%s' %s"):format(o.faiss, script, folder, o.metric, k, kv.threads(), repeats, seed, o.indexes or "", o.clock))
  for line in text:gmatch "[^\n]+" do
    local row = kv.json.decode(line, "faiss")
    if row.version then faiss = row.version
    else
      local ids = kv.index.read(folder .. "/" .. row.file)
      local as_ids = kv.tensor.zeros { n_queries, k, dtype = "i32" }
      for q = 1, n_queries do for j = 1, k do as_ids:set(q, j, ids:get(q, j) + 1) end end
      row.recall, row.nearest = kv.index.recall(as_ids, truth, k)
      row.file, row.engine = nil, "faiss"
      add(row)
    end
  end
  run(("rm -r '%s'"):format(folder))
end

-- ---- rows and what made them
os.execute(("mkdir -p '%s'"):format(o.out))
local function write(file, text)
  local f = assert(io.open(o.out .. "/" .. file, "wb"))
  f:write(text)
  f:close()
end
local lines, cells = {}, {}
for j, row in ipairs(rows) do
  lines[j] = kv.json.encode(row)
  cells[j] = ("| %s | %s | %.1f | %.4f | %.4f | %.0f | %.0f | %.1f |"):format(row.engine, row.arm, row.vector_bytes, row.recall, row.nearest, row.queries_per_s, row.queries_per_s_alone, row.build_s)
end
write(name .. ".jsonl", table.concat(lines, "\n") .. "\n")
write(name .. ".md", ([[
# %s: %d vectors of %d, %d queries, %s, k = %d, %d thread(s), %s time

| engine | arm | bytes/vector | recall@%d | nearest found | queries/s, batch | queries/s, one at a time | build, s |
| --- | --- | --- | --- | --- | --- | --- | --- |
%s
]]):format(name, n, dim, n_queries, o.metric, k, kv.threads(), o.clock, k, table.concat(cells, "\n")))
local b = kv.build()
write(name .. ".json", kv.json.encode { data = data, metric = o.metric, k = k, repeats = repeats, threads = kv.threads(), seed = seed, clock = o.clock, faiss = faiss or "none",
  experiment_sha256 = kv.sha256_file(arg[0]),
  code = { version = b.version, abi_hash = b.abi_hash, flags = b.flags }, host = { cpu = b.cpu, simd = b.simd } } .. "\n")
print(("%s/%s.jsonl, .md, .json"):format(o.out, name))
