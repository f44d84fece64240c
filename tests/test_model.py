"""The model of a launch: control bits as the assembler writes them, and times that follow from what was put in."""

import pytest

pytest.importorskip("triton", reason="needs the triton package, which Linux has")

from benchmarks.kernels.control_bits import Step, cycles_a_turn, read_steps
from benchmarks.kernels.model import END_US, START_US, Work, launch_us, roofline_us
from benchmarks.kernels.offline import GPUS, Compiled
from benchmarks.model import measured

RTX_3060 = next(gpu for gpu in GPUS if gpu.name.endswith("3060"))


def line(text: str, *, stall: int, sets: int = 7, frees: int = 7, waits: int = 0) -> str:
    """One instruction as nvdisasm -hex prints it."""
    bits = (stall | sets << 5 | frees << 8 | waits << 11) << 41
    return f"        /*0010*/                   {text} ;   /* 0x0000000000000000 */\n    /* 0x{bits:016x} */"


def test_control_bits_are_read_from_the_second_word_of_an_instruction() -> None:
    listing = "\n".join(
        [
            line("MOV R1, R2", stall=1),
            ".L_x_0:",
            line("LDG.E.U16 R4, [R2]", stall=2, sets=3),
            line("@P0 FFMA R5, R4, R4, R5", stall=4, waits=8),
            line("@P1 BRA `(.L_x_0)", stall=5),
        ]
    )
    assert read_steps(listing) == [
        Step("LDG.E.U16", 2, 3, 7, 0),
        Step("FFMA", 4, 7, 7, 8),
        Step("BRA", 5, 7, 7, 0),
    ]
    assert read_steps(line("EXIT", stall=1)) == []


def test_a_turn_takes_its_stalls_and_what_it_waits_for() -> None:
    load, use, branch = Step("LDG.E.U16", 2, 3, 7, 0), Step("FFMA", 4, 7, 7, 8), Step("BRA", 5, 7, 7, 0)
    assert cycles_a_turn([use, branch], 86, memory=900, l2=300) == 9
    assert cycles_a_turn([load, use, branch], 86, memory=900, l2=300) == 900 + 4 + 5
    wide = load._replace(name="LDG.E.128")
    assert cycles_a_turn([wide, use, branch], 86, memory=900, l2=300) == 300 + 4 + 5
    # used a turn later, it is waited for only as far as a turn is shorter
    assert cycles_a_turn([use, load, branch], 86, memory=900, l2=300) == pytest.approx(900 + 4 + 5 - 4 - 2 + 2, abs=10)


def compiled(steps: list[Step], *, shared: int = 8192, spilled: int = 0) -> Compiled:
    return Compiled(64, shared, spilled, None, None, tuple(steps))


def test_a_launch_is_bound_by_memory_or_by_what_its_warps_issue() -> None:
    work = Work(programs=28 * 8, turns=64, turn_bytes=8192)
    few = compiled([Step("FFMA", 4, 7, 7, 0)] * 100)
    floor = roofline_us(RTX_3060, work.programs * work.turns * work.turn_bytes)
    assert floor < launch_us(RTX_3060, work, few, num_warps=4, stages=4) < 1.15 * floor + START_US + END_US
    many = compiled([Step("FFMA", 4, 7, 7, 0)] * 20_000)
    cycles = 64 * 8 * 20_000 / 0.8  # eight programs of a multiprocessor, one warp of each on each scheduler
    expected = cycles / RTX_3060.ghz / 1e3
    assert launch_us(RTX_3060, work, many, num_warps=4, stages=4) == pytest.approx(expected, rel=0.1)
    for bad in ({"spilled": 4}, {"shared": 200_000}):
        broken = compiled([Step("FFMA", 4, 7, 7, 0)], **bad)
        assert launch_us(RTX_3060, work, broken, num_warps=4, stages=4) == float("inf")


def test_a_measurement_of_the_same_card_stands_beside_the_model() -> None:
    record = {"gpu": "a card", "rows": 1, "kernels": [{"kernel": "c_attn", "us": 80.0}]}
    result = {"device": "a card", "layer": [{"rows": 1, "projections": {"c_attn": {"us": 100.0}}}]}
    assert list(measured(record, result)) == ["c_attn, 1 rows: modelled 80.0 us, measured 100.0 us, 1.25 of it"]
    assert not list(measured(record, result | {"device": "another"}))
