"""What must be true of a running image; by testinfra over ssh, on an overlay that is thrown away."""
