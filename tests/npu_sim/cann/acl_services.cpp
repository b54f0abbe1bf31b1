// TEST-ONLY SIMULATOR. The calls of libascendcl and its neighbours that have nothing to do here: they answer with a
// constant or accept and forget. Kept apart from acl_runtime.cpp so that file holds only what behaves.
#include <cstdint>
#include <cstring>
#include <unistd.h>

#include "acl/acl.h"
#include "acl/acl_dump.h"
#include "acl/acl_op_compiler.h"

// Accepts any arguments that the header declares and reports success.
#define ACCEPT(name, ...)            \
    aclError name(__VA_ARGS__) {     \
        return ACL_SUCCESS;          \
    }

// The profiler and the kernel loader are declared in no header of the wheel. They are called with integers and
// pointers only, so a variadic C function receives them correctly on x86-64 and aarch64.
#define ACCEPT_UNDECLARED(name)      \
    int name(...) {                  \
        return 0;                    \
    }

extern "C" {

// ---- life cycle, errors, log
ACCEPT(aclInit, const char *)
ACCEPT(aclFinalize)
ACCEPT(aclrtResetDevice, int32_t)
ACCEPT(aclrtPeekAtLastError, aclrtLastErrLevel)
ACCEPT(aclrtGetLastError, aclrtLastErrLevel)

const char *aclGetRecentErrMsg() {
    return "";
}

void aclAppLog(aclLogLevel, const char *, const char *, uint32_t, const char *, ...) {
}

aclError aclsysGetVersionStr(char *, char *version) {
    strcpy(version, "8.5.0");  // of CANN; torch_npu switches features by it
    return ACL_SUCCESS;
}

// ---- device properties
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t *value) {
    *value = 24;  // cores
    return ACL_SUCCESS;
}

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t *value) {
    *value = 24;
    return ACL_SUCCESS;
}

aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical) {
    *logical = user;
    return ACL_SUCCESS;
}

aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo *info) {
    memset(info, 0, sizeof *info);
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) {
    *can = 1;
    return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t *pid) {
    *pid = getpid();
    return ACL_SUCCESS;
}

ACCEPT(aclrtDeviceEnablePeerAccess, int32_t, uint32_t)
ACCEPT(aclrtSetDeviceSatMode, aclrtFloatOverflowMode)
ACCEPT(aclrtSetOpWaitTimeout, uint32_t)
ACCEPT(aclrtSetOpExecuteTimeOut, uint32_t)
ACCEPT(aclrtSetSysParamOpt, aclSysParamOpt, int64_t)
ACCEPT(aclrtCtxSetSysParamOpt, aclSysParamOpt, int64_t)

aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t *value) {
    *value = 0;
    return ACL_SUCCESS;
}

// ---- waiting: everything has already happened
ACCEPT(aclrtSynchronizeDevice)
ACCEPT(aclrtSynchronizeDeviceWithTimeout, int32_t)
ACCEPT(aclrtSynchronizeStream, aclrtStream)
ACCEPT(aclrtSynchronizeStreamWithTimeout, aclrtStream, int32_t)
ACCEPT(aclrtSynchronizeEvent, aclrtEvent)
ACCEPT(aclrtStreamWaitEvent, aclrtStream, aclrtEvent)
ACCEPT(aclrtResetEvent, aclrtEvent, aclrtStream)
ACCEPT(aclrtSubscribeReport, uint64_t, aclrtStream)
ACCEPT(aclrtUnSubscribeReport, uint64_t, aclrtStream)

aclError aclrtProcessReport(int32_t) {
    usleep(1000);  // called in a loop by a thread that waits for callbacks
    return ACL_SUCCESS;
}

// ---- stream settings
ACCEPT(aclrtSetStreamFailureMode, aclrtStream, uint64_t)
ACCEPT(aclrtSetStreamOverflowSwitch, aclrtStream, uint32_t)
ACCEPT(aclrtSetStreamAttribute, aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue *)

aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t *flag) {
    *flag = 0;
    return ACL_SUCCESS;
}

// ---- memory bookkeeping
ACCEPT(aclrtHostRegisterV2, void *, uint64_t, uint32_t)
ACCEPT(aclrtHostUnregister, void *)
ACCEPT(aclrtMapMem, void *, size_t, size_t, aclrtDrvMemHandle, uint64_t)
ACCEPT(aclrtUnmapMem, void *)
ACCEPT(aclrtMemExportToShareableHandle, aclrtDrvMemHandle, aclrtMemHandleType, uint64_t, uint64_t *)
ACCEPT(aclrtMemImportFromShareableHandle, uint64_t, int32_t, aclrtDrvMemHandle *)
ACCEPT(aclrtMemSetPidToShareableHandle, uint64_t, int32_t *, size_t)

// ---- dumps, compiler options, kernel binaries
ACCEPT(aclmdlInitDump)
ACCEPT(aclmdlSetDump, const char *)
ACCEPT(aclmdlFinalizeDump)
ACCEPT(aclopStartDumpArgs, uint32_t, const char *)
ACCEPT(aclopStopDumpArgs, uint32_t)
ACCEPT(aclSetCompileopt, aclCompileOpt, const char *)
ACCEPT(aclrtBinaryGetFunction, const aclrtBinHandle, const char *, aclrtFuncHandle *)
ACCEPT(aclrtBinaryLoadFromData, const void *, size_t, const aclrtBinaryLoadOptions *, aclrtBinHandle *)
ACCEPT(aclrtGetFunctionAddr, aclrtFuncHandle, void **, void **)

size_t aclGetCompileoptSize(aclCompileOpt) {
    return 8;
}

aclError aclGetCompileopt(aclCompileOpt, char *value, size_t length) {
    if (length > 0) {
        value[0] = '\0';
    }
    return ACL_SUCCESS;
}

ACCEPT_UNDECLARED(rtDevBinaryRegister)
ACCEPT_UNDECLARED(rtFunctionRegister)
ACCEPT_UNDECLARED(rtGetC2cCtrlAddr)
ACCEPT_UNDECLARED(rtKernelLaunch)
ACCEPT_UNDECLARED(MsprofRegisterCallback)
ACCEPT_UNDECLARED(MsprofReportAdditionalInfo)
ACCEPT_UNDECLARED(MsprofReportApi)
ACCEPT_UNDECLARED(MsprofReportCompactInfo)

uint64_t MsprofGetHashId(const char *, size_t) {
    return 0;
}

uint64_t MsprofSysCycleTime() {
    return 0;
}

}  // extern "C"
