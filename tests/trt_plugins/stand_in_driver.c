/* Stands in for NVIDIA's driver where there is none: prints what a launch asks of it, and does nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

#define OK 0
#define NOT_FOUND 500
#define CAPABILITY_MAJOR 75

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int* version) { return *version = 13000, OK; }
int cuCtxGetCurrent(void** context) { return *context = 0, OK; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, OK; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)0x1000, OK; }
int cuCtxSetCurrent(void* context) { return OK; }
int cuCtxGetDevice(int* device) { return *device = 0, OK; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    return *value = attribute == CAPABILITY_MAJOR ? 9 : 0, OK;
}
int cuModuleLoadData(void** module, const void* image) {
    printf("load %.3s\n", (const char*)image + 1);
    return *module = (void*)0x2000, OK;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    printf("find %s\n", name);
    return *function = (void*)0x3000, OK;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra) {
    printf("launch (%u, %u, %u) (%u, %u, %u) %u %llu %llu\n", grid_x, grid_y, grid_z, block_x, block_y, block_z, shared,
           (unsigned long long)(uintptr_t)stream, *(unsigned long long*)arguments[0]);
    return OK;
}

int cuGetProcAddress_v2(const char* name, void** address, int version, uint64_t flags, int* status) {
    *address = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
    if (status) *status = *address ? 0 : 1;
    return *address ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char* name, void** address, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, address, version, flags, 0);
}
