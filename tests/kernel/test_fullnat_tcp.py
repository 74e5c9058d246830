"""FULLNAT inside TCP's header: numbers, timestamps, SACK, MSS, and the reuse of a tuple. Most ends are made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.kernel import packets
from tests.kernel.lab import Namespace
from tests.kernel.machine import Failed, Guest
from tests.kernel.packets import NOPS, SACK_PERMITTED, mss, options, sack, timestamp
from tests.kernel.talk import USUAL, Bare, Conversation
from tests.kernel.topology import FAMILIES, Site

pytestmark = [pytest.mark.build, pytest.mark.guest]
M = 1 << 32
BULK = 300_000  # bytes
ROOM = {4: 8, 6: 20}  # what the option with the client's address takes
FLOOR = 88  # below it the MSS is not lowered (ipvs-sysctl.rst)


@dataclass
class Wired:
    """A service whose client and server are made by hand."""

    net: Site
    client: Bare
    server: Bare
    family: int

    def talk(self, **words: int | str) -> Conversation:
        return Conversation(self.client, self.server, self.family, **words)  # type: ignore[arg-type]


@pytest.fixture(params=FAMILIES)
def wired(request: pytest.FixtureRequest, site: Callable[..., Site]) -> Wired:
    """One service with one local address, of either family."""
    family: int = request.param
    net = site(clients=0, servers=0)
    client, server = Bare(net), Bare(net, back=True)
    net.balance(family, "-b", locals_=1, servers=[server.address(family)])
    return Wired(net, client, server, family)


def _one_port(net: Site, port: int = 5000) -> None:
    """Let every connection have the same local port."""
    net.director.ip_vs_sysctl("fullnat_lport_min", port)
    net.director.ip_vs_sysctl("fullnat_lport_max", port)


# --- numbers


def test_the_server_gets_another_isn(wired: Wired) -> None:
    talk = wired.talk()
    syn, _ = talk.open(isn=1000)
    assert talk.delta != 0
    assert (talk.inside.source, talk.inside.target) == (
        wired.net.local(wired.family),
        wired.server.address(wired.family),
    )
    assert syn.mss == 1460, "the client's MSS is passed on as it is"
    assert syn.window == 65535


def test_sequence_and_acknowledgement(wired: Wired) -> None:
    """Both directions, over the end of the numbers, where the borrow of a subtraction goes wrong."""
    for isn in (0, 1, 0x7FFFFFFF, 0xFFFFFFF0, 0xFFFFFFFF):
        talk = wired.talk()
        talk.open(isn=isn, server_isn=(-5) % M)
        data = b"q" * 40
        seen = talk.to_server("PA", seq=talk.here.seq, ack=talk.here.ack, data=data)
        assert (seen.seq, seen.ack, seen.payload) == ((talk.here.seq + talk.delta) % M, talk.here.ack % M, data)
        back = talk.to_client("PA", seq=talk.there.seq, ack=(seen.seq + 40) % M, data=b"r" * 40)
        assert (back.seq, back.ack, back.payload) == (talk.there.seq % M, (talk.here.seq + 40) % M, b"r" * 40)


def test_segments_out_of_order_keep_their_places(wired: Wired) -> None:
    talk = wired.talk()
    talk.open()
    for offset in (2000, 0, 1000, 1000, 70000):
        seen = talk.to_server("A", seq=talk.here.seq + offset, ack=talk.here.ack, data=b"x")
        assert (seen.seq - talk.there.ack) % M == offset


def test_resets_are_translated(wired: Wired) -> None:
    """A reset counts only when its number is right (RFC 5961); an RST to a refused SYN has only an acknowledgement."""
    talk = wired.talk()
    talk.open()
    assert talk.to_server("R", seq=talk.here.seq).seq == talk.there.ack % M
    other = wired.talk()
    syn = other.to_server("S", seq=77, option=USUAL)
    refused = other.to_client("RA", seq=0, ack=syn.seq + 1)
    assert (refused.seq, refused.ack) == (0, 78)


def test_a_segment_without_ack_keeps_its_zero(wired: Wired) -> None:
    """Where the flag is off the field means nothing: a scrubber would drop what is not 0 there."""
    talk = wired.talk()
    talk.open()
    assert talk.to_client("R", seq=talk.there.seq, ack=0).ack == 0


def test_sack_at_every_alignment(wired: Wired) -> None:
    """From the server they are about the client's numbers: translated. From the client about the server's: as they are.

    `Wire.expect` verifies the checksum of every packet; an option at an odd place is where increments go wrong.
    """
    talk = wired.talk()
    talk.open(isn=0xFFFFF000)
    talk.greet()
    for before, blocks in ((n, m) for n in range(4) for m in range(1, 5) if n + 2 + 8 * m <= 40):
        given = [(talk.there.ack + 1000 * n, talk.there.ack + 1000 * n + 500) for n in range(1, blocks + 1)]
        option = options(NOPS * before, sack(*given))
        back = talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack, option=option)
        wanted = [((talk.here.seq + 1000 * n) % M, (talk.here.seq + 1000 * n + 500) % M) for n in range(1, blocks + 1)]
        assert back.sacks == wanted, f"{blocks} blocks after {before} NOPs"
        assert len(back.option_bytes) == len(option)
        own = [(talk.here.ack + 1000 * n, talk.here.ack + 1000 * n + 500) for n in range(1, blocks + 1)]
        option = options(NOPS * before, sack(*own))
        seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, option=option)
        assert seen.option_bytes == option, f"{blocks} blocks after {before} NOPs"


BROKEN = (
    bytes([packets.SACK, 0]) + b"\1\1",
    bytes([packets.SACK, 1]) + b"\1\1",
    bytes([packets.SACK, 34]) + b"\1\1",
    bytes([packets.TIMESTAMP, 3, 0]) + b"\1",
    bytes([packets.TIMESTAMP]) + b"\1\1\1",
    b"\1\1\1" + bytes([packets.SACK]),
    bytes([packets.MSS, 255, 0, 0]),
    bytes([252, 4, 1, 2]),
    bytes([34, 10]) + b"cookies!" + b"\1\1",
)


def test_broken_and_unknown_options_pass_unread(wired: Wired) -> None:
    """Nothing beyond the header is read or written for them; the rest of the segment is translated as ever."""
    talk = wired.talk()
    talk.open()
    talk.greet()
    for option in BROKEN:
        seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, option=option, data=b"payload")
        assert (seen.seq, seen.option_bytes, seen.payload) == (talk.there.ack % M, option, b"payload"), option.hex()
        back = talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack, option=option, data=b"payload")
        assert (back.ack, back.option_bytes, back.payload) == (talk.here.seq % M, option, b"payload"), option.hex()


def test_a_sack_of_half_a_block_spoils_nothing_else(wired: Wired) -> None:
    """Receivers ignore it, so what becomes of it is of no consequence; what follows it is."""
    talk = wired.talk()
    talk.open()
    option = bytes([packets.SACK, 9]) + b"\1" * 7 + NOPS * 3
    back = talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack, option=option, data=b"payload")
    assert (back.ack, back.option_bytes[9:], back.payload) == (talk.here.seq % M, NOPS * 3, b"payload")


# --- MSS


def test_the_servers_mss_is_lowered(wired: Wired) -> None:
    for announced in (536, 1220, 1440, 1460, 8960):
        _, synack = wired.talk().open(server_option=options(mss(announced), SACK_PERMITTED))
        assert synack.mss == announced - ROOM[wired.family]


def test_the_mss_has_a_floor(wired: Wired) -> None:
    """Never raised, never below the floor by our doing, never beyond 0."""
    for announced in (0, 1, 7, 8, 19, 20, FLOOR - 1, FLOOR, FLOOR + 7, FLOOR + 8, FLOOR + 20):
        _, synack = wired.talk().open(server_option=options(mss(announced)))
        lowered = announced - ROOM[wired.family]
        assert synack.mss == (lowered if lowered >= FLOOR else min(announced, FLOOR)), announced


def test_the_mss_at_every_alignment(wired: Wired) -> None:
    for before in range(4):
        _, synack = wired.talk().open(server_option=options(NOPS * before, mss(1460), NOPS))
        assert synack.mss == 1460 - ROOM[wired.family], f"after {before} NOPs"


def test_the_mss_is_left_alone_if_so_told(wired: Wired) -> None:
    wired.net.director.ip_vs_sysctl("fullnat_mss_adjust_entry", 0)
    _, synack = wired.talk().open(server_option=options(mss(1460)))
    assert synack.mss == 1460


def test_a_synack_without_mss(wired: Wired) -> None:
    _, synack = wired.talk().open(server_option=b"")
    assert synack.option_bytes == b""


# --- timestamps


def test_timestamps_are_translated_and_echoed(wired: Wired) -> None:
    """What the server sees grows with the client's clock; what the client gets back is its own value."""
    talk = wired.talk()
    syn, synack = talk.open(
        option=options(mss(1460), timestamp(777_000, 0)), server_option=options(mss(1460), timestamp(4242, 0))
    )
    assert syn.timestamps is not None
    first, echo = syn.timestamps
    assert echo == 0, "a SYN echoes nothing"
    assert synack.timestamps == (4242, synack.timestamps[1]) if synack.timestamps else False
    for later in (0, 1, 1000, 5_000_000):
        seen = talk.to_server(
            "A", seq=talk.here.seq, ack=talk.here.ack, option=options(NOPS * 2, timestamp(777_000 + later, 4242))
        )
        assert seen.timestamps == ((first + later) % M, 4242)
        back = talk.to_client(
            "A",
            seq=talk.there.seq,
            ack=talk.there.ack,
            option=options(NOPS * 2, timestamp(4243 + later, (first + later) % M)),
        )
        assert back.timestamps == (4243 + later, 777_000 + later)


def test_timestamps_at_every_alignment_over_the_end_of_the_numbers(wired: Wired) -> None:
    for before in range(4):
        talk = wired.talk()
        syn, _ = talk.open(
            option=options(NOPS * before, timestamp(M - 1, 0)),
            server_option=options(NOPS * before, timestamp(9, M - 1)),
        )
        assert syn.timestamps
        option = options(NOPS * before, timestamp(3, 9))
        seen = talk.to_server("A", seq=talk.here.seq, ack=talk.here.ack, option=option)
        assert seen.timestamps == ((syn.timestamps[0] + 4) % M, 9), f"after {before} NOPs"


def test_sack_and_timestamps_together(wired: Wired) -> None:
    """The usual header of a loss: timestamps, then three blocks."""
    talk = wired.talk()
    syn, _ = talk.open(option=options(mss(1460), timestamp(50, 0)), server_option=options(mss(1460), timestamp(1, 50)))
    assert syn.timestamps
    given = [(talk.there.ack + n, talk.there.ack + n + 1) for n in (10, 20, 30)]
    option = options(NOPS * 2, timestamp(2, syn.timestamps[0]), NOPS * 2, sack(*given))
    back = talk.to_client("A", seq=talk.there.seq, ack=talk.there.ack, option=option)
    assert back.timestamps == (2, 50)
    assert back.sacks == [(talk.here.seq + n, talk.here.seq + n + 1) for n in (10, 20, 30)]


def test_timestamps_can_be_removed_instead(wired: Wired) -> None:
    """As the original did: of the SYN only, so that both ends do without them."""
    wired.net.director.ip_vs_sysctl("fullnat_timestamp_remove_entry", 1)
    syn, _ = wired.talk().open(option=options(mss(1460), timestamp(777, 0), NOPS, SACK_PERMITTED, NOPS))
    assert syn.timestamps is None
    assert syn.mss == 1460
    assert packets.SACK_OK in syn.options
    assert len(syn.option_bytes) == 20, "removed by NOPs, the header keeps its length"


# --- a tuple that is used again


def test_the_isn_grows_over_the_reuse_of_a_tuple(wired: Wired) -> None:
    """One local port for all: whatever the clients' numbers are, the server sees them grow, and clocks as well."""
    _one_port(wired.net)
    wired.net.director.ipvsadm("--set", "900", "1", "300")
    end, clock = None, None
    for isn, ticks in ((4_000_000_000, 900_000), (5, 10), (2_000_000_000, 4_000_000_000), (1, 1)):
        talk = wired.talk()
        syn, _ = talk.open(isn=isn, option=options(mss(1460), timestamp(ticks, 0)))
        assert syn.timestamps
        if end is not None and clock is not None:
            assert 0 < (syn.seq - end) % M < 1 << 31, "the server would take the SYN for an old segment"
            assert 0 <= (syn.timestamps[0] - clock) % M < 1 << 31, "PAWS would drop the SYN"
        seen = talk.to_server(
            "A",
            seq=talk.here.seq,
            ack=talk.here.ack,
            data=b"x" * 100,
            option=options(NOPS * 2, timestamp(ticks + 7, 1)),
        )
        assert seen.timestamps
        end, clock = (seen.seq + 100 + 1) % M, seen.timestamps[0]
        talk.to_client("FA", seq=talk.there.seq, ack=(seen.seq + 100) % M)
        # FIN_WAIT is the only state whose end can be hastened (ipvsadm --set): the entry goes, its port is free.
        wired.net.director.wait_until(lambda: not wired.net.director.connections(), "an empty table")


def test_the_same_client_port_again(wired: Wired) -> None:
    """The client reuses its port while the director still holds the closed entry: a new connection with new numbers."""
    talk = wired.talk(cport=4000)
    first, _ = talk.open(isn=3_000_000_000)
    talk.close()
    again = wired.talk(cport=4000)
    second = again.to_server("S", seq=7, option=USUAL)
    if again.inside == talk.inside:
        assert 0 < (second.seq - first.seq) % M < 1 << 31
    again.answer("SA", seq=99, ack=second.seq + 1, option=USUAL)
    assert again.client_hears("SA").ack == 8


# How a conversation gets into each state in which another SYN may find its entry, and whether that is its end. LAST_ACK
# is for directors that see one direction only; here a FIN of each side is TIME_WAIT, in either order.
STATES = (
    ("estab", (), False),
    ("finwait", ("server FA",), False),
    ("closewait", ("client FA",), False),
    ("timewait", ("client FA", "server FA"), True),
    ("timewait", ("server FA", "client FA"), True),
    ("close", ("client R",), True),
)


@pytest.mark.parametrize("renew", [1, 0], ids=["new-numbers", "old-numbers"])
def test_a_syn_in_every_state(wired: Wired, renew: int) -> None:
    """New numbers only where both ends have closed, and only if so told; each is counted under its state."""
    director = wired.net.director
    director.ip_vs_sysctl("conn_reuse_mode", 0)  # else such an entry is dropped and its client scheduled anew
    director.ip_vs_sysctl("fullnat_conn_reused_entry", renew)
    for state, steps, ended in STATES:
        talk = wired.talk()
        talk.open(isn=3_000_000_000)
        for step in steps:
            side, flags = step.split()
            if side == "client":
                talk.to_server(flags, seq=talk.here.seq, ack=talk.here.ack)
            else:
                talk.to_client(flags, seq=talk.there.seq, ack=talk.there.ack)
        before = director.ext_stats()
        again = talk.to_server("S", seq=9, option=USUAL)
        new = (again.seq - 9) % M != talk.delta
        assert new == (ended and bool(renew)), state
        if new:
            assert 0 < (again.seq - talk.there.ack) % M < 1 << 31, "the server would take it for an old segment"
        grown = {name for name, count in director.ext_stats().items() if count > before[name]}
        assert grown == {f"fullnat_conn_reused_{state}", *(["fullnat_conn_reused"] if ended else [])}


def test_a_repeated_syn_keeps_its_numbers(wired: Wired) -> None:
    """A lost SYN-ACK must not make two connections of one."""
    talk = wired.talk()
    first = talk.to_server("S", seq=1000, option=options(mss(1460), timestamp(5, 0)))
    for ticks in (5, 1005, 3005):
        again = talk.to_server("S", seq=1000, option=options(mss(1460), timestamp(ticks, 0)))
        assert again.seq == first.seq
        assert again.timestamps and first.timestamps
        assert again.timestamps[0] - first.timestamps[0] == ticks - 5
    assert talk.to_client("SA", seq=1, ack=first.seq + 1, option=USUAL).ack == 1001


def test_a_repeated_syn_after_the_synack(wired: Wired) -> None:
    talk = wired.talk()
    first = talk.to_server("S", seq=1000, option=USUAL)
    talk.to_client("SA", seq=1, ack=first.seq + 1, option=USUAL)
    assert talk.to_server("S", seq=1000, option=USUAL).seq == first.seq


def test_what_has_no_connection_is_not_translated(wired: Wired) -> None:
    """An ACK out of nowhere, and something for a local address that nobody asked for."""
    talk = wired.talk()
    talk.say("A", seq=5, ack=6)
    with pytest.raises(Failed, match="not within"):
        talk.server_hears("A", 0.2)
    stray = packets.Ends(wired.server.address(wired.family), 80, wired.net.local(wired.family), 6000)
    wired.server.send(packets.tcp(stray, "A", seq=1, ack=2))
    # The director's own stack may well refuse both.
    wired.client.wire.silence(
        lambda p: p.protocol == packets.TCP and "R" not in p.flags, "a stray segment at the client", 0.1
    )


# --- real stacks


@pytest.fixture
def one_processor(guest: Guest) -> Iterator[None]:
    """What starts in the machine stays on one processor: packets go through one queue, where none overtakes another."""
    guest.run("taskset", "-p", "1", "1")
    yield
    guest.run("taskset", "-p", "ffff", "1")


@pytest.mark.usefixtures("one_processor")
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_repaired_by_sack(site: Callable[..., Site], family: int, up: bool) -> None:
    """A sender believes only blocks of what it sent: the loss is repaired by them, and none is thrown away."""
    net = site(servers=1)
    net.serve(size=BULK)
    net.balance(family, "-b", locals_=1)
    client, server = net.clients[0], net.servers[0]
    sender, receiver = (client, server) if up else (server, client)
    sender.offload("eth0", tso=False, gso=False)  # a loss is one of segments
    port = "dport 80" if up else "sport 80"
    receiver.nft(f"""
        table inet lossy {{
        chain input {{
        type filter hook input priority filter;
        tcp {port} meta length > 1000 numgen inc mod 40 == 20 drop;
        }}
        }}""")
    if up:
        client.call(
            "servers:http_post", address=net.vip(family), port=80, size=BULK, patience=20 * net.lab.guest.scale,
            seconds=25,
        )  # fmt: skip
    else:
        assert len(client.get(net.vip(family), "/bulk")[0]) == BULK
    seen = _counters(sender)
    wrong = {name: seen[name] for name in ("TCPSACKDiscard", "TCPSackFailures", "PAWSEstab") if seen[name]}
    assert not wrong
    assert seen["TCPSackRecovery"] >= 2, "no loss was repaired by SACK"
    assert _counters(receiver)["PAWSEstab"] == 0


def _counters(host: Namespace) -> dict[str, int]:
    """What a host's TCP has counted."""
    names, values = [line.split()[1:] for line in host.read("/proc/net/netstat").splitlines()[:2]]
    return dict(zip(names, map(int, values), strict=True))
