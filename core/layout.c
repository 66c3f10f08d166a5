/* layout.c -- sizes and offsets of the public structs as this compiler lays them out, for the ABI test: LuaJIT computes
 * its own layout from the same text, and the two must agree field by field. */
#include "internal.h"

#define STRUCT(s)   { #s, (int)sizeof(s), 0 },
#define FIELD(s, f) { #s "." #f, (int)sizeof(((s *)0)->f), (int)offsetof(s, f) },

static const kv_layout_entry layout[] = {
    STRUCT(kv_layout_entry) FIELD(kv_layout_entry, name) FIELD(kv_layout_entry, size) FIELD(kv_layout_entry, offset)
    STRUCT(kv_tensor) FIELD(kv_tensor, data) FIELD(kv_tensor, dtype) FIELD(kv_tensor, device) FIELD(kv_tensor, ndim)
        FIELD(kv_tensor, reserved) FIELD(kv_tensor, shape) FIELD(kv_tensor, stride)
    STRUCT(kv_stats) FIELD(kv_stats, min) FIELD(kv_stats, max) FIELD(kv_stats, mean) FIELD(kv_stats, rms)
        FIELD(kv_stats, n_nonfinite) FIELD(kv_stats, n)
    STRUCT(kv_diff) FIELD(kv_diff, rel_mse) FIELD(kv_diff, cosine_mean) FIELD(kv_diff, cosine_min)
        FIELD(kv_diff, max_abs) FIELD(kv_diff, n)
    STRUCT(kv_bytes) FIELD(kv_bytes, codes) FIELD(kv_bytes, scales) FIELD(kv_bytes, outliers) FIELD(kv_bytes, exact)
        FIELD(kv_bytes, padding) FIELD(kv_bytes, slack) FIELD(kv_bytes, state) FIELD(kv_bytes, shared)
        FIELD(kv_bytes, total)
    STRUCT(kv_param) FIELD(kv_param, name) FIELD(kv_param, about) FIELD(kv_param, type) FIELD(kv_param, def)
        FIELD(kv_param, min) FIELD(kv_param, max) FIELD(kv_param, choices)
    STRUCT(kv_codec_desc) FIELD(kv_codec_desc, name) FIELD(kv_codec_desc, about) FIELD(kv_codec_desc, source)
        FIELD(kv_codec_desc, format) FIELD(kv_codec_desc, caps) FIELD(kv_codec_desc, n_params)
    STRUCT(kv_codec_info) FIELD(kv_codec_info, family) FIELD(kv_codec_info, params) FIELD(kv_codec_info, head_dim)
        FIELD(kv_codec_info, page_tokens) FIELD(kv_codec_info, side) FIELD(kv_codec_info, caps)
        FIELD(kv_codec_info, format) FIELD(kv_codec_info, granule) FIELD(kv_codec_info, fused)
        FIELD(kv_codec_info, page_bytes) FIELD(kv_codec_info, page) FIELD(kv_codec_info, bits_nominal)
        FIELD(kv_codec_info, bits_payload)
    STRUCT(kv_model_info) FIELD(kv_model_info, path) FIELD(kv_model_info, arch) FIELD(kv_model_info, name)
        FIELD(kv_model_info, weight_type) FIELD(kv_model_info, tokenizer) FIELD(kv_model_info, chat_template)
        FIELD(kv_model_info, n_layers) FIELD(kv_model_info, n_heads) FIELD(kv_model_info, n_kv_heads)
        FIELD(kv_model_info, head_dim) FIELD(kv_model_info, n_embd) FIELD(kv_model_info, n_ff)
        FIELD(kv_model_info, n_vocab) FIELD(kv_model_info, n_ctx_train) FIELD(kv_model_info, n_rot)
        FIELD(kv_model_info, has_kv_bias) FIELD(kv_model_info, bos) FIELD(kv_model_info, eos)
        FIELD(kv_model_info, add_bos) FIELD(kv_model_info, file_bytes) FIELD(kv_model_info, n_params)
        FIELD(kv_model_info, weight_bytes) FIELD(kv_model_info, rope_base) FIELD(kv_model_info, norm_eps)
    STRUCT(kv_layer_info) FIELD(kv_layer_info, sliding_window) FIELD(kv_layer_info, rope_base)
        FIELD(kv_layer_info, rope_scale)
    STRUCT(kv_pairs) FIELD(kv_pairs, compressed) FIELD(kv_pairs, total) FIELD(kv_pairs, tokens_compressed)
    STRUCT(kv_calib_info) FIELD(kv_calib_info, model) FIELD(kv_calib_info, rope) FIELD(kv_calib_info, tokens) FIELD(kv_calib_info, notes)
        FIELD(kv_calib_info, count) FIELD(kv_calib_info, n_tokens) FIELD(kv_calib_info, n_chunks) FIELD(kv_calib_info, context)
        FIELD(kv_calib_info, skip) FIELD(kv_calib_info, n_sample)
    STRUCT(kv_sampler_params) FIELD(kv_sampler_params, temperature) FIELD(kv_sampler_params, top_p)
        FIELD(kv_sampler_params, seed) FIELD(kv_sampler_params, top_k) FIELD(kv_sampler_params, reserved)
    STRUCT(kv_kld_summary) FIELD(kv_kld_summary, n) FIELD(kv_kld_summary, mean) FIELD(kv_kld_summary, se)
        FIELD(kv_kld_summary, ci_lo) FIELD(kv_kld_summary, ci_hi) FIELD(kv_kld_summary, median)
        FIELD(kv_kld_summary, p90) FIELD(kv_kld_summary, p95) FIELD(kv_kld_summary, p99) FIELD(kv_kld_summary, p999)
        FIELD(kv_kld_summary, max) FIELD(kv_kld_summary, min) FIELD(kv_kld_summary, p10) FIELD(kv_kld_summary, p05)
        FIELD(kv_kld_summary, p01) FIELD(kv_kld_summary, p001) FIELD(kv_kld_summary, same_top1)
        FIELD(kv_kld_summary, same_top1_se) FIELD(kv_kld_summary, rms_dp) FIELD(kv_kld_summary, rms_dp_se)
        FIELD(kv_kld_summary, mean_dp) FIELD(kv_kld_summary, mean_dp_se) FIELD(kv_kld_summary, max_dp)
        FIELD(kv_kld_summary, min_dp) FIELD(kv_kld_summary, ppl) FIELD(kv_kld_summary, ppl_se)
        FIELD(kv_kld_summary, ppl_ref) FIELD(kv_kld_summary, ppl_ref_se) FIELD(kv_kld_summary, ln_ratio)
        FIELD(kv_kld_summary, ln_ratio_se) FIELD(kv_kld_summary, ppl_ratio) FIELD(kv_kld_summary, ppl_ratio_se)
        FIELD(kv_kld_summary, cor)
    STRUCT(kv_device_info) FIELD(kv_device_info, name) FIELD(kv_device_info, reason) FIELD(kv_device_info, available)
        FIELD(kv_device_info, n_devices) FIELD(kv_device_info, sm) FIELD(kv_device_info, abi)
        FIELD(kv_device_info, driver) FIELD(kv_device_info, runtime) FIELD(kv_device_info, memory_bytes)
        FIELD(kv_device_info, plugin)
    STRUCT(kv_pack_section_info) FIELD(kv_pack_section_info, kind) FIELD(kv_pack_section_info, meta)
        FIELD(kv_pack_section_info, stage) FIELD(kv_pack_section_info, version) FIELD(kv_pack_section_info, optional)
        FIELD(kv_pack_section_info, level) FIELD(kv_pack_section_info, n_pages) FIELD(kv_pack_section_info, raw_bytes)
        FIELD(kv_pack_section_info, stored_bytes)
};

/* "kv_x" is a struct (offset 0), "kv_x.f" a field of it. */
const kv_layout_entry *kv_layout_at(int i)
{
    return i >= 0 && i < (int)(sizeof layout / sizeof *layout) ? &layout[i] : NULL;
}
