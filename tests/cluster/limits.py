"""How long what happens may take: by the cluster's configuration, and what is added for machines that are emulated."""

from __future__ import annotations

from tests.cluster.conftest import Cluster

# What this side needs to see something that has happened there: an answer over ssh from an emulated machine, under KVM.
SEEING = 0.75
# What a daemon needs to start, until systemd counts it as active, under KVM; measured: zebra, 3 s at a scale of 21.
STARTING = 0.2


def slack(cluster: Cluster) -> float:
    """Seconds that a limit of the protocols is exceeded by because machines are emulated and asked over ssh."""
    return cluster.lab.seconds(SEEING)


def starting(cluster: Cluster) -> float:
    """Seconds that a daemon may need to start on an emulated machine."""
    return cluster.lab.seconds(STARTING)


def allowed(cluster: Cluster, limit: float) -> str:
    """A limit of the protocols in seconds, and what a story allows beyond, for the table."""
    return f"{limit:.3g} + {slack(cluster):.3g}"


def check_seconds(cluster: Cluster, name: str) -> float:
    """How long a service's health check may take to find a real server dead: a round, and every try's time-out."""
    service = next(each for each in cluster.data["services"] if each["name"] == name)
    (check,) = service["check"].values()
    retries = check["retries"]
    return float(
        service["delay_loop"] + (retries + 1) * check["connect_timeout"] + retries * check["delay_before_retry"]
    )


def takeover_seconds(cluster: Cluster) -> float:
    """How long the others may take to find a director dead, by the protocol that tells them."""
    if cluster.mode == "ospf":
        return float(cluster.data["ospf"]["dead_interval"])
    instance = cluster.data["vrrp"]["instances"][0]
    # RFC 3768, 6.1: three advertisements, and the skew of the one with the lowest priority
    lowest = min(int(each["priority"]) for each in cluster.data["directors"])
    return 3.0 * float(instance.get("advert_int", 1)) + (256 - lowest) / 256


def return_seconds(cluster: Cluster) -> float:
    """How long a director may take to have its traffic again, once nothing is broken."""
    # Its health checks find real servers: a page after a round, and again after another, or after a failed one's pause.
    checks = [(each["delay_loop"], *each["check"].values()) for each in cluster.data["services"]]
    found = float(max(c["connect_timeout"] + max(loop, c["delay_before_retry"]) + loop for loop, c in checks))
    if cluster.mode == "ospf":
        return found + float(cluster.data["ospf"]["hello_interval"] + cluster.data["ospf"]["dead_interval"])
    return found + 1 + takeover_seconds(cluster)
