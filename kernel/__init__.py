"""The kernels: one common configuration and tree, a flavour for each role."""
