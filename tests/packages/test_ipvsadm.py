"""Our ipvsadm: what each option means and prints, and what it says when something is wrong.

Where a kernel is needed, ipvs/stand_in.py stands for it. That the real one agrees is for tests/kernel.
"""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Mapping

import pytest

from tests.packages.ipvs.lab import REAL, SERVICE, Lab

pytestmark = pytest.mark.build


# --- the command line, without a kernel


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Can't initialize ipvs"),  # what a good line comes to here; the others do not get that far
        ("-L -n", "Can't initialize ipvs"),
        # -b
        ("-b -a -t 192.0.2.1:80 -r 10.1.0.2", "the first option must be a command"),
        ("-t 192.0.2.1:80 -A", "the first option must be a command"),
        ("-A -t 192.0.2.1:80 -b", "-b: missing argument; -b is --sched-flags with -A and -E"),
        ("-At 192.0.2.1:80 -b", "-b: missing argument; -b is --sched-flags with -A and -E"),
        ("-A -t 192.0.2.1:80 -b -s sh", "`-s' is no scheduler flag; -b is --sched-flags"),
        ("-A -t 192.0.2.1:80 -s rr -b sh-port", "incompatible scheduler flag `sh-port'"),
        ("-A -t 192.0.2.1:80 --fullnat", "Illegal 'forwarding-method' option with the 'add-service' command"),
        ("-a -t 192.0.2.1:80 -r 10.1.0.2 -b sh-port", "unexpected argument sh-port; -b is --sched-flags"),
        ("-a -t 192.0.2.1:80 -r 10.1.0.2 --sched-flags sh-port", "Illegal 'sched-flags' option"),
        ("-a -t 192.0.2.1:80 -r 10.1.0.2 -b -m", "multiple 'forwarding-method' options"),
        ("-a -t 192.0.2.1:80 -r [2001:db8::2]:80 -b", "Different address family"),
        ("-d -t 192.0.2.1:80 -r 10.1.0.2 --fullnat", "Illegal 'forwarding-method' option"),
        # local addresses
        ("-P -t 192.0.2.1:80", "You need to supply the 'laddr' option for the 'add-laddr' command"),
        ("-P -z 10.0.0.5", "You need to supply the 'service-address' option for the 'add-laddr' command"),
        ("-Q -z 10.0.0.5", "You need to supply the 'service-address' option for the 'del-laddr' command"),
        ("-G -z 10.0.0.5", "Illegal 'laddr' option with the 'get-laddr' command"),
        ("-A -t 192.0.2.1:80 -z 10.0.0.5", "Illegal 'laddr' option with the 'add-service' command"),
        ("-P -t 192.0.2.1:80 -z 10.0.0.5:80", "illegal local address `10.0.0.5:80'"),
        ("-P -t 192.0.2.1:80 -z vip.example", "illegal local address `vip.example'"),
        ("-P -t 192.0.2.1:80 -z [10.0.0.5]", "illegal local address `[10.0.0.5]'"),
        ("-P -t 192.0.2.1:80 -z 2001:db8::5", "2001:db8::5 is IPv6, and service -t 192.0.2.1:80 is IPv4"),
        ("-P -z [2001:db8::5] -t 192.0.2.1:80", "2001:db8::5 is IPv6, and service -t 192.0.2.1:80 is IPv4"),
        ("-P -t [2001:db8::1]:80 -z 10.0.0.5", "10.0.0.5 is IPv4, and service -t [2001:db8::1]:80 is IPv6"),
        ("-P -f 9 -z 2001:db8::5", "service -f 9 is IPv4; -6 makes it IPv6"),
        ("-Q -6 -f 9 -z 10.0.0.5", "10.0.0.5 is IPv4, and service -f 9 -6 is IPv6"),
        # the established timeout
        ("-A -t 192.0.2.1:80 -V -1", "illegal established timeout `-1'"),
        ("-A -t 192.0.2.1:80 -V 90s", "illegal established timeout `90s'"),
        ("-A -t 192.0.2.1:80 --est-timeout 2147484", "illegal established timeout `2147484'"),
        ("-A -u 192.0.2.1:53 -V 90", "An established timeout is only for TCP"),
        ("-A --sctp-service 192.0.2.1:9 -V 90", "An established timeout is only for TCP"),
        ("-A -t 192.0.2.1:80 -V 90 --vsestablish-timeout 90", "multiple 'est-timeout' options"),
        ("-a -t 192.0.2.1:80 -r 10.1.0.2 -V 90", "Illegal 'est-timeout' option with the 'add-server' command"),
        # SYNPROXY
        ("-A -t 192.0.2.1:80 -j on", "illegal word for synproxy `on': it is enable or disable"),
        ("-A -t 192.0.2.1:80 -j", "-j: missing argument"),
        ("-A -u 192.0.2.1:53 -j enable", "SYNPROXY is only for TCP"),
        ("-A -f 9 -o -j enable", "SYNPROXY does not go with One-Packet Scheduling"),
        ("-A -t 192.0.2.1:80 -j enable --synproxy enable", "multiple 'synproxy' options"),
        ("-a -t 192.0.2.1:80 -r 10.1.0.2 -j enable", "Illegal 'synproxy' option with the 'add-server' command"),
        # what only editing knows
        ("-A -t 192.0.2.1:80 --no-persistent", "Illegal 'no-persistent' option"),
        ("-A -u 192.0.2.1:53 --no-ops", "Illegal 'no-ops' option"),
        ("-A -t 192.0.2.1:80 --no-pe", "Illegal 'no-pe' option"),
        ("-A -t 192.0.2.1:80 --no-sched-flags", "Illegal 'no-sched-flags' option"),
        ("-E -t 192.0.2.1:80 -p --no-persistent", "'persistent' conflicts with the 'no-persistent' option"),
        ("-E -t 192.0.2.1:80 -M 255.0.0.0 --no-persistent", "'netmask' conflicts with the 'no-persistent' option"),
        ("-E -u 192.0.2.1:53 -o --no-ops", "'ops' conflicts with the 'no-ops' option"),
        ("-E -u 192.0.2.1:53 --pe sip --no-pe", "'pe' conflicts with the 'no-pe' option"),
        ("-E -t 192.0.2.1:80 -b flag-1 --no-sched-flags", "'sched-flags' conflicts with the 'no-sched-flags' option"),
        # the rest
        ("-6 -A -f 9", "the first option must be a command"),
        ("-A -6 -t 192.0.2.1:80", "-6 is for a service that -f names"),
        ("-A -t [vip.example]:80", "illegal virtual server address"),
        ("-A -p -M 64x -t [2001:db8::1]:80", "illegal ipv6 netmask"),
        ("-A -t 192.0.2.1:80 -b ,", "Can't initialize ipvs"),
        ("-L -c --stats", "options conflicts in the list command"),
    ],
)
def test_a_command_line_is_judged_before_the_kernel_is_asked(lab: Lab, line: str, said: str) -> None:
    done = lab.alone(*shlex.split(line))
    assert done.returncode not in (0, 139)
    assert said in done.stderr
    assert done.stdout == ""


def options(lab: Lab) -> dict[str, str]:
    """Every option in the program's own table, long to short ("" where there is none)."""
    text = (lab.source / "ipvsadm.c").read_text(encoding="latin-1")
    found = dict(re.findall(r"\{ \"([a-z0-9-]+)\", '(.|\\0)',", text))
    assert len(found) > 50
    return {name: letter.replace("\\0", "") for name, letter in found.items()}


def test_help_needs_no_kernel_and_names_every_option(lab: Lab) -> None:
    done = lab.alone("-h")
    assert done.returncode == 0, done.stderr
    known = options(lab)
    assert [name for name in known if not re.search(rf"--{name}\b", done.stdout)] == ["version"]  # as upstream's help
    letters = {letter for letter in known.values() if letter and not re.search(rf"-{letter}\b", done.stdout)}
    assert letters == {"v", "X"}, "those that upstream's help leaves out"
    assert lab.alone("--version").returncode == 0


def test_the_manual_names_every_option(lab: Lab) -> None:
    text = (lab.source / "ipvsadm.8").read_text(encoding="latin-1")
    missing = [name for name in options(lab) if not re.search(rf"--{name}\b", text)]
    assert missing == ["version"]
    for pair in ("-b, --fullnat", "-b, --sched-flags", "-P, --add-laddr", "-Q, --del-laddr", "-G, --get-laddr"):
        assert pair in text


# --- the forwarding method


@pytest.mark.parametrize(
    "line",
    [
        "-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -b -w 2",
        "-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -bw 2",
        "-at 192.0.2.1:80 -b -r 10.1.0.2:8080 -w 2",
        "-ab -w 2 -r 10.1.0.2:8080 -t 192.0.2.1:80",
        "-a -b -t 192.0.2.1:80 -w 2 -r 10.1.0.2:8080",
        "--add-server --fullnat --weight 2 --real-server 10.1.0.2:8080 --tcp-service 192.0.2.1:80",
        "-a --fullnat -w2 -r 10.1.0.2:8080 -t 192.0.2.1:80",
        "-a -w 2 -r 10.1.0.2:http-alt -t vip.example:http --fullnat",
    ],
)
def test_b_is_fullnat_with_a_real_server_in_any_order(lab: Lab, line: str) -> None:
    assert lab.saved(SERVICE, line)[1:] == ["-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -b -w 2"]
    edited = re.sub("^-(-add|a)", lambda match: "--edit" if match[1] == "-add" else "-e", line)
    before = "-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -m -w 7"
    assert lab.saved(SERVICE, before, edited)[1:] == ["-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -b -w 2"]


@pytest.mark.parametrize(
    "line",
    [
        "-A -t 192.0.2.1:80 -b sh-port -s sh",
        "-At 192.0.2.1:80 -s sh -bsh-port",
        "-Ab sh-port -t 192.0.2.1:80 -s sh",
        "-A --sched-flags sh-port -t 192.0.2.1:80 -s sh",
        "-A --sched-flags=sh-port -t 192.0.2.1:80 -s sh",
    ],
)
def test_b_is_sched_flags_with_a_service(lab: Lab, line: str) -> None:
    assert lab.saved(line) == ["-A -t 192.0.2.1:80 -s sh -b sh-port"]
    edited = line.replace("-A", "-E", 1)
    assert lab.saved("-A -t 192.0.2.1:80 -s sh", edited) == ["-A -t 192.0.2.1:80 -s sh -b sh-port"]


def test_the_list_keeps_its_columns(lab: Lab) -> None:
    step = lab.last(
        "-A -t 192.0.2.1:80 -s sh -b sh-port -p 300 -M 255.255.255.0 -V 90",
        "-a -t 192.0.2.1:80 -r 10.1.0.2:8080 -b -w 5",
        "-a -t 192.0.2.1:80 -r 10.1.0.3:8080 -m",
        "-A -t [2001:db8::1]:80 -s rr",
        "-a -t [2001:db8::1]:80 -r [2001:db8::2] -b",
        "-L -n",
    )
    assert step.out.splitlines()[1:] == [
        "Prot LocalAddress:Port Scheduler Flags",
        "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn",
        "TCP  192.0.2.1:80 sh (sh-port) persistent 300 mask 255.255.255.0 est_timeout 90",
        "  -> 10.1.0.2:8080                FullNat 5      0          0         ",
        "  -> 10.1.0.3:8080                Masq    1      0          0         ",
        "TCP  [2001:db8::1]:80 rr",
        "  -> [2001:db8::2]:80             FullNat 1      0          0         ",
    ]


def test_the_other_lists_know_fullnat_too(lab: Lab) -> None:
    *_, stats, rate, tunnels = lab.play(
        SERVICE, f"{REAL} -b", "-L -n --stats --exact", "-L -n --rate", "-L -n --tun-info"
    )
    assert "  -> 10.1.0.2:8080                       0        0        0        0        0\n" in stats.out
    assert "  -> 10.1.0.2:8080                       0        0        0        0        0\n" in rate.out
    assert "  -> 10.1.0.2:8080                FullNat n/a           1      0          0         \n" in tunnels.out


@pytest.mark.parametrize(("method", "name"), [(4, "Bypass"), (6, "Unknown"), (7, "Unknown")])
def test_a_method_without_an_option_is_listed_and_not_saved(lab: Lab, method: int, name: str) -> None:
    *_, listed, saved = lab.play(SERVICE, f"{REAL} -m", "-L -n", "-S -n", disguise={"3": method})
    assert listed.status == 0
    assert f"  -> 10.1.0.2:8080                {name:7} 1 " in listed.out
    assert saved.status == 1
    assert saved.out.splitlines() == [SERVICE]
    assert "10.1.0.2:8080 of service -t 192.0.2.1:80 is not saved: " in saved.err
    assert f"there is no option for its forwarding method {method}\n" in saved.err


@pytest.mark.parametrize(
    ("disguise", "said"), [({"13": 9}, "tunnel type 9"), ({"13": 1, "14": 6080, "15": 3}, "tunnel flags 3")]
)
def test_a_tunnel_without_an_option_is_not_saved(lab: Lab, disguise: Mapping[str, int], said: str) -> None:
    *_, listed, saved = lab.play(
        SERVICE, "-a -t 192.0.2.1:80 -r 10.1.0.2 -i", "-L -n --tun-info", "-S -n", disguise=disguise
    )
    assert (listed.status, saved.status) == (0, 1)
    assert saved.out.splitlines() == [SERVICE]
    assert said in saved.err


# --- local addresses


def test_local_addresses_come_and_go(lab: Lab) -> None:
    add, remove = "-P -t 192.0.2.1:80 -z 10.0.0.{}", "-Q -t 192.0.2.1:80 -z 10.0.0.{}"
    commands = [SERVICE, *(add.format(n) for n in (5, 6, 7)), remove.format(6)]
    assert lab.saved(*commands)[1:] == [add.format(5), add.format(7)]
    six = ["-A -t [2001:db8::1]:80 -s rr", "-P -t [2001:db8::1]:80 -z [2001:db8::5]"]
    six += ["--add-laddr --laddr 2001:db8::6 -t [2001:db8::1]:80", "-P -t [2001:db8::1]:80 -z 2001:db8::7"]
    six += ["--del-laddr -t [2001:db8::1]:80 -z [2001:db8::7]"]
    assert lab.saved(*six)[1:] == [f"-P -t [2001:db8::1]:80 -z 2001:db8::{n}" for n in (5, 6)]
    marks = ["-A -f 9 -s rr", "-A -f 9 -6 -s rr", "-P -f 9 -z 10.0.0.5", "-P -z 2001:db8::5 -6 -f 9"]
    assert lab.saved(*marks) == [marks[0], marks[2], marks[1], "-P -f 9 -6 -z 2001:db8::5"]


LISTED = "service -t 192.0.2.1:80; `ipvsadm -G -t 192.0.2.1:80 -n' lists all\n"
HEAD = "VIP:VPORT               TOTAL    SNAT_IP              CONFLICTS  CONNS"


def test_the_list_of_local_addresses(lab: Lab) -> None:
    *_, every, one, none, named = lab.play(
        SERVICE,
        "-P -t 192.0.2.1:80 -z 10.0.0.5",
        "-P -t 192.0.2.1:80 -z 10.0.0.6",
        "-A -u 192.0.2.1:53 -s rr",
        "-A -t [2001:db8::1]:80 -s rr",
        "-P -t [2001:db8::1]:80 -z 2001:db8::5",
        "-A -f 9 -s rr",
        "-A -f 9 -6 -s rr",
        "-G -n",
        "-G -n --exact --nosort -t [2001:db8::1]:80",
        "-G -t 192.0.2.9:80",
        "-G -t 192.0.2.1:80",
    )
    six = ["[2001:db8::1]:80        1", " " * 33 + "2001:db8::5          5000000000 7"]
    four = ["192.0.2.1:80            2"]
    four += [" " * 33 + "10.0.0.5             5000000000 7", " " * 33 + "10.0.0.6             5000000001 8"]
    marks = ["FWM:9                   0", "FWM:9/IPv6              0"]
    assert every.out.splitlines() == [HEAD, *four, "192.0.2.1:53/udp        0", *six, *marks]
    assert one.out.splitlines() == [HEAD, *six]
    assert (none.status, none.out, none.err) == (1, "", "there is no service -t 192.0.2.9:80\n")
    assert named.out.splitlines()[1] == "vip.example:http        2"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-P -t 192.0.2.1:80 -z 10.0.0.5", f"local address 10.0.0.5 is already there in {LISTED}"),
        ("-Q -t 192.0.2.1:80 -z 10.0.0.9", f"local address 10.0.0.9 is not there in {LISTED}"),
        ("-P -u 192.0.2.1:80 -z 10.0.0.9", "there is no service -u 192.0.2.1:80; `ipvsadm -A -u 192.0.2.1:80' comes"),
        ("-Q -f 4 -z 10.0.0.5", "there is no service -f 4\n"),
        ("-P -6 -f 4 -z 2001:db8::5", "there is no service -f 4 -6; `ipvsadm -A -f 4 -6' comes before"),
        ("-P -t 192.0.2.1:80 -z 0.0.0.0", "0.0.0.0 cannot be a local address: that is the unicast address of a host"),
        ("-P -t 192.0.2.1:80 -z 224.0.0.1", "224.0.0.1 cannot be a local address"),
        ("-P -t 192.0.2.1:80 -z 127.0.0.1", "127.0.0.1 cannot be a local address"),
        ("-P -t 192.0.2.1:80 -z 255.255.255.255", "255.255.255.255 cannot be a local address"),
        ("-P -t [2001:db8::1]:80 -z fe80::1", "fe80::1 cannot be a local address"),
        ("-P -t [2001:db8::1]:80 -z ::", ":: cannot be a local address"),
    ],
)
def test_a_refused_local_address_is_explained(lab: Lab, line: str, said: str) -> None:
    before = [SERVICE, "-P -t 192.0.2.1:80 -z 10.0.0.5", "-A -t [2001:db8::1]:80 -s rr"]
    step = lab.last(*before, line)
    assert step.status == 1
    assert step.err.startswith(said)
    assert step.err.count("\n") == 1


def test_an_error_that_nobody_thought_of_is_told_too(lab: Lab) -> None:
    step = lab.last(SERVICE, "-P -t 192.0.2.1:80 -z 10.0.0.5", refuse={"NEW_LADDR": errno.ENOMEM})
    assert step.status == 1
    assert step.err == "local address 10.0.0.5 of service -t 192.0.2.1:80: Memory allocation problem\n"


# --- a kernel without FULLNAT


@pytest.mark.parametrize(
    "line",
    [
        "-a -t 192.0.2.1:80 -r 10.1.0.9 -b",
        "-a -t 192.0.2.7:80 -r 10.1.0.9 -b",
        "-e -t 192.0.2.1:80 -r 10.1.0.2:8080 -b",
        "-P -t 192.0.2.1:80 -z 10.0.0.5",
        "-Q -t 192.0.2.1:80 -z 10.0.0.5",
        "-G",
        "-G -t 192.0.2.1:80",
        "-A -t 192.0.2.1:81 -V 90",
        "-A -t 192.0.2.1:81 -V 0",
        "-E -t 192.0.2.1:80 -V 90",
    ],
)
def test_a_kernel_without_fullnat_is_told_nothing(lab: Lab, line: str) -> None:
    *_, step, saved = lab.play(SERVICE, f"{REAL} -m", line, "-S -n", fullnat=False)
    assert step.status == 1
    assert re.fullmatch(r"FULLNAT is not in the running kernel \(\S+\): the command is not .*\n", step.err)
    assert step.out == ""
    assert not [name for name in step.sent if not name.startswith("GET_")], "asked before, and nothing sent after"
    assert saved.out.splitlines() == [SERVICE, f"{REAL} -m -w 1"]


def test_everything_else_works_on_a_kernel_without_fullnat(lab: Lab) -> None:
    rules = [f"{SERVICE} -p 300", f"{REAL} -m -w 3 -x 9", "-a -t 192.0.2.1:80 -r 10.1.0.3:80 -g -w 1"]
    assert lab.saved(*rules, fullnat=False) == rules
    step = lab.last(*rules, "-e -t 192.0.2.1:80 -r 10.1.0.3 -w 0", "-L -n", fullnat=False)
    assert "-> 10.1.0.3:80                  Route   0 " in step.out
    assert "est_timeout" not in step.out


def test_a_question_that_fails_is_no_yes(lab: Lab) -> None:
    for late in (False, True):
        step = lab.last(SERVICE, f"{REAL} -b", refuse={"GET_LADDR": errno.ENOMEM}, late=late)
        assert step.status == 1
        assert step.err.startswith("cannot find out whether FULLNAT is in the kernel: Memory allocation problem;")
        assert step.sent == ("GET_LADDR",)


def test_a_service_that_is_not_there_yet_is_a_yes(lab: Lab) -> None:
    for late in (False, True):
        assert lab.saved("-A -t 192.0.2.1:80 -s rr -V 90", late=late) == ["-A -t 192.0.2.1:80 -s rr -V 90"]


def test_what_fullnat_cannot_do_is_explained(lab: Lab) -> None:
    ops = "-A -u 192.0.2.1:53 -s rr -o"
    add = "-a -u 192.0.2.1:53 -r 10.1.0.2 -b"
    step = lab.last(ops, add)
    assert step.status == 1
    assert "FULLNAT does not go with one-packet scheduling, which service -u 192.0.2.1:53 has" in step.err
    assert "`ipvsadm -E -u 192.0.2.1:53 --no-ops'" in step.err
    assert len(lab.saved(ops, "-E -u 192.0.2.1:53 --no-ops", add)) == 2, "the advice helps"
    step = lab.last(ops, "-a -u 192.0.2.1:53 -r 10.1.0.2 -m", "-e -u 192.0.2.1:53 -r 10.1.0.2 -b")
    assert step.status == 1
    assert "FULLNAT does not go with one-packet scheduling" in step.err
    step = lab.last("-A -u 192.0.2.1:53 -s rr", add, "-E -u 192.0.2.1:53 -o")
    assert step.status == 1
    assert "one-packet scheduling does not go with the FULLNAT real servers of service -u 192.0.2.1:53" in step.err
    step = lab.last("-A --sctp-service 192.0.2.1:9 -s rr", "-a --sctp-service 192.0.2.1:9 -r 10.1.0.2 -b")
    assert step.status == 1
    assert step.err.startswith("FULLNAT is for TCP and UDP; the real servers of service --sctp-service 192.0.2.1:9")
    step = lab.last(SERVICE, f"{REAL} -b", refuse={"NEW_DEST": errno.EOPNOTSUPP})
    assert (step.status, step.err) == (1, "this kernel has FULLNAT, but not for service -t 192.0.2.1:80\n")


# --- SYNPROXY


def test_synproxy_is_saved_listed_and_kept(lab: Lab) -> None:
    on = f"{SERVICE} -j enable"
    assert lab.saved(on) == [on]
    assert lab.saved(f"{SERVICE} -j disable") == [SERVICE], "what is off is not spoken of"
    assert lab.saved(on, "-E -t 192.0.2.1:80 -p 300") == ["-A -t 192.0.2.1:80 -s rr -p 300 -j enable"]
    assert lab.saved(on, "-E -t 192.0.2.1:80 --synproxy disable") == [SERVICE]
    assert lab.saved(SERVICE, "-E -t 192.0.2.1:80 -j enable") == [on]
    assert "192.0.2.1:80 rr synproxy\n" in lab.last(on, "-L -n").out


@pytest.mark.parametrize("line", ["-A -t 192.0.2.1:81 -j enable", "-E -t 192.0.2.1:80 -j enable"])
def test_a_kernel_without_synproxy_is_told_nothing(lab: Lab, line: str) -> None:
    """It would take the flag and protect nothing."""
    *_, step, saved = lab.play(SERVICE, line, "-S -n", synproxy=False)
    assert step.status == 1
    assert re.fullmatch(r"SYNPROXY is not in the running kernel \(\S+\): the command is not .*\n", step.err)
    assert not [name for name in step.sent if not name.startswith("GET_")]
    assert saved.out.splitlines() == [SERVICE]
    assert lab.saved(f"{SERVICE} -j disable", synproxy=False) == [SERVICE]


def test_what_synproxy_cannot_do_is_explained(lab: Lab) -> None:
    on, direct = f"{SERVICE} -j enable", f"{REAL} -g"
    for line in (direct, direct.replace(" -g", " -i")):
        step = lab.last(on, line)
        assert step.status == 1
        assert "does not go with SYNPROXY, which service -t 192.0.2.1:80 has" in step.err
        assert "`ipvsadm -E -t 192.0.2.1:80 -j disable' ends it" in step.err
    assert len(lab.saved(on, "-E -t 192.0.2.1:80 -j disable", direct)) == 2, "the advice helps"
    step = lab.last(SERVICE, direct, "-E -t 192.0.2.1:80 -j enable")
    assert step.status == 1
    assert step.err.startswith("SYNPROXY does not go with the forwarding method Route, which real server 10.1.0.2 of")
    step = lab.last(on, "-a -t 192.0.2.1:80 -r 10.1.0.2:80 -b", "-e -t 192.0.2.1:80 -r 10.1.0.2:80 -g")
    assert step.status == 1
    assert "the forwarding method Route does not go with SYNPROXY" in step.err
