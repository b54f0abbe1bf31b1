// TEST-ONLY SIMULATOR. Shared memory, waiting and byte transport below the HCCL calls of hccl_api.cpp.
#include "hccl_shm.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <mutex>
#include <sched.h>
#include <set>
#include <sys/mman.h>
#include <unistd.h>

namespace npu_sim {
namespace {

using Clock = std::chrono::steady_clock;

// Files that this process created and that not all ranks have opened yet: they must not outlive it.
std::mutex unopened_mutex;
std::set<std::string> unopened;

void remove_unopened() {
    std::lock_guard<std::mutex> lock(unopened_mutex);
    for (const std::string &path : unopened) {
        unlink(path.c_str());
    }
    unopened.clear();
}

[[noreturn]] void stop(const Communicator &communicator, const std::string &what) {
    fprintf(stderr, "npu_sim: rank %u of %u in communicator %s: %s\n", communicator.rank, communicator.size,
            communicator.name.c_str(), what.c_str());
    fflush(stderr);
    remove_unopened();
    abort();
}

std::chrono::seconds patience() {
    const char *seconds = getenv("NPU_SIM_TIMEOUT");
    return std::chrono::seconds(seconds == nullptr ? 60 : atoi(seconds));
}

// A wait that first yields, then sleeps (tests have fewer cores than ranks), and that ends after `patience()`.
class Wait {
public:
    Wait(const Communicator &communicator, std::string doing)
        : communicator_(communicator), doing_(std::move(doing)), deadline_(Clock::now() + patience()) {
    }
    void once() {
        if (++rounds_ < 200) {
            sched_yield();
            return;
        }
        usleep(50);
        if (Clock::now() > deadline_) {
            stop(communicator_, "waited " + std::to_string(patience().count()) + " s in " + doing_ +
                                    "; the other ranks do not take part (NPU_SIM_TIMEOUT sets the seconds)");
        }
    }

private:
    const Communicator &communicator_;
    std::string doing_;
    Clock::time_point deadline_;
    int rounds_ = 0;
};

std::string text(const Call &call) {
    return std::string(call.name) + " of " + std::to_string(call.count) + " elements, type " +
           std::to_string(call.type) + ", reduction or root " + std::to_string(call.detail);
}

std::string last_part(const std::string &path) {
    return path.substr(path.rfind('/') + 1);
}

// Copies between a flat buffer and a ring position that may wrap around.
void into_ring(Ring &ring, uint64_t position, const char *from, uint64_t bytes) {
    uint64_t start = position % kRingBytes;
    uint64_t first = std::min<uint64_t>(bytes, kRingBytes - start);
    memcpy(ring.data + start, from, first);
    memcpy(ring.data, from + first, bytes - first);
}

void from_ring(const Ring &ring, uint64_t position, char *to, uint64_t bytes) {
    uint64_t start = position % kRingBytes;
    uint64_t first = std::min<uint64_t>(bytes, kRingBytes - start);
    memcpy(to, ring.data + start, first);
    memcpy(to + first, ring.data, bytes - first);
}

}  // namespace

std::string create_file() {
    static bool registered = atexit(remove_unopened) == 0;
    (void)registered;
    const char *folder = getenv("NPU_SIM_SHM");
    std::string path = std::string(folder == nullptr ? "/tmp" : folder) + "/npu_sim_XXXXXX";
    int file = mkstemp(path.data());
    if (file < 0) {
        fprintf(stderr, "npu_sim: cannot create %s: %s\n", path.c_str(), strerror(errno));
        return "";
    }
    close(file);
    std::lock_guard<std::mutex> lock(unopened_mutex);
    unopened.insert(path);
    return path;
}

Communicator::Communicator(const std::string &path, uint32_t size, uint32_t rank)
    : name(last_part(path)), size(size), rank(rank), path_(path) {
    mapped_bytes_ = 4096 + size * sizeof(Slot) + static_cast<size_t>(size) * size * sizeof(Ring);
    int file = open(path.c_str(), O_RDWR);
    if (file < 0 || ftruncate(file, static_cast<off_t>(mapped_bytes_)) != 0) {
        stop(*this, "cannot open " + path + ": " + strerror(errno));
    }
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (mapped_ == MAP_FAILED) {
        stop(*this, "cannot map " + path + ": " + strerror(errno));
    }
    header_ = static_cast<Header *>(mapped_);
    slots_ = reinterpret_cast<Slot *>(static_cast<char *>(mapped_) + 4096);
    rings_ = reinterpret_cast<Ring *>(slots_ + size);
    barrier("creating the communicator");
    unlink(path.c_str());  // all ranks have it mapped: from here on the memory goes when the last of them goes
    std::lock_guard<std::mutex> lock(unopened_mutex);
    unopened.erase(path);
}

Communicator::~Communicator() {
    munmap(mapped_, mapped_bytes_);
}

char *Communicator::slot(uint32_t of_rank) {
    return slots_[of_rank].data;
}

Ring &Communicator::ring(uint32_t from, uint32_t to) {
    return rings_[from * size + to];
}

void Communicator::barrier(const char *doing) {
    uint32_t generation = header_->generation;
    if (header_->arrived.fetch_add(1) + 1 == size) {
        header_->arrived = 0;
        header_->generation.fetch_add(1);
        return;
    }
    Wait wait(*this, doing);
    while (header_->generation == generation) {
        wait.once();
    }
}

void Communicator::meet(const Call &call) {
    uint64_t parity = rounds_++ % 2;
    slots_[rank].call[parity] = call;
    barrier(text(call).c_str());
    const Call &first = slots_[0].call[parity];
    bool same = strcmp(first.name, call.name) == 0 && first.count == call.count && first.type == call.type &&
                first.detail == call.detail;
    if (!same) {
        stop(*this, "calls " + text(call) + ", while rank 0 calls " + text(first));
    }
}

// Moves what can be moved now; false when the ring is full or empty.
bool Communicator::advance(Transfer &transfer) {
    Ring &channel = transfer.sending ? ring(rank, transfer.peer) : ring(transfer.peer, rank);
    uint64_t written = channel.written;
    uint64_t read = channel.read;
    uint64_t available = transfer.sending ? kRingBytes - (written - read) : written - read;
    if (!transfer.announced) {
        if (available < sizeof(uint64_t)) {
            return false;
        }
        if (transfer.sending) {
            into_ring(channel, written, reinterpret_cast<const char *>(&transfer.bytes), sizeof(uint64_t));
            channel.written = written + sizeof(uint64_t);
        } else {
            uint64_t sent = 0;
            from_ring(channel, read, reinterpret_cast<char *>(&sent), sizeof(uint64_t));
            channel.read = read + sizeof(uint64_t);
            if (sent != transfer.bytes) {
                stop(*this, "receives " + std::to_string(transfer.bytes) + " bytes from rank " +
                                std::to_string(transfer.peer) + ", which sent " + std::to_string(sent));
            }
        }
        transfer.announced = true;
        return true;
    }
    uint64_t bytes = std::min(available, transfer.bytes - transfer.done);
    if (bytes == 0) {
        return false;
    }
    if (transfer.sending) {
        into_ring(channel, written, transfer.data + transfer.done, bytes);
        channel.written = written + bytes;
    } else {
        from_ring(channel, read, transfer.data + transfer.done, bytes);
        channel.read = read + bytes;
    }
    transfer.done += bytes;
    return true;
}

void Communicator::transfer(std::vector<Transfer> transfers) {
    Wait wait(*this, "a send or receive");
    size_t open = transfers.size();
    while (open > 0) {
        bool moved = false;
        std::set<std::pair<bool, uint32_t>> busy;  // a message behind an unfinished one to the same peer waits
        for (Transfer &current : transfers) {
            if (current.complete() || !busy.insert({current.sending, current.peer}).second) {
                continue;
            }
            moved = advance(current) || moved;
            open -= current.complete();
        }
        if (!moved) {
            wait.once();
        }
    }
}

}  // namespace npu_sim
