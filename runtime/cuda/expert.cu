// One expert for one token: y = down (act(gate h) * up h), in two kernels instead of a dozen.
//
// A decode step is bound by reading the weights, so each is read exactly once, in 16-byte loads, by one warp per row.
// Sums and everything between the products are fp32: the inner values of real models leave the range of fp16.
// Rows must be multiples of 8 values, which makes every row start on 16 bytes.

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace {

constexpr int kLanes = 32;
constexpr int kValuesPerLoad = 8;  // fp16 values in a uint4

struct alignas(16) Values {
    __half at[kValuesPerLoad];
};

__device__ float summed_over_lanes(float value) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, step);
    }
    return value;
}

// This lane's share of row . x; x is fp16 or fp32.
template <typename T>
__device__ float partial_dot(const __half* row, const T* x, int size, int lane) {
    float sum = 0.0f;
    for (int start = lane * kValuesPerLoad; start < size; start += kLanes * kValuesPerLoad) {
        const Values weights = *reinterpret_cast<const Values*>(row + start);
        for (int i = 0; i < kValuesPerLoad; ++i) {
            sum += __half2float(weights.at[i]) * static_cast<float>(x[start + i]);
        }
    }
    return sum;
}

__device__ float activated(float x, int kind) {
    if (kind == 0) {
        return x / (1.0f + expf(-x));  // silu
    }
    if (kind == 1) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));  // gelu
    }
    return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));  // gelu, tanh form
}

}  // namespace

// gate_up [2 * inner, hidden] fp16, h [hidden] fp16, mixed [inner] fp32.
extern "C" __global__ void edge_gate_up(const __half* gate_up, const __half* h, float* mixed, int hidden, int inner,
                                        int activation) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
    const int lane = threadIdx.x % kLanes;
    if (row >= inner) {
        return;  // whole warps leave, so the lanes of the others still meet
    }
    const __half* first = gate_up + static_cast<long long>(row) * hidden;
    const float gate = summed_over_lanes(partial_dot(first, h, hidden, lane));
    const float up = summed_over_lanes(partial_dot(first + static_cast<long long>(inner) * hidden, h, hidden, lane));
    if (lane == 0) {
        mixed[row] = activated(gate, activation) * up;
    }
}

// down [hidden, inner] fp16, mixed [inner] fp32, y [hidden] fp32.
extern "C" __global__ void edge_down(const __half* down, const float* mixed, float* y, int hidden, int inner) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
    const int lane = threadIdx.x % kLanes;
    if (row >= hidden) {
        return;
    }
    const float sum = summed_over_lanes(partial_dot(down + static_cast<long long>(row) * inner, mixed, inner, lane));
    if (lane == 0) {
        y[row] = sum;
    }
}
