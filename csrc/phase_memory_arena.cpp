// Transactions over the page table: planned, executed, then committed, or undone in reverse.
//
// Nothing of the table changes before every driver call has succeeded, so undoing concerns only the
// driver's state. Pages are mapped at their new place before they are unmapped at the old one:
// the step that can run out of memory or table space comes first, while the old place is intact.
#include "phase_memory_arena.h"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <utility>

namespace lwz {
namespace {

[[noreturn]] void refuse(const std::string& message) {
    throw MemoryFailure(kLwzMemoryInvalid, message);
}

std::string slot_name(int64_t region, int64_t slot) {
    return "page " + std::to_string(slot) + " of region " + std::to_string(region);
}

}  // namespace

Arena::Arena(std::unique_ptr<MemoryBackend> backend, int64_t page_bytes, int64_t capacity_bytes)
    : backend_(std::move(backend)), pid_(getpid()) {
    const int64_t granularity = backend_->granularity();
    if (capacity_bytes < granularity) {
        refuse("capacity must hold one page: expected at least " + std::to_string(granularity) +
               " bytes, got " + std::to_string(capacity_bytes));
    }
    if (page_bytes == 0) {
        const int64_t smallest = (capacity_bytes - 1) / kLwzMemoryDefaultMaxPages + 1;
        page_bytes = ((smallest - 1) / granularity + 1) * granularity;
    }
    if (page_bytes < 0 || page_bytes % granularity != 0 || page_bytes > capacity_bytes) {
        refuse("page size must be a multiple of " + std::to_string(granularity) +
               " bytes and at most the capacity, got " + std::to_string(page_bytes));
    }
    stats_.page_bytes = page_bytes;
    stats_.capacity = capacity_bytes / page_bytes;
    // All the room that committing and undoing can need: neither may fail for lack of it.
    pages_.resize(stats_.capacity);
    free_.reserve(stats_.capacity);
    absent_.reserve(stats_.capacity);
    for (int64_t page = stats_.capacity - 1; page >= 0; --page) absent_.push_back(page);
}

void Arena::close(bool keep_addresses) {
    if (is_foreign_process()) {
        (void)backend_.release();  // the parent's device state is not ours to touch
        return;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    std::exception_ptr first_failure;
    const auto attempt = [&](const auto& call) {
        try {
            call();
        } catch (const MemoryFailure&) {
            if (!first_failure) first_failure = std::current_exception();
        }
    };
    attempt([&] { backend_->synchronize(); });
    for (Region& region : regions_) {
        const int64_t num_slots = static_cast<int64_t>(region.page_of_slot.size());
        for (int64_t slot = 0; slot < num_slots; ++slot) {
            const uint64_t address = region.address + slot * stats_.page_bytes;
            if (is_broken_) {
                // Nobody knows what is mapped; most of these fail because nothing is.
                try {
                    backend_->unmap(address, stats_.page_bytes);
                } catch (const MemoryFailure&) {
                }
            } else if (region.page_of_slot[slot] >= 0) {
                attempt([&] { backend_->unmap(address, stats_.page_bytes); });
            }
        }
    }
    for (Page& page : pages_) {
        if (page.is_physical) attempt([&] { backend_->release(page.handle, stats_.page_bytes); });
    }
    for (Region& region : regions_) {
        if (region.is_reserved && !keep_addresses) {
            const int64_t bytes = region.page_of_slot.size() * stats_.page_bytes;
            attempt([&] { backend_->unreserve(region.address, bytes); });
        }
    }
    if (first_failure) std::rethrow_exception(first_failure);
}

int64_t Arena::reserve(int64_t num_pages, uint64_t* address) {
    const auto lock = lock_usable();
    if (num_pages < 1 || num_pages > INT64_MAX / stats_.page_bytes) {
        refuse("a region needs at least one page and fewer bytes than 2^63, got " +
               std::to_string(num_pages) + " pages");
    }
    Region region;
    region.page_of_slot.assign(num_pages, -1);
    regions_.reserve(regions_.size() + 1);
    region.address = backend_->reserve(num_pages * stats_.page_bytes);
    region.is_reserved = true;
    regions_.push_back(std::move(region));
    *address = regions_.back().address;
    return static_cast<int64_t>(regions_.size()) - 1;
}

void Arena::unreserve(int64_t index) {
    const auto lock = lock_usable();
    Region& region = region_at(index);
    for (size_t slot = 0; slot < region.page_of_slot.size(); ++slot) {
        if (region.page_of_slot[slot] >= 0) {
            refuse(slot_name(index, slot) + " is still mapped: unmap it first");
        }
    }
    backend_->unreserve(region.address, region.page_of_slot.size() * stats_.page_bytes);
    region.is_reserved = false;
    region.page_of_slot = {};
}

void Arena::apply(const LwzMemoryMove* moves, int64_t num_moves) {
    const auto lock = lock_usable();
    std::vector<Step> steps = plan(moves, num_moves);
    Progress progress;
    progress.created.reserve(steps.size());
    const bool is_unmapping = std::any_of(steps.begin(), steps.end(),
                                          [](const Step& step) { return step.src_region >= 0; });
    if (is_unmapping) {
        backend_->synchronize();
        ++stats_.synchronizations;
    }
    try {
        execute(steps, progress);
    } catch (const std::exception& cause) {
        ++stats_.rollbacks;
        undo(steps, progress, cause.what());
        throw;
    }
    commit(steps, progress);
}

int64_t Arena::release_free(int64_t keep) {
    const auto lock = lock_usable();
    if (keep < 0) refuse("cannot keep a negative number of pages, got " + std::to_string(keep));
    int64_t released = 0;
    while (static_cast<int64_t>(free_.size()) > keep) {
        const int64_t page = free_.back();
        backend_->release(pages_[page].handle, stats_.page_bytes);
        free_.pop_back();
        absent_.push_back(page);
        pages_[page].is_physical = false;
        ++released;
        ++stats_.released;
    }
    return released;
}

void Arena::page_table(int64_t index, int64_t* out) {
    const auto lock = lock_readable();
    const Region& region = region_at(index);
    std::copy(region.page_of_slot.begin(), region.page_of_slot.end(), out);
}

LwzMemoryStats Arena::stats() {
    const auto lock = lock_readable();
    LwzMemoryStats stats = stats_;
    stats.physical = stats.capacity - absent_.size();
    stats.free = free_.size();
    stats.mapped = stats.physical - stats.free;
    return stats;
}

int64_t Arena::device_free_bytes() {
    const auto lock = lock_readable();
    return backend_->free_bytes();
}

uint64_t Arena::address(int64_t region) {
    const auto lock = lock_usable();
    return region_at(region).address;
}

int64_t Arena::region_bytes(int64_t region) {
    const auto lock = lock_usable();
    return region_at(region).page_of_slot.size() * stats_.page_bytes;
}

int64_t Arena::end_of_hole(int64_t index, int64_t offset, int64_t bytes) {
    const auto lock = lock_usable();
    const Region& region = region_at(index);
    const int64_t last = (offset + bytes - 1) / stats_.page_bytes;
    for (int64_t slot = offset / stats_.page_bytes; slot <= last; ++slot) {
        if (region.page_of_slot[slot] < 0) return (slot + 1) * stats_.page_bytes;
    }
    return 0;
}

std::unique_lock<std::mutex> Arena::lock_readable() {
    // Before the lock: another thread may have held it when the process forked.
    if (is_foreign_process()) {
        throw MemoryFailure(kLwzMemoryBroken, "the memory belongs to the parent process");
    }
    return std::unique_lock<std::mutex>(mutex_);
}

std::unique_lock<std::mutex> Arena::lock_usable() {
    auto lock = lock_readable();
    if (is_broken_) {
        throw MemoryFailure(kLwzMemoryBroken,
                            "an earlier failure could not be undone: close the memory");
    }
    return lock;
}

Arena::Region& Arena::region_at(int64_t region) {
    if (region < 0 || region >= static_cast<int64_t>(regions_.size()) ||
        !regions_[region].is_reserved) {
        refuse("there is no region " + std::to_string(region));
    }
    return regions_[region];
}

std::vector<Arena::Step> Arena::plan(const LwzMemoryMove* moves, int64_t num_moves) {
    std::vector<Step> steps;
    std::vector<std::vector<bool>> is_named(regions_.size());
    // Checks one side of a page's way and returns the slot's address.
    const auto name_slot = [&](int64_t index, int64_t slot, bool is_source) {
        Region& region = region_at(index);
        if (is_named[index].empty()) is_named[index].resize(region.page_of_slot.size());
        if ((region.page_of_slot[slot] >= 0) != is_source) {
            refuse(slot_name(index, slot) + (is_source ? " is not mapped" : " is already mapped"));
        }
        if (is_named[index][slot]) refuse(slot_name(index, slot) + " is named twice");
        is_named[index][slot] = true;
        return region.address + slot * stats_.page_bytes;
    };
    const auto check_slots = [&](int64_t index, int64_t first, int64_t num_pages) {
        const int64_t num_slots = region_at(index).page_of_slot.size();
        if (first < 0 || first > num_slots - num_pages) {
            refuse("pages " + std::to_string(first) + " to " + std::to_string(first) + " + " +
                   std::to_string(num_pages) + " are outside region " + std::to_string(index) +
                   " of " + std::to_string(num_slots) + " pages");
        }
    };

    int64_t num_from_pool = 0;
    for (int64_t i = 0; i < num_moves; ++i) {
        const LwzMemoryMove& move = moves[i];
        const bool is_from_pool = move.src_region == -1, is_to_pool = move.dst_region == -1;
        if (move.num_pages < 1) refuse("a move takes at least one page");
        if (is_from_pool && is_to_pool) refuse("a move from the pool to the pool");
        if (!is_from_pool) check_slots(move.src_region, move.src_page, move.num_pages);
        if (!is_to_pool) check_slots(move.dst_region, move.dst_page, move.num_pages);
        for (int64_t page = 0; page < move.num_pages; ++page) {
            Step step{-1, 0, move.src_region, 0, move.src_page + page,
                      move.dst_region, 0, move.dst_page + page};
            if (is_from_pool) {
                if (num_from_pool < static_cast<int64_t>(free_.size())) {
                    step.page = free_[free_.size() - 1 - num_from_pool];
                }
                ++num_from_pool;
            } else {
                step.src_address = name_slot(step.src_region, step.src_slot, true);
                step.page = regions_[step.src_region].page_of_slot[step.src_slot];
            }
            if (!is_to_pool) step.dst_address = name_slot(step.dst_region, step.dst_slot, false);
            if (step.page >= 0) step.handle = pages_[step.page].handle;
            steps.push_back(step);
        }
    }
    const int64_t num_new = num_from_pool - static_cast<int64_t>(free_.size());
    if (num_new > static_cast<int64_t>(absent_.size())) {
        throw MemoryFailure(kLwzMemoryExhausted,
                            "over capacity: " + std::to_string(num_from_pool) +
                                " pages are asked for, " + std::to_string(free_.size()) +
                                " are free and " + std::to_string(absent_.size()) +
                                " may still be created");
    }
    return steps;
}

void Arena::execute(std::vector<Step>& steps, Progress& progress) {
    for (Step& step : steps) {
        if (step.page >= 0) continue;
        step.handle = backend_->create(stats_.page_bytes);
        progress.created.push_back(step.handle);
    }
    for (; progress.mapped < steps.size(); ++progress.mapped) {
        const Step& step = steps[progress.mapped];
        if (step.dst_region >= 0) {
            backend_->map(step.dst_address, step.handle, stats_.page_bytes);
        }
    }
    allow_access(steps, &Step::dst_address, &Step::dst_region, steps.size());
    for (; progress.unmapped < steps.size(); ++progress.unmapped) {
        const Step& step = steps[progress.unmapped];
        if (step.src_region >= 0) backend_->unmap(step.src_address, stats_.page_bytes);
    }
}

void Arena::undo(const std::vector<Step>& steps, Progress& progress, const std::string& cause) {
    std::string failure;
    const auto attempt = [&](const auto& call) {
        try {
            call();
            return true;
        } catch (const std::exception& error) {
            if (failure.empty()) failure = error.what();
            return false;
        }
    };
    for (size_t i = 0; i < progress.unmapped; ++i) {
        const Step& step = steps[i];
        if (step.src_region < 0) continue;
        attempt([&] { backend_->map(step.src_address, step.handle, stats_.page_bytes); });
    }
    attempt([&] {
        allow_access(steps, &Step::src_address, &Step::src_region, progress.unmapped);
    });
    for (size_t i = 0; i < progress.mapped; ++i) {
        if (steps[i].dst_region < 0) continue;
        attempt([&] { backend_->unmap(steps[i].dst_address, stats_.page_bytes); });
    }
    is_broken_ = !failure.empty();
    // A new page that the driver does not take back stays ours, free: that is no inconsistency.
    for (const uint64_t handle : progress.created) {
        const bool is_released = attempt([&] { backend_->release(handle, stats_.page_bytes); });
        if (!is_released) free_.push_back(adopt(handle));
    }
    if (is_broken_) {
        throw MemoryFailure(kLwzMemoryBroken, cause + "; undoing it failed too: " + failure +
                                                  ": close the memory");
    }
}

void Arena::commit(const std::vector<Step>& steps, const Progress& progress) {
    size_t num_created = 0, num_from_pool = 0;
    for (const Step& step : steps) num_from_pool += step.src_region < 0 && step.page >= 0;
    free_.resize(free_.size() - num_from_pool);
    for (const Step& step : steps) {
        const int64_t page = step.page >= 0 ? step.page : adopt(progress.created[num_created++]);
        const bool has_source = step.src_region >= 0, has_destination = step.dst_region >= 0;
        if (has_source) regions_[step.src_region].page_of_slot[step.src_slot] = -1;
        if (has_destination) {
            regions_[step.dst_region].page_of_slot[step.dst_slot] = page;
        } else {
            free_.push_back(page);
        }
        stats_.maps += has_destination && !has_source;
        stats_.unmaps += has_source && !has_destination;
        stats_.handovers += has_source && has_destination;
    }
    const int64_t physical = stats_.capacity - absent_.size();
    const int64_t mapped = physical - free_.size();
    stats_.peak_physical = std::max(stats_.peak_physical, physical);
    stats_.peak_mapped = std::max(stats_.peak_mapped, mapped);
}

void Arena::allow_access(const std::vector<Step>& steps, uint64_t Step::*address,
                         int64_t Step::*region, size_t end) {
    // One call for each run of neighbouring addresses: its cost is per call, not per page.
    uint64_t begin = 0;
    int64_t bytes = 0;
    for (size_t i = 0; i < end; ++i) {
        const Step& step = steps[i];
        if (step.*region < 0) continue;
        if (bytes > 0 && step.*address == begin + bytes) {
            bytes += stats_.page_bytes;
            continue;
        }
        if (bytes > 0) backend_->allow_access(begin, bytes);
        begin = step.*address;
        bytes = stats_.page_bytes;
    }
    if (bytes > 0) backend_->allow_access(begin, bytes);
}

int64_t Arena::adopt(uint64_t handle) {
    const int64_t page = absent_.back();
    absent_.pop_back();
    pages_[page] = {handle, true};
    ++stats_.created;
    return page;
}

bool Arena::is_foreign_process() const { return getpid() != pid_; }

}  // namespace lwz
