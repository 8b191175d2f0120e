/* HCCL's collectives between processes over TCP, for the real ProcessGroupHCCL of torch_npu.
 *
 * The ranks of a communicator hold one connection to each other. Reductions, gathers and scatters go through rank 0 and
 * add in the order of the ranks, so a result is the same on every run. HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT are
 * kept; a rank that dies makes the others' calls fail with HCCL_E_REMOTE. Rank 0 is reached at HCCL_IF_IP, else loopback.
 * The signatures are those of hccl.h in the torch_npu wheel, which is a C++ header and cannot be included here.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "emulated.h"

enum { OK = 0, BAD_PARAMETER = 1, NO_MEMORY = 3, NOT_SUPPORTED = 5, TIMED_OUT = 9, NO_CONNECTION = 11, REMOTE_ERROR = 21 };
enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BF16 };
enum { SUM, PROD, MAX, MIN };
typedef int Result, Type, Op;
typedef void *Stream;

#define ROOT_INFO_BYTES 4108
typedef struct { char internal[ROOT_INFO_BYTES]; } RootInfo;
typedef struct { struct sockaddr_in address; int listener; int owner; } Root; /* what lies in a RootInfo */

typedef struct { uint32_t size, rank; int peer[64]; } Comm;

/* ----------------------------------------------------------------------------------------------------------- sockets */

static int seconds(const char *variable, int otherwise) {
    const char *text = getenv(variable);
    return text && *text ? atoi(text) : otherwise;
}

static int wait_for(int file, short events, int limit) { /* limit in seconds, 0 = for ever */
    struct pollfd waiting = {file, events, 0};
    int ready;
    do ready = poll(&waiting, 1, limit > 0 ? limit * 1000 : -1);
    while (ready < 0 && errno == EINTR);
    return ready > 0 ? OK : ready == 0 ? TIMED_OUT : REMOTE_ERROR;
}

static Result send_all(int file, const void *data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = send(file, (const char *)data + done, bytes - done, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return emulated_fail(REMOTE_ERROR, "HCCL: the connection to another rank broke while sending");
        done += n;
    }
    return OK;
}

static Result receive_all(int file, void *data, size_t bytes) {
    int limit = seconds("HCCL_EXEC_TIMEOUT", 1836);
    for (size_t done = 0; done < bytes;) {
        Result result = wait_for(file, POLLIN, limit);
        if (result) return emulated_fail(result, "HCCL: no data from another rank within HCCL_EXEC_TIMEOUT = %d s", limit);
        ssize_t n = recv(file, (char *)data + done, bytes - done, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return emulated_fail(REMOTE_ERROR, "HCCL: another rank ended");
        done += n;
    }
    return OK;
}

static int listen_anywhere(struct sockaddr_in *address) {
    int file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t length = sizeof *address;
    const char *host = getenv("HCCL_IF_IP");
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(host && *host ? host : "127.0.0.1")};
    if (file < 0 || bind(file, (struct sockaddr *)address, length) || listen(file, 64) || getsockname(file, (struct sockaddr *)address, &length)) {
        if (file >= 0) close(file);
        return -1;
    }
    return file;
}

static int connect_to(const struct sockaddr_in *address, int limit) {
    for (time_t end = time(NULL) + limit; time(NULL) <= end; usleep(20000)) {
        int file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(file, (const struct sockaddr *)address, sizeof *address) == 0) {
            int yes = 1;
            setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            return file;
        }
        close(file);
    }
    return -1;
}

static int accept_one(int listener, int limit, uint32_t *rank) {
    if (wait_for(listener, POLLIN, limit)) return -1;
    int file = accept4(listener, NULL, NULL, SOCK_CLOEXEC), yes = 1;
    if (file < 0) return -1;
    setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (receive_all(file, rank, sizeof *rank)) { close(file); return -1; }
    return file;
}

/* ------------------------------------------------------------------------------------------------------ communicators */

Result HcclGetRootInfo(RootInfo *info) {
    Root root = {.owner = getpid()};
    root.listener = listen_anywhere(&root.address);
    if (root.listener < 0) return emulated_fail(NO_CONNECTION, "HCCL: cannot listen on HCCL_IF_IP");
    memset(info, 0, sizeof *info);
    memcpy(info->internal, &root, sizeof root);
    return OK;
}

Result HcclCommDestroy(Comm *comm) {
    for (uint32_t i = 0; i < comm->size; i++)
        if (comm->peer[i] >= 0) close(comm->peer[i]);
    free(comm);
    return OK;
}

Result HcclCommInitRootInfo(uint32_t size, const RootInfo *info, uint32_t rank, Comm **out) {
    int limit = seconds("HCCL_CONNECT_TIMEOUT", 120);
    Root root;
    memcpy(&root, info->internal, sizeof root);
    if (size > 64 || rank >= size) return emulated_fail(BAD_PARAMETER, "HCCL: rank %u of %u", rank, size);
    Comm *comm = malloc(sizeof *comm);
    *comm = (Comm){size, rank, {0}};
    for (int i = 0; i < 64; i++) comm->peer[i] = -1;
    struct sockaddr_in addresses[64];
    int listener = -1;
    if (rank == 0) {
        listener = root.listener;
        for (uint32_t i = 1; i < size; i++) { /* everyone says hello and where it listens; then everyone learns of all */
            uint32_t who = 0;
            int file = accept_one(listener, limit, &who);
            if (file < 0 || who == 0 || who >= size || comm->peer[who] >= 0 || receive_all(file, &addresses[who], sizeof addresses[who])) goto failed;
            comm->peer[who] = file;
        }
        for (uint32_t i = 1; i < size; i++)
            if (send_all(comm->peer[i], addresses, sizeof addresses)) goto failed;
    } else {
        listener = listen_anywhere(&addresses[rank]);
        comm->peer[0] = connect_to(&root.address, limit);
        if (listener < 0 || comm->peer[0] < 0 || send_all(comm->peer[0], &rank, sizeof rank) ||
            send_all(comm->peer[0], &addresses[rank], sizeof addresses[rank]) || receive_all(comm->peer[0], addresses, sizeof addresses)) goto failed;
        for (uint32_t i = 1; i < rank; i++) {
            comm->peer[i] = connect_to(&addresses[i], limit);
            if (comm->peer[i] < 0 || send_all(comm->peer[i], &rank, sizeof rank)) goto failed;
        }
        for (uint32_t i = rank + 1; i < size; i++) {
            uint32_t who = 0;
            int file = accept_one(listener, limit, &who);
            if (file < 0 || who <= rank || who >= size) goto failed;
            comm->peer[who] = file;
        }
    }
    close(listener);
    *out = comm;
    return OK;
failed:
    if (listener >= 0) close(listener);
    HcclCommDestroy(comm);
    return emulated_fail(TIMED_OUT, "HCCL: %u ranks did not meet within HCCL_CONNECT_TIMEOUT = %d s", size, limit);
}

Result HcclCommInitRootInfoConfig(uint32_t size, const RootInfo *info, uint32_t rank, void *config, Comm **out) {
    (void)config;
    return HcclCommInitRootInfo(size, info, rank, out);
}

uint32_t HcclGetCommConfigCapability(void) { return 1; } /* of the settings only the buffer size, which costs nothing here */
Result HcclGetCommAsyncError(Comm *comm, Result *error) { (void)comm; *error = OK; return OK; }
Result HcclGetCommName(Comm *comm, char *name) { snprintf(name, 128, "emulated_%u", comm->size); return OK; }
Result HcclGetRankSize(Comm *comm, uint32_t *size) { *size = comm->size; return OK; }
Result HcclGetRankId(Comm *comm, uint32_t *rank) { *rank = comm->rank; return OK; }

/* --------------------------------------------------------------------------------------------------------- reductions */

static size_t type_bytes(Type type) {
    static const size_t bytes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
    return type >= 0 && type < 12 ? bytes[type] : 0;
}

static float bf16_to_float(uint16_t half) { uint32_t bits = (uint32_t)half << 16; float value; memcpy(&value, &bits, 4); return value; }
static uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return isnan(value) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static float half_to_float(uint16_t half) {
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    float value = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24);
    return half & 0x8000 ? -value : value;
}
static uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    float magnitude = fabsf(value);
    if (isnan(value)) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 6.103515625e-05f) return sign | (uint16_t)lrintf(magnitude * 16777216.0f);
    return sign | ((bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
}

#define COMBINE(a, b) (op == SUM ? (a) + (b) : op == PROD ? (a) * (b) : op == MAX ? ((a) > (b) ? (a) : (b)) : ((a) < (b) ? (a) : (b)))
#define CASE(TYPE, ctype) \
    case TYPE: { \
        ctype *x = into; const ctype *y = from; \
        for (uint64_t i = 0; i < count; i++) x[i] = COMBINE(x[i], y[i]); \
        return; \
    }
#define HALF_CASE(TYPE, widen, narrow) \
    case TYPE: { \
        uint16_t *x = into; const uint16_t *y = from; \
        for (uint64_t i = 0; i < count; i++) { float a = widen(x[i]), b = widen(y[i]); x[i] = narrow(COMBINE(a, b)); } \
        return; \
    }

static void reduce_into(void *into, const void *from, uint64_t count, Type type, Op op) {
    switch (type) {
        CASE(INT8, int8_t) CASE(INT16, int16_t) CASE(INT32, int32_t) CASE(INT64, int64_t)
        CASE(UINT8, uint8_t) CASE(UINT16, uint16_t) CASE(UINT32, uint32_t) CASE(UINT64, uint64_t)
        CASE(FP32, float) CASE(FP64, double)
        HALF_CASE(FP16, half_to_float, float_to_half) HALF_CASE(BF16, bf16_to_float, float_to_bf16)
    }
}

/* --------------------------------------------------------------------------------------------------------- collectives */

/* Every rank gives `bytes`; rank 0 returns all of them in the order of the ranks (to be freed), the others NULL. */
static Result gather_to_first(Comm *comm, const void *data, size_t bytes, char **all) {
    *all = NULL;
    if (comm->rank) return send_all(comm->peer[0], data, bytes);
    *all = malloc(bytes * comm->size + 1);
    if (!*all) return NO_MEMORY;
    memcpy(*all, data, bytes);
    for (uint32_t i = 1; i < comm->size; i++) {
        Result result = receive_all(comm->peer[i], *all + i * bytes, bytes);
        if (result) { free(*all); *all = NULL; return result; }
    }
    return OK;
}

static Result give_from_first(Comm *comm, const char *all, size_t each, size_t step, void *out) { /* rank i gets all[i * step] */
    if (comm->rank) return receive_all(comm->peer[0], out, each);
    for (uint32_t i = 1; i < comm->size; i++) {
        Result result = send_all(comm->peer[i], all + i * step, each);
        if (result) return result;
    }
    memmove(out, all, each);
    return OK;
}

static Result check(const char *name, Type type) {
    emulated_flush();
    emulated_count(name);
    return type_bytes(type) ? OK : emulated_fail(NOT_SUPPORTED, "%s: data type %d is not emulated", name, type);
}

Result HcclAllReduce(void *send, void *receive, uint64_t count, Type type, Op op, Comm *comm, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    char *all;
    Result result = check("HcclAllReduce", type);
    if (result || (result = gather_to_first(comm, send, bytes, &all))) return result;
    for (uint32_t i = 1; all && i < comm->size; i++) reduce_into(all, all + i * bytes, count, type, op);
    result = give_from_first(comm, all, bytes, 0, receive);
    free(all);
    return result;
}

Result HcclReduce(void *send, void *receive, uint64_t count, Type type, Op op, uint32_t root, Comm *comm, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    char *all;
    Result result = check("HcclReduce", type);
    if (result || (result = gather_to_first(comm, send, bytes, &all))) return result;
    for (uint32_t i = 1; all && i < comm->size; i++) reduce_into(all, all + i * bytes, count, type, op);
    if (all && root == 0) memcpy(receive, all, bytes);
    else if (all) result = send_all(comm->peer[root], all, bytes);
    else if (comm->rank == root) result = receive_all(comm->peer[0], receive, bytes);
    free(all);
    return result;
}

Result HcclReduceScatter(void *send, void *receive, uint64_t count, Type type, Op op, Comm *comm, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type), whole = bytes * comm->size;
    char *all;
    Result result = check("HcclReduceScatter", type);
    if (result || (result = gather_to_first(comm, send, whole, &all))) return result;
    for (uint32_t i = 1; all && i < comm->size; i++) reduce_into(all, all + i * whole, count * comm->size, type, op);
    result = give_from_first(comm, all, bytes, bytes, receive);
    free(all);
    return result;
}

Result HcclAllGather(void *send, void *receive, uint64_t count, Type type, Comm *comm, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    char *all;
    Result result = check("HcclAllGather", type);
    if (result || (result = gather_to_first(comm, send, bytes, &all))) return result;
    result = give_from_first(comm, all, bytes * comm->size, 0, receive);
    free(all);
    return result;
}

Result HcclBroadcast(void *data, uint64_t count, Type type, uint32_t root, Comm *comm, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    Result result = check("HcclBroadcast", type);
    if (result || comm->rank != root) return result ? result : receive_all(comm->peer[root], data, bytes);
    for (uint32_t i = 0; i < comm->size && !result; i++)
        if (i != root) result = send_all(comm->peer[i], data, bytes);
    return result;
}

Result HcclScatter(void *send, void *receive, uint64_t count, Type type, uint32_t root, Comm *comm, Stream stream) {
    (void)stream;
    size_t bytes = count * type_bytes(type);
    Result result = check("HcclScatter", type);
    if (result || comm->rank != root) return result ? result : receive_all(comm->peer[root], receive, bytes);
    for (uint32_t i = 0; i < comm->size && !result; i++)
        if (i != root) result = send_all(comm->peer[i], (char *)send + i * bytes, bytes);
    memmove(receive, (char *)send + root * bytes, bytes);
    return result;
}

Result HcclSend(void *data, uint64_t count, Type type, uint32_t to, Comm *comm, Stream stream) {
    (void)stream;
    Result result = check("HcclSend", type);
    return result ? result : send_all(comm->peer[to], data, count * type_bytes(type));
}

Result HcclRecv(void *data, uint64_t count, Type type, uint32_t from, Comm *comm, Stream stream) {
    (void)stream;
    Result result = check("HcclRecv", type);
    return result ? result : receive_all(comm->peer[from], data, count * type_bytes(type));
}

/* Pairs of ranks exchange in rounds; in each the lower rank sends first, so that no two wait for one another. */
static Result exchange(Comm *comm, const char *send, const size_t *send_bytes, const size_t *send_at, char *receive,
                       const size_t *receive_bytes, const size_t *receive_at) {
    for (uint32_t round = 0; round < comm->size; round++) {
        uint32_t peer = (round + comm->size - comm->rank) % comm->size;
        if (peer == comm->rank) {
            memmove(receive + receive_at[peer], send + send_at[peer], send_bytes[peer]);
            continue;
        }
        for (int turn = 0; turn < 2; turn++) {
            bool sending = (comm->rank < peer) == (turn == 0);
            Result result = sending ? send_all(comm->peer[peer], send + send_at[peer], send_bytes[peer])
                                    : receive_all(comm->peer[peer], receive + receive_at[peer], receive_bytes[peer]);
            if (result) return result;
        }
    }
    return OK;
}

Result HcclAlltoAllV(const void *send, const void *send_counts, const void *send_at, Type send_type, const void *receive,
                     const void *receive_counts, const void *receive_at, Type receive_type, Comm *comm, Stream stream) {
    (void)stream;
    Result result = check("HcclAlltoAllV", send_type);
    if (result) return result;
    size_t sizes[4][64];
    for (uint32_t i = 0; i < comm->size; i++) {
        sizes[0][i] = ((const uint64_t *)send_counts)[i] * type_bytes(send_type);
        sizes[1][i] = ((const uint64_t *)send_at)[i] * type_bytes(send_type);
        sizes[2][i] = ((const uint64_t *)receive_counts)[i] * type_bytes(receive_type);
        sizes[3][i] = ((const uint64_t *)receive_at)[i] * type_bytes(receive_type);
    }
    return exchange(comm, send, sizes[0], sizes[1], (char *)receive, sizes[2], sizes[3]);
}

Result HcclAlltoAll(const void *send, uint64_t send_count, Type send_type, const void *receive, uint64_t receive_count,
                    Type receive_type, Comm *comm, Stream stream) {
    (void)stream;
    Result result = check("HcclAlltoAll", send_type);
    if (result) return result;
    size_t sizes[4][64];
    for (uint32_t i = 0; i < comm->size; i++) {
        sizes[0][i] = send_count * type_bytes(send_type), sizes[1][i] = i * sizes[0][i];
        sizes[2][i] = receive_count * type_bytes(receive_type), sizes[3][i] = i * sizes[2][i];
    }
    return exchange(comm, send, sizes[0], sizes[1], (char *)receive, sizes[2], sizes[3]);
}

Result HcclBarrier(Comm *comm, Stream stream) {
    char token = 0;
    return HcclAllReduce(&token, &token, 1, INT8, MAX, comm, stream);
}
