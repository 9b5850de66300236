// Stand-in for NVIDIA's driver library, with the functions that Triton calls to load and launch kernels.
//
// No GPU is needed: kernels are loaded but never run. A launch only calls the recorder, if one is set.

#include <cuda.h>
#include <stddef.h>

typedef void (*Recorder)(unsigned long long function, const unsigned int* grid, unsigned int threads,
                         unsigned int shared, unsigned long long stream, void** parameters);

static Recorder recorder = NULL;
static unsigned long long kernels = 0;

void stub_set_recorder(Recorder callback) { recorder = callback; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  if (recorder != NULL) {
    unsigned int grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    recorder((unsigned long long)function, grid, config->blockDimX, config->sharedMemBytes,
             (unsigned long long)config->hStream, parameters);
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)(++kernels);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = 227 << 10;  // opt-in shared memory of a Hopper thread block; no caller reads another attribute's
                       // exact value
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "error of the stand-in driver";
  return CUDA_SUCCESS;
}

// Linked by Triton's launcher, but never called for the kernels of this package.
#define UNUSED(name)                           \
  CUresult unused_##name(void) __asm__(#name); \
  CUresult unused_##name(void) { return CUDA_ERROR_NOT_SUPPORTED; }
UNUSED(cuCtxGetDevice)
UNUSED(cuCtxGetLimit)
UNUSED(cuCtxSetLimit)
UNUSED(cuDriverGetVersion)
UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuStreamIsCapturing)
UNUSED(cuTensorMapEncodeIm2col)
UNUSED(cuTensorMapEncodeTiled)
