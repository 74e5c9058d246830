// SPDX-License-Identifier: GPL-2.0-only
/*
 * TOA without a module: shows to programs the client that a load balancer names in a TCP option.
 *
 * sockops reads the option where a connection is established, and in later segments while none has come; a socket's
 * storage keeps it; the hooks for getpeername(), through which accept() passes as well, answer with it. What it means
 * and how it differs from the module: toa-bpf(8).
 */

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "toa-bpf.h"

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOL_TCP 6
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#define TCP_TOA_CARRIER 254
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define HEADER 20	/* of TCP without options */
#define OPTIONS 40	/* at most */

char LICENSE[] SEC("license") = "GPL";

/* Of the kernel's types only what is read, found by name when the programs are loaded. */
struct sock {
	__u8 sk_kern_sock : 1;
} __attribute__((preserve_access_index));

struct mptcp_sock {
} __attribute__((preserve_access_index));

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct toa_client);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} toa_clients SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, TOA_PREFIXES);
	__uint(key_size, 8);
	__uint(value_size, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} toa_trusted4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, TOA_PREFIXES);
	__uint(key_size, sizeof(struct toa_prefix)); /* and no __type(): a trie has no BTF, which libbpf would warn of */
	__uint(value_size, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} toa_trusted6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct toa_kinds);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} toa_kinds SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, TOA_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} toa_stats SEC(".maps");

static __always_inline void count(__u32 what)
{
	__u64 *value = bpf_map_lookup_elem(&toa_stats, &what);

	if (value)
		(*value)++;
}

static __always_inline int is_mapped(const __be32 *addr)
{
	return !addr[0] && !addr[1] && addr[2] == bpf_htonl(0xffff);
}

/* --- segments */

static __always_inline int is_trusted(struct bpf_sock_ops *ctx)
{
	struct toa_prefix peer = {};

	if (ctx->family == AF_INET6) {
		peer.addr[0] = ctx->remote_ip6[0];
		peer.addr[1] = ctx->remote_ip6[1];
		peer.addr[2] = ctx->remote_ip6[2];
		peer.addr[3] = ctx->remote_ip6[3];
		if (!is_mapped(peer.addr)) {
			peer.len = 128;
			return bpf_map_lookup_elem(&toa_trusted6, &peer) != NULL;
		}
		peer.addr[0] = peer.addr[3];
	} else {
		peer.addr[0] = ctx->remote_ip4;
	}
	peer.len = 32;
	return bpf_map_lookup_elem(&toa_trusted4, &peer) != NULL;
}

/* Fill in the client; is it an address that a client can have, as the module sees it? */
static __always_inline int read_client(const __u8 *option, __u32 length, const __u8 *end, struct toa_client *client)
{
	__be32 addr[4] = {};
	__u8 first;

	if (length == 8) {
		if (option + 8 > end)
			return 0;
		__builtin_memcpy(addr, option + 4, 4);
		first = option[4];
	} else {
		if (option + 20 > end)
			return 0;
		__builtin_memcpy(addr, option + 4, 16);
		if (!is_mapped(addr)) {
			/* No :: and no ::1 */
			if (option[4] == 0xff || !(addr[0] | addr[1] | addr[2] | (addr[3] & bpf_htonl(~1))))
				return 0;
			client->family = AF_INET6;
			goto found;
		}
		first = option[16];
		addr[0] = addr[3];
		addr[1] = addr[2] = addr[3] = 0;
	}
	/* Programs let in whom they take for their own host. */
	if (!addr[0] || first == 127 || (first & 0xf0) == 0xe0 || addr[0] == bpf_htonl(0xffffffff))
		return 0;
	client->family = AF_INET;
found:
	__builtin_memcpy(&client->port, option + 2, 2);
	__builtin_memcpy(client->addr, addr, sizeof(addr));
	return 1;
}

/* Where the first option is that names a client, or 0 */
static __always_inline __u32 locate(const __u8 *data, const __u8 *end, const struct toa_kinds *kinds)
{
	struct toa_client client;
	__u32 at = HEADER;

	for (int n = 0; n < OPTIONS; n++) {
		const __u8 *option;
		__u32 length = 1;

		/*
		 * It is no more than that anyway. Said in this way the verifier knows the same of it in every round, where
		 * it would else follow each way that options can add up.
		 */
		asm volatile("%0 &= 63" : "+r"(at));
		option = data + at;
		if (option + 1 > end || option[0] == 0)
			return 0;
		if (option[0] != 1) {
			if (option + 2 > end || option[1] < 2)
				return 0;
			length = option[1];
			if ((length == 8 || length == 20) && kinds->bits[option[0] / 8] & 1 << option[0] % 8 &&
			    read_client(option, length, end, &client))
				return at;
		}
		at += length;
		if (at > HEADER + OPTIONS)
			return 0;
	}
	return 0;
}

/*
 * The client that the segment names. bpf_load_hdr_opt() would insist on a magic number behind kind 253 and 254.
 *
 * To the verifier every way out of the loop is one through all that follows, unless they are alike: so what comes out is a
 * place, and what is there is read afterwards. And this is called once, as each call is a loop of its own.
 */
static __always_inline int find(struct bpf_sock_ops *ctx, struct toa_client *client)
{
	const __u8 *data = ctx->skb_data, *end = ctx->skb_data_end, *option;
	struct toa_kinds *kinds;
	__u32 zero = 0, at;

	/* On a SYN, which begins a connection with Fast Open, the kinds have another meaning. */
	kinds = ctx->skb_tcp_flags & TCP_SYN ? NULL : bpf_map_lookup_elem(&toa_kinds, &zero);
	if (!kinds)
		return 0;
	at = locate(data, end, kinds);
	asm volatile("%0 &= 63" : "+r"(at));
	if (!at)
		return 0;
	option = data + at;
	return option + 2 <= end && read_client(option, option[1], end, client);
}

/* What is kept for a socket: if nothing is, this client, which others see whole from the beginning. */
static __always_inline struct toa_client *keep(void *sk, struct toa_client *client)
{
	return bpf_sk_storage_get(&toa_clients, sk, client, BPF_SK_STORAGE_GET_F_CREATE);
}

/* Keep the client of a socket, and of the one that programs have if it is a subflow of MPTCP. */
static __always_inline int name(struct bpf_sock *sk, struct toa_client *client)
{
	struct toa_client *kept;

	/*
	 * Kernels before 5.19 do not have it. Those without MPTCP have it and an empty type, for which they refuse to keep
	 * anything. To both what follows is dead code.
	 */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_skc_to_mptcp_sock) &&
	    bpf_core_type_size(struct mptcp_sock) > 0) {
		struct mptcp_sock *msk = bpf_skc_to_mptcp_sock(sk);

		/*
		 * First, as it is the one that counts: where it cannot be kept, the subflow stays nameless, too, and its next
		 * option is tried. It is not locked. What is kept, as a subflow that joins finds it, is not written again.
		 */
		if (msk && !keep(msk, client)) {
			count(TOA_NO_MEMORY);
			return 0;
		}
	}
	kept = keep(sk, client);
	if (!kept) {
		count(TOA_NO_MEMORY);
		return 0;
	}
	/* Where it was kept as nameless. Whoever reads it has to lock the socket, which is locked now. */
	client->watched = kept->watched;
	*kept = *client;
	return 1;
}

/* A socket has one flag for all programs: who asked for the segments before us goes on getting them after us. */
static __always_inline void watch(struct bpf_sock_ops *ctx, struct toa_client *kept)
{
	__u32 flags = ctx->bpf_sock_ops_cb_flags;

	if (flags & BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG)
		return;
	bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
	kept->watched = 1;
}

static __always_inline void unwatch(struct bpf_sock_ops *ctx, struct toa_client *kept)
{
	if (!kept->watched)
		return;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
	kept->watched = 0;
}

/*
 * With Fast Open the kernel shows the SYN here, and never the segment that ends the handshake: the next one with an option
 * names the client.
 */
static __always_inline void on_established(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct toa_client *client)
{
	struct toa_client nobody = {}, *kept;

	if (!is_trusted(ctx)) {
		if (client->family)
			count(TOA_UNTRUSTED);
		count(TOA_CHILD_NONE);
		return;
	}
	if (client->family && name(sk, client)) {
		count(TOA_CHILD);
		return;
	}
	count(TOA_CHILD_NONE);
	kept = keep(sk, &nobody);
	if (kept)
		watch(ctx, kept);
	else if (!client->family) /* else name() has counted it */
		count(TOA_NO_MEMORY);
}

static __always_inline void on_segment(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct toa_client *client,
				       struct toa_client *kept)
{
	if (client->family && is_trusted(ctx) && name(sk, client)) {
		count(TOA_LATER);
		unwatch(ctx, kept);
	}
}

/* An accepted socket was disconnected and gets another peer. For others that connect nothing is kept. */
static __always_inline void on_connect(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct toa_client *kept = sk ? bpf_sk_storage_get(&toa_clients, sk, NULL, 0) : NULL;

	if (kept) {
		unwatch(ctx, kept);
		bpf_sk_storage_delete(&toa_clients, sk);
	}
}

/* Other programs may have asked for the segments of any socket; of ours it must be accepted and nameless. */
static __always_inline struct toa_client *nameless(struct bpf_sock *sk)
{
	struct toa_client *kept = sk ? bpf_sk_storage_get(&toa_clients, sk, NULL, 0) : NULL;

	return kept && !kept->family ? kept : NULL;
}

SEC("sockops")
int toa_sockops(struct bpf_sock_ops *ctx)
{
	struct toa_client client = {}, *kept;
	struct bpf_sock *sk;

	switch (ctx->op) {
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		break;
	case BPF_SOCK_OPS_PARSE_HDR_OPT_CB:
		if (ctx->skb_tcp_flags & TCP_RST || !nameless(ctx->sk))
			return 1;
		break;
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_connect(ctx);
		return 1;
	default:
		return 1;
	}
	find(ctx, &client);
	sk = ctx->sk;
	if (!sk)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		on_established(ctx, sk, &client);
		return 1;
	}
	kept = nameless(sk);
	if (kept)
		on_segment(ctx, sk, &client, kept);
	return 1;
}

/* --- names */

static __always_inline int is_the_kernels(struct bpf_sock *sk)
{
	struct sock *kernel = (void *)bpf_skc_to_tcp_sock(sk);

	return kernel && BPF_CORE_READ_BITFIELD(kernel, sk_kern_sock);
}

static __always_inline struct toa_client *client_of(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct toa_client *client;

	/* UDP and others pass here, too. */
	if (!sk || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_MPTCP))
		return NULL;
	client = bpf_sk_storage_get(&toa_clients, sk, NULL, 0);
	if (!client || !client->family) {
		count(TOA_NAME_EMPTY);
		return NULL;
	}
	if (is_the_kernels(sk)) {
		count(TOA_NAME_BYPASS);
		return NULL;
	}
	return client;
}

SEC("cgroup/getpeername4")
int toa_getpeername4(struct bpf_sock_addr *ctx)
{
	struct toa_client *client = client_of(ctx);

	if (!client)
		return 1;
	if (client->family != AF_INET) {
		count(TOA_NAME_MISMATCH);
		return 1;
	}
	ctx->user_ip4 = client->addr[0];
	ctx->user_port = client->port;
	count(TOA_NAME_OK);
	return 1;
}

SEC("cgroup/getpeername6")
int toa_getpeername6(struct bpf_sock_addr *ctx)
{
	struct toa_client *client = client_of(ctx);

	if (!client)
		return 1;
	if (client->family == AF_INET) {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = bpf_htonl(0xffff);
		ctx->user_ip6[3] = client->addr[0];
	} else {
		ctx->user_ip6[0] = client->addr[0];
		ctx->user_ip6[1] = client->addr[1];
		ctx->user_ip6[2] = client->addr[2];
		ctx->user_ip6[3] = client->addr[3];
	}
	ctx->user_port = client->port;
	count(TOA_NAME_OK);
	return 1;
}

/* --- who carries the connection */

SEC("cgroup/getsockopt")
int toa_getsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	__u8 *to = ctx->optval, *end = ctx->optval_end;
	union {
		__u8 bytes[sizeof(struct sockaddr_in6)];
		struct sockaddr_in in;
		struct sockaddr_in6 in6;
	} name = {};
	int size, n;

	if (ctx->level != SOL_TCP || ctx->optname != TCP_TOA_CARRIER || !ctx->retval)
		goto not_ours;
	/* A raw socket can be of TCP's protocol, too. */
	if (!sk || sk->type != SOCK_STREAM || (sk->protocol != IPPROTO_TCP && sk->protocol != IPPROTO_MPTCP))
		goto not_ours;
	/* What is not connected yet, or not any more, has the port of a peer as well. */
	if (!sk->dst_port || sk->state == BPF_TCP_CLOSE || sk->state == BPF_TCP_SYN_SENT)
		goto not_ours;
	if (sk->family == AF_INET6) {
		size = sizeof(name.in6);
		name.in6.sin6_family = AF_INET6;
		name.in6.sin6_port = sk->dst_port;
		name.in6.sin6_addr.s6_addr32[0] = sk->dst_ip6[0];
		name.in6.sin6_addr.s6_addr32[1] = sk->dst_ip6[1];
		name.in6.sin6_addr.s6_addr32[2] = sk->dst_ip6[2];
		name.in6.sin6_addr.s6_addr32[3] = sk->dst_ip6[3];
		/* fe80::/10 is on every device. */
		if ((sk->dst_ip6[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
			name.in6.sin6_scope_id = sk->bound_dev_if;
	} else {
		size = sizeof(name.in);
		name.in.sin_family = AF_INET;
		name.in.sin_port = sk->dst_port;
		name.in.sin_addr.s_addr = sk->dst_ip4;
	}
	/* Byte for byte, because the caller's buffer may end anywhere. */
	for (n = 0; n < size && to + n + 1 <= end; n++)
		to[n] = name.bytes[n];
	ctx->optlen = n;
	ctx->retval = 0;
	return 1;

not_ours:
	/*
	 * At 0 nothing is copied to the caller, and the kernel's own answer counts. Where that is an error, kernels before 5.18
	 * would else copy zeros over the buffer, and over the length that some errors answer. And an answer can be longer than
	 * the buffer, or than the page of it that is seen here, which to the kernel is an error of ours.
	 */
	if (ctx->retval || ctx->optlen > end - to)
		ctx->optlen = 0;
	return 1;
}
