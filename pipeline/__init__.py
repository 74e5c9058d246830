"""The engine that every room shares: processes, progress, errors, sources, patches, the store, RPMs, machines.

It knows nothing of load balancers.
"""
