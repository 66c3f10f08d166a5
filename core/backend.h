/* backend.h -- what a device plugin exports: one versioned table.  Plain C, no CUDA types, no libkelvin symbols.
 *
 * Every function that can fail fills err (always terminated, one line) and returns a negative KV_E_*.  Pointers named `host` or
 * reached from a description are host memory, read or written before the call returns; handles own device memory. */
#ifndef KV_BACKEND_H
#define KV_BACKEND_H
#include <stddef.h>
#include <stdint.h>

enum { KV_BACKEND_ABI = 2 };
/* Beside kelvin.h's KV_PATH_*, on a device: as KV_PATH_FUSED, and many new tokens at once by bf16 products. */
enum { KV_PATH_BF16 = 2 };

typedef struct kv_backend_device { char name[128]; int sm; double memory_bytes; } kv_backend_device;

/* ---- a codec as a device sees it: `pod` is the family's own description (core/codecs/<family>_device.h), flat bytes without
 * pointers, made by the codec's `device` operation.  Pages have the CPU's bytes. */
typedef struct kv_backend_codec {
    const char *family, *params;           /* params: canonical text, for messages */
    int         head_dim, page_tokens, granule, side;
    size_t      page_bytes;
    const void *pod;
    size_t      pod_bytes;
    size_t      used_bytes;                /* of page_bytes, without the padding at its end; for cache_mutate.  0: all */
} kv_backend_codec;

/* ---- a plan, resolved: slot [n_layers][n_kv_heads][2], K before V */
typedef struct kv_backend_slot { const kv_backend_codec *codec; const float *mean /* [head_dim] or NULL */; int page_rope; } kv_backend_slot;
typedef struct kv_backend_plan {
    int        n_layers, n_heads, n_kv_heads, head_dim, page_tokens, n_rot;
    const int *sink, *recent, *exact_dtype, *sliding;      /* [n_layers]; exact_dtype: KV_EXACT_*; sliding 0: global */
    const double *const *freq;                             /* [n_layers] -> [n_rot/2] radians per position */
    const kv_backend_slot *slot;
} kv_backend_plan;

/* ---- a model's weights; type is ggml's number, rows in blocks.  data NULL: random numbers of variance 1/n_in, made on the device in bf16
 * (models of a shape alone).  Biases and norms may be NULL. */
typedef struct kv_backend_weight { int type; int64_t n_in, n_out; size_t row_bytes; const void *data; } kv_backend_weight;
typedef struct kv_backend_layer {
    kv_backend_weight wq, wk, wv, wo, w_gate, w_up, w_down;
    const float *bq, *bk, *bv, *bo, *b_gate, *b_up, *b_down;
    const float *attn_norm, *ffn_norm, *q_norm, *k_norm, *post_attn_norm, *post_ffn_norm;
    float scale, softcap;
    const double *freq;                    /* [n_rot/2] */
} kv_backend_layer;
typedef struct kv_backend_model {
    int   n_layers, n_heads, n_kv_heads, head_dim, n_embd, n_ff, n_vocab, n_rot, activation /* 0 silu, 1 gelu (tanh) */;
    float norm_eps, embed_scale, final_softcap;
    const kv_backend_layer *layer;
    kv_backend_weight embed, head;
    const float *out_norm;
} kv_backend_model;
enum { KV_WEIGHTS_STORED = 0 /* products read the file's blocks; prefill through f32 */, KV_WEIGHTS_BF16 = 1 };

typedef struct kv_backend_sampler { double temperature, top_p, seed; int top_k; } kv_backend_sampler;      /* temperature 0: greedy */
/* Per scored position, as kv_eval_values has them. */
typedef struct kv_backend_scores { float *kld, *nll, *nll_ref, *dp, *same_top1; } kv_backend_scores;

typedef struct kv_backend_runner kv_backend_runner;        /* a model's weights and working memory on a device */
typedef struct kv_backend_cache kv_backend_cache;          /* n_seqs sequences of one plan */

typedef struct kv_backend {
    int         abi;                       /* KV_BACKEND_ABI of the build; first, so that any version can be refused */
    const char *name;                      /* "cpu", "cuda", "emulated" */
    int  (*probe)(int *n_devices, int *driver, int *runtime, char *err, size_t err_cap);
    int  (*describe)(int device, kv_backend_device *out, char *err, size_t err_cap);
    void *(*alloc)(int device, size_t n_bytes, char *err, size_t err_cap);
    void (*release)(int device, void *p);
    int  (*upload)(int device, void *dst, const void *src, size_t n_bytes, char *err, size_t err_cap);
    int  (*download)(int device, void *dst, const void *src, size_t n_bytes, char *err, size_t err_cap);
    int  (*sync)(int device, char *err, size_t err_cap);
    /* x [n_rows][n] on the device, in place: x = FWHT(sign * x) / sqrt(n); sign on the device or NULL. */
    int  (*hadamard)(int device, float *x, const float *sign, int n_rows, int n, char *err, size_t err_cap);

    /* ---- codecs alone (tests, benches).  pages: whole pages, zeroed by the caller before encode; rows [n][head_dim]. */
    int  (*codec_known)(const char *family);               /* 1: this back end decodes and encodes it */
    int  (*codec_encode)(int device, const kv_backend_codec *c, const float *host_rows, int n, uint8_t *host_pages, char *err, size_t err_cap);
    int  (*codec_decode)(int device, const kv_backend_codec *c, const uint8_t *host_pages, int tok0, int n, float *host_rows, char *err, size_t err_cap);

    /* ---- caches: kv_cache's meaning, for n_seqs sequences that may differ in length */
    int  (*cache_new)(int device, const kv_backend_plan *p, int n_seqs, int max_tokens, kv_backend_cache **out, char *err, size_t err_cap);
    void (*cache_free)(kv_backend_cache *c);
    int  (*cache_fork)(const kv_backend_cache *c, kv_backend_cache **out, char *err, size_t err_cap);
    int  (*cache_truncate)(kv_backend_cache *c, int seq, int n_tokens, char *err, size_t err_cap);
    int  (*cache_n_tokens)(const kv_backend_cache *c, int seq);
    /* kv_cache_attend and, after the last layer, commit; from and to host memory: q, out [n_seqs][n][n_heads][head_dim], k, v alike with n_kv_heads. */
    int  (*cache_attend)(kv_backend_cache *c, int layer, int n, const float *q, const float *k, const float *v, float scale, float softcap, float *out, char *err, size_t err_cap);
    int  (*cache_commit)(kv_backend_cache *c, int n, char *err, size_t err_cap);
    void (*cache_path)(kv_backend_cache *c, int path);     /* kelvin.h's KV_PATH_*, or KV_PATH_BF16 */
    int  (*cache_read)(const kv_backend_cache *c, int seq, int layer, int head, int side, int tok0, int tok1, float *host_rows, char *err, size_t err_cap);
    /* The bytes of one page, in the CPU's order whatever the device keeps. */
    int  (*cache_page)(const kv_backend_cache *c, int seq, int layer, int head, int side, int page, uint8_t *host, char *err, size_t err_cap);
    int  (*cache_bytes)(const kv_backend_cache *c, int layer, int side, double *codes, double *exact, double *slack, double *state);     /* allocated; -1: all */
    void (*cache_pairs)(const kv_backend_cache *c, double *compressed, double *total);
    void (*cache_count_from)(kv_backend_cache *c, int first_query);
    int  (*cache_mutate)(kv_backend_cache *c, double seed, double share, double *n, char *err, size_t err_cap);
    const char *(*cache_paths)(const kv_backend_cache *c); /* what steps did: "k: fused cuda, v: fused cuda" (also tile, rows), "chunks: decoded, f32 cuda" */

    /* ---- the runner.  Lanes: caches in order, each with its sequences.  All lanes of a call get n new tokens. */
    int  (*runner_new)(int device, const kv_backend_model *m, int weights, kv_backend_runner **out, char *err, size_t err_cap);
    void (*runner_free)(kv_backend_runner *r);
    /* tokens: shared ? [n] : [lanes][n].  Afterwards hidden states (after the final norm) of all rows lie in the runner until the next call.
     * A failure leaves every cache as it was. */
    int  (*feed)(kv_backend_runner *r, int n_caches, kv_backend_cache *const *caches, const int32_t *tokens, int n, int shared, char *err, size_t err_cap);
    /* Q, K, V of one layer (-1: all) of lane 0 during the next feed, to host memory as kv_model_tap lays them out; all NULL: off. */
    int  (*tap)(kv_backend_runner *r, int layer, float *q, float *q_pre, float *k, float *k_pre, float *v, char *err, size_t err_cap);
    int  (*hidden)(kv_backend_runner *r, int lane, int row0, int n_rows, float *host, char *err, size_t err_cap);
    int  (*logits)(kv_backend_runner *r, int lane, int row0, int n_rows, float *host, char *err, size_t err_cap);
    /* Lane against lane `ref`, rows row0.. of the last feed, targets [n_rows]. */
    int  (*score)(kv_backend_runner *r, int ref, int lane, int row0, int n_rows, const int32_t *targets, const kv_backend_scores *out, char *err, size_t err_cap);
    /* n_steps decode steps of all sequences of one cache: first [n_seqs] is fed, each next token sampled on the device; tokens [n_steps][n_seqs].
     * One captured graph serves all lengths.  seconds: the device's time, or NULL. */
    int  (*generate)(kv_backend_runner *r, kv_backend_cache *c, const int32_t *first, int n_steps, const kv_backend_sampler *s, int32_t *host_tokens, double *seconds, char *err, size_t err_cap);

    /* ---- measurements.  cases: one a line, a name of the back end's list and words key=value; json: one object a line, in their order.
     * All cases of a call take turns `repeats` times, so that a ceiling among them is of the same moments. */
    int  (*bench)(int device, const char *cases, int repeats, char *json, size_t json_cap, char *err, size_t err_cap);
} kv_backend;

/* A plugin exports: const kv_backend *kv_backend_get(void); */
#endif
