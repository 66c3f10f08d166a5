/* kelvin.h -- the whole boundary of libkelvin.
 *
 * The text between @cdef-begin and @cdef-end is plain C99 that LuaJIT's ffi.cdef accepts as it is.  The build
 * extracts it, hashes it, and compiles the hash into the library; Lua refuses a library built from another text.
 *
 * Conventions
 *   - A function that can fail returns an int status (KV_OK or a negative KV_E_*), and leaves one line of text that
 *     names the thing, the value given and what is allowed in kv_last_error(), per thread.
 *   - Constructors write their handle first: kv_x_new(kv_x **out, ...).  kv_x_free(NULL) is fine.  Handles are
 *     reference counted, and hold references to what they need: free them in any order.
 *   - K/V data is [head][token][dim]; one head's tokens are rows of head_dim floats.  Indices are 0-based in C and
 *     1-based in Lua.  Keys are in half-split (NeoX) channel order: RoPE pairs channel i with i + n_rot/2.
 *   - Byte counts are doubles: exact to 2^53, and a plain number in Lua. */
#ifndef KELVIN_H
#define KELVIN_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)
/* @cdef-begin  Plain C99 declarations only: no preprocessor lines, constants as enums. */

enum { KV_ABI_VERSION = 1, KV_MAX_DIMS = 5 };

enum {
    KV_OK             =  0,
    KV_E_ARG          = -1,  /* the caller's mistake: NULL, shape, dtype, name */
    KV_E_PARAM        = -2,  /* a codec parameter is unknown or out of its range */
    KV_E_NOMEM        = -3,
    KV_E_UNSUPPORTED  = -4,  /* a valid request with no implementation here */
    KV_E_UNCALIBRATED = -5,  /* encode before calibrate on a codec that needs it */
    KV_E_CORRUPT      = -6,  /* bytes from outside that do not parse */
    KV_E_IO           = -7,
    KV_E_DEVICE       = -8,  /* the device's driver said no */
    KV_E_INTERNAL     = -9   /* our bug */
};

/* ---- the library ------------------------------------------------------------------------------------------- */

int         kv_abi_version(void);
const char *kv_abi_hash(void);           /* SHA-256 of this region when the library was built */
const char *kv_version(void);
const char *kv_build_flags(void);        /* compiler and flags */
const char *kv_status_name(int status);  /* "KV_E_PARAM" */
const char *kv_last_error(void);         /* this thread's; valid until its next failing call */
void        kv_interrupt_enable(void);   /* installs a SIGINT handler that only sets a flag; a second Ctrl-C kills */
int         kv_interrupted(void);        /* 1 once after Ctrl-C, then 0 again */
double      kv_now(void);                /* monotonic seconds */

/* Struct layouts as the C compiler sees them, for the ABI test: i-th entry, or NULL past the end. */
typedef struct kv_layout_entry { const char *name; int size; int offset; } kv_layout_entry;
const kv_layout_entry *kv_layout_at(int i);

/* ---- processor --------------------------------------------------------------------------------------------- */

enum { KV_SIMD_C = 0, KV_SIMD_AVX2 = 1, KV_SIMD_AVX512 = 2, KV_SIMD_AMX = 3 /* in kv_cpu_limit alone */ };
int         kv_cpu_simd(void);            /* the level in use */
int         kv_cpu_simd_max(void);        /* what this processor has */
int         kv_cpu_limit(int level);      /* use at most this level (tests); returns the level now in use */
int         kv_cpu_amx(void);             /* 1: prefill multiplies on AMX tiles, values as pairs of bf16; 0: OpenBLAS, f32 */
const char *kv_cpu_name(void);
int         kv_threads(void);
int         kv_set_threads(int n);        /* 1..64; 0: as many as this process may run on */
/* Measured ceilings, for benches: one call each, about a second. */
int         kv_bench_memcpy(double mib, int threads, double *gb_per_s);   /* bytes read + bytes written */
int         kv_bench_read(double mib, int threads, double *gb_per_s);
int         kv_bench_sgemm(int m, int n, int k, double *gflop_per_s);     /* with kv_threads() */

/* ---- tensors ----------------------------------------------------------------------------------------------- */

enum { KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2, KV_I32 = 3, KV_U8 = 4 };

/* A view.  It owns nothing; copy it freely.  Strides are in elements. */
typedef struct kv_tensor {
    void    *data;
    int32_t  dtype, device, ndim, reserved;
    int32_t  shape[KV_MAX_DIMS];
    int64_t  stride[KV_MAX_DIMS];
} kv_tensor;

int   kv_dtype_size(int dtype);
int   kv_tensor_check(const kv_tensor *t, const char *what);      /* pointers, dims 1..5, positive shape, overflow */
int   kv_tensor_copy(const kv_tensor *src, kv_tensor *dst);       /* same shape, any strides, f32/f16/bf16 converted */
typedef struct kv_stats { double min, max, mean, rms, n_nonfinite, n; } kv_stats;
int   kv_tensor_stats(const kv_tensor *t, kv_stats *out);
/* One formula each, in double.  rel_mse = |a-b|^2 / |a|^2 over all; cosine is per row of the last dim, then mean and min. */
typedef struct kv_diff { double rel_mse, cosine_mean, cosine_min, max_abs, n; } kv_diff;
int   kv_tensor_diff(const kv_tensor *a, const kv_tensor *b, kv_diff *out);

/* ---- random numbers: counter-based (Philox4x32-10), the same in C, Lua and CUDA ------------------------------- */

void   kv_rng_u32(uint32_t seed_lo, uint32_t seed_hi, uint32_t stream, uint32_t counter, uint32_t *out4);
int    kv_rng_uniform(double seed, int stream, double start, int n, float *out);   /* (0,1): (u32 + 0.5) / 2^32 */
int    kv_rng_normal(double seed, int stream, double start, int n, float *out);    /* Box-Muller on counter pairs */

/* ---- codecs ------------------------------------------------------------------------------------------------ */

enum { KV_SIDE_K = 0, KV_SIDE_V = 1 };
enum {
    KV_CAP_KEYS = 1, KV_CAP_VALUES = 2, KV_CAP_FUSED_CPU = 4, KV_CAP_CALIBRATED = 8, KV_CAP_LOSSLESS = 16,
    KV_CAP_CONTROL = 32,                   /* exists to fail: never in a comparison */
    KV_CAP_FUSED_CUDA = 64,
    KV_CAP_CUDA = 256,                     /* a CUDA device encodes and decodes it, or most of its parameters */
    KV_CAP_CALIBRATABLE = 128              /* some of its parameters need calibrated tables; KV_CAP_CALIBRATED: all do */
};

/* Bytes by purpose.  total is the sum of the others, and equals what is allocated. */
typedef struct kv_bytes {
    double codes, scales, outliers, exact, padding, slack, state, shared, total;
} kv_bytes;

enum { KV_PARAM_INT = 0, KV_PARAM_REAL = 1, KV_PARAM_CHOICE = 2 };
typedef struct kv_param {
    const char *name, *about;
    int         type;
    double      def, min, max;             /* for a choice: def is an index into choices */
    const char *choices;                   /* "a|b|c" or NULL */
} kv_param;

typedef struct kv_codec_desc {
    const char *name, *about, *source;     /* source: paper and section, or where the format comes from */
    int         format, caps, n_params;
} kv_codec_desc;

typedef struct kv_codec kv_codec;          /* immutable once made */

typedef struct kv_codec_info {
    const char *family, *params;           /* params: canonical text, every parameter, "bits=4,norm=raw,..." */
    int         head_dim, page_tokens, side, caps, format;
    int         granule;                   /* tokens are encoded in multiples of this; divides page_tokens */
    int         fused;                     /* 1: dot and accumulate work on codes */
    double      page_bytes;                /* allocated bytes of one page of page_tokens tokens of one head */
    kv_bytes    page;                      /* page_bytes by purpose */
    double      bits_nominal;              /* code bits per element, metadata left out */
    double      bits_payload;              /* 8 page_bytes / (page_tokens head_dim) */
} kv_codec_info;

int  kv_codec_count(void);
int  kv_codec_describe(int index, kv_codec_desc *out);
int  kv_codec_param_at(int index, int i, kv_param *out);
/* params: "name=value,name=value", choices by their word; what is left out takes its default.  side: KV_SIDE_K or _V. */
int  kv_codec_new(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side);
void kv_codec_free(kv_codec *c);
int  kv_codec_get_info(const kv_codec *c, kv_codec_info *out);
/* With calibrated tables of one layer, head and side, as kv_codec_blob gave them: copied, and checked as bytes from outside. */
int  kv_codec_new_calibrated(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side, const void *blob, double blob_bytes);
int  kv_codec_blob(const kv_codec *c, const void **blob, double *blob_bytes);   /* NULL and 0: has none */
/* Calibrated on rows alone: x and q are f32 [rows, head_dim] in the frame that encode and dot will see; q may be NULL.
 * A codec that needs no tables is made without. */
int  kv_codec_fit(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side, const kv_tensor *x, const kv_tensor *q);
/* Calibrated on white noise: right for bytes and bits, not for coding. */
int  kv_codec_new_nominal(kv_codec **out, const char *family, const char *params, int head_dim, int page_tokens, int side);
/* The nearest legal bits setting for a target of stored bits per element; writes the params text to buf. */
int  kv_codec_fit_bits(const char *family, const char *params, int head_dim, int side, double target, char *buf, int cap);

/* Encoded tokens outside a cache.  src is f32 [heads, tokens, head_dim]; tokens past the last whole granule are kept
 * as f16 and counted as exact.  NaN or inf in src is KV_E_ARG. */
typedef struct kv_block kv_block;
int  kv_block_encode(kv_block **out, kv_codec *c, const kv_tensor *src);
int  kv_block_decode(const kv_block *b, int tok0, int tok1, kv_tensor *dst);              /* f32 [heads, tok1-tok0, head_dim] */
int  kv_block_bytes(const kv_block *b, kv_bytes *out);
int  kv_block_shape(const kv_block *b, int *n_heads, int *n_tokens, int *head_dim);
int  kv_block_page(const kv_block *b, int head, int page, uint8_t **data, double *bytes); /* the encoded bytes themselves */
/* Attention pieces in the codec's own space: scores[h][q][t] = <q, k_t>;  out[h][q][:] = sum_t p[h][q][t] v_t.
 * fused=1 works on codes (KV_E_UNSUPPORTED if the codec cannot), fused=0 decodes a tile at a time. */
int  kv_block_dot(const kv_block *b, const kv_tensor *q, int fused, kv_tensor *scores);
int  kv_block_accumulate(const kv_block *b, const kv_tensor *p, int fused, kv_tensor *out);
void kv_block_free(kv_block *b);

/* n rows of head_dim floats, whole granules, into pages on a device ("cpu", "cuda", "cuda:1"): the same bytes on each.  pages: whole pages, where slots
 * of other tokens keep theirs.  And back: rows of tokens tok0 .. tok0+n. */
int  kv_codec_encode_on(const char *device, const kv_codec *c, const float *rows, int n, uint8_t *pages);
int  kv_codec_decode_on(const char *device, const kv_codec *c, const uint8_t *pages, int tok0, int n, float *rows);
/* A case of kv_device_bench that encodes or decodes n_tokens rows with this codec, as text.  Room for it: KV_E_ARG says how much. */
int  kv_codec_bench_case(const kv_codec *c, const char *what /* "encode" or "decode" */, int n_tokens, char *line, int line_cap);

/* Pieces that tests and prototypes use directly. */
int  kv_hadamard(float *x, int n_rows, int n);                   /* orthonormal FWHT of rows, n a power of two 1..4096 */
int  kv_lloyd_max(int bits, int dim, double *centroids, double *distortion); /* 2^bits ascending; dim 0: N(0,1); else exact Beta times sqrt(dim) */

/* ---- plan: which codec for K and for V, per layer and per head; resolved, validated ---------------------------- */

typedef struct kv_plan kv_plan;
enum { KV_EXACT_F16 = 1, KV_EXACT_F32 = 0, KV_EXACT_BF16 = 2 };  /* storage of sinks and window: dtype codes */
int  kv_plan_new(kv_plan **out, int n_layers, int n_kv_heads, int head_dim, int page_tokens);
int  kv_plan_window(kv_plan *p, int layer, int sink, int recent, int exact_dtype);     /* layer -1: all */
int  kv_plan_set(kv_plan *p, int layer, int head, int side, kv_codec *c);              /* layer, head -1: all */
/* mean: head_dim floats removed before coding (copied).  For page_rope slots it is the mean of page-relative keys. */
int  kv_plan_mean(kv_plan *p, int layer, int head, int side, const float *mean);
int  kv_plan_page_rope(kv_plan *p, int layer, int head, int on);                       /* keys only; BEYOND 4.6 */
int  kv_plan_check(const kv_plan *p);                                                  /* every slot set */
void kv_plan_free(kv_plan *p);

/* ---- models ------------------------------------------------------------------------------------------------ */

typedef struct kv_model kv_model;
typedef struct kv_model_info {
    const char *path, *arch, *name, *weight_type, *tokenizer, *chat_template;  /* chat_template: "chatml", "llama3", "gemma", "none" */
    int    n_layers, n_heads, n_kv_heads, head_dim, n_embd, n_ff, n_vocab, n_ctx_train, n_rot, has_kv_bias;
    int    bos, eos, add_bos;              /* token ids, -1 if none */
    double file_bytes, n_params, weight_bytes, rope_base, norm_eps;
} kv_model_info;
typedef struct kv_layer_info { int sliding_window; double rope_base, rope_scale; } kv_layer_info; /* sliding_window 0: global */

int  kv_model_open(kv_model **out, const char *path);
int  kv_model_get_info(const kv_model *m, kv_model_info *out);
int  kv_model_layer(const kv_model *m, int layer, kv_layer_info *out);
/* Key bias of a layer as held in the cache ([n_kv_heads * head_dim], half-split order), or NULL. */
const float *kv_model_key_bias(const kv_model *m, int layer);
void kv_model_free(kv_model *m);
/* Where the model runs: "cpu", "cuda", "cuda:1".  Its weights are copied there once; sessions, evaluations and taps made from then on
 * run there, those that exist stay where they are.  bf16 1: products in bf16 with f32 sums, 0: weights as the file has them, products in f32. */
int  kv_model_device(kv_model *m, const char *device, int bf16);
const char *kv_model_where(const kv_model *m);           /* "cpu", or the device's name as it was given */
/* A model of a shape alone, with random bf16 weights on a device: for measuring speed.  It has no tokenizer and no file. */
typedef struct kv_model_shape { int n_layers, n_heads, n_kv_heads, head_dim, n_embd, n_ff, n_vocab, reserved; double rope_base; } kv_model_shape;
int  kv_model_synthetic(kv_model **out, const char *name, const kv_model_shape *s, const char *device);
/* GGUF metadata as text, for `kelvin models NAME`: i-th key and value, KV_E_ARG past the end. */
int  kv_model_meta_at(const kv_model *m, int i, const char **key, const char **value);
int  kv_model_tensor_at(const kv_model *m, int i, const char **name, const char **type, int *n_dims, double *shape4, double *bytes);

/* Tokenizer of the model file.  ids may be NULL to count.  cap too small: KV_E_ARG and *n is what is needed. */
int  kv_tokenize(const kv_model *m, const char *text, double n_bytes, int add_special, int parse_special, int32_t *ids, int cap, int *n);
int  kv_detokenize(const kv_model *m, const int32_t *ids, int n, char *buf, int cap, int *n_bytes);
int  kv_token_is_end(const kv_model *m, int id);
/* A chat turn as the model's template writes it.  role: "system", "user", "assistant"; role NULL opens the assistant's turn.
 * first: 1 opens the conversation, 2 follows a system turn that did, else 0.  A begin token at the very start is left to
 * kv_tokenize's add_special; parse_special reads the others. */
int  kv_chat_format(const kv_model *m, const char *role, const char *text, int first, char *buf, int cap, int *n_bytes);

/* ---- cache and session: one sequence ------------------------------------------------------------------------ */

typedef struct kv_session kv_session;
enum { KV_PATH_FUSED = 0, KV_PATH_TILE = 1 };          /* attention on codes where the codec can, or decode a tile then attend */

typedef struct kv_sampler_params { double temperature, top_p, seed; int top_k, reserved; } kv_sampler_params; /* temperature 0: greedy */

/* plan NULL: exact f32 cache (the reference). */
int  kv_session_new(kv_session **out, kv_model *m, kv_plan *plan, int max_tokens);
void kv_session_free(kv_session *s);
int  kv_session_path(kv_session *s, int path);
/* Feeds n tokens in one pass (n = 1: the decode step on codes; n > 1: visibility semantics).  want_logits: 0 none, 1 last, 2 all. */
int  kv_session_feed(kv_session *s, const int32_t *tokens, int n, int want_logits);
const float *kv_session_logits(const kv_session *s);   /* [n_vocab] of the last token (or [n][n_vocab]); NULL before */
const char *kv_session_where(const kv_session *s);     /* "cpu", or the device */
/* Feeds one token and draws the next as kv_sample would with the new length as its counter.  On a device logits stay there: want_logits 0;
 * 1 fetches them, 2 does when the drawn token ends a text. */
int  kv_session_next(kv_session *s, int token, const kv_sampler_params *p, int want_logits, int *next);
int  kv_session_n_tokens(const kv_session *s);
int  kv_session_truncate(kv_session *s, int n_tokens); /* keeps the first n_tokens */
int  kv_session_fork(kv_session **out, const kv_session *s);
int  kv_session_bytes(const kv_session *s, kv_bytes *out);             /* from allocations */
int  kv_session_layer_bytes(const kv_session *s, int layer, int side, kv_bytes *out);
/* Share of (query, key) pairs served from compressed storage so far, and counts behind it. */
typedef struct kv_pairs { double compressed, total, tokens_compressed; } kv_pairs;
int  kv_session_pairs(const kv_session *s, kv_pairs *out);
/* The cache's rows of one layer and head as attention reads them: f32 [tok1-tok0, head_dim]. */
int  kv_session_read(const kv_session *s, int layer, int head, int side, int tok0, int tok1, float *dst);
/* Room for n tokens in an empty session, as if they had been fed; then rows of a layer and head, f32 [tok1-tok0, head_dim] as
 * read gives them.  Where the slot is coded, tok0 and tok1 are multiples of its granule. */
int  kv_session_first_held(const kv_session *s, int layer);                /* the first token whose rows a sliding layer still has; -1: no such layer */
int  kv_session_import(kv_session *s, int n);
int  kv_session_write(kv_session *s, int layer, int head, int side, int tok0, int tok1, const float *src);
/* Flips every bit of one byte in about share of the bytes of compressed pages (mutation control).  Returns how many in *n. */
int  kv_session_mutate(kv_session *s, double seed, double share, double *n);
const char *kv_session_paths(const kv_session *s);     /* what attention did, e.g. "k: fused avx512, v: tile" */

/* Q, K, V of one layer over a text: f32, exact cache.  Any of the destinations may be NULL.
 * q: [n_heads, n, head_dim]; k, k_pre (before RoPE), v: [n_kv_heads, n, head_dim]; layer -1: of all, [n_layers, ...]. */
int  kv_model_tap(kv_model *m, const int32_t *tokens, int n, int layer, float *q, float *q_pre, float *k, float *k_pre, float *v);

int  kv_sample(const float *logits, int n, const kv_sampler_params *p, double counter, int *token);

/* ---- sequences that decode together on the model's device: one plan, n_seqs of them, each at its own length */

typedef struct kv_batch kv_batch;
int  kv_batch_new(kv_batch **out, kv_model *m, kv_plan *plan, int n_seqs, int max_tokens);
void kv_batch_free(kv_batch *b);
/* n tokens to every sequence: [n] when shared, else [n_seqs][n].  logits: of the last token, [n_seqs][n_vocab], or NULL. */
int  kv_batch_feed(kv_batch *b, const int32_t *tokens, int n, int shared, float *logits);
/* n tokens whose rows are never written (zeros in pages): the depth of a speed measurement. */
int  kv_batch_skip(kv_batch *b, int n);
/* n_steps steps: first [n_seqs] is fed, each next token sampled on the device with the number of its position; tokens [n_steps][n_seqs].
 * seconds: the device's time, or NULL. */
int  kv_batch_generate(kv_batch *b, const int32_t *first, int n_steps, const kv_sampler_params *p, int32_t *tokens, double *seconds);
int  kv_batch_truncate(kv_batch *b, int seq, int n_tokens);
int  kv_batch_n_tokens(const kv_batch *b, int seq);
int  kv_batch_path(kv_batch *b, int path);
int  kv_batch_bytes(const kv_batch *b, kv_bytes *out);
const char *kv_batch_paths(const kv_batch *b);

/* ---- calibration: streaming moments of K and V --------------------------------------------------------------- */

typedef struct kv_calib kv_calib;
enum { KV_CALIB_K = 0, KV_CALIB_K_PRE = 1, KV_CALIB_V = 2, KV_CALIB_Q = 3, KV_CALIB_Q_PRE = 4 };  /* q: over the query heads of a K/V head */
int  kv_calib_new(kv_calib **out, kv_model *m, int n_sample);              /* rows kept of each slot; 0: 1024 */
/* Before the first chunk: what is not collected.  Codecs that weigh by queries then weigh all channels alike; those that are made
 * from rows refuse. */
enum { KV_CALIB_NO_QUERIES = 1, KV_CALIB_NO_ROWS = 2 };
int  kv_calib_leave_out(kv_calib *c, int what);
int  kv_calib_begin(kv_calib *c, const int32_t *tokens, int n, int skip);   /* one chunk, exact cache; first skip positions left out */
int  kv_calib_step(kv_calib *c, int *more);                                 /* one layer at a time */
int  kv_calib_mean(const kv_calib *c, int what, int layer, int head, float *mean);           /* [head_dim] */
/* Mean of page-relative keys: R_p mean(k_pre), averaged over p = 0..page_tokens-1. */
int  kv_calib_page_mean(const kv_calib *c, int layer, int head, int page_tokens, float *mean);
int  kv_calib_rms(const kv_calib *c, int what, int layer, int head, float *rms);             /* of each channel, mean included */
int  kv_calib_second(const kv_calib *c, int what, int layer, int head, float *second);       /* E x x^T [head_dim, head_dim] */
/* Kept rows of k_pre or v: f32 [n_sample, head_dim], the same tokens everywhere. */
int  kv_calib_rows(const kv_calib *c, int what, int layer, int head, float *rows);
typedef struct kv_calib_info {
    const char *model, *rope, *tokens, *notes;                              /* digests as hex; notes: JSON text or "" */
    double      count, n_tokens;                                            /* positions collected; tokens of the chunks */
    int         n_chunks, context, skip, n_sample, without;                 /* without: of kv_calib_leave_out */
} kv_calib_info;
int  kv_calib_get_info(const kv_calib *c, kv_calib_info *out);
int  kv_calib_digest(const kv_calib *c, char *hex65);                       /* of all that was collected */
/* found: how many of the calibration text's runs of 32 tokens are somewhere in these tokens; of: how many it has. */
int  kv_calib_overlap(const kv_calib *c, const int32_t *tokens, int n, int *found, int *of);
int  kv_calib_note(kv_calib *c, const char *json);
/* The artifact: one checksummed file of numbers.  load refuses another version, model or RoPE, naming both. */
int  kv_calib_save(const kv_calib *c, const char *path);
int  kv_calib_load(kv_calib **out, kv_model *m, const char *path);
/* A codec for one slot, its tables made from what was collected.  page_rope: its keys are page-relative; mean: what the
 * plan removes from this slot's rows, or NULL.  A codec that needs no tables is made without. */
int  kv_codec_calibrate(kv_codec **out, const kv_calib *c, const char *family, const char *params, int page_tokens, int layer, int head, int side, int page_rope, const float *mean);
void kv_calib_free(kv_calib *c);
/* KVTC: a basis over the layers and heads of a model, for tokens that leave it in blocks (docs/codecs.md).  Zeros are the published
 * setting.  The basis of `like` (tables made here, not loaded) is taken over instead of made; layers to rows are then not read. */
enum { KV_KVTC_PAPER = 0, KV_KVTC_FINE = 1, KV_KVTC_E4M3 = 2, KV_KVTC_UNIFORM = 3 };   /* 0, 2, 4, 8 bits in blocks with shift and scale; 0 to 8 bits
    with calibrated steps; as the first with FP8 without header for 8 bits; 0 or `bits` bits */
typedef struct kv_kvtc_options {
    double  ratio_k, ratio_v, seed;                                /* f16 bytes over coded bytes, before the entropy stage; of the randomized SVD */
    int32_t layers, heads;                                         /* how many share a basis; 0: all */
    int32_t rank, rows;                                            /* components at most; rows of the calibration; 0: as there are */
    int32_t keep_rope, equal, randomized;                          /* keys as cached; layers and heads of equal weight; randomized SVD in place of the Gram matrix */
    int32_t types, bits, lagrange;                                 /* KV_KVTC_…; of KV_KVTC_UNIFORM; Lagrange multiplier in place of the dynamic program */
} kv_kvtc_options;
typedef struct kv_kvtc kv_kvtc;
typedef struct kv_offload kv_offload;
int  kv_kvtc_new(kv_kvtc **out, const kv_calib *c, const kv_kvtc *like, const kv_kvtc_options *o);
int  kv_kvtc_tables(const kv_kvtc *k, double *bytes, int *rank_k, int *rank_v);
void kv_kvtc_free(kv_kvtc *k);
/* Tokens sink .. n-window of a session in blocks of block_tokens; the first `sink` and the last ones, window at least, stay f16.
 * stage: "raw", "zlib", "lzma", "rans" (static tables of the calibration), "smallest"; level: of zlib (1..9) and lzma (0..9), -1: 6. */
int  kv_offload_new(kv_offload **out, kv_kvtc *k, const kv_session *s, int sink, int window, int block_tokens, const char *stage, int level);
/* The same session, gone on: what has left the window since becomes blocks of its own; blocks that are there stay. */
int  kv_offload_extend(kv_offload *o, const kv_session *s, int window);
int  kv_offload_shape(const kv_offload *o, int *n_tokens, int *n_coded, int *n_blocks);
int  kv_offload_block(const kv_offload *o, int block, int *tok0, int *n);
int  kv_offload_bytes(const kv_offload *o, kv_bytes *out);               /* shared: the tables, once */
/* Rows of one block, keys at their positions again: f32 [layers][heads][tokens][head_dim]. */
int  kv_offload_read(const kv_offload *o, int side, int block, float *dst);
/* n_tokens: how many came back, fewer than there were when the file of the offload was damaged. */
int  kv_offload_restore(const kv_offload *o, kv_session *empty, int *n_tokens);
void kv_offload_free(kv_offload *o);
/* Mean of RoPE(key bias) over positions 0..n_positions-1 (a page's offsets for page-relative keys): needs no text. */
int  kv_model_bias_mean(const kv_model *m, int layer, int head, int n_positions, float *mean);

/* ---- lockstep evaluation -------------------------------------------------------------------------------------- */

typedef struct kv_eval kv_eval;
enum { KV_EVAL_VISIBILITY = 0, KV_EVAL_STREAM = 1 };
typedef struct kv_kld_summary {
    double n, mean, se, ci_lo, ci_hi, median, p90, p95, p99, p999, max, min, p10, p05, p01, p001;
    double same_top1, same_top1_se, rms_dp, rms_dp_se, mean_dp, mean_dp_se, max_dp, min_dp;
    double ppl, ppl_se, ppl_ref, ppl_ref_se, ln_ratio, ln_ratio_se, ppl_ratio, ppl_ratio_se, cor;
} kv_kld_summary;

/* The reference runs over each chunk once with an exact f32 cache; its final hidden states of scored positions stay, so
 * that further arms over the same chunks need not run it again. */
int  kv_eval_new(kv_eval **out, kv_model *m, int mode);
int  kv_eval_arms(kv_eval *e, int n_arms, kv_plan **plans);       /* starts a group of arms; scores of earlier groups are dropped */
/* One chunk: tokens of one sequence from an empty cache; positions score_from .. n-2 are scored against their next token. */
int  kv_eval_begin(kv_eval *e, int chunk, const int32_t *tokens, int n, int score_from);
int  kv_eval_step(kv_eval *e, int *more);                         /* a slice of work, under a second */
int  kv_eval_scored(const kv_eval *e);                            /* scored positions so far, per arm */
/* Per scored position, in order: kind 0 kld, 1 nll, 2 nll_ref, 3 dp, 4 same_top1, 5 position, 6 chunk.  NULL if none. */
const float *kv_eval_values(const kv_eval *e, int arm, int kind);
/* Block bootstrap by chunk: seeded, n_boot resamples; positions lo <= position < hi only. */
int  kv_eval_summary(const kv_eval *e, int arm, int lo, int hi, double seed, int n_boot, kv_kld_summary *out);
int  kv_eval_bytes(const kv_eval *e, int arm, kv_bytes *out);     /* of the last chunk's cache, at its end */
int  kv_eval_pairs(const kv_eval *e, int arm, kv_pairs *out);     /* over all chunks, scored queries only */
void kv_eval_free(kv_eval *e);

/* ---- JSON reader (pull-style, over cJSON) and hashing ----------------------------------------------------------- */

typedef struct kv_json kv_json;                                   /* a document */
typedef struct kv_json_node kv_json_node;                         /* lives as long as its document */
enum { KV_JSON_NULL = 0, KV_JSON_FALSE = 1, KV_JSON_TRUE = 2, KV_JSON_NUMBER = 3, KV_JSON_STRING = 4, KV_JSON_ARRAY = 5, KV_JSON_OBJECT = 6 };
int         kv_json_parse(kv_json **out, const char *text, double n_bytes, const char *what);
const kv_json_node *kv_json_root(const kv_json *d);
int         kv_json_type(const kv_json_node *n);
double      kv_json_number(const kv_json_node *n);
const char *kv_json_string(const kv_json_node *n);
const char *kv_json_key(const kv_json_node *n);                   /* NULL if n is not in an object */
const kv_json_node *kv_json_child(const kv_json_node *n);         /* first child or NULL */
const kv_json_node *kv_json_next(const kv_json_node *n);          /* next sibling or NULL */
void        kv_json_free(kv_json *d);
int         kv_sha256(const void *data, double n_bytes, char *hex65);
int         kv_sha256_file(const char *path, char *hex65);

/* ---- containers: files of encoded pages (docs/formats.md).  kv_x_save says in its file what made it; stage "raw", "zlib",
 * "lzma", "rans" or "smallest", level -1 for the stage's own. ------------------------------------------------------------ */

typedef struct kv_pack kv_pack;                                   /* an open file, mapped */
typedef struct kv_pack_section_info {
    const char *kind, *meta, *stage;       /* meta: JSON; stage: as wished, pages that did not shrink are raw */
    int         version, optional, level, n_pages;
    double      raw_bytes, stored_bytes;
} kv_pack_section_info;
int  kv_pack_open(kv_pack **out, const char *path);
int  kv_pack_info(const kv_pack *p, int *version, int *n_sections, double *file_bytes);
int  kv_pack_section_at(const kv_pack *p, int i, kv_pack_section_info *out);
int  kv_pack_check(const kv_pack *p, int section, int page);      /* KV_E_CORRUPT names the page */
int  kv_pack_page_size(const kv_pack *p, int section, int page, double *n_bytes);
int  kv_pack_copy(const kv_pack *p, int section, int page, void *dst, double n_bytes);   /* decoded, checked */
void kv_pack_free(kv_pack *p);
/* about: JSON text that goes into the file as it is.  salvage 1: damaged pages of a block decode from zeros; a session keeps
 * the tokens before the first damaged page.  0: a damaged page is KV_E_CORRUPT and named. */
int  kv_block_save(const kv_block *b, const char *path, const char *about, const char *stage, int level);
int  kv_block_load(kv_block **out, const kv_pack *p, int salvage);
kv_codec *kv_block_codec(const kv_block *b);                      /* a new reference */
/* tokens: the n_tokens ids that were fed, kept beside the cache with the last logits.  max_tokens 0: as it was. */
int  kv_session_save(const kv_session *s, const char *path, const int32_t *tokens, const char *about, const char *stage, int level);
int  kv_session_load(kv_session **out, kv_model *m, const kv_pack *p, int max_tokens, int salvage);
kv_plan *kv_session_plan(const kv_session *s);                    /* a new reference */
int  kv_session_max_tokens(const kv_session *s);
/* KVTC tables, alone or with an offload.  tables_about NULL: they stay in a file of their own, whose digest the offload names.  load: k
 * NULL takes the tables in the file; salvage 1: damaged blocks are missing, and restore gives the tokens before the first of them. */
int  kv_kvtc_digest(const kv_kvtc *k, char *hex65);
int  kv_kvtc_save(const kv_kvtc *k, const char *path, const char *about, const char *stage, int level);
int  kv_kvtc_load(kv_kvtc **out, kv_model *m, const kv_pack *p);
int  kv_offload_save(const kv_offload *o, const char *path, const int32_t *tokens, const char *about, const char *tables_about);
int  kv_offload_load(kv_offload **out, kv_model *m, const kv_pack *p, kv_kvtc *k, int salvage);
kv_kvtc *kv_offload_tables(const kv_offload *o);                  /* a new reference */

/* ---- nearest vectors on codes -------------------------------------------------------------------------------------- */

enum { KV_METRIC_IP = 0, KV_METRIC_L2 = 1, KV_METRIC_COSINE = 2 };
typedef struct kv_index kv_index;
typedef struct kv_index_config {
    const char *family, *params;           /* a codec for keys; dim over 512 is cut into equal parts, each coded by itself */
    int         dim, page_rows, metric;
    int         keep;                      /* originals: KV_F32, KV_F16 or -1, for re-ranking */
    int         centre, reserved;          /* centre 1: the training rows' mean is removed before coding */
} kv_index_config;
typedef struct kv_index_info {
    const char *family, *params, *metric;
    int         dim, page_rows, keep, centre, n_parts, granule;
    int         n_rows, n_live;            /* vectors ever added, those not removed */
    int         fused, mapped;
    double      vector_bytes;              /* a vector's share of a page: all but originals */
} kv_index_info;
/* train: f32 [n, dim] for calibrated tables and the mean; may be NULL where neither is needed. */
int  kv_index_new(kv_index **out, const kv_index_config *cfg, const kv_tensor *train);
/* x: f32 [n, dim], numbered *first, *first + 1, ... for good.  NaN or inf is KV_E_ARG, and nothing is added. */
int  kv_index_add(kv_index *ix, const kv_tensor *x, int *first);
int  kv_index_remove(kv_index *ix, const int32_t *ids, int n, int *n_removed);       /* those removed before are not counted */
/* score f32 and ids i32, both [n_queries, k], best first: ip and cosine falling, l2 squared distances rising; equal scores by
 * number.  Where there are fewer than k: id -1, score -inf (l2: inf).  rerank r > 0: the k best of r k by their originals. */
int  kv_index_search(const kv_index *ix, const kv_tensor *queries, int k, int rerank, int fused, kv_tensor *score, kv_tensor *ids);
int  kv_index_decode(const kv_index *ix, int first, int last, kv_tensor *dst);       /* f32 [last - first, dim]; with cosine of length about 1 */
int  kv_index_bytes(const kv_index *ix, kv_bytes *out);
int  kv_index_get_info(const kv_index *ix, kv_index_info *out);
/* A loaded index lies in its mapped file, each page held against its checksum at its first use, and can be added to. */
int  kv_index_save(const kv_index *ix, const char *path, const char *stage, int level);
int  kv_index_load(kv_index **out, const char *path);
void kv_index_free(kv_index *ix);

/* ---- line editing, pull-style over libedit ----------------------------------------------------------------------- */

int         kv_edit_available(void);                              /* 1 on a terminal with libedit linked in */
/* One line.  Returns 1 with the line in kv_edit_text(), 0 at end of input, -1 after Ctrl-C. */
int         kv_edit_line(const char *prompt);
const char *kv_edit_text(void);
void        kv_edit_history_add(const char *line);
int         kv_edit_history_load(const char *path);
int         kv_edit_history_save(const char *path);
/* Completion is data, not a callback: the whole list of candidates, '\n'-separated, for words as they are typed. */
void        kv_edit_words(const char *words);
int         kv_isatty(int fd);
int         kv_term_width(void);

/* ---- devices ------------------------------------------------------------------------------------------------------ */

typedef struct kv_device_info {
    const char *name, *reason;             /* reason: why it is not there, "" when it is */
    int         available, n_devices, sm, abi, driver, runtime;
    double      memory_bytes;
    const char *plugin;                    /* path of the plugin, or "" */
} kv_device_info;
int  kv_device_query(const char *device, kv_device_info *out);    /* "cpu", "cuda", "cuda:1" */
/* Sign flip then orthonormal FWHT of rows, on a device: x is host memory [n_rows, n]; the result is copied back. */
int  kv_device_hadamard(const char *device, float *x, const float *sign, int n_rows, int n);
/* The device's own measurements (kernels/bench.cu): cases, one a line, in turns; json takes one object a line. */
int  kv_device_bench(const char *device, const char *cases, int repeats, char *json, int json_cap);
/* @cdef-end */
#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
