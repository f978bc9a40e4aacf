// Asks for each name that it is given from the one socket that glibc keeps with RES_STAYOPEN, and
// prints the address, and in the end how many sockets there were.
#include <arpa/inet.h>
#include <arpa/nameser.h>
#include <dirent.h>
#include <netdb.h>
#include <netinet/in.h>
#include <resolv.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char seen[16][64];
static int sockets;

// look remembers the sockets that are open.
static void look(void) {
	DIR *all = opendir("/proc/self/fd");
	struct dirent *entry;
	while (all && (entry = readdir(all))) {
		char path[300], link[64];
		snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
		ssize_t n = readlink(path, link, sizeof link - 1);
		if (n < 0)
			continue;
		link[n] = 0;
		int known = strncmp(link, "socket:", 7) != 0;
		for (int i = 0; i < sockets; i++)
			known = known || strcmp(seen[i], link) == 0;
		if (!known && sockets < 16)
			strcpy(seen[sockets++], link);
	}
	if (all)
		closedir(all);
}

int main(int argc, char **argv) {
	if (res_init() != 0)
		return 1;
	_res.options |= RES_STAYOPEN;
	look();
	int inherited = sockets;
	for (int i = 1; i < argc; i++) {
		unsigned char answer[NS_PACKETSZ];
		char text[INET_ADDRSTRLEN];
		ns_msg message;
		ns_rr record;
		int length = res_query(argv[i], ns_c_in, ns_t_a, answer, sizeof answer);
		look();
		if (length < 0)
			printf("%s %s\n", argv[i], h_errno == HOST_NOT_FOUND ? "not found" : hstrerror(h_errno));
		else if (ns_initparse(answer, length, &message) != 0 || ns_parserr(&message, ns_s_an, 0, &record) != 0)
			printf("%s empty\n", argv[i]);
		else
			printf("%s %s\n", argv[i], inet_ntop(AF_INET, ns_rr_rdata(record), text, sizeof text));
	}
	printf("sockets: %d\n", sockets - inherited);
	return 0;
}
