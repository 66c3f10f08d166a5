/* model.c -- from a GGUF file to a model: names, shapes and numbers checked, weights left where they are mapped.
 *
 * One table of architectures says what differs.  GGUFs of the Llama architecture hold the rows of Wq and Wk with RoPE
 * pairs next to each other (2i, 2i+1); they are put back into half-split order (i, i + n_rot/2) here, by permuting rows,
 * so that everything above this file sees keys as transformers and the published codecs do. */
#include <math.h>
#include <stdio.h>
#include <pthread.h>
#include "device_model.h"
#include "model.h"

typedef struct arch {
    const char *name;
    int   interleaved;        /* Wq and Wk rows hold RoPE pairs side by side */
    int   qkv_bias;           /* 1: must be there */
    int   qk_norm;
    int   post_norm;          /* norms after attention and after the feed-forward */
    int   scaled_embed;       /* embeddings times sqrt(n_embd) */
    int   activation;
    /* What a file may leave unsaid */
    int   global_every;       /* 0: all layers global; n: layer l is global when (l + 1) % n == 0 */
    int   window;             /* of sliding layers; 0: without a word, there are none */
    double local_rope_base;   /* of sliding layers, which then have no RoPE scaling; 0: as the global ones */
    double score_cap, logit_cap;
} arch;

static const arch archs[] = {
    { "llama",  1, 0, 0, 0, 0, KV_ACT_SILU,      0, 0,    0,       0,  0 },
    { "qwen2",  0, 1, 0, 0, 0, KV_ACT_SILU,      0, 0,    0,       0,  0 },
    { "qwen3",  0, 0, 1, 0, 0, KV_ACT_SILU,      0, 0,    0,       0,  0 },
    { "gemma2", 0, 0, 0, 1, 1, KV_ACT_GELU_TANH, 2, 4096, 0,       50, 30 },
    { "gemma3", 0, 0, 1, 1, 1, KV_ACT_GELU_TANH, 6, 0,    10000.0, 0,  0 },
};
enum { N_ARCHS = sizeof archs / sizeof *archs, MAX_LAYERS = 1024 };

typedef struct owned {        /* what the model allocates besides its layers */
    char     arch[32], name[128], weight_type[32], path[4096];
    double  *freq;            /* [2][n_rot/2]: global, then local */
    kv_rope *rope;
    int     *sliding;
    double   local_base, amplitude;   /* amplitude: YaRN's, of queries and of keys */
} owned;

/* ---- reading with checks */

typedef struct loader { kv_model *m; const kv_gguf *g; const arch *a; const char *path; bool *taken; /* tensors, by their place in the file */ } loader;

static int get_number(const loader *ld, const char *key, double lo, double hi, double *v)   /* 1 read, 0 absent, < 0 error */
{
    char full[96];
    snprintf(full, sizeof full, "%s.%s", ld->a->name, key);
    if (!kv_gguf_number(ld->g, full, v)) return 0;
    RETURN_ERROR_IF(!(*v >= lo && *v <= hi), KV_E_CORRUPT, "%s: %s=%g is outside %g..%g", ld->path, full, *v, lo, hi);
    return 1;
}

static int need_int(const loader *ld, const char *key, int lo, int hi, int *out)
{
    double v;
    const int got = get_number(ld, key, lo, hi, &v);
    if (got < 0) return got;
    RETURN_ERROR_IF(!got, KV_E_CORRUPT, "%s: %s.%s is missing or not a number", ld->path, ld->a->name, key);
    RETURN_ERROR_IF(v != floor(v), KV_E_CORRUPT, "%s: %s.%s=%g is not an integer", ld->path, ld->a->name, key, v);
    *out = (int)v;
    return KV_OK;
}

static int opt_number(const loader *ld, const char *key, double lo, double hi, double def, double *out)
{
    *out = def;
    const int got = get_number(ld, key, lo, hi, out);
    if (got == 0) *out = def;
    return got < 0 ? got : KV_OK;
}

static int load_weight(const loader *ld, const char *name, int64_t n_in, int64_t n_out, kv_weight *w)
{
    const kv_gguf_tensor *t = kv_gguf_find(ld->g, name);
    RETURN_ERROR_IF(!t, KV_E_CORRUPT, "%s: tensor '%s' is missing", ld->path, name);
    int block, bytes;
    RETURN_ERROR_IF(!kv_weight_block(t->type, &block, &bytes), KV_E_UNSUPPORTED, "%s: tensor '%s' has type %d, which is not supported", ld->path, name, t->type);
    const int64_t rows = t->n_dims > 1 ? t->dim[1] : 1;
    RETURN_ERROR_IF(t->n_dims > 2 || t->dim[0] != n_in || rows != n_out, KV_E_CORRUPT,
        "%s: tensor '%s' is %lld x %lld, expected %lld x %lld", ld->path, name, (long long)t->dim[0], (long long)rows, (long long)n_in, (long long)n_out);
    RETURN_ERROR_IF(n_in % block, KV_E_CORRUPT, "%s: tensor '%s' has rows of %lld values, not a multiple of %d (%s)", ld->path, name, (long long)n_in, block, kv_weight_type_name(t->type));
    *w = (kv_weight){ .type = t->type, .n_in = n_in, .n_out = n_out, .row_bytes = (size_t)(n_in / block) * (size_t)bytes, .data = t->data };
    ld->taken[t - kv_gguf_tensor_at(ld->g, 0)] = true;
    RETURN_ERROR_IF(t->n_bytes / w->row_bytes < (size_t)n_out, KV_E_CORRUPT, "%s: tensor '%s' has %zu bytes, needs %lld rows of %zu", ld->path, name, t->n_bytes, (long long)n_out, w->row_bytes);
    return KV_OK;
}

/* A vector as f32 in memory of its own; absent and optional: NULL. */
static int load_vector(const loader *ld, const char *name, int64_t n, bool optional, float **out)
{
    *out = NULL;
    if (optional && !kv_gguf_find(ld->g, name)) return KV_OK;
    kv_weight w;
    FORWARD_IF_ERROR(load_weight(ld, name, n, 1, &w));
    if (!(*out = kv_alloc_array((size_t)n, sizeof(float), false))) return KV_E_NOMEM;
    kv_weight_rows(&w, 0, 1, *out);
    for (int64_t i = 0; i < n; i++)
        if (!isfinite((*out)[i])) {
            const double bad = (*out)[i];
            kv_free(*out);
            *out = NULL;
            return kv_set_error(KV_E_CORRUPT, "%s: tensor '%s' holds %g at %lld", ld->path, name, bad, (long long)i);
        }
    return KV_OK;
}

/* ---- half-split order */

static int64_t interleaved_row(int64_t r, int head_dim, int n_rot)      /* where half-split row r lies in the file */
{
    const int64_t in_head = r % head_dim, head = r - in_head, half = n_rot / 2;
    return in_head < n_rot ? head + 2 * (in_head % half) + in_head / half : r;
}

static int unpair_rows(kv_weight *w, int head_dim, int n_rot)
{
    if (!(w->owned = kv_alloc_array((size_t)w->n_out, w->row_bytes, false))) return KV_E_NOMEM;
    for (int64_t r = 0; r < w->n_out; r++)
        memcpy(w->owned + (size_t)r * w->row_bytes, w->data + (size_t)interleaved_row(r, head_dim, n_rot) * w->row_bytes, w->row_bytes);
    w->data = w->owned;
    return KV_OK;
}

static int unpair_vector(float *v, int64_t n, int head_dim, int n_rot)
{
    if (!v) return KV_OK;
    float *copy = kv_alloc_array((size_t)n, sizeof(float), false);
    if (!copy) return KV_E_NOMEM;
    memcpy(copy, v, (size_t)n * sizeof(float));
    for (int64_t r = 0; r < n; r++) v[r] = copy[interleaved_row(r, head_dim, n_rot)];
    kv_free(copy);
    return KV_OK;
}

/* ---- pieces */

static int load_shape(loader *ld)
{
    kv_model_info *s = &ld->m->info;
    FORWARD_IF_ERROR(need_int(ld, "block_count", 1, MAX_LAYERS, &s->n_layers));
    FORWARD_IF_ERROR(need_int(ld, "embedding_length", 8, 1 << 17, &s->n_embd));
    FORWARD_IF_ERROR(need_int(ld, "feed_forward_length", 8, 1 << 20, &s->n_ff));
    FORWARD_IF_ERROR(need_int(ld, "context_length", 1, 1 << 28, &s->n_ctx_train));
    FORWARD_IF_ERROR(need_int(ld, "attention.head_count", 1, 1024, &s->n_heads));
    s->n_kv_heads = s->n_heads;
    double v;
    FORWARD_IF_ERROR(opt_number(ld, "attention.head_count_kv", 1, 1024, s->n_heads, &v));
    s->n_kv_heads = (int)v;
    RETURN_ERROR_IF(s->n_heads % s->n_kv_heads || s->n_heads / s->n_kv_heads > KV_MAX_GROUP, KV_E_UNSUPPORTED,
        "%s: %d query heads over %d K/V heads is not a whole group of 1..%d", ld->path, s->n_heads, s->n_kv_heads, KV_MAX_GROUP);
    FORWARD_IF_ERROR(opt_number(ld, "attention.key_length", 2, KV_MAX_HEAD_DIM, s->n_embd / s->n_heads, &v));
    s->head_dim = (int)v;
    RETURN_ERROR_IF(s->head_dim < 2 || s->head_dim > KV_MAX_HEAD_DIM || s->head_dim % 2, KV_E_UNSUPPORTED, "%s: head_dim=%d is not an even number in 2..%d", ld->path, s->head_dim, KV_MAX_HEAD_DIM);
    FORWARD_IF_ERROR(opt_number(ld, "attention.value_length", 2, KV_MAX_HEAD_DIM, s->head_dim, &v));
    RETURN_ERROR_IF((int)v != s->head_dim, KV_E_UNSUPPORTED, "%s: value_length=%g differs from key_length=%d", ld->path, v, s->head_dim);
    FORWARD_IF_ERROR(opt_number(ld, "rope.dimension_count", 0, s->head_dim, s->head_dim, &v));
    s->n_rot = (int)v;
    RETURN_ERROR_IF(s->n_rot % 2, KV_E_CORRUPT, "%s: rope.dimension_count=%d is odd", ld->path, s->n_rot);
    FORWARD_IF_ERROR(opt_number(ld, "rope.freq_base", 1, 1e12, 10000, &s->rope_base));
    FORWARD_IF_ERROR(opt_number(ld, "attention.layer_norm_rms_epsilon", 0, 1, 1e-5, &s->norm_eps));
    const kv_gguf_tensor *e = kv_gguf_find(ld->g, "token_embd.weight");
    RETURN_ERROR_IF(!e || e->n_dims != 2, KV_E_CORRUPT, "%s: tensor 'token_embd.weight' is missing or not a matrix", ld->path);
    RETURN_ERROR_IF(e->dim[1] < 1 || e->dim[1] > 1 << 24, KV_E_CORRUPT, "%s: vocabulary of %lld tokens is outside 1..%d", ld->path, (long long)e->dim[1], 1 << 24);
    s->n_vocab = (int)e->dim[1];
    return KV_OK;
}

/* RoPE scaling.  factor: what 1 / frequency is multiplied by; linear scaling is also what a factor without a type means, under its
 * old name too.  YaRN (arXiv 2309.00071): frequencies that turn more than beta_fast times in the original context stay, those that
 * turn less than beta_slow times are divided by the factor, a ramp lies between; queries and keys grow by 1 + 0.1 ln factor. */
typedef struct scaling { double factor, low, high /* of YaRN's ramp, in frequencies; low < 0: none */, amplitude; } scaling;

static int yarn(const loader *ld, scaling *to)
{
    const kv_model_info *s = &ld->m->info;
    double context, fast, slow, attention;
    FORWARD_IF_ERROR(opt_number(ld, "rope.scaling.factor", 1, 1e6, 1, &to->factor));
    FORWARD_IF_ERROR(opt_number(ld, "rope.scaling.original_context_length", 1, 1e9, s->n_ctx_train > 0 ? s->n_ctx_train : 4096, &context));
    FORWARD_IF_ERROR(opt_number(ld, "rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32, &fast));
    FORWARD_IF_ERROR(opt_number(ld, "rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1, &slow));
    FORWARD_IF_ERROR(opt_number(ld, "rope.scaling.attn_factor", 1e-3, 1e3, 1, &attention));
    RETURN_ERROR_IF(!(s->rope_base > 1), KV_E_UNSUPPORTED, "%s: rope scaling 'yarn' with rope.freq_base=%g", ld->path, s->rope_base);
    const double per_ln = s->n_rot / (2 * log(s->rope_base)), turn = context / (2 * M_PI);
    to->low = fmin(fmax(floor(per_ln * log(turn / fast)), 0), s->n_rot - 1);
    to->high = fmin(fmax(ceil(per_ln * log(turn / slow)), 0), s->n_rot - 1);
    to->amplitude = attention * (1 + 0.1 * log(to->factor));
    return KV_OK;
}

static int rope_scaling(const loader *ld, scaling *to)
{
    const char *type = "linear";
    size_t len = 6;
    char key[96];
    *to = (scaling){ .factor = 1, .low = -1, .amplitude = 1 };
    snprintf(key, sizeof key, "%s.rope.scaling.type", ld->a->name);
    kv_gguf_string(ld->g, key, &type, &len);
    if (len == 4 && !memcmp(type, "none", 4)) return KV_OK;
    if (len == 4 && !memcmp(type, "yarn", 4)) return yarn(ld, to);
    RETURN_ERROR_IF(len != 6 || memcmp(type, "linear", 6), KV_E_UNSUPPORTED, "%s: rope scaling '%.*s' is not supported (allowed: none, linear, yarn, Llama 3's factors)", ld->path, (int)kv_min64((int64_t)len, 40), type);
    FORWARD_IF_ERROR(opt_number(ld, "rope.scale_linear", 1, 1e6, 1, &to->factor));
    return opt_number(ld, "rope.scaling.factor", 1, 1e6, to->factor, &to->factor);
}

/* What frequency i is divided by. */
static double divisor(const scaling *s, int i)
{
    if (s->low < 0) return s->factor;
    const double stays = 1 - fmin(fmax((i - s->low) / fmax(s->high - s->low, 0.001), 0), 1);
    return 1 / (stays + (1 - stays) / s->factor);
}

/* The window of each layer, 0 where it is global: by the file's list of sliding layers, by its period, or the family's. */
static int load_windows(const loader *ld, int *window)
{
    double size, every, sliding;
    char key[96];
    int type;
    size_t n = 0;
    FORWARD_IF_ERROR(opt_number(ld, "attention.sliding_window", 0, 1 << 28, ld->a->window, &size));
    if (!ld->a->global_every || size < 1) return KV_OK;
    const int n_layers = ld->m->info.n_layers;
    snprintf(key, sizeof key, "%s.attention.sliding_window_pattern", ld->a->name);
    const bool listed = kv_gguf_array(ld->g, key, &type, &n);
    RETURN_ERROR_IF(listed && n < (size_t)n_layers, KV_E_CORRUPT, "%s: %s has %zu entries for %d layers", ld->path, key, n, n_layers);
    FORWARD_IF_ERROR(opt_number(ld, "attention.sliding_window_pattern", 0, MAX_LAYERS, ld->a->global_every, &every));
    for (int l = 0; l < n_layers; l++) {
        sliding = every < 1 || (l + 1) % (int)every != 0;
        if (listed) kv_gguf_array_number(ld->g, key, (size_t)l, &sliding);
        if (sliding != 0) window[l] = (int)size;
    }
    return KV_OK;
}

/* Frequencies in double; positions times frequencies are exact to 1e-10 at a million tokens. */
static int load_rope(loader *ld)
{
    kv_model *m = ld->m;
    owned *o = m->owned;
    const kv_model_info *s = &m->info;
    const int half = s->n_rot / 2;
    const bool own_base = ld->a->local_rope_base > 0;
    scaling scaled;
    FORWARD_IF_ERROR(rope_scaling(ld, &scaled));
    RETURN_ERROR_IF(scaled.amplitude != 1 && s->n_rot != s->head_dim, KV_E_UNSUPPORTED, "%s: rope scaling 'yarn' of %d of %d channels", ld->path, s->n_rot, s->head_dim);
    o->amplitude = scaled.amplitude;
    FORWARD_IF_ERROR(opt_number(ld, "rope.freq_base_swa", 1, 1e12, own_base ? ld->a->local_rope_base : s->rope_base, &o->local_base));
    o->freq = kv_alloc_array((size_t)kv_max(half, 1) * 2, sizeof *o->freq, true);
    o->rope = kv_alloc_array((size_t)s->n_layers, sizeof *o->rope, true);
    o->sliding = kv_alloc_array((size_t)s->n_layers, sizeof *o->sliding, true);
    if (!o->freq || !o->rope || !o->sliding) return KV_E_NOMEM;
    FORWARD_IF_ERROR(load_windows(ld, o->sliding));

    float *divide = NULL;                     /* Llama 3's frequency factors */
    FORWARD_IF_ERROR(load_vector(ld, "rope_freqs.weight", kv_max(half, 1), true, &divide));
    for (int i = 0; i < half; i++) {
        const double by = divisor(&scaled, i) * (divide && divide[i] > 0 ? divide[i] : 1), power = -2.0 * i / s->n_rot;
        o->freq[i] = pow(s->rope_base, power) / by;
        o->freq[half + i] = pow(o->local_base, power) / (own_base ? 1 : by);
    }
    kv_free(divide);
    for (int l = 0; l < s->n_layers; l++) o->rope[l] = (kv_rope){ s->n_rot, o->sliding[l] ? o->freq + half : o->freq };
    m->geo = (kv_geometry){ s->n_layers, s->n_heads, s->n_kv_heads, s->head_dim, o->rope, o->sliding };
    return KV_OK;
}

static int load_layer(loader *ld, int l)
{
    kv_model *m = ld->m;
    const kv_model_info *s = &m->info;
    kv_layer *y = &m->layer[l];
    const int64_t e = s->n_embd, d = s->head_dim, nq = (int64_t)s->n_heads * d, nk = (int64_t)s->n_kv_heads * d;
    char name[64];
#define NAME(suffix) (snprintf(name, sizeof name, "blk.%d." suffix, l), name)
    FORWARD_IF_ERROR(load_weight(ld, NAME("attn_q.weight"), e, nq, &y->wq));
    FORWARD_IF_ERROR(load_weight(ld, NAME("attn_k.weight"), e, nk, &y->wk));
    FORWARD_IF_ERROR(load_weight(ld, NAME("attn_v.weight"), e, nk, &y->wv));
    FORWARD_IF_ERROR(load_weight(ld, NAME("attn_output.weight"), nq, e, &y->wo));
    FORWARD_IF_ERROR(load_weight(ld, NAME("ffn_gate.weight"), e, s->n_ff, &y->w_gate));
    FORWARD_IF_ERROR(load_weight(ld, NAME("ffn_up.weight"), e, s->n_ff, &y->w_up));
    FORWARD_IF_ERROR(load_weight(ld, NAME("ffn_down.weight"), s->n_ff, e, &y->w_down));
    FORWARD_IF_ERROR(load_vector(ld, NAME("attn_norm.weight"), e, false, &y->attn_norm));
    FORWARD_IF_ERROR(load_vector(ld, NAME("ffn_norm.weight"), e, false, &y->ffn_norm));
    FORWARD_IF_ERROR(load_vector(ld, NAME("attn_q.bias"), nq, !ld->a->qkv_bias, &y->bq));
    FORWARD_IF_ERROR(load_vector(ld, NAME("attn_k.bias"), nk, !ld->a->qkv_bias, &y->bk));
    FORWARD_IF_ERROR(load_vector(ld, NAME("attn_v.bias"), nk, !ld->a->qkv_bias, &y->bv));
    FORWARD_IF_ERROR(load_vector(ld, NAME("attn_output.bias"), e, true, &y->bo));
    FORWARD_IF_ERROR(load_vector(ld, NAME("ffn_gate.bias"), s->n_ff, true, &y->b_gate));
    FORWARD_IF_ERROR(load_vector(ld, NAME("ffn_up.bias"), s->n_ff, true, &y->b_up));
    FORWARD_IF_ERROR(load_vector(ld, NAME("ffn_down.bias"), e, true, &y->b_down));
    if (ld->a->qk_norm) {
        FORWARD_IF_ERROR(load_vector(ld, NAME("attn_q_norm.weight"), d, false, &y->q_norm));
        FORWARD_IF_ERROR(load_vector(ld, NAME("attn_k_norm.weight"), d, false, &y->k_norm));
    }
    if (ld->a->post_norm) {
        FORWARD_IF_ERROR(load_vector(ld, NAME("post_attention_norm.weight"), e, false, &y->post_attn_norm));
        FORWARD_IF_ERROR(load_vector(ld, NAME("post_ffw_norm.weight"), e, false, &y->post_ffn_norm));
    }
#undef NAME
    if (ld->a->interleaved && s->n_rot) {
        FORWARD_IF_ERROR(unpair_rows(&y->wq, s->head_dim, s->n_rot));
        FORWARD_IF_ERROR(unpair_rows(&y->wk, s->head_dim, s->n_rot));
        FORWARD_IF_ERROR(unpair_vector(y->bq, nq, s->head_dim, s->n_rot));
        FORWARD_IF_ERROR(unpair_vector(y->bk, nk, s->head_dim, s->n_rot));
    }
    if (y->bk) m->info.has_kv_bias = 1;
    return KV_OK;
}

/* Gemma's two largest scale queries by another width than head_dim: 2 27B (46 layers) and 3 27B (62 layers). */
static double attention_scale(const kv_model_info *s)
{
    const bool wide = (!strcmp(s->arch, "gemma3") && s->n_layers == 62) || (!strcmp(s->arch, "gemma2") && s->n_layers == 46);
    return 1 / sqrt(wide ? (double)s->n_embd / s->n_heads : (double)s->head_dim);
}

static void describe(loader *ld)
{
    kv_model *m = ld->m;
    owned *o = m->owned;
    kv_model_info *s = &m->info;
    size_t by_type[64] = { 0 }, best = 0, len;
    const char *text;
    for (int i = 0; i < kv_gguf_n_tensors(ld->g); i++) {
        const kv_gguf_tensor *t = kv_gguf_tensor_at(ld->g, i);
        double n = 1;
        for (int k = 0; k < t->n_dims; k++) n *= (double)t->dim[k];
        s->n_params += n;
        s->weight_bytes += (double)t->n_bytes;
        /* the embedding is often kept wider than the rest: it does not name the file */
        if (t->type >= 0 && t->type < 64 && strcmp(t->name, "token_embd.weight")) by_type[t->type] += t->n_bytes;
    }
    for (int i = 0; i < 64; i++)
        if (by_type[i] > best) {
            best = by_type[i];
            const char *type = kv_weight_type_name(i);
            snprintf(o->weight_type, sizeof o->weight_type, "%s", type ? type : "unknown");
        }
    if (kv_gguf_string(ld->g, "general.name", &text, &len)) snprintf(o->name, sizeof o->name, "%.*s", (int)kv_min64((int64_t)len, 120), text);
    snprintf(o->path, sizeof o->path, "%s", ld->path);
    s->path = o->path;
    s->name = o->name;
    s->weight_type = o->weight_type;
    s->file_bytes = (double)kv_gguf_file_bytes(ld->g);
    s->tokenizer = kv_tokenizer_name(m->tok);
    s->chat_template = kv_tokenizer_template(m->tok);
    kv_tokenizer_special(m->tok, &s->bos, &s->eos, &s->add_bos);
}

static int load(loader *ld)
{
    kv_model *m = ld->m;
    owned *o = m->owned;
    const char *name;
    size_t len;
    RETURN_ERROR_IF(!kv_gguf_string(ld->g, "general.architecture", &name, &len), KV_E_CORRUPT, "%s: general.architecture is missing", ld->path);
    for (int i = 0; i < N_ARCHS; i++)
        if (strlen(archs[i].name) == len && !memcmp(archs[i].name, name, len)) ld->a = &archs[i];
    RETURN_ERROR_IF(!ld->a, KV_E_UNSUPPORTED, "%s: architecture '%.*s' is not supported (allowed: llama, qwen2, qwen3, gemma2, gemma3)", ld->path, (int)kv_min64((int64_t)len, 40), name);
    snprintf(o->arch, sizeof o->arch, "%s", ld->a->name);
    m->info.arch = o->arch;
    FORWARD_IF_ERROR(load_shape(ld));
    FORWARD_IF_ERROR(load_rope(ld));
    const kv_model_info *s = &m->info;
    if (!(m->layer = kv_alloc_array((size_t)s->n_layers, sizeof *m->layer, true))) return KV_E_NOMEM;
    double softcap;
    FORWARD_IF_ERROR(opt_number(ld, "attn_logit_softcapping", 0, 1e6, ld->a->score_cap, &softcap));
    for (int l = 0; l < s->n_layers; l++) {
        FORWARD_IF_ERROR(load_layer(ld, l));
        /* Scores take both amplitudes; keys stay rotations of what they were, which undoing RoPE and page-relative RoPE rely on. */
        m->layer[l].scale = (float)(attention_scale(s) * ((owned *)m->owned)->amplitude * ((owned *)m->owned)->amplitude);
        m->layer[l].softcap = (float)softcap;
    }
    FORWARD_IF_ERROR(opt_number(ld, "final_logit_softcapping", 0, 1e6, ld->a->logit_cap, &softcap));
    m->final_softcap = (float)softcap;
    m->activation = ld->a->activation;
    m->embed_scale = ld->a->scaled_embed ? (float)sqrt((double)s->n_embd) : 1;
    FORWARD_IF_ERROR(load_weight(ld, "token_embd.weight", s->n_embd, s->n_vocab, &m->embed));
    if (kv_gguf_find(ld->g, "output.weight")) FORWARD_IF_ERROR(load_weight(ld, "output.weight", s->n_embd, s->n_vocab, &m->head));
    else m->head = m->embed;
    FORWARD_IF_ERROR(load_vector(ld, "output_norm.weight", s->n_embd, false, &m->out_norm));
    FORWARD_IF_ERROR(kv_tokenizer_new(&m->tok, ld->g));
    RETURN_ERROR_IF(kv_tokenizer_n_vocab(m->tok) > s->n_vocab, KV_E_CORRUPT, "%s: tokenizer has %d tokens, the embedding only %d", ld->path, kv_tokenizer_n_vocab(m->tok), s->n_vocab);
    /* A tensor that nothing here reads is a part of the model that would be left out without a word. */
    for (int i = 0; i < kv_gguf_n_tensors(ld->g); i++)
        RETURN_ERROR_IF(!ld->taken[i], KV_E_UNSUPPORTED, "%s: tensor '%s' is not part of architecture '%s' as it is known here", ld->path, kv_gguf_tensor_at(ld->g, i)->name, ld->a->name);
    describe(ld);
    return KV_OK;
}

/* ---- public */

int kv_model_open(kv_model **out, const char *path)
{
    RETURN_ERROR_IF(!out || !path, KV_E_ARG, "kv_model_open: NULL argument");
    *out = NULL;
    kv_model *m = kv_zalloc(sizeof *m);
    if (!m) return KV_E_NOMEM;
    atomic_init(&m->refs, 1);
    int status = KV_E_NOMEM;
    loader ld = { .m = m, .path = path };
    if (!(m->owned = kv_zalloc(sizeof(owned)))) goto fail;
    FAIL_IF_ERROR(kv_gguf_open(&m->gguf, path));
    ld.g = m->gguf;
    status = KV_E_NOMEM;
    if (!(ld.taken = kv_alloc_array((size_t)kv_gguf_n_tensors(ld.g) + 1, sizeof *ld.taken, true))) goto fail;
    FAIL_IF_ERROR(load(&ld));
    *out = m;
    m = NULL;
    status = KV_OK;
fail:
    kv_free(ld.taken);
    kv_model_free(m);
    return status;
}

/* ---- a shape alone: weights without data, which a device makes up */

static int ones(float **out, int n)
{
    if (!(*out = kv_alloc_array((size_t)n, sizeof(float), false))) return KV_E_NOMEM;
    for (int i = 0; i < n; i++) (*out)[i] = 1;
    return KV_OK;
}

static kv_weight blank(int n_in, int n_out) { return (kv_weight){ .type = KV_W_BF16, .n_in = n_in, .n_out = n_out, .row_bytes = (size_t)n_in * 2 }; }

static int fill_shape(kv_model *m, const char *name, const kv_model_shape *s)
{
    owned *o = m->owned;
    const int q = s->n_heads * s->head_dim, k = s->n_kv_heads * s->head_dim, half = s->head_dim / 2;
    snprintf(o->name, sizeof o->name, "%s", name);
    snprintf(o->arch, sizeof o->arch, "llama");
    snprintf(o->weight_type, sizeof o->weight_type, "BF16");
    o->freq = kv_alloc_array((size_t)half, sizeof *o->freq, false);
    o->rope = kv_alloc_array((size_t)s->n_layers, sizeof *o->rope, false);
    o->sliding = kv_alloc_array((size_t)s->n_layers, sizeof *o->sliding, true);
    m->layer = kv_alloc_array((size_t)s->n_layers, sizeof *m->layer, true);
    if (!o->freq || !o->rope || !o->sliding || !m->layer) return KV_E_NOMEM;
    for (int i = 0; i < half; i++) o->freq[i] = pow(s->rope_base, -2.0 * i / s->head_dim);
    for (int l = 0; l < s->n_layers; l++) {
        kv_layer *y = &m->layer[l];
        y->wq = blank(s->n_embd, q);
        y->wk = y->wv = blank(s->n_embd, k);
        y->wo = blank(q, s->n_embd);
        y->w_gate = y->w_up = blank(s->n_embd, s->n_ff);
        y->w_down = blank(s->n_ff, s->n_embd);
        y->scale = (float)(1 / sqrt((double)s->head_dim));
        o->rope[l] = (kv_rope){ s->head_dim, o->freq };
        FORWARD_IF_ERROR(ones(&y->attn_norm, s->n_embd));
        FORWARD_IF_ERROR(ones(&y->ffn_norm, s->n_embd));
    }
    m->embed = m->head = blank(s->n_embd, s->n_vocab);
    m->embed_scale = 1;
    m->activation = KV_ACT_SILU;
    m->geo = (kv_geometry){ s->n_layers, s->n_heads, s->n_kv_heads, s->head_dim, o->rope, o->sliding };
    const double n_params = 2.0 * s->n_vocab * s->n_embd + (double)s->n_layers * (2.0 * q * s->n_embd + 2.0 * k * s->n_embd + 3.0 * s->n_ff * s->n_embd);
    m->info = (kv_model_info){ .path = "", .arch = o->arch, .name = o->name, .weight_type = o->weight_type, .tokenizer = "none", .chat_template = "none",
        .n_layers = s->n_layers, .n_heads = s->n_heads, .n_kv_heads = s->n_kv_heads, .head_dim = s->head_dim, .n_embd = s->n_embd, .n_ff = s->n_ff, .n_vocab = s->n_vocab, .n_ctx_train = 1 << 24,
        .n_rot = s->head_dim, .bos = -1, .eos = -1, .n_params = n_params, .weight_bytes = 2 * n_params, .rope_base = s->rope_base, .norm_eps = 1e-5 };
    return ones(&m->out_norm, s->n_embd);
}

int kv_model_synthetic(kv_model **out, const char *name, const kv_model_shape *s, const char *device)
{
    RETURN_ERROR_IF(!out || !name || !s || !device, KV_E_ARG, "kv_model_synthetic: NULL argument");
    *out = NULL;
    const struct { const char *name; int value, max; } size[] = { { "n_layers", s->n_layers, MAX_LAYERS }, { "n_heads", s->n_heads, 1024 }, { "n_kv_heads", s->n_kv_heads, 1024 },
        { "head_dim", s->head_dim, KV_MAX_HEAD_DIM }, { "n_embd", s->n_embd, 1 << 17 }, { "n_ff", s->n_ff, 1 << 18 }, { "n_vocab", s->n_vocab, 1 << 20 } };
    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        RETURN_ERROR_IF(size[i].value < 1 || size[i].value > size[i].max, KV_E_ARG, "model '%s': %s=%d is outside 1..%d", name, size[i].name, size[i].value, size[i].max);
    RETURN_ERROR_IF(s->n_heads % s->n_kv_heads || s->head_dim % 2, KV_E_ARG, "model '%s': n_heads=%d is no multiple of n_kv_heads=%d, or head_dim=%d is odd", name, s->n_heads, s->n_kv_heads, s->head_dim);
    RETURN_ERROR_IF(!(s->rope_base >= 1), KV_E_ARG, "model '%s': rope_base=%g is less than 1", name, s->rope_base);
    RETURN_ERROR_IF(!strcmp(device, "cpu"), KV_E_UNSUPPORTED, "model '%s': weights of a shape alone are made on a device, not on the cpu", name);
    kv_model *m = kv_zalloc(sizeof *m);
    if (!m) return KV_E_NOMEM;
    atomic_init(&m->refs, 1);
    int status = KV_E_NOMEM;
    if (!(m->owned = kv_zalloc(sizeof(owned)))) goto fail;
    FAIL_IF_ERROR(fill_shape(m, name, s));
    FAIL_IF_ERROR(kv_device_model_load(m, device, KV_WEIGHTS_BF16));
    *out = m;
    return KV_OK;
fail:
    kv_model_free(m);
    return status;
}

kv_model *kv_model_ref(kv_model *m)
{
    atomic_fetch_add(&m->refs, 1);
    return m;
}

#define EACH_WEIGHT(y) { &(y)->wq, &(y)->wk, &(y)->wv, &(y)->wo, &(y)->w_gate, &(y)->w_up, &(y)->w_down }

/* Memory that does not suffice for panels is no failure: the product by rows needs none. */
void kv_model_pack(kv_model *m)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    if (atomic_load(&m->packed) || kv_cpu_simd() < KV_SIMD_AVX2) return;
    pthread_mutex_lock(&lock);
    if (!atomic_load(&m->packed)) {
        bool room = true;
        for (int l = 0; room && l < m->info.n_layers; l++) {
            kv_weight *const weights[] = EACH_WEIGHT(&m->layer[l]);
            for (size_t i = 0; room && i < sizeof weights / sizeof *weights; i++) room = kv_weight_pack(weights[i]);
        }
        if (room) kv_weight_pack(&m->head);
        atomic_store(&m->packed, 1);
    }
    pthread_mutex_unlock(&lock);
}

void kv_model_free(kv_model *m)
{
    if (!m || atomic_fetch_sub(&m->refs, 1) > 1) return;
    for (int l = 0; m->layer && l < m->info.n_layers; l++) {
        kv_layer *y = &m->layer[l];
        float *const vectors[] = { y->bq, y->bk, y->bv, y->bo, y->b_gate, y->b_up, y->b_down, y->attn_norm, y->ffn_norm, y->q_norm, y->k_norm, y->post_attn_norm, y->post_ffn_norm };
        for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) kv_free(vectors[i]);
        kv_free(y->wq.owned);
        kv_free(y->wk.owned);
        kv_weight *const weights[] = EACH_WEIGHT(y);
        for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) kv_free(weights[i]->panels);
    }
    kv_device_model_free(m->dev);
    kv_free(m->head.panels);
    kv_free(m->layer);
    kv_free(m->out_norm);
    if (m->tok) kv_tokenizer_free(m->tok);
    if (m->gguf) kv_gguf_close(m->gguf);
    owned *o = m->owned;
    if (o) {
        kv_free(o->freq);
        kv_free(o->rope);
        kv_free(o->sliding);
    }
    kv_free(o);
    kv_free(m);
}

int kv_model_get_info(const kv_model *m, kv_model_info *out)
{
    RETURN_ERROR_IF(!m || !out, KV_E_ARG, "kv_model_get_info: NULL argument");
    *out = m->info;
    return KV_OK;
}

static int check_layer(const kv_model *m, int layer)
{
    RETURN_ERROR_IF(!m, KV_E_ARG, "model is NULL");
    RETURN_ERROR_IF(layer < 0 || layer >= m->info.n_layers, KV_E_ARG, "layer %d is outside 1..%d", layer + 1, m->info.n_layers);
    return KV_OK;
}

int kv_model_layer(const kv_model *m, int layer, kv_layer_info *out)
{
    FORWARD_IF_ERROR(check_layer(m, layer));
    RETURN_ERROR_IF(!out, KV_E_ARG, "kv_model_layer: NULL argument");
    const double base = m->geo.sliding[layer] ? ((const owned *)m->owned)->local_base : m->info.rope_base;
    *out = (kv_layer_info){ m->geo.sliding[layer], base, m->info.n_rot ? m->geo.rope[layer].freq[0] : 1 };
    return KV_OK;
}

const float *kv_model_key_bias(const kv_model *m, int layer)
{
    return check_layer(m, layer) < 0 ? NULL : m->layer[layer].bk;
}

int kv_model_meta_at(const kv_model *m, int i, const char **key, const char **value)
{
    RETURN_ERROR_IF(!m || !key || !value, KV_E_ARG, "kv_model_meta_at: NULL argument");
    RETURN_ERROR_IF(!m->gguf, KV_E_ARG, "model '%s' has no file", m->info.name);
    RETURN_ERROR_IF(i < 0 || i >= kv_gguf_n_keys(m->gguf), KV_E_ARG, "metadata %d is outside 1..%d", i + 1, kv_gguf_n_keys(m->gguf));
    *key = kv_gguf_key_at(m->gguf, i);
    *value = kv_gguf_value_text(m->gguf, i);
    return KV_OK;
}

int kv_model_tensor_at(const kv_model *m, int i, const char **name, const char **type, int *n_dims, double *shape4, double *bytes)
{
    RETURN_ERROR_IF(!m || !name || !type || !n_dims || !shape4 || !bytes, KV_E_ARG, "kv_model_tensor_at: NULL argument");
    RETURN_ERROR_IF(!m->gguf, KV_E_ARG, "model '%s' has no file", m->info.name);
    RETURN_ERROR_IF(i < 0 || i >= kv_gguf_n_tensors(m->gguf), KV_E_ARG, "tensor %d is outside 1..%d", i + 1, kv_gguf_n_tensors(m->gguf));
    const kv_gguf_tensor *t = kv_gguf_tensor_at(m->gguf, i);
    *name = t->name;
    *type = kv_weight_type_name(t->type);
    if (!*type) *type = "unknown";
    *n_dims = t->n_dims;
    for (int k = 0; k < 4; k++) shape4[k] = k < t->n_dims ? (double)t->dim[k] : 1;
    *bytes = (double)t->n_bytes;
    return KV_OK;
}
