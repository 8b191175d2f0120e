/* The aclnn kernels of CANN (libopapi) that torch_npu's own C++ reaches, computed on the host.
 *
 * These few are called through the real op-plugin code: strided and casting copies, the fused attention with its
 * gradient, RMS norm with its gradient, and dropout. Their argument checks follow the CANN operator documentation and
 * fail with CANN's code 161002 and a text. Every other ATen operator is served above this line, see host/.
 * Two phases as in CANN: GetWorkspaceSize checks and keeps the arguments, the second call computes.
 */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <acl/acl.h>

#include "emulated.h"

#define PARAM_INVALID 161002
#define PARAM_NULL 161001
#define MAX_DIMS 8

typedef struct aclTensor {
    int dims;
    int64_t size[MAX_DIMS], stride[MAX_DIMS];
    aclDataType type;
    char *data; /* of the first element */
} aclTensor;
typedef struct { uint64_t count; int64_t *values; } aclIntArray;

/* ------------------------------------------------------------------------------------------------- creating objects */

aclTensor *aclCreateTensor(const int64_t *sizes, uint64_t dims, aclDataType type, const int64_t *strides, int64_t offset,
                           aclFormat format, const int64_t *storage, uint64_t storage_dims, void *data);

static size_t type_bytes(aclDataType type) {
    switch (type) {
    case ACL_BOOL: case ACL_INT8: case ACL_UINT8: return 1;
    case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: case ACL_UINT16: return 2;
    case ACL_FLOAT: case ACL_INT32: case ACL_UINT32: case ACL_COMPLEX32: return 4;
    case ACL_DOUBLE: case ACL_INT64: case ACL_UINT64: case ACL_COMPLEX64: return 8;
    case ACL_COMPLEX128: return 16;
    default: return 0;
    }
}

aclTensor *aclCreateTensor(const int64_t *sizes, uint64_t dims, aclDataType type, const int64_t *strides, int64_t offset,
                           aclFormat format, const int64_t *storage, uint64_t storage_dims, void *data) {
    (void)format; (void)storage; (void)storage_dims;
    if (dims > MAX_DIMS) return NULL;
    aclTensor *tensor = calloc(1, sizeof *tensor);
    tensor->dims = dims;
    for (uint64_t i = 0; i < dims; i++) { tensor->size[i] = sizes[i]; tensor->stride[i] = strides[i]; }
    tensor->type = type;
    tensor->data = (char *)data + offset * type_bytes(type);
    return tensor;
}
int aclDestroyTensor(const aclTensor *tensor) { free((void *)tensor); return 0; }

aclIntArray *aclCreateIntArray(const int64_t *values, uint64_t count) {
    aclIntArray *array = malloc(sizeof *array);
    array->count = count;
    array->values = malloc(count * sizeof *values + 1);
    if (count) memcpy(array->values, values, count * sizeof *values);
    return array;
}
int aclDestroyIntArray(const aclIntArray *array) {
    if (array) { free(array->values); free((void *)array); }
    return 0;
}

typedef struct { aclDataType type; char bytes[16]; } aclScalar;

aclScalar *aclCreateScalar(void *value, aclDataType type);
aclScalar *aclCreateScalar(void *value, aclDataType type) {
    aclScalar *scalar = calloc(1, sizeof *scalar);
    scalar->type = type;
    memcpy(scalar->bytes, value, type_bytes(type));
    return scalar;
}
int aclDestroyScalar(const aclScalar *scalar) { free((void *)scalar); return 0; }

static int64_t elements(const aclTensor *tensor) {
    int64_t count = 1;
    for (int i = 0; i < tensor->dims; i++) count *= tensor->size[i];
    return count;
}

static const char *shape_text(const aclTensor *tensor) {
    static __thread char texts[8][128];
    static __thread int next;
    char *text = texts[next++ & 7];
    int used = snprintf(text, 128, "[");
    for (int i = 0; i < tensor->dims && used < 100; i++)
        used += snprintf(text + used, 128 - used, i ? ", %lld" : "%lld", (long long)tensor->size[i]);
    snprintf(text + used, 128 - used, "]");
    return text;
}

static const char *type_text(aclDataType type) {
    switch (type) {
    case ACL_FLOAT: return "FLOAT";
    case ACL_FLOAT16: return "FLOAT16";
    case ACL_BF16: return "BFLOAT16";
    case ACL_BOOL: return "BOOL";
    case ACL_UINT8: return "UINT8";
    case ACL_INT64: return "INT64";
    case ACL_INT32: return "INT32";
    case ACL_DOUBLE: return "DOUBLE";
    default: return "another type";
    }
}

/* ------------------------------------------------------------------------------------------------- loads and stores */

static float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static uint32_t to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

static float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float value = ldexpf((float)mantissa, -24);
    return sign ? -value : value;
}

static uint16_t float_to_half(float value) { /* round to nearest, ties to even */
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000;
    float magnitude = fabsf(value);
    if (isnan(value)) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 6.103515625e-05f) return sign | (uint16_t)lrintf(magnitude * 16777216.0f);
    uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1) - (112u << 23);
    return sign | rounded >> 13;
}

static uint16_t float_to_bf16(float value) {
    uint32_t bits = to_bits(value);
    if (isnan(value)) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static double load(const char *at, aclDataType type) {
    switch (type) {
    case ACL_FLOAT: return *(const float *)at;
    case ACL_FLOAT16: return half_to_float(*(const uint16_t *)at);
    case ACL_BF16: return from_bits((uint32_t) * (const uint16_t *)at << 16);
    case ACL_DOUBLE: return *(const double *)at;
    case ACL_BOOL: return *(const uint8_t *)at != 0;
    case ACL_UINT8: return *(const uint8_t *)at;
    case ACL_INT8: return *(const int8_t *)at;
    case ACL_INT16: return *(const int16_t *)at;
    case ACL_UINT16: return *(const uint16_t *)at;
    case ACL_INT32: return *(const int32_t *)at;
    case ACL_UINT32: return *(const uint32_t *)at;
    case ACL_INT64: return *(const int64_t *)at; /* exact below 2^53; equal types are copied as bytes */
    case ACL_UINT64: return *(const uint64_t *)at;
    default: return NAN;
    }
}

static void store(char *at, aclDataType type, double value) {
    switch (type) {
    case ACL_FLOAT: *(float *)at = value; break;
    case ACL_FLOAT16: *(uint16_t *)at = float_to_half(value); break;
    case ACL_BF16: *(uint16_t *)at = float_to_bf16(value); break;
    case ACL_DOUBLE: *(double *)at = value; break;
    case ACL_BOOL: *(uint8_t *)at = value != 0; break;
    case ACL_UINT8: *(uint8_t *)at = (int64_t)value; break;
    case ACL_INT8: *(int8_t *)at = (int64_t)value; break;
    case ACL_INT16: *(int16_t *)at = (int64_t)value; break;
    case ACL_UINT16: *(uint16_t *)at = (int64_t)value; break;
    case ACL_INT32: *(int32_t *)at = (int64_t)value; break;
    case ACL_UINT32: *(uint32_t *)at = (int64_t)value; break;
    case ACL_INT64: *(int64_t *)at = value; break;
    case ACL_UINT64: *(uint64_t *)at = value; break;
    default: break;
    }
}

static bool is_float(aclDataType type) { return type == ACL_FLOAT || type == ACL_FLOAT16 || type == ACL_BF16; }
static bool is_complex(aclDataType type) { return type == ACL_COMPLEX32 || type == ACL_COMPLEX64 || type == ACL_COMPLEX128; }

/* --------------------------------------------------------------------------------------------------------- executors */

typedef struct aclOpExecutor {
    const char *name;
    const aclTensor *tensor[24];
    double real[4];
    int64_t integer[8];
} aclOpExecutor;

static aclOpExecutor *new_executor(const char *name, uint64_t *workspace, aclOpExecutor **executor) {
    *executor = calloc(1, sizeof **executor);
    (*executor)->name = name;
    *workspace = 0;
    return *executor;
}

#define BEGIN_TASK (void)workspace, (void)bytes, (void)stream, emulated_flush();

static int finish(aclOpExecutor *executor) {
    emulated_count(executor->name);
    free(executor);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ copy and cast */

static void copy_tensor(const aclTensor *dst, const aclTensor *src) {
    int64_t count = elements(dst), index[MAX_DIMS] = {0};
    int64_t src_stride[MAX_DIMS] = {0};
    size_t dst_bytes = type_bytes(dst->type), src_bytes = type_bytes(src->type);
    for (int i = 0; i < src->dims; i++) { /* the source may have fewer dimensions, or dimensions of one */
        int j = dst->dims - src->dims + i;
        if (j >= 0) src_stride[j] = src->size[i] == 1 ? 0 : src->stride[i];
    }
    const char *from = src->data;
    char *to = dst->data;
    for (int64_t n = 0; n < count; n++) {
        if (dst->type == src->type)
            memmove(to, from, dst_bytes);
        else
            store(to, dst->type, load(from, src->type));
        for (int d = dst->dims - 1; d >= 0; d--) {
            to += dst->stride[d] * (int64_t)dst_bytes;
            from += src_stride[d] * (int64_t)src_bytes;
            if (++index[d] < dst->size[d]) break;
            to -= dst->stride[d] * (int64_t)dst_bytes * dst->size[d];
            from -= src_stride[d] * (int64_t)src_bytes * dst->size[d];
            index[d] = 0;
        }
    }
}

static int check_copy(const char *name, const aclTensor *dst, const aclTensor *src) {
    if (!dst || !src) return emulated_fail(PARAM_NULL, "%s: a tensor is missing", name);
    if (!type_bytes(dst->type) || !type_bytes(src->type) || (dst->type != src->type && (is_complex(dst->type) || is_complex(src->type))))
        return emulated_fail(PARAM_INVALID, "%s: %s to %s is not emulated", name, type_text(src->type), type_text(dst->type));
    for (int i = 1; i <= src->dims; i++) {
        int64_t have = src->size[src->dims - i], want = i <= dst->dims ? dst->size[dst->dims - i] : 1;
        if (have != want && have != 1)
            return emulated_fail(PARAM_INVALID, "%s: %s does not broadcast to %s", name, shape_text(src), shape_text(dst));
    }
    return 0;
}

int aclnnInplaceCopyGetWorkspaceSize(aclTensor *dst, const aclTensor *src, uint64_t *workspace, aclOpExecutor **executor) {
    int error = check_copy("aclnnInplaceCopy", dst, src);
    if (error) return error;
    aclOpExecutor *e = new_executor("aclnnInplaceCopy", workspace, executor);
    e->tensor[0] = dst, e->tensor[1] = src;
    return 0;
}
int aclnnInplaceCopy(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    copy_tensor(e->tensor[0], e->tensor[1]);
    return finish(e);
}

int aclnnCastGetWorkspaceSize(const aclTensor *src, aclDataType type, aclTensor *dst, uint64_t *workspace, aclOpExecutor **executor) {
    (void)type;
    int error = check_copy("aclnnCast", dst, src);
    if (error) return error;
    aclOpExecutor *e = new_executor("aclnnCast", workspace, executor);
    e->tensor[0] = dst, e->tensor[1] = src;
    return 0;
}
int aclnnCast(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) { return aclnnInplaceCopy(workspace, bytes, e, stream); }

/* ------------------------------------------------------------------------------------------------------ fill and pad */

static void fill_tensor(const aclTensor *t, double value) {
    aclTensor one = {.type = ACL_DOUBLE, .data = (char *)&value};
    copy_tensor(t, &one);
}

int aclnnInplaceZeroGetWorkspaceSize(aclTensor *self, uint64_t *workspace, aclOpExecutor **executor) {
    if (!self || is_complex(self->type)) return emulated_fail(PARAM_INVALID, "aclnnInplaceZero: the tensor is missing or complex");
    new_executor("aclnnInplaceZero", workspace, executor)->tensor[0] = self;
    return 0;
}
int aclnnInplaceZero(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    fill_tensor(e->tensor[0], 0);
    return finish(e);
}

int aclnnConstantPadNdGetWorkspaceSize(const aclTensor *self, const aclIntArray *pad, const aclScalar *value, aclTensor *out,
                                       uint64_t *workspace, aclOpExecutor **executor) {
    if (!self || !pad || !value || !out) return emulated_fail(PARAM_NULL, "aclnnConstantPadNd: an argument is missing");
    if (self->type != out->type || is_complex(out->type) || self->dims != out->dims || pad->count > 2u * self->dims || pad->count % 2)
        return emulated_fail(PARAM_INVALID, "aclnnConstantPadNd: %s to %s with %d pads", shape_text(self), shape_text(out), (int)pad->count);
    for (int d = 0; d < self->dims; d++) {
        int64_t i = 2 * (self->dims - 1 - d), before = i < (int64_t)pad->count ? pad->values[i] : 0, after = i < (int64_t)pad->count ? pad->values[i + 1] : 0;
        if (before < 0 || after < 0 || self->size[d] + before + after != out->size[d])
            return emulated_fail(PARAM_INVALID, "aclnnConstantPadNd: %s does not pad to %s", shape_text(self), shape_text(out));
    }
    aclOpExecutor *e = new_executor("aclnnConstantPadNd", workspace, executor);
    e->tensor[0] = self, e->tensor[1] = out, e->real[0] = load(value->bytes, value->type);
    for (uint64_t i = 0; i < pad->count; i += 2) e->integer[i / 2] = pad->values[i]; /* what comes before, last dimension first */
    return 0;
}
int aclnnConstantPadNd(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    const aclTensor *self = e->tensor[0];
    aclTensor inner = *e->tensor[1];
    fill_tensor(&inner, e->real[0]);
    for (int d = 0; d < inner.dims; d++) {
        inner.data += e->integer[inner.dims - 1 - d] * inner.stride[d] * (int64_t)type_bytes(inner.type);
        inner.size[d] = self->size[d];
    }
    copy_tensor(&inner, self);
    return finish(e);
}

/* --------------------------------------------------------------------------------------------------------- attention */

typedef struct { /* where element (b, n, s, d) of a query, key or value lies, whatever the layout */
    int64_t batch, heads, length, width;
    int64_t sb, sn, ss, sd;
} Layout;

static bool read_layout(const aclTensor *t, const char *layout, int64_t heads, Layout *out) {
    bool four = !strcmp(layout, "BNSD") || !strcmp(layout, "BSND"), three = !strcmp(layout, "BSH") || !strcmp(layout, "SBH");
    if (t->dims != (four ? 4 : 3) || (!four && !three)) return false;
    const int64_t *z = t->size, *s = t->stride;
    if (!strcmp(layout, "BNSD")) *out = (Layout){z[0], z[1], z[2], z[3], s[0], s[1], s[2], s[3]};
    else if (!strcmp(layout, "BSND")) *out = (Layout){z[0], z[2], z[1], z[3], s[0], s[2], s[1], s[3]};
    else if (z[2] % heads) return false;
    else if (!strcmp(layout, "BSH")) *out = (Layout){z[0], heads, z[1], z[2] / heads, s[0], z[2] / heads * s[2], s[1], s[2]};
    else *out = (Layout){z[1], heads, z[0], z[2] / heads, s[1], z[2] / heads * s[2], s[0], s[2]};
    return true;
}

static float *gather_rows(const aclTensor *t, const Layout *l, int64_t b, int64_t n) { /* (length, width) as float */
    float *rows = malloc((l->length * l->width + 1) * sizeof *rows);
    size_t bytes = type_bytes(t->type);
    for (int64_t s = 0; s < l->length; s++)
        for (int64_t d = 0; d < l->width; d++)
            rows[s * l->width + d] = load(t->data + (b * l->sb + n * l->sn + s * l->ss + d * l->sd) * (int64_t)bytes, t->type);
    return rows;
}

static void scatter_rows(const aclTensor *t, const Layout *l, int64_t b, int64_t n, const float *rows) {
    size_t bytes = type_bytes(t->type);
    for (int64_t s = 0; s < l->length; s++)
        for (int64_t d = 0; d < l->width; d++)
            store(t->data + (b * l->sb + n * l->sn + s * l->ss + d * l->sd) * (int64_t)bytes, t->type, rows[s * l->width + d]);
}

static char *layout_copy(const char *layout) { char *kept = malloc(strlen(layout) + 1); strcpy(kept, layout); return kept; }

/* The checks of aclnnFlashAttentionScore and of its gradient; fills in the number of key heads. */
static int check_attention(const char *name, const aclTensor *query, const aclTensor *key, const aclTensor *value,
                           const aclTensor *pse, const aclTensor *padding, const aclTensor *mask, const aclIntArray *prefix,
                           double keep, int64_t before, int64_t after, int64_t heads, const char *layout, int64_t sparse,
                           int64_t *key_heads) {
    if (!query || !key || !value) return emulated_fail(PARAM_NULL, "%s: query, key or value is missing", name);
    if (!is_float(query->type) || key->type != query->type || value->type != query->type)
        return emulated_fail(PARAM_INVALID, "%s: query, key, value are %s, %s, %s; they must be one of FLOAT16, BFLOAT16, FLOAT",
                             name, type_text(query->type), type_text(key->type), type_text(value->type));
    if ((pse && elements(pse)) || (padding && elements(padding)) || (prefix && prefix->count))
        return emulated_fail(ACL_ERROR_FEATURE_UNSUPPORTED, "%s: pse, padding mask and prefix are not emulated", name);
    Layout q, k, v;
    *key_heads = heads;
    if (heads > 0 && !strcmp(layout, "BNSD") && key->dims == 4) *key_heads = key->size[1];
    if (heads > 0 && !strcmp(layout, "BSND") && key->dims == 4) *key_heads = key->size[2];
    if (heads > 0 && query->dims == 3 && key->dims == 3 && query->size[2] >= heads && query->size[2] % heads == 0)
        *key_heads = key->size[2] / (query->size[2] / heads);
    if (heads <= 0 || *key_heads <= 0 || heads % *key_heads || !read_layout(query, layout, heads, &q) ||
        !read_layout(key, layout, *key_heads, &k) || !read_layout(value, layout, *key_heads, &v) || q.heads != heads)
        return emulated_fail(PARAM_INVALID, "%s: query %s, key %s, value %s do not fit layout %s with %lld heads", name,
                             shape_text(query), shape_text(key), shape_text(value), layout, (long long)heads);
    if (q.width != k.width || q.width < 1 || q.width > 768 || v.width > q.width)
        return emulated_fail(PARAM_INVALID, "%s: head dims %lld, %lld, %lld; query's and key's must be equal, 1 to 768, and value's no larger",
                             name, (long long)q.width, (long long)k.width, (long long)v.width);
    if (k.batch != q.batch || v.batch != q.batch || v.length != k.length || v.heads != k.heads)
        return emulated_fail(PARAM_INVALID, "%s: query %s, key %s, value %s differ in batch, heads or length", name,
                             shape_text(query), shape_text(key), shape_text(value));
    if (!(keep > 0 && keep <= 1)) return emulated_fail(PARAM_INVALID, "%s: keepProb %g is not in (0, 1]", name, keep);
    if (sparse != 0 && sparse != 1 && sparse != 2 && sparse != 3)
        return emulated_fail(ACL_ERROR_FEATURE_UNSUPPORTED, "%s: sparse mode %lld is not emulated", name, (long long)sparse);
    if (sparse == 0 && (before < k.length || after < k.length) && mask)
        return emulated_fail(ACL_ERROR_FEATURE_UNSUPPORTED, "%s: a band of tokens is not emulated", name);
    if (sparse != 0 && !mask) return emulated_fail(PARAM_INVALID, "%s: sparse mode %lld needs attenMask", name, (long long)sparse);
    if (mask) {
        if (mask->type != ACL_BOOL && mask->type != ACL_UINT8)
            return emulated_fail(PARAM_INVALID, "%s: attenMask is %s; it must be BOOL or UINT8", name, type_text(mask->type));
        const int64_t *m = mask->size;
        bool fits;
        if (sparse >= 2) {
            fits = mask->dims == 2 && m[0] == 2048 && m[1] == 2048;
        } else {
            fits = mask->dims == 2 && m[0] == q.length && m[1] == k.length;
            if (mask->dims == 4 && m[2] == q.length && m[3] == k.length)
                fits = (m[0] == q.batch && (m[1] == q.heads || m[1] == 1)) || (m[0] == 1 && m[1] == 1);
        }
        if (!fits)
            return emulated_fail(PARAM_INVALID, "%s: attenMask %s does not fit query %s and key %s; BNSS, B1SS, 11SS, SS%s", name,
                                 shape_text(mask), shape_text(query), shape_text(key), sparse >= 2 ? " (2048 x 2048 in sparse modes)" : "");
    }
    return 0;
}

static bool hidden(const aclTensor *mask, int64_t sparse, int64_t b, int64_t n, int64_t i, int64_t j, int64_t queries, int64_t keys) {
    if (sparse == 2) return j > i;
    if (sparse == 3) return j > i + keys - queries;
    if (!mask) return false;
    const int64_t *z = mask->size, *s = mask->stride;
    if (mask->dims == 2) return mask->data[i * s[0] + j * s[1]] != 0;
    return mask->data[(z[0] == 1 ? 0 : b) * s[0] + (z[1] == 1 ? 0 : n) * s[1] + i * s[2] + j * s[3]] != 0;
}

static bool kept(const aclTensor *bits, int64_t at) { return !bits || ((uint8_t)bits->data[at >> 3] >> (at & 7) & 1); }

static float dot(const float *a, const float *b, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

int aclnnFlashAttentionScoreGetWorkspaceSize(
    const aclTensor *query, const aclTensor *key, const aclTensor *value, const aclTensor *pse, const aclTensor *drop,
    const aclTensor *padding, const aclTensor *mask, const aclIntArray *prefix, double scale, double keep, int64_t before,
    int64_t after, int64_t heads, char *layout, int64_t precise, int64_t sparse, const aclTensor *maximum, const aclTensor *sum,
    const aclTensor *softmax, const aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
    (void)precise; (void)softmax;
    int64_t key_heads;
    int error = check_attention("aclnnFlashAttentionScore", query, key, value, pse, padding, mask, prefix, keep, before, after,
                                heads, layout, sparse, &key_heads);
    if (error) return error;
    aclOpExecutor *e = new_executor("aclnnFlashAttentionScore", workspace, executor);
    const aclTensor *tensors[] = {query, key, value, drop && elements(drop) ? drop : NULL, mask, maximum, sum, out};
    memcpy(e->tensor, tensors, sizeof tensors);
    e->real[0] = scale, e->real[1] = keep;
    e->integer[0] = heads, e->integer[1] = key_heads, e->integer[2] = sparse, e->integer[3] = (intptr_t)layout_copy(layout);
    return 0;
}

int aclnnFlashAttentionScore(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    const aclTensor *drop = e->tensor[3], *mask = e->tensor[4], *maximum = e->tensor[5], *sum = e->tensor[6], *out = e->tensor[7];
    int64_t heads = e->integer[0], key_heads = e->integer[1], sparse = e->integer[2];
    char *layout = (char *)(intptr_t)e->integer[3];
    float scale = e->real[0], keep = e->real[1];
    Layout q, k, v, o;
    read_layout(e->tensor[0], layout, heads, &q);
    read_layout(e->tensor[1], layout, key_heads, &k);
    read_layout(e->tensor[2], layout, key_heads, &v);
    read_layout(out, layout, heads, &o);
    float *score = malloc((k.length + 1) * sizeof *score);
    for (int64_t b = 0; b < q.batch; b++)
        for (int64_t n = 0; n < heads; n++) {
            int64_t m = n / (heads / key_heads);
            float *Q = gather_rows(e->tensor[0], &q, b, n), *K = gather_rows(e->tensor[1], &k, b, m), *V = gather_rows(e->tensor[2], &v, b, m);
            float *O = calloc(q.length * v.width + 1, sizeof *O);
            for (int64_t i = 0; i < q.length; i++) {
                float largest = -INFINITY, total = 0;
                for (int64_t j = 0; j < k.length; j++) {
                    score[j] = hidden(mask, sparse, b, n, i, j, q.length, k.length) ? -FLT_MAX : scale * dot(Q + i * q.width, K + j * k.width, q.width);
                    if (score[j] > largest) largest = score[j];
                }
                for (int64_t j = 0; j < k.length; j++) total += score[j] = expf(score[j] - largest);
                for (int64_t j = 0; j < k.length; j++) {
                    int64_t at = ((b * heads + n) * q.length + i) * k.length + j;
                    float weight = kept(drop, at) ? score[j] / total / keep : 0;
                    for (int64_t d = 0; d < v.width; d++) O[i * v.width + d] += weight * V[j * v.width + d];
                }
                for (int64_t d = 0; d < 8; d++) { /* (B, N, S, 8) float, the same value eight times */
                    int64_t at = ((b * heads + n) * q.length + i) * 8 + d;
                    ((float *)maximum->data)[at] = largest;
                    ((float *)sum->data)[at] = total;
                }
            }
            scatter_rows(out, &o, b, n, O);
            free(Q), free(K), free(V), free(O);
        }
    free(score);
    free(layout);
    return finish(e);
}

int aclnnFlashAttentionScoreGradGetWorkspaceSize(
    const aclTensor *query, const aclTensor *key, const aclTensor *value, const aclTensor *dy, const aclTensor *pse,
    const aclTensor *drop, const aclTensor *padding, const aclTensor *mask, const aclTensor *maximum, const aclTensor *sum,
    const aclTensor *softmax, const aclTensor *attention, const aclIntArray *prefix, double scale, double keep, int64_t before,
    int64_t after, int64_t heads, char *layout, int64_t precise, int64_t sparse, const aclTensor *dq, const aclTensor *dk,
    const aclTensor *dv, const aclTensor *dpse, uint64_t *workspace, aclOpExecutor **executor) {
    (void)precise; (void)softmax; (void)dpse;
    int64_t key_heads;
    int error = check_attention("aclnnFlashAttentionScoreGrad", query, key, value, pse, padding, mask, prefix, keep, before, after,
                                heads, layout, sparse, &key_heads);
    if (error) return error;
    if (!dy || dy->type != query->type) return emulated_fail(PARAM_INVALID, "aclnnFlashAttentionScoreGrad: dy must be of query's type");
    if (!maximum || !sum || !attention) return emulated_fail(PARAM_NULL, "aclnnFlashAttentionScoreGrad: a result of the forward is missing");
    aclOpExecutor *e = new_executor("aclnnFlashAttentionScoreGrad", workspace, executor);
    const aclTensor *tensors[] = {query, key, value, drop && elements(drop) ? drop : NULL, mask, maximum, sum, attention, dy, dq, dk, dv};
    memcpy(e->tensor, tensors, sizeof tensors);
    e->real[0] = scale, e->real[1] = keep;
    e->integer[0] = heads, e->integer[1] = key_heads, e->integer[2] = sparse, e->integer[3] = (intptr_t)layout_copy(layout);
    return 0;
}

int aclnnFlashAttentionScoreGrad(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    const aclTensor *drop = e->tensor[3], *mask = e->tensor[4], *maximum = e->tensor[5], *sum = e->tensor[6];
    int64_t heads = e->integer[0], key_heads = e->integer[1], sparse = e->integer[2], group = heads / key_heads;
    char *layout = (char *)(intptr_t)e->integer[3];
    float scale = e->real[0], keep = e->real[1];
    Layout q, k, v, o, y, gq, gk, gv;
    read_layout(e->tensor[0], layout, heads, &q);
    read_layout(e->tensor[1], layout, key_heads, &k);
    read_layout(e->tensor[2], layout, key_heads, &v);
    read_layout(e->tensor[7], layout, heads, &o);
    read_layout(e->tensor[8], layout, heads, &y);
    read_layout(e->tensor[9], layout, heads, &gq);
    read_layout(e->tensor[10], layout, key_heads, &gk);
    read_layout(e->tensor[11], layout, key_heads, &gv);
    for (int64_t b = 0; b < q.batch; b++)
        for (int64_t m = 0; m < key_heads; m++) {
            float *K = gather_rows(e->tensor[1], &k, b, m), *V = gather_rows(e->tensor[2], &v, b, m);
            float *DK = calloc(k.length * k.width + 1, sizeof *DK), *DV = calloc(v.length * v.width + 1, sizeof *DV);
            for (int64_t n = m * group; n < (m + 1) * group; n++) {
                float *Q = gather_rows(e->tensor[0], &q, b, n), *O = gather_rows(e->tensor[7], &o, b, n), *Y = gather_rows(e->tensor[8], &y, b, n);
                float *DQ = calloc(q.length * q.width + 1, sizeof *DQ);
                for (int64_t i = 0; i < q.length; i++) {
                    int64_t row = (b * heads + n) * q.length + i;
                    float largest = ((float *)maximum->data)[row * 8], total = ((float *)sum->data)[row * 8];
                    float inner = dot(Y + i * v.width, O + i * v.width, v.width);
                    for (int64_t j = 0; j < k.length; j++) {
                        if (hidden(mask, sparse, b, n, i, j, q.length, k.length)) continue;
                        float p = expf(scale * dot(Q + i * q.width, K + j * k.width, q.width) - largest) / total;
                        float through = kept(drop, row * k.length + j) ? 1 / keep : 0;
                        float ds = p * (through * dot(Y + i * v.width, V + j * v.width, v.width) - inner) * scale;
                        for (int64_t d = 0; d < v.width; d++) DV[j * v.width + d] += through * p * Y[i * v.width + d];
                        for (int64_t d = 0; d < q.width; d++) DQ[i * q.width + d] += ds * K[j * k.width + d];
                        for (int64_t d = 0; d < q.width; d++) DK[j * k.width + d] += ds * Q[i * q.width + d];
                    }
                }
                scatter_rows(e->tensor[9], &gq, b, n, DQ);
                free(Q), free(O), free(Y), free(DQ);
            }
            scatter_rows(e->tensor[10], &gk, b, m, DK);
            scatter_rows(e->tensor[11], &gv, b, m, DV);
            free(K), free(V), free(DK), free(DV);
        }
    free(layout);
    return finish(e);
}

/* ---------------------------------------------------------------------------------------------------------- RMS norm */

static bool dense(const aclTensor *t) {
    int64_t expected = 1;
    for (int i = t->dims - 1; i >= 0; i--) {
        if (t->size[i] != 1 && t->stride[i] != expected) return false;
        expected *= t->size[i];
    }
    return true;
}

static float *as_floats(const aclTensor *t) { /* the tensor, dense and in float */
    int64_t count = elements(t), dims = t->dims;
    float *values = malloc((count + 1) * sizeof *values);
    aclTensor plain = {.dims = dims, .type = ACL_FLOAT, .data = (char *)values};
    int64_t stride = 1;
    for (int i = dims - 1; i >= 0; i--) { plain.size[i] = t->size[i]; plain.stride[i] = stride; stride *= t->size[i]; }
    copy_tensor(&plain, t);
    return values;
}

static void from_floats(const aclTensor *t, float *values) {
    aclTensor plain = {.dims = t->dims, .type = ACL_FLOAT, .data = (char *)values};
    int64_t stride = 1;
    for (int i = t->dims - 1; i >= 0; i--) { plain.size[i] = t->size[i]; plain.stride[i] = stride; stride *= t->size[i]; }
    copy_tensor(t, &plain);
}

static int check_norm(const char *name, const aclTensor *x, const aclTensor *gamma) {
    if (!x || !gamma) return emulated_fail(PARAM_NULL, "%s: x or gamma is missing", name);
    if (!is_float(x->type) || !is_float(gamma->type) || (gamma->type != x->type && gamma->type != ACL_FLOAT))
        return emulated_fail(PARAM_INVALID, "%s: x is %s and gamma %s; gamma must be of x's type or FLOAT", name,
                             type_text(x->type), type_text(gamma->type));
    bool fits = gamma->dims >= 1 && gamma->dims <= x->dims;
    for (int i = 1; fits && i <= gamma->dims; i++) fits = gamma->size[gamma->dims - i] == x->size[x->dims - i];
    return fits ? 0 : emulated_fail(PARAM_INVALID, "%s: gamma %s is not the end of x %s", name, shape_text(gamma), shape_text(x));
}

int aclnnRmsNormGetWorkspaceSize(const aclTensor *x, const aclTensor *gamma, double epsilon, const aclTensor *y,
                                 const aclTensor *rstd, uint64_t *workspace, aclOpExecutor **executor) {
    int error = check_norm("aclnnRmsNorm", x, gamma);
    if (error) return error;
    aclOpExecutor *e = new_executor("aclnnRmsNorm", workspace, executor);
    e->tensor[0] = x, e->tensor[1] = gamma, e->tensor[2] = y, e->tensor[3] = rstd;
    e->real[0] = epsilon;
    return 0;
}

int aclnnRmsNorm(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    float *x = as_floats(e->tensor[0]), *gamma = as_floats(e->tensor[1]);
    int64_t width = elements(e->tensor[1]), rows = width ? elements(e->tensor[0]) / width : 0;
    for (int64_t r = 0; r < rows; r++) {
        float *row = x + r * width;
        float rstd = 1.0f / sqrtf(dot(row, row, width) / width + (float)e->real[0]);
        for (int64_t i = 0; i < width; i++) row[i] = row[i] * rstd * gamma[i];
        ((float *)e->tensor[3]->data)[r] = rstd;
    }
    from_floats(e->tensor[2], x);
    free(x), free(gamma);
    return finish(e);
}

int aclnnRmsNormGradGetWorkspaceSize(const aclTensor *dy, const aclTensor *x, const aclTensor *rstd, const aclTensor *gamma,
                                     const aclTensor *dx, const aclTensor *dgamma, uint64_t *workspace, aclOpExecutor **executor) {
    int error = check_norm("aclnnRmsNormGrad", x, gamma);
    if (error) return error;
    if (!dy || dy->type != x->type) return emulated_fail(PARAM_INVALID, "aclnnRmsNormGrad: dy must be of x's type");
    if (!rstd || rstd->type != ACL_FLOAT || !dense(rstd)) return emulated_fail(PARAM_INVALID, "aclnnRmsNormGrad: rstd must be FLOAT");
    aclOpExecutor *e = new_executor("aclnnRmsNormGrad", workspace, executor);
    const aclTensor *tensors[] = {dy, x, rstd, gamma, dx, dgamma};
    memcpy(e->tensor, tensors, sizeof tensors);
    return 0;
}

int aclnnRmsNormGrad(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    float *dy = as_floats(e->tensor[0]), *x = as_floats(e->tensor[1]), *gamma = as_floats(e->tensor[3]);
    int64_t width = elements(e->tensor[3]), rows = width ? elements(e->tensor[1]) / width : 0;
    float *dgamma = calloc(width + 1, sizeof *dgamma);
    for (int64_t r = 0; r < rows; r++) {
        float *xr = x + r * width, *yr = dy + r * width, rstd = ((float *)e->tensor[2]->data)[r], mean = 0;
        for (int64_t i = 0; i < width; i++) mean += yr[i] * gamma[i] * xr[i] * rstd;
        mean /= width;
        for (int64_t i = 0; i < width; i++) {
            float normed = xr[i] * rstd;
            dgamma[i] += yr[i] * normed;
            yr[i] = rstd * (yr[i] * gamma[i] - normed * mean);
        }
    }
    from_floats(e->tensor[4], dy);
    from_floats(e->tensor[5], dgamma);
    free(dy), free(x), free(gamma), free(dgamma);
    return finish(e);
}

/* ----------------------------------------------------------------------------------------------------------- dropout */

static uint64_t mix(uint64_t z) { /* splitmix64: every (seed, offset, index) has its own 64 bits */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

int aclnnDropoutGenMaskV2GetWorkspaceSize(const aclIntArray *shape, double probability, int64_t seed, int64_t offset,
                                          aclDataType type, aclTensor *out, uint64_t *workspace, aclOpExecutor **executor) {
    (void)type;
    int64_t count = 1;
    for (uint64_t i = 0; i < shape->count; i++) count *= shape->values[i];
    if (probability < 0 || probability > 1) return emulated_fail(PARAM_INVALID, "aclnnDropoutGenMaskV2: probability %g", probability);
    if (!out || elements(out) * 8 < count) return emulated_fail(PARAM_INVALID, "aclnnDropoutGenMaskV2: no room for %lld bits", (long long)count);
    aclOpExecutor *e = new_executor("aclnnDropoutGenMaskV2", workspace, executor);
    e->tensor[0] = out, e->real[0] = probability, e->integer[0] = count, e->integer[1] = seed, e->integer[2] = offset;
    return 0;
}

int aclnnDropoutGenMaskV2(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    uint8_t *mask = (uint8_t *)e->tensor[0]->data;
    uint64_t start = mix(mix((uint64_t)e->integer[1] + 0x9e3779b97f4a7c15ull) + (uint64_t)e->integer[2]);
    memset(mask, 0, elements(e->tensor[0]));
    for (int64_t i = 0; i < e->integer[0]; i++)
        if ((mix(start + (uint64_t)i * 0x9e3779b97f4a7c15ull) >> 11) * 0x1p-53 >= e->real[0]) mask[i >> 3] |= 1 << (i & 7);
    return finish(e);
}

int aclnnDropoutDoMaskGetWorkspaceSize(const aclTensor *x, const aclTensor *mask, double probability, aclTensor *out,
                                       uint64_t *workspace, aclOpExecutor **executor) {
    if (!x || !mask || !out) return emulated_fail(PARAM_NULL, "aclnnDropoutDoMask: a tensor is missing");
    if (mask->type != ACL_UINT8 || elements(mask) * 8 < elements(x))
        return emulated_fail(PARAM_INVALID, "aclnnDropoutDoMask: mask %s is too small for %s", shape_text(mask), shape_text(x));
    aclOpExecutor *e = new_executor("aclnnDropoutDoMask", workspace, executor);
    e->tensor[0] = x, e->tensor[1] = mask, e->tensor[2] = out, e->real[0] = probability;
    return 0;
}

int aclnnDropoutDoMask(void *workspace, uint64_t bytes, aclOpExecutor *e, aclrtStream stream) {
    BEGIN_TASK
    float *x = as_floats(e->tensor[0]), factor = e->real[0] < 1 ? 1 / (1 - e->real[0]) : 0;
    for (int64_t i = 0; i < elements(e->tensor[0]); i++) x[i] = kept(e->tensor[1], i) ? x[i] * factor : 0;
    from_floats(e->tensor[2], x);
    free(x);
    return finish(e);
}
