// The least that a libtorch without CUDA or MPS needs to believe in a device: hooks and a guard that do
// nothing. Loaded before torch, which looks for hooks of these names when they are first asked for.
// PRETENDED_DEVICE=mps makes it an MPS device instead of a CUDA one.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <cstdlib>
#include <string_view>

namespace at {
bool is_mps() {
  const char* name = std::getenv("PRETENDED_DEVICE");
  return name && std::string_view(name) == "mps";
}

struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return !is_mps(); }
  bool isAvailable() const override { return !is_mps(); }
  bool isBuilt() const override { return !is_mps(); }
  bool hasPrimaryContext(DeviceIndex) const override { return !is_mps(); }
  DeviceIndex deviceCount() const override { return is_mps() ? 0 : 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return is_mps() ? 0 : 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

struct MPSHooks : MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return is_mps(); }
  bool isAvailable() const override { return is_mps(); }
  bool isBuilt() const override { return is_mps(); }
  bool hasPrimaryContext(DeviceIndex) const override { return is_mps(); }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  DeviceIndex deviceCount() const override { return is_mps() ? 1 : 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_MPS_HOOKS(MPSHooks)
}  // namespace at

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
C10_REGISTER_GUARD_IMPL(MPS, FakeGuardImpl<DeviceType::MPS>)
}
