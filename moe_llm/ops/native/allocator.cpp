// An allocator for torch's large CPU tensors that keeps what is freed, for the next ones; see caching_allocator.py.
//
// Each of two pools is one range of addresses, of which pages are there once they have been written. A request takes
// the smallest free block that it fits into, and the lowest of several, and else the range's next part; what is freed
// is joined with its free neighbours. Small requests have a pool of their own, so that they do not break up large
// blocks.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kLarge = size_t(1) << 20;
const size_t kPage = sysconf(_SC_PAGESIZE);

class Pool {
public:
    // Reserves the addresses; 0 or errno.
    int reserve(size_t bytes) {
        void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (begin == MAP_FAILED) return errno;
        base_ = static_cast<char*>(begin);
        size_ = bytes;
        return 0;
    }

    bool holds(const void* p) const { return base_ <= p && p < base_ + size_; }

    // Null where no part of the range is large enough.
    void* take(size_t bytes) {
        bytes = (bytes + kPage - 1) / kPage * kPage;
        std::lock_guard<std::mutex> guard(lock);
        size_t at;
        auto found = by_size_.lower_bound({bytes, 0});
        if (found != by_size_.end()) {
            auto [size, offset] = *found;
            erase(offset, size);
            if (size > bytes) insert(offset + bytes, size - bytes);
            at = offset;
        } else {
            size_t tail = 0;  // a free block at the end is grown
            if (!by_offset_.empty()) {
                auto [offset, size] = *by_offset_.rbegin();
                if (offset + size == top_) tail = size;
            }
            if (size_ - top_ + tail < bytes) return nullptr;
            if (tail) erase(top_ - tail, tail);
            at = top_ - tail;
            top_ = at + bytes;
        }
        used_[at] = bytes;
        in_use_ += bytes;
        return base_ + at;
    }

    // The bytes that were p's.
    size_t give(void* p) {
        std::lock_guard<std::mutex> guard(lock);
        auto entry = used_.find(static_cast<char*>(p) - base_);
        TORCH_INTERNAL_ASSERT(entry != used_.end(), "not an address that this allocator gave out, or freed twice");
        size_t at = entry->first, bytes = entry->second, freed = bytes;
        used_.erase(entry);
        in_use_ -= bytes;
        auto next = by_offset_.lower_bound(at);
        if (next != by_offset_.end() && next->first == at + bytes) {
            size_t more = next->second;
            erase(at + bytes, more);
            bytes += more;
        }
        auto after = by_offset_.lower_bound(at);
        if (after != by_offset_.begin()) {
            auto [offset, size] = *std::prev(after);
            if (offset + size == at) {
                erase(offset, size);
                at = offset;
                bytes += size;
            }
        }
        insert(at, bytes);
        return freed;
    }

    // Returns the pages of all that is free to the system; 0 or errno.
    int empty() {
        std::lock_guard<std::mutex> guard(lock);
        for (auto [offset, size] : by_offset_)
            if (madvise(base_ + offset, size, MADV_DONTNEED)) return errno;
        if (!by_offset_.empty()) {
            auto [offset, size] = *by_offset_.rbegin();
            if (offset + size == top_) {
                erase(offset, size);
                top_ = offset;
            }
        }
        return 0;
    }

    size_t in_use() {
        std::lock_guard<std::mutex> guard(lock);
        return in_use_;
    }

    size_t reached() {
        std::lock_guard<std::mutex> guard(lock);
        return top_;
    }

    std::mutex lock;  // held over a fork, or the child might find it locked for ever

private:
    void insert(size_t offset, size_t size) {
        by_offset_[offset] = size;
        by_size_.insert({size, offset});
    }
    void erase(size_t offset, size_t size) {
        by_offset_.erase(offset);
        by_size_.erase({size, offset});
    }

    char* base_ = nullptr;
    size_t size_ = 0, top_ = 0, in_use_ = 0;
    std::map<size_t, size_t> by_offset_;            // free blocks: offset -> size
    std::set<std::pair<size_t, size_t>> by_size_;   // the same as (size, offset)
    std::unordered_map<size_t, size_t> used_;       // offset -> size
};

// never destroyed: tensors are freed at exit, too
Pool& small = *new Pool;
Pool& large = *new Pool;
std::atomic<bool> active{false};
size_t least;
c10::Allocator* plain = nullptr;

void report(void* p, int64_t change) {
    if (c10::memoryProfilingEnabled())
        c10::reportMemoryUsageToProfiler(p, change, small.in_use() + large.in_use(), 0, c10::Device(c10::DeviceType::CPU));
}

void release(void* p) {
    if (p == nullptr) return;
    Pool* pool = small.holds(p) ? &small : large.holds(p) ? &large : nullptr;
    if (pool == nullptr) return plain->raw_deallocate(p);
    report(p, -static_cast<int64_t>(pool->give(p)));
}

struct CachingAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* p = nullptr;
        if (active.load(std::memory_order_relaxed) && bytes >= least) {
            p = (bytes < kLarge ? small : large).take(bytes);
            if (p != nullptr) report(p, (bytes + kPage - 1) / kPage * kPage);
        }
        if (p == nullptr) p = plain->raw_allocate(bytes);
        return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// Tensors of at least `bytes` come from ranges of `range` bytes each from now on, where `use` is told so; 0 or errno.
extern "C" int install(size_t bytes, size_t range) {
    least = bytes;
    for (Pool* pool : {&small, &large})
        if (int error = pool->reserve(range)) return error;
    plain = c10::GetCPUAllocator();
    pthread_atfork([] { small.lock.lock(); large.lock.lock(); }, [] { large.lock.unlock(); small.lock.unlock(); },
                   [] { large.lock.unlock(); small.lock.unlock(); });
    c10::SetCPUAllocator(new CachingAllocator, 255);
    return 0;
}

extern "C" int use(int wanted) { return active.exchange(wanted != 0); }

extern "C" int empty_cache() {
    int error = small.empty();
    return error ? error : large.empty();
}

extern "C" size_t in_use() { return small.in_use() + large.in_use(); }
extern "C" size_t reached() { return small.reached() + large.reached(); }
