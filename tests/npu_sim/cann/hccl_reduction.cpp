// TEST-ONLY SIMULATOR. Arithmetic of HCCL's reductions, element by element on the host.
#include "hccl_reduction.h"

#include <cstdio>
#include <cstdlib>

#include "element.h"

namespace npu_sim {
namespace {

template <class Number>
Number reduced(Number a, Number b, HcclReduceOp op) {
    switch (op) {
        case HCCL_REDUCE_SUM: return static_cast<Number>(a + b);
        case HCCL_REDUCE_PROD: return static_cast<Number>(a * b);
        case HCCL_REDUCE_MAX: return a > b ? a : b;
        case HCCL_REDUCE_MIN: return a < b ? a : b;
        default: fprintf(stderr, "npu_sim: HCCL reduction %d is not simulated\n", op); abort();
    }
}

template <class Number>
void reduce_as(void *into, const void *from, size_t count, HcclReduceOp op) {
    auto *a = static_cast<Number *>(into);
    auto *b = static_cast<const Number *>(from);
    for (size_t i = 0; i < count; i++) {
        a[i] = reduced(a[i], b[i], op);
    }
}

void reduce_bfloat16(void *into, const void *from, size_t count, HcclReduceOp op) {
    auto *a = static_cast<uint16_t *>(into);
    auto *b = static_cast<const uint16_t *>(from);
    for (size_t i = 0; i < count; i++) {
        a[i] = to_bfloat16(reduced(from_bfloat16(a[i]), from_bfloat16(b[i]), op));
    }
}

}  // namespace

void reduce_into(void *into, const void *from, size_t count, HcclDataType type, HcclReduceOp op) {
    switch (type) {
        case HCCL_DATA_TYPE_FP32: reduce_as<float>(into, from, count, op); break;
        case HCCL_DATA_TYPE_FP64: reduce_as<double>(into, from, count, op); break;
        case HCCL_DATA_TYPE_FP16: reduce_as<Half>(into, from, count, op); break;
        case HCCL_DATA_TYPE_BFP16: reduce_bfloat16(into, from, count, op); break;
        case HCCL_DATA_TYPE_INT8: reduce_as<int8_t>(into, from, count, op); break;
        case HCCL_DATA_TYPE_UINT8: reduce_as<uint8_t>(into, from, count, op); break;
        case HCCL_DATA_TYPE_INT16: reduce_as<int16_t>(into, from, count, op); break;
        case HCCL_DATA_TYPE_INT32: reduce_as<int32_t>(into, from, count, op); break;
        case HCCL_DATA_TYPE_INT64: reduce_as<int64_t>(into, from, count, op); break;
        default: fprintf(stderr, "npu_sim: reduction of HCCL data type %d is not simulated\n", type); abort();
    }
}

size_t element_size(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8:
        case HCCL_DATA_TYPE_UINT8: return 1;
        case HCCL_DATA_TYPE_INT16:
        case HCCL_DATA_TYPE_UINT16:
        case HCCL_DATA_TYPE_FP16:
        case HCCL_DATA_TYPE_BFP16: return 2;
        case HCCL_DATA_TYPE_INT32:
        case HCCL_DATA_TYPE_UINT32:
        case HCCL_DATA_TYPE_FP32: return 4;
        case HCCL_DATA_TYPE_INT64:
        case HCCL_DATA_TYPE_UINT64:
        case HCCL_DATA_TYPE_FP64: return 8;
        default: fprintf(stderr, "npu_sim: HCCL data type %d is not simulated\n", type); abort();
    }
}

}  // namespace npu_sim
