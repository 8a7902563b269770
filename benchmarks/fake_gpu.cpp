// What torch asks a CUDA build in C++, answered where there is no GPU: that there is a device, which stream is current,
// and generators. fake_gpu.py compiles and loads this.
#include <cstring>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

using c10::DeviceType;

struct Generator final : at::CPUGeneratorImpl {
  Generator() { device_ = c10::Device(DeviceType::CUDA, 0); }
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
};

extern "C" void exchange() {
  // No class of hooks has members, so the objects differ by their class alone and can change places.
  static Hooks other_hooks;
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  char kept[sizeof(Hooks)];
  std::memcpy(kept, static_cast<void*>(&hooks), sizeof kept);
  std::memcpy(static_cast<void*>(&hooks), static_cast<void*>(&other_hooks), sizeof kept);
  std::memcpy(static_cast<void*>(&other_hooks), kept, sizeof kept);

  static const c10::impl::DeviceGuardImplInterface* other_guard = new c10::impl::FakeGuardImpl<DeviceType::CUDA>;
  auto& guard = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  other_guard = guard.exchange(other_guard);
}
