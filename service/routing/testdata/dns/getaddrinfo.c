// Prints the addresses of each name that it is given, as the C library finds them.
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(int argc, char **argv) {
	for (int i = 1; i < argc; i++) {
		struct addrinfo hints, *found = NULL, *a;
		memset(&hints, 0, sizeof hints);
		hints.ai_family = AF_UNSPEC;
		hints.ai_socktype = SOCK_STREAM;
		int failure = getaddrinfo(argv[i], NULL, &hints, &found);
		printf("%s", argv[i]);
		if (failure == EAI_NONAME)
			printf(" not found");
		else if (failure)
			printf(" failure: %s", gai_strerror(failure));
		for (a = found; a; a = a->ai_next) {
			char text[INET6_ADDRSTRLEN];
			const void *address = a->ai_family == AF_INET
				? (const void *)&((struct sockaddr_in *)a->ai_addr)->sin_addr
				: (const void *)&((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
			printf(" %s", inet_ntop(a->ai_family, address, text, sizeof text));
		}
		printf("\n");
		if (found)
			freeaddrinfo(found);
	}
	return 0;
}
