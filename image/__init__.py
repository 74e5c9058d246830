"""The images: a root file system becomes a disk, Packer seals it, checks prove it."""
