"""tools/sass.py, sass_flow.py, pipe_model.py: parsing and flow on small listings, hand counts of kernels."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import pipe_model  # noqa: E402
import pipe_rules  # noqa: E402
import pipe_shapes  # noqa: E402
import pipe_whole  # noqa: E402
import sass  # noqa: E402
import sass_flow  # noqa: E402
import sass_pipes  # noqa: E402
from gpu_table import H100  # noqa: E402
from sass_flow import Rule  # noqa: E402

KERNEL = """\
for (int tile = 0; tile < tiles; ++tile) {
  for (int step = 0; step < steps; ++step) {
    product();
  }
  if (positives) {
    count();
  } else {
    zero();
  }
}
if (row >= rows) return;
store();
"""


def listing(path: Path) -> str:
    """What the compiler might make of KERNEL, with its branches turned round."""

    def at(line: int) -> str:
        return f'\t//## File "{path}", line {line}\n'

    return (
        "\t.section\t.text.kernel\n.text.kernel:\n"
        + at(1)
        + "        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        + ".L_x_9:\n"
        + at(1)
        + "        /*0008*/                   NOP ;\n"
        + ".L_x_0:\n"
        + at(3)
        + "        /*0010*/                   LDSM.16.M88.4 R4, [R2+UR4] ;\n"
        + "        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;\n"
        + at(2)
        + "        /*0030*/              @!P0 BRA `(.L_x_0) ;\n"
        + at(5)
        + "        /*0040*/               @P1 BRA `(.L_x_1) ;\n"
        + "".join(at(8) + f"        /*00{50 + 10 * i}*/                   STS [R2], RZ ;\n" for i in range(3))
        + at(8)
        + "        /*0080*/                   BRA `(.L_x_2) ;\n"
        + ".L_x_1:\n"
        + "".join(
            at(6) + f"        /*00{hex(9 + i)[2:]}0*/                   FADD R1, R1, R2 ;\n" for i in range(4)
        )
        + ".L_x_2:\n"
        + at(1)
        + "        /*00d0*/               @P2 BRA `(.L_x_9) ;\n"
        + at(11)
        + "        /*00e0*/               @P3 EXIT ;\n"
        + at(12)
        + "        /*00f0*/                   STG.E.64 desc[UR4][R2.64], R4 ;\n"
        + "        /*0100*/                   EXIT ;\n"
    )


RULES = [
    Rule("for (int tile", trips=10, walk=True),
    Rule("for (int step", trips=4),
    Rule("if (positives)", share=0.25),
]


@pytest.fixture
def flow(tmp_path: Path) -> sass_flow.Flow:
    source = tmp_path / "kernel.cu"
    source.write_text(KERNEL)
    return sass_flow.Flow(sass.parse(listing(source))["kernel"])


def test_instructions_are_parsed():
    code = sass.parse(
        '.text.f:\n\t//## File "a.cuh", line 7 inlined at "b.cu", line 9\n\t//## File "b.cu", line 9\n'
        "        /*0a10*/              @!P0 LDS.64 R16, [R3.X4+UR5+0x2000] ;\n"
        '\t//## File "b.cu", line 11\n.L_x_3:\n'
        "        /*0a20*/                   BRA.U UP0, `(.L_x_3) ;\n"
    )["f"]
    load, branch = code.instructions
    assert (load.predicate, load.op, load.name, load.address) == ("@!P0", "LDS", "LDS.64", 0xA10)
    assert load.source == (("a.cuh", 7), ("b.cu", 9))
    assert branch.source == (("b.cu", 11),)
    assert code.labels[branch.target] == 1


def test_statements_end_before_their_else(tmp_path: Path):
    source = tmp_path / "kernel.cu"
    source.write_text(KERNEL)
    assert sass_flow.statement((str(source), 5)) == range(5, 7)
    assert sass_flow.statement((str(source), 1)) == range(1, 10)
    assert sass_flow.statement((str(source), 11)) == range(11, 12)


def test_loops_multiply_and_branches_share(flow: sass_flow.Flow):
    often = flow.frequencies(RULES)
    total: dict[str, float] = {}
    for block, n in zip(flow.blocks, often, strict=True):
        for instruction in flow.code.instructions[block.first : block.end]:
            total[instruction.op] = total.get(instruction.op, 0) + n
    assert total["HMMA"] == pytest.approx(10 * 4)
    assert total["FADD"] == pytest.approx(10 * 0.25 * 4)  # `if (positives)`, though it is branched to
    assert total["STS"] == pytest.approx(10 * 0.75 * 3)
    assert total["STG"] == pytest.approx(1)


def test_the_walk_is_the_loop_over_tiles(flow: sass_flow.Flow):
    ops = {
        instruction.op
        for i in flow.walk(RULES)
        for instruction in flow.code.instructions[flow.blocks[i].first : flow.blocks[i].end]
    }
    assert {"HMMA", "STS", "FADD"} <= ops
    assert not ops & {"LDC", "STG"}


def test_a_branch_without_a_rule_is_an_error(flow: sass_flow.Flow):
    with pytest.raises(sass_flow.UnknownBranch, match="positives"):
        flow.frequencies(RULES[:2])


@pytest.mark.parametrize(
    ("name", "pipe", "cost"),
    [
        ("HMMA.16816.F32.BF16", "tensor", 4096),
        ("HMMA.1688.F32.TF32", "tf32", 2048),
        ("LDSM.16.M88.4", "shared", 4),
        ("LDSM.16.MT88.2", "shared", 2),
        ("LDS.128", "shared", 4),
        ("STS", "shared", 1),
        ("LDGSTS.E.BYPASS.128", "fill", 512),
        ("MUFU.EX2", "mufu", 1),
        ("IMAD.MOV.U32", "imad", 1),
        ("I2FP.F32.U32", "half_alu", 1),
    ],
)
def test_pipes(name: str, pipe: str, cost: float):
    found = sass_pipes.pipes_of(sass.Instruction(0, "", name, ""))
    assert found[pipe] == cost
    assert found["issue"] == 1


def test_what_never_runs_costs_an_issue_slot_only():
    assert sass_pipes.pipes_of(sass.Instruction(0, "@!PT", "LDS", "RZ, [RZ]")) == {"issue": 1}


def test_unknown_instructions_are_errors():
    with pytest.raises(ValueError, match="QGMMA"):
        sass_pipes.pipes_of(sass.Instruction(0, "", "QGMMA.64x8x32", ""))


def test_growth_is_found():
    before = {"a": {"slots": 100.0, "shared": 10.0}, "gone": {"slots": 1.0}}
    now = {"a": {"slots": 105.1, "shared": 10.5}, "new": {"slots": 1.0}}
    faults = pipe_model.grown(now, before)
    assert len(faults) == 3
    assert any("slots 100.0 -> 105.1" in fault for fault in faults)


def kernels_of(source: str) -> list[sass.Kernel]:
    try:
        sass.find_nvdisasm(sass.find_nvcc())
    except SystemExit as reason:
        pytest.skip(str(reason))
    return sass.kernels(["90"], source)


def compiled(which: str, dim: int, positives: float) -> pipe_model.Pass:
    case = pipe_model.Case(32768, dim, positives=positives)
    return getattr(pipe_model.Model(kernels_of("bfloat16")), which)(case, H100)


def test_forward_by_hand():
    """The large bfloat16 tile, 128 x 128 over 8 warps of 64 x 32, at D 128: 2 steps of 64 columns."""
    p = compiled("forward", 128, 0.0)
    per_warp = {pipe: n / 8 for pipe, n in p.counts.total.items()}
    assert p.counts.shape.logits == pipe_shapes.Fragment(128, 128, 2, 4)
    # 4 x 4 pieces of 16 x 8, 8 times 16 columns: 128 products of 4096 FLOP.
    assert per_warp["tensor"] == pytest.approx(128 * 4096)
    # 128 rows of 128 bytes per step, 2 steps; for 128 rows of the other side half as often: two tiles of a
    # band have the same.
    assert p.counts.total["fill"] == pytest.approx(2 * (1 + 1 / 2) * 128 * 128)
    # 64 logits a lane: one exponential each; labels' rows are divided by the views now and then.
    assert per_warp["mufu"] == pytest.approx(64, abs=1.5)
    tile = (
        8 * 6 * 4  # 8 times 16 columns: 2 ldmatrix.x4 for b, 4 for a, of 4 wavefronts
        + 2 * (4 + 4 / 2) * 4  # 2 steps of 4 copies of 16 bytes a lane for each side, one side half as often
        + 2 * 2 * 4  # labels of 8 rows and 8 columns a lane, 4 at once
        + 3  # flags of 64 rows and 32 columns
        # Two sums. 8 rows folded over 4 lanes: 4 + 2 shuffles, then 2 numbers are added to their places;
        # 8 columns over 8 lanes: 4 + 2 + 1 shuffles, one number.
        + 2 * (6 + 2 * 2 + 7 + 2)
    )
    # Every 2 tiles, half of the threads: a label with its votes and flags, and 4 shares of a row's 6 sums.
    row = (3 + 4 * 6 * 2) / 2 / 2
    # Every 8 times 2 tiles: the same for a column, of which there are 2 shares.
    band = (3 + 2 * 6 * 2) / 16
    assert per_warp["shared"] == pytest.approx(tile + row + band, abs=0.5)


def test_forward_with_positives_by_hand():
    """In any order: 15 % of the columns hold a positive, and are looked at pair by pair."""
    without, with_ = compiled("forward", 128, 0.0), compiled("forward", 128, 1.0)
    more = {
        pipe: (with_.counts.total[pipe] - without.counts.total[pipe]) / 8
        for pipe in ("mufu", "half_alu", "shared")
    }
    # 2048 pairs, 7 of 32767 positive, among 8 columns a lane.
    expected = 2048 * 7 / 32767
    columns = 8 * (1 - math.exp(-expected / 8)) / (1 - math.exp(-expected))
    assert columns == pytest.approx(1.2, abs=0.01)
    # In such a column each of a lane's 8 rows is asked for again.
    rows = 8 * (1 - math.exp(-expected / 64)) / (1 - math.exp(-expected / 8))
    assert more["mufu"] == pytest.approx(rows * columns)
    # Numbers of positives become float: of two rows a lane.
    assert more["half_alu"] == pytest.approx(2)
    shared = (
        2 * 2 * 4  # labels once more
        + (2 * 2 + 2 * 2)  # numbers by row, four to a word: 2 words folded over 4 lanes
        + 2 * (6 + 2 * 2)  # two sums by row
        + columns * 3 * (3 + 2)  # and of each such column, over 8 lanes
    )
    assert more["shared"] == pytest.approx(shared)


def test_backward_by_hand():
    """The resident bfloat16 tile of D 128: 128 x 64 over 4 warps of 32 rows, in 4 chunks of 16 columns."""
    p = compiled("backward", 128, 0.0)
    per_warp = {pipe: n / 4 for pipe, n in p.counts.total.items()}
    assert p.counts.shape.logits == pipe_shapes.Fragment(128, 64, 4, 1)
    assert p.counts.shape.chunk == 16
    # Logits: 2 x 8 pieces, 8 times 16 columns. Gradient: 2 x 16 pieces, 4 times 16 rows.
    assert per_warp["tensor"] == pytest.approx((2 * 8 * 8 + 2 * 16 * 4) * 4096)
    # The other side's 64 rows of 256 bytes; the owner's stay.
    assert p.counts.total["fill"] == pytest.approx(64 * 256)
    products = (
        4 * 8 * 4  # logits: in each chunk 8 ldmatrix.x4 for the other side's rows, of 4 wavefronts
        + 4 * 8 * 4  # gradient: 8 for them again; registers hold all else
        + 64 * 256 / 16 / 128 * 4  # copies of 16 bytes a lane
    )
    # w and wn of the two columns of 8 pieces, 16 bytes a lane; in each chunk 1 / temperature.
    gradients = 8 * 4 + 4
    labels = (
        1 + 2  # all own rows, 2 groups of the tile's: valid?
        + 1  # the first own row's number, for pairs of a row with itself
        + 4 * (4 + 2 * 2)  # the vote in each chunk: a lane's 4 rows, and two columns of 2 pieces
        + (4 + 2 * 2) / 2  # half of the warps store a row's label, with its votes, and its coefficients
    )  # fmt: skip
    assert products + gradients + labels == 364
    assert per_warp["shared"] == pytest.approx(364)


@pytest.mark.parametrize("batch", [256, 1024])
def test_one_launch_by_hand(batch: int):
    """The small bfloat16 tile, 64 x 64 over 4 warps, at D 128; all three phases of one kernel."""
    case = pipe_model.Case(batch, 128)
    whole = pipe_model.Model(kernels_of("whole_forward")).whole(case)
    plan = whole.plan
    # On and above the diagonal of 4 x 4 or 16 x 16 tiles: one for each block. A warp prepares a row.
    side = batch // 64
    assert plan.tiles == plan.tile_blocks == side * (side + 1) // 2
    assert plan.blocks == min(batch // 4, 216)
    turns = math.ceil(batch / 4 / plan.blocks)
    assert turns == (1 if batch == 256 else 2)
    prepare, tiles, merge = (whole.phases[phase] for phase in pipe_whole.PHASES)
    # Per row a root and a reciprocal, and a sum over 32 lanes.
    assert prepare["mufu"] == pytest.approx(turns * 4 * 2)
    assert prepare["shared"] == pytest.approx(turns * 4 * 5)
    # One tile of 128 columns in 2 steps, 128 bytes of each of 64 rows of both sides a step.
    assert tiles["tensor"] == pytest.approx(2 * 64 * 64 * 128)
    assert tiles["fill"] == pytest.approx(2 * 2 * 64 * 128)
    block_sum = (
        4 * 2 * 5  # in 4 warps two numbers over 32 lanes
        + 4 * 2  # written as one of 8 bytes a lane
        + 4 * 2 + 4 * 3 * 2  # and by all read for each warp; the first as one of 8 bytes
    )  # fmt: skip
    # Shares of ten numbers: each warp's, of which the first warp reads three, but of the last no maxima.
    shares = 4 * 10 + 3 * 10 - 2
    ticket = 1 + 4
    assert merge["shared"] == pytest.approx(shares + 2 * block_sum + ticket)


def test_the_plans_constants_are_read_from_its_source():
    assert pipe_whole.WHOLE_ROWS == 1024
    assert pipe_whole.BLOCKS_AT_ONCE == 216
    assert pipe_whole.constant("kMergeRows", "csrc/cuda/grid.h") == 32
    with pytest.raises(ValueError, match="no constant kNobody"):
        pipe_whole.constant("kNobody")


def test_the_temperatures_gradient_by_hand():
    """Each number that is read is converted to double precision and added there, two numbers a row. In the
    loops that the compiler has unrolled, nothing else of a multiprocessor is as busy as what converts."""
    kernel = next(k for k in kernels_of("contrast") if k.name.startswith("temperature_gradient_kernel<float"))
    flow = sass_flow.flow_of(kernel)
    loops = 0
    for body in flow.loops.values():
        ops = [
            instruction.op
            for i in body
            for instruction in kernel.code.instructions[flow.blocks[i].first : flow.blocks[i].end]
        ]
        sums = ops.count("DADD") + ops.count("DFMA")
        if sums:
            assert ops.count("LDG") == ops.count("F2F") == ops.count("DADD") + 2 * ops.count("DFMA")
        if sums > 1:
            converting = ops.count("F2F") / (H100.half_alu / 32)
            assert converting > sums / (H100.fp64 / 32) and converting > len(ops) / H100.issue
            loops += 1
    assert loops >= 2
    model, fixed = pipe_model.Model([]), pipe_model.Case(32768, 128)
    learnable = pipe_model.Case(32768, 128, learnable=True)
    assert model.temperature_gradient(fixed, H100) == 0
    seconds = model.temperature_gradient(learnable, H100)
    assert seconds == pytest.approx(H100.launch + 2 * 32768 / 16 / H100.clock)


def test_a_learnable_temperature_by_hand():
    """Two launches more, and tiles that are compiled for unbounded logits too: at D 768 narrower ones."""
    model = pipe_model.Model(kernels_of("bfloat16"))
    for dim, width in ((128, 128), (256, 256), (768, 512)):
        fixed, learnable = (pipe_model.Case(32768, dim, learnable=x) for x in (False, True))
        assert model.backward(learnable, H100).counts.shape.dims == width
        more = model.forward(learnable, H100).seconds - model.forward(fixed, H100).seconds
        assert more == pytest.approx(H100.launch)
        if width == dim:
            more = model.backward(learnable, H100).seconds - model.backward(fixed, H100).seconds
            assert more == pytest.approx(H100.launch)


def test_few_turns_of_an_unrolled_loop_are_its_remainders(tmp_path: Path):
    """A loop of four copies and one of one copy, made of one line; three turns run the second."""
    source = tmp_path / "kernel.cu"
    source.write_text("for (int w = 1; w < warps; ++w) {\n  add();\n}\nstore();\n")

    def at(line: int) -> str:
        return f'\t//## File "{source}", line {line}\n'

    def add(address: int) -> str:
        return at(2) + f"        /*{address:04x}*/                   FADD R1, R1, R2 ;\n"

    def branch(address: int, predicate: str, label: int) -> str:
        return at(1) + f"        /*{address:04x}*/             {predicate} BRA `(.L_x_{label}) ;\n"

    text = "\t.section\t.text.kernel\n.text.kernel:\n" + branch(0x0, "@!P0", 3)
    text += ".L_x_1:\n" + "".join(add(0x10 * i) for i in range(1, 9)) + branch(0x90, "@P1", 1)
    text += branch(0xA0, "@!P2", 4) + ".L_x_3:\n" + add(0xB0) + at(1)
    text += "        /*00c0*/                   IADD3 R3, R3, 0x1, RZ ;\n" + branch(0xD0, "@P3", 3)
    text += ".L_x_4:\n" + at(4) + "        /*00e0*/                   EXIT ;\n"
    flow = sass_flow.Flow(sass.parse(text)["kernel"])
    often = flow.frequencies([Rule("for (int w", trips=3, few=True)])
    adds = sum(
        n
        for block, n in zip(flow.blocks, often, strict=True)
        for instruction in flow.code.instructions[block.first : block.end]
        if instruction.op == "FADD"
    )
    assert adds == pytest.approx(3)


def test_no_rule_is_stale():
    """Each rule's text stands in the kernels' source."""
    folders = ("csrc/cuda", "csrc/family")
    text = "".join(p.read_text() for f in folders for p in (sass.ROOT / f).rglob("*") if p.is_file())
    shape = pipe_shapes.parse_shape(
        "forward_kernel<ForwardTraits<HalfProduct<bf16>, ForwardShape<128, 2, 4, 64, 2, 2, 2>, false> >"
    )
    case = pipe_model.Case(1024, 128)
    whole = pipe_whole.rules_for(shape, case, pipe_whole.Plan.of(1024, shape))
    for rule in [*pipe_rules.rules_for(shape, case, 8), *whole]:
        if rule not in pipe_whole.HEADER_RULES:
            assert rule.text in text and rule.within in text, rule


def test_shapes_are_read_from_names():
    shape = pipe_shapes.parse_shape(
        "backward_kernel<BackwardTraits<HalfProduct<f16>, BoundedOnly<StreamingShape<Fragment<64, 64, 2, 4>, "
        "Fragment<64, 768, 2, 4>, 96, 16, 3, 1> >, false> >"
    )
    assert str(shape) == "backward float16 64 x 64, 2 x 4 warps, streaming 768"
    assert (shape.depth, shape.step, shape.stages, shape.steps(768)) == (96, 16, 3, 8)
    assert shape.flop(768) == 2 * 64 * 64 * (768 + 768)
    assert pipe_shapes.parse_shape("prepare_kernel<bf16>") is None
    with pytest.raises(ValueError, match="another form"):
        pipe_shapes.parse_shape("forward_kernel<SomethingElse>")


def test_small_batches_are_work_launches_and_meetings():
    seconds = {"prepare": 0.25e-6, "tiles": 2e-6, "merge": 0.25e-6}
    whole = SimpleNamespace(
        plan=SimpleNamespace(active=lambda phase: 7),
        phases={phase: {"shared": 10} for phase in pipe_whole.PHASES},
        slots_per_warp=lambda phase: 100,
        seconds=lambda phase, gpu: seconds[phase],
    )

    class Model(pipe_model.Model):
        def whole(self, case):
            return whole

        def backward(self, case, gpu):
            return SimpleNamespace(seconds=4e-6 + gpu.launch)

        def around(self, case, gpu):
            return 0.5e-6, 0.25e-6

    lines = pipe_whole.report(Model([]), [pipe_model.Case(256, 128)], H100)
    assert (H100.launch, H100.meet) == (3e-6, 1.5e-6)
    assert "| 256 | 128 | tiles | 7 | 100 | 10 | 2.0 µs |" in lines
    assert lines[-1] == "| 256 | 128 | 2.0 + 4.0 µs | 8.5 µs | 11.5 µs | 10.2 µs |"
