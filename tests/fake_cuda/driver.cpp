// Stands in for NVIDIA's driver: a launch leaves here what it hands over, and starts nothing.

#include <cstdint>
#include <cstring>

struct Launch {
  unsigned grid[3], block[3], shared_bytes;
};

extern "C" {
int expected = 0;  // how many arguments the next launch has
uint64_t arguments[256];  // their first eight bytes
Launch last;
int launches = 0;

int cuLaunchKernelEx(const Launch* launch, void*, void** given, void**) {
  for (int i = 0; i < expected; ++i) std::memcpy(&arguments[i], given[i], sizeof(uint64_t));
  last = *launch;
  ++launches;
  return 0;
}
int cuPointerGetAttribute(uint64_t* found, int, uint64_t pointer) {
  *found = pointer;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = &last;
  return 0;
}

#define NOTHING(name) \
  int name() { return 0; }
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorString)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleUnload)
}
