"""The operations manual's environment checks (1j) of hosts that run, by testinfra."""
