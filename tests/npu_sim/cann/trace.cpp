#include "trace.h"

#include <mutex>
#include <string>

namespace {

std::mutex mutex;
std::string lines;
bool on = false;

}  // namespace

extern "C" {

void npu_sim_note(const char *what) {
    std::lock_guard<std::mutex> lock(mutex);
    if (on) {
        lines.append(what).append("\n");
    }
}

void npu_sim_trace_start() {
    std::lock_guard<std::mutex> lock(mutex);
    lines.clear();
    on = true;
}

const char *npu_sim_trace_stop() {
    std::lock_guard<std::mutex> lock(mutex);
    on = false;
    return lines.c_str();
}

}  // extern "C"
