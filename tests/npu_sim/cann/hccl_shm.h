// TEST-ONLY SIMULATOR. One HCCL communicator: a file that its ranks map into their memory.
//
//   Header | one Slot per rank | one Ring per ordered pair of ranks (from, to)
//
// Collectives: every rank writes its piece into its slot, a barrier, every rank reads what it needs, a barrier; longer
// messages take several rounds. Point to point: a ring of bytes per ordered pair, so a send returns as soon as its
// bytes are in the ring, which is how a device-side send looks to the host.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace npu_sim {

constexpr size_t kSlotBytes = 1u << 20;
constexpr size_t kRingBytes = 16u << 20;  // pages that are never touched cost nothing

// What a rank is about to do. All ranks of a communicator must say the same in the same round.
struct Call {
    char name[16];
    uint64_t count;
    uint32_t type;
    uint32_t detail;  // the reduction or the root
};

struct Slot {
    Call call[2];  // of even and odd rounds: a fast rank may announce the next round while a slow one compares this
    char data[kSlotBytes];
};

struct Ring {
    std::atomic<uint64_t> written;  // bytes since the start; only the sender changes it
    std::atomic<uint64_t> read;     // only the receiver changes it
    char data[kRingBytes];
};

struct Header {
    std::atomic<uint32_t> arrived;
    std::atomic<uint32_t> generation;  // of the barrier
};

// One message of a point-to-point call, with how far it has come.
struct Transfer {
    bool sending;
    uint32_t peer;
    char *data;
    uint64_t bytes;
    uint64_t done = 0;
    bool announced = false;  // the length travels before the bytes, so that a receiver of another size notices
    bool complete() const {
        return announced && done == bytes;
    }
};

class Communicator {
public:
    Communicator(const std::string &path, uint32_t size, uint32_t rank);
    ~Communicator();

    // Waits for all ranks; `call` is compared with that of rank 0 and a difference ends the process.
    void meet(const Call &call);
    // Carries out all transfers, in order between each pair, interleaved between pairs.
    void transfer(std::vector<Transfer> transfers);
    char *slot(uint32_t of_rank);

    const std::string name;
    const uint32_t size;
    const uint32_t rank;

private:
    void barrier(const char *doing);
    Ring &ring(uint32_t from, uint32_t to);
    bool advance(Transfer &transfer);

    std::string path_;
    void *mapped_;
    size_t mapped_bytes_;
    uint64_t rounds_ = 0;
    Header *header_;
    Slot *slots_;
    Ring *rings_;
};

// A new file for a communicator, unique on this machine.
std::string create_file();

}  // namespace npu_sim
