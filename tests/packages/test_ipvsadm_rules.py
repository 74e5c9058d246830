"""Our ipvsadm: what editing keeps, what is saved and restored, and how connections are listed.

As in test_ipvsadm.py, ipvs/stand_in.py stands for the kernel.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

import pytest

from tests.packages.ipvs.lab import ETC, REAL, SERVICE, Command, Lab

pytestmark = pytest.mark.build


# --- editing


FULL = "-A -t 192.0.2.1:80 -s sh -p 500 -M 255.255.255.0 -b sh-fallback,sh-port -V 90"
WITH_PE = "-A -u 192.0.2.1:53 -s rr -p 30 --pe sip"


@pytest.mark.parametrize(
    ("before", "edit", "after"),
    [
        (FULL, "", FULL),
        (FULL, "-s rr", "-A -t 192.0.2.1:80 -s rr -p 500 -M 255.255.255.0 -V 90"),
        (FULL, "-s sh", FULL),
        (FULL, "-p 900", FULL.replace("500", "900")),
        (FULL, "-p", FULL.replace("500", "360")),
        (FULL, "-M 255.255.0.0", FULL.replace("255.255.255.0", "255.255.0.0")),
        (FULL, "-b sh-port", FULL.replace("sh-fallback,", "")),
        (FULL, "-V 30", FULL.replace("-V 90", "-V 30")),
        (FULL, "--est-timeout 0", FULL.replace(" -V 90", "")),
        (FULL, "--no-persistent", "-A -t 192.0.2.1:80 -s sh -b sh-fallback,sh-port -V 90"),
        (FULL, "--no-sched-flags", FULL.replace(" -b sh-fallback,sh-port", "")),
        (WITH_PE, "-s wlc", WITH_PE.replace("rr", "wlc")),
        (WITH_PE, "--no-pe", WITH_PE.replace(" --pe sip", "")),
        (WITH_PE, "-o", f"{WITH_PE} -o"),
        (f"{WITH_PE} -o", "-s wlc", f"{WITH_PE} -o".replace("rr", "wlc")),
        (f"{WITH_PE} -o", "--no-ops", WITH_PE),
        ("-A -t [2001:db8::1]:80 -s rr -p 30 -M 64", "-s wlc", "-A -t [2001:db8::1]:80 -s wlc -p 30 -M 64"),
        ("-A -f 9 -6 -s rr -p 30 -M 64", "-V 90", "-A -f 9 -6 -s rr -p 30 -M 64 -V 90"),
    ],
)
def test_editing_a_service_changes_what_is_given(lab: Lab, before: str, edit: str, after: str) -> None:
    service = re.findall(r"-[tuf] \S+(?: -6)?", before)[0]
    assert lab.saved(before, f"-E {service} {edit}") == [after]


def test_persistence_begins_anew_after_it_was_ended(lab: Lab) -> None:
    edits = [f"-E -t 192.0.2.1:80 {edit}" for edit in ("--no-persistent", "-p 60")]
    assert lab.saved(FULL, *edits) == ["-A -t 192.0.2.1:80 -s sh -p 60 -b sh-fallback,sh-port -V 90"]


def test_editing_cannot_make_what_adding_refuses(lab: Lab) -> None:
    step = lab.last("-A -t 192.0.2.1:0 -s rr -p 30", "-E -t 192.0.2.1:0 --no-persistent")
    assert (step.status, step.err) == (2, "Zero port specified for non-persistent service\n")
    assert "SET_SERVICE" not in step.sent
    step = lab.last(SERVICE, "-E -t 192.0.2.1:80 -b mh-port")
    assert (step.status, step.err) == (2, "incompatible scheduler flag `mh-port'\n")
    step = lab.last("-E -t 192.0.2.1:80 -s rr")
    assert (step.status, step.err) == (255, "No such service\n")


NAT = f"{REAL} -m -w 3 -x 100 -y 50"
GUE = "-a -t 192.0.2.1:80 -r 10.1.0.2:80 -i -w 1 --tun-type gue --tun-port 6080 --tun-csum"
ROUTE = "-a -t 192.0.2.1:80 -r 10.1.0.2:80 -g -w 1"


@pytest.mark.parametrize(
    ("before", "edit", "after"),
    [
        (NAT, "", NAT),
        (NAT, "-w 0", NAT.replace("-w 3", "-w 0")),
        (NAT, "-x 200", NAT.replace("100", "200")),
        (NAT, "-y 20", NAT.replace("50", "20")),
        (NAT, "-x 0 -y 0", f"{REAL} -m -w 3"),
        (NAT, "-b", NAT.replace("-m", "-b")),
        (NAT.replace("-m", "-b"), "-w 9", NAT.replace("-m", "-b").replace("-w 3", "-w 9")),
        (GUE, "-w 0", GUE.replace("-w 1", "-w 0")),
        (GUE, "--tun-port 6081", GUE.replace("6080", "6081")),
        (GUE, "--tun-nocsum", GUE.replace("csum", "nocsum")),
        (GUE, "--tun-type gue", GUE),
        (GUE, "--tun-type gre", GUE.replace("gue --tun-port 6080 --tun-csum", "gre --tun-nocsum")),
        (GUE, "-i", GUE),
        (GUE, "-m", ROUTE.replace("-g", "-m")),
        (ROUTE, "-b", ROUTE.replace("-g", "-b")),
    ],
)
def test_editing_a_real_server_changes_what_is_given(lab: Lab, before: str, edit: str, after: str) -> None:
    server = re.findall(r"-t \S+ -r \S+", before)[0]
    assert lab.saved(SERVICE, before, f"-e {server} {edit}") == [SERVICE, after]


@pytest.mark.parametrize(
    ("before", "edit", "said"),
    [
        (GUE, "-e -t 192.0.2.1:80 -r 10.1.0.2:80 -m --tun-port 5", "Tunnel options conflict with forward method"),
        (ROUTE, "-e -t 192.0.2.1:80 -r 10.1.0.2:80 --tun-port 5", "Tunnel options conflict with forward method"),
        (ROUTE, "-e -t 192.0.2.1:80 -r 10.1.0.2:80 -i --tun-type gue", "You need to supply the 'tun-port' option"),
        (NAT, "-e -t 192.0.2.1:80 -r 10.1.0.2:80 -w 5", "No such destination"),
        (NAT, "-e -t 192.0.2.1:80 -r 10.1.0.2:8080 -x 9", "Lower threshold is above the upper threshold"),
        (NAT, "-e -t 192.0.2.7:80 -r 10.1.0.2:8080 -w 5", "Service not defined"),
    ],
)
def test_a_refused_edit_leaves_the_real_server_alone(lab: Lab, before: str, edit: str, said: str) -> None:
    *_, step, saved = lab.play(SERVICE, before, edit, "-S -n")
    assert step.status != 0
    assert step.err == f"{said}\n" or said in step.err
    assert saved.out.splitlines() == [SERVICE, before]


def test_a_port_that_adding_did_not_keep_finds_the_server_all_the_same(lab: Lab) -> None:
    words = "-t 192.0.2.1:80 -r 10.1.0.2:8080"
    assert lab.saved(SERVICE, f"-a {words}", f"-e {words} -w 4")[1:] == [ROUTE.replace("-w 1", "-w 4")]
    nat = "-a -t 192.0.2.1:80 -r 10.1.0.2:80 -m"
    assert lab.last(SERVICE, nat, f"-e {words} -w 4").err == "No such destination\n"


# --- saving and restoring


RULES = """\
-A -t 192.0.2.1:0 -s rr -p 10
-A -t 192.0.2.1:80 -s rr -p 300 -M 255.255.255.0 -V 90
-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -b -w 3 -x 100 -y 50
-a -t 192.0.2.1:80 -r 10.1.0.3:80 -g -w 0
-a -t 192.0.2.1:80 -r 10.1.0.4:80 -i -w 1 --tun-type ipip
-a -t 192.0.2.1:80 -r 10.1.0.5:80 -i -w 1 --tun-type gue --tun-port 6080 --tun-remcsum -x 7
-a -t 192.0.2.1:80 -r 10.1.0.6:80 -i -w 1 --tun-type gre --tun-csum
-a -t 192.0.2.1:80 -r 10.1.0.7:81 -m -w 1
-P -t 192.0.2.1:80 -z 10.0.0.5
-P -t 192.0.2.1:80 -z 10.0.0.4
-A -u 192.0.2.1:53 -s rr -o
-A -u 192.0.2.1:5060 -s mh -p 30 --pe sip -b mh-fallback,mh-port
-a -u 192.0.2.1:5060 -r 10.1.0.2:5060 -b -w 1
-P -u 192.0.2.1:5060 -z 10.0.0.5
-A --sctp-service 192.0.2.1:9 -s wlc
-A -t [2001:db8::1]:80 -s sh -p 360 -M 64 -b sh-port
-a -t [2001:db8::1]:80 -r [2001:db8::2]:8080 -b -w 65535
-P -t [2001:db8::1]:80 -z 2001:db8::5
-A -f 7 -s wrr -b flag-1,flag-2,flag-3 -V 2147483
-a -f 7 -r 10.1.0.2:0 -b -w 1
-P -f 7 -z 10.0.0.5
-A -f 4294967295 -6 -s lc
-a -f 4294967295 -6 -r [2001:db8::2]:0 -b -w 1
-P -f 4294967295 -6 -z 2001:db8::5
"""


def test_what_is_saved_is_restored_to_the_byte(lab: Lab) -> None:
    again = lab.saved(Command("-R", RULES))
    assert sorted(again) == sorted(RULES.splitlines())
    once_more = lab.saved(Command("-R", "\n".join(again)))
    assert once_more == again


def test_names_are_saved_so_that_they_can_be_restored(lab: Lab) -> None:
    rules = "-A -t 192.0.2.1:80 -s rr\n-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -b -w 1\n-P -t 192.0.2.1:80 -z 10.0.0.5\n"
    rules += "-A -t [2001:db8::1]:80 -s rr\n-a -t [2001:db8::1]:80 -r [2001:db8::1]:8080 -m -w 1\n"
    named = lab.last(Command("-R", rules), "-S")
    name = ETC["hosts"].splitlines()[1].split()[1]
    assert len(name) > 60
    assert named.out.splitlines()[:3] == [
        "-A -t vip.example:http -s rr",
        f"-a -t vip.example:http -r {name}:http-alt -b -w 1",
        "-P -t vip.example:http -z 10.0.0.5",
    ]
    assert lab.saved(Command("-R", named.out)) == rules.splitlines()


@pytest.mark.parametrize(
    ("rules", "line", "said", "kept"),
    [
        (f"{SERVICE}\n# words\n\n{SERVICE} # again\n-A -f 9 -s rr\n", 4, "Service already exists", [SERVICE]),
        (f"{SERVICE}\n-A -f 9 -s rr -b\n", 2, "-b: missing argument", [SERVICE]),
        (f"{SERVICE}\nwords\n", 2, "the first option must be a command", [SERVICE]),
        (f"{SERVICE}\n-P -t 192.0.2.1:80 -z x\n-A -f 9\n", 2, "illegal local address `x'", [SERVICE]),
        (f"{SERVICE}\n-Q -t 192.0.2.1:80 -z 10.0.0.5\n-A -f 9\n", 2, "local address 10.0.0.5 is not", [SERVICE]),
        (f"{SERVICE}\n-L -n --nonsense", 2, "--nonsense: unknown option", [SERVICE]),
        ("-A -f 9 -s rr\r\n-h\r\n", 2, "-h is nothing that can be restored", ["-A -f 9 -s rr"]),
        ("-R", 1, "-R is nothing that can be restored", []),
        ("-A -f 9 -s rr\n" + "-" * 5000 + " x\n", 2, "---", ["-A -f 9 -s rr"]),
    ],
)
def test_restoring_stops_at_the_line_that_fails(
    lab: Lab, rules: str, line: int, said: str, kept: Sequence[str]
) -> None:
    step, saved = lab.play(Command("-R", rules), "-S -n")
    assert step.status not in (0, 139)
    first, second, third = step.err.splitlines()[:3]
    assert first.startswith(f"line {line}: {said}")
    assert second == f"line {line}: {rules.splitlines()[line - 1]}"
    assert third == f"line {line}: nothing is restored from here on; the lines above are in effect"
    assert saved.out.splitlines() == kept


def test_restoring_reads_comments_and_what_older_tools_wrote(lab: Lab) -> None:
    rules = f"# a comment\n  # another\n\n \t\nipvsadm {SERVICE} # why\n\t-A\t-f 9   -s rr\n{REAL} -m -w 1"
    assert lab.saved(Command("-R", rules)) == [SERVICE, f"{REAL} -m -w 1", "-A -f 9 -s rr"]


def test_a_line_is_at_fault_without_a_kernel_too(lab: Lab) -> None:
    done = lab.alone("-R", stdin="\n# words\n-A -t 192.0.2.1:80 -z 10.0.0.5\n")
    assert done.returncode == 2
    assert done.stderr.startswith("line 3: Illegal 'laddr' option with the 'add-service' command\nline 3: -A -t")
    done = lab.alone("-R", stdin=f"{SERVICE}\n")
    assert done.stderr.startswith("Can't initialize ipvs"), "no fault of the line"


def test_saving_says_when_it_could_not(lab: Lab) -> None:
    step = lab.last(SERVICE, Command("-S -n", stdout="/dev/full"))
    assert (step.status, step.err) == (1, "cannot write the rules: No space left on device\n")
    for late in (False, True):
        step = lab.last(SERVICE, "-S -n", refuse={"GET_LADDR": errno.ENOMEM}, late=late)
        assert (step.status, step.err) == (1, "Memory allocation problem\n"), "a short list must not pass for all of it"


# --- connections


STOCK = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP C0000207 D431 C0000201 0050 0A010002 1F90 ESTABLISHED     899
UDP C0000207 0000 C0000201 13C4 0A010002 13C4 NONE             59 sip call-id@host
TCP 2001:0db8:0000:0000:0000:0000:0000:0007 D431 2001:0db8:0000:0000:0000:0000:0000:0001 0050 \
2001:0db8:0000:0000:0000:0000:0000:0002 1F90 SYN_RECV         59
"""
FULLNAT = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData LocalIP LPrt
TCP C0000207 D431 C0000201 0050 0A010002 1F90 ESTABLISHED     899 - - 0A000005 1388
TCP C0000207 D432 C0000201 0051 0A010002 1F90 ESTABLISHED     899
UDP C0000207 0000 C0000201 13C4 0A010002 13C4 NONE             59 sip call-id@host
UDP C0000207 D433 C0000201 13C4 0A010002 13C4 UDP              59 sip call-id@host 0A000005 1389
UDP C0000207 D434 C0000201 13C4 0A010002 13C4 UDP              59 sip a call with blanks
TCP 2001:0db8:0000:0000:0000:0000:0000:0007 D431 2001:0db8:0000:0000:0000:0000:0000:0001 0050 \
2001:0db8:0000:0000:0000:0000:0000:0002 1F90 FIN_WAIT        119 - - 2001:0db8:0000:0000:0000:0000:0000:0005 138A
"""


def test_a_stock_connection_table_reads_as_before(lab: Lab) -> None:
    plain = lab.connections(STOCK, "-n")
    assert plain.stdout.splitlines() == [
        "IPVS connection entries",
        "pro expire state       source             virtual            destination",
        "TCP 14:59  ESTABLISHED 192.0.2.7:54321    192.0.2.1:80       10.1.0.2:8080",
        "UDP 00:59  NONE        192.0.2.7:0        192.0.2.1:5060     10.1.0.2:5060",
        "TCP 00:59  SYN_RECV    [2001:db8::7]:54321 [2001:db8::1]:80   [2001:db8::2]:8080",
    ]
    engines = lab.connections(STOCK, "-n", "-p").stdout.splitlines()
    assert engines[1] == (
        "pro expire state       source             virtual            destination        pe name          pe_data"
    )
    assert engines[2] == plain.stdout.splitlines()[2]
    assert engines[3] == (
        "UDP 00:59  NONE        192.0.2.7:0        192.0.2.1:5060     10.1.0.2:5060    sip                call-id@host"
    )


def test_a_fullnat_connection_names_its_four_addresses(lab: Lab) -> None:
    plain = lab.connections(FULLNAT, "-n")
    assert plain.stdout.splitlines()[1:] == [
        "pro expire state       source             virtual            destination        local",
        "TCP 14:59  ESTABLISHED 192.0.2.7:54321    192.0.2.1:80       10.1.0.2:8080      10.0.0.5:5000",
        "TCP 14:59  ESTABLISHED 192.0.2.7:54322    192.0.2.1:81       10.1.0.2:8080",
        "UDP 00:59  NONE        192.0.2.7:0        192.0.2.1:5060     10.1.0.2:5060",
        "UDP 00:59  UDP         192.0.2.7:54323    192.0.2.1:5060     10.1.0.2:5060      10.0.0.5:5001",
        "UDP 00:59  UDP         192.0.2.7:54324    192.0.2.1:5060     10.1.0.2:5060",
        "TCP 01:59  FIN_WAIT    [2001:db8::7]:54321 [2001:db8::1]:80   [2001:db8::2]:8080 [2001:db8::5]:5002",
    ]
    rows = [line.split() for line in lab.connections(FULLNAT, "-n", "-p").stdout.splitlines()[1:]]
    assert rows[0][-3:] == ["name", "pe_data", "local"]
    assert rows[1][6:] == ["-", "-", "10.0.0.5:5000"]
    assert rows[2][6:] == []
    assert rows[3][6:] == ["sip", "call-id@host"]
    assert rows[4][6:] == ["sip", "call-id@host", "10.0.0.5:5001"]
    assert rows[5][6:] == ["sip", "a"]
    assert rows[6][6:] == ["-", "-", "[2001:db8::5]:5002"]
    assert "vip.example:http" in lab.connections(FULLNAT).stdout


def test_a_table_that_cannot_be_read_is_refused(lab: Lab) -> None:
    head = FULLNAT.splitlines()[0]
    for row in ("TCP C0000207 D431 C0000201 0050", "TCP C000020 D431 C0000201 0050 0A010002 1F90 X 1", "x" * 5000):
        done = lab.connections(f"{head}\n{row}\n", "-n")
        assert done.returncode == 1
        assert done.stderr.startswith("unexpected input from /proc/net/ip_vs_conn: ")
    long = "UDP C0000207 0000 C0000201 13C4 0A010002 13C4 NONE             59 sip " + "c" * 5000
    done = lab.connections(f"{STOCK.splitlines()[0]}\n{long}\n", "-n", "-p")
    assert done.returncode == 0 and done.stdout.endswith("c" * 5000 + "\n")
