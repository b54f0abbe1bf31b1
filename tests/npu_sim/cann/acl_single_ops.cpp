// TEST-ONLY SIMULATOR. libacl_op_compiler's "compile and execute one operator". Arithmetic of tensors never comes
// here (tests/npu_sim/simulator.py takes it over above this level); these are the few operators that torch_npu's own
// C++ code, ProcessGroupHCCL above all, launches by name for itself.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "element.h"
#include "trace.h"

namespace {

struct Description {
    aclDataType type;
    std::vector<int64_t> shape;
    int64_t elements() const {
        int64_t count = 1;
        for (int64_t size : shape) {
            count *= size;
        }
        return count;
    }
};

struct Buffer {
    void *data;
    size_t bytes;
};

// One operand: what the descriptor and the buffer of the same index say together.
struct Operand {
    const Description *description;
    void *data;
    int64_t elements() const {
        return description->elements();
    }
    double load(int64_t i) const;
    void store(int64_t i, double value) const;
};

double Operand::load(int64_t i) const {
    switch (description->type) {
        case ACL_FLOAT: return static_cast<float *>(data)[i];
        case ACL_DOUBLE: return static_cast<double *>(data)[i];
        case ACL_FLOAT16: return static_cast<Half *>(data)[i];
        case ACL_BF16: return from_bfloat16(static_cast<uint16_t *>(data)[i]);
        case ACL_INT8: return static_cast<int8_t *>(data)[i];
        case ACL_UINT8: return static_cast<uint8_t *>(data)[i];
        case ACL_BOOL: return static_cast<uint8_t *>(data)[i];
        case ACL_INT16: return static_cast<int16_t *>(data)[i];
        case ACL_INT32: return static_cast<int32_t *>(data)[i];
        case ACL_INT64: return static_cast<double>(static_cast<int64_t *>(data)[i]);
        default: fprintf(stderr, "npu_sim: single operator on ACL data type %d\n", description->type); abort();
    }
}

void Operand::store(int64_t i, double value) const {
    switch (description->type) {
        case ACL_FLOAT: static_cast<float *>(data)[i] = static_cast<float>(value); break;
        case ACL_DOUBLE: static_cast<double *>(data)[i] = value; break;
        case ACL_FLOAT16: static_cast<Half *>(data)[i] = static_cast<Half>(value); break;
        case ACL_BF16: static_cast<uint16_t *>(data)[i] = to_bfloat16(static_cast<float>(value)); break;
        case ACL_INT8: static_cast<int8_t *>(data)[i] = static_cast<int8_t>(value); break;
        case ACL_UINT8: static_cast<uint8_t *>(data)[i] = static_cast<uint8_t>(value); break;
        case ACL_BOOL: static_cast<uint8_t *>(data)[i] = value != 0; break;
        case ACL_INT16: static_cast<int16_t *>(data)[i] = static_cast<int16_t>(value); break;
        case ACL_INT32: static_cast<int32_t *>(data)[i] = static_cast<int32_t>(value); break;
        case ACL_INT64: static_cast<int64_t *>(data)[i] = static_cast<int64_t>(value); break;
        default: fprintf(stderr, "npu_sim: single operator on ACL data type %d\n", description->type); abort();
    }
}

using Operands = std::vector<Operand>;

void fill(const Operand &out, double value) {
    for (int64_t i = 0; i < out.elements(); i++) {
        out.store(i, value);
    }
}

void copy(const Operand &in, const Operand &out) {
    for (int64_t i = 0; i < out.elements(); i++) {
        out.store(i, in.load(i));
    }
}

// inputs: x, paddings [rank, 2] (before, after), the value that fills the border
void pad(const Operands &in, const Operand &out) {
    const std::vector<int64_t> &inner = in[0].description->shape;
    const std::vector<int64_t> &outer = out.description->shape;
    for (int64_t i = 0; i < out.elements(); i++) {
        int64_t rest = i;
        int64_t source = 0;
        int64_t stride = 1;
        bool inside = true;
        for (int64_t axis = static_cast<int64_t>(outer.size()) - 1; axis >= 0 && inside; axis--) {
            int64_t position = rest % outer[axis] - static_cast<int64_t>(in[1].load(2 * axis));
            rest /= outer[axis];
            inside = position >= 0 && position < inner[axis];
            source += position * stride;
            stride *= inner[axis];
        }
        out.store(i, inside ? in[0].load(source) : in[2].load(0));
    }
}

const std::map<std::string, std::function<void(const Operands &, const Operand &)>> operators = {
    {"ZerosLike", [](const Operands &, const Operand &out) { fill(out, 0); }},
    {"OnesLike", [](const Operands &, const Operand &out) { fill(out, 1); }},
    {"Fill", [](const Operands &in, const Operand &out) { fill(out, in.back().load(0)); }},
    {"Cast", [](const Operands &in, const Operand &out) { copy(in[0], out); }},
    {"Identity", [](const Operands &in, const Operand &out) { copy(in[0], out); }},
    {"TensorMove", [](const Operands &in, const Operand &out) { copy(in[0], out); }},
    {"PadV3", [](const Operands &in, const Operand &out) { pad(in, out); }},
};

Operand operand(const aclTensorDesc *description, const aclDataBuffer *buffer) {
    return {reinterpret_cast<const Description *>(description), reinterpret_cast<const Buffer *>(buffer)->data};
}

aclError execute(const char *name, int inputs, const aclTensorDesc *const in[], const aclDataBuffer *const in_data[],
                 const aclTensorDesc *out, const aclDataBuffer *out_data) {
    npu_sim_note(name);
    auto found = operators.find(name);
    if (found == operators.end()) {
        fprintf(stderr, "npu_sim: single operator %s is not simulated (tests/npu_sim/cann/acl_single_ops.cpp)\n", name);
        return ACL_ERROR_OP_NOT_FOUND;
    }
    Operands operands;
    for (int i = 0; i < inputs; i++) {
        operands.push_back(operand(in[i], in_data[i]));
    }
    found->second(operands, operand(out, out_data));
    return ACL_SUCCESS;
}

const Description &described(const aclTensorDesc *description) {
    return *reinterpret_cast<const Description *>(description);
}

}  // namespace

extern "C" {

aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) {
    return reinterpret_cast<aclDataBuffer *>(new Buffer{data, bytes});
}

aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
    delete reinterpret_cast<const Buffer *>(buffer);
    return ACL_SUCCESS;
}

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int rank, const int64_t *shape, aclFormat) {
    return reinterpret_cast<aclTensorDesc *>(new Description{type, std::vector<int64_t>(shape, shape + rank)});
}

void aclDestroyTensorDesc(const aclTensorDesc *description) {
    delete reinterpret_cast<const Description *>(description);
}

aclError aclGetTensorDescDimV2(const aclTensorDesc *description, size_t axis, int64_t *size) {
    *size = described(description).shape[axis];
    return ACL_SUCCESS;
}

size_t aclGetTensorDescNumDims(const aclTensorDesc *description) {
    return described(description).shape.size();
}

aclDataType aclGetTensorDescType(const aclTensorDesc *description) {
    return described(description).type;
}

aclFormat aclGetTensorDescFormat(const aclTensorDesc *) {
    return ACL_FORMAT_ND;  // memory here is never in one of the private tiled formats
}

void aclSetTensorDescName(aclTensorDesc *, const char *) {
}

aclError aclSetTensorFormat(aclTensorDesc *, aclFormat) {
    return ACL_SUCCESS;
}

aclError aclSetTensorPlaceMent(aclTensorDesc *, aclMemType) {
    return ACL_SUCCESS;
}

aclError aclSetTensorShape(aclTensorDesc *, int, const int64_t *) {
    return ACL_SUCCESS;
}

// Attributes are not read by any operator above: Cast takes its target type from the output's description.
aclopAttr *aclopCreateAttr() {
    return static_cast<aclopAttr *>(malloc(1));
}

void aclopDestroyAttr(const aclopAttr *attributes) {
    free(const_cast<aclopAttr *>(attributes));
}

#define IGNORE_ATTRIBUTE(name, ...)                              \
    aclError name(aclopAttr *, const char *, __VA_ARGS__) {      \
        return ACL_SUCCESS;                                      \
    }

IGNORE_ATTRIBUTE(aclopSetAttrBool, uint8_t)
IGNORE_ATTRIBUTE(aclopSetAttrInt, int64_t)
IGNORE_ATTRIBUTE(aclopSetAttrFloat, float)
IGNORE_ATTRIBUTE(aclopSetAttrString, const char *)
IGNORE_ATTRIBUTE(aclopSetAttrDataType, aclDataType)
IGNORE_ATTRIBUTE(aclopSetAttrListBool, int, const uint8_t *)
IGNORE_ATTRIBUTE(aclopSetAttrListInt, int, const int64_t *)
IGNORE_ATTRIBUTE(aclopSetAttrListFloat, int, const float *)
IGNORE_ATTRIBUTE(aclopSetAttrListListInt, int, const int *, const int64_t *const[])

aclError aclopCompileAndExecute(const char *name, int inputs, const aclTensorDesc *const in[],
                                const aclDataBuffer *const in_data[], int, const aclTensorDesc *const out[],
                                aclDataBuffer *const out_data[], const aclopAttr *, aclopEngineType, aclopCompileType,
                                const char *, aclrtStream) {
    return execute(name, inputs, in, in_data, out[0], out_data[0]);
}

aclError aclopCompileAndExecuteV2(const char *name, int inputs, aclTensorDesc *in[], aclDataBuffer *in_data[], int,
                                  aclTensorDesc *out[], aclDataBuffer *out_data[], aclopAttr *, aclopEngineType,
                                  aclopCompileType, const char *, aclrtStream) {
    return execute(name, inputs, in, in_data, out[0], out_data[0]);
}

}  // extern "C"
