"""Our keepalived on a kernel without FULLNAT: one clear line, nothing half-made, and everything else as ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel.balancer import Balancer
from tests.kernel.lab import Lab

pytestmark = [pytest.mark.build, pytest.mark.guest]
FLAVOURS = ("rs",)
NAT = """virtual_server 192.0.2.1 80 {
    lvs_sched rr
    lvs_method NAT
    protocol TCP
    EST
    real_server 10.1.0.2 8080 {
    }
}
"""
FNAT = """local_address_group g {
    10.0.0.5
}
virtual_server 192.0.2.2 80 {
    lvs_sched rr
    lvs_method FNAT
    laddr_group_name g
    vip_bind_dev lo
    protocol TCP
    real_server 10.1.0.2 8080 {
    }
}
virtual_server 192.0.2.3 80 {
    lvs_sched rr
    lvs_method FNAT
    laddr_group_name g
    protocol TCP
    real_server 10.1.0.2 8080 {
    }
}
"""
NATTED = ["-A -t 192.0.2.1:80 -s rr", "-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -m -w 1"]


@pytest.fixture
def keepalived(lab: Lab) -> Iterator[Balancer]:
    """Not yet started."""
    found = Balancer(lab.namespace("host"))
    yield found
    found.end()


def test_services_of_fullnat_are_left_out(keepalived: Balancer) -> None:
    keepalived.configure(NAT.replace("EST", "est_timeout 90") + FNAT)
    assert keepalived.check().status == 0  # it says nothing of the kernel that it runs on
    keepalived.start()
    assert keepalived.programmed() == NATTED
    assert keepalived.said("FULLNAT") == [
        "IPVS of this kernel does not have FULLNAT - ignoring the 2 virtual servers with lvs_method FNAT,"
        " the first of which is [192.0.2.2]:tcp:80"
    ]
    assert len(keepalived.said("ignoring est_timeout")) == 1
    assert keepalived.bound("lo") == set()
    # taken out and put in again by reloads
    keepalived.configure(NAT.replace("EST", ""))
    keepalived.reload()
    assert keepalived.programmed() == NATTED
    assert len(keepalived.said("FULLNAT")) == 1
    keepalived.configure(NAT.replace("EST", "") + FNAT)
    keepalived.reload()
    assert keepalived.programmed() == NATTED
    assert len(keepalived.said("FULLNAT")) == 2
    keepalived.stop()
    assert keepalived.programmed() == []
