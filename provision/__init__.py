"""Per-host identity: host files rendered to files and cloud-init seeds."""
