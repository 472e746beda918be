// The memory pool of lcw_ops/ops/memory_pool.py, as the kernels see it: its least size, and a check for signals.

#include <atomic>

#ifdef __linux__
#include <dlfcn.h>
#endif

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace lcw_ops {
namespace {

#ifdef __linux__
// Functions of Python's stable ABI. They are looked up at run time, because this library also works without Python.
template <typename Function>
Function* find(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

struct Python {
  int (*ensure)() = find<int()>("PyGILState_Ensure");
  void (*release)(int) = find<void(int)>("PyGILState_Release");
  int (*check_signals)() = find<int()>("PyErr_CheckSignals");
  void (*fetch)(void**, void**, void**) = find<void(void**, void**, void**)>("PyErr_Fetch");
  void (*restore)(void*, void*, void*) = find<void(void*, void*, void*)>("PyErr_Restore");
  int (*add_pending_call)(int (*)(void*), void*) = find<int(int (*)(void*), void*)>("Py_AddPendingCall");

  bool is_there() const { return ensure && release && check_signals && fetch && restore && add_pending_call; }
};

const Python& python() {
  static const Python functions;
  return functions;
}

// An error that a signal's handler has raised during an op. Only the main thread runs handlers.
struct Raised {
  void *type = nullptr, *value = nullptr, *traceback = nullptr;
};
std::atomic<Raised*> raised{nullptr};

// Python calls this in the main thread before its next instruction.
int raise_again(void*) {
  Raised* const error = raised.exchange(nullptr);
  if (!error) return 0;
  python().restore(error->type, error->value, error->traceback);
  delete error;
  return -1;
}
#endif

// Sets the least size in bytes, and returns the one before.
int64_t set_least_pooled(int64_t bytes) { return least_pooled.exchange(bytes); }

}  // namespace

bool may_run_python() {
#ifdef __linux__
  const Python& functions = python();
  if (!functions.is_there()) return true;
  // Python has room for 32 pending calls. If none was left, this is another try.
  if (raised.load()) return functions.add_pending_call(raise_again, nullptr), false;
  const int state = functions.ensure();
  if (functions.check_signals() != 0) {
    auto* error = new Raised;
    functions.fetch(&error->type, &error->value, &error->traceback);
    raised.store(error);
    functions.add_pending_call(raise_again, nullptr);
  }
  functions.release(state);
  return !raised.load();
#else
  return true;
#endif
}

}  // namespace lcw_ops

STABLE_TORCH_LIBRARY_IMPL(lcw_ops, CompositeExplicitAutograd, m) {
  m.impl("set_least_pooled.cpp", TORCH_BOX(&lcw_ops::set_least_pooled));
}
