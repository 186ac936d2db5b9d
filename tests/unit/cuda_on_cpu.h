// Runs runtime/cuda/expert.cu on a CPU: 32 threads are a warp, and meet at every shuffle as the lanes of a GPU do.
// For tests of what the kernels compute, not of how fast.
#pragma once
#include <barrier>
#include <math.h>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__

struct __half {
    _Float16 value;
    operator float() const { return static_cast<float>(value); }
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }

struct Place { unsigned x; };
thread_local Place blockIdx, blockDim, threadIdx;

struct Warp {
    std::barrier<> meet{32};
    float lanes[32];
};
thread_local Warp* warp;

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    const unsigned lane = threadIdx.x % 32;
    warp->lanes[lane] = value;
    warp->meet.arrive_and_wait();
    const float other = warp->lanes[lane ^ mask];
    warp->meet.arrive_and_wait();
    return other;
}

// One block after the other; the warps of a block share nothing in these kernels, so they run one after the other, too.
template <typename Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
    for (unsigned block = 0; block < blocks; ++block) {
        for (unsigned first = 0; first < threads; first += 32) {
            Warp shared;
            std::vector<std::thread> lanes;
            for (unsigned lane = 0; lane < 32; ++lane) {
                lanes.emplace_back([&, lane] {
                    blockIdx = {block};
                    blockDim = {threads};
                    threadIdx = {first + lane};
                    warp = &shared;
                    kernel();
                });
            }
            for (auto& lane : lanes) lane.join();
        }
    }
}
