// What was asked of the device, in order, for tests that compare it with a list.
#pragma once

extern "C" {
// Adds a line while tracing is on.
void npu_sim_note(const char *what);
// Forgets all lines and begins.
void npu_sim_trace_start();
// Ends and returns the lines; the text lives until the next start.
const char *npu_sim_trace_stop();
}
