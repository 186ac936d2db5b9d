"""Values into fp16: exact where fp16 can hold them, refused with tensor and range where it cannot."""

import numpy as np
import pytest
import torch

from export.convert import all_finite, convert
from runtime.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, (1 << 17) - 1, (1 << 17) + 1, 300_000])
def test_agrees_with_numpy(dtype: torch.dtype, count: int) -> None:
    source = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 100).to(dtype)
    target = torch.empty(count, dtype=torch.float16)
    convert(source, target, "x")
    assert np.array_equal(target.numpy(), source.float().numpy().astype(np.float16))


def test_router_weights_keep_every_bit() -> None:
    source = torch.tensor([1e-30, -3.4e38, 0.1])
    target = torch.empty(3)
    convert(source, target, "x")
    assert torch.equal(source, target)


def test_every_bf16_number_is_converted_or_refused_as_numpy_says() -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    with np.errstate(over="ignore"):
        wanted = numbers.float().numpy().astype(np.float16)
    fits = torch.from_numpy(np.isfinite(wanted))
    target = torch.empty(int(fits.sum()), dtype=torch.float16)
    convert(numbers[fits], target, "x")
    assert np.array_equal(target.numpy(), wanted[fits.numpy()])
    for value in numbers[~fits][::37]:
        with pytest.raises(CheckpointError):
            convert(value[None], torch.empty(1, dtype=torch.float16), "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_check_knows_every_fp16_pattern(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).to(dtype)
    finite = torch.isfinite(patterns)
    assert all_finite(patterns[finite])
    assert int((~finite).sum()) == 2 * 1024  # both signs of one infinity and 1,023 NaNs
    assert not any(all_finite(value[None]) for value in patterns[~finite])
    assert all_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, float("nan"), -2.0], ["1 NaN and 0 infinite", "-2 to 1"]),
        ([float("inf"), float("-inf"), 3.0], ["0 NaN and 2 infinite", "3 to 3"]),
        ([float("nan")], ["none is finite"]),
        ([65520.0, -1.0], ["-1 to 65520", "up to 65504"]),
        ([-70000.0], ["-70000 to -70000"]),
    ],
)
def test_refusals_tell_tensor_and_range(values: list[float], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        convert(torch.tensor(values), torch.empty(len(values), dtype=torch.float16), "shard: tensor w")
    assert all(word in str(error.value) for word in ["shard: tensor w", *words])


def test_the_greatest_fp16_passes_and_tiny_values_become_zero() -> None:
    source = torch.tensor([65504.0, 65519.0, 1e-9, 6e-8])
    target = torch.empty(4, dtype=torch.float16)
    convert(source, target, "x")
    assert target.tolist() == [65504.0, 65504.0, 0.0, 2.0**-24]
