"""The tools' packages: ipvsadm, keepalived, and the routing daemons."""
