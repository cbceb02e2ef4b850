"""The audit's page: what it says, that it stands alone, and where its plots put things."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from fastproj.bench.audit.audit import Audit, CodeRow, TrafficRow, traffic_row
from fastproj.bench.audit.page import render_page, verdict
from fastproj.bench.audit.roofline import (
    CLEAR,
    LINE,
    ROOFS,
    attainable,
    intensity,
    label_heights,
    labelled_points,
    roofline_figure,
    short_names,
)
from fastproj.bench.audit.units import microseconds, size
from fastproj.bench.audit.verdict import Finding
from fastproj.bench.traffic.chips import CHIPS, Chip
from fastproj.bench.traffic.models import OPERATORS
from fastproj.bench.traffic.workloads import WORKLOADS

CHIP = CHIPS["H100"]
COMMAND = "fastproj audit --chips H100 --html 'a & b.html'"


def code_row(kernel: str, arch: str) -> CodeRow:
    return CodeRow(
        operator=kernel.removesuffix("_kernel"),
        kernel=kernel,
        arch=arch,
        cases=7,
        registers=61,
        local_bytes=0,
        shared_bytes=73_728,
        programs=3,
        flying_bytes=None,
        wide=6,
        matrix_products=4,
        matrix=4,
        asynchronous=2,
        findings=0,
    )


def row(operator: str, workload: str, flops: int, memory_bytes: int, rate: str) -> TrafficRow:
    """A row whose floor follows the definition; accesses are twice, and the least is half the traffic."""
    memory, arithmetic = memory_bytes / CHIP.memory_bytes_per_second, flops / CHIP.matrix_flops[rate]
    return TrafficRow(
        operator=operator,
        workload=workload,
        chip=CHIP.name,
        launches=1234,
        read_bytes=2 * memory_bytes - 8,
        written_bytes=8,
        least_bytes=memory_bytes // 2,
        access_ratio=4.0,
        memory_bytes=memory_bytes,
        memory_ratio=2.0,
        flops=flops,
        floor_microseconds=1e6 * max(memory, arithmetic),
        least_microseconds=1e6 * memory / 2,
        bound="memory" if memory >= arithmetic else "arithmetic",
    )


ROWS = (
    row("gram", "Tiny-1B, LoRA", 750_000_000, 1_000_000_000, "fp32"),
    row("combine", "Tiny-1B, LoRA", 300_000_000, 900_000_000, "fp32"),
    row("gram", "Huge-9B, LoRA", 7_500_000_000, 10_000_000_000, "fp32"),
    row("weighted_grad", "Huge-9B, LoRA", 9_894 * 10**11, 10**12, "bf16"),
)
GREEN = Audit(
    code=(code_row("gram_kernel", "sm_90"), code_row("edge", "sm_90"), code_row("gram_kernel", "gfx942")),
    findings=(),
    declared=(("edge", "access width", "offsets are <not> known & read one by one"),),
    traffic=ROWS,
    problems=(),
)
RED = replace(
    GREEN,
    findings=(
        Finding(
            "gram_kernel",
            "3 × bf16",
            "sm_90",
            "access width",
            "2 accesses of [32] bits",
            ("LDG.E <R2>", "STG.E"),
        ),
        Finding("edge", "1 × fp32", "gfx942", "local memory", "16 bytes of local memory a thread"),
    ),
    problems=("gram on Tiny: 5.10 N accesses & more",),
)


class Structure(HTMLParser):
    """Tags in order, attributes, and ids of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def fetched(page: str) -> list[str]:
    """What a browser would fetch: names of XML namespaces are no addresses, fragments are on the page."""
    return re.findall(
        r"""(?:src|href|srcset|data)\s*=\s*["'](?!#)[^"']+|url\((?!#)[^)]+\)|@import|<script""", page
    )


@pytest.mark.parametrize("result", [GREEN, RED], ids=["green", "red"])
def test_the_page_stands_alone_and_is_well_made(result: Audit) -> None:
    page = render_page(result, [CHIP], COMMAND)
    assert fetched(page) == []
    tags = Structure(page).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id is given twice"
    for at, (tag, _) in enumerate(tags):
        if tag == "svg":
            assert tags[at - 1][1]["role"] == "img"
            assert "H100" in str(tags[at - 1][1]["aria-label"])
        if tag == "table":
            assert tags[at - 1][1]["class"] == "table", "a table outside a box that scrolls"
    assert "prefers-color-scheme: dark" in page
    assert "#0102" not in page, "a colour that does not follow the page"
    assert "Nothing on this page was measured on a GPU" in page
    assert "a &amp; b.html" in page


def test_a_green_page_shows_the_tables() -> None:
    page = render_page(GREEN, [CHIP], COMMAND)
    assert "Green: the machine code of all 21 compilations, for sm_90, gfx942, keeps" in page
    assert "What is wrong" not in page
    shown = re.findall(r'scope="rowgroup">(\w+)|<td>(sm_90|gfx942)</td>', page)
    assert ["".join(pair) for pair in shown][:5] == ["gram_kernel", "sm_90", "gfx942", "edge", "sm_90"]
    assert "offsets are &lt;not&gt; known &amp; read one by one" in page
    for cell in (
        "61",
        "73,728",
        "6 of 7",
        "4 of 4",
        "2 of 4",
        "1,234",
        "2.00 GB",
        "4.000×",
        "1.00 GB",
        "2.000×",
    ):
        assert f"<td>{cell}</td>" in page, cell
    # 1e9 bytes over 3.35e12 bytes/s, and half of that.
    assert "<td>299</td><td>149</td><td>memory</td>" in page
    # 9.894e14 FLOP over 989.4e12 FLOP/s is a second.
    assert "<td>1,000,000</td>" in page
    assert "<td>arithmetic</td>" in page


def test_findings_are_shown_in_full_and_escaped() -> None:
    page = render_page(RED, [CHIP], COMMAND)
    assert "Not green: 2 findings in the machine code of gram_kernel, edge and 1 problem of launchers" in page
    for text in (
        "access width: gram_kernel on sm_90",
        "2 accesses of [32] bits (case 3 × bf16)",
        "local memory: edge on gfx942",
        "16 bytes of local memory a thread (case 1 × fp32)",
        "gram on Tiny: 5.10 N accesses &amp; more",
    ):
        assert text in page
    assert re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL) == ["LDG.E &lt;R2&gt;\nSTG.E\n"]
    assert "<R2>" not in page
    assert page.index("Not green") < page.index("access width: gram_kernel") < page.index("Machine code</h2>")


def test_the_verdict_names_what_there_is() -> None:
    assert verdict(replace(RED, findings=())) == "Not green: 1 problem of launchers or traffic."
    assert verdict(replace(RED, problems=(), findings=RED.findings[:1])) == (
        "Not green: 1 finding in the machine code of gram_kernel."
    )


def test_chips_and_rows_have_to_agree() -> None:
    page = render_page(GREEN, [CHIPS["A100"], CHIP], COMMAND)
    assert page.count("<svg") == 1
    assert "<h3>H100</h3>" in page
    assert "A100" not in page
    with pytest.raises(ValueError, match=r"rows of \['A100'\] alone, got some of \['H100'\]"):
        render_page(GREEN, [CHIPS["A100"]], COMMAND)
    with pytest.raises(ValueError, match="on A100 to draw, got none"):
        roofline_figure([], CHIPS["A100"])


def test_numbers_are_short() -> None:
    assert [size(n) for n in (999, 1000, 17_483_712, 436_000_000, 1_703_894_056_960)] == [
        "999 B",
        "1.00 kB",
        "17.5 MB",
        "436 MB",
        "1.70 TB",
    ]
    assert [microseconds(v) for v in (5.2157, 17.33, 333.0, 130_499.2)] == ["5.22", "17.3", "333", "130,499"]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_point_stands_on_a_roof_that_is_drawn(chip: Chip) -> None:
    for workload in WORKLOADS.values():
        for model in OPERATORS.values():
            traffic = model(workload)
            made = traffic_row(traffic, chip)
            slope, flat = intensity(made) * chip.memory_bytes_per_second, chip.matrix_flops[traffic.rate]
            roof = min(slope, flat)
            # The memory's slope is everybody's; of flat parts there are only these.
            assert traffic.rate in ROOFS or slope < flat
            # Two divisions and two products in fp64.
            assert attainable(made) == pytest.approx(roof, rel=1e-12)


def test_rows_in_one_place_share_a_label() -> None:
    points = labelled_points(ROWS)
    assert [point.text for point in points] == [
        "weighted_grad: Huge-9B",
        "gram: all workloads",
        "combine: Tiny-1B",
    ]
    assert [point.intensity for point in points] == pytest.approx([989.4, 0.75, 1 / 3])
    # On the flat part, then twice on the slope of 3.35 TB/s.
    assert [point.tera for point in points] == pytest.approx([989.4, 0.75 * 3.35, 3.35 / 3])
    assert short_names(["A, q", "A, all"]) == {"A, q": "A, q", "A, all": "A, all"}


def test_points_on_two_roofs_do_not_share_a_label() -> None:
    same = (row("edge", "W", 10**12, 10**10, "fp32"), row("weighted_grad", "W", 10**12, 10**10, "bf16"))
    assert {point.text for point in labelled_points(same)} == {"edge: W", "weighted_grad: W"}


def test_labels_keep_apart_and_off_the_roofs() -> None:
    points, roofs = [200.0, 198.0, 197.0, 150.0, 40.0, 39.5], [200.0, 172.0, 41.0]
    heights = label_heights(points, roofs)
    slack = 1e-9  # differences of fp64 sums
    assert all(above - below >= LINE - slack for above, below in pairwise(heights))
    assert all(abs(height - roof) >= CLEAR - slack for height in heights for roof in roofs)
    assert all(height <= point for height, point in zip(heights, points, strict=True))
    assert heights[3] == 150.0, "moved without need"


def test_the_plot_names_points_roofs_and_keys_as_text() -> None:
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", roofline_figure(ROWS, CHIP))
    for text in (
        "gram: all workloads",
        "combine: Tiny-1B",
        "weighted_grad: Huge-9B",
        "memory, 3.35 TB/s",
        "bf16 matrix, 989.4 TFLOP/s",
        "fp32 vector, 66.9 TFLOP/s",
        "Huge-9B, LoRA",
    ):
        assert text in texts
    alone = roofline_figure(ROWS[3:], CHIP)
    assert ">memory, 3.35 TB/s<" in alone, "cut off where no point lies to the left"
    assert ">weighted_grad: Huge-9B<" in alone
