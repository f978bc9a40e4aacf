// Asks c-ares for all names that it is given at once, and prints the addresses of each, and in the
// end how many sockets there were.
#include <ares.h>
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/select.h>
#include <sys/socket.h>

static int sockets;
static char results[16][1024];

static int created(ares_socket_t s, int type, void *unused) {
	(void)s, (void)type, (void)unused;
	sockets++;
	return 0;
}

static void answered(void *arg, int status, int timeouts, struct ares_addrinfo *found) {
	char *result = arg;
	(void)timeouts;
	if (status == ARES_ENOTFOUND)
		strcpy(result, " not found");
	else if (status != ARES_SUCCESS)
		snprintf(result, sizeof results[0], " failure: %s", ares_strerror(status));
	for (struct ares_addrinfo_node *a = found ? found->nodes : NULL; a; a = a->ai_next) {
		char text[INET6_ADDRSTRLEN];
		const void *address = a->ai_family == AF_INET
			? (const void *)&((struct sockaddr_in *)a->ai_addr)->sin_addr
			: (const void *)&((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
		inet_ntop(a->ai_family, address, text, sizeof text);
		strcat(result, " ");
		strcat(result, text);
	}
	if (found)
		ares_freeaddrinfo(found);
}

int main(int argc, char **argv) {
	ares_channel channel;
	struct ares_addrinfo_hints hints;
	memset(&hints, 0, sizeof hints);
	hints.ai_family = AF_UNSPEC;
	if (argc > 16 || ares_library_init(ARES_LIB_INIT_ALL) != ARES_SUCCESS || ares_init(&channel) != ARES_SUCCESS)
		return 1;
	ares_set_socket_callback(channel, created, NULL);
	for (int i = 1; i < argc; i++)
		ares_getaddrinfo(channel, argv[i], NULL, &hints, answered, results[i - 1]);
	for (;;) {
		fd_set readers, writers;
		struct timeval wait;
		FD_ZERO(&readers);
		FD_ZERO(&writers);
		int n = ares_fds(channel, &readers, &writers);
		if (n == 0)
			break;
		select(n, &readers, &writers, NULL, ares_timeout(channel, NULL, &wait));
		ares_process(channel, &readers, &writers);
	}
	for (int i = 1; i < argc; i++)
		printf("%s%s\n", argv[i], results[i - 1]);
	printf("sockets: %d\n", sockets);
	ares_destroy(channel);
	ares_library_cleanup();
	return 0;
}
