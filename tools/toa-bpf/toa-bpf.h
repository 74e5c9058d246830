/* SPDX-License-Identifier: GPL-2.0-only */
/* What the programs in the kernel and the loader agree about. */
#ifndef TOA_BPF_H
#define TOA_BPF_H

#define TOA_PREFIXES 64

/* A client, in the storage of a socket. */
struct toa_client {
	__u8 family;	/* AF_INET, AF_INET6; 0: a later segment may name it */
	__u8 watched;	/* it was us who asked for the socket's segments */
	__be16 port;
	__be32 addr[4];
};

/* A trusted prefix: the key of the tries. */
struct toa_prefix {
	__u32 len;
	__be32 addr[4];	/* of IPv4 only the first */
};

/* Kinds of option that name a client, a bit for each */
struct toa_kinds {
	__u8 bits[32];
};

enum {
	TOA_CHILD,
	TOA_CHILD_NONE,
	TOA_LATER,
	TOA_UNTRUSTED,
	TOA_NO_MEMORY,
	TOA_NAME_OK,
	TOA_NAME_MISMATCH,
	TOA_NAME_BYPASS,
	TOA_NAME_EMPTY,
	TOA_COUNTERS
};

#endif
