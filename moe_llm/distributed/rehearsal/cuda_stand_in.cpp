// A stand-in for the CUDA device in builds of torch that have none, so that tensors without values (FakeTensorMode) can
// bear the device `cuda` through autograd: one device, one stream, and nothing that computes.
//
// torch installs such a guard itself where it was built with CUDA and finds no device; in a build without CUDA there is
// neither a guard nor hooks that say which accelerator there is, which autograd asks for.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device current() { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return current(); }
  Device getDevice() const override { return current(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, current()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, current()); }
};

struct Hooks final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

const Guard guard;
const Hooks hooks;
void* type_before = nullptr;

auto& guard_slot() { return c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)]; }

// torch looks its hooks up once in a process and keeps a reference to the object, which has no fields: to stand in for it
// later, and to step back, the object's type is exchanged.
void* held_hooks() { return const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()); }

}  // namespace

// 1: installed; 0: there is a device, or a stand-in of torch's own, already.
extern "C" int install() {
  if (guard_slot().load() != nullptr || at::detail::getCUDAHooks().hasCUDA()) return 0;
  guard_slot().store(&guard);
  std::memcpy(&type_before, held_hooks(), sizeof(void*));
  std::memcpy(held_hooks(), &hooks, sizeof(void*));
  return 1;
}

extern "C" void uninstall() {
  std::memcpy(held_hooks(), &type_before, sizeof(void*));
  guard_slot().store(nullptr);
}
