"""Which reports of a kernel's log fail a test."""

from __future__ import annotations

from tests.kernel.machine import without_upstreams

KNOWN = [
    "68.96 =============================",
    "68.96 WARNING: suspicious RCU usage",
    "68.96 6.12.107-debug #1 Tainted: G                 N",
    "68.96 -----------------------------",
    "68.96 net/netfilter/nf_tables_api.c:4454 RCU-list traversed in non-reader section!!",
    "68.96 Call Trace:",
    "68.96  <TASK>",
    "68.96  nft_set_lookup.part.0+0x122/0x160 [nf_tables]",
    "68.96  </TASK>",
]
OURS = [line.replace("nf_tables_api.c:4454", "ipvs/ip_vs_fnat.c:10") for line in KNOWN]


def test_a_report_about_the_unpatched_kernel_is_left_out() -> None:
    assert without_upstreams(["before", *KNOWN, "after"]) == ["before", KNOWN[0], "after"]


def test_one_about_our_own_code_stays_beside_it() -> None:
    assert without_upstreams([*KNOWN, *OURS, *KNOWN]) == [KNOWN[0], *OURS, KNOWN[0]]
