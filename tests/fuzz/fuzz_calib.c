/* fuzz_calib.c -- any bytes as a calibration artifact of a small geometry, as they are and with checksums, fingerprints and
 * payload length made to fit; what parses gives finite moments, tables and the same bytes when written again. */
#include <stdio.h>
#include "fuzz.h"

enum { D = CALIB_D, HEADER = 256, PAYLOAD_AT = 64, MODEL = 72, ROPE = 104, PAYLOAD = 168, CHECK = 224 };      /* artifact.c's byte picture */

static void put_hex(uint8_t *to, const char *hex)
{
    for (int i = 0; i < 32; i++) sscanf(hex + 2 * i, "%2hhx", to + i);
}

static void parse(kv_model *m, const uint8_t *data, size_t n)
{
    kv_calib *c;
    const int status = kv_calib_parse(&c, m, data, n, "fuzz");
    if (status < 0) {
        if (c) abort();
        refused(status);
        return;
    }
    for (int side = 0; side < 2; side++) {
        kv_moments *x;
        if (kv_moments_new(&x, c, 0, 0, side, 8, NULL) < 0) continue;
        for (int i = 0; i < D * D; i++) if (!isfinite(x->second[i])) abort();
        kv_moments_free(x);
        for (int i = 0; i < kv_codec_count(); i++) {
            kv_codec_desc d;
            kv_codec *codec;
            kv_codec_describe(i, &d);
            if ((d.caps & (KV_CAP_CALIBRATED | KV_CAP_CALIBRATABLE)) && kv_codec_calibrate(&codec, c, d.name, "", 8, 0, 0, side, 1, NULL) == KV_OK) kv_codec_free(codec);
        }
    }
    uint8_t *again;
    size_t n_again;
    if (kv_calib_write(c, &again, &n_again) == KV_OK) {
        if (n_again != n && !memchr(data + HEADER, 0, n - HEADER)) abort();       /* a NUL ends notes early */
        kv_free(again);
    }
    kv_calib_free(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    kv_model m;
    calib_model(&m);
    parse(&m, data, size);
    if (size < HEADER) return 0;
    uint8_t *x = malloc(size);
    if (!x) return 0;
    char model_sha[65], rope_sha[65], hex[65];
    const uint32_t version = 1, shape[] = { 1, 1, 1, D };
    const uint64_t n_payload = size - HEADER;
    memcpy(x, data, size);
    memcpy(x, "KVCALIB", 8);
    memcpy(x + 8, &version, 4);
    memcpy(x + 12, shape, sizeof shape);
    memcpy(x + PAYLOAD_AT, &n_payload, 8);
    kv_calib_fingerprint(&m, model_sha, rope_sha);
    put_hex(x + MODEL, model_sha);
    put_hex(x + ROPE, rope_sha);
    kv_sha256(x + HEADER, (double)(size - HEADER), hex);
    put_hex(x + PAYLOAD, hex);
    kv_sha256(x, CHECK, hex);
    put_hex(x + CHECK, hex);
    parse(&m, x, size);
    free(x);
    return 0;
}
