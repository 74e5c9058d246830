// SPDX-License-Identifier: GPL-2.0-only
/* A web server in C: it answers every request with the address and port that accept() and getpeername() agree about. */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void describe(const struct sockaddr_storage *peer, char *text, size_t size)
{
	const struct sockaddr_in *four = (const struct sockaddr_in *)peer;
	const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)peer;
	char address[INET6_ADDRSTRLEN];

	if (peer->ss_family == AF_INET)
		snprintf(text, size, "%s %u", inet_ntop(AF_INET, &four->sin_addr, address, sizeof(address)),
			 ntohs(four->sin_port));
	else
		snprintf(text, size, "%s %u", inet_ntop(AF_INET6, &six->sin6_addr, address, sizeof(address)),
			 ntohs(six->sin6_port));
}

int main(int argc, char **argv)
{
	struct sockaddr_in four = {.sin_family = AF_INET};
	struct sockaddr_in6 six = {.sin6_family = AF_INET6};
	int is_six = argc == 3 && strchr(argv[1], ':');
	int listener, on = 1;

	if (argc != 3)
		return 2;
	listener = socket(is_six ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)))
		fail("socket");
	if (is_six) {
		six.sin6_port = htons(atoi(argv[2]));
		if (inet_pton(AF_INET6, argv[1], &six.sin6_addr) != 1 ||
		    setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on)) ||
		    bind(listener, (struct sockaddr *)&six, sizeof(six)))
			fail(argv[1]);
	} else {
		four.sin_port = htons(atoi(argv[2]));
		if (inet_pton(AF_INET, argv[1], &four.sin_addr) != 1 ||
		    bind(listener, (struct sockaddr *)&four, sizeof(four)))
			fail(argv[1]);
	}
	if (listen(listener, 100))
		fail("listen");
	for (;;) {
		struct sockaddr_storage accepted, asked;
		socklen_t length = sizeof(accepted), again = sizeof(asked);
		char first[100], second[100], request[1000];
		int link = accept(listener, (struct sockaddr *)&accepted, &length);

		if (link < 0 || getpeername(link, (struct sockaddr *)&asked, &again))
			fail("accept");
		describe(&accepted, first, sizeof(first));
		describe(&asked, second, sizeof(second));
		if (read(link, request, sizeof(request)) > 0)
			dprintf(link, "HTTP/1.0 200 OK\r\n\r\n%s", strcmp(first, second) ? "they differ" : first);
		close(link);
	}
}
