"""Every known form of a tegrastats line, value by value; any order, absence and spacing; the command over a log."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.cli import main
from profiles.telemetry.reading import Reading
from profiles.telemetry.tegrastats_line import BrokenLineError, parse_line

# Real lines of public logs, one per board and release. What they must give stands in EXPECTED, read off by hand.
LINES = {
    "orin nx, jetpack 5": (
        "RAM 6334/15388MB (lfb 1770x4MB) SWAP 491/7694MB (cached 0MB) CPU "
        "[6%@729,9%@729,5%@729,16%@729,off,off,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@611 VIC_FREQ 729 APE 174 "
        "CV0@45.812C CPU@47.937C SOC2@46.093C SOC0@46.968C CV1@46.406C GPU@45.875C tj@48.875C SOC1@48.875C "
        "CV2@45.75C VDD_IN 5299mW/5299mW VDD_CPU_GPU_CV 773mW/773mW VDD_SOC 1424mW/1424mW"
    ),
    "orin nx, jetpack 6, idle": (
        "07-28-2026 20:28:42 RAM 3941/15656MB (lfb 6x4MB) SWAP 0/24212MB (cached 0MB) CPU "
        "[1%@1984,7%@1984,3%@1984,2%@1984,0%@1984,5%@1984,1%@1984,2%@1984] GR3D_FREQ 0% cv0@47.156C cpu@52.375C "
        "soc2@45.531C soc0@48.25C cv1@47.968C gpu@50C tj@52.375C soc1@46.156C cv2@44.406C VDD_IN 7956mW/7956mW "
        "VDD_CPU_GPU_CV 2363mW/2363mW VDD_SOC 2506mW/2506mW"
    ),
    "orin nx, jetpack 6, busy": (
        "08-21-2026 18:23:23 RAM 6567/15656MB (lfb 54x4MB) SWAP 3109/7828MB (cached 5MB) CPU "
        "[31%@1984,54%@1984,50%@1984,64%@1984,54%@1984,55%@1984,55%@1984,100%@1984] GR3D_FREQ 7% cv0@57.281C "
        "cpu@58.937C soc2@54.687C soc0@55.125C cv1@55.437C gpu@54.375C tj@58.937C soc1@56.375C cv2@54.656C "
        "VDD_IN 12673mW/8213mW VDD_CPU_GPU_CV 7050mW/3122mW VDD_SOC 2121mW/1931mW"
    ),
    "orin nano": (
        "11-30-2025 13:26:01 RAM 2461/7620MB (lfb 3x2MB) SWAP 1243/3810MB (cached 5MB) CPU "
        "[19%@729,14%@729,22%@729,8%@729,15%@729,17%@729] EMC_FREQ 4%@2133 GR3D_FREQ 0%@[305] NVDEC off NVJPG "
        "off NVJPG1 off VIC off OFA off APE 200 cpu@46.531C soc2@47.312C soc0@46.593C gpu@48.218C tj@48.843C "
        "soc1@48.843C VDD_IN 5704mW/5704mW VDD_CPU_GPU_CV 831mW/831mW VDD_SOC 1624mW/1624mW"
    ),
    "agx orin, r36, runs of spaces": (
        "RAM 29114/30697MB (lfb 3x4MB)    SWAP 4915/15348MB (cached 1MB) CPU "
        "[3%@729,4%@729,0%@729,1%@729,0%@2201,100%@2201,1%@2201,0%@2201,100%@2201,0%@2201,0%@2201,0%@2201] "
        "EMC_FREQ 1%@2133 GR3D_FREQ 0%@[305,305] NVENC      off  NVDEC    off NVJPG off NVJPG1    off         "
        "VIC        off          OFA           off          NVDLA0    off       NVDLA1     off          "
        "PVA0_FREQ off         APE           174        cpu@53.062C soc2@48.25C soc0@48.843C  gpu@47.812C "
        "tj@53.062C soc1@48.968C    VDD_GPU_SOC 3205mW/3205mW VDD_CPU_CV 4405mW/4405mW VIN_SYS_5V0 4767mW/4767mW"
    ),
    "agx orin, r39, peaks": (
        "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU "
        "[23%@2201,10%@2201,4%@2201,14%@2201,30%@2201,18%@2201,10%@2201,10%@2201,33%@2201,7%@2201,5%@2201,27%@220"
        "1] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] NVENC0 off NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA "
        "off NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 cpu@52.968C/52.968C soc2@48.406C/48.406C "
        "soc0@49.531C/49.531C gpu@47.625C/47.625C VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV "
        "3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
    ),
    "agx thor": (
        "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU "
        "[0%@972,0%@972,0%@972,0%@972,0%@972,0%@972,1%@972,0%@972,0%@972,0%@972,0%@972,8%@972,0%@972,0%@972] "
        "EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] NVENC0_FREQ @314 NVENC1_FREQ @314 NVDEC0_FREQ @314 "
        "NVDEC1_FREQ @314 NVJPG0_FREQ @314 VIC off OFA_FREQ @315 PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C "
        "soc012@37.468C gpu@38.875C soc345@37.406C VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW "
        "VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
    ),
    "agx xavier": (
        "RAM 721/31927MB (lfb 7291x4MB) SWAP 0/15963MB (cached 0MB) CPU "
        "[2%@1190,0%@1190,0%@1190,0%@1190,off,off,off,off] EMC_FREQ 0%@665 GR3D_FREQ 0%@318 APE 150 MTS fg 0% bg "
        "0% AO@37.5C GPU@37.5C Tdiode@40C PMIC@100C AUX@36C CPU@37.5C thermal@36.9C Tboard@37C GPU 0/0 CPU "
        "311/311 SOC 932/932 CV 0/0 VDDRQ 621/621 SYS5V 1482/1482"
    ),
    "tx2": (
        "RAM 4722/7844MB (lfb 1x512kB) CPU [12%@2035,34%@2034,56%@2034,78%@2035,90%@2035,99%@2035] SWAP "
        "149/1024MB (cached 7MB) EMC_FREQ 2%@1866 GR3D_FREQ 59%@1300 APE 150 MTS fg 3% bg 9% BCPU@-45C MCPU@-45C "
        "GPU@-51C PLL@45C AO@47.5C Tboard@37C Tdiode@46.75C PMIC@100C thermal@46.4C VDD_IN 14025/14416 VDD_CPU "
        "2209/2538 VDD_GPU 6854/6903 VDD_SOC 1371/1370 VDD_WIFI 19/19 NVENC 716 NVDEC 716 VDD_DDR 2702/2702"
    ),
}


def expected(
    time: str | None, ram: list[int], swap: int | None, percent: list[int | None], mhz: list[int | None],
    emc: list[int | None], gr3d: int | None, gr3d_mhz: list[int], temperatures: dict[str, float],
    power: dict[str, list[int]], off: str = "", clocks: dict[str, int] | None = None, unknown: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The whole JSON object of a line; `power` is current, average and peak as far as they are there."""
    return {
        "time": time,
        "ram_used_mib": ram[0],
        "ram_total_mib": ram[1],
        "swap_used_mib": swap,
        "cpu_percent": percent,
        "cpu_mhz": mhz,
        "emc_percent": emc[0],
        "emc_mhz": emc[1],
        "gr3d_percent": gr3d,
        "gr3d_mhz": gr3d_mhz,
        "temperatures_c": temperatures,
        "power_mw": {
            rail: dict(zip(("current", "average", "peak"), [*values, None][:3], strict=True))
            for rail, values in power.items()
        },
        "engines": {name: {"on": False, "percent": None, "mhz": []} for name in off.split()}
        | {name: {"on": True, "percent": None, "mhz": [clock]} for name, clock in (clocks or {}).items()},
        **({"unknown": {"MTS": unknown}} if unknown else {}),
    }


OFF = "NVENC0 NVDEC0 NVJPG0 NVJPG1 VIC OFA NVDLA0 NVDLA1 PVA0_FREQ"
EXPECTED = {
    "orin nx, jetpack 5": expected(
        None, [6334, 15388], 491, [6, 9, 5, 16, None, None, None, None], [729] * 4 + [None] * 4, [0, 2133], 0, [611],
        {"CV0": 45.812, "CPU": 47.937, "SOC2": 46.093, "SOC0": 46.968, "CV1": 46.406, "GPU": 45.875, "tj": 48.875,
         "SOC1": 48.875, "CV2": 45.75},
        {"VDD_IN": [5299, 5299], "VDD_CPU_GPU_CV": [773, 773], "VDD_SOC": [1424, 1424]},
        clocks={"VIC_FREQ": 729, "APE": 174},
    ),
    "orin nx, jetpack 6, idle": expected(
        "2026-07-28T20:28:42", [3941, 15656], 0, [1, 7, 3, 2, 0, 5, 1, 2], [1984] * 8, [None, None], 0, [],
        {"cv0": 47.156, "cpu": 52.375, "soc2": 45.531, "soc0": 48.25, "cv1": 47.968, "gpu": 50, "tj": 52.375,
         "soc1": 46.156, "cv2": 44.406},
        {"VDD_IN": [7956, 7956], "VDD_CPU_GPU_CV": [2363, 2363], "VDD_SOC": [2506, 2506]},
    ),
    "orin nx, jetpack 6, busy": expected(
        "2026-08-21T18:23:23", [6567, 15656], 3109, [31, 54, 50, 64, 54, 55, 55, 100], [1984] * 8, [None, None], 7, [],
        {"cv0": 57.281, "cpu": 58.937, "soc2": 54.687, "soc0": 55.125, "cv1": 55.437, "gpu": 54.375, "tj": 58.937,
         "soc1": 56.375, "cv2": 54.656},
        {"VDD_IN": [12673, 8213], "VDD_CPU_GPU_CV": [7050, 3122], "VDD_SOC": [2121, 1931]},
    ),
    "orin nano": expected(
        "2025-11-30T13:26:01", [2461, 7620], 1243, [19, 14, 22, 8, 15, 17], [729] * 6, [4, 2133], 0, [305],
        {"cpu": 46.531, "soc2": 47.312, "soc0": 46.593, "gpu": 48.218, "tj": 48.843, "soc1": 48.843},
        {"VDD_IN": [5704, 5704], "VDD_CPU_GPU_CV": [831, 831], "VDD_SOC": [1624, 1624]},
        off="NVDEC NVJPG NVJPG1 VIC OFA", clocks={"APE": 200},
    ),
    "agx orin, r36, runs of spaces": expected(
        None, [29114, 30697], 4915, [3, 4, 0, 1, 0, 100, 1, 0, 100, 0, 0, 0], [729] * 4 + [2201] * 8, [1, 2133], 0,
        [305, 305],
        {"cpu": 53.062, "soc2": 48.25, "soc0": 48.843, "gpu": 47.812, "tj": 53.062, "soc1": 48.968},
        {"VDD_GPU_SOC": [3205, 3205], "VDD_CPU_CV": [4405, 4405], "VIN_SYS_5V0": [4767, 4767]},
        off="NVENC NVDEC NVJPG NVJPG1 VIC OFA NVDLA0 NVDLA1 PVA0_FREQ", clocks={"APE": 174},
    ),
    "agx orin, r39, peaks": expected(
        "2026-07-25T09:08:28", [20642, 62817], None, [23, 10, 4, 14, 30, 18, 10, 10, 33, 7, 5, 27], [2201] * 12,
        [3, 3199], 12, [1300, 1300], {"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625},
        {"VDD_GPU_SOC": [5139] * 3, "VDD_CPU_CV": [3268] * 3, "VIN_SYS_5V0": [5500] * 3}, off=OFF, clocks={"APE": 174},
    ),
    "agx thor": expected(
        "2026-04-21T15:50:52", [105265, 125772], None, [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8, 0, 0], [972] * 14,
        [0, 2750], None, [314, 314, 314],
        {"cpu": 37.343, "tj": 38.875, "soc012": 37.468, "gpu": 38.875, "soc345": 37.406},
        {"VDD_GPU": [1962] * 2, "VDD_CPU_SOC_MSS": [5887] * 2, "VIN_SYS_5V0": [5635] * 2, "VIN": [19780] * 2},
        off="VIC PVA0_FREQ",
        clocks={"NVENC0_FREQ": 314, "NVENC1_FREQ": 314, "NVDEC0_FREQ": 314, "NVDEC1_FREQ": 314, "NVJPG0_FREQ": 314,
                "OFA_FREQ": 315, "APE": 300},
    ),
    "agx xavier": expected(
        None, [721, 31927], 0, [2, 0, 0, 0, None, None, None, None], [1190] * 4 + [None] * 4, [0, 665], 0, [318],
        {"AO": 37.5, "GPU": 37.5, "Tdiode": 40, "PMIC": 100, "AUX": 36, "CPU": 37.5, "thermal": 36.9, "Tboard": 37},
        {"GPU": [0, 0], "CPU": [311, 311], "SOC": [932, 932], "CV": [0, 0], "VDDRQ": [621, 621], "SYS5V": [1482, 1482]},
        clocks={"APE": 150}, unknown="fg 0% bg 0%",
    ),
    "tx2": expected(
        None, [4722, 7844], 149, [12, 34, 56, 78, 90, 99], [2035, 2034, 2034, 2035, 2035, 2035], [2, 1866], 59, [1300],
        {"BCPU": -45, "MCPU": -45, "GPU": -51, "PLL": 45, "AO": 47.5, "Tboard": 37, "Tdiode": 46.75, "PMIC": 100,
         "thermal": 46.4},
        {"VDD_IN": [14025, 14416], "VDD_CPU": [2209, 2538], "VDD_GPU": [6854, 6903], "VDD_SOC": [1371, 1370],
         "VDD_WIFI": [19, 19], "VDD_DDR": [2702, 2702]},
        clocks={"APE": 150, "NVENC": 716, "NVDEC": 716}, unknown="fg 3% bg 9%",
    ),
}  # fmt: skip


def as_json(line: str) -> dict[str, Any]:
    """The object as a reader of the JSON sees it: tuples are lists."""
    found = json.loads(json.dumps(parse_line(line).to_json()))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", LINES)
def test_real_lines(name: str) -> None:
    found = as_json(LINES[name])
    assert found == EXPECTED[name]
    assert Reading.from_json(found) == parse_line(LINES[name])


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("RAM 1/2MB VIC 59%@423", ("engines", "VIC"), {"on": True, "percent": 59, "mhz": [423]}),
        ("RAM 1/2MB NVENC @1556", ("engines", "NVENC"), {"on": True, "percent": None, "mhz": [1556]}),
        ("RAM 1/2MB cpu@-256C", ("temperatures_c", "cpu"), None),
        ("RAM 1/2MB cpu@-256C/50C", ("temperatures_c", "cpu"), None),
        ("RAM 1/2MB VDD_IN 5299mW", ("power_mw", "VDD_IN"), {"current": 5299, "average": None, "peak": None}),
        ("RAM 1/2MB VDD_IN 5299", ("power_mw", "VDD_IN"), {"current": 5299, "average": None, "peak": None}),
        ("RAM 1/2MB POM_5V_IN 1/2/3", ("power_mw", "POM_5V_IN"), {"current": 1, "average": 2, "peak": 3}),
        ("CPU [5%,off]@1224", ("cpu_mhz",), [1224, None]),
        ("CPU [5%,off]", ("cpu_mhz",), [None, None]),
        ("CPU [ 5%@100, off ]", ("cpu_percent",), [5, None]),
        ("RAM 512/2048kB", ("ram_used_mib",), 0.5),
        ("RAM 2/4GB", ("ram_total_mib",), 4096),
        ("GR3D_FREQ 7%@[305, 306]", ("gr3d_mhz",), [305, 306]),
        ("GR3D_FREQ 7%@[305 306]", ("gr3d_mhz",), [305, 306]),
        ("GR3D_FREQ @[]", ("gr3d_mhz",), []),
        ("GR3D_FREQ @318", ("gr3d_mhz",), [318]),
        ("GR3D_FREQ off", ("gr3d_percent",), None),
        ("EMC_FREQ @665", ("emc_mhz",), 665),
        ("RAM 1/2MB IRAM 0/252kB(lfb 252kB) CPU [1%]", ("unknown", "IRAM"), "0/252kB (lfb 252kB)"),
        ("RAM 1/2MB FLUX on-fire 3x CPU [1%]", ("unknown", "FLUX"), "on-fire 3x"),
        ("RAM 1/2MB NEW", ("unknown", "NEW"), ""),
    ],
)
def test_forms_seen_in_the_field(line: str, path: tuple[str, ...], value: object) -> None:
    found: Any = as_json(line)
    for key in path:
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no field of tegrastats"),
        ("hello world", "no field of tegrastats in 'hello world'"),
        ("RAM", "RAM: found 'the end of the line'"),
        ("RAM lots CPU [1%]", "RAM: found 'lots'"),
        ("RAM 1/2MB SWAP 491/76", "SWAP: found '491/76'"),
        ("RAM 1/2MB CPU [6%@729,9%", "CPU: found '['"),
        ("RAM 1/2MB CPU [6%@729,x]", "expected [LOAD%@MHZ,off,...]"),
        ("RAM 1/2MB VDD_IN 5299mW/52", "VDD_IN: found '5299mW/52'"),
        ("RAM 1/2MB VDD_IN", "VDD_IN: found 'the end of the line'"),
        ("RAM 1/2MB RAM 1/2MB", "ram_used_mib stands there twice"),
        ("cpu@1C cpu@2C", "cpu stands there twice"),
        ("13-32-2026 20:28:42 RAM 1/2MB", "13-32-2026 20:28:42 is no time"),
        ("RAM " + "9" * 5000 + "/1MB", "RAM: found"),
        ("GR3D_FREQ 1%@[" + "9" * 5000 + "]", "GR3D_FREQ: found"),
        ("GR3D_FREQ 1%@[" + "1," * 5000 + "]", "GR3D_FREQ: found"),
        ("GR3D_FREQ 1%@[" + "1" * 40 + "]", "not clocks in MHz"),
    ],
)
def test_broken_lines_say_what_was_found(line: str, message: str) -> None:
    with pytest.raises(BrokenLineError) as caught:
        parse_line(line)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def fields() -> st.SearchStrategy[dict[str, Any]]:
    """Texts of fields with the part of the JSON object that each must give."""
    clock, load = st.integers(0, 9999), st.integers(0, 100)
    cores = st.lists(st.none() | st.tuples(load, clock), min_size=1, max_size=14)
    zones, odd = st.sampled_from(["cpu", "gpu", "tj", "soc0"]), st.sampled_from(["MTS", "ODD", "NEWER"])
    name = st.from_regex(r"[A-Z]{2}[A-Z0-9]{1,4}", fullmatch=True).filter(lambda n: n not in ("RAM", "SWAP", "CPU"))
    watts = st.tuples(*[st.integers(0, 90_000)] * 3)
    return st.fixed_dictionaries({
        "ram": st.tuples(st.integers(0, 99_999), st.integers(0, 99_999)),
        "swap": st.integers(0, 9999),
        "cores": cores,
        "emc": st.tuples(load, clock),
        "gr3d": st.tuples(load, st.lists(clock, min_size=1, max_size=3)),
        "temperatures": st.dictionaries(zones, st.integers(-255, 150), max_size=4),
        "power": st.dictionaries(name.map("VDD_".__add__), watts, max_size=4),
        "engines": st.dictionaries(name.map("E".__add__), st.none() | clock, max_size=4),
        "unknown": st.dictionaries(odd, st.sampled_from(["fg 0%", "x", "+1"]), max_size=2),
    })  # fmt: skip


def rendered(drawn: dict[str, Any], values: int, suffix: str) -> list[tuple[str, dict[str, Any]]]:
    """(text, what it must give) of every field."""
    names = ("current", "average", "peak")
    found: list[tuple[str, dict[str, Any]]] = [
        (f"RAM {drawn['ram'][0]}/{drawn['ram'][1]}MB (lfb 1x4MB)",
         {"ram_used_mib": drawn["ram"][0], "ram_total_mib": drawn["ram"][1]}),
        (f"SWAP {drawn['swap']}/9999MB (cached 0MB)", {"swap_used_mib": drawn["swap"]}),
        ("CPU [" + ",".join("off" if c is None else f"{c[0]}%@{c[1]}" for c in drawn["cores"]) + "]",
         {"cpu_percent": [c and c[0] for c in drawn["cores"]], "cpu_mhz": [c and c[1] for c in drawn["cores"]]}),
        (f"EMC_FREQ {drawn['emc'][0]}%@{drawn['emc'][1]}",
         {"emc_percent": drawn["emc"][0], "emc_mhz": drawn["emc"][1]}),
        (f"GR3D_FREQ {drawn['gr3d'][0]}%@[{','.join(map(str, drawn['gr3d'][1]))}]",
         {"gr3d_percent": drawn["gr3d"][0], "gr3d_mhz": drawn["gr3d"][1]}),
    ]  # fmt: skip
    found += [(f"{zone}@{c}C", {"temperatures_c": {zone: c}}) for zone, c in drawn["temperatures"].items()]
    for rail, watts in drawn["power"].items():
        told = dict(zip(names, [*watts[:values], None, None][:3], strict=True))
        found.append((f"{rail} " + "/".join(f"{w}{suffix}" for w in watts[:values]), {"power_mw": {rail: told}}))
    for engine, clock in drawn["engines"].items():
        unit = {"on": clock is not None, "percent": None, "mhz": [] if clock is None else [clock]}
        found.append((f"{engine} {'off' if clock is None else clock}", {"engines": {engine: unit}}))
    found += [(f"{key} {text}", {"unknown": {key: text}}) for key, text in drawn["unknown"].items()]
    return found


@given(
    drawn=fields(), keep=st.integers(1, 30), seed=st.integers(0, 1 << 30), values=st.integers(1, 3),
    suffix=st.sampled_from(["", "mW"]), space=st.sampled_from([" ", "   ", "\t", "          "]),
)  # fmt: skip
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
def test_any_order_absence_and_spacing(
    drawn: dict[str, Any], keep: int, seed: int, values: int, suffix: str, space: str
) -> None:
    parts = rendered(drawn, values, suffix)
    random.Random(seed).shuffle(parts)
    kept = parts[:keep]
    if not any("unknown" not in part for _, part in kept):
        return
    wanted = Reading().to_json() | {"cpu_percent": [], "cpu_mhz": [], "gr3d_mhz": []}
    for _, part in kept:
        for key, value in part.items():
            wanted[key] = {**wanted.get(key, {}), **value} if isinstance(value, dict) else value
    assert as_json(space.join(text for text, _ in kept).replace(" ", space) + space) == wanted


@given(
    st.text(max_size=200)
    | st.sampled_from(list(LINES.values())).flatmap(lambda line: st.integers(0, len(line)).map(lambda n: line[:n]))
)
def test_no_line_brings_the_parser_down(line: str) -> None:
    with contextlib.suppress(BrokenLineError):
        assert Reading.from_json(json.loads(json.dumps(parse_line(line).to_json(), allow_nan=False)))


def test_the_command_names_broken_lines_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "t.log"
    log.write_bytes(b"# a comment\n\n" + LINES["tx2"].encode() + b"\nRAM 63\nha\xff\n" + LINES["orin nano"].encode())
    assert main(["tegrastats", str(log), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [EXPECTED["tx2"], EXPECTED["orin nano"]]
    assert err.splitlines() == [
        f"edge: {log}: line 4 left out: RAM: found '63'",
        f"edge: {log}: line 5 left out: no field of tegrastats in 'ha\N{REPLACEMENT CHARACTER}'",
    ]


def test_the_command_reads_stdin_and_sums_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"RAM 100/200MB CPU [10%@1,off] VDD_IN 4000mW/1mW\nRAM 300/200MB CPU [30%@1,50%@1]\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert main(["tegrastats", "-"]) == 0
    rows = {line.split("  ")[1]: line.split()[-4:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["RAM used, MiB"] == ["100.0", "200.0", "300.0", "2"]
    assert rows["CPU, % of the cores that are on"] == ["10.0", "25.0", "40.0", "2"]
    assert rows["VDD_IN, mW"] == ["4000.0", "4000.0", "4000.0", "1"]


@pytest.mark.parametrize("text", [b"", b"nothing here\n"])
def test_a_file_without_readings_is_one_error(text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "t.log"
    log.write_bytes(text)
    assert main(["tegrastats", str(log), "--json"]) == 2
    assert "no line of tegrastats in it" in capsys.readouterr().err
    assert main(["tegrastats", str(tmp_path / "none")]) == 2
    assert "none: No such file or directory" in capsys.readouterr().err
