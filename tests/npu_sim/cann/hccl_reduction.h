// TEST-ONLY SIMULATOR. Element types and reductions of HCCL.
#pragma once
#include <cstddef>

#include "third_party/hccl/inc/hccl/hccl.h"

namespace npu_sim {

size_t element_size(HcclDataType type);

// into[i] = op(into[i], from[i])
void reduce_into(void *into, const void *from, size_t count, HcclDataType type, HcclReduceOp op);

}  // namespace npu_sim
