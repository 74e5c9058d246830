/* Loaded before libc: a generic netlink socket becomes a Unix socket, at whose other end stand_in.py plays the kernel;
 * and whether it has SYNPROXY is for the test to say. Everything else is left alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/netlink.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LIMIT 1024
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static struct sockaddr_nl bound[LIMIT]; /* family 0: none of ours */

static int is_ours(int fd)
{
	return fd >= 0 && fd < LIMIT && bound[fd].nl_family;
}

int access(const char *path, int mode)
{
	if (strncmp(path, "/proc/sys/net/ipv4/vs/synproxy_", 31))
		return REAL(access)(path, mode);
	errno = ENOENT;
	return getenv("STAND_IN_SYNPROXY") ? 0 : -1;
}

int socket(int domain, int type, int protocol)
{
	struct sockaddr_un there = { .sun_family = AF_UNIX };
	int fd;

	if (domain != AF_NETLINK || protocol != NETLINK_GENERIC)
		return REAL(socket)(domain, type, protocol);
	fd = REAL(socket)(AF_UNIX, SOCK_SEQPACKET | (type & SOCK_CLOEXEC), 0);
	strncpy(there.sun_path, getenv("STAND_IN"), sizeof(there.sun_path) - 1);
	if (fd < 0 || fd >= LIMIT || connect(fd, (struct sockaddr *)&there, sizeof(there)))
		abort();
	bound[fd].nl_family = AF_NETLINK;
	return fd;
}

int bind(int fd, const struct sockaddr *addr, socklen_t len)
{
	if (!is_ours(fd))
		return REAL(bind)(fd, addr, len);
	memcpy(&bound[fd], addr, sizeof(bound[fd]));
	return 0;
}

int getsockname(int fd, struct sockaddr *addr, socklen_t *len)
{
	if (!is_ours(fd))
		return REAL(getsockname)(fd, addr, len);
	memcpy(addr, &bound[fd], sizeof(bound[fd]));
	*len = sizeof(bound[fd]);
	return 0;
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t len)
{
	return is_ours(fd) ? 0 : REAL(setsockopt)(fd, level, name, value, len);
}

ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
	struct msghdr plain;

	if (!is_ours(fd))
		return REAL(sendmsg)(fd, msg, flags);
	plain = (struct msghdr){ .msg_iov = msg->msg_iov, .msg_iovlen = msg->msg_iovlen };
	return REAL(sendmsg)(fd, &plain, flags | MSG_NOSIGNAL);
}

ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
	struct msghdr plain;
	ssize_t got;

	if (!is_ours(fd))
		return REAL(recvmsg)(fd, msg, flags);
	plain = (struct msghdr){ .msg_iov = msg->msg_iov, .msg_iovlen = msg->msg_iovlen };
	got = REAL(recvmsg)(fd, &plain, flags);
	if (msg->msg_name && msg->msg_namelen >= sizeof(kernel))
		memcpy(msg->msg_name, &kernel, sizeof(kernel));
	msg->msg_namelen = sizeof(kernel);
	msg->msg_controllen = 0;
	msg->msg_flags = plain.msg_flags;
	return got;
}

int close(int fd)
{
	if (is_ours(fd))
		memset(&bound[fd], 0, sizeof(bound[fd]));
	return REAL(close)(fd);
}
