-- Attention of many queries over bf16 images and slabs of codes, against double precision on the host: tests/cuda/prefill_check.cu does it,
-- on the GPU (make gpu-test builds it) every shape in both forms, under the emulator (make emulated) a few small ones.
local h = require "helper"

-- A model of a shape alone: 150 tokens at once, then one, by f32 and by bf16 products.
local function last_logits(device, path)
  local m = require("kelvin.model").synthetic("prefill", { n_layers = 2, n_heads = 6, n_kv_heads = 2, head_dim = 64, n_embd = 64, n_ff = 64, n_vocab = 200, rope_base = 1e4 }, device)
  local s = m:session { arm = "turboquant-2", max_tokens = 200, path = path }
  local ids = {}
  for i = 1, 150 do ids[i] = 5 + (i * 7919) % 190 end
  s:feed(ids)
  s:feed { 7 }
  return s:logits(), s:paths()
end

describe("attention of many queries", function()
  h.check_program("prefill_check", "equals double precision on the GPU, early and late rows, every form", "cuda", "check")
  h.check_program("prefill_check", "equals double precision under the emulator", "emulated", "check plain small")
  for _, device in ipairs { "cuda", "emulated" } do
    local lacks, name = h.no_device(device), ("sessions on %s attend chunks by bf16 products when asked, and say so"):format(device)
    if lacks then pending(name .. " (" .. lacks .. ")") else
      it(name, function()
        local f32, how = last_logits(device, "fused")
        local bf16, said = last_logits(device, "bf16")
        local off, norm = 0, 0
        for i = 1, 200 do
          off = off + (bf16:get(i) - f32:get(i)) ^ 2
          norm = norm + f32:get(i) ^ 2
        end
        -- 4e-3 of a layer's attention, and the codes of 2 bits that flip in the next layer: 1.3e-2 was seen.
        assert(math.sqrt(off / norm) < 5e-2 and off > 0, ("off by %.3g"):format(math.sqrt(off / norm)))
        assert(how:find("chunks: decoded, f32", 1, true) and said:find("chunks: decoded, bf16", 1, true), how .. " / " .. said)
      end)
    end
  end
end)
