// Tasks over several threads: torch's own OpenMP team where this process has one, else threads made for the call.
//
// A team that torch left a moment ago still spins for its next work: threads beside it would fight it for the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace loopmdm {

// GNU OpenMP's entry, from whatever library torch brought with it; null without one. Nothing is linked against it. Its
// threads do not survive a fork, and the child would wait for them for ever: there, threads are made for the call.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
#if defined(__linux__)
inline bool forked = false;
inline const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
inline Team openmp_team() {
#if defined(__linux__)
    if (forked) return nullptr;
    static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return team;
#else
    return nullptr;
#endif
}

// task(0) .. task(tasks - 1), each once, in any order, by at most `workers` threads; task must not throw.
template <typename Task>
void parallel(int64_t tasks, int64_t workers, const Task& task) {
    workers = std::min(workers, tasks);
    if (workers <= 1) {
        for (int64_t i = 0; i < tasks; ++i) task(i);
        return;
    }
    struct Work {
        std::atomic<int64_t> next;
        int64_t tasks;
        const Task& task;
    } work{{0}, tasks, task};
    const auto run = [](void* at) {
        auto& w = *static_cast<Work*>(at);
        for (int64_t i; (i = w.next.fetch_add(1, std::memory_order_relaxed)) < w.tasks;) w.task(i);
    };
    if (const Team team = openmp_team()) return team(run, &work, static_cast<unsigned>(workers), 0);
    std::vector<std::thread> others;
    for (int64_t i = 1; i < workers; ++i) {
        try {
            others.emplace_back(run, &work);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: those that run take all the tasks
        }
    }
    run(&work);
    for (auto& other : others) other.join();
}

constexpr int64_t kOperationsPerThread = 1 << 20;  // waking a thread costs about as much

inline int64_t worth(int64_t operations, int threads) {
    return std::max<int64_t>(1, std::min<int64_t>(threads, operations / kOperationsPerThread));
}

}  // namespace loopmdm
