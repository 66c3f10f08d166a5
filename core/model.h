/* model.h -- weights, the forward pass and what shares it.  Not part of the public header. */
#ifndef KV_MODEL_H
#define KV_MODEL_H
#include "cache.h"

/* ---- GGUF (gguf.c): a memory-mapped file, every count and offset checked before use */
typedef struct kv_gguf kv_gguf;
typedef struct kv_gguf_tensor { const char *name; int type, n_dims; int64_t dim[4]; const uint8_t *data; size_t n_bytes; } kv_gguf_tensor;
enum { KV_GGUF_U8, KV_GGUF_I8, KV_GGUF_U16, KV_GGUF_I16, KV_GGUF_U32, KV_GGUF_I32, KV_GGUF_F32, KV_GGUF_BOOL, KV_GGUF_STR, KV_GGUF_ARR, KV_GGUF_U64, KV_GGUF_I64, KV_GGUF_F64 };
int    kv_gguf_open(kv_gguf **out, const char *path);
int    kv_gguf_parse(kv_gguf **out, const uint8_t *data, size_t n, const char *what);   /* over memory the caller keeps (fuzzing) */
void   kv_gguf_close(kv_gguf *g);
size_t kv_gguf_file_bytes(const kv_gguf *g);
int    kv_gguf_n_tensors(const kv_gguf *g);
const kv_gguf_tensor *kv_gguf_tensor_at(const kv_gguf *g, int i);
const kv_gguf_tensor *kv_gguf_find(const kv_gguf *g, const char *name);                 /* NULL if absent */
int    kv_gguf_n_keys(const kv_gguf *g);
const char *kv_gguf_key_at(const kv_gguf *g, int i);
const char *kv_gguf_value_text(const kv_gguf *g, int i);   /* printable form, arrays abridged; owned by g */
/* Numbers of any integer, float or bool type, as a double.  Absent: returns 0 and leaves *v. */
int    kv_gguf_number(const kv_gguf *g, const char *key, double *v);
int    kv_gguf_string(const kv_gguf *g, const char *key, const char **s, size_t *n);    /* not NUL-terminated */
/* Arrays: element type and count, 0 if absent; elements by index. */
int    kv_gguf_array(const kv_gguf *g, const char *key, int *type, size_t *n);
int    kv_gguf_array_number(const kv_gguf *g, const char *key, size_t i, double *v);
/* All strings of an array in order, pointers into the file. */
int    kv_gguf_array_strings(const kv_gguf *g, const char *key, const char ***s, uint32_t **len, size_t *n);   /* caller kv_free()s both */

/* ---- weight formats (weights.c, weights_simd.c): ggml's block types */
enum { KV_W_F32 = 0, KV_W_F16 = 1, KV_W_Q4_0 = 2, KV_W_Q4_1 = 3, KV_W_Q5_0 = 6, KV_W_Q5_1 = 7, KV_W_Q8_0 = 8,
       KV_W_Q2_K = 10, KV_W_Q3_K = 11, KV_W_Q4_K = 12, KV_W_Q5_K = 13, KV_W_Q6_K = 14, KV_W_BF16 = 30 };
typedef struct kv_weight {                 /* y = W x, row-major: row r is n_in values in blocks */
    int            type;
    int64_t        n_in, n_out;
    size_t         row_bytes;
    const uint8_t *data;
    uint8_t       *owned;                  /* when rows were permuted at load; else NULL */
    uint8_t       *panels;                 /* the decode step's order (panels.c), made by kv_weight_pack; else NULL */
} kv_weight;
const char *kv_weight_type_name(int type);                 /* NULL if unknown */
int    kv_weight_block(int type, int *block, int *bytes);  /* values and bytes of a block; 0 if unknown */
void   kv_weight_rows(const kv_weight *w, int64_t row0, int64_t n_rows, float *dst);    /* dequantize, dst [n_rows][n_in] */
/* Decode activations: 16-bit fixed point per 32 values beside the f32 values, so that decode agrees with prefill to rounding. */
typedef struct kv_act { int64_t n; float *x; int16_t *q; float *scale, *sum; void *extra; size_t cap; } kv_act;
int    kv_act_reserve(kv_act *a, int64_t n);
void   kv_act_set(kv_act *a, const float *x, int64_t n);   /* after reserve */
void   kv_act_free(kv_act *a);
bool   kv_weight_pack(kv_weight *w);                       /* repack for kv_matvec, where the type allows it; false: out of memory */
void   kv_matvec(const kv_weight *w, const kv_act *a, int64_t row0, int64_t row1, float *y);  /* y[row0..row1), one thread */

/* ---- matrix products of prefill (gemm.c) */
/* C[m][n] (ldc) = A[m][k] (lda) * B[n][k]^T (ldb) (+ C when accumulate), one thread: OpenBLAS. */
void   kv_sgemm_nt(int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
void   kv_sgemm_nn(int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
void   kv_blas_single_thread(void);                        /* once, before any other call into OpenBLAS: our threads are enough */
/* y[l][n][n_out] = x[l][n][n_in] W^T + bias for every product and lane l; weights are dequantized once for all lanes; all
 * threads.  The products have the same n_in.  The result does not depend on the number of products, lanes or threads.
 * KV_E_NOMEM is its only failure. */
enum { KV_MAX_PRODUCTS = 4 };
typedef struct kv_product { const kv_weight *w; const float *bias /* or NULL */; float *const *y; } kv_product;
int    kv_linear(const kv_product *p, int n_products, int n_lanes, int n, const float *const *x);

/* ---- the model (model.c) */
typedef struct kv_layer {
    kv_weight wq, wk, wv, wo, w_gate, w_up, w_down;
    float *bq, *bk, *bv, *bo, *b_gate, *b_up, *b_down;     /* or NULL */
    float *attn_norm, *ffn_norm, *q_norm, *k_norm, *post_attn_norm, *post_ffn_norm;   /* or NULL */
    float scale, softcap;
} kv_layer;
enum { KV_ACT_SILU = 0, KV_ACT_GELU_TANH = 1 };
typedef struct kv_tokenizer kv_tokenizer;
typedef struct kv_device_model kv_device_model;            /* device_model.h */
struct kv_model {
    atomic_int    refs, packed;
    kv_gguf      *gguf;
    kv_model_info info;
    kv_geometry   geo;
    kv_layer     *layer;
    kv_weight     embed, head;
    float        *out_norm;
    float         embed_scale, final_softcap;
    int           activation;
    kv_tokenizer *tok;
    kv_device_model *dev;                                  /* NULL: on the CPU */
    void         *owned;                                   /* rope tables and texts */
};
kv_model *kv_model_ref(kv_model *m);
const char *kv_device_model_name(const kv_device_model *d);
void      kv_device_model_free(kv_device_model *d);
int       kv_device_tap(kv_model *m, const int32_t *tokens, int n, int layer, float *const to[5] /* q, q_pre, k, k_pre, v */);
void      kv_model_pack(kv_model *m);                      /* panels of every weight, once; before the first decode step */

/* ---- the forward pass (forward.c): n tokens through all layers, several lanes in lockstep sharing weight reads */
typedef struct kv_forward kv_forward;
/* A lane is one sequence's cache.  All lanes get the same tokens at the same positions. */
int  kv_forward_new(kv_forward **out, kv_model *m, int n_lanes, int max_n);
void kv_forward_free(kv_forward *f);
int  kv_forward_begin(kv_forward *f, kv_cache **caches, const int32_t *tokens, int n);
int  kv_forward_layer(kv_forward *f, int *more);           /* one layer of all lanes; *more 0 after the last, caches committed */
/* Hidden states after the final norm: [n][n_embd] of a lane. */
const float *kv_forward_hidden(const kv_forward *f, int lane);
/* Called for each layer with Q, K, V of each lane before attention, when set (taps, calibration). */
typedef void (*kv_tap_fn)(void *ctx, int lane, int layer, int n, const float *q_pre, const float *q, const float *k_pre, const float *k, const float *v);
void kv_forward_tap(kv_forward *f, kv_tap_fn fn, void *ctx);
/* Logits of rows of hidden states: y[n][n_vocab], soft cap applied; all threads.  n = 1 uses the decode kernels. */
int  kv_logits(const kv_model *m, const float *hidden, int n, float *logits);

/* ---- tokenizer (tokenizer.c) */
int  kv_tokenizer_new(kv_tokenizer **out, const kv_gguf *g);
void kv_tokenizer_free(kv_tokenizer *t);
const char *kv_tokenizer_name(const kv_tokenizer *t);      /* "bpe smollm", "spm" */
const char *kv_tokenizer_template(const kv_tokenizer *t);  /* "chatml", "llama3", "gemma", "none" */
void kv_tokenizer_special(const kv_tokenizer *t, int *bos, int *eos, int *add_bos);
int  kv_tokenizer_n_vocab(const kv_tokenizer *t);
const kv_model *kv_session_model(const kv_session *s);
#endif
