/* Stands for libcuda.so.1, as far as a context on each GPU needs it. build.py compiles it.
   /etc/nvidia-stand-in/cuda: "802" has cuInit end in that error, "999 3" the context on GPU 3. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void fault(int *code, int *gpu) {
  FILE *file = fopen("/etc/nvidia-stand-in/cuda", "r");
  *code = 0;
  *gpu = -1;
  if (file) {
    if (fscanf(file, "%d %d", code, gpu) < 1) *code = 0;
    fclose(file);
  }
}

int cuInit(unsigned flags) {
  int code, gpu;
  fault(&code, &gpu);
  return gpu < 0 ? code : 0;
}

int cuDeviceGetCount(int *count) {
  char path[32];
  *count = 0;
  for (int minor = 0; minor < 16; minor++) {
    snprintf(path, sizeof path, "/dev/nvidia%d", minor);
    if (access(path, F_OK) == 0) ++*count;
  }
  return 0;
}

int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }

int cuDevicePrimaryCtxRetain(void **context, int device) {
  int code, gpu;
  fault(&code, &gpu);
  *context = 0;
  return gpu == device ? code : 0;
}

int cuCtxSetCurrent(void *context) { return 0; }
int cuMemAlloc_v2(unsigned long long *memory, unsigned long size) { *memory = 1; return 0; }
int cuMemsetD8_v2(unsigned long long memory, unsigned char byte, unsigned long size) { return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuMemFree_v2(unsigned long long memory) { return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }

int cuGetErrorString(int code, const char **text) {
  *text = code == 802 ? "system not yet initialized" : "unknown error";
  return 0;
}
