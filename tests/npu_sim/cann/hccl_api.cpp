// TEST-ONLY SIMULATOR. The calls of libhccl, done on the host and finished when they return. A rank is the position in
// the communicator, so any subset of the processes can form one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "acl/acl.h"
#include "hccl_reduction.h"
#include "hccl_shm.h"
#include "third_party/hccl/inc/hccl/hccl.h"

using npu_sim::Call;
using npu_sim::Communicator;
using npu_sim::element_size;
using npu_sim::kSlotBytes;
using npu_sim::reduce_into;
using npu_sim::Transfer;

namespace {

Communicator &of(HcclComm handle) {
    return *static_cast<Communicator *>(handle);
}

Call describe(const char *name, uint64_t count, HcclDataType type, uint32_t detail) {
    Call call{};
    snprintf(call.name, sizeof call.name, "%s", name);
    call.count = count;
    call.type = static_cast<uint32_t>(type);
    call.detail = detail;
    return call;
}

// ---- collectives

// Runs `exchange(offset, elements)` for each piece of a message that fits into a slot. Even an empty message meets
// once, so that ranks that disagree about it are found.
void in_pieces(Communicator &communicator, const Call &call, uint64_t count, size_t bytes_each,
               const std::function<void(uint64_t, uint64_t)> &publish,
               const std::function<void(uint64_t, uint64_t)> &collect) {
    uint64_t most = kSlotBytes / bytes_each;
    uint64_t offset = 0;
    do {
        uint64_t elements = count - offset < most ? count - offset : most;
        publish(offset, elements);
        communicator.meet(call);
        collect(offset, elements);
        communicator.meet(call);  // nobody overwrites a slot that another still reads
        offset += elements;
    } while (offset < count);
}

// Every rank gets the reduction of elements [first, first + kept) of all ranks' `from`; the order of the additions is
// that of the ranks, on each of them, so all get the same bits.
void reduce_range(Communicator &communicator, const Call &call, const char *from, char *into, uint64_t count,
                  uint64_t first, uint64_t kept, HcclDataType type, HcclReduceOp op) {
    size_t each = element_size(type);
    auto publish = [&](uint64_t offset, uint64_t elements) {
        memcpy(communicator.slot(communicator.rank), from + offset * each, elements * each);
    };
    auto collect = [&](uint64_t offset, uint64_t elements) {
        std::vector<char> sum(communicator.slot(0), communicator.slot(0) + elements * each);
        for (uint32_t rank = 1; rank < communicator.size; rank++) {
            reduce_into(sum.data(), communicator.slot(rank), elements, type, op);
        }
        uint64_t begin = offset > first ? offset : first;
        uint64_t end = offset + elements < first + kept ? offset + elements : first + kept;
        if (begin < end) {
            memcpy(into + (begin - first) * each, sum.data() + (begin - offset) * each, (end - begin) * each);
        }
    };
    in_pieces(communicator, call, count, each, publish, collect);
}

char *bytes(const void *pointer) {
    return static_cast<char *>(const_cast<void *>(pointer));
}

}  // namespace

extern "C" {

// ---- communicators

HcclResult HcclGetRootInfo(HcclRootInfo *info) {
    std::string path = npu_sim::create_file();
    snprintf(info->internal, sizeof info->internal, "%s", path.c_str());
    return path.empty() ? HCCL_E_INTERNAL : HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo *info, uint32_t rank, HcclComm *handle) {
    *handle = new Communicator(info->internal, size, rank);
    return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo *info, uint32_t rank, const HcclCommConfig *,
                                      HcclComm *handle) {
    return HcclCommInitRootInfo(size, info, rank, handle);
}

uint32_t HcclGetCommConfigCapability() {
    return HCCL_COMM_CONFIG_COMM_NAME;  // as an older CANN: no later option is asked for
}

HcclResult HcclCommDestroy(HcclComm handle) {
    delete &of(handle);
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char *name) {
    snprintf(name, COMM_NAME_MAX_LENGTH, "%s", of(handle).name.c_str());
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm handle, uint32_t *size) {
    *size = of(handle).size;
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm handle, uint32_t *rank) {
    *rank = of(handle).rank;
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm, HcclResult *error) {
    *error = HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

const char *HcclGetErrorString(HcclResult) {
    return "error of the simulated HCCL";
}

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) {
    return HCCL_SUCCESS;
}

HcclResult HcclGetConfig(HcclConfig, HcclConfigValue *value) {
    value->value = 0;
    return HCCL_SUCCESS;
}

// ---- collectives

HcclResult HcclBarrier(HcclComm handle, aclrtStream) {
    of(handle).meet(describe("Barrier", 0, HCCL_DATA_TYPE_INT8, 0));
    return HCCL_SUCCESS;
}

HcclResult HcclAllReduce(void *from, void *into, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                         aclrtStream) {
    Call call = describe("AllReduce", count, type, op);
    reduce_range(of(handle), call, bytes(from), bytes(into), count, 0, count, type, op);
    return HCCL_SUCCESS;
}

HcclResult HcclReduce(void *from, void *into, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root,
                      HcclComm handle, aclrtStream) {
    uint64_t kept = of(handle).rank == root ? count : 0;
    Call call = describe("Reduce", count, type, root);
    reduce_range(of(handle), call, bytes(from), bytes(into), count, 0, kept, type, op);
    return HCCL_SUCCESS;
}

HcclResult HcclReduceScatter(void *from, void *into, uint64_t kept, HcclDataType type, HcclReduceOp op,
                             HcclComm handle, aclrtStream) {
    Communicator &communicator = of(handle);
    uint64_t count = kept * communicator.size;
    Call call = describe("ReduceScatter", kept, type, op);
    uint64_t first = kept * communicator.rank;
    // `into` may be a part of `from`: the result is put together aside while pieces of `from` are still to be read
    std::vector<char> result(kept * element_size(type));
    reduce_range(communicator, call, bytes(from), result.data(), count, first, kept, type, op);
    memcpy(into, result.data(), result.size());
    return HCCL_SUCCESS;
}

HcclResult HcclAllGather(void *from, void *into, uint64_t count, HcclDataType type, HcclComm handle, aclrtStream) {
    Communicator &communicator = of(handle);
    size_t each = element_size(type);
    auto publish = [&](uint64_t offset, uint64_t elements) {
        memcpy(communicator.slot(communicator.rank), bytes(from) + offset * each, elements * each);
    };
    auto collect = [&](uint64_t offset, uint64_t elements) {
        for (uint32_t rank = 0; rank < communicator.size; rank++) {
            memcpy(bytes(into) + (rank * count + offset) * each, communicator.slot(rank), elements * each);
        }
    };
    in_pieces(communicator, describe("AllGather", count, type, 0), count, each, publish, collect);
    return HCCL_SUCCESS;
}

HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle, aclrtStream) {
    Communicator &communicator = of(handle);
    size_t each = element_size(type);
    auto publish = [&](uint64_t offset, uint64_t elements) {
        if (communicator.rank == root) {
            memcpy(communicator.slot(root), bytes(data) + offset * each, elements * each);
        }
    };
    auto collect = [&](uint64_t offset, uint64_t elements) {
        memcpy(bytes(data) + offset * each, communicator.slot(root), elements * each);
    };
    in_pieces(communicator, describe("Broadcast", count, type, root), count, each, publish, collect);
    return HCCL_SUCCESS;
}

// ---- point to point

HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, HcclComm handle, aclrtStream) {
    std::vector<Transfer> transfers;
    for (uint32_t i = 0; i < count; i++) {
        const HcclSendRecvItem &item = items[i];
        bool sending = item.sendRecvType == HCCL_SEND;
        transfers.push_back({sending, item.remoteRank, bytes(item.buf), item.count * element_size(item.dataType)});
    }
    of(handle).transfer(transfers);
    return HCCL_SUCCESS;
}

HcclResult HcclSend(void *data, uint64_t count, HcclDataType type, uint32_t to, HcclComm handle, aclrtStream) {
    of(handle).transfer({{true, to, bytes(data), count * element_size(type)}});
    return HCCL_SUCCESS;
}

HcclResult HcclRecv(void *data, uint64_t count, HcclDataType type, uint32_t from, HcclComm handle, aclrtStream) {
    of(handle).transfer({{false, from, bytes(data), count * element_size(type)}});
    return HCCL_SUCCESS;
}

HcclResult HcclScatter(void *from, void *into, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                       aclrtStream) {
    Communicator &communicator = of(handle);
    uint64_t each = count * element_size(type);
    std::vector<Transfer> transfers;
    for (uint32_t peer = 0; communicator.rank == root && peer < communicator.size; peer++) {
        transfers.push_back({true, peer, bytes(from) + peer * each, each});
    }
    transfers.push_back({false, root, bytes(into), each});
    communicator.transfer(transfers);
    return HCCL_SUCCESS;
}

// Counts and displacements are in elements, one per rank.
HcclResult HcclAlltoAllV(const void *from, const void *send_counts, const void *send_offsets, HcclDataType send_type,
                         const void *into, const void *receive_counts, const void *receive_offsets,
                         HcclDataType receive_type, HcclComm handle, aclrtStream) {
    auto *sent = static_cast<const uint64_t *>(send_counts);
    auto *sent_at = static_cast<const uint64_t *>(send_offsets);
    auto *received = static_cast<const uint64_t *>(receive_counts);
    auto *received_at = static_cast<const uint64_t *>(receive_offsets);
    size_t out = element_size(send_type);
    size_t in = element_size(receive_type);
    std::vector<Transfer> transfers;
    for (uint32_t peer = 0; peer < of(handle).size; peer++) {
        transfers.push_back({true, peer, bytes(from) + sent_at[peer] * out, sent[peer] * out});
        transfers.push_back({false, peer, bytes(into) + received_at[peer] * in, received[peer] * in});
    }
    of(handle).transfer(transfers);
    return HCCL_SUCCESS;
}

HcclResult HcclAlltoAll(const void *from, uint64_t send_count, HcclDataType send_type, const void *into,
                        uint64_t receive_count, HcclDataType receive_type, HcclComm handle, aclrtStream stream) {
    uint32_t size = of(handle).size;
    std::vector<uint64_t> sent(size, send_count);
    std::vector<uint64_t> received(size, receive_count);
    std::vector<uint64_t> sent_at(size);
    std::vector<uint64_t> received_at(size);
    for (uint32_t peer = 0; peer < size; peer++) {
        sent_at[peer] = peer * send_count;
        received_at[peer] = peer * receive_count;
    }
    return HcclAlltoAllV(from, sent.data(), sent_at.data(), send_type, into, received.data(), received_at.data(),
                         receive_type, handle, stream);
}

}  // extern "C"
